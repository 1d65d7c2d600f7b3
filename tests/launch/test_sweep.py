"""The sweep as a command: what it refuses, that it goes past what is done, and that a kill changes nothing."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from launch import asked, common, experiment
from launch.asked import asked_of
from launch.plan import read_plan
from mamba3_jax.checkpoint import Checkpoints, all_steps, keep_parameters, load_config, load_model, save_model
from mamba3_jax.data import pipeline, text
from mamba3_jax.files import check_writable, write_json
from mamba3_jax.train.population import member_config
from mamba3_jax.train.resume import alone
from mamba3_jax.train.step import init_state
from tests.helpers import devices, rel_rms, without_times
from tests.launch import tiny_sweep

ROOT = Path(__file__).parents[2]
STEPS = tiny_sweep.get_config().train.steps


def plan_of(tmp_path, source: str, **values):
    """The plan of a file that begins as the tiny one and goes on with `source`."""
    path = tmp_path / "file.py"
    path.write_text(f"from tests.launch.tiny_sweep import *\n{source}\n")
    return read_plan(str(path), tiny_sweep.get_config(), **values)


def test_the_plan_is_the_files_and_the_flags(tmp_path):
    plan = plan_of(tmp_path, "")
    assert list(plan.variants) == ["mamba3", "still"]
    assert [config.model.angles for config in plan.variants.values()] == ["data", "none"]
    assert [tuple(member) for member in plan.members] == [(0, 1e-3), (1, 1e-3), (0, 1e-2), (1, 1e-2)]
    assert (plan.lengths, plan.metric) == ((16, 32), "scaled_last@32")
    plan = plan_of(tmp_path, "", only=["still"], seeds=1, rates=[3e-3])
    assert plan.chosen == ("still",)
    assert [tuple(member) for member in plan.members] == [(0, 3e-3)]


@pytest.mark.parametrize(
    ("source", "values", "message"),
    [
        ("", {"only": ["stil"]}, "there is no variant 'stil', only mamba3, still"),
        ("", {"rates": [0.0]}, "learning_rate=0.0 is not a float32 number in"),
        ("VARIANTS = {'x': {'model.d_stat': 4}}; EXPECT = {}", {}, "variant x: config.model has no field 'd_stat'"),
        ("VARIANTS = {'x': {'model.d_state': 'a'}}; EXPECT = {}", {}, "variant x: config.model.d_state='a' is not of"),
        ("VARIANTS = {'x': {'d_state.y': 4}}; EXPECT = {}", {}, "variant x: config has no field 'd_state'"),
        ("VARIANTS = {'x': {'model': 4}}; EXPECT = {}", {}, "variant x: config.model=4 is not a ModelConfig"),
        ("VARIANTS = {'../x': {}}; EXPECT = {}", {}, "variant '../x' is not a name"),
        ("METRIC = 'scaled_last@64'", {}, "scaled_last@64: length 64 is not scored, only 16, 32"),
        ("EXPECT = {'y': ('best scaled_last@32', 0.0, 1.0)}", {}, "EXPECT has 'y'"),
        ("LENGTHS = (0,)", {}, "0 is less than"),
        ("METRIC = 'scaled@32'", {}, "'scaled@32': there is no 'scaled' at a length, only accuracy, last, scaled_last"),
        ("SHOWN = ('los',)", {}, "'los': there is no 'los', only loss, "),
        ("EXPECT = {'still': ('median loss', 0.0, 1.0)}", {}, "EXPECT has 'median loss': wanted worst, mean, best"),
        ("SIZES = {'x': {'mamba': 1}}", {}, "SIZES.* has 'mamba', which is none of VARIANTS"),
        ("EQUAL = [('x', 'still')]", {}, "EQUAL has .*'still'.*: wanted pairs of a line of SIZES and one of"),
        ("SIZES = {'x': {'still': 1}}; EQUAL = ['xy']", {}, "EQUAL=['xy'] is not a list of pairs"),
        ("EXPECT = {'still': ('best lost', 0.0, 1.0)}", {}, "'lost': there is no 'lost', only loss"),
        ("SEEDS = 0", {}, "SEEDS=0 is not a whole number in 1 .. 4096"),
        ("SEEDS = '3'", {}, "SEEDS='3' is not a whole number"),
        ("SEEDS = True", {}, "SEEDS=True is not a whole number"),
        ("", {"seeds": 10**9}, "1000000000 seeds x 2 learning rates are more than 4096 members"),
        ("", {"rates": [1e-3, 1e-3]}, "two members are seed_0_lr_0.001"),
        ("LEARNING_RATES = (None,)", {}, "LEARNING_RATES=(None,) is not a list of numbers"),
        ("SHOWN = (5,)", {}, "SHOWN=(5,) is not a list of metrics"),
        ("EXPECT = {'still': 5, 'mamba3': 6}", {}, "EXPECT={'still': 5} is not {variant: ("),
        ("EXPECT = {'still': ('best loss', 0.5)}", {}, "EXPECT=.*0.5)} is not {variant: ("),
        ("EXPECT = {'still': ('best loss', 1.0, 0.0)}", {}, "EXPECT=.* is not .*the lesser one first"),
        ("EXPECT = {'still': ('best loss', 0.0, 1e999)}", {}, "EXPECT=.*inf)} is not .*two finite numbers"),
        ("EXPECT = {'still': ('best', 0.0, 1.0)}", {}, "EXPECT has 'best ': wanted .* a metric"),
        ("SIZES = {'x': 5}", {}, "SIZES={'x': 5} is not {line: {variant: size}}"),
        ("SIZES = {'x': {'mamba3': 0, 'still': 1}}", {}, "SIZES=.* is not .*over 0 and rising"),
        ("SIZES = {'x': {'mamba3': 2, 'still': 2}}", {}, "SIZES=.* is not .*over 0 and rising"),
        ("EQUAL = [5]", {}, "EQUAL=[5] is not a list of pairs"),
        ("PAPER = {'still': '99.5'}", {}, "PAPER={'still': '99.5'} is not {variant: number}"),
        ("VARIANTS = {'a': None}", {}, "VARIANTS={'a': None} is not {name: {field: value}}"),
        ("VARIANTS = {}", {}, "VARIANTS={} is not .*at least one name"),
        ("VARIANTS = {'..': {}}; EXPECT = {}", {}, "variant '..' is not a name"),  # whose folder the sweep cleans
        ("VARIANTS = {'x': {'data.source': 'nedle'}}; EXPECT = {}", {}, "variant x: data.source='nedle' is not one of"),
        ("VARIANTS = {'x': {'data.task_lengths': ()}}; EXPECT = {}", {}, "variant x: data.task_lengths=() and"),
        # What would end the sweep when it comes to a later variant, or be said to have been done and was not.
        ("VARIANTS = {'x': {'train.mesh': 'fsdp:1'}}; EXPECT = {}", {}, "variant x: train.mesh='fsdp:1': the devices"),
        ("VARIANTS = {'x': {'seed': 2**32 - 1}}; EXPECT = {}", {}, "variant x: config.seed=4294967296 is not in"),
        (
            "VARIANTS = {'x': {'model.implementation': 'triton'}}; EXPECT = {}",
            {},
            "variant x: implementation='triton' needs an NVIDIA GPU, not 'cpu'",
        ),
        (
            "VARIANTS = {'x': {'optimizer.learning_rate': 0.5}}; EXPECT = {}",
            {},
            "variant x: optimizer.learning_rate=0.5 would not be its own",
        ),
        (
            "VARIANTS = {'x': {'data.source': 'mqar', 'data.task_pairs': (99,)}}; EXPECT = {}",
            {},
            "variant x: data.task_",
        ),
        ("VARIANTS = {'x': {'data.source': 'text', 'model.vocab_size': 256}}; EXPECT = {}", {}, "32': there is no"),
        ("VARIANTS = ['a']", {}, "VARIANTS=.* is not {name: {field: value}}"),
    ],
)
def test_what_cannot_be_swept_is_refused(source, values, message, tmp_path):
    for sign in "()[]{}":
        message = message.replace(sign, f"\\{sign}")
    with pytest.raises(ValueError, match=message):
        plan_of(tmp_path, source, **values)


def result_of(plan, name: str) -> dict:
    """Return a whole result of a variant, as `launch.sweep` writes it beside its checkpoints."""
    metrics = dict.fromkeys(("loss", "accuracy", "last", "scaled_last", "exact"), 0.5)
    scores = [{"length": length, **metrics} for length in plan.lengths]
    rows = [{"variant": name, **member._asdict(), "loss": 1.0, "scores": scores} for member in plan.members]
    return dict.fromkeys(asked.KEPT, "") | {
        "variant": name,
        "best": plan.members[0].name,
        "resumed_after": 0,
        "seconds": {"train": 1.0, "score": 1.0},
        "asked": asked_of(plan, name),
        "rows": rows,
    }


def file_of(plan) -> dict:
    """Return a whole result file of all variants."""
    results = {name: result_of(plan, name) for name in plan.variants}
    return {
        "variants": {name: {key: result[key] for key in asked.KEPT} for name, result in results.items()},
        "rows": [row for result in results.values() for row in result["rows"]],
    }


DAMAGED = [
    ("{", "is not JSON"),
    ("", "is not JSON"),
    ("\0", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "is not a result of launch.sweep"),
    ('{"rows": []}', "is not a result of launch.sweep"),
    ('{"rows": 5, "variants": {}, "variant": "mamba3", "asked": {}}', "is not a result of launch.sweep"),
    ('{"rows": [5], "variants": {}, "variant": "mamba3", "asked": {}}', "is not a result of launch.sweep"),
    ('{"rows": [{"variant": []}], "variants": {}, "variant": "a", "asked": {}}', "is not a result of launch.sweep"),
]


@pytest.mark.parametrize(("text", "message"), [*DAMAGED, ('{"variants": [], "rows": []}', "is not a result of launch")])
def test_another_file_is_not_overwritten(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=f"x.json {message}"):
        asked.recorded(tmp_path / "x.json", plan_of(tmp_path, ""))


@pytest.mark.parametrize(("text", "message"), DAMAGED)
def test_a_damaged_result_of_a_variant_is_named(text, message, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=f"result.json {message}"):
        asked.done_before(plan_of(tmp_path, ""), "mamba3", tmp_path)


@pytest.mark.parametrize("damage", ["commit", "seconds", "rows", "scores", "length", "scaled_last", "learning_rate"])
def test_a_result_without_what_is_compared_is_named(damage, tmp_path):
    """Before anything is trained: whatever is missing in it would end the sweep at its end."""
    plan = plan_of(tmp_path, "")

    def damaged(result: dict, rows: list) -> None:
        row = rows[0]
        if damage == "rows":
            rows.clear()
        elif damage in ("length", "scaled_last"):
            row["scores"] = [{key: value for key, value in score.items() if key != damage} for score in row["scores"]]
        else:
            (row if damage in row else result).pop(damage)

    result, file = result_of(plan, "mamba3"), file_of(plan)
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert asked.done_before(plan, "mamba3", tmp_path) == result
    damaged(result, result["rows"])
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"result.json cannot be compared"):
        asked.done_before(plan, "mamba3", tmp_path)
    own = [row for row in file["rows"] if row["variant"] == "mamba3"]
    others = [row for row in file["rows"] if row["variant"] != "mamba3"]
    damaged(file["variants"]["mamba3"], own)
    (tmp_path / "x.json").write_text(json.dumps(file | {"rows": own + others}))
    with pytest.raises(ValueError, match=r"x.json cannot be compared"):
        asked.recorded(tmp_path / "x.json", plan)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """A file where a folder is wanted, a folder where the file is wanted, and one that nobody may write."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "x.json").mkdir(parents=True)
    for path in (tmp_path / "file" / "x.json", tmp_path / "folder" / "x.json", Path("/proc/none/x.json")):
        with pytest.raises(OSError, match=f"{path} cannot be written"):
            check_writable(path)
    check_writable(tmp_path / "new" / "folder" / "x.json")
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_recorded_variants_are_kept_while_they_are_asked_for_alike(tmp_path):
    plan = plan_of(tmp_path, "")
    file = file_of(plan)
    found = file["variants"]
    found["mamba3"]["asked"]["config"]["model"]["d_state"] += 1
    del found["still"]["asked"]["config"]["data"]["task_mixed"]  # of a time before this field, whose default it had
    (tmp_path / "x.json").write_text(json.dumps(file))
    known = asked.recorded(tmp_path / "x.json", plan)  # it trains mamba3 anew
    assert list(known) == ["still"]
    assert known["still"]["rows"] == result_of(plan, "still")["rows"]
    with pytest.raises(ValueError, match=r"x.json has mamba3 of another plan, which would be lost"):
        asked.recorded(tmp_path / "x.json", plan_of(tmp_path, "", only=["still"]))


