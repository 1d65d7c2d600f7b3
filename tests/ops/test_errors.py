"""Everything the op cannot mean is a ValueError before any compute, with the value that came and the one wanted."""

import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.ssm import ssm
from pallas_kernels.ssm.cases import MIMO, SISO
from tests.ops.cases import draw

OF_TOKENS = {
    "q_BLRGN": (lambda q: q[0], "q has shape (13, 1, 2, 8), wanted five axes (B, L, R, G, N)"),
    "v_BLHP": (lambda v: v[0], "v has shape (13, 4, 4), wanted four axes (B, L, H, P)"),
    "k_BLRGN": (lambda k: k[:, 1:], "k has shape (2, 12, 1, 2, 8), wanted (2, 13, 1, 2, 8)"),
    "dt_BLH": (lambda dt: dt[:, :, :3], "dt has shape (2, 13, 3), wanted (2, 13, 4)"),
    "log_a_BLH": (lambda log_a: log_a[:1], "log_a has shape (1, 13, 4), wanted (2, 13, 4)"),
    "gamma_BLH": (lambda gamma: gamma[..., None], "gamma has shape (2, 13, 4, 1), wanted (2, 13, 4)"),
    "beta_BLH": (lambda beta: beta[:, 1:], "beta has shape (2, 12, 4), wanted (2, 13, 4)"),
    "angle_BLHS": (lambda angle: angle[:, 1:], "angle has shape (2, 12, 1, 2), wanted (2, 13, 1, 2)"),
    "gate_BLHP": (lambda gate: gate[..., :2], "gate has shape (2, 13, 4, 2), wanted (2, 13, 4, 4)"),
    "start_BL": (lambda _: np.zeros((2, 12), bool), "start has shape (2, 12), wanted (2, 13)"),
}
OF_DTYPE = {
    "dt_BLH": (jnp.bfloat16, "dt is bfloat16, wanted float32"),
    "log_a_BLH": (jnp.float16, "log_a is float16, wanted float32"),
    "gamma_BLH": (jnp.bfloat16, "gamma is bfloat16, wanted float32"),
    "beta_BLH": (jnp.bfloat16, "beta is bfloat16, wanted float32"),
    "angle_BLHS": (jnp.bfloat16, "angle is bfloat16, wanted float32"),
    "q_BLRGN": (jnp.int32, "q is int32, wanted a floating point dtype"),
    "k_BLRGN": (jnp.int32, "k is int32, wanted a floating point dtype"),
    "v_BLHP": (jnp.int32, "v is int32, wanted a floating point dtype"),
}
OF_HEADS = {
    "q_bias_HRN": "q_bias has shape (1, 4, 8), wanted (2, 4, 8)",
    "k_bias_HRN": "k_bias has shape (1, 4, 8), wanted (2, 4, 8)",
    "skip_H": "skip has shape (1,), wanted (2,)",
    "v_rank_HRP": "v_rank has shape (1, 4, 4), wanted (2, 4, 4)",
    "gate_rank_HRP": "gate_rank has shape (1, 4, 4), wanted (2, 4, 4)",
    "out_rank_HRP": "out_rank has shape (1, 4, 4), wanted (2, 4, 4)",
    "norm_HP": "norm has shape (1, 4), wanted (2, 4)",
}
OF_STATE = {
    "angle_BHS": "state.angle has shape (1, 4, 2), wanted (2, 4, 2)",
    "ssm_BHPN": "state.ssm has shape (1, 4, 4, 8), wanted (2, 4, 4, 8)",
    "k_BRHN": "state.k has shape (1, 1, 4, 8), wanted (2, 1, 4, 8)",
    "v_BHP": "state.v has shape (1, 4, 4), wanted (2, 4, 4)",
}


def message(tokens, heads, state=None, **settings) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        ssm(tokens, heads, state, **settings)
    return str(error.value)


@pytest.mark.parametrize("part", OF_TOKENS)
def test_misshapen_tokens(part):
    tokens, heads, _ = draw(SISO)
    change, wanted = OF_TOKENS[part]
    assert message(tokens._replace(**{part: change(getattr(tokens, part))}), heads) == wanted


@pytest.mark.parametrize("part", OF_HEADS)
def test_misshapen_heads(part):
    tokens, heads, _ = draw(MIMO)
    assert message(tokens, heads._replace(**{part: getattr(heads, part)[:1]})) == OF_HEADS[part]


@pytest.mark.parametrize("part", OF_STATE)
def test_misshapen_state(part):
    tokens, heads, state = draw(SISO)
    assert message(tokens, heads, state._replace(**{part: getattr(state, part)[:1]})) == OF_STATE[part]


@pytest.mark.parametrize("part", OF_DTYPE)
def test_dtype_of_tokens(part):
    tokens, heads, _ = draw(SISO)
    dtype, wanted = OF_DTYPE[part]
    assert message(tokens._replace(**{part: jnp.asarray(getattr(tokens, part), dtype)}), heads) == wanted


