"""Next-token cross entropy, as sums: batches of unequal weight add up exactly."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.config import DataConfig
from mamba3_jax.data.batch import Batch


class Sums(NamedTuple):
    """Weighted sums over tokens, float32 scalars. Divide by `weight` for means."""

    nll: jax.Array  # -log p(target), nats
    z: jax.Array  # (log sum exp of the logits)^2
    correct: jax.Array  # the likeliest id is the target
    weight: jax.Array


def target_logits(logits_BLV, targets_BL, vocab_size: int):
    """Pick each target's logit; NaN where a target is not in [0, vocab_size), the same as a token's own rule."""
    # Alone, the look-up would let negative ids count from the end, and those that pad the vocabulary pass.
    known_BL = (targets_BL >= 0) & (targets_BL < vocab_size)
    target_BL = jnp.take_along_axis(logits_BLV, jnp.where(known_BL, targets_BL, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(known_BL, target_BL, jnp.nan)


def sums(logits_BLV, batch: Batch, vocab_size: int) -> Sums:
    """nll = sum_t w_t (log Z_t - logit_t[target_t]),  log Z = log sum_v exp(logit[v]),  in float32.

    v runs over the whole padded vocabulary, as in the official code: the padding columns are ids that never occur, and
    the model learns so. A target that is not in [0, vocab_size) makes nll NaN, unless its weight is 0.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = target_logits(logits_BLV, batch.targets_BL, vocab_size)
    correct_BL = jnp.argmax(logits_BLV, axis=-1) == batch.targets_BL
    weights_BL = batch.weights_BL

    def total(x_BL):
        # A token without weight does not count whatever its logits: 0 * nan would.
        return jnp.sum(jnp.where(weights_BL == 0, 0.0, weights_BL * x_BL))

    return Sums(total(log_z_BL - target_BL), total(log_z_BL**2), total(correct_BL), jnp.sum(weights_BL))


def objective(parts: Sums, z_loss: float):
    """Return what is minimised, times the weight: nll + z_loss * z. The second term keeps log Z near 0."""
    return parts.nll + z_loss * parts.z


def means(parts: Sums) -> dict:
    """loss (nats a token) and accuracy; a batch without weight has loss 0."""
    weight = jnp.where(parts.weight > 0, parts.weight, 1)
    return {"loss": parts.nll / weight, "accuracy": parts.correct / weight}


def bits_per_byte(loss: float, config: DataConfig) -> float | None:
    """Nats a token in bits a byte where a token is a byte of text, else None."""
    of_bytes = config.tokenizer == "bytes" and config.source in ("text", "tfds")
    return loss / math.log(2) if of_bytes else None
