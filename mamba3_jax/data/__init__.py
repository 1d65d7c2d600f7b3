"""Tokens in rows: sources, tokenizers, packing, and an iterator whose position can be saved."""

from mamba3_jax.data.batch import Batch
from mamba3_jax.data.pipeline import Loader, loader
from mamba3_jax.data.vocabulary import tokenizer

__all__ = ["Batch", "Loader", "loader", "tokenizer"]
