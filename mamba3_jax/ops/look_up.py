"""Look up rows of a table by their numbers, on a mesh of devices that each have a part of the table."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

from mamba3_jax.ops.sharded import Axes, axes_of, size_of, undivided


class Split(NamedTuple):
    """The mesh axes over which arrays are split; each may be None."""

    batch: Axes = None
    length: Axes = None
    width: str | None = None  # of D; if any, one of the axes of `batch`, whose devices have different rows
    vocab: str | None = None


WHOLE = Split()


def look_up(table_VD, tokens_BL, split: Split = WHOLE):
    """Return x_BLD = table[tokens], NaN for a number past the table.

    XLA would gather the table, or the rows of all devices. Here each device looks up its own part of the table for all
    rows of the devices that share the axis `width` with it. Tokens and looked-up rows cross devices, but not the table.
    In the backward pass the gradients of rows do, and each device's part of the table's gradient, which is summed over
    the other mesh axes.

    Args:
        table_VD: float32.
        tokens_BL: int32, none below 0.
        split: how they lie on the mesh in context (`jax.set_mesh`). Too few rows or tokens to split are left to XLA.
    """
    if undivided(*split) or tokens_BL.shape[0] % size_of(split.batch) or tokens_BL.shape[1] % size_of(split.length):
        return jnp.take(table_VD, tokens_BL, axis=0)
    return _look_up(split, len(table_VD), table_VD, tokens_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(split: Split, entries: int, table_VD, tokens_BL):
    def part(table_VD, tokens_BL):
        places_BL = _places(split, len(table_VD), tokens_BL)
        x_BLD = table_VD.at[places_BL].get(mode="fill", fill_value=0)
        if split.vocab:
            x_BLD = jax.lax.psum(x_BLD, split.vocab)
        if split.width:
            x_BLD = jax.lax.all_to_all(x_BLD, split.width, 0, 2, tiled=True)
        return jnp.where((tokens_BL < entries)[..., None], x_BLD, jnp.nan)

    specs = (Spec(split.vocab, split.width), Spec(split.batch, split.length))
    return jax.shard_map(part, in_specs=specs, out_specs=specs[1], check_vma=False)(table_VD, tokens_BL)


def _places(split: Split, entries: int, tokens_BL):
    """Return the tokens of all rows of the group as places in this device's part of the table, or past it."""
    if split.width:
        tokens_BL = jax.lax.all_gather(tokens_BL, split.width, axis=0, tiled=True)
    places_BL = tokens_BL - (entries * jax.lax.axis_index(split.vocab) if split.vocab else 0)
    return jnp.where(places_BL >= 0, places_BL, entries)


def _forward(split: Split, entries: int, table_VD, tokens_BL):
    return _look_up(split, entries, table_VD, tokens_BL), (table_VD, tokens_BL)


def _backward(split: Split, entries: int, inputs, dx_BLD):
    def part(table_VD, tokens_BL, dx_BLD):
        if split.width:
            dx_BLD = jax.lax.all_to_all(dx_BLD, split.width, 2, 0, tiled=True)
        places_BL = _places(split, len(table_VD), tokens_BL)
        dtable_VD = jnp.zeros_like(table_VD).at[places_BL].add(dx_BLD, mode="drop")
        others = tuple(axis for axis in (*axes_of(split.batch), *axes_of(split.length)) if axis != split.width)
        return jax.lax.psum(dtable_VD, others) if others else dtable_VD

    by_token, of_table = Spec(split.batch, split.length), Spec(split.vocab, split.width)
    run = jax.shard_map(part, in_specs=(of_table, by_token, by_token), out_specs=of_table, check_vma=False)
    return run(*inputs, dx_BLD), None


_look_up.defvjp(_forward, _backward)
