"""Meshes: what a specification means, and that several devices compute what one does."""

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mamba3_jax.config import ModelConfig
from mamba3_jax.sharding import loading, make_mesh, param_shardings, sharding_of, spec_of
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
        ("fsdp:2,tensor", "'tensor' is not axis:size with an axis of data, fsdp, sequence, tensor, each once"),
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


def mesh_of(**sizes: int) -> AbstractMesh:
    """A mesh of more devices than this process has, for its shape alone."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def test_the_axes_of_a_parameter_and_of_a_batch():
    mesh = mesh_of(data=2, fsdp=4, tensor=8)
    assert spec_of(("embed", "heads", None), mesh) == PartitionSpec("fsdp", "tensor", None)
    assert spec_of(("batch", "length"), mesh) == PartitionSpec(("data", "fsdp"), None)
    assert spec_of(("batch", "embed"), mesh_of(data=2, tensor=4)) == PartitionSpec("data", None)
    assert sharding_of(("vocab", "embed"), (64, 12), mesh).shard_shape((64, 12)) == (8, 3)


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (("heads", "vocab"), (8, 8), "'heads' and 'vocab' are axes of one array, and both are split over 'tensor'"),
        (("batch", "embed"), (8, 8), "'batch' and 'embed' are axes of one array, and both are split over 'fsdp'"),
        (("embed", "heads"), (6, 8), "'embed' is an axis of 6, not a multiple of the mesh's fsdp=4"),
        (("batch",), (12,), "'batch' is an axis of 12, not a multiple of the mesh's data=2, fsdp=4"),
    ],
)
def test_what_cannot_be_split_is_named(names, shape, message):
    with pytest.raises(ValueError, match=message):
        sharding_of(names, shape, mesh_of(data=2, fsdp=4, tensor=8))


def test_a_parameter_that_cannot_be_split_is_named():
    config = ModelConfig(vocab_size=8, d_model=20, d_state=8, head_dim=8)
    with pytest.raises(ValueError, match=r"^embedding/embedding: 'embed' is an axis of 20, not a multiple .* fsdp=8"):
        param_shardings(config, mesh_of(fsdp=8))


def hosts_of(order: str, a_host: int, **sizes: int) -> list[tuple[int, int]]:
    """What every process loads, which have `a_host` devices each, one after another where axes are in `order`."""
    names = tuple(sizes)
    places = np.arange(math.prod(sizes.values())).reshape([sizes[name] for name in order.split(",")])
    places = places.transpose([order.split(",").index(name) for name in names])
    devices = np.vectorize(lambda place: SimpleNamespace(process_index=place // a_host), otypes=[object])(places)
    mesh = SimpleNamespace(devices=devices, axis_names=names, shape=sizes)
    return [loading(mesh, process) for process in range(places.size // a_host)]


def test_hosts_that_share_rows_load_the_same():
    """Whatever axis lies across hosts: their rows are then their own, each other's, or a group's."""
    assert hosts_of("data,tensor", 4, data=8, tensor=1) == [(0, 2), (1, 2)]
    assert hosts_of("data,tensor", 4, data=2, tensor=8) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert hosts_of("tensor,data", 4, data=2, tensor=4) == [(0, 1), (0, 1)]
    assert hosts_of("data,fsdp,tensor", 2, data=2, fsdp=2, tensor=2) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert hosts_of("fsdp,tensor,data", 4, data=2, fsdp=2, tensor=4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert hosts_of("data,tensor", 4, data=3, tensor=4) == [(0, 3), (1, 3), (2, 3)]
    assert hosts_of("data,tensor", 4, data=4, tensor=3) == [(0, 1)] * 3, "rows of two hosts overlap"
