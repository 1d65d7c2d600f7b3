"""One training step, as a pure function of state and batch."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba3_jax.config import Config, DataConfig
from mamba3_jax.data.batch import Batch
from mamba3_jax.finite import all_finite
from mamba3_jax.model import init_params
from mamba3_jax.ops.cross_entropy import Sums, objective
from mamba3_jax.sharding import batch_sharding, loading, param_shardings, without
from mamba3_jax.train.loss import batch_loss, means
from mamba3_jax.train.optimizer import optimizer, schedule


class TrainState(NamedTuple):
    """All that a step needs of the past. A skipped update counts as a step, whose batch is used up; no more changes."""

    step: jax.Array  # int32: batches seen
    skipped: jax.Array  # int32: how many of these made no update, since something was not finite
    bad: jax.Array  # int32: how many of the last steps in a row were skipped
    rng: jax.Array  # key data for random numbers of a step: step t would draw from fold_in(rng, t)
    params: Any
    opt_state: Any


def init_state(config: Config) -> TrainState:
    """Return the state before the first step; everything random in it comes from config.seed."""
    model_key, rng = jax.random.split(jax.random.key(config.seed))
    params = init_params(config.model, model_key)
    counts = dict.fromkeys(("step", "skipped", "bad"), jnp.zeros((), jnp.int32))
    opt_state = optimizer(config).init(params)
    return TrainState(**counts, rng=jax.random.key_data(rng), params=params, opt_state=opt_state)


def state_shapes(config: Config, mesh: Mesh) -> TrainState:
    """Return shapes, dtypes and shardings: moments of a parameter's shape lie where it does, all else everywhere."""
    shapes = jax.eval_shape(lambda: init_state(config))
    whole = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(config.model, mesh)

    def place(moment, sharding, param):
        # Factored moments, say, are rows and columns of what a parameter would have.
        return moment if is_masked(moment) else sharding if moment.shape == param.shape else whole

    opt_state = optax.tree.map_params(
        optimizer(config),
        place,
        shapes.opt_state,
        params,
        shapes.params,
        is_leaf=is_masked,
        transform_non_params=lambda _: whole,
    )
    shardings = jax.tree.map(lambda _: whole, shapes)._replace(params=params, opt_state=opt_state)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )


def gradients(config: Config, params, batch: Batch) -> tuple[Any, Sums]:
    """Return the gradient of the batch's mean objective, and the sums, from `accumulate` micro-batches in turn.

    Sums over tokens are accumulated, and divided by the whole batch's weight at the end. So the result is that of the
    full batch, whatever weights its parts have.
    """
    count = config.optimizer.accumulate
    gradient = jax.grad(partial(batch_loss, config), has_aux=True)

    def accumulated(params, batch):
        # Micro-batch i takes rows i, i + count, ...: an equal part of every device's rows.
        split = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
        zeros = (jax.tree.map(jnp.zeros_like, params), Sums._make(jnp.zeros(len(Sums._fields))))

        def add(total, batch):
            return jax.tree.map(jnp.add, total, gradient(params, batch)), None

        return jax.lax.scan(add, zeros, split)[0]

    grads, parts = gradient(params, batch) if count == 1 else summed_once(accumulated)(params, batch)
    weight = jnp.where(parts.weight > 0, parts.weight, 1)
    return jax.tree.map(lambda g: g / weight, grads), parts


def summed_once(gradient):
    """Return `gradient(params, batch)` that sums over the mesh's data axis once, at its end; XLA would at every use.

    Sums over fsdp stay where they are, since no device has room for a whole gradient. On a mesh with a tensor axis
    nothing changes: inside `jax.shard_map` XLA would also divide over that axis what heads share, and move it in every
    layer.
    """
    axis, mesh = "data", jax.sharding.get_abstract_mesh()
    if mesh.shape.get(axis, 1) == 1 or mesh.shape.get("tensor", 1) > 1:
        return gradient

    def own(params, batch):
        left = tuple((name, without(axes, axis)) for name, axes in nn.get_logical_axis_rules())
        with nn.logical_axis_rules(left):
            return jax.lax.psum(gradient(params, batch), axis)

    specs = {"in_specs": (PartitionSpec(), PartitionSpec(axis)), "out_specs": PartitionSpec()}
    return jax.shard_map(own, **specs, axis_names={axis}, check_vma=False)


def train_step(config: Config, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
    """Make one update; return the new state and the update's metrics as scalars."""
    return update(config, state, *gradients(config, state.params, batch))


def is_masked(x) -> bool:
    """Tell whether this stands for a parameter that this part of the optimizer leaves to another part."""
    return isinstance(x, optax.MaskedNode)


def like(params, opt_state) -> list:
    """List the trees in an optimizer's state that have an array a parameter; masked places get the parameter."""
    structure = jax.tree.structure(params)
    same = lambda tree: jax.tree.structure(tree, is_leaf=is_masked) == structure  # noqa: E731
    full = lambda tree: jax.tree.map(lambda x, p: p if is_masked(x) else x, tree, params, is_leaf=is_masked)  # noqa: E731
    return [full(tree) for tree in jax.tree.leaves(opt_state, is_leaf=same) if same(tree)]


def update(config: Config, state: TrainState, grads, parts: Sums) -> tuple[TrainState, dict]:
    """Return the state after an update by these gradients, and the metrics.

    Where the objective, the gradient's norm or any number of the new parameters and moments is not finite, the
    parameters and the whole optimizer state (moments, and the count that the schedule goes by) stay bit for bit what
    they were, and the step counts as skipped.
    """
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    kept = like(params, opt_state)  # the moments, without the counts beside them
    good = all_finite((objective(parts, config.train.z_loss), norm)) & all_finite(params, *kept)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)  # noqa: E731
    metrics = means(parts) | {
        "grad_norm": norm,
        "learning_rate": schedule(config.optimizer, config.train.steps)(state.step - state.skipped),
        "skipped": state.skipped + ~good,
        "bad": jnp.where(good, 0, state.bad + 1),
    }
    state = TrainState(
        step=state.step + 1,
        skipped=metrics["skipped"],
        bad=metrics["bad"],
        rng=state.rng,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
    )
    return state, metrics


def eval_step(config: Config, params, batch: Batch) -> Sums:
    """Return the sums over one batch."""
    return batch_loss(config, params, batch)[1]


def batch_shapes(config: DataConfig, mesh: Mesh) -> Batch:
    """Return the shapes, dtypes and shardings of a global batch."""
    dtypes = Batch(tokens_BL=jnp.int32, targets_BL=jnp.int32, weights_BL=jnp.float32, start_BL=jnp.bool_)
    shape, sharding = (config.batch, config.length), batch_sharding(mesh)
    return jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding), dtypes)


def put(batch: Batch, mesh: Mesh) -> Batch:
    """Return the global batch; `batch` is the part of its rows that this process loads (`sharding.loading`)."""
    sharding, (_, count) = batch_sharding(mesh), loading(mesh)

    def place(x_BL):
        shape = (x_BL.shape[0] * count, *x_BL.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x_BL, shape)

    return jax.tree.map(place, batch)
