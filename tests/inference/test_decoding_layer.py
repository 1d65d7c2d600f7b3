"""Layers of a decoding step in five kernels: today's step to a rounding, lowered for CUDA, and only where they run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from mamba3_jax import decoding, decoding_layer
from mamba3_jax.config import ModelConfig
from mamba3_jax.decoding_layer import RULES, Layer
from mamba3_jax.model import LanguageModel, init_params
from mamba3_jax.presets import PRESETS
from pallas_kernels.ssm import mosaic_gpu
from tests.helpers import rel_rms
from tests.inference.test_decoding import to_numpy
from tests.pallas_kernels.family import GPU

SMALL = ModelConfig(
    vocab_size=301,
    pad_vocab_to=16,
    d_model=48,
    d_ff=80,
    pattern="M",
    d_state=16,
    head_dim=24,
    attn_head_dim=16,
    compute_dtype="bfloat16",
)
CONFIGS = {
    "siso": {"pattern": "MM", "out_norm": True},
    "mimo": {"mimo_rank": 2, "bc_bias": "b", "tie_embeddings": False, "discretization": "midpoint"},
    "hybrid": {
        "pattern": "MAM",
        "bc_bias": "none",
        "pairing": "half",
        "rope_fraction": 1.0,
        "discretization": "exponential_euler",
    },
}
TOLERANCE = 2**-8  # as of `LanguageModel`'s (test_decoding.py): one rounding of bfloat16


@functools.cache
def params_of(config_name: str, pattern: str | None = None):
    config = dataclasses.replace(SMALL, **CONFIGS[config_name] | ({"pattern": pattern} if pattern else {}))
    params, random = to_numpy(init_params(config, jax.random.key(0))), np.random.default_rng(1)
    # Away from the initial 0 and 1, so that all count.
    away = lambda x: jnp.asarray(x + np.float32(0.1) * random.standard_normal(x.shape, np.float32))  # noqa: E731
    return config, jax.tree.map(away, params)


def some_state(config: ModelConfig, batch: int):
    """A state as one that some tokens left: random numbers, and places in the caches."""
    state, random = LanguageModel(config, stacked=False).empty_state(batch, 8), np.random.default_rng(2)
    draw = lambda x: random.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
    return jax.tree.map(lambda x: np.full_like(x, 3) if x.dtype == np.int32 else draw(x), to_numpy(state))


def check_step(config: ModelConfig, params, batch: int):
    """The arranged layers' logits and state are those of `step` as it is anywhere; a planted error is seen."""
    token_B, start_B, state = jnp.arange(batch) * 7, jnp.arange(batch) == 1, some_state(config, batch)
    prepared = decoding.prepare(config, params)
    want = jax.jit(functools.partial(decoding.step, config))(prepared, token_B, state, start_B)
    run = jax.jit(functools.partial(decoding.step, config, interpret=True))
    arranged = jax.jit(functools.partial(decoding.arranged, config))

    def errors(prepared):
        got = run(arranged(prepared), token_B, state, start_B)
        return [rel_rms(*pair) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]

    assert max(errors(prepared)) < TOLERANCE
    wrong = jax.tree_util.tree_map_with_path(lambda path, x: 1.02 * x if path[-1].key == "in_zx" else x, prepared)
    assert max(errors(wrong)) > TOLERANCE, "a planted error is seen"


def test_one_layer_and_row_are_todays():
    check_step(*params_of("siso", "M"), batch=1)


@pytest.mark.full
@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_todays(name, batch):
    check_step(*params_of(name), batch=batch)


@pytest.fixture
def hopper():
    """A Hopper GPU that programs are for."""
    with use_abstract_mesh(GPU):
        yield


def is_arranged(config: ModelConfig, params) -> bool:
    prepared = jax.eval_shape(functools.partial(decoding.prepare, config), params)
    block = prepared["segment_0"]["repeat_0"]["block_0"]
    return isinstance(block, Layer)


