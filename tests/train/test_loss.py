"""What is reported of a batch's sums."""

import math

import jax.numpy as jnp
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.ops.cross_entropy import Sums
from mamba3_jax.train.loss import bits_per_byte, means


def test_means():
    got = means(Sums(*map(jnp.float32, (6.0, 0.0, 1.0, 4.0))))
    assert (float(got["loss"]), float(got["accuracy"])) == (1.5, 0.25)
    assert float(means(Sums(*map(jnp.float32, (0, 0, 0, 0))))["loss"]) == 0


def test_bits_per_byte_where_tokens_are_bytes():
    assert bits_per_byte(math.log(256), DataConfig()) == pytest.approx(8)
    assert bits_per_byte(1.0, DataConfig(source="parity")) is None
    assert bits_per_byte(1.0, DataConfig(tokenizer="tokenizer.json")) is None
