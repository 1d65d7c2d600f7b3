"""The angle before every chunk, in one Pallas Mosaic kernel for TPUs.

phi_t = phi_0 + sum_{s <= t} angle_s dt_s   modulo a turn, from nothing at the start of a document
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.angle import INVERSE_TURN
from pallas_kernels.ssm.mosaic_tpu.angle import advance, grid_of, increments, whole
from pallas_kernels.ssm.mosaic_tpu.contract import Tiles, chunk_of, tokens_last
from pallas_kernels.ssm.mosaic_tpu.tiles import vmem_limit

SIDE_BY_SIDE = 4  # heads


class Refs(NamedTuple):
    """A grid step is a chunk of all heads: planes in the sublanes, tokens or heads in the lanes."""

    angle_BHSL: jax.Array  # the H axis may be 1
    dt_BHL: jax.Array
    first_BSH: jax.Array | None  # turns; None: 0
    document_BCQ: jax.Array | None  # float32; (.., 1, Q)


def starts(angle_BLHS, dt_BLH, first_BHS, document_BL, tiles: Tiles):
    """start_BCHS in turns, in [0, 1), and the last angle_BHS in radians, in [0, 2 pi).

    Args:
        angle_BLHS: radians per unit dt; the H axis may be 1.
        first_BHS: radians; None: 0.
        document_BL: document starts in the chunk up to each token, or None.
    """
    (batch, length, n_heads), (of_heads, planes) = dt_BLH.shape, angle_BLHS.shape[2:]
    tokens = tiles.tokens
    chunks = length // tokens
    document_BCQ = None
    if document_BL is not None:
        document_BCQ = document_BL.astype(jnp.float32).reshape(batch, chunks, 1, tokens)
    refs = Refs(
        tokens_last(angle_BLHS, tokens),
        tokens_last(dt_BLH, tokens),
        None if first_BHS is None else jnp.swapaxes(first_BHS, 1, 2) * INVERSE_TURN,
        document_BCQ,
    )
    of_row = pl.BlockSpec((None, planes, n_heads), lambda b, c: (b, 0, 0))
    specs = Refs(
        chunk_of((of_heads, planes), tokens, lambda b, c: (b, c, (0, 0))),
        chunk_of((n_heads,), tokens, lambda b, c: (b, c, (0,))),
        None if first_BHS is None else of_row,
        None if document_BL is None else pl.BlockSpec((None, None, 1, tokens), lambda b, c: (b, c, 0, 0)),
    )
    out_specs = [pl.BlockSpec((None, None, planes, n_heads), lambda b, c: (b, c, 0, 0)), of_row]
    out_shape = [
        jax.ShapeDtypeStruct((batch, chunks, planes, n_heads), jnp.float32),
        jax.ShapeDtypeStruct((batch, planes, n_heads), jnp.float32),
    ]
    scratch = [pltpu.VMEM((2, planes, n_heads), jnp.float32)]
    between = 4 * 16 * SIDE_BY_SIDE * planes * tokens  # pieces of what is added
    name = "mamba3_tpu_turns"
    limit = vmem_limit(name, tiles, between, (refs, out_shape), (specs, out_specs), scratch)
    start_BCSH, last_BSH = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens),
        grid=(batch, chunks),
        in_specs=(specs,),
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        name=name,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit),
        **({} if tiles.interpret is None else {"interpret": tiles.interpret}),
    )(refs)
    return jnp.swapaxes(start_BCSH, 2, 3), jnp.swapaxes(last_BSH, 1, 2) * (2 * math.pi)


def _kernel(refs: Refs, start_SH, last_SH, turns_2SH, *, tokens: int):
    chunk, step = pl.program_id(1), grid_of(tokens)

    @pl.when(chunk == 0)
    def _():
        if refs.first_BSH is None:
            turns_2SH[...] = jnp.zeros(turns_2SH.shape, jnp.float32)
            return
        coarse_SH = jnp.floor(refs.first_BSH[...] / step + 0.5) * step
        turns_2SH[0], turns_2SH[1] = coarse_SH - jnp.floor(coarse_SH), refs.first_BSH[...] - coarse_SH

    before = turns_2SH[0], turns_2SH[1]
    start_SH[...] = whole(*before)
    later_1Q, left_11 = None, True
    if refs.document_BCQ is not None:
        document_1Q = refs.document_BCQ[...]
        last_11 = document_1Q[:, tokens - 1 :]
        later_1Q, left_11 = document_1Q == last_11, last_11 == 0
    planes, n_heads = start_SH.shape
    head_SH = lax.broadcasted_iota(jnp.int32, (planes, n_heads), 1)

    def add(head, sums):
        angle_SQ = refs.angle_BHSL[head if refs.angle_BHSL.shape[0] > 1 else 0]
        more = increments(angle_SQ, refs.dt_BHL[pl.ds(head, 1)], step)
        if later_1Q is not None:
            more = (jnp.where(later_1Q, x_SQ, 0.0) for x_SQ in more)
        sums_S1 = (jnp.sum(x_SQ, axis=1, keepdims=True) for x_SQ in more)
        return tuple(jnp.where(head_SH == head, x_S1, sum_SH) for x_S1, sum_SH in zip(sums_S1, sums, strict=True))

    side_by_side = math.gcd(n_heads, SIDE_BY_SIDE)

    def add_some(block, sums):
        for head in range(side_by_side):
            sums = add(block * side_by_side + head, sums)
        return sums

    none_SH = jnp.zeros((planes, n_heads), jnp.float32)
    more = lax.fori_loop(0, n_heads // side_by_side, add_some, (none_SH, none_SH))
    turns_2SH[0], turns_2SH[1] = advance(before, more, left_11, step)

    @pl.when(chunk == pl.num_programs(1) - 1)
    def _():
        last_SH[...] = whole(turns_2SH[0], turns_2SH[1])
