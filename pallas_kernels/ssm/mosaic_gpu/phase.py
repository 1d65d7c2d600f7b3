"""The cumulative angle of every token and head, for `scan_fwd`: phi_t = phi_{t-1} + angle_t dt_t, in 2^-16 turns.

Two kernels: `sums` adds up the increments of every chunk to 2^-47 of themselves, `phase` the tokens of a chunk to 2^-24
from where plain XLA says that the chunk starts. Sums are of 32-bit fractions of a turn, exact in any order, and are
rounded at the end: to 5e-5 rad, where bfloat16 queries and keys have 2e-3 of themselves.

A thread has all tokens of a rotary pair of one head, so sums over tokens stay in its registers, see `layout_of`. A
program has a chunk of a block of heads, as many at a time as there are warps for.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.angle import (
    INVERSE_TURN,
    Along,
    before_chunks,
    head,
    rounded,
    to_fraction,
    to_radians,
    turns_in_pieces,
)
from pallas_kernels.ssm.mosaic_gpu.tiles import LANES, WARPS, call, fragments, load
from pallas_kernels.ssm.operands import documents_in_chunks

CHUNK = 32  # tokens at most, whose multiples of `COARSE` still add up exactly
COARSE = 2.0**-18  # of which 96 numbers below 1/2 add up exactly in float32
BLOCK = 32  # heads of a program, at most
COPIED = 128  # bytes of which the copy engine takes multiples
PROGRAMS = 1024  # that are enough to take more heads each


class Grid:
    """How tokens and heads are cut for the kernels over angles: chunks, blocks of heads, heads at a time."""

    def __init__(self, angle_BELS, dt_BHL, splits: int = 1):
        self.batch, self.heads, length = dt_BHL.shape
        self.pairs, self.shared_angle = angle_BELS.shape[-1], angle_BELS.shape[1] == 1
        self.tokens = math.gcd(length // splits, CHUNK)  # no chunk lies in two splits
        self.chunks = length // self.tokens
        self.at_once = math.gcd(self.heads, 4)
        most = max(1, self.batch * self.chunks * self.heads // PROGRAMS) if self.shared_angle else 1
        sizes = [size for size in (1, 2, 4, 8, 16, 32) if self.heads % (size * self.at_once) == 0]
        self.groups = max(size for size in sizes if size == 1 or size * self.at_once <= min(BLOCK, most))
        self.block = self.groups * self.at_once
        self.layout = layout_of(self.at_once, self.pairs)

    @property
    def programs(self) -> dict[str, int]:
        """Return the grid."""
        return {"batch": self.batch, "chunk": self.chunks, "block": self.heads // self.block}

    def of_angle(self):
        """Return the shared memory of a chunk's angles."""
        return plgpu.SMEM((1 if self.shared_angle else self.block, self.tokens, self.pairs), jnp.float32)

    def arrived(self):
        """Return the barrier of `AngleProgram.load`."""
        return plgpu.Barrier(num_arrivals=1 + (self.of_dt() is not None))

    def of_dt(self):
        """Return the shared memory of a block's dt; None where it is too small for the copy engine."""
        if self.block * self.tokens * 4 % COPIED:
            return None
        return plgpu.SMEM((self.block, self.tokens), jnp.float32)


class AngleRefs(NamedTuple):
    """What the kernels over angles read; None: absent, or not read by this kernel."""

    angle_BELS: jax.Array
    dt_BHL: jax.Array
    start_BHCS: jax.Array | None = None  # the angle before every chunk, 32-bit
    dphi_q_BHLS: jax.Array | None = None  # the gradient of the angle at each token, its two parts
    dphi_k_BHLS: jax.Array | None = None
    goes_on_BL: jax.Array | None = None  # int32, 0 where a document starts; of gradients, where the next token does
    counts_BL: jax.Array | None = None  # int32, 0 where a later document starts in the chunk; of gradients, an earlier


