"""Matrix products inside chunks, and one state between them: the SSD form of Mamba-2 with Mamba-3's weights."""

import math

import jax
import jax.numpy as jnp

from mamba3_jax.ops.scan_chunks import Chunk, over_chunks
from mamba3_jax.ops.tuned import device
from mamba3_jax.ops.types import Heads, State, Tokens


def chunked(tokens: Tokens, heads: Heads, state: State | None, *, rotation: str, chunk: int | None = None):
    """y_t = sum_{s<t} exp(sum_{s<u<=t} log_a_u) kappa_s (q_t.k_s) x_s + gamma_t (q_t.k_t) x_t + exp(..) h_0 q_t.

    The sums over the tokens s of a chunk are matrix products; h_0 is the state before the chunk (SPEC section 6).
    """
    return over_chunks(_core, tokens, heads, state, rotation=rotation, chunk=chunk or _default(tokens.k_BLRGN.shape[2]))


def _default(rank: int) -> int:
    """Return the size measured as fastest (experiments/benchmarks): an accelerator wants fewer and larger products."""
    if device().platform == "cpu":
        return max(16, 64 // rank)
    return max(64, 128 // rank)


def _core(part: Chunk, h_BHPN):
    batch, n_heads, length, rank, _ = part.k_BHQRN.shape
    product_dtype = part.k_BHQRN.dtype

    def product(formula, a, b):
        a, b = a.astype(product_dtype), b.astype(product_dtype)
        return jnp.einsum(formula, a, b, precision="highest", preferred_element_type=h_BHPN.dtype)

    def by_row(array_BHQR):
        """Merge tokens and ranks into one axis: every rank of a query sees every rank of a key."""
        return array_BHQR.reshape(batch, n_heads, length * rank, -1)

    exact_BHQ, rest_BHQ = log_decay(part.log_a_BHQ, part.within_BQQ)
    k_BHTN, x_BHTP = by_row(part.k_BHQRN), by_row(part.x_BHQRP)
    targets = slice(length - 1, None) if part.q_BHQRN is None else slice(None)
    within_BHQQ = part.within_BQQ[:, None, targets]
    decay_BHQQ = _decay(exact_BHQ, rest_BHQ, within_BHQQ, targets)
    decay_from_start_BHQ = jnp.exp(exact_BHQ + rest_BHQ)

    # Masks select with `where`: a factor of 0 would let NaN through. So a NaN in the state before the chunk, or in the
    # token after it, does not reach what is masked.
    y_BHQRP = None
    if part.q_BHQRN is not None:
        weight_BHQQ = decay_BHQQ * part.gamma_BHQ[..., None, :]
        if part.kappa_BHQ is not None:
            own_QQ = jnp.eye(length, dtype=bool)
            weight_BHQQ = decay_BHQQ * jnp.where(own_QQ, part.gamma_BHQ[..., None, :], part.kappa_BHQ[..., None, :])
        weight_BHQQ = jnp.where(within_BHQQ, weight_BHQQ, 0)
        q_BHTN = by_row(part.q_BHQRN)
        score_BHTT = product("bhtn,bhsn->bhts", q_BHTN, k_BHTN)
        score_BHQRQR = score_BHTT.reshape(*weight_BHQQ.shape[:3], rank, length, rank)
        mixed_BHTT = (score_BHQRQR * weight_BHQQ[:, :, :, None, :, None]).reshape(score_BHTT.shape)
        y_BHQRP = product("bhts,bhsp->bhtp", mixed_BHTT, x_BHTP).reshape(part.x_BHQRP.shape)
        read_BHQRP = product("bhtn,bhpn->bhtp", q_BHTN, h_BHPN).reshape(y_BHQRP.shape)
        read_BHQRP = decay_from_start_BHQ[..., None, None] * read_BHQRP
        if part.carried_BQ is not None:
            read_BHQRP = jnp.where(part.carried_BQ[:, None, :, None, None], read_BHQRP, 0)
        y_BHQRP += read_BHQRP

    h_BHPN = decay_from_start_BHQ[:, :, -1, None, None] * h_BHPN
    if part.carried_BQ is not None:
        h_BHPN = jnp.where(part.carried_BQ[:, -1, None, None, None], h_BHPN, 0)
    decay_to_end_BHQ = jnp.where(within_BHQQ[:, :, -1], decay_BHQQ[:, :, -1] * part.later_BHQ, 0)
    weighted_BHQRP = part.x_BHQRP * decay_to_end_BHQ[..., None, None]
    h_BHPN += product("bhsp,bhsn->bhpn", by_row(weighted_BHQRP), k_BHTN)
    return y_BHQRP, h_BHPN


def _decay(exact_BHQ, rest_BHQ, within_BHQQ, targets: slice):
    """Return exp(c_t - c_s), c = exact + rest, from token s (last axis) to the tokens t of `targets`; 1 where masked.

    The mask comes before exp: for s after t the difference grows without bound.
    """
    parts = [part_BHQ[..., targets, None] - part_BHQ[..., None, :] for part_BHQ in (exact_BHQ, rest_BHQ)]
    return jnp.exp(jnp.where(within_BHQQ, parts[0] + parts[1], 0))


def log_decay(log_a_BHQ, within_BQQ):
    """Return c_t, the sum of log_a_s over s <= t from the first token of the document (or the chunk), as exact + rest.

    A sum that began earlier would let the gradient of one document reach another's log_a. Differences of plain float32
    sums would lose the digits of a gentle decay after steep ones: as in `angle`, multiples of a grid add up exactly.
    """
    steepest = -104.0  # exp(-104) is 0 in float32, so steeper steps decay no more than this
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
