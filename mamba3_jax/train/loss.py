"""The loss of a batch: what is minimised, and the means that are reported."""

import math

import jax
import jax.numpy as jnp

from mamba3_jax.config import Config, DataConfig
from mamba3_jax.data.batch import Batch
from mamba3_jax.model import LanguageModel, table_split
from mamba3_jax.ops.cross_entropy import Sums, linear_cross_entropy


def batch_loss(config: Config, params, batch: Batch) -> tuple[jax.Array, Sums]:
    """Return (objective, sums) of the next-token cross entropy, see `linear_cross_entropy`."""
    model = LanguageModel(config.model)
    x_BLD, head_DV, _ = model.apply({"params": params}, batch.tokens_BL, None, batch.start_BL, method="features")
    return linear_cross_entropy(
        x_BLD,
        head_DV,
        batch.targets_BL,
        batch.weights_BL,
        config.model.vocab_size,
        config.train.z_loss,
        split=table_split(),
    )


def means(parts: Sums) -> dict:
    """Return the mean loss (nats a token) and the accuracy; both are 0 without any weight."""
    weight = jnp.where(parts.weight > 0, parts.weight, 1)
    return {"loss": parts.nll / weight, "accuracy": parts.correct / weight}


def bits_per_byte(loss: float, config: DataConfig) -> float | None:
    """Return a loss in nats a token as bits a byte where a token is a byte of text; else None."""
    of_bytes = config.tokenizer == "bytes" and config.source in ("text", "tfds")
    return loss / math.log(2) if of_bytes else None
