"""Matmuls inside chunks, one small state between them (the SSD form of Mamba-2 with Mamba-3's weights)."""

import math

import jax
import jax.numpy as jnp

from mamba3_jax.ops.chunks import Chunk, over_chunks
from mamba3_jax.ops.types import Heads, State, Tokens


def chunked(tokens: Tokens, heads: Heads, state: State | None, *, rotation: str, chunk: int | None = None):
    """y_t = sum_{s<t} exp(sum_{s<u<=t} log_a_u) kappa_s (q_t.k_s) x_s + gamma_t (q_t.k_t) x_t + exp(..) h_0 q_t.

    The sums over s inside a chunk are three matrix products; what came before the chunk is in h_0 (SPEC section 6).
    """
    return over_chunks(_core, tokens, heads, state, rotation=rotation, chunk=chunk or _default(tokens.k_BLRGN.shape[2]))


def _default(rank: int) -> int:
    """The fastest size measured (experiments/benchmarks): an accelerator wants fewer and larger products."""
    if jax.default_backend() == "cpu":
        return max(16, 64 // rank)
    return max(64, 128 // rank)


def _core(part: Chunk, h_BHPN):
    batch, n_heads, length, rank, _ = part.q_BHQRN.shape
    product_dtype = part.q_BHQRN.dtype

    def product(formula, a, b):
        a, b = a.astype(product_dtype), b.astype(product_dtype)
        return jnp.einsum(formula, a, b, precision="highest", preferred_element_type=h_BHPN.dtype)

    exact_BHQ, rest_BHQ = log_decay(part.log_a_BHQ, part.within_BQQ)
    gap_BHQQ = (exact_BHQ[..., :, None] - exact_BHQ[..., None, :]) + (rest_BHQ[..., :, None] - rest_BHQ[..., None, :])
    within_BHQQ = part.within_BQQ[:, None]
    # Masked before exp as well: what lies after a token grows without bound. The mask itself chooses values, here and
    # below, where a factor of 0 would let NaN through: so one before the chunk, or in the token after it, stays there.
    decay_BHQQ = jnp.exp(jnp.where(within_BHQQ, gap_BHQQ, 0))
    own_QQ = jnp.eye(length, dtype=bool)
    weight_BHQQ = decay_BHQQ * jnp.where(own_QQ, part.gamma_BHQ[..., None, :], part.kappa_BHQ[..., None, :])
    weight_BHQQ = jnp.where(within_BHQQ, weight_BHQQ, 0)

    # Tokens and ranks are one axis: every rank of a query sees every rank of a key.
    q_BHTN, k_BHTN, x_BHTP = (
        array.reshape(batch, n_heads, length * rank, -1) for array in (part.q_BHQRN, part.k_BHQRN, part.x_BHQRP)
    )
    score_BHTT = product("bhtn,bhsn->bhts", q_BHTN, k_BHTN)
    score_BHQRQR = score_BHTT.reshape(batch, n_heads, length, rank, length, rank) * weight_BHQQ[:, :, :, None, :, None]
    y_BHTP = product("bhts,bhsp->bhtp", score_BHQRQR.reshape(score_BHTT.shape), x_BHTP)

    y_BHQRP = y_BHTP.reshape(batch, n_heads, length, rank, -1)
    since_BHQ = jnp.exp(exact_BHQ + rest_BHQ)
    before_BHQRP = since_BHQ[..., None, None] * product("bhtn,bhpn->bhtp", q_BHTN, h_BHPN).reshape(y_BHQRP.shape)
    h_BHPN = since_BHQ[:, :, -1, None, None] * h_BHPN
    if part.carried_BQ is not None:
        before_BHQRP = jnp.where(part.carried_BQ[:, None, :, None, None], before_BHQRP, 0)
        h_BHPN = jnp.where(part.carried_BQ[:, -1, None, None, None], h_BHPN, 0)
    y_BHQRP += before_BHQRP

    until_BHQ = jnp.where(within_BHQQ[:, :, -1], decay_BHQQ[:, :, -1] * part.kappa_BHQ, 0)
    weighted_BHQRP = part.x_BHQRP * until_BHQ[..., None, None]
    h_BHPN += product("bhsp,bhsn->bhpn", weighted_BHQRP.reshape(x_BHTP.shape), k_BHTN)
    return y_BHQRP, h_BHPN


def log_decay(log_a_BHQ, within_BQQ):
    """sum_{s <= t} log_a_s from the document's (or the chunk's) first token, as exact + rest.

    A sum that started earlier would let the gradient of one document reach another's log_a. Differences of plain
    float32 sums would lose the digits of a gentle decay after steep ones: as in `angle`, what lies on a grid adds up
    exactly.
    """
    steepest = -104.0  # exp of it is 0 in float32, so a steeper one decays no more
    step = 2.0 ** (math.ceil(math.log2(-steepest * log_a_BHQ.shape[-1])) - 24)
    dtype = log_a_BHQ.dtype
    if dtype != jnp.float64:
        log_a_BHQ = jnp.maximum(log_a_BHQ, steepest)
    exact_BHQ = jax.lax.stop_gradient(jnp.round(log_a_BHQ / step) * step)
    within_BQQ = within_BQQ.astype(dtype)
    return (
        jnp.einsum("bts,bhs->bht", within_BQQ, summand_BHQ, precision="highest")
        for summand_BHQ in (exact_BHQ, log_a_BHQ - exact_BHQ)
    )
