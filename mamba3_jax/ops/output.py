"""From the state's read-out to the op's output: skip, pre-gate norm, gate, and the sum over MIMO ranks."""

import jax
import jax.numpy as jnp

from mamba3_jax.ops.types import Heads

NORM_EPS = 1e-5


def epilogue(y_HRP, x_HRP, gate_HP, heads: Heads):
    """o = sum_r out[r] norm(y[r] + D x[r]) silu(gate gate_rank[r]): SPEC section 7, for any leading axes.

    There may be an axis of tokens between H and R: every field of `heads` then has an axis of size 1 there.

    Args:
        y_HRP: (..., H, R, P), the state's read-out of each rank, in the accumulator's dtype.
        x_HRP: (..., H, R, P), the values as they entered the state (times v_rank).
        gate_HP: (..., H, P) or None.
        heads: skip, norm, gate_rank and out_rank, each applied where it is not None (out_rank None: one rank).

    Returns:
        (..., H, P) in y's dtype. The norm's statistics are over P, of each head and rank.
    """
    dtype = y_HRP.dtype
    if heads.skip_H is not None:
        y_HRP = y_HRP + heads.skip_H[..., None, None].astype(dtype) * x_HRP
    if heads.norm_HP is not None:
        mean_square = jnp.mean(jnp.square(y_HRP), axis=-1, keepdims=True)
        y_HRP = y_HRP * jax.lax.rsqrt(mean_square + NORM_EPS) * heads.norm_HP[..., None, :].astype(dtype)
    if gate_HP is not None:
        gate_HRP = gate_HP[..., None, :].astype(dtype)
        if heads.gate_rank_HRP is not None:
            gate_HRP = gate_HRP * heads.gate_rank_HRP.astype(dtype)
        y_HRP = y_HRP * jax.nn.silu(gate_HRP)
    if heads.out_rank_HRP is not None:
        y_HRP = y_HRP * heads.out_rank_HRP.astype(dtype)
    if y_HRP.shape[-2] == 1:
        return y_HRP[..., 0, :]
    # XLA for CPU takes ten times as long for jnp.sum over such a short axis, or for a sum that it fuses with the above.
    y_HRP = jax.lax.optimization_barrier(y_HRP)
    return sum(y_HRP[..., rank, :] for rank in range(1, y_HRP.shape[-2])) + y_HRP[..., 0, :]
