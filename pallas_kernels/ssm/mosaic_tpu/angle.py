"""The cumulative angle in turns: exact increments and sums, sine and cosine.

Multiples of a power of two add up exactly in float32 below 2^24 of them, in any order; modulo a turn nothing grows. So
every increment angle dt is such a multiple and a small rest, summed apart.
"""

import math

import jax.numpy as jnp

from pallas_kernels.ssm.angle import INVERSE_TURN_PIECES, head


def advance(before, more, left, step: float):
    """(exact, rest) of an angle in turns, moved on by `more`, from nothing where not `left`."""
    exact, rest = (jnp.where(left, x, 0.0) + added for x, added in zip(before, more, strict=True))
    moved = jnp.floor(rest / step + 0.5) * step
    exact += moved
    return exact - jnp.floor(exact), rest - moved


def whole(exact, rest):
    """Their sum in [0, 1)."""
    turns = exact + rest
    for _ in range(2):  # a tiny negative rest rounds up to a whole turn, which is zero
        turns -= jnp.floor(turns)
    return turns


def grid_of(tokens: int) -> float:
    """The power of two whose multiples add up exactly over a chunk."""
    return 2.0 ** (math.ceil(math.log2(tokens / 2 + 2)) - 24)


def sincos_of(turns, rest):
    """Of turns + rest, turns: an eighth of a turn around each quarter is a short polynomial."""
    quarter = jnp.floor(4 * turns + 0.5)
    offset = (turns - quarter / 4) + rest
    square = offset * offset
    sin, cos = offset * _polynomial(_SIN, square), _polynomial(_COS, square)
    quarter = quarter.astype(jnp.int32) & 3
    odd = (quarter & 1) == 1
    sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, sin, cos)
    return jnp.where(quarter >= 2, -sin, sin), jnp.where((quarter == 1) | (quarter == 2), -cos, cos)


# sin(2 pi r) / r and cos(2 pi r) in powers of r^2, highest first, minimax over |r| <= 1/8 (mamba3_jax/ops/angle.py).
_SIN = (-75.402067876577, 81.592553539954, -41.341662633064, 6.283185287867)
_COS = (59.220407246083, -85.442852120153, 64.939316208438, -19.739208650358, 0.999999999953)


def _polynomial(coefficients, x):
    sum_ = coefficients[0]
    for coefficient in coefficients[1:]:
        sum_ = sum_ * x + coefficient
    return sum_


def increments(angle, dt, step: float):
    """angle dt / (2 pi), modulo 1, as a multiple of `step` and a rest below it, together good to about 2^-40.

    A float32 product alone would be off by 2^-25 of itself, the same way at every token of a constant input. Products
    of two 12-bit pieces are exact, whether a compiler fuses them with a sum or not.
    """
    angle_head = head(angle)
    angle_tail = angle - angle_head
    constant_head, constant_middle, constant_tail = INVERSE_TURN_PIECES
    first, second, third = angle_head * constant_head, angle_tail * constant_head, angle_head * constant_middle
    pieces = [head(first), first - head(first), head(second), head(third)]
    tail = (second - pieces[2]) + (third - pieces[3]) + (angle_tail * constant_middle + angle * constant_tail)
    dt_head = head(dt)
    dt_tail = dt - dt_head
    exact = 0.0
    rest = tail * dt + (pieces[1] + pieces[2] + pieces[3]) * dt_tail
    for term in [piece * dt_head for piece in pieces] + [pieces[0] * dt_tail]:
        coarse = jnp.floor(term / step + 0.5) * step
        exact += coarse - jnp.floor(coarse + 0.5)
        rest += term - coarse
    fine = jnp.floor(rest / step + 0.5) * step
    return exact - jnp.floor(exact + 0.5) + fine, rest - fine
