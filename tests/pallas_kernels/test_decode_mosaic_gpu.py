"""The decoding step's Mosaic GPU kernel in Pallas's interpreter against `recurrent`, and lowered for CUDA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from pallas_kernels.ssm.cases import LEFT_OUT, MIMO, SISO
from pallas_kernels.ssm.mosaic_gpu.decode_kernel import sine_and_cosine, within_a_turn
from tests.ops.cases import bfloat16, draw
from tests.pallas_kernels.family import GPU, Decoding, drawn, narrow_state

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
        (SHAPES["mimo4"]._replace(rank=8), "rank=8 of"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(step(shape), *draw(shape))
    tokens, heads, state = draw(SHAPES["siso"])
    with pytest.raises(ValueError, match=r"wants float32 or bfloat16, not \['float16', 'float32'\]"):
        jax.eval_shape(step(SHAPES["siso"]), tokens._replace(q_BLRGN=tokens.q_BLRGN.astype("float16")), heads, state)
