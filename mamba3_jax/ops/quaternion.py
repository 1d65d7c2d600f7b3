"""Rotation of every four entries of the state by unit quaternions: rotations that do not commute, like permutations.

    u_t = exp(dt_t axis_t),   P_t = P_{t-1} u_t,   q'_t = P_t q_t,   k'_t = P_t k_t

The op on q' and k', without angles, is the recurrence whose state rotates, where L(u) is the matrix of the product by u
from the left, which multiplies the rows of h:

    h_t = a_t (h_{t-1} + beta_t v_{t-1} k_{t-1}^T) L(u_t) + gamma_t v_t k_t^T,   y_t = h_t q_t

since <P_t q, P_s k> = <q, (u_{s+1} ... u_t)^-1 k>. A running product takes the place of the running sum of angles, and
the kernels need not know of it. The op's state and last key are then in a frame that does not rotate, so only P, of
length 1, is carried beside them. In float32 a query sees a key of n tokens before at most 3e-8 n radians off; this is
reached where every step is the same. Axes that are all multiples of i rotate adjacent pairs, as `rotary` does. S counts
groups of four entries here; entries after the last group do not rotate.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mamba3_jax.ops import context as contexts
from mamba3_jax.ops.context import Context


class Quaternion(NamedTuple):
    """w + x i + y j + z k; the four entries of a group are in this order."""

    w: jax.Array
    x: jax.Array
    y: jax.Array
    z: jax.Array


class Axis(NamedTuple):
    """x i + y j + z k."""

    x: jax.Array
    y: jax.Array
    z: jax.Array


def product(p: Quaternion, q: Quaternion) -> Quaternion:
    """Return p q."""
    return Quaternion(
        w=p.w * q.w - p.x * q.x - p.y * q.y - p.z * q.z,
        x=p.w * q.x + p.x * q.w + p.y * q.z - p.z * q.y,
        y=p.w * q.y - p.x * q.z + p.y * q.w + p.z * q.x,
        z=p.w * q.z + p.x * q.y - p.y * q.x + p.z * q.w,
    )


def unit(p: Quaternion) -> Quaternion:
    """Return p / |p|."""
    scale = jax.lax.rsqrt(sum(jnp.square(part) for part in p))
    return Quaternion(*(part * scale for part in p))


def identity(shape: tuple[int, ...]) -> Quaternion:
    """Return the quaternion 1 in every place: no rotation."""
    nothing = jnp.zeros(shape, jnp.float32)
    return Quaternion(w=nothing + 1, x=nothing, y=nothing, z=nothing)


def axis(theta_BLE: Float[Array, "B L E"]) -> Axis:
    """Return pi tanh(|theta|) theta / |theta|, radians per unit dt; theta's columns are every x, every y, every z."""
    x, y, z = jnp.split(theta_BLE, 3, axis=-1)
    scale = jnp.pi * over_length(jnp.tanh, (1, -1 / 3, 2 / 15), x * x + y * y + z * z)
    return Axis(x=scale * x, y=scale * y, z=scale * z)


def exponential(axis_BLS: Axis, dt_BLH: Float[Array, "B L H"]) -> Quaternion:
    """Return cos(|dt axis|) + sin(|dt axis|) axis / |axis| for each head: entries rotate by |dt axis| radians."""
    x, y, z = (part[:, :, None] * dt_BLH[..., None] for part in axis_BLS)
    square = x * x + y * y + z * z
    near, length = apart(square)
    w = jnp.where(near, 1 - square / 2 + square**2 / 24, jnp.cos(length))
    sinc = over_length(jnp.sin, (1, -1 / 6, 1 / 120), square)
    return Quaternion(w=w, x=sinc * x, y=sinc * y, z=sinc * z)


def over_length(odd, series: tuple[float, float, float], square):
    """Return odd(r) / r at r = sqrt(square), by a series in `square` where r is small: it has a gradient at 0."""
    near, length = apart(square)
    first, second, third = series
    return jnp.where(near, first + square * (second + square * third), odd(length) / length)


def apart(square):
    """Return where `square` is so small that a series is used, and its root, 1 there: a root has no derivative at 0."""
    near = square < 1e-4  # the series' next terms are below 1e-13
    return near, jnp.sqrt(jnp.where(near, 1, square))


