"""Drawing the next token: temperature, top-k and top-p, without sorting the vocabulary."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.config import TINY, in_float32


class Sampling(NamedTuple):
    """How the next token is drawn: from softmax(logits / temperature) over the top_k tokens, and of these the top_p."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # the fewest likeliest tokens that hold this much of the probability (after top_k)

    def check(self) -> None:
        """Raise ValueError for a value out of its range."""
        if not in_float32(self.temperature, "[0, inf)"):
            raise ValueError(f"temperature={self.temperature} is not a float32 number from 0 up")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; 0 keeps all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]")


def draw(key, logits_BV, sampling: Sampling):
    """Draw one token for each row. Row b has a random stream of its own and does not depend on the other rows."""
    if not sampling.temperature:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # Subtract the maximum, so that a temperature near 0 gives -inf and not inf - inf.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / sampling.temperature
    ids_BV = None
    if sampling.top_k:
        logits_BV, ids_BV = largest(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(logits_BV.shape[0]))
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    # The argmax of logits and Gumbel noise over any set of tokens is a draw from their softmax.
    token_B = best_of_likeliest(logits_BV, noise_BV + logits_BV, sampling.top_p)
    if ids_BV is not None:
        token_B = jnp.take_along_axis(ids_BV, token_B[:, None], axis=1)[:, 0]
    return token_B.astype(jnp.int32)


def largest(logits_BV, count: int):
    """Return what `jax.lax.top_k` returns: the `count` largest logits of a row and their ids, the first of equal ones.

    A row is cut into blocks. Only a block whose maximum is among the `count` largest maxima can hold one of the largest
    logits, so only `count` blocks are sorted.
    """
    batch, vocab = logits_BV.shape
    width = max(1, math.isqrt(vocab // count))  # W: there are then about as many blocks as tokens in `count` of them
    blocks = -(-vocab // width)
    if 4 * (blocks + count * width) > vocab:  # blocks would leave hardly fewer numbers to sort
        return jax.lax.top_k(logits_BV, count)
    # The padding comes last, so that of equal logits, -inf, those of real tokens are found first.
    padding = ((0, 0), (0, blocks * width - vocab))
    blocks_BCW = jnp.pad(logits_BV, padding, constant_values=-jnp.inf).reshape(batch, blocks, width)
    _, chosen_BK = jax.lax.top_k(jnp.max(blocks_BCW, axis=-1), count)
    chosen_BK = jnp.sort(chosen_BK, axis=-1)  # so that the first of equal logits is still the first
    chosen_BKW = jnp.take_along_axis(blocks_BCW, chosen_BK[..., None], axis=1)
    logits_BK, place_BK = jax.lax.top_k(chosen_BKW.reshape(batch, -1), count)
    block_BK = jnp.take_along_axis(chosen_BK, place_BK // width, axis=1)
    return logits_BK, block_BK * width + place_BK % width


def best_of_likeliest(logits_BV, scores_BV, top_p: float):
    """Return the argmax of `scores` over the nucleus: the fewest likeliest tokens that hold `top_p` of the probability.

    Token j is before i if its logit is larger or, of equal logits, its id smaller. The nucleus is the likeliest token
    and every token i with sum(p_j, j before i) < top_p. Nothing is sorted: if the token with the best score is in the
    nucleus, it is the argmax. If not, no token after it is in the nucleus either, and the best of the tokens before it
    is tried next. This takes a few passes over the vocabulary.

    Args:
        logits_BV: at most 0; the largest of a row is 0.
        scores_BV: finite where the logit is.
        top_p: in (0, 1].
    """
    best_B = jnp.argmax(scores_BV, axis=-1)
    if top_p == 1:
        return best_B
    ids_V = jnp.arange(logits_BV.shape[-1])
    p_BV = jnp.exp(logits_BV)  # unnormalised
    # A tiny top_p must not round to 0, which would exclude the likeliest token: the sum before it is 0. The sum before
    # any other token is at least 1.
    most_B = jnp.maximum(np.float32(top_p) * jnp.sum(p_BV, axis=-1), TINY)

    def look(best_B):
        """Return whether the best token is outside the nucleus, and the best of the tokens before it."""
        best_B1 = best_B[:, None]
        logit_B1 = jnp.take_along_axis(logits_BV, best_B1, axis=1)
        before_BV = (logits_BV > logit_B1) | ((logits_BV == logit_B1) & (ids_V < best_B1))
        too_far_B = jnp.sum(jnp.where(before_BV, p_BV, 0), axis=-1) >= most_B  # False where a logit is NaN
        return too_far_B, jnp.argmax(jnp.where(before_BV, scores_BV, -jnp.inf), axis=-1)

    def descend(carry):
        best_B, too_far_B, next_B = carry
        best_B = jnp.where(too_far_B, next_B, best_B)
        return best_B, *look(best_B)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), descend, (best_B, *look(best_B)))[0]
