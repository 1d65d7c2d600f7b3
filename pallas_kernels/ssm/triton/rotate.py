"""Bias and rotation of queries and keys in Pallas Triton, with the cumulative angle; `rotate_back` has their gradients.

    phi_t = phi_{t-1} + angle_t dt_t,   (u, w) -> (u cos phi - w sin phi, u sin phi + w cos phi)

of every plane of x + bias. Angles are 32-bit fractions of a turn, so that sums are exact, in any order and of any
length, and the overflow is the modulo.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ssm.angle import INVERSE_TURN, before_chunks, head, to_fraction, to_radians, turns_in_pieces
from pallas_kernels.ssm.gradients import documents_in_chunks
from pallas_kernels.ssm.triton.common import NN, Tile, approximate, call, iota, product

COARSE = 2.0**-18  # of which 48 numbers below 1/2 add up exactly in float32


class Inputs(NamedTuple):
    """N and S powers of two, N = 2 S or N = 4 S. None: absent; angle, dt and first are all there, or none of them."""

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array
    q_bias_HRN: jax.Array | None
    k_bias_HRN: jax.Array | None
    angle_BLHS: jax.Array | None  # float32, radians per unit dt; the H axis may be 1
    dt_BHL: jax.Array | None  # float32
    first_BHS: jax.Array | None  # float32, radians: the angle before the row
    document_BL: jax.Array | None  # int32, document starts in the row up to here
    heads: int | None = None  # H, where nothing above says it

    @property
    def n_heads(self) -> int:
        return self.heads or self.dt_BHL.shape[1]

    @property
    def planes(self) -> int:
        """S; where nothing turns a quarter of N, which cuts it in two halves for the backward pass."""
        return self.q_BLRGN.shape[-1] // 4 if self.first_BHS is None else self.first_BHS.shape[-1]


class Rotated(NamedTuple):
    q_BHTN: jax.Array  # T = L R, like q; where there is nothing to do, of the groups: (B, G, T, N)
    k_BHTN: jax.Array
    last_BHS: jax.Array | None  # the angle after the row, radians, in [0, 2 pi)
    start_BHCS: jax.Array | None  # before every chunk of `tile.turned` tokens, 32-bit


def _increments(angle_TS, dt_T):
    """angle dt as a 32-bit fraction of a turn, to 2^-24 of itself: what adds up inside a chunk."""
    turns_TS = angle_TS * (dt_T * INVERSE_TURN)[:, None]
    turns_TS -= jnp.floor(turns_TS + 0.5)
    return (turns_TS * 2.0**31).astype(jnp.int32) * 2


def _same_document(document_T, *, transposed: bool = False):
    """Token s (across; down if transposed) is not after t and in its document."""
    token_T = iota(document_T.shape[0])
    before_TT = token_T[:, None] <= token_T[None, :] if transposed else token_T[:, None] >= token_T[None, :]
    return before_TT & (document_T[:, None] == document_T[None, :])


def _phi(angle_TS, dt_T, start_S, document_T, tile: Tile):
    """The angle at each token of a chunk, 32-bit."""
    more_TS = _increments(angle_TS, dt_T)
    if document_T is None:
        return start_S[None, :] + jnp.cumsum(more_TS, axis=0)
    # A sum over the document alone, exact: products of bytes with zeros and ones.
    mask_TT = _same_document(document_T).astype(jnp.bfloat16)
    phi_TS = jnp.where(document_T[:, None] == 0, start_S[None, :], 0)
    for shift in range(0, 32, 8):
        byte_TS = ((more_TS >> shift) & 255).astype(jnp.bfloat16)
        phi_TS += product(mask_TT, byte_TS, NN, jnp.bfloat16, tile).astype(jnp.int32) << shift
    return phi_TS


def _sincos(phi_TS, tile: Tile):
    radians_TS = phi_TS.astype(jnp.float32) * (2 * math.pi / 2.0**32)  # in [-pi, pi]
    if tile.interpret:
        return jnp.sin(radians_TS), jnp.cos(radians_TS)

    # To 4e-7 in this range; jnp's own cost more than all else together.
    return approximate("sin.approx.f32", radians_TS), approximate("cos.approx.f32", radians_TS)


class Whole(NamedTuple):
    """What adds up over a row: see `_whole_kernel`."""

    head_BLHS: jax.Array  # angle / (2 pi): its leading 12 bits
    middle_BLHS: jax.Array  # the next 12
    tail_BLHS: jax.Array  # and the rest, together to 2^-47
    dt_BHL: jax.Array
    document_BL: jax.Array | None


def _whole_kernel(refs: Whole, out_ref, *, tile: Tile):
    """The angle of chunks (of the last document of each), to 2^-47 of itself, for a block of heads: token by token.

    A float32 product would be off by 2^-25 of itself, the same way at every token of a constant input: 1e-2 rad after a
    million tokens. Products of two numbers of 12 bits are exact, whether a compiler fuses them with a sum or not.
    """
    chunks = out_ref[0].shape[1]
    coarse_HCS, small_HCS = 0.0, 0.0
    for token in range(tile.turned):
        of_chunks = pl.ds(token, chunks, stride=tile.turned)
        head_HCS, middle_HCS, tail_HCS = (
            ref[of_chunks, :][None] if len(ref.shape) == 2 else ref[token, :, :][:, None] for ref in refs[:3]
        )
        dt_HC1 = refs.dt_BHL[:, of_chunks][..., None]
        if refs.document_BL is not None:
            last_C = refs.document_BL[pl.ds(tile.turned - 1, chunks, stride=tile.turned)]
            dt_HC1 = jnp.where((refs.document_BL[of_chunks] == last_C)[None, :, None], dt_HC1, 0.0)
        dt_head_HC1 = head(dt_HC1)
        dt_tail_HC1 = dt_HC1 - dt_head_HC1
        small_HCS += middle_HCS * dt_tail_HC1 + tail_HCS * dt_HC1
        for exact_HCS in (head_HCS * dt_head_HC1, head_HCS * dt_tail_HC1, middle_HCS * dt_head_HC1):
            exact_HCS -= _rounded(exact_HCS, 1.0, tile)
            more_HCS = _rounded(exact_HCS, COARSE, tile)
            coarse_HCS, small_HCS = coarse_HCS + more_HCS, small_HCS + (exact_HCS - more_HCS)
    more_HCS = _rounded(small_HCS, COARSE, tile)
    coarse_HCS, small_HCS = coarse_HCS + more_HCS, small_HCS - more_HCS
    coarse_HCS -= _rounded(coarse_HCS, 1.0, tile)
    # Rounded, not cut off: the same error at every chunk would add up.
    small_HCS = jnp.floor(small_HCS * 2.0**32 + 0.5).astype(jnp.int32)
    out_ref[0][...] = (coarse_HCS / COARSE).astype(jnp.int32) * round(2.0**32 * COARSE) + small_HCS


def _rounded(x, step: float, tile: Tile):
    """To a multiple of a power of two, |x| < 2^22 steps: two sums, where the GPU's rounding is an eighth as fast."""
    if tile.interpret:  # XLA takes one sum out of two
        return jnp.round(x / step) * step
    shift = 1.5 * 2.0**23 * step
    return (x + shift) - shift


