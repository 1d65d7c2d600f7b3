"""Rows split over devices are the rows of one device: values, states and every gradient, whoever has which tokens."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from mamba3_jax.ops import context
from mamba3_jax.ops.context import Context
from mamba3_jax.ops.kernels import kernels
from mamba3_jax.ops.sharded import sharded
from pallas_kernels.ssm.cases import SISO
from tests.helpers import devices
from tests.ops import over_length
from tests.ops.cases import bfloat16, draw


def lines(which: str) -> list[str]:
    command = [sys.executable, "-m", "tests.ops.over_length", which]
    done = subprocess.run(command, env=devices(8), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.cpu
def test_four_devices_compute_what_one_does():
    assert lines("quick") == ["siso 4 8 4 4"]


@pytest.mark.cpu
@pytest.mark.full
def test_any_number_of_devices_computes_what_one_does():
    """In both layouts, with rows and heads split too, by kernels; an error in any part of what crosses is caught."""
    *done, crossing, caught, not_equal, not_equal_zigzag, unknown = lines("full")
    assert [line.split()[0] for line in done] == list(over_length.FULL)
    for line in done:
        case = over_length.FULL[line.split()[0]]
        sizes = (case.shape.batch, case.shape.length, case.shape.heads)
        parts = tuple(case.sizes[place] for place in (0, 2, 1))
        assert line.split()[1:4] == [str(size // part) for size, part in zip(sizes, parts, strict=True)]
    # Rounds of four devices, and of eight for each of two runs; as many back. A state that is not used does not cross.
    assert crossing == "{'collective-permute': 4} {'collective-permute': 12}"
    assert caught.split() == [*over_length.PARTS, "kernels", "tpu_kernels"]
    assert not_equal == "length=6 is not a multiple of 4, the runs of layout='contiguous' on sequence=4"
    assert not_equal_zigzag == "length=12 is not a multiple of 8, the runs of layout='zigzag' on sequence=4"
    assert unknown == "layout='spiral' is not one of ['contiguous', 'zigzag']"


KERNELS = {  # of what device, and how many at least: angles, and with gradients the scan and the pass over states
    "mosaic_gpu": ("cuda", "NVIDIA H200", "stablehlo.custom_call @mosaic_gpu", 5),
    "mosaic_tpu": ("tpu", "TPU v5 lite", "stablehlo.custom_call @tpu_custom_call", 5),
}


@pytest.mark.full
@pytest.mark.parametrize(("layout", "messages"), [("contiguous", 5), ("zigzag", 10)])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_are_lowered_over_devices(backend, layout, messages):
    """With heads split too: of four devices, angles and states in two rounds, and the next token's weight."""
    platform, kind, custom_call, least = KERNELS[backend]
    shape = SISO._replace(batch=1, length=1024, groups=1, d_state=128, width=64, planes=32)
    tokens, heads, _ = draw(shape)
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((4, 2), ("sequence", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)

    def run(tokens, heads, state, along):
        return kernels(tokens, heads, state, backend=backend, rotation="adjacent", anywhere=True, along=along)

    with use_abstract_mesh(mesh):
        lies = context.divide("sequence", layout, shape.length)
        over = context.across(run, lies, rotation="adjacent", implementation=backend)
        op = sharded(over, None, "tensor", "sequence")
        gradient = jax.grad(lambda *inputs: jnp.sum(op(*inputs)[0].astype(jnp.float32)), (0, 1))
        text = jax.jit(gradient).trace(bfloat16(tokens), heads).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(custom_call) >= least
    assert text.count("stablehlo.collective_permute") == 2 * messages  # and as many back


def test_without_a_mesh_rows_are_whole():
    assert context.divide("sequence", "zigzag", 64) is None
    assert Context("sequence", "zigzag").runs == 2
