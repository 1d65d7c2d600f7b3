"""The decoding step's Mosaic GPU kernel in Pallas's interpreter against `recurrent`, and lowered for CUDA."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from mamba3_jax.ops.kernels import BACKENDS, normed_step, normed_token
from mamba3_jax.ops.norm import rms_norm
from pallas_kernels.ssm import mosaic_gpu
from pallas_kernels.ssm.cases import LEFT_OUT, MIMO, SISO
from pallas_kernels.ssm.mosaic_gpu.decode_kernel import sine_and_cosine, within_a_turn
from tests.helpers import rel_rms
from tests.ops.cases import bfloat16, draw
from tests.pallas_kernels.family import GPU, Decoding, double, drawn, narrow_state

SMALL = {"length": 1, "width": 64, "d_state": 64, "planes": 16}
LARGE = {"length": 1, "width": 64, "d_state": 128, "planes": 64}
PADDED = {"length": 1, "width": 24, "d_state": 50, "planes": 5}
PADDED_LARGE = PADDED | {"d_state": 100, "planes": 50}
SHAPES = {
    "siso": SISO._replace(**SMALL),
    "siso_half_bare": SISO._replace(rotation="half", skip=False, gate=False, **LARGE | {"planes": 16}),
    "siso_norm": SISO._replace(norm=True, shared_angle=False, **LARGE),
    "mimo4": MIMO._replace(**LARGE | {"planes": 32}),
    "mimo_adjacent": MIMO._replace(rotation="adjacent", gate=False, **SMALL | {"planes": 32}),
    "mimo2": MIMO._replace(rank=2, heads=4, groups=2, gate_ranked=False, skip=False, norm=False, **SMALL),
    "mimo2_adjacent": MIMO._replace(rank=2, rotation="adjacent", **LARGE | {"planes": 5}),
    "mimo1": MIMO._replace(rank=1, norm=False, **SMALL),
    **{name: shape._replace(**SMALL) for name, shape in LEFT_OUT.items()},
}
# P is padded to 64 and N to 64 or 128: neither the norm nor the state sees the padding.
PADDED_SHAPES = {
    "padded_siso": SISO._replace(**PADDED),
    "padded_siso_half_norm": SISO._replace(rotation="half", norm=True, **PADDED_LARGE),
    "padded_siso_norm": SISO._replace(norm=True, shared_angle=False, **PADDED | {"planes": 25}),
    "padded_mimo_norm": MIMO._replace(norm=True, **PADDED),
    "padded_mimo_adjacent": MIMO._replace(rotation="adjacent", norm=False, **PADDED_LARGE | {"planes": 20}),
    "padded_mimo2_half": MIMO._replace(rank=2, norm=False, **PADDED_LARGE),
}


class TestDecoding(Decoding):
    backend = "mosaic_gpu"
    interpret = jax.default_backend() == "cpu"
    shapes = SHAPES | PADDED_SHAPES


step = TestDecoding().step


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
    shape = SHAPES[name]
    tokens, heads, state = drawn(shape, start=True)
    state, call = narrow_state(state), step(shape, interpret=None, anywhere=True)
    with use_abstract_mesh(GPU):
        traced = jax.jit(call, donate_argnums=2).trace(bfloat16(tokens), heads, state)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    barrier, _, call = text[text.index("optimization_barrier") :].partition("@mosaic_gpu")
    kept = re.findall(r"%\w+", barrier.partition(":")[0])
    operands = call[call.index("(") + 1 : call.index(")")].split(", ")
    in_place = {operands[int(i)] for i in re.findall(r"operand_index = (\d+)", call)}
    in_place = {kept[int(name.partition("#")[2])] for name in in_place if "#" in name}  # the other is the output's
    n_inputs, n_state = len(jax.tree.leaves((tokens, heads, state))), len(jax.tree.leaves(state))
    assert {f"%arg{i}" for i in range(n_inputs - n_state, n_inputs)} == in_place  # all of the state, as it came


# With the norm of queries and keys inside: one rank, several, padded ones, two groups.
NORMED = {name: (SHAPES | PADDED_SHAPES)[name] for name in ("siso", "siso_norm", "mimo2_adjacent", "padded_mimo2_half")}


def norms_of(shape):
    """Weights of the two norms, away from 1."""
    return tuple(1 + 0.1 * jax.random.normal(jax.random.key(i), (shape.d_state,)) for i in range(2))


def normed_inputs(shape, *, narrow: bool):
    """Arguments of `normed_step`: values in bfloat16 or float32, queries and keys in float32."""
    tokens, heads, state = drawn(shape, start=True)
    norms = norms_of(shape)
    if narrow:
        tokens, state = bfloat16(tokens)._replace(q_BLRGN=tokens.q_BLRGN, k_BLRGN=tokens.k_BLRGN), narrow_state(state)
    return tokens, heads, state, norms


def norm_outside(tokens, heads, state, norms):
    """Arguments of `recurrent`: queries and keys after their norm, rounded as values are."""
    q, k = (rms_norm(x, norm) for x, norm in zip((tokens.q_BLRGN, tokens.k_BLRGN), norms, strict=True))
    dtype = tokens.v_BLHP.dtype
    return tokens._replace(q_BLRGN=q.astype(dtype), k_BLRGN=k.astype(dtype)), heads, state


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NORMED)
def test_with_the_norm_of_queries_and_keys_inside(name, narrow):
    """It is `recurrent` after the norm, and one part in a thousand of a norm's weight is seen."""
    shape = NORMED[name]
    run = jax.jit(functools.partial(normed_step, rotation=shape.rotation, interpret=TestDecoding.interpret))
    inputs = normed_inputs(shape, narrow=narrow)
    want_y, want = double(norm_outside(*inputs), shape)

    def errors(*inputs):
        y_BLHP, state = run(*inputs)
        if narrow:
            assert (y_BLHP.dtype, state.k_BRHN.dtype) == (jnp.bfloat16,) * 2
        pairs = (y_BLHP, want_y), (state.ssm_BHPN, want.ssm_BHPN), (state.k_BRHN, want.k_BRHN)
        return [rel_rms(np.asarray(got, np.float64), exact) for got, exact in pairs]

    y, h, k = errors(*inputs)
    # The norm is rounded to bfloat16: one entry that goes to the other neighbour is 2^-8 of itself.
    assert max(y, k) < (2**-8 if narrow else 1e-6)
    assert h < (2**-12 if narrow else 1e-6)
    tokens, heads, state, (q_norm, k_norm) = inputs
    if not narrow:
        assert errors(tokens, heads, state, (q_norm * 1.001, k_norm))[0] > 1e-5
        assert errors(tokens, heads, state, (q_norm, k_norm * 1.001))[1] > 1e-5


