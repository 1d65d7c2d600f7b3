"""One update: accumulation, what is skipped, precision."""

import functools
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from mamba3_jax.config import Config, DataConfig, ModelConfig
from mamba3_jax.ops import cross_entropy
from mamba3_jax.ops.cross_entropy import Sums
from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from mamba3_jax.sharding import make_mesh
from mamba3_jax.train.optimizer import optimizer
from mamba3_jax.train.step import TrainState, batch_shapes, gradients, init_state, train_step, update
from tests.helpers import devices, rel_rms
from tests.pallas_kernels.family import GPU
from tests.train.tiny import get_config, random_batch, random_params

KEY = np.zeros(2, np.uint32)


def fresh(config: Config) -> TrainState:
    params, zero = random_params(config), np.int32(0)
    opt_state = optimizer(config).init(params)
    return TrainState(zero, zero, zero, KEY, params, opt_state)


@functools.cache
def stepper():
    config = get_config()
    return config, jax.jit(functools.partial(train_step, config))


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


@pytest.mark.full
def test_accumulation_is_the_full_batch():
    config = get_config()
    params, batch = random_params(config), random_batch(config)

    def compute(accumulate, batch=batch):
        config.optimizer.accumulate = accumulate
        grads, parts = jax.jit(functools.partial(gradients, config))(params, batch)
        return flat(grads), flat(parts)

    whole, parts = compute(1)
    split, got = compute(2)
    assert rel_rms(split, whole) < 2e-6
    assert rel_rms(got, parts) < 1e-6
    # The mean of the micro-batches' means, the usual mistake with unequal weights, is something else.
    halves = [batch._replace(weights_BL=np.where(np.arange(4)[:, None] % 2 == i, batch.weights_BL, 0)) for i in (0, 1)]
    assert rel_rms(np.mean([compute(1, half)[0] for half in halves], axis=0), whole) > 1e-3


@pytest.mark.full
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    config, step = stepper()
    batch = random_batch(config)
    bad = batch._replace(weights_BL=np.where(batch.weights_BL > 0, np.inf, 0).astype(np.float32))
    state, _ = step(fresh(config), batch)

    after, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"])
    for before, now in zip(
        jax.tree.leaves((state.params, state.opt_state, state.rng)),
        jax.tree.leaves((after.params, after.opt_state, after.rng)),
        strict=True,
    ):
        assert np.asarray(before).tobytes() == np.asarray(now).tobytes()
    assert (int(after.step), int(after.skipped), int(after.bad)) == (2, 1, 1)

    again, metrics = step(after, bad)
    assert (int(again.skipped), int(again.bad)) == (2, 2)
    good, metrics = step(again, batch)
    want, expected = step(state, batch)
    assert flat(good.params).tobytes() == flat(want.params).tobytes(), "as if the bad steps had not been"
    assert metrics["learning_rate"] == expected["learning_rate"]
    assert (int(good.step), int(good.skipped), int(good.bad)) == (4, 2, 0)
    assert not np.array_equal(flat(good.params), flat(state.params))


@pytest.mark.full
def test_ids_outside_the_vocabulary_skip_the_step():
    config, step = stepper()
    batch, before = random_batch(config), fresh(config)
    vocab = config.model.vocab_size
    for name in ("tokens_BL", "targets_BL"):
        for wrong in (-1, -100, vocab, 2**31 - 1):
            ids_BL = getattr(batch, name).copy()
            ids_BL[batch.weights_BL > 0] = wrong
            state, metrics = step(before, batch._replace(**{name: ids_BL}))
            assert not np.isfinite(metrics["loss"]), (name, wrong)
            assert (int(state.step), int(state.skipped)) == (1, 1)
            assert flat(state.params).tobytes() == flat(before.params).tobytes()


