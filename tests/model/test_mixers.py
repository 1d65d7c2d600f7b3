"""A mixer is one file and one line of `MIXERS`: one that is defined here does all that a model does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mamba3_jax import convert
from mamba3_jax.config import ModelConfig
from mamba3_jax.evaluate import tasks
from mamba3_jax.generate import Sampling, generate
from mamba3_jax.load import load
from mamba3_jax.mixers import MIXERS, Mixer, letters
from mamba3_jax.model import mixer_names
from mamba3_jax.nn.initial import linear
from mamba3_jax.train.fit import validate
from mamba3_jax.train.flops import flops_per_token
from mamba3_jax.train.loop import Trainer
from tests.train.tiny import get_config


class Leaky(Mixer):
    """h_t = h_{t-1} / 2 + W x_t, y_t = h_t."""

    letter = "L"
    matrices = ("kernel",)

    @nn.compact
    def __call__(self, x_BLD, state=None, start_BL=None):
        width, batch = self.config.d_model, x_BLD.shape[0]
        kernel = nn.with_logical_partitioning(linear(width), ("embed", "mixed"))
        in_BLD = x_BLD @ self.param("kernel", kernel, (width, width))
        start_BL = jnp.zeros(x_BLD.shape[:2], bool) if start_BL is None else start_BL

        def step(h_BD, token):
            x_BD, start_B = token
            h_BD = jnp.where(start_B[:, None], 0, h_BD / 2) + x_BD
            return h_BD, h_BD

        state = self.empty_state(self.config, batch, 0) if state is None else state
        h_BD, y_LBD = jax.lax.scan(step, state, (jnp.swapaxes(in_BLD, 0, 1), start_BL.T))
        return jnp.swapaxes(y_LBD, 0, 1), h_BD

    @staticmethod
    def check(config: ModelConfig) -> None:
        if config.d_model % 4:
            raise ValueError(f"{config.d_model=} is not a multiple of 4")

    @staticmethod
    def empty_state(config: ModelConfig, batch: int, capacity: int):
        return jnp.zeros((batch, config.d_model))

    @staticmethod
    def state_flops(config: ModelConfig, length: int) -> float:
        return 2 * config.d_model


@pytest.fixture
def leaky(monkeypatch):
    """Registers the mixer and gives a run of it beside attention."""
    monkeypatch.setitem(MIXERS, "leaky", Leaky)
    config = get_config()
    config.model.pattern, config.model.attn_head_dim = ("leaky", "attention"), 8
    config.train.steps, config.train.eval_every = 2, 0
    return config


@pytest.mark.full
def test_a_new_mixer_trains_resumes_evaluates_and_decodes(leaky, tmp_path):
    with Trainer(leaky, tmp_path, report=lambda line: None) as trainer:
        trainer.run()
    leaky.train.steps, lines = 4, []
    with Trainer(leaky, tmp_path, report=lines.append) as trainer:
        trainer.run()
    assert "resuming after step 2" in lines

    model, params = load(tmp_path)
    assert params["segment_0"]["block_0"]["mixer"]["kernel"].shape == (1, 16, 16)
    (row,) = tasks.evaluate(model, params, leaky.data, lengths=[8], max_tokens=64)
    assert 0 <= row["accuracy"] <= 1

    prompt = [0, 1, 1, 0, 1]
    (drawn,) = generate(model, params, [prompt], tokens=4, sampling=Sampling(temperature=0)).ids
    logits_BLV, _ = model.apply({"params": params}, np.array([prompt + drawn]))
    assert drawn == jnp.argmax(logits_BLV[0, 4:-1, :2], axis=-1).tolist()


def test_a_new_mixer_has_a_letter_sizes_and_flops(leaky):
    assert mixer_names("LA") == list(leaky.model.pattern)
    alone = ModelConfig(vocab_size=8, d_model=16, pattern="L")
    assert flops_per_token(alone, 32) == 3 * (2 * (16 * 16 + 8 * 16) + 2 * 16)
    leaky.model.d_model = 18
    leaky.model.attn_head_dim = 6
    with pytest.raises(ValueError, match=r"config\.d_model=18 is not a multiple of 4"):
        validate(leaky)


def test_a_mixer_without_official_layers_is_refused_by_name(leaky, tmp_path):
    with pytest.raises(ValueError, match="layers of mixer 'leaky' have no official counterpart; only those of"):
        convert.write(tmp_path, leaky.model, {})
    assert not list(tmp_path.iterdir())


def test_a_letter_is_of_one_mixer():
    assert len(letters()) == len(MIXERS)
    assert set(letters().values()) == set(MIXERS)
