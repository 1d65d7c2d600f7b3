"""The decode step's kernel in Pallas's interpreter against `recurrent`, and lowered for CUDA: no Triton compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from mamba3_jax.ops.kernels import kernels
from mamba3_jax.ops.recurrent import recurrent
from pallas_kernels.ssm.triton.decode_fused import FusedTile
from pallas_kernels.ssm.triton.decode_rotated import RotatedTile
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import LEFT_OUT, MIMO, SISO, bfloat16, draw

GPU = AbstractMesh(
    (1,),
    ("device",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu"),
)
SISO, MIMO = SISO._replace(length=1), MIMO._replace(length=1)
SIZED = {"width": 32, "d_state": 64, "planes": 16}
SHAPES = {
    "siso": SISO,  # groups, an angle that heads share, sizes to pad
    "siso_half_turn": SISO._replace(rotation="half", norm=True, shared_angle=False, **SIZED),
    "mimo2": MIMO._replace(rank=2, groups=2, heads=4, gate_ranked=False, **SIZED),
    "mimo4": MIMO,
    "mimo4_adjacent": MIMO._replace(rotation="adjacent", norm=False, skip=False, width=20, d_state=24, planes=5),
    "mimo4_no_gate": MIMO._replace(gate=False, groups=2, shared_angle=True, **SIZED),
    **{name: shape._replace(length=1) for name, shape in LEFT_OUT.items()},
}
TILES = {
    "fma": RotatedTile(),
    "fma_rows": RotatedTile(rows=16, columns=16, heads=2),
    "dot": RotatedTile(columns=128, update="dot", readout="dot"),
    "dot_columns": RotatedTile(columns=16, heads=2, update="dot", readout="dot"),
    "mixed": RotatedTile(rows=16, update="dot"),
    "readout_dot": RotatedTile(readout="dot"),
    "fused": FusedTile(),
    "fused_16": FusedTile(columns=16, warps=2, batch_first=False),
}


def step(shape, tile=None):
    """Returns a function of (tokens, heads, state) that returns the output and the state."""
    return functools.partial(kernels, backend="triton", rotation=shape.rotation, interpret=True, tile=tile)


def drawn(shape, *, start: bool = False):
    """Arguments of a step, one row of two a start where wanted."""
    tokens, heads, state = draw(shape)
    return tokens._replace(start_BL=np.array([[True], [False]]) if start else None), heads, state


def double(inputs, shape):
    """`recurrent` in float64, on the very same numbers."""
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, x.dtype if x.dtype == bool else np.float64)  # noqa: E731
        results = jax.jit(functools.partial(recurrent, rotation=shape.rotation))(*jax.tree.map(wide, inputs))
        return jax.tree.map(np.asarray, results)


@pytest.mark.parametrize("start", [False, True], ids=["goes_on", "start"])
@pytest.mark.parametrize("name", SHAPES)
def test_is_recurrent(name, start):
    inputs = drawn(SHAPES[name], start=start)
    got = jax.jit(step(SHAPES[name]))(*inputs)
    cases.check_results(got, double(inputs, SHAPES[name]), 1e-6)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_is_recurrent(tile, rank):
    shape = (MIMO if rank > 1 else SISO)._replace(rank=rank, **SIZED)
    inputs = drawn(shape, start=True)
    got = jax.jit(step(shape, TILES[tile]))(*inputs)
    cases.check_results(got, double(inputs, shape), 1e-6)


@pytest.mark.parametrize("tile", ["fma", "fma_rows", "dot_columns", "fused"])
def test_a_start_forgets_exactly(tile):
    """Not a number of the state is read, not even one that is not a number."""
    shape = MIMO._replace(**SIZED)
    tokens, heads, state = drawn(shape)
    tokens = tokens._replace(start_BL=np.ones((shape.batch, 1), bool))
    run = jax.jit(step(shape, TILES[tile]))
    poisoned = jax.tree.map(lambda array: np.full_like(array, np.nan), state)
    want = run(tokens, heads, jax.tree.map(np.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, run(tokens, heads, poisoned), want)


@pytest.mark.parametrize("name", ["siso", "mimo4", "mimo4_adjacent"])
def test_gradients(name):
    """Those of `recurrent`, the state's included, packed or not."""
    shape = SHAPES[name]
    cotangent = cases.cotangents(shape)
    for start in (False, True):
        inputs = drawn(shape, start=start)
        inputs = (inputs[0]._replace(start_BL=None), *inputs[1:])
        start_BL = np.array([[True], [False]]) if start else None

        def op(tokens, heads, state, start_BL=start_BL):
            return step(shape)(tokens._replace(start_BL=start_BL), heads, state)

        gradients = jax.jit(lambda *inputs, op=op: jax.vjp(op, *inputs)[1](cotangent))(*inputs)
        want = cases.reference(inputs, start_BL, cotangent, shape.rotation)[1]
        cases.check_gradients(gradients, want, 1e-5)


