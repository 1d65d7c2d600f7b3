"""Models small enough to compile in seconds, with parameters large enough that every token matters."""

import functools

import jax

from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.model import LanguageModel, init_params


@functools.cache
def tiny(pattern: str = "MA", vocab_size: int = 13):
    """(model, params) whose next token depends on all before; 13 ids in an embedding of 16 rows."""
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=16,
        pattern=pattern,
        d_state=8,
        head_dim=8,
        attn_head_dim=8,
        rope_fraction=1.0,
        tie_embeddings=False,
        implementation="" if "A" in pattern else "recurrent",  # which compiles sooner
    )
    params = init_params(config, jax.random.key(0))
    params["embedding"]["embedding"] *= 10
    params["head"]["kernel"] *= 5
    return LanguageModel(config), params


def run_config(pattern: str = "M", **data) -> Config:
    """A `Config` around such a model with ids for bytes."""
    config = Config(model=tiny(pattern, 256)[0].config)
    config.data.length, config.data.batch = 32, 4
    for name, value in data.items():
        setattr(config.data, name, value)
    return config
