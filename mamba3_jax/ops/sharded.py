"""The op over a mesh of devices that divide rows and heads: each computes its part as a single device would."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from mamba3_jax.ops.types import Heads, State, Tokens, empty_state

Axes = str | tuple[str, ...] | None  # of the mesh, over which one axis of an array is split


def sharded(op, batch: Axes, split: str | None, length: str | None = None):
    """Return `op(tokens, heads, state)`, e.g. `ssm`, divided over the mesh in context (`jax.set_mesh`); else `op`.

    XLA divides plain code over devices by itself, but not kernels. Arrays that heads share are whole on every device,
    and their gradients are summed over devices.

    Args:
        op: the function that each device runs.
        batch: the mesh axis or axes that rows are split over, or None. Too few rows to split are whole on every device.
        split: the mesh axis that heads are split over, or None.
        length: the mesh axis that tokens are split over, or None. With one, `op` is a function from `context.across`.

    Raises:
        ValueError: by the returned function: the size of the axis does not divide the number of heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if undivided(batch, split, length):
        return op

    def call(tokens: Tokens, heads: Heads, state: State | None = None):
        (rows, _, n_heads), groups = tokens.log_a_BLH.shape, tokens.k_BLRGN.shape[3]
        parts = mesh.shape[split] if split else 1
        if n_heads % parts:
            raise ValueError(f"{n_heads=} is not a multiple of the mesh's {split}={parts}")
        row = None if rows % size_of(batch) else batch
        by_group = by_angle = None
        if tokens.angle_BLHS is not None and tokens.angle_BLHS.shape[2] > 1:
            by_angle = split
        if groups > 1:  # repeat groups until every device has those of its own heads and no others
            by_group, copies = split, math.lcm(groups, parts) // groups
            q_BLRGN, k_BLRGN = (jnp.repeat(x, copies, axis=3) for x in (tokens.q_BLRGN, tokens.k_BLRGN))
            tokens = tokens._replace(q_BLRGN=q_BLRGN, k_BLRGN=k_BLRGN)
        shared, own = Spec(row, length, None, by_group), Spec(row, length, split)
        of_tokens = Tokens(**dict.fromkeys(Tokens._fields, own))._replace(
            q_BLRGN=shared, k_BLRGN=shared, angle_BLHS=Spec(row, length, by_angle), start_BL=Spec(row, length)
        )
        of_state = State(**dict.fromkeys(State._fields, Spec(row, split)))._replace(k_BRHN=Spec(row, None, split))
        of_state = _where(jax.eval_shape(empty_state, tokens), of_state)
        given = [(tokens, of_tokens), (heads, Heads(**dict.fromkeys(Heads._fields, Spec(split)))), (state, of_state)]
        specs = tuple(None if arrays is None else _where(arrays, specs) for arrays, specs in given)
        # check_vma is off: kernels do not say over which mesh axes their outputs vary.
        run = jax.shard_map(op, in_specs=specs, out_specs=(own, of_state), check_vma=False)
        return run(tokens, heads, state)

    return call


def axes_of(axes: Axes) -> tuple[str, ...]:
    """Return mesh axes, given as one name, several or None, as a tuple."""
    return (axes,) if isinstance(axes, str) else axes or ()


def size_of(axes: Axes) -> int:
    """Return how many devices of the mesh in context an axis of an array is split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes_of(axes))


def undivided(*axes: Axes) -> bool:
    """Tell whether nothing is split over these axes: there is no mesh or no axis, or `jax.shard_map` is over all."""
    mesh = jax.sharding.get_abstract_mesh()
    given = {axis for some in axes for axis in axes_of(some)}
    return mesh.size <= 1 or given <= set(mesh.manual_axes)


def one_device() -> bool:
    """Tell whether one device computes what is traced: the mesh has no other, or it is inside `jax.shard_map` over all.

    Without a mesh in context arrays may lie on any of the process's devices, so there must be only one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or set(mesh.axis_types) == {AxisType.Manual}


def _where(arrays, specs):
    """Return the specs with None in place of those whose array is None."""
    pairs = zip(arrays, specs, strict=True)
    return type(specs)(*(None if array is None else spec for array, spec in pairs))
