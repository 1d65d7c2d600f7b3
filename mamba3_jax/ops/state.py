"""The state before a row and the one after it, in the forms that all implementations share."""

import functools

import jax.numpy as jnp

from mamba3_jax.ops.rotary import rotate
from mamba3_jax.ops.types import Heads, State, Tokens


def per_head(x_RGN, n_heads: int):
    """Repeat groups for their heads, (..., R, G, N) -> (..., H, R, N): head h reads group h // (H / G)."""
    x_GRN = jnp.swapaxes(x_RGN, -2, -3)
    return jnp.repeat(x_GRN, n_heads // x_GRN.shape[-3], axis=-3)


def ranked(v_HP, heads: Heads):
    """X[r] = v_rank[r] v: (..., H, P) -> (..., H, R, P). Without v_rank there is one rank, v itself."""
    if heads.v_rank_HRP is None:
        return v_HP[..., None, :]
    return v_HP[..., None, :] * heads.v_rank_HRP.astype(v_HP.dtype)


def outer(x_BHRP, k_BHRN):
    """Return sum_r x[r] k[r]^T. XLA fuses the sum with what it is added to; a matrix product of few ranks is slower."""
    ranks = range(x_BHRP.shape[2])
    return functools.reduce(jnp.add, (x_BHRP[:, :, r, :, None] * k_BHRN[:, :, r, None, :] for r in ranks))


def incoming(state: State, first_BH, heads: Heads):
    """Return the state before the row with what token 0 adds to it for the token before the row (`later_weight`)."""
    if first_BH is None:
        return state.ssm_BHPN
    before_BHRN = jnp.swapaxes(state.k_BRHN, 1, 2).astype(first_BH.dtype)
    x_BHRP = ranked(state.v_BHP.astype(first_BH.dtype), heads)
    return state.ssm_BHPN + first_BH[..., None, None] * outer(x_BHRP, before_BHRN)


def last_state(tokens: Tokens, heads: Heads, angle_BHS, h_BHPN, rotation: str) -> State:
    """Return the state after the row, from its last tokens, its last angle (radians, or None) and `h_BHPN`."""
    if tokens.beta_BLH is None:
        return State(angle_BHS, h_BHPN)
    k_BHRN = per_head(tokens.k_BLRGN[:, -1], tokens.v_BLHP.shape[2]).astype(h_BHPN.dtype)
    k_BHRN = k_BHRN if heads.k_bias_HRN is None else k_BHRN + heads.k_bias_HRN
    k_BHRN = k_BHRN if angle_BHS is None else rotate(k_BHRN, angle_BHS[:, :, None], rotation)
    k_BRHN = jnp.swapaxes(k_BHRN, 1, 2).astype(tokens.k_BLRGN.dtype)
    return State(angle_BHS, h_BHPN, k_BRHN, tokens.v_BLHP[:, -1])