def test_a_field_that_came_since_leaves_a_result_what_it_is(tmp_path):
    plan, path = plan_of(tmp_path, ""), tmp_path / "x.json"
    file = file_of(plan)
    assert file["variants"]["mamba3"]["asked"]["config"]["model"].pop("layout")  # at its default
    assert file["variants"]["still"]["asked"]["config"]["model"].pop("angles")  # which is not that of the plan
    path.write_text(json.dumps(file))
    assert list(asked.recorded(path, plan)) == ["mamba3"]
    file["variants"]["mamba3"]["asked"]["config"]["gone"] = 1
    path.write_text(json.dumps(file))
    assert list(asked.recorded(path, plan)) == []


def test_results_of_other_text_are_told_apart(tmp_path, capsys):
    """By its tokens, whatever the files are called; those of a task by its config alone."""
    assert "data" not in asked_of(plan_of(tmp_path, ""), "mamba3")
    for split, content in (("train", "one two " * 20), ("valid", "three " * 20)):
        (tmp_path / f"{split}.txt").write_text(content)
    config = tiny_sweep.get_config()
    config.model.vocab_size = 256
    config.data.source, config.data.tokenizer, config.data.length = "text", "bytes", 8
    config.data.train_glob, config.data.valid_glob = (f"{tmp_path}/{split}.txt" for split in ("train", "valid"))
    (tmp_path / "file.py").write_text("VARIANTS = {'a': {}, 'b': {'model.angles': 'none'}}")
    plan = read_plan(str(tmp_path / "file.py"), config)
    path, done = tmp_path / "x.json", tmp_path / "a" / "result.json"
    path.write_text(json.dumps(file_of(plan)))
    done.parent.mkdir()
    done.write_text(json.dumps(result_of(plan, "a")))
    assert list(asked.recorded(path, plan)) == ["a", "b"]
    assert experiment.run_variant(plan, "a", done.parent, "", print)["asked"]["data"]["train"].startswith("161 tokens")

    (tmp_path / "valid.txt").write_text("other " * 20)
    text._corpus.cache_clear()  # as in another process
    pipeline._identity.cache_clear()
    assert asked.recorded(path, plan) == {}
    assert "a result of other data, which does not count: its data was train 161 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        experiment.run_variant(plan, "a", done.parent, "", print)
    assert "has a result of other data: its data was train 161 tokens" in capsys.readouterr().err
    assert done.exists()


