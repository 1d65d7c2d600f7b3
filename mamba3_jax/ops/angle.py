"""The cumulative angle, accumulated in turns so that a million tokens cost no precision.

A turn is 2 pi. Modulo one turn nothing grows, and multiples of a fixed `grid` (a power of two) add up exactly in
float32, in any order and on any hardware, as long as the sum stays below 2^24 grid steps. So every increment is split
into a multiple of the grid and a small rest. The two are summed apart, and the sum on the grid is exact.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

INVERSE_TURN = 1 / (2 * math.pi)


class Turns(NamedTuple):
    """An angle / (2 pi) modulo 1, as exact + rest: exact is a multiple of the grid in [0, 1), |rest| about a grid step.

    `rest` carries all of the derivative; `exact` is piecewise constant.
    """

    exact_BHS: jax.Array
    rest_BHS: jax.Array


def grid(tokens: int) -> float:
    """Return the grid on which `tokens` increments of up to half a turn, and a carried turn, sum exactly in float32."""
    return 2.0 ** (math.ceil(math.log2(tokens / 2 + 2)) - 24)


def from_radians(angle_BHS, step: float) -> Turns:
    turns_BHS = angle_BHS * INVERSE_TURN
    exact_BHS = jax.lax.stop_gradient(jnp.round(turns_BHS / step) * step)
    return Turns(exact_BHS - jnp.floor(exact_BHS), turns_BHS - exact_BHS)


def to_radians(turns: Turns):
    """Return the angle in radians, in [0, 2 pi)."""
    fraction_BHS = turns.exact_BHS + turns.rest_BHS
    for _ in range(2):  # a tiny negative fraction rounds up to a whole turn, so it takes a second pass to become 0
        fraction_BHS -= jax.lax.stop_gradient(jnp.floor(fraction_BHS))
    return fraction_BHS * (2 * math.pi)


def advance(turns: Turns, angle_BHQS, dt_BHQ, within_BQQ, carried_BQ, step: float) -> tuple[Turns, Turns]:
    """phi_t = phi_0 + sum_{s <= t} angle_s dt_s over a chunk; the sum begins again from zero at every document.

    Args:
        turns: the angle before the chunk.
        angle_BHQS: radians per unit dt (the H axis may be 1).
        within_BQQ: bool: token s (last axis) is not after t and is in t's document; the B axis may be 1.
        carried_BQ: bool: no document starts between `turns` and the token; None: everywhere.
        step: `grid(Q)`.

    Returns:
        phi as `Turns` of (B, H, Q, S), and the turns after the last token.
    """
    exact_BHQS, rest_BHQS = increments(angle_BHQS, dt_BHQ[..., None], step)
    mask_BQQ = within_BQQ.astype(rest_BHQS.dtype)

    def accumulate(carry_BHS, more_BHQS):
        carry_BHQS = carry_BHS[:, :, None]
        if carried_BQ is not None:
            carry_BHQS = jnp.where(carried_BQ[:, None, :, None], carry_BHQS, 0)
        mask_BHQQ = jnp.broadcast_to(mask_BQQ[:, None], (*more_BHQS.shape[:3], more_BHQS.shape[2]))
        return carry_BHQS + jnp.einsum("bhts,bhsp->bhtp", mask_BHQQ, more_BHQS, precision="highest")

    exact_BHQS = accumulate(turns.exact_BHS, jax.lax.stop_gradient(exact_BHQS))
    rest_BHQS = accumulate(turns.rest_BHS, rest_BHQS)
    exact_BHQS -= jnp.floor(exact_BHQS)

    moved_BHS = jax.lax.stop_gradient(jnp.round(rest_BHQS[:, :, -1] / step) * step)
    exact_BHS = exact_BHQS[:, :, -1] + moved_BHS
    return Turns(exact_BHQS, rest_BHQS), Turns(exact_BHS - jnp.floor(exact_BHS), rest_BHQS[:, :, -1] - moved_BHS)


@jax.custom_jvp
def sincos(turns: Turns):
    """Return sin and cos of an angle given in turns, to 2e-7 in float32.

    Within an eighth of a turn of each quarter they are short polynomials (fitted to 3e-9 and 5e-11). The backends' own
    sine and cosine each reduce an arbitrary number of radians instead, which costs several times as much.
    """
    exact, rest = turns
    if exact.dtype == jnp.float64:
        radians = (exact + rest) * (2 * math.pi)
        return jnp.sin(radians), jnp.cos(radians)
    quarter = jnp.round(4 * exact)
    offset = (exact - quarter / 4) + rest
    square = offset * offset
    sin, cos = offset * _polynomial(_SIN, square), _polynomial(_COS, square)
    quarter = quarter - 4 * jnp.floor(quarter / 4)
    odd = (quarter == 1) | (quarter == 3)
    sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, sin, cos)
    return jnp.where(quarter >= 2, -sin, sin), jnp.where((quarter == 1) | (quarter == 2), -cos, cos)


@sincos.defjvp
def _sincos_jvp(primals, tangents):
    sin, cos = sincos(*primals)
    d_radians = (tangents[0][0] + tangents[0][1]) * (2 * math.pi)
    return (sin, cos), (cos * d_radians, -sin * d_radians)


# sin(2 pi r) / r and cos(2 pi r) in powers of r^2, highest first, minimax over |r| <= 1/8.
_SIN = (-75.402067876577, 81.592553539954, -41.341662633064, 6.283185287867)
_COS = (59.220407246083, -85.442852120153, 64.939316208438, -19.739208650358, 0.999999999953)


def _polynomial(coefficients: tuple[float, ...], x):
    """Evaluate a polynomial by Horner's scheme; coefficients come highest power first."""
    return functools.reduce(lambda sum_, coefficient: sum_ * x + coefficient, coefficients, jnp.zeros_like(x))


