"""The arguments and results of the state space op: tuples of arrays, without parameters or Flax.

    h_t = a_t (h_{t-1} + beta_t X_{t-1} k_{t-1}^T) + gamma_t X_t k_t^T,    y_t = h_t q_t,    a_t = exp(log_a_t)

Letters: B batch, L tokens, R MIMO rank (1 is SISO), G groups of q/k, H heads, N state per head, P head width,
S rotary pairs (planes). The paper's C, B, x, Delta, Delta*A are q, k, v, dt, log_a here; gamma and beta come from a
rule of `discretize.DISCRETIZATIONS`. A field that is None is absent and costs nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """One entry a token, between the input projection and the op.

    dt, log_a, gamma, beta and angle are float32 (float64 under x64); q, k, v and gate may be bfloat16.
    """

    q_BLRGN: jax.Array  # paper C, normalised, before bias and rotation
    k_BLRGN: jax.Array  # paper B, normalised, before bias and rotation
    v_BLHP: jax.Array  # paper x
    dt_BLH: jax.Array | None  # paper Delta, > 0; it only multiplies the angle, and may be None if the angle is
    log_a_BLH: jax.Array  # Delta * A, < 0: log of the decay of one step
    gamma_BLH: jax.Array  # >= 0: weight of the token's own input
    beta_BLH: jax.Array | None = None  # >= 0: weight of the previous token's input, before this step's decay
    angle_BLHS: jax.Array | None = None  # radians per unit dt; an H axis of 1 is shared by all heads
    gate_BLHP: jax.Array | None = None  # paper z
    start_BL: jax.Array | None = None  # bool, true at the first token of a document


class Heads(NamedTuple):
    """Learned, one entry a head."""

    q_bias_HRN: jax.Array | None = None
    k_bias_HRN: jax.Array | None = None
    skip_H: jax.Array | None = None  # paper D
    v_rank_HRP: jax.Array | None = None  # mimo_x
    gate_rank_HRP: jax.Array | None = None  # mimo_z
    out_rank_HRP: jax.Array | None = None  # mimo_o
    norm_HP: jax.Array | None = None  # weight of the RMSNorm before the gate


class State(NamedTuple):
    """Everything that a sequence leaves behind, of the same size however long it was.

    Angle and ssm have the accumulator's dtype, the last key and value that of keys and values.
    """

    angle_BHS: jax.Array | None  # radians, in [0, 2 pi); None: the tokens have no angle
    ssm_BHPN: jax.Array
    k_BRHN: jax.Array | None = None  # the last key, biased and rotated, without a weight; None: the tokens have no beta
    v_BHP: jax.Array | None = None  # the last value, before v_rank; None: the tokens have no beta


class Transition(NamedTuple):
    """What a run of tokens does to any state before it, see `ssm.transition` and `ssm.compose`."""

    log_a_BH: jax.Array  # the sum of log_a over the run
    carried_B: jax.Array  # bool: no document starts in the run
    first_BH: jax.Array | None  # beta of the first token, 0 where it starts a document; None: the tokens have no beta
    state: State  # what the run leaves from the empty state


def accumulator(tokens: Tokens) -> jnp.dtype:
    """Return the dtype of decays, states and sums: float32, or float64 where the inputs are (under x64)."""
    return jnp.promote_types(jnp.float32, tokens.log_a_BLH.dtype)


def product_dtype(tokens: Tokens) -> jnp.dtype:
    """Return the dtype that the operands of matrix products are rounded to: that of queries, keys and values."""
    queries = () if tokens.q_BLRGN is None else (tokens.q_BLRGN,)  # `transition` has none
    return jnp.result_type(*queries, tokens.k_BLRGN, tokens.v_BLHP)


def empty_state(tokens: Tokens) -> State:
    """Return the state before any token: zeros, of the sizes that `tokens` implies."""
    batch, _, rank, _, d_state = tokens.k_BLRGN.shape
    heads, width = tokens.v_BLHP.shape[2:]
    dtype = accumulator(tokens)
    angle_BHS = k_BRHN = v_BHP = None
    if tokens.angle_BLHS is not None:
        angle_BHS = jnp.zeros((batch, heads, tokens.angle_BLHS.shape[-1]), dtype)
    if tokens.beta_BLH is not None:
        k_BRHN = jnp.zeros((batch, rank, heads, d_state), tokens.k_BLRGN.dtype)
        v_BHP = jnp.zeros((batch, heads, width), tokens.v_BLHP.dtype)
    return State(angle_BHS, jnp.zeros((batch, heads, width, d_state), dtype), k_BRHN, v_BHP)
