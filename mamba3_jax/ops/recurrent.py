"""The definition: Mamba-3 token by token. Every other implementation is tested against this file."""

import functools

import jax
import jax.numpy as jnp

from mamba3_jax.ops.output import finish
from mamba3_jax.ops.rotary import rotate
from mamba3_jax.ops.types import Heads, State, Tokens, accumulator, empty_state


def recurrent(tokens: Tokens, heads: Heads, state: State | None, *, rotation: str, chunk: int | None = None):
    """h_t = a_t h_{t-1} + (1-lambda_t) dt_t a_t X_{t-1} k_{t-1}^T + lambda_t dt_t X_t k_t^T,  y_t = h_t q_t.

    a_t = exp(log_a_t); X_t[r] = v_rank[r] v_t; k and q are biased, then rotated by the angle phi_t = phi_{t-1} +
    angle_t dt_t (mod 2 pi) of their own time; products of X and k are summed over the ranks into one state. Then
    `finish`: skip, norm, gate and the sum over ranks (SPEC sections 4 to 7).

    Runs in float64 where dt is float64. `chunk` is part of the shared signature and has no meaning here.
    """
    state = empty_state(tokens) if state is None else state
    dtype = accumulator(tokens)
    n_heads = tokens.v_BLHP.shape[2]
    length = tokens.dt_BLH.shape[1]
    start_BL = jnp.zeros(tokens.dt_BLH.shape[:2], bool) if tokens.start_BL is None else tokens.start_BL

    def step(carry, token):
        angle_BHS, h_BHPN, k_BHRN, x_BHRP = carry
        q, k, v_BHP, dt_BH, log_a_BH, trap_BH, turn_BHS, gate_BHP, start_B = token

        def forget(before):
            return jnp.where(start_B.reshape(-1, *[1] * (before.ndim - 1)), 0, before)

        angle_BHS, h_BHPN, k_BHRN, x_BHRP = map(forget, (angle_BHS, h_BHPN, k_BHRN, x_BHRP))

        angle_BHS = within_a_turn(angle_BHS + turn_BHS.astype(dtype) * dt_BH[..., None])
        q_BHRN = rotate(per_head(q.astype(dtype), n_heads) + heads.q_bias_HRN, angle_BHS[:, :, None], rotation)
        next_k_BHRN = rotate(per_head(k.astype(dtype), n_heads) + heads.k_bias_HRN, angle_BHS[:, :, None], rotation)
        # The barrier keeps XLA from turning a key again for every row of the state it goes into.
        q_BHRN, next_k_BHRN = jax.lax.optimization_barrier((q_BHRN, next_k_BHRN))
        next_x_BHRP = ranked(v_BHP.astype(dtype), heads)

        a_BH = jnp.exp(log_a_BH)
        beta_BH = (1 - trap_BH) * dt_BH * a_BH
        h_BHPN = a_BH[..., None, None] * h_BHPN
        h_BHPN += beta_BH[..., None, None] * outer(x_BHRP, k_BHRN)
        h_BHPN += (trap_BH * dt_BH)[..., None, None] * outer(next_x_BHRP, next_k_BHRN)

        y_BHRP = jnp.einsum("bhrn,bhpn->bhrp", q_BHRN, h_BHPN, precision="highest")
        y_BHP = finish(y_BHRP, next_x_BHRP, gate_BHP, heads)
        return (angle_BHS, h_BHPN, next_k_BHRN, next_x_BHRP), y_BHP

    carry = (
        state.angle_BHS.astype(dtype),
        state.ssm_BHPN.astype(dtype),
        jnp.swapaxes(state.k_BRHN, 1, 2).astype(dtype),
        ranked(state.v_BHP.astype(dtype), heads),
    )
    per_token = (*tokens[:8], start_BL)
    if length == 1:  # decoding: no loop around one step
        carry, y_BHP = step(carry, jax.tree.map(lambda array: array[:, 0], per_token))
        y_BLHP = y_BHP[:, None]
    else:
        time_first = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), per_token)
        carry, y_LBHP = jax.lax.scan(step, carry, time_first)
        y_BLHP = jnp.moveaxis(y_LBHP, 0, 1)

    angle_BHS, h_BHPN, k_BHRN, _ = carry
    last_k_BRHN = jnp.swapaxes(k_BHRN, 1, 2).astype(tokens.k_BLRGN.dtype)
    return y_BLHP.astype(tokens.v_BLHP.dtype), State(angle_BHS, h_BHPN, last_k_BRHN, tokens.v_BLHP[:, -1])


def within_a_turn(angle):
    """The angle modulo 2 pi, in [0, 2 pi); its derivative is 1."""
    for _ in range(2):  # a tiny negative angle rounds up to a whole turn, which is zero
        angle = angle - 2 * jnp.pi * jax.lax.stop_gradient(jnp.floor(angle / (2 * jnp.pi)))
    return angle


def per_head(x_RGN, n_heads: int):
    """(..., R, G, N) -> (..., H, R, N): head h reads group h // (H / G)."""
    x_GRN = jnp.swapaxes(x_RGN, -2, -3)
    return jnp.repeat(x_GRN, n_heads // x_GRN.shape[-3], axis=-3)


def ranked(v_HP, heads: Heads):
    """X[r] = v_rank[r] v: (..., H, P) -> (..., H, R, P); one rank of v itself without v_rank."""
    if heads.v_rank_HRP is None:
        return v_HP[..., None, :]
    return v_HP[..., None, :] * heads.v_rank_HRP.astype(v_HP.dtype)


def outer(x_BHRP, k_BHRN):
    """sum_r x[r] k[r]^T, as a sum that fuses with what it is added to: a product over so few ranks is slower."""
    ranks = range(x_BHRP.shape[2])
    return functools.reduce(jnp.add, (x_BHRP[:, :, r, :, None] * k_BHRN[:, :, r, None, :] for r in ranks))