@pytest.mark.quick
def test_lowers_for_cuda_with_the_norm_inside():
    shape = NORMED["siso"]
    inputs = normed_inputs(shape, narrow=True)
    with use_abstract_mesh(GPU):
        traced = jax.jit(functools.partial(normed_step, rotation=shape.rotation)).trace(*inputs)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["triton", "mosaic_tpu"])
def test_others_refuse_the_norm_by_name(backend):
    shape, module = NORMED["siso"], importlib.import_module(BACKENDS[backend])
    token = jax.eval_shape(normed_token, *normed_inputs(shape, narrow=False))
    assert "not q_norm_N and k_norm_N" in module.unsupported(token)
    with pytest.raises(ValueError, match="wants q and k after their norm"):
        jax.eval_shape(functools.partial(module.step, rotation=shape.rotation), token)
    assert "bfloat16, not float32" in mosaic_gpu.unsupported(token)
    narrow = jax.eval_shape(normed_token, *normed_inputs(shape, narrow=True))
    assert mosaic_gpu.unsupported(narrow) is None


@pytest.mark.quick
def test_what_it_cannot_run():
    for shape, message in (
        (SHAPES["siso"]._replace(width=65), "decodes width=65 up to 64"),
        (SHAPES["siso"]._replace(d_state=130), "d_state=130 to 128"),
        (SHAPES["mimo4"]._replace(rank=8), "rank=8 of"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(step(shape), *draw(shape))
    tokens, heads, state = draw(SHAPES["siso"])
    with pytest.raises(ValueError, match=r"wants float32 or bfloat16, not \['float16', 'float32'\]"):
        jax.eval_shape(step(SHAPES["siso"]), tokens._replace(q_BLRGN=tokens.q_BLRGN.astype("float16")), heads, state)
