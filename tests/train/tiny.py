"""The smallest run: an experiment file for the tests' processes, and what the tests share.

python -m launch.train --config=tests/train/tiny.py --workdir=DIR
"""

import jax
import numpy as np

from mamba3_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from mamba3_jax.data import Batch
from mamba3_jax.train.step import init_state


def get_config() -> Config:
    return Config(
        name="tiny",
        model=ModelConfig(vocab_size=2, d_model=16, pattern="M", d_state=8, head_dim=8),
        data=DataConfig(source="parity", length=32, batch=4, task_lengths=(16, 32), task_steps=(20, 40)),
        optimizer=OptimizerConfig(),
        train=TrainConfig(steps=60, log_every=1, eval_every=10, eval_batches=2, save_every=5),
    )


def random_params(config: Config, seed: int = 0) -> dict:
    """Parameters of the model's shapes without compiling its initialisers."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_state(config)).params
    return jax.tree.map(lambda shape: 0.3 * rng.standard_normal(shape.shape, np.float32), shapes)


def random_batch(config: Config, seed: int = 0) -> Batch:
    """Random tokens, unequal weights, some of them 0."""
    rng = np.random.default_rng(seed)
    shape, vocab = (config.data.batch, config.data.length), config.model.vocab_size
    weights_BL = rng.uniform(size=shape).astype(np.float32) * (rng.uniform(size=shape) < 0.7)
    start_BL = rng.uniform(size=shape) < 0.1
    start_BL[:, 0] = True
    tokens_BL, targets_BL = (rng.integers(0, vocab, shape, dtype=np.int32) for _ in range(2))
    return Batch(tokens_BL, targets_BL, weights_BL, start_BL)
