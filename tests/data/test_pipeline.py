"""Order, sharding, resuming and checking of batches."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.data import Batch, loader
from mamba3_jax.data.packing import Rows
from mamba3_jax.data.pipeline import SOURCES
from mamba3_jax.data.text import text_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"document {i} " * (i % 5 + 1))
    return folder


def config(folder, **fields):
    fields = {"length": 16, "batch": 4, "valid_glob": f"{folder}/[3]*.txt", **fields}
    return DataConfig(train_glob=f"{folder}/[012]*.txt", **fields)


def take(source, count):
    return list(itertools.islice(source, count))


def run(program: str, tmp_path) -> subprocess.CompletedProcess:
    """Run a program that finds the repository, from a file, as worker processes read it again."""
    script = tmp_path / "program.py"
    script.write_text(program)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, str(script)], os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def row_set(batches):
    """Every real row as bytes, with how often it came."""
    rows, counts = np.unique(
        np.concatenate([np.concatenate([*batch], axis=1) for batch in batches]), axis=0, return_counts=True
    )
    return {row.tobytes(): count for row, count in zip(rows, counts, strict=True)}


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


def in_order(data, split):
    rows = text_rows(data, split)
    return rows.gather(np.arange(rows.count)), rows.count


def test_an_epoch_has_every_row_once(folder):
    data = config(folder, batch=1)
    everything, count = in_order(data, "train")
    source = loader(data, "train", vocab_size=256)
    first, second = take(source, count), take(source, count)
    assert row_set(first) == row_set(second) == row_set([everything])
    assert not same(first, second)
    assert sum(batch.weights_BL.sum() for batch in first) == everything.weights_BL.sum()


def test_the_seed_decides_the_order(folder):
    first, again, other = (take(loader(config(folder, seed=seed), "train", vocab_size=256), 6) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_validation_is_one_pass_filled_up(folder):
    data = config(folder, batch=32)
    everything, count = in_order(data, "valid")
    batches = list(loader(data, "valid", vocab_size=256))
    assert len(batches) == -(-count // 32)
    assert all(batch.tokens_BL.shape == (32, 16) for batch in batches)
    assert same(batches, list(loader(config(folder, batch=32, seed=5), "valid", vocab_size=256)))
    tokens, targets, weights, start = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert not weights[count:].any()
    assert row_set([everything]) == row_set([(tokens[:count], targets[:count], weights[:count], start[:count])])


def test_the_first_validation_rows_are_spread_over_the_files():
    rows = text_rows(DataConfig(), "valid")
    numbers = Rows(lambda row_B: type(rows.gather(row_B))(*[np.repeat(row_B[:, None], 2, 1)] * 4), rows.count, "")
    SOURCES["numbers"] = lambda *_: numbers
    try:
        batches = take(loader(DataConfig(source="numbers"), "valid", vocab_size=10**9), 8)
    finally:
        del SOURCES["numbers"]
    first = np.sort(np.concatenate([batch.tokens_BL[:, 0] for batch in batches])) / rows.count
    assert np.diff([0, *first, 1]).max() < 3 / 64


@pytest.mark.parametrize("split", ["train", "valid"])
def test_hosts_share_the_batches_of_one(folder, split):
    data = config(folder, batch=6)
    whole = take(loader(data, split, vocab_size=256), 12)
    for hosts in (2, 3):
        parts = [take(loader(data, split, vocab_size=256, host=(i, hosts)), 12) for i in range(hosts)]
        for batch, *shares in zip(whole, *parts, strict=True):
            assert all(len(share.tokens_BL) == 6 // hosts for share in shares)
            assert row_set([batch]) == row_set(shares)


def test_resuming_continues_with_the_next_batch(folder):
    data = config(folder)
    for stop in (0, 1, 7, 40):  # 40: epochs later
        source = loader(data, "train", vocab_size=256)
        take(source, stop)
        state = json.loads(json.dumps(source.get_state()))
        resumed = loader(data, "train", vocab_size=256)
        take(resumed, 3)
        resumed.set_state(state)
        assert same(take(source, 5), take(resumed, 5))
        assert not same(take(source, 1), take(loader(data, "train", vocab_size=256), 1))


def test_a_state_of_other_data_is_refused(folder):
    state = loader(config(folder), "train", vocab_size=256).get_state()
    for changed in ({"length": 8}, {"batch": 2}, {"seed": 1}, {"train_glob": ""}):
        data = config(folder)
        for name, value in changed.items():
            setattr(data, name, value)
        with pytest.raises(ValueError, match="cannot resume: the data had"):
            loader(data, "train", vocab_size=256).set_state(state)


@pytest.mark.full
def test_a_worker_changes_nothing_and_another_process_resumes(folder, tmp_path):
    """Three batches here without workers, the rest there with one, from the saved state."""
    data = config(folder)
    source = loader(data, "train", vocab_size=256)
    take(source, 3)
    program = f"""