def finished(plan, name: str, folder: Path) -> None:
    """Write what a variant leaves when it is done, of untrained members: two checkpoints and a result, no best one."""
    config = plan.variants[name]
    seed_M = np.arange(len(plan.members), dtype=np.uint32)
    state = jax.vmap(lambda seed: init_state(dataclasses.replace(config, seed=seed)))(seed_M)._asdict()
    with Checkpoints(folder, config) as checkpoints:
        for step in (STEPS - 1, STEPS):
            checkpoints.save(step, state["params"], {key: state[key] for key in state if key != "params"}, {})
    write_json(folder / "result.json", result_of(plan, name))


def test_a_variant_that_is_done_keeps_what_is_read_of_it(tmp_path, monkeypatch):
    """The parameters of its members, from which it is scored anew where that is asked for; no moments."""
    plan, folder = plan_of(tmp_path, "", only=["still"]), tmp_path / "still"
    finished(plan, "still", folder)
    assert len(all_steps(folder)) == 2
    held = load_model(folder)[1]
    before = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*"))

    monkeypatch.setattr(experiment, "Population", None)  # nothing is trained
    longer = plan_of(tmp_path, "LENGTHS = (16, 32, 64)", only=["still"])
    metrics = dict.fromkeys(("loss", "accuracy", "last", "scaled_last", "exact"), 0.25)
    found = [[{"length": length, **metrics} for length in longer.lengths] for _ in longer.members]
    monkeypatch.setattr(experiment, "scores", lambda *_: found)
    result = experiment.run_variant(longer, "still", folder, "", print)
    assert [row["scores"] for row in result["rows"]] == found
    assert all(row["loss"] == 1.0 for row in result["rows"])  # of the training
    assert result["seconds"]["train"] == 1.0
    assert asked.done_before(longer, "still", folder) == json.loads((folder / "result.json").read_text())
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [str(STEPS)]
    jax.tree.map(np.testing.assert_array_equal, load_model(folder)[1], held)
    jax.tree.map(np.testing.assert_array_equal, load_model(folder / "best")[1], jax.tree.map(lambda x: x[0], held))
    assert sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*")) < before / 3
    assert experiment.run_variant(longer, "still", folder, "", print)["rows"] == result["rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.steps": STEPS + 1}, f"its config.train.steps was {STEPS}, and is {STEPS + 1}; use another workdir"),
        ({"optimizer.weight_decay": 0.5}, "its config.optimizer.weight_decay was 0.1, and is 0.5"),
        ({"model.d_state": 16}, "its config.model.d_state was 8, and is 16"),
        ({"seeds": 1}, "it has other seeds or learning rates"),
        ({"train.z_loss": 0.5}, "its config.train.z_loss was 0.0, and is 0.5"),
        ({"train.max_bad_steps": 3}, "its config.train.max_bad_steps was 10, and is 3"),
        ({"train.eval_batches": 1}, "its config.train.eval_batches was 2, and is 1"),  # of which valid_loss is the mean
        ({"train.log_every": 7}, "its config.train.log_every was 1, and is 7"),  # steps over which loss is the mean
        ({"train.save_every": 7, "model.unroll": 1}, ""),
    ],
)
def test_a_result_of_another_training_is_not_replaced(change, message, tmp_path):
    """It was trained for long, and would be called what the plan asks for."""
    write_json(tmp_path / "result.json", result_of(plan_of(tmp_path, ""), "still"))
    how, fields = ({**change}, {}) if "seeds" in change else ({}, change)
    plan = plan_of(tmp_path, f"VARIANTS = {{'still': {{'model.angles': 'none', **{fields}}}}}; EXPECT = {{}}", **how)
    if not message:  # how it is run is nobody's finding: it is scored anew
        assert asked.done_before(plan, "still", tmp_path) is None
        return
    with pytest.raises(ValueError, match=f"has a result of another training: {message}"):
        asked.done_before(plan, "still", tmp_path)


