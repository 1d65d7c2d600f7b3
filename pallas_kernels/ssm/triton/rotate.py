"""Bias and rotation of queries and keys in Pallas Triton, with the cumulative angle; `rotate_bwd` has their gradients.

    phi_t = phi_{t-1} + angle_t dt_t,   (u, w) -> (u cos phi - w sin phi, u sin phi + w cos phi)

for every rotary pair (u, w) of x + bias. Angles are 32-bit fractions of a turn, so that sums are exact, in any order
and of any length, and the overflow is the modulo.

Letters: T tokens and C chunks of `tile.rotate_tokens`; J blocks of heads; X entries of N that rotate, or that do not.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ssm.angle import (
    INVERSE_TURN,
    before_chunks,
    head,
    rounded,
    to_fraction,
    to_radians,
    turns_in_pieces,
)
from pallas_kernels.ssm.operands import Operands, documents_in_chunks
from pallas_kernels.ssm.triton.common import NN, approximate, call, iota, product
from pallas_kernels.ssm.triton.config import Tile

COARSE = 2.0**-18  # float32 adds up 48 multiples of it below 1/2 exactly


class Angles(NamedTuple):
    """What the angles of a chunk come from."""

    angle_BLHS: jax.Array
    dt_BHL: jax.Array
    start_BHCS: jax.Array  # the angle before the chunk, 32-bit
    document_BL: jax.Array | None  # document starts in the chunk up to each token


class Rotated(NamedTuple):
    """What `rotate` returns."""

    q_BHTN: jax.Array  # T = L R, like q; where there is nothing to do, of the groups: (B, G, T, N)
    k_BHTN: jax.Array
    last_BHS: jax.Array | None  # the angle after the row, radians, in [0, 2 pi)
    start_BHCS: jax.Array | None  # the angle before every chunk, 32-bit


def rotate(operands: Operands, tile: Tile) -> Rotated:
    """Biases and rotates queries and keys, once a head.

    Raises:
        ValueError: sizes that the kernels cannot run.
    """
    batch, length, rank, groups, d_state = operands.tokens.q_BLRGN.shape
    pairs, n_heads = rotary_pairs(operands), operands.n_heads
    if d_state & (d_state - 1) or pairs not in (d_state // 2, d_state // 4) or pairs < 4:
        raise ValueError(f"{d_state=} is not a power of two with a quarter or half of it {pairs=}, at least 4")
    if length % tile.rotate_tokens or rank != tile.rank:
        raise ValueError(f"{length=} and {rank=} do not fit {tile}")
    start_BHCS = last_BHS = None
    if operands.angle_BLHS is not None:
        start_BHCS, last_BHS = _chunk_angles(operands, tile)
    angles = angles_of(operands, start_BHCS, tile)
    blocks = Blocks(operands, tokens=tile.rotate_tokens, heads=heads_of_program(operands, tile.rotate_heads, tile))

    def rotated(x_BLRGN, bias_HRN):
        if angles is None and bias_HRN is None:
            return jnp.moveaxis(x_BLRGN, 3, 1).reshape(batch, groups, length * rank, d_state)
        out = call(
            _rotate_kernel,
            RotateRefs(x_BLRGN, bias_HRN, angles),
            RotatedSide(jax.ShapeDtypeStruct((batch, n_heads, length, rank, d_state), x_BLRGN.dtype)),
            name="mamba3_rotate",
            grid=blocks,
            tile=tile,
            launch=tile.rotate,
        )
        return out.x_BHLRN.reshape(batch, n_heads, length * rank, d_state)

    q_BHTN = rotated(operands.tokens.q_BLRGN, operands.weights.q_bias_HRN)
    k_BHTN = rotated(operands.tokens.k_BLRGN, operands.weights.k_bias_HRN)
    return Rotated(q_BHTN, k_BHTN, last_BHS, start_BHCS)


def rotary_pairs(operands: Operands) -> int:
    """Return S; where nothing rotates a quarter of N, which cuts it in two halves for the backward pass."""
    angle_BHS = operands.before.angle_BHS
    return operands.tokens.q_BLRGN.shape[-1] // 4 if angle_BHS is None else angle_BHS.shape[-1]


def angles_of(operands: Operands, start_BHCS, tile: Tile) -> Angles | None:
    """Return the angles of all chunks of a row, from those before each; None: nothing rotates."""
    if operands.angle_BLHS is None:
        return None
    document_BL = documents_in_chunks(operands.document_BL, tile.rotate_tokens)
    return Angles(operands.angle_BLHS, operands.dt_BHL, start_BHCS, document_BL)


class Blocks:
    """The `Grid` of a rotation: blocks of heads (times ranks, where `ranks` is given), chunks, batch.

    Args:
        tokens: that a program sees, of `chunks` chunks; None: of one.
        heads: that a program takes one after another.
        part: of N, 0: the entries that rotate, 1: those that do not; None: all.
    """

    def __init__(
        self,
        operands: Operands,
        *,
        tokens: int,
        heads: int,
        chunks: int | None = None,
        ranks: int | None = None,
        part: int | None = None,
    ):
        batch, length, rank, groups, d_state = operands.tokens.q_BLRGN.shape
        self.ranks, self.part = ranks or 1, part or 0
        self.blocks_a_group = operands.n_heads // groups // heads
        self.programs = (operands.n_heads // heads * self.ranks, length // tokens, batch)
        width = d_state if part is None else 2 * rotary_pairs(operands)
        whole = {"N": width, "X": width, "S": rotary_pairs(operands), "R": None if ranks else rank}
        self.sizes = {"L": tokens, "C": chunks, "H": heads} | whole

    def spec(self, axes: str, array) -> pl.BlockSpec:
        """Return what a program sees of an array; one entry of an axis that has no size."""
        if axes.endswith("LHS"):  # heads may share an angle, and blocks of heads the array of its gradients
            sizes = zip(axes, array.shape, strict=True)
            axes = "".join("1" if axis in "HJ" and size == 1 else axis for axis, size in sizes)

        def index(i, c, b):
            block = i // self.ranks
            at = {"B": b, "C": c, "L": c, "H": block, "J": block, "G": block // self.blocks_a_group, "N": self.part}
            if self.sizes["R"] is None:
                at["R"] = i % self.ranks
            return tuple(at.get(axis, 0) for axis in axes)

        return pl.BlockSpec(tuple(self.sizes.get(axis) for axis in axes), index)


def heads_of_program(operands: Operands, at_most: int, tile: Tile) -> int:
    """Return how many heads one program takes: a power of two, all of one group, few where programs are few."""
    batch, length, _, groups, _ = operands.tokens.q_BLRGN.shape
    of_group = operands.n_heads // groups
    most = max(1, min(at_most, batch * operands.n_heads * (length // tile.rotate_tokens) // 4096))
    return max(size for size in (1, 2, 4, 8, 16, 32) if size <= most and of_group % size == 0)


class AnglePieces(NamedTuple):
    """angle / (2 pi): its leading 12 bits, the next 12, and the rest, together to 2^-47."""

    head_BLHS: jax.Array
    middle_BLHS: jax.Array
    tail_BLHS: jax.Array


class AngleRefs(NamedTuple):
    """What adds up over a row, see `_angles_kernel`."""

    pieces: AnglePieces
    dt_BHL: jax.Array
    document_BL: jax.Array | None


class ChunkAngles(NamedTuple):
    """The angle of every chunk, 32-bit; where documents start in it, from its last start on."""

    sum_BHCS: jax.Array


def _chunk_angles(operands: Operands, tile: Tile):
    """Return the angle before every chunk, 32-bit, and after the row, in radians."""
    batch, length, angle_heads, pairs = operands.angle_BLHS.shape
    chunks, document_BL = length // tile.rotate_tokens, documents_in_chunks(operands.document_BL, tile.rotate_tokens)
    # The interpreter takes a while for each program, whatever its size.
    together = math.gcd(chunks, 4096) if tile.interpret and angle_heads == 1 else 1
    of_chunks = call(
        _angles_kernel,
        AngleRefs(AnglePieces(*turns_in_pieces(operands.angle_BLHS)), operands.dt_BHL, document_BL),
        ChunkAngles(jax.ShapeDtypeStruct((batch, operands.n_heads, chunks, pairs), jnp.int32)),
        name="mamba3_angles",
        grid=Blocks(
            operands,
            tokens=together * tile.rotate_tokens,
            chunks=together,
            heads=heads_of_program(operands, tile.rotate_heads, tile),
        ),
        tile=tile,
        launch=replace(tile.rotate, warps=1),
    )
    start_BHCS, last_BHS = before_chunks(
        of_chunks.sum_BHCS, to_fraction(operands.before.angle_BHS), document_BL, tile.along
    )
    return start_BHCS, to_radians(last_BHS)


def _angles_kernel(refs: AngleRefs, out: ChunkAngles, *, tile: Tile):
    """Compute the angle of chunks to 2^-47 of itself, for a block of heads, token by token.

    A float32 product would be off by 2^-25 of itself, the same way at every token of a constant input: 1e-2 rad after a
    million tokens. Products of two numbers of 12 bits are exact, whether a compiler fuses them with a sum or not.
    """
    chunks = out.sum_BHCS.shape[1]
    coarse_HCS, small_HCS = 0.0, 0.0
    for token in range(tile.rotate_tokens):
        of_chunks = pl.ds(token, chunks, stride=tile.rotate_tokens)
        head_HCS, middle_HCS, tail_HCS = (
            ref[of_chunks, :][None] if len(ref.shape) == 2 else ref[token, :, :][:, None] for ref in refs.pieces
        )
        dt_HC1 = refs.dt_BHL[:, of_chunks][..., None]
        if refs.document_BL is not None:
            last_C = refs.document_BL[pl.ds(tile.rotate_tokens - 1, chunks, stride=tile.rotate_tokens)]
            dt_HC1 = jnp.where((refs.document_BL[of_chunks] == last_C)[None, :, None], dt_HC1, 0.0)
        dt_head_HC1 = head(dt_HC1)
        dt_tail_HC1 = dt_HC1 - dt_head_HC1
        small_HCS += middle_HCS * dt_tail_HC1 + tail_HCS * dt_HC1
        for exact_HCS in (head_HCS * dt_head_HC1, head_HCS * dt_tail_HC1, middle_HCS * dt_head_HC1):
            exact_HCS -= rounded(exact_HCS, 1.0, tile.interpret)
            more_HCS = rounded(exact_HCS, COARSE, tile.interpret)
            coarse_HCS, small_HCS = coarse_HCS + more_HCS, small_HCS + (exact_HCS - more_HCS)
    more_HCS = rounded(small_HCS, COARSE, tile.interpret)
    coarse_HCS, small_HCS = coarse_HCS + more_HCS, small_HCS - more_HCS
    coarse_HCS -= rounded(coarse_HCS, 1.0, tile.interpret)
    # This rounds instead of cutting off, since the same error at every chunk would add up.
    small_HCS = jnp.floor(small_HCS * 2.0**32 + 0.5).astype(jnp.int32)
    out.sum_BHCS[...] = (coarse_HCS / COARSE).astype(jnp.int32) * round(2.0**32 * COARSE) + small_HCS


class RotateRefs(NamedTuple):
    """What one program sees: a chunk of a block of heads' tokens."""

    x_BLRGN: jax.Array
    bias_HRN: jax.Array | None
    angles: Angles | None  # None: nothing rotates