class AngleProgram:
    """Which part of the arrays one program works on."""

    def __init__(self, grid: Grid, interpret):
        self.grid, self.interpret = grid, interpret is not None
        self.b, self.c, block = (lax.axis_index(name) for name in ("batch", "chunk", "block"))
        self.heads = pl.ds(block * grid.block, grid.block)
        self.tokens = pl.ds(self.c * grid.tokens, grid.tokens)
        self.angle_heads = pl.ds(0, 1) if grid.shared_angle else self.heads
        self.shape = (grid.at_once, grid.tokens, grid.pairs)

    def load(self, refs: AngleRefs, to_ETS, to_HT, arrived):
        """Copy the block's angles and dt, where that fits, and return where to read dt."""
        plgpu.copy_gmem_to_smem(refs.angle_BELS.at[self.b, self.angle_heads, self.tokens], to_ETS, arrived)
        from_HT = refs.dt_BHL.at[self.b, self.heads, self.tokens]
        if to_HT is not None:
            plgpu.copy_gmem_to_smem(from_HT, to_HT, arrived)
        plgpu.barrier_wait(arrived)
        return from_HT if to_HT is None else to_HT

    def at_once(self, group):
        """Return the heads of a group, as the block counts them."""
        return pl.ds(group * self.grid.at_once, self.grid.at_once)

    def of_heads(self, group):
        """Return the heads of a group, as the arrays count them."""
        return pl.ds(self.heads.start + group * self.grid.at_once, self.grid.at_once)

    def over_pairs(self, ref_HT, group):
        """Load one number a token and head."""
        x_HT = load(ref_HT.at[self.at_once(group)], self.grid.layout.reduce(2), self.interpret, optimized=False)
        return self.laid_out(x_HT, 0, 1)

    def over_heads(self, ref_T):
        """Load one number a token."""
        layout = self.grid.layout.reduce((0, 2))
        return self.laid_out(load(ref_T, layout, self.interpret, optimized=False), 1)

    def angle(self, ref_ETS, group):
        """Load the angles of a group of heads, which may share them."""
        layout = self.grid.layout
        if not self.grid.shared_angle:
            return load(ref_ETS.at[self.at_once(group)], layout, self.interpret, optimized=False)
        return self.laid_out(load(ref_ETS.at[0], layout.reduce(0), self.interpret, optimized=False), 1, 2)

    def laid_out(self, x, *dimensions):
        """Broadcasts x, whose axes these are, over a group of heads, its tokens and its pairs."""
        x = lax.broadcast_in_dim(x, self.shape, dimensions)
        return x if self.interpret else plgpu.layout_cast(x, self.grid.layout)


def phase(*, angle_BLHS, dt_BHL, first_BHS, document_BL, interpret, along: Along | None = None):
    """Return phase_BHLS, int16, and the last angle in radians, in [0, 2 pi).

    Args:
        angle_BLHS: radians per unit dt; the H axis may be 1.
        first_BHS: radians: the angle before the row.
        document_BL: document starts in the row up to each token; None: one document.
        interpret: see `tiles.call`.
        along: see `before_chunks`.
    """
    angle_BELS = jnp.swapaxes(angle_BLHS, 1, 2)
    grid = Grid(angle_BELS, dt_BHL)
    document_BL, goes_on_BL, in_last_BL = documents_in_chunks(document_BL, grid.tokens), None, None
    if document_BL is not None:
        document_BCQ = document_BL.reshape(grid.batch, grid.chunks, -1)
        flags = jnp.diff(document_BCQ, axis=2, prepend=0) == 0, document_BCQ == document_BCQ[:, :, -1:]
        goes_on_BL, in_last_BL = (x.reshape(document_BL.shape).astype(jnp.int32) for x in flags)
    sum_BHCS = _sums(grid, angle_BELS, dt_BHL, in_last_BL=in_last_BL, interpret=interpret)
    start_BHCS, last_BHS = before_chunks(sum_BHCS, to_fraction(first_BHS), document_BL, along)
    phase_BHLS = _phase(grid, angle_BELS, dt_BHL, start_BHCS, goes_on_BL=goes_on_BL, interpret=interpret)
    return phase_BHLS, to_radians(last_BHS)


class Pieces(NamedTuple):
    """A chunk's angles in turns, in pieces: see `turns_in_pieces`."""

    head_ETS: jax.Array
    middle_ETS: jax.Array
    tail_ETS: jax.Array


