"""The definition: Mamba-3 token by token. Every other implementation is tested against this file."""

import jax
import jax.numpy as jnp

from mamba3_jax.ops.output import epilogue
from mamba3_jax.ops.rotary import rotate
from mamba3_jax.ops.state import outer, per_head, ranked
from mamba3_jax.ops.types import Heads, State, Tokens, accumulator, empty_state


def recurrent(tokens: Tokens, heads: Heads, state: State | None, *, rotation: str, chunk: int | None = None):
    """h_t = a_t (h_{t-1} + beta_t X_{t-1} k_{t-1}^T) + gamma_t X_t k_t^T,  y_t = h_t q_t.

    a_t = exp(log_a_t) and X_t[r] = v_rank[r] v_t. k_t and q_t are biased, then rotated by the angle of their own token,
    phi_t = phi_{t-1} + angle_t dt_t (mod 2 pi). X k^T is summed over the ranks into one state. `epilogue` follows:
    skip, norm, gate and the sum over ranks (SPEC sections 4 to 7).

    It runs in float64 where log_a is float64. `chunk` belongs to the shared signature and has no meaning here. Without
    queries there is no y, only the state.
    """
    state = empty_state(tokens) if state is None else state
    dtype = accumulator(tokens)
    n_heads = tokens.v_BLHP.shape[2]

    def step(carry, token: Tokens):
        if token.start_BL is not None:
            start_B = token.start_BL
            forget = lambda before: jnp.where(start_B.reshape(-1, *[1] * (before.ndim - 1)), 0, before)  # noqa: E731
            carry = jax.tree.map(forget, carry)
        angle_BHS, h_BHPN, before = carry
        if angle_BHS is not None:
            angle_BHS = within_a_turn(angle_BHS + token.angle_BLHS.astype(dtype) * token.dt_BLH[..., None])

        def rotated(x_BRGN, bias_HRN):
            if x_BRGN is None:
                return None
            x_BHRN = per_head(x_BRGN.astype(dtype), n_heads)
            x_BHRN = x_BHRN if bias_HRN is None else x_BHRN + bias_HRN
            return x_BHRN if angle_BHS is None else rotate(x_BHRN, angle_BHS[:, :, None], rotation)

        both = rotated(token.q_BLRGN, heads.q_bias_HRN), rotated(token.k_BLRGN, heads.k_bias_HRN)
        # The barrier keeps XLA from rotating a key again for every row of the state that it enters.
        q_BHRN, k_BHRN = jax.lax.optimization_barrier(both)
        x_BHRP = ranked(token.v_BLHP.astype(dtype), heads)

        a_BH = jnp.exp(token.log_a_BLH)
        h_BHPN = a_BH[..., None, None] * h_BHPN
        if before is not None:
            h_BHPN += (a_BH * token.beta_BLH)[..., None, None] * outer(*before)
            before = x_BHRP, k_BHRN
        h_BHPN += token.gamma_BLH[..., None, None] * outer(x_BHRP, k_BHRN)
        y_BHP = None
        if q_BHRN is not None:
            y_BHRP = jnp.einsum("bhrn,bhpn->bhrp", q_BHRN, h_BHPN, precision="highest")
            y_BHP = epilogue(y_BHRP, x_BHRP, token.gate_BLHP, heads).astype(tokens.v_BLHP.dtype)
        return (angle_BHS, h_BHPN, before), y_BHP

    before = None
    if tokens.beta_BLH is not None:
        before = ranked(state.v_BHP.astype(dtype), heads), jnp.swapaxes(state.k_BRHN, 1, 2).astype(dtype)
    carry = jax.tree.map(lambda array: array.astype(dtype), (state.angle_BHS, state.ssm_BHPN, before))
    if tokens.log_a_BLH.shape[1] == 1:  # a decoding step needs no loop
        carry, y_BHP = step(carry, jax.tree.map(lambda array: array[:, 0], tokens))
        y_BLHP = None if y_BHP is None else y_BHP[:, None]
    else:
        time_first = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), tokens)
        carry, y_LBHP = jax.lax.scan(step, carry, time_first)
        y_BLHP = None if y_LBHP is None else jnp.moveaxis(y_LBHP, 0, 1)

    angle_BHS, h_BHPN, before = carry
    if before is None:
        return y_BLHP, State(angle_BHS, h_BHPN)
    last_k_BRHN = jnp.swapaxes(before[1], 1, 2).astype(tokens.k_BLRGN.dtype)
    return y_BLHP, State(angle_BHS, h_BHPN, last_k_BRHN, tokens.v_BLHP[:, -1])


def within_a_turn(angle):
    """Return the angle modulo 2 pi, in [0, 2 pi); its derivative is 1."""
    for _ in range(2):  # a tiny negative angle rounds up to a whole turn, so it takes a second pass to become 0
        angle = angle - 2 * jnp.pi * jax.lax.stop_gradient(jnp.floor(angle / (2 * jnp.pi)))
    return angle
