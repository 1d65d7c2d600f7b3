"""The length of rows split over a mesh axis (context parallelism): which tokens lie where, and what crosses devices.

A row is cut into runs of equal length. Each device computes the `Transition` of its own run at once with the others, a
prefix scan composes those before it into the state in which its run begins, and the op goes on from there as it does
from any state. So only states cross, and every implementation of the op runs on every device as it is. Kernels do both
for themselves (`kernels.spans`): those for GPUs as for the splits that they cut rows in, those for TPUs by passes over
states of their own.

The scan takes ceil(log2 Z) rounds over Z devices, in each of which a device sends and holds one transition. An
all-gather would be one round, of Z - 1 transitions that each device receives and holds.

Called outside of `jax.shard_map` are `divide`, `over`, `whole`, `laid` and `in_order`; the others inside.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as Spec

from mamba3_jax.ops import kernels
from mamba3_jax.ops.sharded import one_device, undivided
from mamba3_jax.ops.ssm import default_implementation, transition
from mamba3_jax.ops.transition import compose
from mamba3_jax.ops.types import Heads, State, Tokens, accumulator, empty_state

RUNS = {"contiguous": 1, "zigzag": 2}  # of a row on each device


class Context(NamedTuple):
    """Where the tokens of a row lie on the Z devices of a mesh axis.

    contiguous: device z has run z of Z. zigzag: of 2 Z runs it has z and then 2 Z - 1 - z, so that what is causal costs
    every device the same.
    """

    axis: str
    layout: str

    @property
    def runs(self) -> int:
        return RUNS[self.layout]

    def run(self, place: int):
        """Return which of the row's runs this device has in this place."""
        z = jax.lax.axis_index(self.axis)
        return z if place == 0 else 2 * jax.lax.axis_size(self.axis) - 1 - z

    def begins(self, place: int):
        """Tell whether this device has the first of all runs in this place: they go up in place 0 and down in 1."""
        return jax.lax.axis_index(self.axis) == (0 if place == 0 else jax.lax.axis_size(self.axis) - 1)

    def ends(self):
        """Tell whether the last of this device's runs is the row's last."""
        return jax.lax.axis_index(self.axis) == (0 if self.runs == 2 else jax.lax.axis_size(self.axis) - 1)


def divide(axis: str | None, layout: str, length: int) -> Context | None:
    """Return how rows of `length` lie over an axis of the mesh in context; None: whole on every device.

    Rows of fewer tokens than there are runs are whole: those that decoding steps and `init` have.

    Raises:
        ValueError: a layout that is none, or more tokens that do not make equal runs.
    """
    if layout not in RUNS:
        raise ValueError(f"{layout=} is not one of {sorted(RUNS)}")
    if undivided(axis):
        return None
    size = jax.sharding.get_abstract_mesh().shape[axis]
    runs = RUNS[layout] * size
    if size == 1 or length < runs:
        return None
    if length % runs:
        raise ValueError(f"{length=} is not a multiple of {runs}, the runs of {layout=} on {axis}={size}")
    return Context(axis, layout)


def across(op, context: Context, *, rotation: str, chunk: int | None = None, implementation: str | None = None):
    """Return a function that computes this device's tokens as `ssm` computes whole rows.

    Costs a pass over the states alone beside the op's own: `ssm.transition`, in plain XLA, or the kernels' own, which
    also do the scan over devices and which those for GPUs may make anyway. The state given and returned is that of the
    whole row, the same on every device.

    Args:
        op: (tokens, heads, state, along) -> y, state: `ssm`, and what is to be kept of it for backward.
        context: how the tokens lie over the mesh.
        rotation: as `op` has it; the next two also.
    """

    def call(tokens: Tokens, heads: Heads, state: State | None = None):
        rows = fold(context, tokens)
        y_BLHP, after = run(rows, heads, state)
        return unfold(context, y_BLHP), from_one(context.ends(), apart(context, after)[-1], context.axis)

    def run(rows: Tokens, heads: Heads, state: State | None):
        """Compute the rows that this device's runs are; `state` is that before the whole ones."""
        if kernels.spans(implementation or default_implementation(rows), rows):
            from pallas_kernels.ssm.angle import Along

            if state is not None and context.runs == 2:  # the late runs begin with what the early ones leave
                state = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), state)
            return op(rows, heads, state, Along(context.axis, context.runs == 2))
        return op(rows, heads, begun(rows, heads, state), None)

    def begun(rows: Tokens, heads: Heads, state: State | None) -> State:
        """Return the state in which each run begins."""
        # A key is rotated in every round, and would be rounded in each.
        wide = lambda of: of._replace(k_BRHN=None if of.k_BRHN is None else of.k_BRHN.astype(accumulator(rows)))  # noqa: E731
        of_rows = transition(rows, heads, rotation=rotation, chunk=chunk)
        runs = apart(context, of_rows._replace(state=wide(of_rows.state)))
        first = apart(context, empty_state(rows))[0] if state is None else state
        nothing = jax.tree.map(jnp.zeros_like, runs[0])._replace(state=wide(first))  # leaves it whatever comes before
        join = functools.partial(compose, heads=heads, rotation=rotation)
        befores = [before.state for before in carried(join, runs, nothing, context)]
        return jax.tree.map(lambda like, *parts: jnp.concatenate(parts).astype(like.dtype), first, *befores)

    return call


