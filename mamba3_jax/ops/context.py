"""The length of rows split over a mesh axis (context parallelism): which tokens lie where, and what crosses devices.

A row is cut into runs of equal length. Each device computes the `Transition` of its own run at once with the others, a
prefix scan composes those before it into the state in which its run begins, and the op goes on from there as it does
from any state. So only states cross, and every implementation of the op runs on every device as it is.

The scan takes ceil(log2 Z) rounds over Z devices, in each of which a device sends and holds one transition. An
all-gather would be one round, of Z - 1 transitions that each device receives and holds.

All but `split_over` is for the inside of `jax.shard_map`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.ops.sharded import undivided
from mamba3_jax.ops.ssm import transition
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

    def begins(self, place: int):
        """Tell whether this device has the first of all runs in this place: they go up in place 0 and down in 1."""
        return jax.lax.axis_index(self.axis) == (0 if place == 0 else jax.lax.axis_size(self.axis) - 1)

    def ends(self):
        """Tell whether the last of this device's runs is the row's last."""
        return jax.lax.axis_index(self.axis) == (0 if self.runs == 2 else jax.lax.axis_size(self.axis) - 1)


def split_over(axis: str | None, layout: str, length: int) -> Context | None:
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


def across(op, context: Context, *, rotation: str, chunk: int | None = None):
    """Return `op(tokens, heads, state)` of this device's tokens, as one device computes it of whole rows.

    Costs a pass over the states alone (`ssm.transition`) beside the op's own. The state given and returned is that of
    the whole row, the same on every device.
    """

    def call(tokens: Tokens, heads: Heads, state: State | None = None):
        # A key is rotated in every round, and would be rounded in each.
        wide = lambda of: of._replace(k_BRHN=None if of.k_BRHN is None else of.k_BRHN.astype(accumulator(tokens)))  # noqa: E731
        rows = fold(context, tokens)
        of_rows = transition(rows, heads, rotation=rotation, chunk=chunk)
        runs = apart(context, of_rows._replace(state=wide(of_rows.state)))
        first = empty_state(tokens) if state is None else state
        nothing = jax.tree.map(jnp.zeros_like, runs[0])._replace(state=wide(first))  # leaves it whatever comes before
        join = functools.partial(compose, heads=heads, rotation=rotation)
        befores = [before.state for before in carried(join, runs, nothing, context)]
        before = jax.tree.map(lambda like, *parts: jnp.concatenate(parts).astype(like.dtype), first, *befores)
        y_BLHP, after = op(rows, heads, before)
        return unfold(context, y_BLHP), from_one(context.ends(), apart(context, after)[-1], context.axis)

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
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)


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
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(condition, x, 0), axis), tree)


def where(condition, yes, no):
    """Return one of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


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
