"""Initial values are those of SPEC section 10: bounds, spread and mean of every parameter of a wide layer."""

import dataclasses

import jax
import numpy as np
import pytest

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import init_params
from tests.helpers import first

D_MODEL, D_FF, LAYERS, HEADS = 128, 96, 3, 16
CONFIG = ModelConfig(
    vocab_size=500,
    d_model=D_MODEL,
    pattern="MMA",
    d_ff=D_FF,
    tie_embeddings=False,
    d_state=32,
    head_dim=16,
    mimo_rank=4,
    out_norm=True,
    attn_heads=8,
    attn_head_dim=16,
    attn_bias=True,
)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def is_uniform(array, bound, tolerance=0.03):
    """Within the bound, reaching it, centred, and as spread as U(-bound, bound)."""
    array = np.asarray(array, np.float64)
    reached = 0.97 * bound < np.abs(array).max() <= bound * (1 + 1e-6)
    spread = abs(array.std() / (bound / np.sqrt(3)) - 1) < tolerance
    return reached and spread and abs(array.mean()) < tolerance * bound


@pytest.mark.full
def test_projections_are_uniform_and_those_into_the_residual_are_rescaled(params):
    mamba = params["segment_0"]["block_0"]
    attention = params["segment_1"]["block_0"]
    into = 1 / np.sqrt(D_MODEL)
    for name in ("in_zx", "in_dt_a_trap", "in_kq_angle"):
        assert is_uniform(mamba["mixer"][name], into), name
    for name in ("q", "k", "v"):
        assert is_uniform(attention["mixer"][name], into), name
    assert is_uniform(mamba["mlp"]["value"], into)
    assert is_uniform(mamba["mlp"]["gate"], into)
    assert is_uniform(params["head"]["kernel"], into)
    rescale = 1 / np.sqrt(LAYERS)
    assert is_uniform(mamba["mixer"]["out"], rescale / np.sqrt(2 * D_MODEL))
    assert is_uniform(mamba["mlp"]["out"], rescale / np.sqrt(D_FF))
    assert is_uniform(attention["mixer"]["out"], rescale / np.sqrt(D_MODEL))
    assert not is_uniform(mamba["mixer"]["out"], 1 / np.sqrt(2 * D_MODEL))  # without the rescale it would be seen


def test_the_layers_of_a_scan_differ(params):
    for array in params["segment_0"]["block_0"]["mixer"]["in_zx"], params["segment_0"]["block_0"]["mlp"]["out"]:
        assert np.abs(np.asarray(array[0] - array[1])).max() > 0


def test_embedding_is_normal(params):
    table = np.asarray(params["embedding"]["embedding"], np.float64)
    assert table.shape == (504, D_MODEL)
    assert abs(table.std() / 0.02 - 1) < 0.02
    assert abs(np.mean(np.abs(table) < 0.02) - 0.6827) < 0.01


def test_constants(params):
    mixer = params["segment_0"]["block_0"]["mixer"]
    for name in ("k_bias", "q_bias", "k_norm", "q_norm", "skip", "gate_rank", "norm"):
        assert (np.asarray(mixer[name]) == 1).all(), name
    assert (np.asarray(mixer["v_rank"]) == 1 / 4).all()
    assert (np.asarray(mixer["out_rank"]) == 1 / 4).all()
    attention = params["segment_1"]["block_0"]["mixer"]
    for name in ("q_bias", "k_bias", "v_bias", "out_bias"):
        assert (np.asarray(attention[name]) == 0).all(), name
    assert all(array.dtype == np.float32 for array in jax.tree.leaves(params))


def test_dt_is_log_uniform():
    from mamba3_jax.nn.initial import inverse_softplus_dt

    bias = np.asarray(inverse_softplus_dt(1e-3, 0.1, 1e-4)(jax.random.key(0), (4096,)), np.float64)
    log_dt = np.log(np.log1p(np.exp(bias)))
    low, high = np.log(1e-3), np.log(0.1)
    assert low - 1e-3 < log_dt.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < log_dt.max() < high + 1e-3
    assert abs(np.quantile(log_dt, [0.25, 0.5, 0.75]) - np.linspace(low, high, 5)[1:4]).max() < 0.1
    floored = np.asarray(inverse_softplus_dt(1e-6, 1e-5, 1e-4)(jax.random.key(0), (8,)), np.float64)
    np.testing.assert_allclose(np.log1p(np.exp(floored)), 1e-4, rtol=1e-3)


BIASES = {"c": {"q_bias"}, "none": set(), "b": {"k_bias"}, "both": {"k_bias", "q_bias"}}


@pytest.mark.parametrize("bc_bias", first(BIASES))
def test_biases_are_those_that_are_wanted_and_begin_as_they_should(bc_bias):
    config = dataclasses.replace(CONFIG, pattern="M", bc_bias=bc_bias, bc_bias_initial=-0.5)
    mixer = init_params(config, jax.random.key(0))["segment_0"]["block_0"]["mixer"]
    assert {"k_bias", "q_bias"} & mixer.keys() == BIASES[bc_bias]
    assert all((np.asarray(mixer[name]) == -0.5).all() for name in BIASES[bc_bias])


def test_a_seed_draws_what_it_has_always_drawn():
    """Recorded runs name a seed: another draw would be other models, by the same command."""
    config = ModelConfig(vocab_size=8, d_model=16, pattern="MM", d_state=8, head_dim=8)
    mixer = init_params(config, jax.random.key(0))["segment_0"]["block_0"]["mixer"]
    want = {
        "in_zx": (0.21948636, 0.2326613),
        "in_kq_angle": (0.01808757, -0.08454102),
        "in_dt_a_trap": (0.10659546, -0.06965357),
        "dt_bias": (-6.6557927, -4.484394),
        "out": (-0.03311667, 0.07158884),
    }
    for name, values in want.items():
        np.testing.assert_allclose(np.ravel(mixer[name])[:2], values, rtol=1e-5, err_msg=name)