def carried(join: Callable, runs: list, first, context: Context) -> list:
    """Return, of each run of this device, what all that comes before it makes together.

    Args:
        join: (left, right) -> what left and then right make, of one run each; associative.
        runs: of this device, trees of arrays.
        first: what comes before the row, as a run; the same on every device.
        context: where the runs lie.
    """
    befores = []
    for place, run in enumerate(runs):
        begins = context.begins(place)
        before, through = prefix(join, where(begins, join(first, run), run), context.axis, backwards=place == 1)
        befores.append(where(begins, first, before))
        first = through  # of the device that has the last run in this place and the first in the next
    return befores


def prefix(join: Callable, run, axis: str, backwards: bool = False):
    """Return what the runs of all devices before this one make together (zeros of the first), and with its own.

    Args:
        join: (left, right) -> what left and then right make; associative.
        run: of this device, a tree of arrays.
        axis: of the mesh.
        backwards: the last device has the first run.
    """
    size, z = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    place, before, through, distance = size - 1 - z if backwards else z, jax.tree.map(jnp.zeros_like, run), run, 1
    while distance < size:
        left, there = shift(through, axis, distance, backwards), place >= distance
        before = left if distance == 1 else where(there, join(left, before), before)
        through = where(there, join(left, through), through)
        distance *= 2
    return before, through


def shift(tree, axis: str, distance: int, backwards: bool):
    """Return what lies on the device `distance` before this one; zeros where there is none."""
    places = range(jax.lax.axis_size(axis) - distance)
    pairs = [(z + distance, z) if backwards else (z, z + distance) for z in places]
    send = functools.partial(jax.lax.ppermute, axis_name=axis, perm=pairs)
    if not one_device():  # XLA splits arrays over other axes, and would gather what is made one of them
        return jax.tree.map(send, tree)
    sent, restored = ravel_pytree(tree)  # one message: most of a transition's parts are so small that latency counts
    return restored(send(sent))


def shifted(ends: list, first, context: Context) -> list:
    """Return, of each run of this device, what the run before it ends with.

    Args:
        ends: of this device's runs, trees of arrays.
        first: what comes before the row; the same on every device.
        context: where the runs lie.
    """
    befores = []
    for place, run in enumerate(ends):
        befores.append(where(context.begins(place), first, shift(run, context.axis, 1, backwards=place == 1)))
        first = run
    return befores