class RotatedSide(NamedTuple):
    """Queries or keys, biased and rotated."""

    x_BHLRN: jax.Array


def _rotate_kernel(refs: RotateRefs, out: RotatedSide, *, tile: Tile):
    """Biases and rotates a chunk of a block of heads. Pairs, (2 i, 2 i + 1), come first in N, then the rest."""
    angles, d_state, rotates = refs.angles, refs.x_BLRGN.shape[-1], 0
    if angles is not None:
        rotates = 2 * angles.start_BHCS.shape[-1]
        document_T = None if angles.document_BL is None else angles.document_BL[...]
        angle = by_head(angles.angle_BLHS)

    def one(head, done):
        if angles is not None:
            phi_TS = phi(
                angle(head), angles.dt_BHL[head, :], angles.start_BHCS[head, :], document_T=document_T, tile=tile
            )
            sin_TS, cos_TS = sincos(phi_TS, tile)
        for rank in range(tile.rank):

            def load(columns, rank=rank):
                x_TN = refs.x_BLRGN[:, rank, columns].astype(jnp.float32)
                if refs.bias_HRN is None:
                    return x_TN
                return x_TN + refs.bias_HRN[head, rank, columns].astype(jnp.float32)[None, :]

            def store(columns, x_TN, rank=rank):
                out.x_BHLRN[head, :, rank, columns] = x_TN.astype(out.x_BHLRN.dtype)

            if rotates:
                columns = pl.ds(0, rotates)
                u_TS, w_TS = pairs_of(load(columns))
                store(columns, joined(u_TS * cos_TS - w_TS * sin_TS, u_TS * sin_TS + w_TS * cos_TS))
            if d_state > rotates:
                columns = pl.ds(rotates, d_state - rotates)
                store(columns, load(columns))
        return done

    lax.fori_loop(0, out.x_BHLRN.shape[0], one, 0)


