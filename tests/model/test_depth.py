"""The program of a model does not grow with its depth: layers are scanned, decoding too."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel, boxed_shapes

TINY = ModelConfig(vocab_size=16, d_model=8, d_state=4, head_dim=8, attn_heads=1, attn_head_dim=4, d_ff=8, chunk=4)

CONSTANT = 1.01  # "2" and "48" have not the same number of digits


def program_size(pattern, unroll=1):
    """Characters of the lowered gradient, and of the lowered decode step."""
    config = dataclasses.replace(TINY, pattern=pattern, unroll=unroll)
    model = LanguageModel(config)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), boxed_shapes(config))
    state = jax.eval_shape(lambda: model.empty_state(1, 8))

    def loss(params, tokens_BL):
        return jnp.sum(model.apply({"params": params}, tokens_BL)[0])

    def decode(params, tokens_BL, state):
        return model.apply({"params": params}, tokens_BL, state)

    ids = {length: jax.ShapeDtypeStruct((1, length), jnp.int32) for length in (1, 8)}
    train = jax.jit(jax.grad(loss)).lower(params, ids[8])
    step = jax.jit(decode).lower(params, ids[1], state)
    return len(train.as_text()), len(step.as_text())


@pytest.mark.full
@pytest.mark.parametrize("patterns", [["M" * 2, "M" * 8, "M" * 24, "M" * 48], ["MMA" * 2, "MMA" * 8, "MMA" * 16]])
def test_program_size_does_not_grow_with_depth(patterns):
    sizes = [program_size(pattern) for pattern in patterns]
    for smallest, largest in zip(map(min, zip(*sizes)), map(max, zip(*sizes))):  # noqa: B905
        assert largest < CONSTANT * smallest, sizes


def test_layers_that_are_not_scanned_are_caught():
    scanned, _ = program_size("M" * 4)
    unrolled, _ = program_size("M" * 4, unroll=4)
    assert unrolled > CONSTANT * scanned