@pytest.mark.parametrize("part", ["angle_BHS", "ssm_BHPN"])
def test_dtype_of_state(part):
    tokens, heads, state = draw(SISO)
    state = state._replace(**{part: jnp.asarray(getattr(state, part), jnp.bfloat16)})
    assert message(tokens, heads, state) == f"state.{part.split('_')[0]} is bfloat16, wanted float32"


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_every_array_is_of_floating_point(dtype):
    """A cast of a complex weight would drop its imaginary part."""
    tokens, heads, state = draw(MIMO)
    for name, given in {"tokens": tokens, "heads": heads, "state": state}.items():
        for part, array in given._asdict().items():
            if array is not None:
                other = {"tokens": tokens, "heads": heads, "state": state}
                other[name] = given._replace(**{part: np.ones(array.shape, dtype)})
                where = "state." * (name == "state") + part.rpartition("_")[0]
                wanted = f"{where} is {np.dtype(dtype)}, wanted a floating point dtype"
                assert message(other["tokens"], other["heads"], other["state"]) == wanted


def test_what_is_needed_and_what_is_no_array():
    tokens, heads, state = draw(SISO)
    for part in ("q_BLRGN", "k_BLRGN", "v_BLHP", "log_a_BLH", "gamma_BLH"):
        name = part.rpartition("_")[0]
        assert message(tokens._replace(**{part: None}), heads) == f"{name} is None, wanted an array"
        listed = tokens._replace(**{part: getattr(tokens, part).tolist()})
        assert message(listed, heads) == f"{name} is list, wanted an array"
    assert message(tokens, heads, state._replace(ssm_BHPN=None)) == "state.ssm is None, wanted an array"
    assert message(tokens, heads._replace(skip_H=1.0)) == "skip is float, wanted an array or None"
    assert message(tuple(tokens), heads) == "tokens is tuple, wanted ops.ssm.Tokens"
    assert message(tokens, None) == "heads is NoneType, wanted ops.ssm.Heads"
    assert message(tokens, heads, tuple(state)) == "state is tuple, wanted ops.ssm.State"
    flat = tokens._replace(angle_BLHS=np.float32(1))
    assert message(flat, heads) == "angle has shape (), wanted four axes (B, L, 1 or H, S)"


def test_dtype_of_start():
    tokens, heads, _ = draw(SISO)
    assert message(tokens._replace(start_BL=np.zeros((2, 13), np.int32)), heads) == "start is int32, wanted bool"


def test_settings_and_sizes():
    tokens, heads, _ = draw(SISO)
    assert message(tokens, heads, rotation="quarter") == "rotation='quarter' is not one of ('adjacent', 'half')"
    for chunk in (0, 4.0, "4"):
        assert message(tokens, heads, chunk=chunk) == f"{chunk=} is not a positive number of tokens"
    unknown = message(tokens, heads, implementation="fastest")
    assert unknown.startswith("implementation='fastest' is not one of")
    assert "'recurrent'" in unknown

    groups_of_three = draw(SISO._replace(groups=3))[0]
    assert message(groups_of_three, heads) == "n_heads=4 is not a multiple of groups=3"
    no_tokens = draw(SISO._replace(length=0))[0]
    rest = "needs at least one of every axis, a row and a token too"
    assert message(no_tokens, heads) == f"q has shape (2, 0, 1, 2, 8): {rest}"
    for part, sizes in (("q_BLRGN", (2, 13, 1, 0, 8)), ("v_BLHP", (2, 13, 4, 0)), ("angle_BLHS", (2, 13, 1, 0))):
        nothing = tokens._replace(**{part: np.zeros(sizes, np.float32)})
        assert message(nothing, heads) == f"{part.partition('_')[0]} has shape {sizes}: {rest}"
    for d_state, planes in ((7, 2), (8, 5)):
        many_planes = draw(SISO._replace(d_state=d_state, planes=planes))[0]
        wanted = f"planes={planes} planes do not fit in d_state={d_state} (even, at least twice the planes)"
        assert message(many_planes, heads) == wanted


def test_parts_of_the_state_are_those_that_the_tokens_need():
    tokens, heads, state = draw(SISO)
    still, first_order = tokens._replace(angle_BLHS=None), tokens._replace(beta_BLH=None)
    assert message(still, heads, state) == "state.angle is an array, wanted None, as the tokens' angle"
    assert message(first_order, heads, state) == "state.k is an array, wanted None, as the tokens' beta"
    no_v = state._replace(v_BHP=None)
    assert message(tokens, heads, no_v) == "state.v is None, wanted an array, as the tokens' beta"
    no_dt = tokens._replace(dt_BLH=None)
    assert message(no_dt, heads) == "dt is None, but multiplies the angle, which is not"


@pytest.mark.parametrize("part", ["v_rank_HRP", "out_rank_HRP"])
def test_ranks_need_weights(part):
    tokens, heads, _ = draw(MIMO)
    assert message(tokens, heads._replace(**{part: None})) == "rank=4 needs v_rank and out_rank"
