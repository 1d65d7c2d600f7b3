"""Muon: which parameter is whose, each matrix of each layer against optax's own Newton-Schulz, runs, devices."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib._muon import orthogonalize_via_newton_schulz

from mamba3_jax.checkpoint import all_steps, load_model
from mamba3_jax.config import Config
from mamba3_jax.load import load
from mamba3_jax.train.loop import Trainer
from mamba3_jax.train.muon import Matrix, matrices
from mamba3_jax.train.optimizer import optimizer, schedule
from mamba3_jax.train.resume import check
from mamba3_jax.train.step import like, train_step, update
from tests.helpers import rel_rms
from tests.train.test_checkpoint import identical
from tests.train.test_step import PARTS, fresh
from tests.train.tiny import get_config, random_batch, random_params

COEFFICIENTS = jnp.array([3.4445, -4.7750, 2.0315])
newton_schulz = jax.jit(lambda x: orthogonalize_via_newton_schulz(x, COEFFICIENTS))


def muon_config(pattern="MMAMMA", rank=2, **options) -> Config:
    config = get_config()
    config.optimizer.name = "muon"
    model = {"pattern": pattern, "mimo_rank": rank, "attn_head_dim": 4, "attn_kv_heads": 2, "attn_heads": 4, "d_ff": 24}
    model |= {"delta_head_dim": 4, "delta_heads": 2}
    for name, value in (model | {"out_norm": True, "n_groups": 2, "tie_embeddings": False} | options).items():
        setattr(config.model, name, value)
    return config


def by_name(tree, is_leaf=None) -> dict:
    """Leaves by block/module/parameter, outside of the layers by module/parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return {name.removeprefix("segment_0/"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def test_which_parameter_is_whose():
    """Axes of the inputs and of the outputs; 0 is over layers and 2, of two projections, over z, x and dt, A, trap."""
    config = muon_config()
    got = by_name(matrices(config.model), is_leaf=lambda x: x is None or isinstance(x, Matrix))
    mamba = {
        "mixer/in_zx": ((1,), (3, 4)),
        "mixer/in_dt_a_trap": ((1,), (3,)),
        "mixer/in_kq_angle": ((1,), (2,)),
        "mixer/out": ((1, 2), (3,)),
    }
    attention = {f"mixer/{name}": ((1,), (2, 3)) for name in "qkv"} | {"mixer/out": ((1, 2), (3,))}
    feed_forward = {f"mlp/{name}": ((1,), (2,)) for name in ("value", "gate", "out")}
    layers = {"block_0": mamba, "block_1": mamba, "block_2": attention}
    muon = {f"{block}/{name}": axes for block, of in layers.items() for name, axes in (of | feed_forward).items()}
    assert {name: tuple(matrix.axes) for name, matrix in got.items() if matrix} == muon
    assert {name: matrix.widths for name, matrix in got.items() if matrix and matrix.widths} == dict.fromkeys(
        ("block_0/mixer/in_kq_angle", "block_1/mixer/in_kq_angle"), (2 * 2 * 8, 2 * 2 * 8, 2)
    )
    ranks_norms_biases = "dt_bias skip k_bias q_bias k_norm q_norm norm v_rank gate_rank out_rank"
    adam = {f"{block}/{norm}/scale" for block in layers for norm in ("norm1", "norm2")}
    adam |= {f"{block}/mixer/{name}" for block in ("block_0", "block_1") for name in ranks_norms_biases.split()}
    adam |= {"embedding/embedding", "head/kernel", "norm/scale"}
    assert {name for name, matrix in got.items() if matrix is None} == adam


def flat_matrices(config: Config, name: str, layer):
    """The matrices of one layer's parameter, (inputs, outputs) each, cut by hand."""
    kq = max(config.model.mimo_rank, 1) * config.model.n_groups * config.model.d_state
    width, name = config.model.d_model, name.split("/")[-1]
    if name in ("in_kq_angle", "in_kq"):
        return [part for part in (layer[:, :kq], layer[:, kq : 2 * kq], layer[:, 2 * kq :]) if part.size]
    if name in ("in_zx", "in_dt_a_trap", "in_qk", "in_zv", "in_ab"):
        return [layer[:, i].reshape(width, -1) for i in range(layer.shape[1])]
    return [layer.reshape(-1, width) if name == "out" else layer.reshape(width, -1)]


def joined(name: str, shape, parts):
    """Invert `flat_matrices`."""
    if name.endswith(("in_zx", "in_dt_a_trap", "in_qk", "in_zv", "in_ab")):
        return np.stack([part.reshape(shape[0], *shape[2:]) for part in parts], axis=1)
    return np.concatenate(parts, axis=-1).reshape(shape)


def by_hand(config: Config, name: str, momenta, splits=flat_matrices):
    """Every matrix of every layer orthogonalised alone, its entries' RMS 0.2 where it is exactly orthogonal."""
    layers = []
    for layer in momenta:
        parts = [0.2 * max(x.shape) ** 0.5 * np.asarray(newton_schulz(x)) for x in splits(config, name, layer)]
        layers.append(joined(name, layer.shape, parts) if splits is flat_matrices else parts[0].reshape(layer.shape))
    return np.stack(layers)


# Each of the five steps of Newton and Schulz multiplies what is small, roundings of float32 among it, by up to 3.4445.
ORTHOGONAL = 3.4445**5 * 2**-24

VARIANTS = ({"rank": 0}, {"pattern": "A2G1", "rank": 0}, {"pattern": "M", "angles": "quaternion", "conv": 2})
FULL = [pytest.param(options, marks=pytest.mark.full) for options in VARIANTS]


@pytest.mark.parametrize("options", [{"rank": 2}, *FULL])
def test_every_matrix_is_orthogonalised_alone(options):
    """Two updates: clipped gradients, Nesterov momentum, schedule, decay; what is not Muon's gets what AdamW gives."""
    config = muon_config(**{"pattern": "MM", **options})
    config.optimizer.clip, beta, weight_decay = 0.5, config.optimizer.momentum, config.optimizer.weight_decay
    config.train.steps = 4
    plain = muon_config(**{"pattern": "MM", **options})
    plain.optimizer, plain.train = dataclasses.replace(config.optimizer, name="adamw"), config.train
    params, grads = random_params(config), [random_params(config, seed) for seed in (1, 2)]

    def updates_of(config):
        transform, got = optimizer(config), []
        state, update = transform.init(params), jax.jit(transform.update)
        for grad in grads:
            updates, state = update(grad, state, params)
            got.append(by_name(updates))
        return got

    got, adam = updates_of(config), updates_of(plain)
    clipped = [by_name(optax.tree.scale(0.5 / optax.tree.norm(grad), grad)) for grad in grads]
    muon = by_name(matrices(config.model), is_leaf=lambda x: x is None or isinstance(x, Matrix))
    start, checked = by_name(params), set()
    for name, matrix in muon.items():
        if matrix is None:
            assert all(np.array_equal(got[t][name], adam[t][name]) for t in (0, 1)), name
            continue
        mean = 0
        for t in (0, 1):
            mean = beta * mean + (1 - beta) * clipped[t][name]
            momenta = beta * mean / (1 - beta ** (t + 2)) + (1 - beta) * clipped[t][name] / (1 - beta ** (t + 1))
            rate = float(schedule(config.optimizer, 4)(t))
            want = -rate * (by_hand(config, name, momenta) + weight_decay * start[name])
            assert rel_rms(got[t][name], want) < ORTHOGONAL, (name, t)
            whole = lambda config, name, layer: [layer.reshape(-1, layer.shape[-1])]  # noqa: E731
            if name.endswith(("in_zx", "in_kq_angle", "mixer/q")):  # as one matrix, or split otherwise, it is another
                wrong = -rate * (by_hand(config, name, momenta, whole) + weight_decay * start[name])
                assert rel_rms(got[t][name], wrong) > 1e-2, (name, t)
        checked.add(name.split("/")[-1])
    others = (
        {"q", "k", "v", "in_kq", "in_dt", "in_qk", "in_zv", "in_ab"}
        if "G" in options.get("pattern", "")
        else {"in_dt_a_trap", "in_kq_angle"}
    )
    assert checked >= others | {"in_zx"}
    assert checked >= {"out", "value", "gate"}


@pytest.mark.full
def test_update_rms_is_adamw_s():
    """What lets learning rates of AdamW be those of Muon, whatever the shape."""
    config = muon_config("M", 0, d_ff=96)
    config.optimizer.weight_decay, config.optimizer.warmup = 0.0, 0.0
    params, transform = random_params(config), optimizer(config)
    updates, _ = jax.jit(transform.update)(random_params(config, 1), transform.init(params), params)
    for name, matrix in by_name(matrices(config.model), is_leaf=lambda x: x is None or isinstance(x, Matrix)).items():
        if matrix and not matrix.widths:
            rms = np.sqrt(np.mean(np.square(by_name(updates)[name]))) / config.optimizer.learning_rate
            assert 0.13 < rms < 0.26, name  # Newton-Schulz leaves singular values between 0.7 and 1.2


@pytest.mark.full
def test_the_check_for_finite_numbers_sees_muon_s_momentum():
    config = muon_config("MA")
    state = fresh(config)
    assert len(like(state.params, state.opt_state)) == 3  # Muon's momentum, Adam's two moments
    clip, partition, *rest = state.opt_state
    muon = partition.inner_states["muon"]
    mu = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), muon.inner_state.mu)
    muon = muon._replace(inner_state=muon.inner_state._replace(mu=mu))
    wrong = partition._replace(inner_states=partition.inner_states | {"muon": muon})
    state = state._replace(opt_state=(clip, wrong, *rest))
    after, metrics = jax.jit(functools.partial(update, config))(state, state.params, PARTS)
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert (int(after.step), int(after.skipped), int(after.bad)) == (1, 1, 1)
    assert identical((after.params, after.opt_state), (state.params, state.opt_state))