@pytest.mark.parametrize("damage", [None, {"config": 1}, {"data": ["161 tokens"]}, {"data": {"train": 161}}])
def test_a_result_that_does_not_say_what_was_asked_is_not_replaced(damage, tmp_path):
    plan = plan_of(tmp_path, "")
    result = result_of(plan, "still")
    write_json(tmp_path / "result.json", result | {"asked": {} if damage is None else result["asked"] | damage})
    with pytest.raises(ValueError, match=r"result.json does not say what was asked for, .*: move .* away"):
        asked.done_before(plan, "still", tmp_path)


def test_checkpoints_of_another_training_are_not_gone_on_from(tmp_path):
    """Their result would be called what the plan asks for; and those of parameters have no more to go on with."""
    plan, folder = plan_of(tmp_path, "", only=["still"]), tmp_path / "still"
    finished(plan, "still", folder)
    (folder / "result.json").rename(folder / "moved")
    assert asked.done_before(plan, "still", folder) is None
    fields = "{'model.angles': 'none', 'optimizer.weight_decay': 0.5}"
    other = plan_of(tmp_path, f"VARIANTS = {{'still': {fields}}}; EXPECT = {{}}")
    with pytest.raises(ValueError, match=r"has checkpoints of another training: its config.optimizer.weight_decay was"):
        asked.done_before(other, "still", folder)
    keep_parameters(folder)
    with pytest.raises(ValueError, match=rf"its result.json is gone: put it back, or move {folder} away"):
        asked.done_before(plan, "still", folder)


