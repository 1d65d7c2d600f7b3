"""The short causal convolution before a recurrence, its window carried from piece to piece."""

import functools

import jax
import jax.numpy as jnp

from mamba3_jax.ops import context as contexts
from mamba3_jax.ops.context import Context


def convolve(x, weights, bias, before, start_BL, context: Context | None = None):
    """y_t = silu(bias + sum_{j<K} weights[K-1-j] x_{t-j}) over the tokens of t's own document, channel by channel.

    Args:
        x: (B, L, ...).
        weights: (..., K); the last one is that of the token itself.
        bias: (...), or 0.
        before: (B, K-1, ...), the K-1 tokens before the row, 0 where a token belongs to an earlier document.
        start_BL: true at the first token of a document, or None.
        context: how the tokens lie over the mesh; None: rows are whole. Each run sends its last K-1 tokens to the next.

    Returns:
        y in x's dtype (sums are float32), and `before` for the tokens after the row.

    Raises:
        ValueError: runs of fewer than K-1 tokens.
    """
    if context is None:
        return _convolve(x, weights, bias, before, start_BL)
    function, split = functools.partial(_over_runs, context), (True, False, False, False, True)
    return contexts.over(context, function, (x, weights, bias, before, start_BL), split, (True, False))


def _over_runs(context: Context, x, weights, bias, before, start_BL):
    """Compute `convolve` of this device's tokens."""
    x, start_BL = contexts.fold(context, (x, start_BL))
    if x.shape[1] < before.shape[1]:
        raise ValueError(
            f"runs of {x.shape[1]} tokens are less than the {before.shape[1]} before that a convolution sees"
        )
    ends = jnp.zeros((x.shape[0], *before.shape[1:]), before.dtype)
    ends = _last(*_seen(x, ends, start_BL), ends.shape[1])
    befores = contexts.shifted(contexts.apart(context, ends), before, context)
    y, after = _convolve(x, weights, bias, jnp.concatenate(befores), start_BL)
    last = contexts.apart(context, after)[-1]
    return contexts.unfold(context, y), contexts.from_one(context.ends(), last, context.axis)


def _convolve(x, weights, bias, before, start_BL):
    """Compute `convolve` of whole rows."""
    window = before.shape[1]
    seen, documents_BL = _seen(x, before, start_BL)
    total = bias
    for tap in range(window + 1):
        total += _same(seen, documents_BL, tap, documents_BL[:, window:]).astype(jnp.float32) * weights[..., tap]
    return jax.nn.silu(total).astype(x.dtype), _last(seen, documents_BL, window)


def _seen(x, before, start_BL):
    """Return `before` and the tokens as one array, and the number of each one's document; 0: the one that goes on."""
    start_BL = jnp.zeros(x.shape[:2], bool) if start_BL is None else start_BL
    document_BL = jnp.cumsum(start_BL, axis=1, dtype=jnp.int32)
    return jnp.concatenate([before, x], axis=1), jnp.pad(document_BL, ((0, 0), (before.shape[1], 0)))


def _same(seen, documents_BL, first: int, of_BL):
    """Return the tokens of `seen` from place `first` on, one for each of `of_BL`, 0 where its document is another."""
    part, its_BL = (array[:, first : first + of_BL.shape[1]] for array in (seen, documents_BL))
    return jnp.where(_wide(its_BL == of_BL, part), part, 0)


def _last(seen, documents_BL, window: int):
    """Return the last `window` tokens, 0 where one is not of the last document: what the next tokens see."""
    last_BW = jnp.broadcast_to(documents_BL[:, -1:], (seen.shape[0], window))
    return _same(seen, documents_BL, seen.shape[1] - window, last_BW)


def _wide(mask_BL, x):
    return mask_BL.reshape(*mask_BL.shape, *[1] * (x.ndim - 2))
