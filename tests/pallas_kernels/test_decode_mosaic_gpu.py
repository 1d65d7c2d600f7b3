"""The decoding step's Mosaic GPU kernel in Pallas's interpreter against `recurrent`, and lowered for CUDA."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from mamba3_jax.ops.decode import decode
from mamba3_jax.ops.recurrent import recurrent
from pallas_kernels.ssm.mosaic_gpu.decode import Tile
from pallas_kernels.ssm.mosaic_gpu.scan import interpreter
from tests.ops import cases
from tests.ops.cases import MIMO, SISO, bfloat16, draw
from tests.ops.quick import quick_jit

ON_CPU = jax.default_backend() == "cpu"
TILE = Tile(interpreter() if ON_CPU else None)
SIZED = {"length": 1, "width": 64, "d_state": 64, "planes": 16}
SHAPES = {
    "siso": SISO._replace(gate=False, **SIZED),
    "mimo": MIMO._replace(**SIZED),
    "mimo2": MIMO._replace(rank=2, groups=2, gate_ranked=False, skip=False, **SIZED),
}


def drawn(shape, start: bool):
    """One row of two a start where wanted, with a past that nothing may be seen of."""
    tokens, heads, state = draw(shape)
    if not start:
        return tokens, heads, state
    state = jax.tree.map(lambda array: np.concatenate([np.full_like(array[:1], np.nan), array[1:]]), state)
    return tokens._replace(start_BL=np.array([[True], [False]])), heads, state


def step(shape, implementation=decode):
    how = {"interpret": ON_CPU, "tile": TILE} if implementation is decode else {}
    return functools.partial(implementation, rotation=shape.rotation, **how)


@pytest.mark.parametrize("start", [False, True], ids=["goes_on", "start"])
@pytest.mark.parametrize("name", SHAPES)
def test_is_recurrent(name, start):
    shape = SHAPES[name]
    inputs = drawn(shape, start)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, x.dtype if x.dtype == bool else np.float64), inputs)
        want = jax.tree.map(np.asarray, quick_jit(step(shape, recurrent))(*exact))
    cases.check_results(jax.jit(step(shape))(*inputs), want, 1e-6)


def test_a_planted_error_is_caught():
    shape = SHAPES["mimo"]
    tokens, heads, state = drawn(shape, False)
    want = quick_jit(step(shape, recurrent))(tokens, heads, state)
    got = jax.jit(step(shape))(tokens, heads, state._replace(ssm_BHPN=state.ssm_BHPN * np.float32(1.001)))
    with pytest.raises(AssertionError, match="is not below"):
        cases.check_results(got, want, 1e-6)


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
def test_lowers_for_cuda_in_place(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=gpu)
    shape = SHAPES["mimo"]._replace(d_state=128, planes=32)
    tokens, heads, state = drawn(shape, True)
    call = functools.partial(decode, rotation=shape.rotation, tile=Tile())
    with use_abstract_mesh(mesh):
        traced = jax.jit(call, donate_argnums=2).trace(bfloat16(tokens), heads, state)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "operand_index = 0" in text[text.index("output_operand_aliases") :]


def test_what_it_cannot_run():
    for shape, message in (
        (SHAPES["siso"]._replace(width=32), "width=32 is not 64"),
        (SHAPES["siso"]._replace(d_state=32, planes=8), "d_state=32 not 64 or 128"),
        (SHAPES["mimo"]._replace(rank=8), "rank=8 is not in"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(step(shape)), *draw(shape))