@pytest.mark.parametrize("left", ["moments", "no best", "other best", "nothing"])
def test_what_a_kill_left_of_a_variant_that_is_done_is_finished(left, tmp_path, monkeypatch):
    """By the same command, which trains nothing and scores only for a best member that is not there."""
    plan, folder = plan_of(tmp_path, "", only=["still"]), tmp_path / "still"
    finished(plan, "still", folder)
    held = load_model(folder)[1]
    number = 1 if left == "other best" else 0
    if left != "no best":
        member = member_config(plan.variants["still"], plan.members[number])
        save_model(folder / "best", member, jax.tree.map(lambda x: x[number], held), STEPS)
    if left != "moments":
        keep_parameters(folder)
    scored, rows = [], result_of(plan, "still")["rows"]
    monkeypatch.setattr(experiment, "Population", None)
    monkeypatch.setattr(experiment, "scores", lambda *_: scored.append(1) or [row["scores"] for row in rows])
    result = experiment.run_variant(plan, "still", folder, "", print)
    assert bool(scored) == ("best" in left)
    assert result["rows"] == rows
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [str(STEPS)]
    assert not list((folder / "checkpoints").glob("*/state"))
    assert load_config(folder / "best").seed == plan.variants["still"].seed
    jax.tree.map(np.testing.assert_array_equal, load_model(folder / "best")[1], jax.tree.map(lambda x: x[0], held))


