"""Tokens in rows: sources, tokenizers, packing, and an iterator whose position can be saved."""

import importlib

from mamba3_jax.data.batch import Batch

__all__ = ["Batch", "Loader", "documents", "loader", "tokenizer"]

# Imported when first used: code that takes batches alone needs neither Grain, TensorFlow Datasets nor tokenizers.
LAZY = {
    "Loader": "mamba3_jax.data.pipeline",
    "documents": "mamba3_jax.data.pipeline",
    "loader": "mamba3_jax.data.pipeline",
    "tokenizer": "mamba3_jax.data.vocabulary",
}


def __getattr__(name):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY[name]), name)
