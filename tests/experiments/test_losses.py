"""The same runs by several trees: what is a tree, what is recorded, and what a run that fails says."""

import json
import subprocess
import sys

import pytest

from experiments.benchmarks import losses
from launch.provenance import REPOSITORY

CONFIG = REPOSITORY / "tests" / "train" / "tiny.py"


def run(out, *fields: str) -> subprocess.CompletedProcess:
    """Train this tree twice, under two names, on one seed."""
    command = [sys.executable, "-m", "experiments.benchmarks.losses", "--trees=a=.", "--trees=b=.", "--seeds=1"]
    command += [f"--config={CONFIG}", f"--fields={' '.join(fields)}", f"--out={out}"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_a_folder_that_is_no_tree_is_named(tmp_path):
    assert losses.trees_of([f"a={REPOSITORY}", f"b={REPOSITORY}"]) == {"a": REPOSITORY, "b": REPOSITORY}
    for given in (f"a={tmp_path}", str(REPOSITORY), f"={REPOSITORY}"):
        with pytest.raises(ValueError, match="want NAME=FOLDER"):
            losses.trees_of([given])
    with pytest.raises(ValueError, match="each name once"):
        losses.trees_of([f"a={REPOSITORY}", f"a={REPOSITORY}"])


def test_the_last_losses_are_those_of_the_last_step():
    rows = [
        {"tree": tree, "seed": seed, "step": step, "loss": 10 * seed + step}
        for tree in ("a", "b")
        for seed in (0, 1)
        for step in (2, 4)
    ]
    assert losses.last(rows) == {"a": [4, 14], "b": [4, 14]}


@pytest.mark.full
def test_equal_trees_have_equal_losses(tmp_path):
    done = run(tmp_path, "--config.train.steps=2", "--config.train.log_every=1")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "losses.json").read_text())["rows"]
    assert [(row["tree"], row["seed"], row["step"]) for row in rows] == [
        ("a", 0, 1),
        ("a", 0, 2),
        ("b", 0, 1),
        ("b", 0, 2),
    ]
    a, b = losses.last(rows).values()
    assert a == b


@pytest.mark.full
def test_a_run_that_fails_is_named_and_nothing_is_recorded(tmp_path):
    done = run(tmp_path, "--config.train.steps=-1")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: a, seed 0: status 2: error: config.train.steps=-1")
    assert not list(tmp_path.iterdir())