@pytest.mark.full
@pytest.mark.parametrize("exact", [False, True], ids=["float32", "float64"])
def test_several_devices_compute_what_one_does(exact):
    """Loss, gradients, updates, tokens after a prefill; and checkpoints of any mesh are any other's."""
    meshes = ["data:4,fsdp:2", "data:2,tensor:4", "fsdp:4,tensor:2", "data:2,fsdp:2,tensor:2"]
    environment = devices(8) | {"JAX_ENABLE_X64": str(int(exact))}
    command = [sys.executable, "-m", "tests.train.over_meshes", *meshes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == meshes


@pytest.mark.full
def test_parameters_stay_float32_when_compute_is_bfloat16():
    config = get_config()
    batch = random_batch(config)
    config.model.compute_dtype = "bfloat16"
    low, _ = jax.jit(functools.partial(train_step, config))(fresh(config), batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((low.params, low.opt_state[1].mu))} == {np.dtype(np.float32)}
    full = stepper()[1](fresh(config), batch)[0]
    moments = [flat(state.opt_state[1].mu) for state in (low, full)]
    assert 1e-5 < rel_rms(*moments) < 0.1, "bfloat16 was used, and is close"


@pytest.mark.full
def test_loss_falls():
    config, step = stepper()
    state, batch = fresh(config), random_batch(config)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(("tie", "pattern"), [(True, "MM"), (False, "MA")])
def test_flops_are_six_a_matrix_parameter_and_the_state(tie, pattern):
    from mamba3_jax.train.flops import flops_per_token

    model = ModelConfig(
        d_model=32, pattern=pattern, d_state=8, head_dim=16, d_ff=48, tie_embeddings=tie, attn_head_dim=16
    )
    length = DataConfig().length
    mamba = 32 * (2 * 64 + 3 * 4 + 2 * 8 + 2) + 64 * 32  # projections in: z x, dt A trap, B C theta; out
    attention, mlp, head = 4 * 32 * 32, 3 * 32 * 48, 256 * 32
    layers = {"MM": 2 * (mamba + mlp), "MA": mamba + attention + 2 * mlp}[pattern]
    state = {"MM": 2 * 4 * 64 * 8, "MA": 4 * 64 * 8 + 4 * 32 * length / 2}[pattern]
    assert flops_per_token(model, length) == 6 * (layers + head) + 3 * state


GRADIENT = {"eps": 0.0}  # 0 / 0 where eps is less than float32 has
PARTS = Sums(nll=np.float32(2), z=np.float32(1), correct=np.float32(1), weight=np.float32(1))


@pytest.mark.full
@pytest.mark.parametrize(
    ("field", "value"), [("weight_decay", math.nan), ("learning_rate", 1e39), ("eps", 1e-60), ("b2", math.inf)]
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_an_update_that_is_not_finite_is_not_made(field, value):
    """Loss and gradient are fine, what would be kept is not."""
    config = get_config()
    setattr(config.optimizer, field, value)
    state = fresh(config)
    grads = jax.tree.map(lambda leaf: np.full_like(leaf, GRADIENT.get(field, 0.1)), state.params)
    after, metrics = jax.jit(functools.partial(update, config))(state, grads, PARTS)
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert flat((after.params, after.opt_state)).tobytes() == flat((state.params, state.opt_state)).tobytes()
    assert (int(after.step), int(after.skipped), int(after.bad)) == (1, 1, 1)


@pytest.mark.full
def test_a_large_moment_is_finite_though_its_norm_is_not():
    config = get_config()
    state = fresh(config)
    first, adam, *rest = state.opt_state
    large = adam._replace(mu=jax.tree.map(lambda leaf: np.full_like(leaf, 1e30), adam.mu))
    state = state._replace(opt_state=(first, large, *rest))
    after, metrics = jax.jit(functools.partial(update, config))(state, state.params, PARTS)
    assert int(metrics["skipped"]) == int(after.skipped) == 0
    assert not np.array_equal(flat(after.params), flat(state.params))


# Of numbers a head, not of features: sums along the row of decays and angles, whose digits are the op's.
SUMS_OVER_THE_ROW = {"ets,ehs->eht", "bcqs,bhcs->bhcq", "bhcq,bhcs->bcqs"}


def wide_products(rank: int) -> list[str]:
    """The step's products of which an operand is float32, by name: as lowered for a GPU, the op by its kernels."""
    sizes = {"vocab_size": 64, "d_model": 64, "d_ff": 64, "d_state": 64, "head_dim": 64, "attn_head_dim": 32}
    model = ModelConfig(pattern="MA", mimo_rank=rank, compute_dtype="bfloat16", implementation="triton", **sizes)
    config = Config(model=model, data=DataConfig(batch=2, length=64))
    shapes = (jax.eval_shape(lambda: init_state(config)), batch_shapes(config.data, make_mesh("data:1")))
    with use_abstract_mesh(GPU):
        traced = jax.jit(functools.partial(train_step, config)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    names = dict(re.findall(r'^(#loc\d+) = loc\("([^"]*)"', text, re.MULTILINE))
    found = re.findall(r"dot_general .* : \(tensor<(\S*)>, tensor<(\S*)>\) -> \S* loc\((\S*)\)", text)
    assert len(found) > 40
    assert all(names[place].endswith("/dot_general") for *_, place in found)
    products = [(names[place].split("/")[-2], {a[-4:], b[-4:]}) for a, b, place in found]
    return sorted({name for name, dtypes in products if dtypes != {"bf16"} and name not in SUMS_OVER_THE_ROW})


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.full)], ids=["siso", "mimo"])
def test_no_product_of_a_bfloat16_step_is_of_float32(rank, monkeypatch):
    """In either pass, of head and loss, mixers and feed-forward: it would run at a fraction of the speed."""
    monkeypatch.setitem(IMPLEMENTATIONS, "triton", functools.partial(IMPLEMENTATIONS["triton"], anywhere=True))
    assert wide_products(rank) == []
    if rank:
        return

    def by_autodiff(equation, a, b, *, dtype, out=None):
        return jnp.einsum(equation, a.astype(dtype), b.astype(dtype), preferred_element_type=out or dtype)

    monkeypatch.setattr("mamba3_jax.mixers.mamba3.einsum", by_autodiff)
    assert wide_products(rank) == ["bld,dch->blch", "bld,de->ble"], "a float32 cotangent is seen"


@pytest.mark.full
def test_memory_of_a_step_does_not_grow_with_the_vocabulary(monkeypatch):
    """Beside parameters and what is like them: logits of a tile, whatever the batch."""
    monkeypatch.setattr(cross_entropy, "TILE", 2**16)

    def temporaries(batch):
        model = ModelConfig(vocab_size=2**14, d_model=8, pattern="M", d_state=4, head_dim=8, compute_dtype="bfloat16")
        config = Config(model=model, data=DataConfig(batch=batch, length=64))
        shapes = (jax.eval_shape(lambda: init_state(config)), batch_shapes(config.data, make_mesh("data:1")))
        compiled = jax.jit(functools.partial(train_step, config)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 64 * 2**14
    assert temporaries(8) - temporaries(4) < 4 * logits / 4, "a quarter of the logits of four more rows"
