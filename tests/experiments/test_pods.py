"""The steps that are compiled for pods, and their table; nothing here needs the TPU compiler."""

import dataclasses
import math

import jax
import pytest

from experiments.benchmarks import common, pods
from launch import tpu
from mamba3_jax.presets import PRESETS


@pytest.mark.parametrize("step", pods.steps(), ids=lambda step: f"{step.model}-{step.topology}-{step.length}")
def test_a_step_fills_its_topology(step):
    slices, one = tpu.slices_of(step.topology)
    grid = slices * math.prod(map(int, one.partition(":")[2].split("x")))
    axes = {name: int(size) for name, size in (axis.split(":") for axis in step.mesh.split(","))}
    assert math.prod(axes.values()) == grid * (2 if "tpu7x" in step.topology else 1)
    assert step.batch % (axes.get("data", 1) * axes.get("fsdp", 1)) == 0
    assert tpu.chip_of(step.topology)
    assert step.model in PRESETS
    assert axes.get("data", 1) % slices == 0


def test_the_steps_that_say_most_are_first():
    steps = pods.steps()
    assert len(set(steps)) == len(steps)
    assert {step.topology for step in steps[:4]} == {"v5e:16x16", "v5p:4x4x4", "v6e:8x8", "tpu7x:2x2x4"}


def test_a_row_is_drawn_by_kind():
    sent = [
        {"kind": "all-reduce", "devices": 4, "times": 1, "gb": 1.0, "sent_gb": 1.5},
        {"kind": "all-reduce", "devices": 2, "times": 1, "gb": 1.0, "sent_gb": 1.0},
        {"kind": "all-reduce", "devices": 2, "dcn": True, "times": 1, "gb": 4.0, "sent_gb": 4.0},
    ]
    row = {"collectives": sent, "mfu_at_once": 0.5, "mfu_in_turn": 0.25, "gflop": 1500.0}
    drawn, failed = pods.drawn([row, {"failed": "too large"}])
    assert (drawn["all-reduce"], drawn["at_once"], drawn["in_turn"], drawn["tflop"]) == (2.5, "50%", "25%", 1.5)
    assert failed == {"failed": "too large"}


@pytest.mark.parametrize("error", [pods.Failed("too large"), jax.errors.JaxRuntimeError("INTERNAL: LLO_CHECK failure")])
def test_a_step_that_is_not_compiled_is_a_row(error, monkeypatch):
    def measured(config, topology):
        raise error

    monkeypatch.setattr(pods, "measured", measured)
    step = pods.steps()[0]
    assert pods.row_of(step) == dataclasses.asdict(step) | {"failed": str(error)}


def test_rows_of_the_same_compiler_are_not_taken_again(tmp_path):
    """Rows of another compiler do not count, and a damaged file is named before anything is compiled."""
    origin, row = {"jax": "1", "libtpu": "2"}, dataclasses.asdict(pods.steps()[0]) | {"peak_gb": 3.0}
    assert pods.recorded(origin, str(tmp_path)) == {}
    common.write("pods", origin, [row], tmp_path)
    assert pods.recorded(origin, str(tmp_path)) == {pods.steps()[0]: row}
    assert pods.recorded(origin | {"libtpu": "3"}, str(tmp_path)) == {}
    del row["mesh"]
    common.write("pods", origin, [row], tmp_path)
    with pytest.raises(ValueError, match=r"pods.json has a damaged row \(KeyError: 'mesh'\)"):
        pods.recorded(origin, str(tmp_path))


def test_recorded_rows_have_a_commit_and_a_compiler():
    result = common.read("pods")
    if result is not None:
        assert result["libtpu"] in result["device"]
        fields = [field.name for field in dataclasses.fields(pods.Step)]
        assert {pods.Step(**{name: row[name] for name in fields}) for row in result["rows"]} <= set(pods.steps())
        assert all(row["commit"] for row in result["rows"])