@pytest.mark.parametrize("name", ["siso", "mimo4"])
def test_three_steps_are_a_row(name):
    shape = SHAPES[name]._replace(length=3)
    tokens, heads, state = draw(shape)
    want = double((tokens, heads, state), shape)
    run, outputs = jax.jit(step(shape)), []
    for token in range(3):
        y_BLHP, state = run(cases.rows(tokens, token, token + 1), heads, state)
        outputs.append(y_BLHP)
    cases.check_results((np.concatenate(outputs, axis=1), state), want, 2e-6)


@pytest.mark.parametrize("name", ["siso", "mimo4"])
def test_bfloat16(name):
    """q, k, v and gate of 8 bits: the state is as exact as ever, y and the key left behind are rounded once."""
    tokens, heads, state = drawn(SHAPES[name])
    narrow = lambda array: jnp.asarray(array, jnp.bfloat16)  # noqa: E731
    state = state._replace(k_BRHN=narrow(state.k_BRHN), v_BHP=narrow(state.v_BHP))
    inputs = bfloat16(tokens), heads, state
    y_BLHP, after = jax.jit(step(SHAPES[name]))(*inputs)
    want_y_BLHP, want = double(inputs, SHAPES[name])
    assert (y_BLHP.dtype, after.k_BRHN.dtype, after.v_BHP.dtype) == (jnp.bfloat16,) * 3
    assert rel_rms(np.asarray(after.ssm_BHPN, np.float64), want.ssm_BHPN) < 1e-6
    for got, exact in ((y_BLHP, want_y_BLHP), (after.k_BRHN, want.k_BRHN)):
        assert rel_rms(np.asarray(got, np.float64), exact) < 2**-8


@pytest.mark.parametrize("field", ["ssm_BHPN", "k_BRHN", "v_BHP", "angle_BHS"])
def test_a_planted_error_is_caught(field):
    tokens, heads, state = drawn(SHAPES["mimo4"])
    want = double((tokens, heads, state), SHAPES["mimo4"])
    wrong = state._replace(**{field: getattr(state, field) * np.float32(1.001)})
    with pytest.raises(AssertionError, match="is not below"):
        cases.check_results(jax.jit(step(SHAPES["mimo4"]))(tokens, heads, wrong), want, 1e-6)


@pytest.mark.quick
def test_what_it_cannot_run():
    with pytest.raises(ValueError, match="a power of two up to 16, not rank=3"):
        step(MIMO)(*draw(MIMO._replace(rank=3)))
    with pytest.raises(ValueError, match="names an unknown way"):
        step(SISO, RotatedTile(update="sum"))(*drawn(SISO))
    with pytest.raises(ValueError, match=r"P up to 128, not .*P=129"):
        step(SISO)(*draw(SISO._replace(width=129)))
    tokens, heads, state = draw(SISO)
    half = {name: getattr(tokens, name).astype("float16") for name in ("q_BLRGN", "k_BLRGN", "v_BLHP")}
    with pytest.raises(ValueError, match="wants q, k and v in float32 or bfloat16, not float16"):
        step(SISO)(tokens._replace(**half), heads, state)


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize("start", [False, True], ids=["goes_on", "start"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_lowers_for_cuda(rank, tile, start):
    shape = (MIMO if rank > 1 else SISO)._replace(rank=rank, **SIZED)
    tokens, heads, state = drawn(shape, start=start)
    op = functools.partial(step(shape, TILES[tile]), interpret=None, anywhere=True)
    with use_abstract_mesh(GPU):
        traced = jax.jit(op, donate_argnums=2).trace(bfloat16(tokens), heads, state)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mamba3_decode" in text
