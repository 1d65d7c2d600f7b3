"""The loop in this process: what it writes, what it skips, when it stops, what it refuses."""

import dataclasses
import errno
import functools
import json
import os
import re
import resource
import shutil
import threading

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from mamba3_jax import checkpoint, memory
from mamba3_jax.checkpoint import Checkpoints, all_steps, load_config, load_model, save_model
from mamba3_jax.config import DataConfig
from mamba3_jax.sharding import make_mesh, using
from mamba3_jax.train import loop, metrics
from mamba3_jax.train.fit import Failed
from mamba3_jax.train.loop import AHEAD, Diverged, Trainer
from mamba3_jax.train.resume import check
from mamba3_jax.train.step import init_state, state_shapes
from tests.train.tiny import get_config, random_params

STEPS = 20


class Poisoned:
    """A loader that gives batches of infinite weight at the steps that `bad` says, and calls `then` at each step."""

    def __init__(self, data, bad, then=lambda step: None):
        self.data, self.bad, self.then, self.step = data, bad, then, data.get_state()["position"]

    def __next__(self):
        self.step += 1
        self.then(self.step)
        batch = next(self.data)
        return batch._replace(weights_BL=batch.weights_BL * np.float32(np.inf)) if self.bad(self.step) else batch

    def __getattr__(self, name):
        return getattr(self.data, name)


def config(steps=STEPS):
    got = get_config()
    got.train.steps, got.train.max_bad_steps = steps, 3
    return got


