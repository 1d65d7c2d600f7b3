"""The benchmark of meshes, in small on CPU devices: what it times is equal on all of them, or it is not timed."""

import json
import subprocess
import sys

import jax
import pytest

from experiments.benchmarks import common, meshes
from experiments.benchmarks.experiments import two_devices
from mamba3_jax.config import ModelConfig
from tests.helpers import devices

TINY = ModelConfig(vocab_size=16, d_model=16, pattern="M", d_state=8, head_dim=8, compute_dtype="bfloat16")
QUICK = {"batch_seconds": 1e-3, "batches": 1, "warm_up": 1}
MEASURE = common.measure


def test_steps_begin_on_one_device():
    """What others are compared with, or timed beside, comes before them."""
    for steps in meshes.groups().values():
        rows, shares = set(), set()
        for step in steps:
            assert step.devices == 1 or step.rows in rows or step.share in shares
            rows.add(step.rows)
            shares |= {step.share} if step.devices == 1 else set()


@pytest.mark.full
def test_meshes_are_compared_and_timed():
    command = [sys.executable, "-m", "tests.experiments.over_meshes"]
    done = subprocess.run(command, env=devices(2), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    right, wrong = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    one, fsdp, sequence, alone, two = right
    assert not any("failed" in row for row in right)
    assert one["loss error"] is None
    assert max(fsdp["loss error"], sequence["loss error"]) < 1e-5
    assert fsdp["sent_mib"] > one["sent_mib"] == 0
    assert "ms" not in fsdp
    assert two["efficiency"] == pytest.approx(alone["ms"] / two["ms"])
    assert "failed" not in wrong[0]
    assert "relative error over 1e-05 in loss" in wrong[1]["failed"]


def test_what_does_not_fit_is_a_row(monkeypatch):
    def full(program):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setitem(meshes.PRESETS, "tiny", TINY)
    monkeypatch.setattr(meshes.train.Program, "compile", full)
    written = []
    meshes.measured({"step": [meshes.Step("tiny", meshes.ONE, 1, 16)]}, written.append)
    assert written[-1][0]["failed"] == "RESOURCE_EXHAUSTED: Out of memory"


def test_the_answer_is_read_from_the_rows():
    equal = [{"group": "equal", "mesh": "data:1", "loss error": None}, {"mesh": "fsdp:2", "loss error": 2e-7}]
    failed = {"group": "long", "mesh": "sequence:2", "failed": "RESOURCE_EXHAUSTED"}
    timed = {"group": "step", "mesh": "fsdp:2", "loss error": None, "ms": 1.0, "efficiency": 0.98}
    answer = two_devices({"rows": [*equal, failed, timed]})
    assert answer == "losses off by at most 2.0e-07; of one device's speed step fsdp:2 98%"