def _sums(grid: Grid, angle_BELS, dt_BHL, *, in_last_BL, interpret):
    """Return the sum of angle dt over every chunk (over its last document's tokens), to 2^-47 of itself, 32-bit.

    A float32 product would be off by 2^-25 of itself, the same way at every token of a constant input: 1e-2 rad after a
    million tokens.
    """
    operands = AngleRefs(angle_BELS=angle_BELS, dt_BHL=dt_BHL, counts_BL=in_last_BL)
    pieces = Pieces(**dict.fromkeys(Pieces._fields, grid.of_angle()))

    def kernel(refs: AngleRefs, out_BHCS, pieces: Pieces, of_dt_HT, arrived):
        program = AngleProgram(grid, interpret)
        b, tokens = program.b, program.tokens
        dt_HT = program.load(refs, pieces.tail_ETS, of_dt_HT, arrived)
        in_last_T = None if refs.counts_BL is None else refs.counts_BL.at[b, tokens]
        # Every thread replaces the angles that it read itself.
        for to_ETS, piece_ETS in zip(pieces, turns_in_pieces(pieces.tail_ETS[...]), strict=True):
            to_ETS[...] = piece_ETS
        plgpu.commit_smem()

        def group(index, _):
            sum_HS = _sum_of_group(pieces, dt_HT, program, index, in_last_T=in_last_T)
            out_BHCS.at[b, program.of_heads(index), program.c][...] = sum_HS

        lax.fori_loop(0, grid.groups, group, None)

    out = jax.ShapeDtypeStruct((grid.batch, grid.heads, grid.chunks, grid.pairs), jnp.int32)
    how = {"out": out, "scratch": (pieces, grid.of_dt(), grid.arrived()), "grid": grid.programs, "interpret": interpret}
    return call(kernel, name="mamba3_mosaic_angles", operands=operands, **how)


def _sum_of_group(pieces: Pieces, dt_HT, program: AngleProgram, index, *, in_last_T):
    """Return the chunk's sum for one group of heads; products of two numbers of 12 bits are exact."""
    interpret = program.interpret
    dt_HTS = program.over_pairs(dt_HT, index)
    if in_last_T is not None:
        dt_HTS = jnp.where(program.over_heads(in_last_T) == 0, 0.0, dt_HTS)
    head_HTS, middle_HTS, tail_HTS = (program.angle(piece_ETS, index) for piece_ETS in pieces)
    dt_head_HTS = head(dt_HTS)
    dt_tail_HTS = dt_HTS - dt_head_HTS
    coarse_HTS, small_HTS = 0.0, middle_HTS * dt_tail_HTS + tail_HTS * dt_HTS
    for exact_HTS in (head_HTS * dt_head_HTS, head_HTS * dt_tail_HTS, middle_HTS * dt_head_HTS):
        exact_HTS -= rounded(exact_HTS, 1.0, interpret)
        more_HTS = rounded(exact_HTS, COARSE, interpret)
        coarse_HTS, small_HTS = coarse_HTS + more_HTS, small_HTS + (exact_HTS - more_HTS)
    coarse_HS, small_HS = jnp.sum(coarse_HTS, axis=1), jnp.sum(small_HTS, axis=1)
    more_HS = rounded(small_HS, COARSE, interpret)
    coarse_HS, small_HS = coarse_HS + more_HS, small_HS - more_HS
    coarse_HS -= rounded(coarse_HS, 1.0, interpret)
    # It is rounded, not cut off: the same error at every chunk would add up.
    small_HS = rounded(small_HS * 2.0**32, 1.0, interpret).astype(jnp.int32)
    return (coarse_HS * (1 / COARSE)).astype(jnp.int32) * round(2.0**32 * COARSE) + small_HS