def by_head(ref):
    """Return a function that takes a head to its angles (T, S) in a chunk; heads share a ref without their axis."""
    if len(ref.shape) == 3:
        return lambda head: ref[:, head, :]
    shared_TS = ref[...]
    return lambda head: shared_TS


def phi(angle_TS, dt_T, start_S, *, document_T, tile: Tile):
    """Return the angle at each token of a chunk, 32-bit."""
    more_TS = _increments(angle_TS, dt_T)
    if document_T is None:
        return start_S[None, :] + jnp.cumsum(more_TS, axis=0)
    # Products of bytes with zeros and ones sum exactly over the document alone.
    mask_TT = same_document(document_T).astype(jnp.bfloat16)
    phi_TS = jnp.where(document_T[:, None] == 0, start_S[None, :], 0)
    for shift in range(0, 32, 8):
        byte_TS = ((more_TS >> shift) & 255).astype(jnp.bfloat16)
        phi_TS += product(mask_TT, byte_TS, NN, dtype=jnp.bfloat16, tile=tile).astype(jnp.int32) << shift
    return phi_TS


def _increments(angle_TS, dt_T):
    """Return angle dt as a 32-bit fraction of a turn, to 2^-24 of itself: what adds up inside a chunk."""
    turns_TS = angle_TS * (dt_T * INVERSE_TURN)[:, None]
    turns_TS -= jnp.floor(turns_TS + 0.5)
    return (turns_TS * 2.0**31).astype(jnp.int32) * 2


def same_document(document_T, *, transposed: bool = False):
    """Says which tokens s (across; down if transposed) are not after t and in its document."""
    token_T = iota(document_T.shape[0])
    before_TT = token_T[:, None] <= token_T[None, :] if transposed else token_T[:, None] >= token_T[None, :]
    return before_TT & (document_T[:, None] == document_T[None, :])


def sincos(phi_TS, tile: Tile):
    """Return the sine and cosine of a 32-bit angle, to 4e-7: jnp's own cost more than all else together."""
    radians_TS = phi_TS.astype(jnp.float32) * (2 * math.pi / 2.0**32)  # in [-pi, pi]
    if tile.interpret:
        return jnp.sin(radians_TS), jnp.cos(radians_TS)
    return approximate("sin.approx.f32", radians_TS), approximate("cos.approx.f32", radians_TS)


def pairs_of(both_TN):
    """Return the first and the second entries of the pairs."""
    return jnp.unstack(both_TN.reshape(*both_TN.shape[:-1], -1, 2), axis=-1)


def joined(first_TS, second_TS):
    """Take back `pairs_of`."""
    return jnp.stack([first_TS, second_TS], axis=-1).reshape(*first_TS.shape[:-1], -1)
