"""Data-dependent rotation (paper propositions 2 to 4): which entries form a rotary pair (a plane), and how it rotates.

Rotation works on entries in plane order: the first entry of every plane, then the second entry of every plane, then the
entries that do not rotate. Products of queries and keys do not depend on the order, and every backend is fast at
contiguous blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ROTATIONS = ("adjacent", "half")


def to_planes(x_N, planes: int, rotation: str):
    """Put entries from natural order into plane order.

    adjacent (SISO): plane i is (2i, 2i+1).  half (MIMO): plane i is (i, i + N/2), whatever the rope fraction is.
    """
    if not planes:
        return x_N
    if rotation == "adjacent":
        return jnp.concatenate(
            [x_N[..., 0 : 2 * planes : 2], x_N[..., 1 : 2 * planes : 2], x_N[..., 2 * planes :]], axis=-1
        )
    low, high = jnp.split(x_N, 2, axis=-1)
    return jnp.concatenate([low[..., :planes], high[..., :planes], low[..., planes:], high[..., planes:]], axis=-1)


def from_planes(x_N, planes: int, rotation: str):
    """Put entries from plane order into natural order."""
    if not planes:
        return x_N
    first, second, rest = jnp.split(x_N, (planes, 2 * planes), axis=-1)
    if rotation == "adjacent":
        pairs = jnp.stack([first, second], axis=-1).reshape(*x_N.shape[:-1], 2 * planes)
        return jnp.concatenate([pairs, rest], axis=-1)
    low, high = jnp.split(rest, 2, axis=-1)
    return jnp.concatenate([first, low, second, high], axis=-1)


def partner(x_N, planes: int):
    """Swap, in plane order, the two entries of every plane; entries that do not rotate stay."""
    first, second, rest = jnp.split(x_N, (planes, 2 * planes), axis=-1)
    return jnp.concatenate([second, first, rest], axis=-1)


def sin_cos(sin_S, cos_S, d_state: int):
    """Return sin_N and cos_N, in plane order, such that x cos_N + partner(x) sin_N is x rotated."""
    still = jnp.zeros((*sin_S.shape[:-1], d_state - 2 * sin_S.shape[-1]), sin_S.dtype)
    return jnp.concatenate([-sin_S, sin_S, still], axis=-1), jnp.concatenate([cos_S, cos_S, still + 1], axis=-1)


def rotate(x_N: Float[Array, "*d N"], angle_S: Float[Array, "*e S"], rotation: str) -> Float[Array, "*d N"]:
    """(u, v) -> (u cos - v sin, u sin + v cos) in every plane; entries outside the planes pass through.

    Args:
        x_N: keys or queries in natural order, any leading axes.
        angle_S: the cumulative angle in radians, broadcast against the leading axes of x_N.
        rotation: "adjacent" or "half", see `to_planes`.
    """
    planes = angle_S.shape[-1]
    x_N = to_planes(x_N, planes, rotation)
    sin_N, cos_N = sin_cos(*jax.lax.optimization_barrier((jnp.sin(angle_S), jnp.cos(angle_S))), x_N.shape[-1])
    return from_planes(x_N * cos_N + partner(x_N, planes) * sin_N, planes, rotation)
