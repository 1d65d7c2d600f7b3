"""Context parallelism, the length of rows split over a mesh axis: which tokens lie where, and what crosses devices.

A row is cut into runs of equal length. All devices compute the `Transition` of their own runs at once; a prefix scan
over devices composes the transitions before a run into the state in which the run begins; from there the op goes on as
from any state. So only states cross devices, and every implementation of the op runs as it is. Kernels that span
devices (`kernels.spans`) do all of this themselves: those for GPUs as they do it over the splits of a row, those for
TPUs by a pass over states before the one that computes outputs.

The scan takes ceil(log2 Z) rounds over Z devices; in each a device sends one transition and holds one. An all-gather
would take one round, in which each device receives and holds Z - 1 transitions.

Call `divide`, `over`, `whole`, `laid` and `in_order` outside of `jax.shard_map`, and all else inside.
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

    contiguous: device z has run z of Z. zigzag: of 2 Z runs device z has run z and then run 2 Z - 1 - z, so that causal
    attention costs every device the same.
    """

    axis: str
    layout: str

    @property
    def runs(self) -> int:
        return RUNS[self.layout]

    def run(self, place: int):
        """Return which of the row's runs this device has in a place: 0, or with zigzag 0 or 1."""
        z = jax.lax.axis_index(self.axis)
        return z if place == 0 else 2 * jax.lax.axis_size(self.axis) - 1 - z

    def begins(self, place: int):
        """Tell whether this device has the first of all runs in a place: they rise with z in place 0 and fall in 1."""
        return jax.lax.axis_index(self.axis) == (0 if place == 0 else jax.lax.axis_size(self.axis) - 1)

    def ends(self):
        """Tell whether the last of this device's runs is the row's last."""
        return jax.lax.axis_index(self.axis) == (0 if self.runs == 2 else jax.lax.axis_size(self.axis) - 1)


def divide(axis: str | None, layout: str, length: int) -> Context | None:
    """Return how rows of `length` lie over an axis of the mesh in context; None: they are whole on every device.

    Rows of fewer tokens than there are runs, as in decoding steps and in `init`, are whole.

    Raises:
        ValueError: an unknown layout, or a longer row that cannot be cut into equal runs.
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
    """Return a function that computes this device's tokens of the rows that `ssm` would compute whole.

    It costs one more pass over the tokens, for states alone: `ssm.transition` in plain XLA, or the kernels' own, which
    GPU kernels make for a row in several splits anyway. The state that the function takes and returns is that of the
    whole row, the same on every device.

    Args:
        op: (tokens, heads, state, along) -> y, state; `ssm`, perhaps with a policy of what backward keeps.
        context: how the tokens lie over the mesh.
        rotation: that of `op`, as are the next two.
        chunk: tokens of a chunk.
        implementation: by its name; None: the default one.
    """

    def call(tokens: Tokens, heads: Heads, state: State | None = None):
        rows = fold(context, tokens)
        y_BLHP, after = run(rows, heads, state)
        return unfold(context, y_BLHP), from_one(context.ends(), apart(context, after)[-1], context.axis)

    def run(rows: Tokens, heads: Heads, state: State | None):
        """Compute this device's runs as rows of their own; `state` is the one before the whole rows."""
        if kernels.spans(implementation or default_implementation(rows), rows):
            from pallas_kernels.ssm.angle import Along

            if state is not None and context.runs == 2:  # late runs begin with what early ones leave
                state = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), state)
            return op(rows, heads, state, Along(context.axis, context.runs == 2))
        return op(rows, heads, begun(rows, heads, state), None)

    def begun(rows: Tokens, heads: Heads, state: State | None) -> State:
        """Return the state in which each run begins."""
        # Every round of the scan rotates keys again, and would round them each time.
        wide = lambda of: of._replace(k_BRHN=None if of.k_BRHN is None else of.k_BRHN.astype(accumulator(rows)))  # noqa: E731
        of_rows = transition(rows, heads, rotation=rotation, chunk=chunk)
        runs = apart(context, of_rows._replace(state=wide(of_rows.state)))
        first = apart(context, empty_state(rows))[0] if state is None else state
        # The transition that forgets what came before and leaves `first`.
        nothing = jax.tree.map(jnp.zeros_like, runs[0])._replace(state=wide(first))
        join = functools.partial(compose, heads=heads, rotation=rotation)
        befores = [before.state for before in carried(join, runs, nothing, context)]
        return jax.tree.map(lambda like, *parts: jnp.concatenate(parts).astype(like.dtype), first, *befores)

    return call


