"""The short causal convolution before a recurrence, its window carried from piece to piece."""

import jax
import jax.numpy as jnp


def convolve(x, weights, bias, before, document_BL):
    """silu(bias + sum_j weights[j] x_{t-j}) over the tokens of t's own document, and what the next tokens see.

    A channel sees itself alone. Sums are float32, the result has x's dtype.

    Args:
        x: (B, L, ...).
        weights: (..., K), the token's own weight last.
        bias: (...), or 0.
        before: (B, K-1, ...), the tokens before the first.
        document_BL: a number that grows at each document's first token, 0 where the first document goes on; or None.
    """
    window, length = before.shape[1], x.shape[1]
    seen = jnp.concatenate([before, x], axis=1)

    def same(first, of_BL):
        """Take what is of a document from `seen[:, first:]`, and 0 for the rest."""
        part = seen[:, first : first + of_BL.shape[1]]
        return jnp.where(_wide(documents_BL[:, first : first + of_BL.shape[1]] == of_BL, part), part, 0)

    if document_BL is None:
        document_BL = jnp.zeros(x.shape[:2], jnp.int32)
    documents_BL = jnp.pad(document_BL, ((0, 0), (window, 0)))
    total = bias
    for tap in range(window + 1):
        total += same(tap, document_BL).astype(jnp.float32) * weights[..., tap]
    last_BW = jnp.broadcast_to(document_BL[:, -1:], (x.shape[0], window))
    return jax.nn.silu(total).astype(x.dtype), same(length, last_BW)


def _wide(mask_BL, x):
    return mask_BL.reshape(*mask_BL.shape, *[1] * (x.ndim - 2))
