"""NaN and infinity: which tensors hold them, and null in their place for JSON, which has neither."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.config import listed


def all_finite(*trees) -> jax.Array:
    """Tell whether every number in trees of one structure is finite. A norm is no test: it may overflow if all are.

    Arrays of one shape in the same place of the trees are tested in one expression: XLA then reads what they are
    computed from once.
    """

    def place(*leaves):
        alike = {}
        for leaf in leaves:
            alike.setdefault(leaf.shape, []).append(leaf)
        each = (jnp.all(functools.reduce(jnp.logical_and, map(_finite, group))) for group in alike.values())
        return functools.reduce(jnp.logical_and, each)

    fine = jax.tree.map(place, *trees)
    return jnp.all(jnp.asarray(jax.tree.leaves(fine), bool))


def check_finite(what: str, tree) -> None:
    """Raise ValueError, naming the tensors, unless all numbers of a tree are finite. Arrays are read where they lie.

    Args:
        what: the subject of the error message.
        tree: arrays of numpy, or of jax on one mesh.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    fine = {name: _finite(leaf, np).all() for name, leaf in named.items() if not isinstance(leaf, jax.Array)}
    fine |= jax.device_get(_each_fine({name: leaf for name, leaf in named.items() if name not in fine}))
    if bad := [name for name in named if not fine[name]]:
        raise ValueError(f"{what}: {len(bad)} of {len(named)} tensors hold NaN or infinity: {listed(bad)}")


def _finite(leaf, numpy=jnp):
    return numpy.isfinite(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else numpy.bool_(True)


@jax.jit
def _each_fine(named: dict) -> dict:
    return {name: jnp.all(_finite(leaf)) for name, leaf in named.items()}


def or_null(value):
    """Return a plain value with None in place of every float that is not finite: JSON has null and no NaN."""
    if isinstance(value, dict):
        return {name: or_null(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [or_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