@pytest.mark.full
def test_loss_falls():
    config = muon_config("MA", d_ff=0)
    step, state, batch, losses = jax.jit(functools.partial(train_step, config)), fresh(config), random_batch(config), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05
    assert int(state.skipped) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """10 steps with checkpoints of the 5th and the last."""
    workdir, config = tmp_path_factory.mktemp("muon"), muon_config("M", d_ff=0)
    config.train.steps, config.train.keep_best = 10, False
    with Trainer(config, workdir, report=lambda _: None) as trainer:
        trainer.run()
    return workdir, config


def everything(workdir, config):
    with Trainer(config, workdir, report=lambda _: None) as trainer:
        return trainer.step, trainer.state


@pytest.mark.full
def test_a_resumed_run_is_the_same_bit_for_bit(run, tmp_path):
    workdir, config = run
    assert all_steps(workdir) == [5, 10]
    again = shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "10")
    with Trainer(config, again, report=lambda _: None) as trainer:
        assert trainer.step == 5
        trainer.run()
    (step, want), (got_step, got) = everything(workdir, config), everything(again, config)
    assert step == got_step == 10
    assert identical(got, want)
    assert identical(load(again)[1], load_model(workdir)[1])


@pytest.mark.full
def test_another_optimizer_does_not_resume(run, tmp_path):
    workdir, config = run
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="adamw"))
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    message = r"^config\.optimizer\.name='adamw', but .*/10 was trained with 'muon': a run resumes with the .*optimizer"
    with pytest.raises(ValueError, match=message):
        Trainer(other, workdir, report=lambda _: None)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    assert list(check(config, other, "of parameters alone", model_only=True)) == ["optimizer.name"]


@pytest.mark.full
def test_several_devices_compute_what_one_does():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "tests.train.sharded", "data:2,tensor:4"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["data:2,tensor:4"]
