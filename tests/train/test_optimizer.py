"""Schedule at its landmarks, AdamW against its equations in numpy, which parameters decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamba3_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from mamba3_jax.sharding import make_mesh, param_shardings
from mamba3_jax.train.optimizer import OPTIMIZERS, decays, optimizer, schedule, validate
from mamba3_jax.train.step import init_state, state_shapes, train_step
from tests.helpers import first, rel_rms
from tests.train.test_step import fresh
from tests.train.tiny import get_config, random_batch, random_params

PEAK, STEPS = 2e-3, 1000


def rates(**options):
    """lr of every step, warm-up 10%, final 1%."""
    config = OptimizerConfig(learning_rate=PEAK, warmup=0.1, final=0.01, decay=0.2, **options)
    return np.asarray(schedule(config, STEPS)(np.arange(STEPS)), np.float64) / PEAK


@pytest.mark.parametrize(
    ("kind", "landmarks"),
    [
        ("cosine", {99: 1, 549: 0.505, 774: 0.01 + 0.99 * (1 - 0.5**0.5) / 2, 999: 0.01}),
        ("wsd", {99: 1, 500: 1, 799: 1, 899: 0.505, 999: 0.01}),
        ("constant", {99: 1, 500: 1, 999: 1}),
    ],
)
def test_schedule_landmarks(kind, landmarks):
    got = rates(schedule=kind)
    for step, want in {0: 0.01, 49: 0.5, **landmarks}.items():
        assert got[step] == pytest.approx(want, rel=2e-5), step
    assert np.all(np.diff(got[:100]) > 0)
    assert np.all(np.diff(got[100:]) <= 1e-7)
    # One part in a thousand is told apart: a schedule that ends or peaks a step early is.
    assert got[98] != pytest.approx(1, rel=2e-5)


def test_schedule_without_warmup_starts_at_the_peak():
    config = OptimizerConfig(learning_rate=PEAK, warmup=0, schedule="constant")
    assert float(schedule(config, 5)(0)) == pytest.approx(PEAK)


def numpy_adamw(params, grads_of, config, steps, decayed):
    """The published equations in float64, decoupled decay, clipping by global norm."""
    mean, square = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
    for t in range(steps):
        grads = grads_of(t)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        lr = float(schedule(config, steps)(t))
        for name, g in grads.items():
            g = g * min(1, config.clip / norm) if config.clip else g
            mean[name] = config.b1 * mean[name] + (1 - config.b1) * g
            square[name] = config.b2 * square[name] + (1 - config.b2) * g**2
            step = mean[name] / (1 - config.b1 ** (t + 1))
            step = step / (np.sqrt(square[name] / (1 - config.b2 ** (t + 1))) + config.eps)
            decay = config.weight_decay if name in decayed else 0
            params = params | {name: params[name] - lr * (step + decay * params[name])}
    return params


@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_updates_are_adamw(clip):
    config = OptimizerConfig(learning_rate=0.05, clip=clip)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(4) for name in ("out", "dt_bias")}
    grads = [{name: rng.standard_normal(4) for name in params} for _ in range(6)]

    tx = optimizer(Config(optimizer=config, train=TrainConfig(steps=6)))
    got = jax.tree.map(np.float32, params)
    state = tx.init(got)
    for step in grads:
        updates, state = tx.update(jax.tree.map(np.float32, step), state, got)
        got = jax.tree.map(lambda p, u: p + np.asarray(u), got, updates)

    def error(config):
        want = numpy_adamw(params, grads.__getitem__, config, 6, decayed={"out"})
        return max(rel_rms(got[name], want[name]) for name in params)

    assert error(config) < 1e-6
    wrong = OptimizerConfig(learning_rate=0.05 * 1.001, clip=clip)
    assert error(wrong) > 1e-5


def test_decay_mask():
    config = Config(model=ModelConfig(pattern="M2AG1", d_model=16, d_state=8, head_dim=8, attn_head_dim=8, d_ff=8))
    config.model.delta_head_dim = 8
    config.model.mimo_rank, config.model.out_norm, config.model.attn_bias, config.model.norm = 2, True, True, "layer"
    config.model.tie_embeddings, config.model.conv, config.model.a_form = False, 4, "learned"
    mask = jax.tree_util.tree_leaves_with_path(decays(random_params(config)))
    names = {flag: {path[-1].key for path, got in mask if got is flag} for flag in (True, False)}
    assert names[True] == {
        *("embedding", "kernel", "value", "gate", "out", "q", "k", "v"),
        *("in_zx", "in_dt_a_trap", "in_kq_angle", "v_rank", "gate_rank", "out_rank"),
        *("in_kq", "in_dt", "conv_x", "conv_kq"),
        *("in_qk", "in_zv", "in_ab", "conv_q", "conv_k", "conv_v"),
        "in_rkq",
    }
    assert names[False] == {
        *("scale", "bias", "q_bias", "k_bias", "v_bias", "out_bias"),
        *("dt_bias", "skip", "k_norm", "q_norm", "norm"),
        *("a_log", "conv_x_bias", "conv_kq_bias"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sgd"}, "name='sgd' is not one of adamw, muon"),
        ({"schedule": "linear"}, "schedule='linear' is not one of cosine, wsd, constant"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"schedule": "wsd", "decay": 0.95}, "decay=0.95"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"b2": 1.0}, "b2=1.0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        validate(OptimizerConfig(**options))


@pytest.mark.parametrize("name", first(["adamw", "muon"]))
def test_frozen_biases_keep_their_bits(name):
    """Through steps with weight decay and without clipping; every other parameter moves."""
    config = get_config()
    config.model.bc_bias_frozen = True
    config.optimizer.name, config.optimizer.weight_decay, config.optimizer.clip = name, 0.5, 0.0
    state = before = fresh(config)
    step = jax.jit(functools.partial(train_step, config))
    for seed in range(3):
        state, _ = step(state, random_batch(config, seed))
    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: np.any(a != b), state.params, before.params)
    ):
        assert moved == (path[-1].key not in ("k_bias", "q_bias")), path


def test_a_new_optimizer_may_keep_other_shapes_than_parameters_have(monkeypatch):
    """One whose moments are factored is a line of the table, as README says."""
    monkeypatch.setitem(OPTIMIZERS, "factored", lambda config: optax.scale_by_factored_rms(min_dim_size_to_factor=8))
    config = get_config()
    config.optimizer.name = "factored"
    validate(config.optimizer)
    mesh = make_mesh("fsdp:1")
    shapes = state_shapes(config, mesh)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, jax.eval_shape(lambda: init_state(config)))
    assert jax.tree.map(lambda x: x.sharding, shapes.params) == param_shardings(config.model, mesh)
    moments = {x.shape for x in jax.tree.leaves(shapes.opt_state)}
    assert moments - {x.shape for x in jax.tree.leaves(shapes.params)} > {(), (1,)}

    # One update compiles, and leaves all as it was where its gradient is not finite.
    state, batch = init_state(config), random_batch(config)
    once = jax.jit(functools.partial(train_step, config))
    after, metrics = once(state, batch)
    assert int(metrics["skipped"]) == 0
    assert jax.tree.map(jnp.shape, after.opt_state) == jax.tree.map(jnp.shape, state.opt_state)
    broken = state._replace(params=jax.tree.map(lambda x: x * np.inf, state.params))
    kept, metrics = once(broken, batch)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, kept.opt_state, state.opt_state)
