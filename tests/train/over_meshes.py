"""Run by test_step.py in a process of its own with 8 devices: prints a line a mesh, or raises.

With JAX_ENABLE_X64 what is float32 in the model and the step is float64: it is one device's to 1e-12 then.
"""

import contextlib
import functools
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXACT = jax.config.jax_enable_x64
if EXACT:
    jnp.float32 = jnp.float64  # before anything of ours is imported

from mamba3_jax import decoding, memory  # noqa: E402
from mamba3_jax.checkpoint import Checkpoints  # noqa: E402
from mamba3_jax.config import Config, ModelConfig  # noqa: E402
from mamba3_jax.mixers import mixer  # noqa: E402
from mamba3_jax.model import LanguageModel  # noqa: E402
from mamba3_jax.sharding import (  # noqa: E402
    batch_sharding,
    make_mesh,
    param_shardings,
    parts,
    state_shardings,
    using,
)
from mamba3_jax.train.step import TrainState, gradients, init_state, put, state_shapes, train_step  # noqa: E402
from tests.helpers import rel_rms  # noqa: E402
from tests.train.tiny import random_batch  # noqa: E402

SIZES = {"vocab_size": 30, "d_model": 16, "d_ff": 16, "d_state": 8, "head_dim": 8, "chunk": 4, "embedding_std": 1.0}
MODELS = {
    "siso": ModelConfig(**SIZES, pattern="MM"),
    "mimo": ModelConfig(**SIZES, pattern="M", mimo_rank=2, n_groups=2, out_norm=True, tie_embeddings=False),
    "hybrid": ModelConfig(**SIZES, pattern="MA2", attn_heads=4, attn_head_dim=4),
}
RESTORED = (("fsdp:4,tensor:2", 8), ("data:2,fsdp:2", 4), ("data:1", 1), ("data:2,fsdp:4", 8))  # and how many devices
TOLERANCE = 1e-12 if EXACT else 1e-5


def config_of(model: str, accumulate: int = 1) -> Config:
    """Rows of several documents, 8 of them: as many as there are devices."""
    config = Config(model=MODELS[model])
    config.data.batch, config.data.length, config.optimizer.accumulate = 8 * accumulate, 12, accumulate
    return config


@functools.cache
def drawn(model: str, accumulate: int):
    """(parameters, batch), and loss and gradients of one device."""
    config = config_of(model, accumulate)
    params, batch = init_state(config).params, random_batch(config)
    batch = batch._replace(weights_BL=batch.weights_BL.astype(jnp.float32))
    return params, batch, jax.jit(functools.partial(gradients, config))(params, batch)


def check(mesh, model: str, accumulate: int = 1) -> None:
    """Raise where the loss or a gradient is not one device's, or does not lie where its parameter does."""
    config = config_of(model, accumulate)
    params, batch, want = drawn(model, accumulate)
    shardings = param_shardings(config.model, mesh)
    with using(mesh):
        run = jax.jit(functools.partial(gradients, config), out_shardings=(shardings, None))
        got = run(jax.device_put(params, shardings), put(batch, mesh))
    errors = jax.tree_util.tree_leaves_with_path(jax.tree.map(rel_rms, got, want))
    path, worst = max(errors, key=lambda entry: entry[1])
    assert worst < TOLERANCE, f"{model}: {jax.tree_util.keystr(path)} is off by {worst}"


def check_bytes(mesh) -> None:
    """After an update every device holds its part of parameters and moments, and no more."""
    config = config_of("siso")
    shapes = state_shapes(config, mesh)
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    with using(mesh):
        state = jax.jit(functools.partial(init_state, config), out_shardings=shardings)()
        step = jax.jit(functools.partial(train_step, config), out_shardings=(shardings, None), donate_argnums=0)
        state, _ = step(state, put(random_batch(config), mesh))
    first = jax.devices()[0]
    held, whole = (
        sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == first)
        for tree in ((state.params, state.opt_state), jax.device_put((state.params, state.opt_state), first))
    )
    assert held == memory.on_a_device((shapes.params, shapes.opt_state))
    split = parts(mesh, "embed") * parts(mesh, "heads")
    assert whole / split <= held < 1.3 * whole / split + whole / 20, (held, whole)  # what heads or rows share is whole


