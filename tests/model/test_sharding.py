"""Meshes: what a specification means, and that several devices compute what one does."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "any"
    platform: str = "any"


def on_slices(*slices: int) -> list:
    """Devices of as many slices as numbers are given, each the slice of one device."""
    return [Device(place, number) for place, number in enumerate(slices)]


@pytest.mark.parametrize(
    ("spec", "crosses"),
    [
        ("data:2,fsdp:4", {"data"}),
        ("data:-1", {"data"}),
        ("fsdp:2,data:4", {"data"}),
        ("data:4,tensor:2", {"data"}),
        ("fsdp:2x4", {"fsdp"}),
        ("data:1x2,fsdp:2x2", {"fsdp"}),
        ("sequence:2x4", {"sequence"}),
        ("data:2,tensor:1x4", {"data"}),
    ],
)
def test_the_axis_over_slices_is_data_or_the_one_that_says_so(spec, crosses):
    """However the devices are listed: along every other axis all are of one slice."""
    mesh = make_mesh(spec, on_slices(1, 0, 0, 1, 1, 0, 1, 0))
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for place, name in enumerate(mesh.axis_names):
        one = (slices == slices.take([0], axis=place)).all()
        assert bool(one) == (name not in crosses), name


def test_slices_may_be_shared_by_two_axes():
    mesh = make_mesh("data:2,fsdp:2x2", on_slices(0, 0, 1, 1, 2, 2, 3, 3))
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data:3,fsdp:4", r"mesh='data:3,fsdp:4': data=3 is not a multiple of the 2 slices"),
        ("fsdp:12", r"mesh='fsdp:12': data=1 is not a multiple of the 2 slices .*fsdp:2x4, say"),
        ("tensor:4,fsdp:3", r"data=1 is not a multiple of the 2 slices"),
        ("fsdp:3x4", r"mesh='fsdp:3x4' is over 3 slices, and the devices are of 2"),
        ("data:1x12", r"mesh='data:1x12' is over 1 slices, and the devices are of 2"),
        ("data:2x2x3", "'data:2x2x3' is not axis:size"),
        ("data:-1x2", "'data:-1x2' is not axis:size"),
    ],
)
def test_sizes_that_do_not_divide_the_slices_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec, on_slices(*[0] * 6, *[1] * 6))


def test_one_slice_is_no_two():
    with pytest.raises(ValueError, match="is over 2 slices, and the devices are of 1"):
        make_mesh("fsdp:2x4", on_slices(*[0] * 8))


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="devices"):
        make_mesh("data:-1", on_slices(0, 0, 0, 1))


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