def _of_head(ref):
    """A chunk's angles (T, S) by head of the block, from a ref (T, S) that heads share or (T, heads, S)."""
    if len(ref.shape) == 3:
        return lambda head: ref[:, head, :]
    shared_TS = ref[...]
    return lambda head: shared_TS


def _starts(inputs: Inputs, document_BL, tile: Tile):
    """start_BHCS, the angle before every chunk of `tile.turned` tokens, and the last angle, 32-bit."""
    batch, length, _, planes = inputs.angle_BLHS.shape
    n_heads, chunks = inputs.dt_BHL.shape[1], length // tile.turned
    heads = _heads(inputs, tile.heads_turned, tile)
    # One chunk a program; the interpreter takes a while for each, whatever its size.
    together = math.gcd(chunks, 4096) if tile.interpret and inputs.angle_BLHS.shape[2] == 1 else 1
    blocks = Blocks(inputs, together * tile.turned, heads)
    (whole_BHCS,) = call(
        _whole_kernel,
        "mamba3_angles",
        tile,
        replace(tile.rotate, warps=1),
        (n_heads // heads, chunks // together, batch),
        Whole(*turns_in_pieces(inputs.angle_BLHS), inputs.dt_BHL, document_BL),
        Whole(*[blocks.angle] * 3, blocks.spec("BHL"), None if document_BL is None else blocks.spec("BL")),
        [((batch, n_heads, chunks, planes), jnp.int32, blocks.spec("BHCS", C=together))],
    )
    return before_chunks(whole_BHCS, to_fraction(inputs.first_BHS), document_BL)


class Turn(NamedTuple):
    """What one program sees: a chunk of a head's tokens."""

    x_BLRGN: jax.Array
    bias_HRN: jax.Array | None
    angle_BLHS: jax.Array | None  # these three None: nothing turns
    dt_BHL: jax.Array | None
    start_BHCS: jax.Array | None
    document_BL: jax.Array | None


def _still(d_state: int, planes: int):
    """The entries that do not turn: at most one slice of N. Before them are the planes, pairs (2 i, 2 i + 1)."""
    return [pl.ds(2 * planes, d_state - 2 * planes)] if d_state > 2 * planes else []


def _pairs(both_TN):
    """The first and second entries of the planes."""
    return jnp.unstack(both_TN.reshape(*both_TN.shape[:-1], -1, 2), axis=-1)


def _joined(first_TS, second_TS):
    """`_pairs` undone."""
    return jnp.stack([first_TS, second_TS], axis=-1).reshape(*first_TS.shape[:-1], -1)


def _turn_kernel(refs: Turn, out_ref, *, tile: Tile):
    """Biases and turns a chunk of a block of heads."""
    d_state, turns = refs.x_BLRGN.shape[-1], refs.angle_BLHS is not None
    planes = refs.start_BHCS.shape[-1] if turns else 0
    turning, still = pl.ds(0, 2 * planes), _still(d_state, planes)
    document_T = None if refs.document_BL is None else refs.document_BL[...]
    angle = _of_head(refs.angle_BLHS) if turns else None

    def one(head, done):
        if turns:
            phi_TS = _phi(angle(head), refs.dt_BHL[head, :], refs.start_BHCS[head, :], document_T, tile)
            sin_TS, cos_TS = _sincos(phi_TS, tile)
        for rank in range(tile.rank):

            def load(columns, rank=rank):
                x_TN = refs.x_BLRGN[:, rank, columns].astype(jnp.float32)
                if refs.bias_HRN is None:
                    return x_TN
                return x_TN + refs.bias_HRN[head, rank, columns].astype(jnp.float32)[None, :]

            def store(columns, x_TN, rank=rank):
                out_ref[0][head, :, rank, columns] = x_TN.astype(out_ref[0].dtype)

            if turns:
                u_TS, w_TS = _pairs(load(turning))
                store(turning, _joined(u_TS * cos_TS - w_TS * sin_TS, u_TS * sin_TS + w_TS * cos_TS))
            for columns in still:
                store(columns, load(columns))
        return done

    lax.fori_loop(0, out_ref[0].shape[0], one, 0)


def _heads(inputs: Inputs, at_most: int, tile: Tile) -> int:
    """Heads that one program takes after another: a power of two, all of one group, few where programs are few."""
    n_heads, (batch, length, _, groups, _) = inputs.n_heads, inputs.q_BLRGN.shape
    a_group = n_heads // groups
    most = max(1, min(at_most, batch * n_heads * (length // tile.turned) // 4096))
    return max(size for size in (1, 2, 4, 8, 16, 32) if size <= most and a_group % size == 0)


class Blocks:
    """What one program sees. Programs are blocks of heads (times ranks, where there are `ranks`), chunks, batch.

    `part` 0 of N are the entries that turn, 1 those that do not; None: all.
    """

    def __init__(self, inputs: Inputs, tokens: int, heads: int, ranks: int | None = None, part: int | None = None):
        rank, groups, d_state = inputs.q_BLRGN.shape[2:]
        self.ranks, self.blocks_a_group = ranks, inputs.n_heads // groups // heads
        planes = inputs.planes
        self.part, width = part or 0, d_state if part is None else 2 * planes
        self.sizes = {"L": tokens, "H": heads, "R": None if ranks else rank, "N": width, "X": width, "S": planes}
        self.angle = None
        if inputs.angle_BLHS is not None:
            self.angle = self.spec("BL1S" if inputs.angle_BLHS.shape[2] == 1 else "BLHS")

    def spec(self, axes: str, **sizes) -> pl.BlockSpec:
        """`axes` as in a name; J is a block of heads, X a part of N; one entry of those that have no size."""
        sizes = self.sizes | sizes
        ranks = self.ranks or 1

        def index(i, c, b):
            block = i // ranks
            at = {"B": b, "C": c, "L": c, "H": block, "J": block, "G": block // self.blocks_a_group, "N": self.part}
            if self.ranks:
                at["R"] = i % ranks
            return tuple(at.get(axis, 0) for axis in axes)

        return pl.BlockSpec(tuple(sizes.get(axis) for axis in axes), index)


def rotate(inputs: Inputs, tile: Tile) -> Rotated:
    """Biases and turns queries and keys, once a head.

    Raises:
        ValueError: sizes that the kernels cannot run.
    """
    batch, length, rank, groups, d_state = inputs.q_BLRGN.shape
    planes, turns = inputs.planes, inputs.angle_BLHS is not None
    if d_state & (d_state - 1) or planes not in (d_state // 2, d_state // 4) or planes < 4:
        raise ValueError(f"{d_state=} is not a power of two with a quarter or half of it {planes=}, at least 4")
    if length % tile.turned or rank != tile.rank:
        raise ValueError(f"{length=} and {rank=} do not fit {tile}")
    n_heads, heads = inputs.n_heads, _heads(inputs, tile.heads_turned, tile)
    document_BL = start_BHCS = last_BHS = None
    if turns:
        document_BL = documents_in_chunks(inputs.document_BL, tile.turned)
        start_BHCS, last_BHS = _starts(inputs, document_BL, tile)
        last_BHS = to_radians(last_BHS)
    blocks = Blocks(inputs, tile.turned, heads)

    def turned(x_BLRGN, bias_HRN):
        if not turns and bias_HRN is None:
            return jnp.moveaxis(x_BLRGN, 3, 1).reshape(batch, groups, length * rank, d_state)
        refs = Turn(x_BLRGN, bias_HRN, inputs.angle_BLHS, inputs.dt_BHL, start_BHCS, document_BL)
        specs = Turn(*(blocks.spec(name.split("_")[-1]) for name in Turn._fields))._replace(angle_BLHS=blocks.angle)
        specs = Turn(*(None if x is None else spec for x, spec in zip(refs, specs, strict=True)))
        (out_BHLRN,) = call(
            _turn_kernel,
            "mamba3_rotate",
            tile,
            tile.rotate,
            (n_heads // heads, length // tile.turned, batch),
            refs,
            specs,
            [((batch, n_heads, length, rank, d_state), x_BLRGN.dtype, blocks.spec("BHLRN"))],
        )
        return out_BHLRN.reshape(batch, n_heads, length * rank, d_state)

    q_BHTN, k_BHTN = turned(inputs.q_BLRGN, inputs.q_bias_HRN), turned(inputs.k_BLRGN, inputs.k_bias_HRN)
    return Rotated(q_BHTN, k_BHTN, last_BHS, start_BHCS)