def train(config, workdir, bad=lambda step: False, then=lambda trainer, step: None):
    lines = []
    with Trainer(config, workdir, report=lines.append) as trainer:
        trainer.data = Poisoned(trainer.data, bad, functools.partial(then, trainer))
        trainer.run()
    return lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """20 steps, of which the 8th and 9th are not finite."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(config(), workdir, bad=(8, 9).__contains__)


@pytest.mark.full
def test_metrics_have_every_step_once(run):
    lines = metrics.read(run[0] / "metrics.jsonl")
    train_lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train_lines] == list(range(1, STEPS + 1))
    assert [line["skipped"] for line in train_lines] == [0] * 7 + [1] + [2] * 12
    assert [line["step"] for line in train_lines if line["loss"] is None] == [8, 9]
    assert [line["step"] for line in lines if "valid_loss" in line] == [10, 20]
    assert all(line["tokens_per_second"] > 0 and line["grad_norm"] != 0 for line in train_lines)
    # The schedule counts updates, not batches: after two skipped ones it is two behind.
    by_step = {line["step"]: line["learning_rate"] for line in train_lines}
    assert by_step[8] == by_step[9] == by_step[10] > by_step[11]


def test_what_the_run_leaves(run):
    workdir, lines = run
    assert (workdir / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events.out.*"))
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == STEPS
    assert set(all_steps(workdir)) >= {15, 20}
    assert any(re.match(r"step 12/20  loss \d\.\d{4}  lr .*  \|g\| .* tok/s  ETA 0:\d\d  skipped 2$", x) for x in lines)
    assert "best_valid_loss" in lines[-2]
    assert re.search(r"^  skipped +2$", lines[-2], re.MULTILINE)
    assert lines[-1] == "2 of 20 updates were skipped: loss, gradient or result was not finite"


def test_where_the_time_went_is_counted_once(run):
    spent = [line for line in metrics.read(run[0] / "metrics.jsonl") if "seconds_training" in line]
    assert [line["step"] for line in spent] == [5, 10, 15, 20, 20]
    found = metrics.goodput(spent)
    assert found["goodput"] == found["seconds_training"] / sum(found[f"seconds_{kind}"] for kind in metrics.Spent.kinds)
    assert all(found[f"seconds_{kind}"] > 0 for kind in metrics.Spent.kinds)


def test_seconds_are_those_of_the_clock(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 5.0, 5.5, 8.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    spent = metrics.Spent()
    spent.count("starting")  # 1
    with spent.on("compiling"):  # at 4
        pass  # 1
    assert spent.take() == dict.fromkeys([f"seconds_{kind}" for kind in spent.kinds], 0.0) | {
        "seconds_starting": 1.0,
        "seconds_training": 3.5,
        "seconds_compiling": 1.0,
    }
    assert spent.take()["seconds_training"] == 2.5
    assert metrics.goodput([{"step": 1}]) == {}


@pytest.mark.full
def test_a_finished_run_has_nothing_to_do(run):
    before = (run[0] / "metrics.jsonl").read_bytes()
    lines = train(config(), run[0])
    assert (run[0] / "metrics.jsonl").read_bytes() == before
    assert not any(line.startswith("step") for line in lines)


@pytest.mark.full
def test_the_logged_loss_is_the_mean_over_the_steps_since_the_last_line(run, tmp_path):
    sparse = config()
    sparse.train.log_every = 5
    train(sparse, tmp_path, bad=(8, 9).__contains__)
    each = {line["step"]: line for line in metrics.read(run[0] / "metrics.jsonl") if "loss" in line}
    got = {line["step"]: line for line in metrics.read(tmp_path / "metrics.jsonl") if "loss" in line}
    for step, of in {5: range(1, 6), 10: (6, 7, 10), 15: range(11, 16), 20: range(16, 21)}.items():
        for name in ("loss", "accuracy"):
            assert got[step][name] == pytest.approx(np.mean([each[step][name] for step in of]), rel=1e-12)
        assert got[step]["loss_last"] == each[step]["loss"] != got[step]["loss"]
    assert sorted(got) == [5, 10, 15, 20]


@pytest.mark.full
def test_stops_after_too_many_bad_steps_and_keeps_the_last_good_checkpoint(run):
    workdir, longer = run[0], config(40)
    longer.optimizer.clip = 0.0  # what may change may change
    before, params = all_steps(workdir), load_model(workdir)[1]
    with pytest.raises(Diverged, match=r"not finite in 3 steps in a row, the last one step 24; .* of step 20 in "):
        train(longer, workdir, bad=lambda step: step > 21)
    assert all_steps(workdir) == before
    assert all(np.array_equal(a, b) for a, b in zip(leaves(params), leaves(load_model(workdir)[1]), strict=True))
    # It stops within the few steps that were on their way, not at the end.
    lines = [line["step"] for line in metrics.read(workdir / "metrics.jsonl") if "loss" in line]
    assert lines == list(range(1, 25))
    assert AHEAD <= 2


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("field", "value"), [("model.d_state", 16), ("data.batch", 8), ("seed", 1), ("data.source", "text")]
)
def test_another_model_or_data_does_not_resume(run, field, value):
    other = config()
    section, _, name = field.rpartition(".")
    setattr(getattr(other, section) if section else other, name, value)
    if field == "data.source":
        other.model.vocab_size = 256
    with pytest.raises(ValueError, match=r"config\.(model|data)?\.?\w+=.*was trained with .* another workdir"):
        Trainer(other, run[0])


def test_what_may_change_is_reported():
    old, new = config(), config(40)
    new.optimizer.learning_rate, new.model.chunk, new.data.workers = 1.0, 16, 2
    got = check(old, new, "path")
    assert got == {
        "train.steps": (20, 40),
        "optimizer.learning_rate": (old.optimizer.learning_rate, 1.0),
        "model.chunk": (0, 16),
        "data.workers": (0, 2),
    }


def test_starts_from_parameters_alone(tmp_path):
    """What `launch.convert` writes is a start: any data and seed, the same model."""
    start, other = config(), config()
    save_model(tmp_path, start, random_params(start))
    other.seed, other.data.seed = 5, 5
    with Trainer(other, tmp_path, report=lambda *_: None) as trainer:
        assert (trainer.step, trainer.state) == (0, None)
        assert all(
            np.array_equal(*pair)
            for pair in zip(leaves(trainer.start_params), leaves(random_params(start)), strict=True)
        )
    other.model.d_state = 16
    with pytest.raises(ValueError, match="d_state=16"):
        Trainer(other, tmp_path)


@pytest.mark.full
def test_the_first_state_has_the_parameters_to_start_from(tmp_path):
    start = config()
    save_model(tmp_path, start, random_params(start))
    with Trainer(start, tmp_path, report=lambda *_: None) as trainer, using(trainer.mesh):
        given = trainer.start_params
        trainer.compile()
        assert all(
            ours is theirs for ours, theirs in zip(*map(jax.tree.leaves, (trainer.state.params, given)), strict=True)
        )
        assert not any(leaf.any() for leaf in leaves(trainer.state.opt_state))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", {"steps": 0}, "train.steps=0 is not in 1"),
        ("train", {"mesh": "data:3"}, "mesh='data:3'"),
        ("train", {"eval_every": -1}, "train.eval_every=-1 is not in 0"),
        ("optimizer", {"accumulate": 3}, "data.batch=4 is not a positive multiple of 3"),
        ("optimizer", {"schedule": "step"}, "schedule='step'"),
        ("model", {"vocab_size": 1}, "vocab_size=1 is less than the 2 ids"),
        ("model", {"head_dim": 7}, "head_dim"),
        ("model", {"implementation": "triton"}, "implementation='triton' needs an NVIDIA GPU"),
        ("model", {"pattern": "A", "attn_head_dim": 8, "attn_implementation": "cudnn"}, "='cudnn' needs an NVIDIA GPU"),
        ("data", {"length": 1}, "data.length=1"),
        ("data", {"seed": -1}, "data.seed=-1 is not in 0"),
        ("data", {"seed": 2**32}, "data.seed=4294967296 is not in 0"),
    ],
)
def test_what_cannot_be_trained_is_named_before_any_compile(tmp_path, section, changes, message):
    bad = config()
    setattr(bad, section, dataclasses.replace(getattr(bad, section), **changes))
    with pytest.raises(ValueError, match=message):
        Trainer(bad, tmp_path / "run")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_of_more_than_32_bits_is_named(tmp_path, seed):
    with pytest.raises(ValueError, match=f"^config.seed={seed} is not in 0"):
        Trainer(dataclasses.replace(config(), seed=seed), tmp_path)


def test_a_second_run_in_a_workdir_is_refused_while_the_first_is_at_work(tmp_path):
    quiet = {"report": lambda *_: None}
    second = pytest.raises(ValueError, match=r"another run is at work in .*: it holds .*/lock")
    with Trainer(config(), tmp_path, **quiet), second:
        Trainer(config(), tmp_path, **quiet)
    with Trainer(config(), tmp_path, **quiet):
        pass


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Trainer(config(), tmp_path / "file" / "run")


class Full:
    """A file on a full disk."""

    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self):
        self.write("")


def no_more_room(trainer, step):
    """From step 7 on no file may have more than 8,000 bytes, which is less than the parameters."""
    if step == 7:
        trainer.checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))


def full_metrics(trainer, step):
    if step == 7:
        trainer.logs[0]._file = Full()


def full_board(trainer, step):
    if step == 7:
        trainer.logs[0]._board._events = Full()
        trainer.logs[0]._board._events.write_event = trainer.logs[0]._board._events.write


def no_curve(trainer, step):
    (trainer.workdir / "curve.png").mkdir(exist_ok=True)


@pytest.mark.full
@pytest.mark.parametrize(
    ("then", "path", "reason", "last"),
    [
        (no_more_room, "checkpoints/10", errno.EFBIG, 5),
        (full_metrics, "metrics.jsonl", errno.ENOSPC, 5),
        (full_board, "tensorboard", errno.ENOSPC, 5),
        (no_curve, "curve.png", errno.EISDIR, STEPS),
    ],
)
def test_a_file_that_cannot_be_written_ends_the_run_with_its_last_good_checkpoint(
    run, tmp_path, then, path, reason, last, threads_that_died
):
    limits, tight = resource.getrlimit(resource.RLIMIT_FSIZE), config()
    tight.train.keep = 1  # the one before goes when its successor is whole, not sooner
    try:
        # Some versions of tensorstore say a code before the system's words, which may be cut out of a long line.
        said = rf"^{tmp_path}/{path} cannot be written: .*({os.strerror(reason)}|OUT_OF_RANGE)"
        with pytest.raises(Failed, match=said) as error:
            train(tight, tmp_path, bad=(8, 9).__contains__, then=then)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"; the last good checkpoint is of step {last} in {tmp_path}/checkpoints: " in str(error.value)
    assert "\n" not in str(error.value)
    assert threads_that_died == []
    assert all_steps(tmp_path)[-1] == last
    if path == "curve.png":
        (tmp_path / path).rmdir()
    train(config(), tmp_path, bad=(8, 9).__contains__)
    for pair in zip(*(leaves(load_model(folder, STEPS)[1]) for folder in (run[0], tmp_path)), strict=True):
        assert np.array_equal(*pair), "resumed, it is the same run"


@pytest.fixture
def threads_that_died(monkeypatch):
    """What threads died of, instead of a traceback on stderr."""
    found = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    return found


@pytest.mark.full
def test_a_run_begins_from_finite_numbers_only(run, tmp_path, monkeypatch):
    start = config()
    params = random_params(start)
    workdir = shutil.copytree(run[0], tmp_path / "resumed")
    with Checkpoints(workdir, start) as checkpoints:
        step = checkpoints.latest()
        state = state_shapes(start, make_mesh(start.train.mesh))._asdict()
        kept, rest, data = checkpoints.restore(step, state.pop("params"), state)
    (moments, adam, *others) = rest["opt_state"]
    adam = adam._replace(mu=jax.tree.map(lambda leaf: leaf.at[..., 0].set(np.inf), adam.mu))
    rest["opt_state"] = (moments, adam, *others)
    params["norm"]["scale"][3] = np.nan
    forced(workdir, start, 30, kept, rest, data)
    forced(tmp_path / "alone", start, 0, params)
    for folder, message in (
        (workdir, r"/30: .*: state/opt_state.*mu"),
        (tmp_path / "alone", "/0: 1 of .*: params/norm"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(config(40), folder, report=lambda *_: None)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params["embedding"])
    made = lambda config: init_state(config)._replace(params=params | {"embedding": broken})  # noqa: E731
    monkeypatch.setattr(loop, "init_state", made)
    fresh = Trainer(config(), tmp_path / "fresh", report=lambda *_: None)
    with (
        fresh,
        pytest.raises(Failed, match=r"^the initial state: 2 of .*: params/embedding/embedding, params/norm/scale$"),
    ):
        fresh.run()
    assert all_steps(tmp_path / "fresh") == []


def forced(workdir, config, *save):
    """A checkpoint as a program without checks would have saved it."""
    with pytest.MonkeyPatch.context() as patch, Checkpoints(workdir, config) as checkpoints:
        patch.setattr(checkpoint, "check_finite", lambda *_: None)
        checkpoints.save(*save)


@pytest.mark.parametrize(
    "damaged",
    [b"{", b"\xff\x00\xfe", b"", b"null", b"[1]", b'{"loss": 1.0}', b'{"step": "x"}', b'{"step": 2, "loss": "x"}'],
)
def test_a_damaged_line_of_the_metrics_is_dropped_with_a_word(tmp_path, damaged):
    path, words = tmp_path / "metrics.jsonl", []
    path.write_bytes(
        b'{"step": 1, "loss": 2.0}\n' + damaged + b'\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0}\n'
    )
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    assert metrics.read(path, words.append) == good
    assert words == [f"{path}: 1 damaged lines are left out, the first one line 2"]
    metrics.draw_curve(tmp_path / "curve.png", metrics.read(path), config())
    log = metrics.Log(tmp_path, 2, words.append)
    log.close()
    assert metrics.read(path, words.append) == good[:2]
    assert len(words) == 2


def test_log_drops_what_came_after_the_step_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    log = metrics.Log(tmp_path, 2)
    log.write(3, {"loss": float("nan")})
    log.close()
    assert metrics.read(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": None}]


def test_clock():
    assert [metrics.clock(x) for x in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


@pytest.mark.full
def test_the_tokenizer_travels_with_the_run(tmp_path):
    path = tmp_path / "words.json"
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "?": 2}, unk_token="?")).save(str(path))
    (tmp_path / "a.txt").write_text("a b " * 90)
    text = {"source": "text", "train_glob": str(tmp_path / "a.txt"), "valid_glob": __file__, "length": 2, "batch": 1}
    got = config(steps=1)
    got.train.eval_every = 0
    got.model.vocab_size, got.data = 3, DataConfig(tokenizer=str(path), **text)
    train(got, tmp_path / "first")
    run = (tmp_path / "first").rename(tmp_path / "run")
    assert load_config(run).data.tokenizer == str(run / "tokenizer" / "tokenizer.json")

    lines, got.train.steps = [], 2
    original = path.read_text()
    for there in (original, None):
        path.write_text(there) if there else path.unlink()
        with Trainer(got, run, report=lines.append) as trainer:
            assert trainer.step == 1
        assert lines == [f"tokenizer: {run}/tokenizer/tokenizer.json, the run's own copy of {path}"]
        lines.clear()
    path.write_text(original.replace('"?"', '"!"'))
    with pytest.raises(ValueError, match=r"words.json' \(sha256 .*\) is not, or no longer, what the checkpoints have"):
        Trainer(got, run)
    got.data.tokenizer = "bytes"
    got.model.vocab_size = 256
    with pytest.raises(ValueError, match=r"but .* was trained with"):
        Trainer(got, run)


@pytest.mark.full
@pytest.mark.parametrize(
    ("given", "sizes", "remat"),
    [
        ("", [2], "none"),
        ("", [4, 2], "rotation"),
        ("", [4, 3, 2], "block"),
        ("", [4, 4, 4], None),
        ("op", [2], "op"),
        ("op", [4], None),
    ],
)
def test_what_is_kept_for_the_backward_pass_is_as_much_as_fits(tmp_path, monkeypatch, given, sizes, remat):
    """In the order of what it costs; where nothing fits, one line says what it would take."""
    left = iter(sizes)
    monkeypatch.setattr(memory, "of_program", lambda compiled: 10**9 * next(left))
    monkeypatch.setattr(memory, "of_device", lambda: 2 * 10**9)
    run = config()
    run.model.remat = given
    with Trainer(run, tmp_path, report=lambda *_: None) as trainer, using(trainer.mesh):
        if remat:
            assert trainer._fitting()[1] == remat
            return
        with pytest.raises(Failed, match=r"remat='(block|op)' does not fit: 4 GB needed on each device, 2 GB there$"):
            trainer._fitting()
