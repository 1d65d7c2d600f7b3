"""The cumulative angle in turns: exact increments and sums, sines, and the kernel of the angle before every chunk.

    phi_t = phi_0 + sum_{s <= t} angle_s dt_s   modulo a turn, from nothing at the start of a document

Multiples of a power of two add up exactly in float32, in any order, while the sum is below 2^24 of them; modulo a turn
it stays small. So every increment angle dt is cut into such a multiple and a small rest, and the two are summed apart.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.angle import (
    INVERSE_TURN,
    INVERSE_TURN_PIECES,
    Along,
    before_device,
    head,
    to_radians,
    to_turns,
)
from pallas_kernels.ssm.mosaic_tpu.config import Tiles, vmem_limit
from pallas_kernels.ssm.mosaic_tpu.grid import chunk_of, present

SIDE_BY_SIDE = 4  # heads


class AngleRefs(NamedTuple):
    """What a grid step, a chunk of all heads, reads: rotary pairs in the sublanes, tokens or heads in the lanes."""

    angle_BHSL: jax.Array  # the H axis may be 1
    dt_BHL: jax.Array
    first_BSH: jax.Array | None  # turns; None: 0
    document_BC1Q: jax.Array | None  # float32; (.., 1, Q)


def angle_before_chunks(angle_BHSL, dt_BHL, first_BHS, *, document_BC1Q, tiles: Tiles, along: Along | None = None):
    """Return start_BCHS in turns, in [0, 1), and the last angle_BHS in radians, in [0, 2 pi).

    Args:
        angle_BHSL: radians per unit dt; the H axis may be 1. Its tokens, and those of dt, as `tokens_last` has them.
        first_BHS: radians; None: 0.
        document_BC1Q: document starts in the chunk up to each token, or None.
        along: how rows go on over devices, `first` before the row's first run and 0 before the others.
    """
    tokens, (of_heads, pairs) = tiles.tokens, angle_BHSL.shape[-3:-1]
    batch, n_heads = dt_BHL.shape[0], dt_BHL.shape[-2]
    chunks = dt_BHL.size // (batch * n_heads * tokens)
    refs = AngleRefs(
        angle_BHSL=angle_BHSL,
        dt_BHL=dt_BHL,
        first_BSH=None if first_BHS is None else jnp.swapaxes(first_BHS, 1, 2) * INVERSE_TURN,
        document_BC1Q=document_BC1Q,
    )
    of_row = pl.BlockSpec((None, pairs, n_heads), lambda b, c: (b, 0, 0))
    specs = AngleRefs(
        angle_BHSL=chunk_of((of_heads, pairs), tokens, lambda b, c: (b, c, (0, 0))),
        dt_BHL=chunk_of((n_heads,), tokens, lambda b, c: (b, c, (0,))),
        first_BSH=of_row,
        document_BC1Q=pl.BlockSpec((None, None, 1, tokens), lambda b, c: (b, c, 0, 0)),
    )
    specs = present(specs, refs)
    out_specs = [pl.BlockSpec((None, None, pairs, n_heads), lambda b, c: (b, c, 0, 0)), of_row]
    out_shape = [
        jax.ShapeDtypeStruct((batch, chunks, pairs, n_heads), jnp.float32),
        jax.ShapeDtypeStruct((batch, pairs, n_heads), jnp.int32),
    ]
    scratch = [pltpu.VMEM((2, pairs, n_heads), jnp.float32)]
    intermediates = 4 * 16 * SIDE_BY_SIDE * pairs * tokens  # pieces of what is added
    name = "mamba3_tpu_turns"
    held = {"arrays": (refs, out_shape), "specs": (specs, out_specs), "scratch": scratch}
    limit = vmem_limit(name, tiles, intermediates, **held)
    start_BCSH, last_BSH = pl.pallas_call(
        functools.partial(_angle_kernel, tokens=tokens),
        grid=(batch, chunks),
        in_specs=(specs,),
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        name=name,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit),
        **({} if tiles.interpret is None else {"interpret": tiles.interpret}),
    )(refs)
    start_BCHS, last_BHS = jnp.swapaxes(start_BCSH, 2, 3), jnp.swapaxes(last_BSH, 1, 2)
    if along is not None:
        start_BCHS, last_BHS = _over_devices(start_BCHS, last_BHS, document_BC1Q, along)
    return start_BCHS, to_radians(last_BHS)


def _over_devices(start_BCHS, last_BHS, document_BC1Q, along: Along):
    """Add the angle before this run to its own; exactly to the last one, which is a 32-bit fraction of a turn."""
    reached_BC = jnp.ones((start_BCHS.shape[0], start_BCHS.shape[1] + 1), bool)  # and after the last
    if document_BC1Q is not None:
        begun_BC = jnp.cumsum(document_BC1Q[:, :, 0, -1], axis=1)
        reached_BC = jnp.pad(begun_BC, ((0, 0), (1, 0))) == 0
    first_BHS = before_device(reached_BC[:, -1].astype(jnp.int32), last_BHS, along)
    start_BCHS += jnp.where(reached_BC[:, :-1, None, None], to_turns(first_BHS)[:, None], 0.0)
    last_BHS += jnp.where(reached_BC[:, -1:, None], first_BHS, 0)
    return start_BCHS - jnp.floor(start_BCHS), last_BHS


def _angle_kernel(refs: AngleRefs, start_SH, last_SH, turns_2SH, *, tokens: int):
    chunk, step = pl.program_id(1), _exact_step(tokens)

    @pl.when(chunk == 0)
    def _():
        if refs.first_BSH is None:
            turns_2SH[...] = jnp.zeros(turns_2SH.shape, jnp.float32)
            return
        coarse_SH = jnp.floor(refs.first_BSH[...] / step + 0.5) * step
        turns_2SH[0], turns_2SH[1] = coarse_SH - jnp.floor(coarse_SH), refs.first_BSH[...] - coarse_SH

    before = turns_2SH[0], turns_2SH[1]
    start_SH[...] = _fraction(*before)
    same_1Q, none_11 = None, True  # tokens of the last document; whether none starts in the chunk
    if refs.document_BC1Q is not None:
        document_1Q = refs.document_BC1Q[...]
        last_11 = document_1Q[:, tokens - 1 :]
        same_1Q, none_11 = document_1Q == last_11, last_11 == 0
    pairs, n_heads = start_SH.shape
    head_SH = lax.broadcasted_iota(jnp.int32, (pairs, n_heads), 1)

    def add(index, sums):
        angle_SQ = refs.angle_BHSL[index if refs.angle_BHSL.shape[0] > 1 else 0]
        more = increments(angle_SQ, refs.dt_BHL[pl.ds(index, 1)], step)
        if same_1Q is not None:
            more = (jnp.where(same_1Q, x_SQ, 0.0) for x_SQ in more)
        sums_S1 = (jnp.sum(x_SQ, axis=1, keepdims=True) for x_SQ in more)
        return tuple(jnp.where(head_SH == index, x_S1, sum_SH) for x_S1, sum_SH in zip(sums_S1, sums, strict=True))

    side_by_side = math.gcd(n_heads, SIDE_BY_SIDE)

    def add_some(block, sums):
        for place in range(side_by_side):
            sums = add(block * side_by_side + place, sums)
        return sums

    zeros_SH = jnp.zeros((pairs, n_heads), jnp.float32)
    more = lax.fori_loop(0, n_heads // side_by_side, add_some, (zeros_SH, zeros_SH))
    turns_2SH[0], turns_2SH[1] = _advance(before, more, none_11, step)

    @pl.when(chunk == pl.num_programs(1) - 1)
    def _():
        exact_SH, rest_SH = turns_2SH[0] * 2.0**31, jnp.floor(turns_2SH[1] * 2.0**32 + 0.5)
        last_SH[...] = 2 * exact_SH.astype(jnp.int32) + rest_SH.astype(jnp.int32)


def _advance(before, more, continues, step: float):
    """Return (exact, rest) of an angle in turns plus `more`; where the document does not continue, of `more` alone."""
    exact, rest = (jnp.where(continues, x, 0.0) + added for x, added in zip(before, more, strict=True))
    moved = jnp.floor(rest / step + 0.5) * step
    exact += moved
    return exact - jnp.floor(exact), rest - moved


def _fraction(exact, rest):
    """Return exact + rest modulo a turn, in [0, 1)."""
    turns = exact + rest
    for _ in range(2):  # a tiny negative rest rounds up to a whole turn, which is zero
        turns -= jnp.floor(turns)
    return turns


def _exact_step(tokens: int) -> float:
    """Return the power of two whose multiples add up exactly over a chunk."""
    return 2.0 ** (math.ceil(math.log2(tokens / 2 + 2)) - 24)


def sincos_of(turns, rest):
    """Return sine and cosine of turns + rest: an eighth of a turn around each quarter is a short polynomial."""
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
    """Return angle dt / (2 pi), modulo 1, as a multiple of `step` and a rest below it, together good to about 2^-40.

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
