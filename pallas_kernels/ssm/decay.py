"""What backends compute in plain XLA before their kernels: documents, log decay inside chunks, states before splits."""

import math

import jax.numpy as jnp
from jax import lax

STEEPEST = -104.0  # exp of it is 0 in float32, so a steeper one decays no more


def documents(start_BL, tokens: int | None = None):
    """Return the document starts up to each token, int32: in the row, or in its chunk of `tokens`; None stays None."""
    if start_BL is None:
        return None
    starts_BCQ = start_BL.astype(jnp.int32).reshape(start_BL.shape[0], -1, tokens or start_BL.shape[1])
    return jnp.cumsum(starts_BCQ, axis=2).reshape(start_BL.shape)


def documents_in_chunks(document_BL, tokens: int):
    """Return the document starts in its chunk of `tokens` up to each token, from those in its row; None stays None."""
    if document_BL is None:
        return None
    document_BCQ = document_BL.reshape(document_BL.shape[0], -1, tokens)
    before_BC = jnp.pad(document_BCQ[:, :-1, -1], ((0, 0), (1, 0)))
    return (document_BCQ - before_BC[..., None]).reshape(document_BL.shape)


def log_decay(log_a_BHL, start_BL, tokens: int):
    """Return c_t = sum_{s <= t} log_a_s from the first token of a chunk, or of its document in it, as exact + rest.

    Differences of plain float32 sums would lose the digits of a gentle decay after steep ones: what lies on a grid adds
    up exactly. A sum that started earlier would let the gradient of one document reach another's log_a.

    Args:
        start_BL: bool, true at the first token of a document; None: one document.
        tokens: of a chunk; L is a multiple.
    """
    batch, n_heads, length = log_a_BHL.shape
    within_EQQ = jnp.tril(jnp.ones((tokens, tokens), bool))[None]
    if start_BL is not None:
        document_EQ = documents(start_BL, tokens).reshape(-1, tokens)
        within_EQQ = within_EQQ & (document_EQ[:, :, None] == document_EQ[:, None, :])
    log_a_BCHQ = jnp.swapaxes(log_a_BHL.reshape(batch, n_heads, -1, tokens), 1, 2)
    log_a_EHQ = jnp.maximum(log_a_BCHQ.reshape(-1, n_heads, tokens), STEEPEST)
    step = 2.0 ** (math.ceil(math.log2(-STEEPEST * tokens)) - 24)
    exact_EHQ = lax.stop_gradient(jnp.round(log_a_EHQ / step) * step)

    def summed(part_EHQ):
        sum_EHQ = jnp.einsum("ets,ehs->eht", within_EQQ.astype(jnp.float32), part_EHQ, precision="highest")
        return jnp.swapaxes(sum_EHQ.reshape(log_a_BCHQ.shape), 1, 2).reshape(batch, n_heads, length)

    return summed(exact_EHQ), summed(log_a_EHQ - exact_EHQ)


def combine_splits(first_BHPN, decay_BHZ, added_BHZPN):
    """Solves h_z = decay_z h_{z-1} + added_z: returns the states before every split, and the one after the last."""
    decay_BHZ = jnp.pad(decay_BHZ, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)
    states_BHZPN = jnp.concatenate([first_BHPN[:, :, None], added_BHZPN], axis=2)

    def compose(first, second):
        return first[0] * second[0], second[0][..., None, None] * first[1] + second[1]

    _, states_BHZPN = lax.associative_scan(compose, (decay_BHZ, states_BHZPN), axis=2)
    return states_BHZPN[:, :, :-1], states_BHZPN[:, :, -1]