def test_the_best_member_is_there_while_it_is_scored_anew(tmp_path, monkeypatch):
    """Scores change; parameters do not, so it is not written again where it is the same one."""
    plan, folder = plan_of(tmp_path, "", only=["still"]), tmp_path / "still"
    finished(plan, "still", folder)
    own = jax.tree.map(lambda x: x[0], load_model(folder)[1])
    save_model(folder / "best", member_config(plan.variants["still"], plan.members[0]), own, STEPS)
    longer = plan_of(tmp_path, "LENGTHS = (16, 32, 64)", only=["still"])
    monkeypatch.setattr(experiment, "Population", None)
    monkeypatch.setattr(experiment, "save_model", None)
    found = [result_of(longer, "still")["rows"][0]["scores"]] * len(plan.members)
    monkeypatch.setattr(experiment, "scores", lambda *_: found)
    assert experiment.run_variant(longer, "still", folder, "", print)["rows"][0]["scores"] == found[0]


def test_one_process_at_a_time_is_at_a_variant(tmp_path, capsys):
    """From its training to its last file: another would delete what this one writes."""
    with alone(tmp_path, "sweep.lock"), pytest.raises(SystemExit):
        experiment.run_variant(plan_of(tmp_path, ""), "still", tmp_path, "", print)
    assert f"another run is at work in {tmp_path}: it holds {tmp_path}/sweep.lock" in capsys.readouterr().err