import json, multiprocessing, os, signal
from mamba3_jax.config import DataConfig
from mamba3_jax.data import loader
if __name__ == "__main__":
    data = DataConfig(train_glob={data.train_glob!r}, valid_glob={data.valid_glob!r}, length=16, batch=4, workers=1)
    source = loader(data, "train", vocab_size=256)
    source.set_state({source.get_state()!r})
    batches = [next(source)]
    workers = multiprocessing.active_children()
    assert len(workers) == 1
    for number in (signal.SIGINT, signal.SIGTERM):  # as when the whole process group is told to stop
        os.kill(workers[0].pid, number)
    batches += [next(source) for _ in range(40)]
    assert workers[0].is_alive()
    batches = batches[:3]
    source.set_state({source.get_state()!r} | {{"position": 6}})
    state = source.get_state()
    after = next(source)
    source.set_state(state)
    again = next(source)
    source.close()
    assert not multiprocessing.active_children()
    print(json.dumps([[array.tolist() for array in batch] for batch in (*batches, after, again)]))
"""
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    there = json.loads(done.stdout.splitlines()[-1])
    here = take(source, 4)
    assert same(here, there[:4])
    assert same(here[3:], there[4:])


@pytest.mark.full
def test_a_worker_ends_when_the_main_process_is_killed(folder, tmp_path):
    data = config(folder)
    program = f"""
import multiprocessing, os, signal
from mamba3_jax.config import DataConfig
from mamba3_jax.data import loader
if __name__ == "__main__":
    data = DataConfig(train_glob={data.train_glob!r}, valid_glob={data.valid_glob!r}, length=16, batch=4, workers=1)
    source = loader(data, "train", vocab_size=256)
    next(source)
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run(program, tmp_path)  # returns once nobody holds its output, the worker included
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    deadline = time.monotonic() + 60
    while _runs(int(done.stdout)):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    """Whether the process exists and is more than an entry that its parent has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ids_past_the_vocabulary_are_named(folder):
    data = config(folder)
    with pytest.raises(ValueError, match=r"token id 1\d\d is out of range: the model's vocabulary is 100"):
        take(loader(data, "train", vocab_size=100), 20)
    take(loader(data, "train", vocab_size=ord("u") + 1), 20)  # the largest byte of "document 12"


@pytest.mark.parametrize("wrong", [-1, -(2**31), 8])
@pytest.mark.parametrize("name", ["tokens_BL", "targets_BL"])
def test_an_id_outside_the_vocabulary_never_leaves_the_loader(name, wrong, monkeypatch):
    """In either direction; a target without weight is no target."""
    ids_BL = np.zeros((2, 3), np.int32)
    good = Batch(ids_BL, ids_BL, np.array([[1, 1, 0]] * 2, np.float32), ids_BL == 0)

    def first_of(place):
        spoilt_BL = np.where(np.arange(3) == place, wrong, ids_BL).astype(np.int32)
        rows = Rows(lambda _: good._replace(**{name: spoilt_BL}), 2, "")
        monkeypatch.setitem(SOURCES, "spoilt", lambda *_: rows)
        return next(loader(DataConfig(source="spoilt", length=3, batch=2), "train", vocab_size=8))

    with pytest.raises(ValueError, match=f"{name[:-4]} id {wrong} is out of range: the model's vocabulary is 8"):
        first_of(1)
    if name == "targets_BL":
        assert first_of(2).targets_BL[0, 2] == wrong


@pytest.mark.parametrize(
    ("fields", "host", "message"),
    [
        ({"source": "txt"}, (0, 1), "data.source='txt' is not one of A5, A5_generators, S3, .*, parity, text, tfds"),
        ({"length": 1}, (0, 1), "data.length=1 is not in 2"),
        ({"batch": 6}, (0, 4), "data.batch=6 is not a multiple of the 4 hosts"),
        ({"batch": 0}, (0, 1), "data.batch=0 is not in 1"),
        ({}, (2, 2), r"host=\(2, 2\) is not"),
        ({"workers": -1}, (0, 1), "data.workers=-1 is not in 0"),
    ],
)
def test_mistakes_are_named(fields, host, message):
    with pytest.raises(ValueError, match=message):
        loader(DataConfig(**fields), "train", vocab_size=256, host=host)
    with pytest.raises(ValueError, match="split='test' is not one of train, valid"):
        loader(DataConfig(), "test", vocab_size=256)