def increments(angle: Float[Array, "..."], dt: Float[Array, "..."], step: float):
    """Return angle dt / (2 pi) modulo 1 as a multiple of `step` and a rest below it, together good to about 2^-40.

    A float32 product alone would be off by 2^-25 of itself, in the same direction at every token of a constant input:
    by 1e-2 rad after a million tokens. float64 needs none of this and returns (0, the product).
    """
    return _increments(angle, dt, step)


@jax.custom_jvp
def _increments(angle, dt, step):
    if jnp.promote_types(angle.dtype, dt.dtype) == jnp.float64:
        product = angle * dt * INVERSE_TURN
        return jnp.zeros_like(product), product
    # Products of two 12-bit pieces are exact in float32, so a compiler that fuses multiply and add changes nothing.
    # First, write angle / (2 pi) as a sum of such pieces, the largest first, and a tail below 2^-24 of it.
    angle_head = _head(angle)
    angle_tail = angle - angle_head
    constant_head, constant_middle, constant_tail = _INVERSE_TURN_PIECES
    first, second, third = angle_head * constant_head, angle_tail * constant_head, angle_head * constant_middle
    pieces = [_head(first), first - _head(first), _head(second), _head(third)]
    tail = (second - pieces[2]) + (third - pieces[3]) + (angle_tail * constant_middle + angle * constant_tail)

    # Then multiply by dt: each large term is split exactly into its part on the grid and the rest.
    dt_head = _head(dt)
    dt_tail = dt - dt_head
    exact = 0
    rest = tail * dt + (pieces[1] + pieces[2] + pieces[3]) * dt_tail
    for term in [piece * dt_head for piece in pieces] + [pieces[0] * dt_tail]:
        coarse = jnp.round(term / step) * step
        exact += coarse - jnp.round(coarse)
        rest += term - coarse
    fine = jnp.round(rest / step) * step
    return exact - jnp.round(exact) + fine, rest - fine


@_increments.defjvp
def _increments_jvp(primals, tangents):
    (angle, dt, step), (d_angle, d_dt, _) = primals, tangents
    exact, rest = _increments(angle, dt, step)
    return (exact, rest), (jnp.zeros_like(exact), (d_angle * dt + angle * d_dt) * INVERSE_TURN)


def _head(x):
    """Return the leading 12 bits of a float32's significand; x - _head(x) is exact and has the other 12."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFF000), jnp.float32)


def _pieces(value: float) -> tuple[float, float, float]:
    """Split value = a + b + c, where a and b have 12 bits each."""
    scale = 2.0 ** (12 - math.frexp(value)[1])
    first = math.floor(value * scale) / scale
    second = math.floor((value - first) * scale * 4096) / (scale * 4096)
    return first, second, value - first - second


_INVERSE_TURN_PIECES = _pieces(INVERSE_TURN)