class Run(NamedTuple):
    """What a run of tokens does to the running product before it."""

    started_B: jax.Array  # bool: a document starts in the run, so the product before it is dropped
    product_BHS: Quaternion  # of the run's own steps, from the last document start on


def running(
    step: Quaternion,
    before: Quaternion | None,
    start_BL: Bool[Array, "B L"] | None,
    context: Context | None = None,
) -> tuple[Quaternion, Quaternion]:
    """P_t = P_{t-1} u_t, or P_t = u_t at the first token of a document, normalised to length 1.

    Args:
        step: u, parts (B, L, H, S).
        before: P before the first token, parts (B, H, S); None: 1.
        start_BL: true at the first token of a document; None: nowhere.
        context: how the tokens lie over the mesh; None: rows are whole. The product of each run goes to the next one.

    Returns:
        P of every token, and P of the last token.
    """
    if context is None:
        result = _running(step, before, start_BL)
        return result, _last(result)
    if before is None:
        before = identity((step.w.shape[0], *step.w.shape[2:]))
    function = functools.partial(_over_runs, context)
    return contexts.over(context, function, (step, before, start_BL), (True, False, True), (True, False))


def _over_runs(context: Context, step: Quaternion, before: Quaternion, start_BL):
    """Compute `running` of this device's tokens."""
    batch, (step, start_BL) = before.w.shape[0], contexts.fold(context, (step, start_BL))
    started_B = jnp.zeros(step.w.shape[0], bool) if start_BL is None else jnp.any(start_BL, axis=1)
    runs = contexts.apart(context, Run(started_B, _last(_running(step, None, start_BL))))
    befores = contexts.carried(_join, runs, Run(jnp.zeros(batch, bool), before), context)
    before = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(run.product_BHS for run in befores))
    result = _running(step, before, start_BL)
    last = contexts.apart(context, _last(result))[-1]
    result = jax.tree.map(functools.partial(contexts.unfold, context), result)
    return result, contexts.from_one(context.ends(), last, context.axis)


def _join(left: Run, right: Run) -> Run:
    both = unit(product(left.product_BHS, right.product_BHS))
    started_B = right.started_B[:, None, None]
    return Run(left.started_B | right.started_B, chosen(started_B, right.product_BHS, both))


def _last(result: Quaternion) -> Quaternion:
    return jax.tree.map(lambda part_BLHS: part_BLHS[:, -1], result)


def _running(step: Quaternion, before: Quaternion | None, start_BL) -> Quaternion:
    """Compute `running` of whole rows."""
    if start_BL is None:
        result = jax.lax.associative_scan(product, step, axis=1)
    else:

        def join(left, right):
            (left_start, p), (right_start, q) = left, right
            return left_start | right_start, chosen(right_start, q, product(p, q))

        _, result = jax.lax.associative_scan(join, (start_BL[..., None, None], step), axis=1)
    if before is not None:
        continued = product(Quaternion(*(part[:, None] for part in before)), result)
        started = False if start_BL is None else (jnp.cumsum(start_BL, axis=1) > 0)[..., None, None]
        result = chosen(started, result, continued)
    return unit(result)


def chosen(condition, p: Quaternion, q: Quaternion) -> Quaternion:
    """Return p where the condition holds, q elsewhere."""
    return jax.tree.map(lambda of_p, of_q: jnp.where(condition, of_p, of_q), p, q)


def rotate(x_N: Float[Array, "*d N"], p: Quaternion) -> Float[Array, "*d N"]:
    """Return p x for every group of four entries x; entries past the last group pass through.

    Args:
        x_N: keys or queries, any leading axes.
        p: parts (..., S), broadcast against the leading axes of x_N.
    """
    groups = p.w.shape[-1]
    x_NS4, rest_N = x_N[..., : 4 * groups].reshape(*x_N.shape[:-1], groups, 4), x_N[..., 4 * groups :]
    rotated = jnp.stack(product(p, Quaternion(*jnp.unstack(x_NS4, axis=-1))), axis=-1)
    return jnp.concatenate([rotated.reshape(*rotated.shape[:-2], 4 * groups), rest_N], axis=-1)
