"""Drawing the next token: temperature, top-k and top-p, without sorting the vocabulary."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.config import TINY, in_float32


class Sampling(NamedTuple):
    """How the next token is drawn: softmax(logits / temperature) over the top_k, of those the top_p."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # the fewest likeliest tokens that hold this much of the probability (after top_k)

    def check(self) -> None:
        """ValueError for a value that means nothing."""
        if not in_float32(self.temperature, "[0, inf)"):
            raise ValueError(f"temperature={self.temperature} is not a float32 number from 0 up")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; 0 keeps all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]")


def draw(key, logits_BV, sampling: Sampling):
    """Return a token a row. Row b draws from its own stream, so it does not depend on the rows beside it."""
    if not sampling.temperature:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # Less the maximum, so that a temperature near 0 gives -inf and not inf - inf.
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
    """Return what `jax.lax.top_k` does, the `count` largest of a row and their ids, of equals the first.

    A block that holds one of the largest has one of the `count` largest maxima, so only that many blocks are sorted.
    """
    batch, vocab = logits_BV.shape
    width = max(1, math.isqrt(vocab // count))  # W: makes about as many blocks as it leaves tokens in `count` of them
    blocks = -(-vocab // width)
    if 4 * (blocks + count * width) > vocab:  # hardly fewer numbers to sort
        return jax.lax.top_k(logits_BV, count)
    # The padding stands last: real tokens come before it wherever it could be reached.
    padding = ((0, 0), (0, blocks * width - vocab))
    blocks_BCW = jnp.pad(logits_BV, padding, constant_values=-jnp.inf).reshape(batch, blocks, width)
    _, chosen_BK = jax.lax.top_k(jnp.max(blocks_BCW, axis=-1), count)
    chosen_BK = jnp.sort(chosen_BK, axis=-1)  # so that the first of equals is still the first
    chosen_BKW = jnp.take_along_axis(blocks_BCW, chosen_BK[..., None], axis=1)
    logits_BK, place_BK = jax.lax.top_k(chosen_BKW.reshape(batch, -1), count)
    block_BK = jnp.take_along_axis(chosen_BK, place_BK // width, axis=1)
    return logits_BK, block_BK * width + place_BK % width


def best_of_likeliest(logits_BV, scores_BV, top_p: float):
    """Return the argmax of `scores` over the fewest likeliest tokens that hold `top_p` of the probability.

    Those are the tokens i with sum(p_j, j before i) < top_p, and the likeliest; j is before i where its logit is larger
    or, of equals, its id smaller. Nothing is sorted. The best of all is it where little enough is before it. Where not,
    neither it nor what comes after it is among them, so the best of what is before it is looked at next: a few passes.

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
    # Not 0, which would leave nothing of a tiny top_p: nothing is before the likeliest, and anything else has 1 before.
    most_B = jnp.maximum(np.float32(top_p) * jnp.sum(p_BV, axis=-1), TINY)

    def look(best_B):
        """Return whether the best is too far down, and the best of what is before it."""
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