def carried(join: Callable, runs: list, first, context: Context) -> list:
    """Return, for each run of this device, what all runs before it and `first` compose to.

    Args:
        join: (left, right) -> left and then right; associative.
        runs: of this device, trees of arrays.
        first: what comes before the row, in the form of a run; the same on every device.
        context: where the runs lie.
    """
    befores = []
    for place, run in enumerate(runs):
        begins = context.begins(place)
        before, through = prefix(join, where(begins, join(first, run), run), context.axis, backwards=place == 1)
        befores.append(where(begins, first, before))
        first = through  # on the device that has the last run of this place and the first of the next
    return befores


def prefix(join: Callable, run, axis: str, backwards: bool = False):
    """Return what the runs of all devices before this one compose to (zeros on the first one), and with its own run.

    Args:
        join: (left, right) -> left and then right; associative.
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
    if not one_device():  # XLA splits the arrays over other axes too, and would gather them to join them
        return jax.tree.map(send, tree)
    sent, restored = ravel_pytree(tree)  # one message: most parts of a transition are so small that latency counts
    return restored(send(sent))


def shifted(ends: list, first, context: Context) -> list:
    """Return, for each run of this device, the end of the run before it.

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
    """Return, on every device, the tree of the one device on which the condition holds."""

    def summed(x):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # XLA for CPU aborts in a psum of bfloat16
        return jax.lax.psum(jnp.where(condition, wide, 0), axis).astype(x.dtype)

    return jax.tree.map(summed, tree)


def where(condition, yes, no):
    """Return one of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def over(context: Context, function: Callable, arrays: tuple, split: tuple[bool, ...], out_split: tuple[bool, ...]):
    """Return `function(*arrays)`, run by each device on its own tokens. XLA handles the other axes of the mesh.

    Args:
        context: how tokens lie over the mesh.
        function: plain XLA, no kernels; returns a tuple.
        arrays: trees of arrays, or None.
        split: for each of the arrays, whether it is (B, L, ...); the others are whole on every device.
        out_split: the same for each result.
    """
    tokens, whole = Spec(None, context.axis), Spec()
    in_specs, out_specs = (tuple(tokens if yes else whole for yes in which) for which in (split, out_split))
    axes = {context.axis}
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(context: Context, x_BL):
    """Return the tokens of all devices in the order of the row. Their gradients are summed in float32."""
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
    """Return this device's tokens of whole rows, in the order in which they lie on it."""
    length = x_BL.shape[1] // (context.runs * jax.lax.axis_size(context.axis))
    begins = [context.run(place) * length for place in range(context.runs)]
    return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x_BL, begin, length, axis=1) for begin in begins], axis=1)


def whole(context: Context, x_BL):
    """Return all tokens in the order of the row, on every device."""
    (x_BL,) = over(context, lambda x_BL: (gather(context, x_BL),), (x_BL,), (True,), (False,))
    return x_BL


def laid(context: Context, x_BL):
    """Lay rows that are whole and in order over the mesh."""
    if context.runs == 1:
        return x_BL
    (x_BL,) = over(context, lambda x_BL: (own(context, x_BL),), (x_BL,), (False,), (True,))
    return x_BL


def in_order(context: Context, x_BL):
    """Put tokens into the order of the row, still split over the mesh: each device sends each of its runs."""
    if context.runs == 1:
        return x_BL
    (x_BL,) = over(context, lambda x_BL: (_in_order(context, x_BL),), (x_BL,), (True,), (True,))
    return x_BL


def _in_order(context: Context, x_BL):
    size, z = jax.lax.axis_size(context.axis), jax.lax.axis_index(context.axis)
    early, late = jnp.split(x_BL, 2, axis=1)
    # One of runs z and 2 Z - 1 - z is even and the other odd. Run r goes to device r // 2, where an even one is first.
    odd = z % 2 == 1
    even_run, odd_run = jnp.where(odd, late, early), jnp.where(odd, early, late)
    of_even = [(d, (2 * size - 1 - d if d % 2 else d) // 2) for d in range(size)]
    of_odd = [(d, (d if d % 2 else 2 * size - 1 - d) // 2) for d in range(size)]
    runs = (jax.lax.ppermute(run, context.axis, to) for run, to in ((even_run, of_even), (odd_run, of_odd)))
    return jnp.concatenate(list(runs), axis=1)


def fold(context: Context, tree):
    """Make this device's runs rows of their own: (B, L, ...) -> (runs B, L / runs, ...)."""

    def folded(x_BL):
        x = x_BL.reshape(x_BL.shape[0], context.runs, -1, *x_BL.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

    return tree if context.runs == 1 else jax.tree.map(folded, tree)


def unfold(context: Context, x_BL):
    """Undo `fold` of an array."""
    return jnp.concatenate(apart(context, x_BL), axis=1)


def apart(context: Context, tree) -> list:
    """Split arrays whose first axis is (runs B), as `fold` returns them, into those of each run."""
    leaves, structure = jax.tree.flatten(tree)
    return [structure.unflatten(parts) for parts in zip(*(jnp.split(x, context.runs) for x in leaves), strict=True)]
