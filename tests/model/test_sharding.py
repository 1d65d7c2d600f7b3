"""Meshes: what a specification means, and that several devices compute what one does."""

import subprocess
import sys

import pytest
from jax.sharding import PartitionSpec

from mamba3_jax.config import ModelConfig
from mamba3_jax.sharding import make_mesh, param_shardings
from tests.helpers import devices


@pytest.mark.full
def test_several_devices_compute_what_one_does():
    command = [sys.executable, "-m", "tests.model.sharded", "data:-1", "tensor:4"]
    done = subprocess.run(command, env=devices(4), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["data:-1", "tensor:4"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data", "'data' is not axis:size"),
        ("rows:1", "'rows:1' is not axis:size with an axis of"),
        ("data:1,data:1", "each once"),
        ("data:0", "'data:0'"),
        ("data:-1,tensor:-1", "more than one -1"),
        ("data:1000003", "does not make up the"),
    ],
)
def test_a_wrong_mesh_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec)


def test_every_parameter_has_names_and_what_heads_share_is_whole():
    config = ModelConfig(vocab_size=8, d_model=16, d_state=8, head_dim=8, pattern="MA", attn_head_dim=8, d_ff=8)
    mesh = make_mesh("data:-1,tensor:1")
    specs = param_shardings(config, mesh)
    mixer = specs["segment_0"]["block_0"]["mixer"]
    assert mixer["in_zx"].spec == PartitionSpec(None, None, None, "tensor", None)
    assert mixer["out"].spec == PartitionSpec(None, "tensor", None, None)
    assert mixer["in_kq_angle"].spec == PartitionSpec(None, None, None)
    assert specs["segment_0"]["block_1"]["mixer"]["k"].spec == PartitionSpec(None, None, "tensor", None)
    assert specs["embedding"]["embedding"].spec == PartitionSpec("tensor", None)
