"""The decoding step's Mosaic GPU kernel in Pallas's interpreter against `recurrent`, and lowered for CUDA."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from mamba3_jax.ops.kernels import kernels
from mamba3_jax.ops.recurrent import recurrent
from pallas_kernels.ssm.mosaic_gpu.decode_kernel import sine_and_cosine, within_a_turn
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import LEFT_OUT, MIMO, SISO, bfloat16, draw

ON_CPU = jax.default_backend() == "cpu"
mosaic_gpu = functools.partial(kernels, backend="mosaic_gpu")
SMALL = {"length": 1, "width": 64, "d_state": 64, "planes": 16}
LARGE = {"length": 1, "width": 64, "d_state": 128, "planes": 64}
SHAPES = {
    "siso": SISO._replace(**SMALL),
    "siso_half_bare": SISO._replace(rotation="half", skip=False, gate=False, **{**LARGE, "planes": 16}),
    "siso_norm": SISO._replace(norm=True, shared_angle=False, **LARGE),
    "mimo": MIMO._replace(**{**LARGE, "planes": 32}),
    "mimo_adjacent": MIMO._replace(rotation="adjacent", gate=False, **{**SMALL, "planes": 32}),
    "mimo2": MIMO._replace(rank=2, heads=4, groups=2, gate_ranked=False, skip=False, norm=False, **SMALL),
    "mimo2_adjacent": MIMO._replace(rank=2, rotation="adjacent", **{**LARGE, "planes": 5}),
    "mimo1": MIMO._replace(rank=1, norm=False, **SMALL),
    **{name: shape._replace(**SMALL) for name, shape in LEFT_OUT.items()},
}
PADDED = {
    "siso": SISO._replace(length=1, width=24, d_state=50, planes=5),
    "siso_half_norm": SISO._replace(length=1, width=24, d_state=100, planes=50, rotation="half", norm=True),
    "siso_norm": SISO._replace(length=1, width=24, d_state=50, planes=25, norm=True, shared_angle=False),
    "mimo_norm": MIMO._replace(length=1, width=24, d_state=50, planes=5, norm=True),
    "mimo_adjacent": MIMO._replace(length=1, width=24, d_state=100, planes=20, rotation="adjacent", norm=False),
    "mimo2_half": MIMO._replace(length=1, rank=2, width=24, d_state=100, planes=50, norm=False),
}


def drawn(shape, start: bool):
    """One row of two a start where wanted, with a past that nothing may be seen of."""
    tokens, heads, state = draw(shape)
    if not start:
        return tokens, heads, state
    state = jax.tree.map(lambda array: np.concatenate([np.full_like(array[:1], np.nan), array[1:]]), state)
    return tokens._replace(start_BL=np.array([[True], [False]])), heads, state


def step(shape, implementation=mosaic_gpu):
    how = {"interpret": ON_CPU} if implementation is mosaic_gpu else {}
    return functools.partial(implementation, rotation=shape.rotation, **how)


@pytest.mark.parametrize("start", [False, True], ids=["goes_on", "start"])
@pytest.mark.parametrize("name", SHAPES)
def test_is_recurrent(name, start):
    check_is_recurrent(SHAPES[name], start)


@pytest.mark.parametrize("name", PADDED)
def test_padded_is_recurrent(name):
    """P padded to 64 and N to 64 or 128: neither the norm nor the state sees the padding."""
    check_is_recurrent(PADDED[name], True)


def check_is_recurrent(shape, start: bool):
    inputs = drawn(shape, start)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, x.dtype if x.dtype == bool else np.float64), inputs)
        want = jax.tree.map(np.asarray, jax.jit(step(shape, recurrent))(*exact))
    cases.check_results(jax.jit(step(shape))(*inputs), want, 1e-6)


@pytest.mark.parametrize("name", ["siso", "mimo"])
def test_a_planted_error_is_caught(name):
    """One part in a thousand of any input."""
    shape = SHAPES[name]._replace(batch=1)
    inputs = drawn(shape, False)
    want = jax.jit(step(shape, recurrent))(*inputs)
    run = jax.jit(step(shape))
    cases.check_results(run(*inputs), want, 1e-6)
    leaves, tree = jax.tree.flatten(inputs)
    for i, leaf in enumerate(leaves):
        wrong = [*leaves[:i], leaf * np.float32(1.001), *leaves[i + 1 :]]
        with pytest.raises(AssertionError, match="is not below"):
            cases.check_results(run(*jax.tree.unflatten(tree, wrong)), want, 1e-6)


def test_bfloat16():
    """The state is that of `recurrent` on the same numbers; what leaves in bfloat16 is rounded."""
    shape = SHAPES["mimo"]
    tokens, heads, state = drawn(shape, True)
    tokens = bfloat16(tokens)
    state = state._replace(k_BRHN=jnp.asarray(state.k_BRHN, jnp.bfloat16), v_BHP=jnp.asarray(state.v_BHP, jnp.bfloat16))
    y, got = jax.jit(step(shape))(tokens, heads, state)
    want_y, want = jax.jit(step(shape, recurrent))(tokens, heads, state)
    assert (y.dtype, got.k_BRHN.dtype, got.v_BHP.dtype) == (jnp.bfloat16,) * 3
    assert rel_rms(got.ssm_BHPN, want.ssm_BHPN) < 1e-6
    cases.check_results((y, got), (want_y, want), 2**-9)


def test_angles_stay_within_a_turn():
    """Also what is rounded up to a whole turn."""
    turn = np.float32(2 * np.pi)
    angle = np.float32(
        [-1e-9, 0, 1e-9, np.nextafter(turn, 0), turn, np.nextafter(turn, 7), -turn, 3 * turn, -3 * turn, 9]
    )
    got = np.asarray(within_a_turn(jnp.asarray(angle)))
    assert ((got >= 0) & (got < turn)).all()
    np.testing.assert_allclose(np.exp(1j * got), np.exp(1j * angle.astype(np.float64)), atol=3e-6)


def test_sine_and_cosine():
    angle = np.linspace(0, 2 * np.pi, 100_001)[:-1].astype(np.float32)
    got = np.stack(sine_and_cosine(jnp.asarray(angle)))
    exact = angle.astype(np.float64)
    np.testing.assert_allclose(got, np.stack([np.sin(exact), np.cos(exact)]), atol=1.2e-7)


@pytest.mark.quick
@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_cuda_in_place(name):
    gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,), abstract_device=gpu)
    shape = SHAPES[name]
    tokens, heads, state = drawn(shape, True)
    if shape.looks_back:
        k_BRHN, v_BHP = (jnp.asarray(x, jnp.bfloat16) for x in (state.k_BRHN, state.v_BHP))
        state = state._replace(k_BRHN=k_BRHN, v_BHP=v_BHP)
    call = functools.partial(mosaic_gpu, rotation=shape.rotation, anywhere=True)
    with use_abstract_mesh(mesh):
        traced = jax.jit(call, donate_argnums=2).trace(bfloat16(tokens), heads, state)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = text[text.index("@mosaic_gpu") :]
    operands = call[call.index("(") + 1 : call.index(")")].split(", ")
    in_place = {operands[int(i)] for i in re.findall(r"operand_index = (\d+)", call)}
    n_inputs, n_state = len(jax.tree.leaves((tokens, heads, state))), len(jax.tree.leaves(state))
    assert {f"%arg{i}" for i in range(n_inputs - n_state, n_inputs)} < in_place  # all of the state, as it came


@pytest.mark.quick
def test_what_it_cannot_run():
    for shape, message in (
        (SHAPES["siso"]._replace(width=65), "decodes width=65 up to 64"),
        (SHAPES["siso"]._replace(d_state=130), "d_state=130 to 128"),
        (SHAPES["mimo"]._replace(rank=8), "rank=8 of"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(step(shape)), *draw(shape))
    tokens, heads, state = draw(SHAPES["siso"])
    with pytest.raises(ValueError, match=r"wants float32 or bfloat16, not \['float16', 'float32'\]"):
        jax.eval_shape(step(SHAPES["siso"]), tokens._replace(q_BLRGN=tokens.q_BLRGN.astype("float16")), heads, state)