def _phase(grid: Grid, angle_BELS, dt_BHL, start_BHCS, *, goes_on_BL, interpret):
    """Return the angle at every token, from those before every chunk."""
    operands = AngleRefs(angle_BELS=angle_BELS, dt_BHL=dt_BHL, start_BHCS=start_BHCS, goes_on_BL=goes_on_BL)
    leaving = plgpu.SMEM((grid.at_once, grid.tokens, grid.pairs), jnp.int16)

    def kernel(refs: AngleRefs, out_BHLS, angle_ETS, of_dt_HT, leaving_HTS, arrived):
        program = AngleProgram(grid, interpret)
        b, tokens, layout = program.b, program.tokens, grid.layout
        dt_HT = program.load(refs, angle_ETS, of_dt_HT, arrived)

        def group(index, _):
            turns_HTS = program.angle(angle_ETS, index)
            turns_HTS *= program.over_pairs(dt_HT, index) * INVERSE_TURN
            turns_HTS -= rounded(turns_HTS, 1.0, program.interpret)
            more_HTS = (turns_HTS * 2.0**31).astype(jnp.int32) * 2
            start_HS = refs.start_BHCS.at[b, program.of_heads(index), program.c]
            start_HS = load(start_HS, layout.reduce(1), program.interpret, optimized=False)
            goes_on_HTS = None if refs.goes_on_BL is None else program.over_heads(refs.goes_on_BL.at[b, tokens])
            start_HTS = program.laid_out(start_HS, 0, 2)
            how = {"reverse": False, "layout": layout, "interpret": program.interpret}
            phi_HTS = running_sum(more_HTS, start_HTS, goes_on_HTS, **how)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            leaving_HTS[...] = ((phi_HTS + 2**15) >> 16).astype(jnp.int16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(leaving_HTS, out_BHLS.at[b, program.of_heads(index), tokens])

        lax.fori_loop(0, grid.groups, group, None)
        plgpu.wait_smem_to_gmem(0)

    length = grid.chunks * grid.tokens
    out = jax.ShapeDtypeStruct((grid.batch, grid.heads, length, grid.pairs), jnp.int16)
    scratch = grid.of_angle(), grid.of_dt(), leaving, grid.arrived()
    how = {"out": out, "scratch": scratch, "grid": grid.programs, "interpret": interpret}
    return call(kernel, name="mamba3_mosaic_phase", operands=operands, **how)


def layout_of(heads: int, pairs: int):
    """Return the layout of (H, T, S), H 1, 2 or 4, in which a thread has all tokens of a pair of one head.

    A warp has a head (where they are fewer than 4, others the same), a lane every 32nd pair.
    """
    lanes = min(LANES, pairs)
    warps = () if heads == WARPS else (plgpu.Replicated(WARPS // heads),)
    same = () if lanes == LANES else (plgpu.Replicated(LANES // lanes),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((heads, 1, lanes), (1,))),
        warp_dims=(*(() if heads == 1 else (-4,)), *warps),
        lane_dims=(*same, -2),
        vector_dim=-1,
    )


def running_sum(x_HTS, start_HTS, goes_on_HTS, *, reverse: bool, layout, interpret: bool):
    """Return sums of x over the tokens up to each (from each on: `reverse`), in registers of `layout_of`.

    Args:
        start_HTS: where the sum starts from, the same for all tokens; None: from zero.
        goes_on_HTS: int32, 0 where the sum up to the token before (after) is forgotten; None: nowhere.
    """
    given = [array for array in (start_HTS, goes_on_HTS) if array is not None]

    def unpacked(arrays):
        arrays = list(arrays)
        return None if start_HTS is None else arrays.pop(0), None if goes_on_HTS is None else arrays.pop(0)

    tokens = range(x_HTS.shape[1])[:: -1 if reverse else 1]
    if interpret:
        start_HTS, goes_on_HTS = unpacked(given)
        weight_HTS = jnp.ones_like(x_HTS) if goes_on_HTS is None else goes_on_HTS.astype(x_HTS.dtype)

        def step(sum_HS, token):
            x_HS, weight_HS = token
            sum_HS = weight_HS * sum_HS + x_HS
            return sum_HS, sum_HS

        sum_HS = jnp.zeros_like(x_HTS[:, 0]) if start_HTS is None else start_HTS[:, 0]
        in_order = (lambda x: jnp.flip(x, 0)) if reverse else (lambda x: x)  # the interpreter's scan has no reverse
        by_token = tuple(in_order(jnp.swapaxes(x, 0, 1)) for x in (x_HTS, weight_HTS))
        return jnp.swapaxes(in_order(lax.scan(step, sum_HS, by_token)[1]), 0, 1)

    @plgpu.inline_mgpu(
        arg_types=(layout,) * (1 + len(given)),
        return_type=plgpu.ShapeDtypeStruct(x_HTS.shape, x_HTS.dtype, layout=layout),
    )
    def walk(_, x, *given):
        from jaxlib.mlir.dialects import arith

        start, goes_on = unpacked(given)
        registers, sum_ = x.registers.copy(), None
        add = np.vectorize(arith.addf if x.is_signed is None else arith.addi, otypes=[object])

        def unless_forgotten(flag, sum_):
            zero = arith.constant(sum_.type, _zeros(sum_.type))
            none = arith.constant(flag.type, _zeros(flag.type))
            return arith.select(arith.cmpi(arith.CmpIPredicate.ne, flag, none), sum_, zero)

        if start is not None:
            sum_ = start.registers[:, tokens[0]]
        for token in tokens:
            if sum_ is not None:
                if goes_on is not None:
                    sum_ = np.vectorize(unless_forgotten, otypes=[object])(goes_on.registers[:, token], sum_)
                registers[:, token] = add(sum_, registers[:, token])
            sum_ = registers[:, token]
        return fragments(registers, layout, x)

    return walk(x_HTS, *given)


def _zeros(vector_type):
    """Return the attribute of a vector of zeros."""
    from jaxlib.mlir import ir

    element = ir.VectorType(vector_type).element_type
    zero = ir.FloatAttr.get(element, 0.0) if isinstance(element, ir.FloatType) else ir.IntegerAttr.get(element, 0)
    return ir.DenseElementsAttr.get_splat(vector_type, zero)