def check_decoding(mesh, model: str) -> None:
    """Raise where tokens after a prefill have not one device's logits, or the state does not stay split."""
    config = MODELS[model]
    params = init_state(config_of(model)).params
    tokens_BL = np.random.default_rng(0).integers(0, config.vocab_size, (8, 9), np.int32)
    start_BL = np.arange(9) == np.arange(8)[:, None]

    @jax.jit
    def run(params, tokens_BL, start_BL, state):
        _, state = LanguageModel(config).apply({"params": params}, tokens_BL[:, :6], state, start_BL[:, :6])
        params, state, logits = decoding.prepare(config, params), decoding.unstacked(config, state), []
        for t in range(6, 9):
            logits_BV, state = decoding.step(config, params, tokens_BL[:, t], state, start_BL[:, t])
            logits.append(logits_BV)
        return logits, state

    state = LanguageModel(config).empty_state(8, 9)
    want = run(params, tokens_BL, start_BL, state)
    params, state = jax.device_put((params, state), (param_shardings(config, mesh), state_shardings(state, mesh)))
    with using(mesh):
        got = run(params, *jax.device_put((tokens_BL, start_BL), batch_sharding(mesh)), state)
    worst = max(jax.tree.leaves(jax.tree.map(rel_rms, got, want)))
    assert worst < TOLERANCE, (model, worst)
    h_BHPN = got[1]["segment_0"]["repeat_0"]["block_0"].ssm_BHPN
    rows, heads = parts(mesh, "batch"), parts(mesh, "heads")
    assert h_BHPN.sharding.shard_shape(h_BHPN.shape)[:2] == (8 // rows, h_BHPN.shape[1] // heads), h_BHPN.sharding


def check_restoring() -> None:
    """Raise where a state that is saved from one mesh and restored to another, of fewer devices or more, is another."""
    config, held = config_of("hybrid"), None
    with tempfile.TemporaryDirectory() as workdir:
        for step, (spec, count) in enumerate(RESTORED):
            shapes = state_shapes(config, make_mesh(spec, jax.devices()[:count]))
            with Checkpoints(workdir, config) as checkpoints:
                if held is None:
                    state = jax.jit(lambda: init_state(config), out_shardings=jax.tree.map(sharding_of, shapes))()
                    held = jax.device_get(state)
                else:
                    rest = shapes._asdict()
                    params, rest, data = checkpoints.restore(step - 1, rest.pop("params"), rest)
                    assert data == {"position": step - 1}
                    state = TrainState(params=params, **rest)
                    assert jax.tree.map(sharding_of, state) == jax.tree.map(sharding_of, shapes)
                    assert identical(state, held), (spec, count)
                rest = state._asdict()
                checkpoints.save(step, rest.pop("params"), rest, {"position": step})


def sharding_of(array):
    return array.sharding


def identical(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b))


@contextlib.contextmanager
def planted(axis: str):
    """Inside, the op is off by a thousandth on the devices of one place of an axis."""

    def wrong(*inputs, **how):
        y_BLHP, state = op(*inputs, **how)
        if axis not in jax.sharding.get_abstract_mesh().manual_axes:  # shapes alone are asked for
            return y_BLHP, state
        return y_BLHP * (1 + 1e-3 * (jax.lax.axis_index(axis) == 1)), state

    op, mixer.ssm = mixer.ssm, wrong
    try:
        yield
    finally:
        mixer.ssm = op


def main(spec: str) -> None:
    """Check a mesh, and that what is wrong on some of its devices is seen."""
    mesh = make_mesh(spec)
    for model in MODELS:
        check(mesh, model, accumulate=2 if model == "hybrid" else 1)
        check_decoding(mesh, model)
    check_bytes(mesh)
    for axis in mesh.axis_names if EXACT else ():
        with planted(axis), pytest.raises(AssertionError, match="is off by"):
            check(mesh, "siso")
    print(spec)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)
    check_restoring()
