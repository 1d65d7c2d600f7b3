"""Check that a config can be trained on a mesh, and compile a step that fits into a device's memory."""

import dataclasses
from functools import partial

import jax
from jax.sharding import Mesh

from mamba3_jax import memory, model
from mamba3_jax.config import Config
from mamba3_jax.data import Batch, tokenizer
from mamba3_jax.sharding import make_mesh, parts, using
from mamba3_jax.train import optimizer
from mamba3_jax.train.step import TrainState, batch_shapes, state_shapes, train_step


class Failed(Exception):
    """No step fits into memory, the first state is not finite, or there was an OSError. The message is for the user."""


def validate(config: Config, mesh: Mesh | None = None) -> None:
    """Raise ValueError for a config that cannot be trained on a mesh (None: the config's own)."""
    mesh = mesh or make_mesh(config.train.mesh)
    model.validate(config.model)
    optimizer.validate(config.optimizer)
    rows, columns = parts(mesh, "batch"), parts(mesh, "length")
    if config.data.batch % (rows * config.optimizer.accumulate):
        raise ValueError(
            f"data.batch={config.data.batch} is not a positive multiple of {rows * config.optimizer.accumulate}: "
            f"optimizer.accumulate={config.optimizer.accumulate} x the {rows} parts that rows are split into by "
            f"train.mesh={config.train.mesh!r}"
        )
    if config.data.length % columns:
        raise ValueError(
            f"data.length={config.data.length} is not a multiple of {columns}: the parts that rows are cut into by "
            f"train.mesh={config.train.mesh!r}"
        )
    if (ids := tokenizer(config.data).vocab_size) > config.model.vocab_size:
        raise ValueError(f"model.vocab_size={config.model.vocab_size} is less than the {ids} ids of the tokenizer")
    if config.model.implementation or config.model.attn_implementation:
        check_implementations(config, mesh)


def check_implementations(config: Config, mesh: Mesh) -> None:
    """Raise ValueError where what the config names does not run the step's shapes and dtypes, or not on these devices.

    The step is traced, as nothing else knows all that an implementation wants.
    """
    shapes, batch = state_shapes(config, mesh), batch_shapes(config.data, mesh)
    with using(mesh):
        jax.jit(partial(train_step, config)).trace(shapes, batch)


def fitting(update, config: Config, shapes: TrainState, batch: Batch, limit: int | None):
    """Compile the step that fits into a device; return (program, remat).

    Where config.model.remat is "", each remat is tried, the fastest and largest first.

    Args:
        update: config -> step; that of one run is `train_step`.
        config: of the run.
        shapes: of the state, with shardings.
        batch: shapes of a batch, with shardings.
        limit: bytes of a device's memory; None: what the compiler takes for granted.

    Raises:
        Failed: no step fits.
    """
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    for remat in [config.model.remat] if config.model.remat else ["none", "rotation", "block"]:
        run = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        step = jax.jit(update(run), donate_argnums=0, out_shardings=(shardings, None))
        try:
            compiled = step.lower(shapes, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = f"the compiler says {str(error).splitlines()[0]}"
            continue
        needed = memory.of_program(compiled)
        if limit is None or needed <= limit:
            return compiled, remat
        found = f"{memory.readable(needed)} needed on each device"
    free = "" if limit is None else f", {memory.readable(limit)} there"
    step = f"the step of data.batch={config.data.batch} with model.remat={remat!r}"
    raise Failed(f"{step} does not fit: {found}{free}")