def test_layers_are_arranged_where_they_run(monkeypatch):
    monkeypatch.setattr(decoding_layer, "refused", lambda config: None)
    config, params = params_of("hybrid")
    prepared = jax.eval_shape(functools.partial(decoding.prepare, config), params)
    units = [unit for name in prepared if name.startswith("segment") for unit in prepared[name].values()]
    kinds = [type(block) for unit in units for block in unit.values()]
    assert kinds.count(Layer) == 2
    assert kinds.count(dict) == 1  # attention stays a `Block`
    layer = next(block for unit in units for block in unit.values() if isinstance(block, Layer))
    assert layer.in_MD.dtype == layer.back_DF.dtype == jnp.bfloat16
    assert layer.dt_bias_H.dtype == layer.norm1_D.dtype == layer.q_norm_N.dtype == jnp.float32
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params)), "the public tree is as it was"
    plain = jax.eval_shape(functools.partial(decoding.prepare, config, fused=False), params)
    assert not any(map(decoding.is_arranged, jax.tree.leaves(plain, is_leaf=decoding.is_arranged)))


def test_not_on_another_device():
    if jax.default_backend() == "cpu":
        assert decoding_layer.refused(SMALL) == "wants a GPU, not cpu"
        assert not is_arranged(*params_of("siso"))


def test_not_on_another_gpu(hopper, monkeypatch):
    assert decoding_layer.refused(SMALL) is None
    monkeypatch.setattr(mosaic_gpu, "available", lambda: "needs a Hopper GPU")
    assert decoding_layer.refused(SMALL) == "needs a Hopper GPU"
    assert not is_arranged(*params_of("siso"))


def test_not_over_a_mesh():
    with use_abstract_mesh(AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=GPU.abstract_device)):
        assert decoding_layer.refused(SMALL) == "wants one device, not several"
        assert not is_arranged(*params_of("siso"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"norm": "layer"}, "wants norm in"),
        ({"residual_in_fp32": False}, "wants residual_in_fp32 in"),
        ({"angles": "rope"}, "wants angles in"),
        ({"angles": "quaternion"}, "wants angles in"),
        ({"bc_norm": False}, "wants bc_norm in"),
        ({"conv": 4}, "wants conv in"),
        ({"a_form": "softplus"}, "wants a_form in"),
        ({"discretization": "zero_order_hold"}, "wants discretization in"),
        ({"compute_dtype": "float32"}, "wants compute_dtype in"),
        ({"implementation": "triton"}, "wants implementation in"),
        ({"d_ff": 0}, "wants a feed-forward, not d_ff=0"),
        ({"mimo_rank": 8}, "wants a rank of 1, 2 or 4"),
        ({"head_dim": 96}, "P up to 64"),
        ({"d_state": 256}, "d_state up to 128"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_takes_todays_path(hopper, changes, why):
    assert why in decoding_layer.refused(dataclasses.replace(SMALL, **changes))


def lowered(config: ModelConfig, batch: int) -> str:
    """The program of one step for CUDA, of shapes alone."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    prepared = jax.eval_shape(lambda params: decoding.arranged(config, decoding.prepare(config, params)), params)
    state = jax.eval_shape(lambda: LanguageModel(config, stacked=False).empty_state(batch, 1))
    token_B, start_B = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch,), bool)
    with use_abstract_mesh(GPU):
        traced = jax.jit(functools.partial(decoding.step, config)).trace(prepared, token_B, state, start_B)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("model", "batch", "products"),
    [
        ("siso-180m", 8, 4),
        pytest.param("siso-180m", 1, 4, marks=pytest.mark.full),
        pytest.param("siso-180m", 128, 2, marks=pytest.mark.full),
        pytest.param("mimo-180m", 1, 4, marks=pytest.mark.full),
        pytest.param("siso-1.5b", 8, 4, marks=pytest.mark.full),
    ],
)
def test_lowers_for_cuda(model, batch, products):
    text = lowered(dataclasses.replace(PRESETS[model], pattern="M", vocab_size=64), batch)
    assert [f"rows_{name}" in text for name in ("in", "gate", "out", "back")].count(True) == products
    assert "mosaic_gpu" in text


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_lowers_for_cuda(rule):
    assert "rows_in" in lowered(dataclasses.replace(SMALL, discretization=rule), 1)