def from_one(condition, tree, axis: str):
    """Return, on every device, what lies on the one where the condition holds."""

    def summed(x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # XLA for CPU dies of sums of bfloat16 over devices
        return jax.lax.psum(jnp.where(condition, wide, 0), axis).astype(x.dtype)

    return jax.tree.map(summed, tree)


def where(condition, yes, no):
    """Return one of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def over(context: Context, function: Callable, arrays: tuple, split: tuple[bool, ...], out_split: tuple[bool, ...]):
    """Return `function(*arrays)` of each device's tokens: what is plain XLA, so that other axes are left to XLA.

    Args:
        context: how tokens lie over the mesh.
        function: what each device runs; it gives a tuple.
        arrays: trees of arrays, or None.
        split: which of the arrays are (B, L, ...), the others are whole on every device.
        out_split: likewise of the results.
    """
    tokens, whole = Spec(None, context.axis), Spec()
    in_specs, out_specs = (tuple(tokens if yes else whole for yes in which) for which in (split, out_split))
    axes = {context.axis}
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(context: Context, x_BL):
    """Return the tokens of all devices, in the order of the row. Gradients are summed in float32."""
    x_BL = jax.lax.all_gather(x_BL, context.axis, axis=1, tiled=True)
    if context.runs == 1:
        return x_BL
    x_BZL = x_BL.reshape(x_BL.shape[0], 2 * jax.lax.axis_size(context.axis), -1, *x_BL.shape[2:])
    return jnp.concatenate([x_BZL[:, 0::2], x_BZL[:, :0:-2]], axis=1).reshape(x_BL.shape)


def _gather_fwd(context, x_BL):
    return gather(context, x_BL), None


def _gather_bwd(context, _, d_BL):
    dtype = d_BL.dtype
    d_BL = d_BL.astype(jnp.promote_types(dtype, jnp.float32))
    if context.runs == 2:
        d_BZL = d_BL.reshape(d_BL.shape[0], 2 * jax.lax.axis_size(context.axis), -1, *d_BL.shape[2:])
        early, late = jnp.split(d_BZL, 2, axis=1)
        d_BL = jnp.stack([early, late[:, ::-1]], axis=2).reshape(d_BL.shape)
    return (jax.lax.psum_scatter(d_BL, context.axis, scatter_dimension=1, tiled=True).astype(dtype),)


gather.defvjp(_gather_fwd, _gather_bwd)


def own(context: Context, x_BL):
    """Return this device's tokens of whole rows, in the order in which they lie."""
    length = x_BL.shape[1] // (context.runs * jax.lax.axis_size(context.axis))
    begins = [context.run(place) * length for place in range(context.runs)]
    return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x_BL, begin, length, axis=1) for begin in begins], axis=1)


def whole(context: Context, x_BL):
    """Return all tokens in the order of the row, on every device."""
    (x_BL,) = over(context, lambda x_BL: (gather(context, x_BL),), (x_BL,), (True,), (False,))
    return x_BL


def laid(context: Context, x_BL):
    """Return the tokens of rows that are in order as they lie over the mesh."""
    if context.runs == 1:
        return x_BL
    (x_BL,) = over(context, lambda x_BL: (own(context, x_BL),), (x_BL,), (False,), (True,))
    return x_BL


def in_order(context: Context, x_BL):
    """Return the tokens in the order of the row, split over the mesh as before: each device sends each of its runs."""
    if context.runs == 1:
        return x_BL
    (x_BL,) = over(context, lambda x_BL: (_in_order(context, x_BL),), (x_BL,), (True,), (True,))
    return x_BL


def _in_order(context: Context, x_BL):
    size, z = jax.lax.axis_size(context.axis), jax.lax.axis_index(context.axis)
    early, late = jnp.split(x_BL, 2, axis=1)
    # Of runs z and 2 Z - 1 - z one is even and one odd, and run r goes to device r // 2, where it is first if even.
    odd = z % 2 == 1
    even_run, odd_run = jnp.where(odd, late, early), jnp.where(odd, early, late)
    of_even = [(d, (2 * size - 1 - d if d % 2 else d) // 2) for d in range(size)]
    of_odd = [(d, (d if d % 2 else 2 * size - 1 - d) // 2) for d in range(size)]
    runs = (jax.lax.ppermute(run, context.axis, to) for run, to in ((even_run, of_even), (odd_run, of_odd)))
    return jnp.concatenate(list(runs), axis=1)


def fold(context: Context, tree):
    """(B, L, ...) -> (runs B, L / runs, ...): this device's runs as rows."""

    def folded(x_BL):
        x = x_BL.reshape(x_BL.shape[0], context.runs, -1, *x_BL.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

    return tree if context.runs == 1 else jax.tree.map(folded, tree)


def unfold(context: Context, x_BL):
    """Undo `fold` of an array."""
    return jnp.concatenate(apart(context, x_BL), axis=1)


def apart(context: Context, tree) -> list:
    """Return what belongs to each run, of what `fold` gave or a result of it: arrays that begin with (runs B)."""
    leaves, structure = jax.tree.flatten(tree)
    return [structure.unflatten(parts) for parts in zip(*(jnp.split(x, context.runs) for x in leaves), strict=True)]