@pytest.fixture
def trained(monkeypatch):
    """Variants have their results at once; a function put here is called with the name of one before it has."""
    before = {}

    def run_variant(plan, name, folder, *_):
        before.get(name, lambda: None)()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "result.json", result_of(plan, name))
        return result_of(plan, name)

    monkeypatch.setattr(experiment, "run_variant", run_variant)
    return before


def held_by(path) -> dict[str, int]:
    """Return the state size of every variant in a result file, and see that each has rows."""
    found = json.loads(path.read_text())
    assert {row["variant"] for row in found["rows"]} == set(found["variants"])
    return {name: result["asked"]["config"]["model"]["d_state"] for name, result in found["variants"].items()}


def test_a_sweep_of_some_variants_has_those_done_before_in_its_table(tmp_path, trained):
    """In whatever order they are run; one of another plan is left where it is, and out of the table."""
    for name in ("still", "mamba3"):
        experiment.sweep(plan_of(tmp_path, "", only=[name]), "tiny", tmp_path, None, {}, "")
    assert list(held_by(tmp_path / "results.json")) == ["mamba3", "still"]
    seen = []
    trained["still"] = lambda: seen.append(held_by(tmp_path / "results.json"))
    experiment.sweep(plan_of(tmp_path, ""), "tiny", tmp_path, None, {}, "")
    assert list(seen[0]) == ["mamba3", "still"]  # a kill now leaves both
    other = result_of(plan_of(tmp_path, "", seeds=1), "still")
    write_json(tmp_path / "still" / "result.json", other)
    found = experiment.sweep(plan_of(tmp_path, "", only=["mamba3"]), "tiny", tmp_path, None, {}, "")
    assert list(found["variants"]) == list(held_by(tmp_path / "results.json")) == ["mamba3"]
    assert json.loads((tmp_path / "still" / "result.json").read_text()) == other


def test_a_kill_leaves_all_that_was_recorded(tmp_path, trained):
    """What is known of later variants, and what is only to be replaced by them, is in the file until it is."""
    kept, seen = tmp_path / "kept.json", []
    plan = plan_of(tmp_path, "VARIANTS = {'mamba3': {}, 'still': {'model.angles': 'none'}, 'last': {}}")
    write_json(kept, experiment.summary("tiny", plan, [result_of(plan, "last")], {}))
    trained["still"] = lambda: seen.append(held_by(kept))
    experiment.sweep(plan, "tiny", tmp_path / "a", kept, asked.recorded(kept, plan), "")
    assert seen == [{"mamba3": 8, "last": 8}]
    assert held_by(kept) == {"mamba3": 8, "still": 8, "last": 8}

    names = ("mamba3", "still", "last")
    other = plan_of(tmp_path, f"VARIANTS = {{name: {{'model.d_state': 16}} for name in {names}}}")
    trained["still"] = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        experiment.sweep(other, "tiny", tmp_path / "b", kept, asked.recorded(kept, other), "")
    assert held_by(kept) == dict.fromkeys(names, 8)
    assert held_by(tmp_path / "b" / "results.json") == {"mamba3": 16}
    del trained["still"]
    experiment.sweep(other, "tiny", tmp_path / "b", kept, asked.recorded(kept, other), "")
    assert held_by(kept) == dict.fromkeys(names, 16)


def test_two_processes_record_into_one_file(tmp_path, trained):
    """Each its own variants: what the other has written meanwhile stays."""
    kept, plans = tmp_path / "kept.json", [plan_of(tmp_path, "", only=[name]) for name in ("mamba3", "still")]
    trained["mamba3"] = lambda: experiment.sweep(plans[1], "tiny", tmp_path / "other", kept, {}, "")
    experiment.sweep(plans[0], "tiny", tmp_path / "own", kept, {}, "")
    assert held_by(kept) == {"mamba3": 8, "still": 8}


