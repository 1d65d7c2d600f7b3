"""What goes into and comes out of the state space op: three tuples of arrays, no parameters, no Flax.

Letters: B batch, L tokens, R MIMO rank (1 is SISO), G groups of q/k, H heads, N state per head, P head width,
S rotated planes. The paper's C, B, x, Delta, Delta*A, lambda are q, k, v, dt, log_a, trap here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """One entry a token, between the input projection and the op.

    dt, log_a, trap and angle are float32 (float64 under x64); q, k, v and gate may be bfloat16.
    """

    q_BLRGN: jax.Array  # paper C, normalised, before bias and rotation
    k_BLRGN: jax.Array  # paper B, likewise
    v_BLHP: jax.Array  # paper x
    dt_BLH: jax.Array  # paper Delta, > 0
    log_a_BLH: jax.Array  # Delta * A, < 0: log of the decay of one step
    trap_BLH: jax.Array  # paper lambda, in [0, 1]
    angle_BLHS: jax.Array  # radians per unit dt; the H axis may be 1: shared by the heads
    gate_BLHP: jax.Array | None = None  # paper z
    start_BL: jax.Array | None = None  # bool, true at the first token of a document


class Heads(NamedTuple):
    """Learned, one entry a head."""

    q_bias_HRN: jax.Array
    k_bias_HRN: jax.Array
    skip_H: jax.Array | None = None  # paper D
    v_rank_HRP: jax.Array | None = None  # mimo_x
    gate_rank_HRP: jax.Array | None = None  # mimo_z
    out_rank_HRP: jax.Array | None = None  # mimo_o
    norm_HP: jax.Array | None = None  # weight of the RMSNorm before the gate


class State(NamedTuple):
    """Everything a sequence leaves behind, of fixed size whatever came before."""

    angle_BHS: jax.Array  # float32, in [0, 2 pi)
    ssm_BHPN: jax.Array  # float32
    k_BRHN: jax.Array  # the last key: biased, rotated, unscaled
    v_BHP: jax.Array  # the last value: raw


def accumulator(tokens: Tokens) -> jnp.dtype:
    """The dtype of dt, states and sums: float32, or float64 where the inputs are (under x64)."""
    return jnp.promote_types(jnp.float32, tokens.dt_BLH.dtype)


def product_dtype(tokens: Tokens) -> jnp.dtype:
    """What the operands of matrix products are rounded to: the dtype of queries, keys and values."""
    return jnp.result_type(tokens.q_BLRGN, tokens.k_BLRGN, tokens.v_BLHP)


def empty_state(tokens: Tokens) -> State:
    """The state before any token: zeros, of the sizes that `tokens` implies."""
    batch, _, rank, _, d_state = tokens.k_BLRGN.shape
    heads, width = tokens.v_BLHP.shape[2:]
    dtype = accumulator(tokens)
    return State(
        angle_BHS=jnp.zeros((batch, heads, tokens.angle_BLHS.shape[-1]), dtype),
        ssm_BHPN=jnp.zeros((batch, heads, width, d_state), dtype),
        k_BRHN=jnp.zeros((batch, rank, heads, d_state), tokens.k_BLRGN.dtype),
        v_BHP=jnp.zeros((batch, heads, width), tokens.v_BLHP.dtype),
    )