@pytest.mark.parametrize("value", ["", " ", "gs://bucket/runs", "file:///runs"])
def test_no_path_is_empty_or_a_url(value):
    """Of which a folder of that name would be made here, and found unfit for checkpoints once there are some."""
    name = "some_place"
    common.define_path(name, None, "of this test")
    try:
        with pytest.raises(flags.IllegalFlagValueError, match="URL" if value.strip() else "empty path"):
            setattr(flags.FLAGS, name, value)
    finally:
        delattr(flags.FLAGS, name)


def start(workdir, environment, *arguments):
    command = [sys.executable, "-m", "launch.sweep", "--config=tests/launch/tiny_sweep.py", f"--workdir={workdir}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, text=True, **pipes)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optimizer.learning_rate=0.5", "=0.5 would be nobody's: name --learning_rates"),
        ("--config.name=../x", "config.name '../x' is not a name"),
    ],
)
def test_a_flag_that_would_be_for_nothing_or_elsewhere_is_refused(flag, message, tmp_path):
    """A learning rate that no member would have, and a name by which the result file is outside its folder."""
    process = start(tmp_path / "runs", devices(1), flag, f"--results={tmp_path / 'kept'}")
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors.count("\n")) == (2, 1)
    assert message in errors
    assert not list(tmp_path.iterdir())


def output_of(process) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def rows_of(workdir) -> list[dict]:
    """Every member's row, without what depends on the clock."""
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    return [without_times(row) for row in rows]


@pytest.mark.full
def test_a_killed_sweep_goes_on_bit_for_bit(tmp_path, compiled):
    """Killed in its second variant; then once more, when all is done, and on two devices."""
    environment = devices(1) | compiled
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    output = output_of(start(straight, environment, f"--results={tmp_path / 'kept'}"))
    assert "| still | 0.0" in output
    assert "mamba3: best scaled_last@32" in output
    assert json.loads((tmp_path / "kept" / "tiny_sweep.json").read_text())["rows"]

    process = start(killed, environment, "--config.train.log_every=1")
    for line in process.stdout:
        if line.startswith("still (2/2) step 13/"):
            break
    process.kill()
    process.communicate()
    output = output_of(start(killed, environment, "--config.train.log_every=1"))
    assert "mamba3 (1/2) done before" in output
    assert "still (2/2) resuming after step" in output  # 5 or 10: the later save may have been under way
    assert rows_of(killed) == rows_of(straight)
    assert not list(killed.glob("*/checkpoints/*/state"))  # of the members; moments are of no use any more
    assert "still (2/2) done before" in output_of(start(killed, environment, "--config.train.log_every=1"))

    best = killed / "still" / "best"
    assert load_config(best).name == "still"
    evaluate = [sys.executable, "-m", "launch.evaluate", f"--workdir={best}", "--lengths=32", "--tokens=0"]
    subprocess.run(evaluate, cwd=ROOT, env=environment, check=True, capture_output=True)
    scores = json.loads((best / "evaluation" / f"step_{STEPS}.json").read_text())["results"]
    result = json.loads((killed / "still" / "result.json").read_text())
    member = next(row for row in result["rows"] if f"seed_{row['seed']}_lr_{row['learning_rate']:g}" == result["best"])
    if member["seed"] == 0:  # else its own validation rows are others
        assert scores[0]["accuracy"] == pytest.approx(member["scores"][1]["accuracy"], abs=2e-3)

    two = tmp_path / "two"
    assert "mesh {'member': 2}" in output_of(start(two, devices(2) | compiled))
    losses = [[row["loss"] for row in rows_of(workdir)] for workdir in (straight, two)]
    assert rel_rms(*losses) < 1e-4
