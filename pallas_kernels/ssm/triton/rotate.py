"""Bias and rotation of queries and keys in Pallas Triton, forward and backward, with the cumulative angle.

    phi_t = phi_{t-1} + angle_t dt_t,   (u, w) -> (u cos phi - w sin phi, u sin phi + w cos phi)

of every plane of x + bias. Angles are 32-bit fractions of a turn, so that sums are exact, in any order and of any
length, and the overflow is the modulo.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ssm.triton.common import NN, Tile, approximate, call, documents_in_chunks, iota, product

INVERSE_TURN = 1 / (2 * math.pi)
COARSE = 2.0**-18  # of which 48 numbers below 1/2 add up exactly in float32


class Inputs(NamedTuple):
    """N and S powers of two, N = 2 S or N = 4 S."""

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array
    q_bias_HRN: jax.Array
    k_bias_HRN: jax.Array
    angle_BLHS: jax.Array  # float32, radians per unit dt; the H axis may be 1
    dt_BHL: jax.Array  # float32
    first_BHS: jax.Array  # float32, radians: the angle before the row
    document_BL: jax.Array | None  # int32, document starts in the row up to here


def rotate(inputs: Inputs, tile: Tile):
    """Rotated q_BHTN and k_BHTN (T = L R, like q), and the last angle in radians, in [0, 2 pi).

    Raises:
        ValueError: sizes that the kernels cannot run.
    """
    _, length, rank, _, d_state = inputs.q_BLRGN.shape
    planes = inputs.first_BHS.shape[-1]
    if d_state & (d_state - 1) or planes not in (d_state // 2, d_state // 4) or planes < 4:
        raise ValueError(f"{d_state=} is not a power of two with a quarter or half of it {planes=}, at least 4")
    if length % tile.turned or rank != tile.rank:
        raise ValueError(f"{length=} and {rank=} do not fit {tile}")
    return _rotate(inputs, tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rotate(inputs: Inputs, tile: Tile):
    return _rotate_fwd(inputs, tile)[0]


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
        dt_head_HC1 = _head(dt_HC1)
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


def _head(x):
    """The leading 12 bits of a float32's significand; x - _head(x) is exact and has the other 12."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF, jnp.float32)


def _turns(angle):
    """angle / (2 pi): the leading 12 bits, the next 12, and the rest to 2^-47."""
    scale = 2.0 ** (12 - math.frexp(INVERSE_TURN)[1])
    first = math.floor(INVERSE_TURN * scale) / scale
    second = math.floor((INVERSE_TURN - first) * scale * 4096) / (scale * 4096)
    angle_head = _head(angle)
    angle_tail = angle - angle_head
    exact = [angle_head * first, angle_tail * first, angle_head * second]
    head = _head(exact[0])
    middle = [exact[0] - head, exact[1], exact[2]]
    heads = [_head(x) for x in middle]
    sum_ = (heads[0] + heads[1]) + heads[2]  # of a few multiples of a common step: exact
    middle_head = _head(sum_)
    rest = sum(x - y for x, y in zip(middle, heads, strict=True))
    small = angle_tail * second + angle * (INVERSE_TURN - first - second)
    return head, middle_head, (sum_ - middle_head) + (rest + small)


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
        Whole(*_turns(inputs.angle_BLHS), inputs.dt_BHL, document_BL),
        Whole(*[blocks.angle] * 3, blocks.spec("BHL"), None if document_BL is None else blocks.spec("BL")),
        [((batch, n_heads, chunks, planes), jnp.int32, blocks.spec("BHCS", C=together))],
    )
    turns_BHS = inputs.first_BHS * INVERSE_TURN
    first_BHS = ((turns_BHS - jnp.floor(turns_BHS + 0.5)) * 2.0**31).astype(jnp.int32) * 2
    up_to_BHCS = jnp.cumsum(whole_BHCS, axis=2)
    before_BHCS = up_to_BHCS - whole_BHCS
    if document_BL is None:
        return first_BHS[:, :, None] + before_BHCS, first_BHS + up_to_BHCS[:, :, -1]
    # After a chunk with a start: from that chunk on, whose sum began at its last start.
    begins_BC = document_BL.reshape(batch, chunks, tile.turned)[:, :, -1] > 0
    latest_BC = lax.cummax(jnp.where(begins_BC, jnp.arange(chunks, dtype=jnp.int32), -1), axis=1)

    def since(sum_BHCS, latest_BC):
        latest_BHCS = latest_BC[:, None, :, None]
        forgotten_BHCS = jnp.take_along_axis(before_BHCS, jnp.maximum(latest_BHCS, 0), axis=2)
        return sum_BHCS + jnp.where(latest_BHCS < 0, first_BHS[:, :, None], -forgotten_BHCS)

    before_BC = jnp.pad(latest_BC[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return since(before_BHCS, before_BC), since(up_to_BHCS[:, :, -1:], latest_BC[:, -1:])[:, :, 0]


def _radians(phi_BHS):
    """In [0, 2 pi), of the 24 bits that float32 has."""
    return lax.shift_right_logical(phi_BHS, jnp.int32(8)).astype(jnp.float32) * (2 * math.pi / 2.0**24)


class Turn(NamedTuple):
    """What one program sees: a chunk of a head's tokens."""

    x_BLRGN: jax.Array
    bias_HRN: jax.Array
    angle_BLHS: jax.Array
    dt_BHL: jax.Array
    start_BHCS: jax.Array
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
    """A chunk of a block of heads."""
    turning = pl.ds(0, 2 * refs.start_BHCS.shape[-1])
    still = _still(refs.bias_HRN.shape[-1], refs.start_BHCS.shape[-1])
    document_T = None if refs.document_BL is None else refs.document_BL[...]
    angle = _of_head(refs.angle_BLHS)

    def one(head, done):
        phi_TS = _phi(angle(head), refs.dt_BHL[head, :], refs.start_BHCS[head, :], document_T, tile)
        sin_TS, cos_TS = _sincos(phi_TS, tile)
        for rank in range(tile.rank):

            def load(columns, rank=rank):
                bias_N = refs.bias_HRN[head, rank, columns].astype(jnp.float32)
                return refs.x_BLRGN[:, rank, columns].astype(jnp.float32) + bias_N[None, :]

            def store(columns, x_TN, rank=rank):
                out_ref[0][head, :, rank, columns] = x_TN.astype(out_ref[0].dtype)

            u_TS, w_TS = _pairs(load(turning))
            store(turning, _joined(u_TS * cos_TS - w_TS * sin_TS, u_TS * sin_TS + w_TS * cos_TS))
            for columns in still:
                store(columns, load(columns))
        return done

    lax.fori_loop(0, refs.bias_HRN.shape[0], one, 0)


def _heads(inputs: Inputs, at_most: int, tile: Tile) -> int:
    """Heads that one program takes after another: a power of two, all of one group, few where programs are few."""
    batch, n_heads, length = inputs.dt_BHL.shape
    a_group = n_heads // inputs.q_BLRGN.shape[3]
    most = max(1, min(at_most, batch * n_heads * (length // tile.turned) // 4096))
    return max(size for size in (1, 2, 4, 8, 16, 32) if size <= most and a_group % size == 0)


class Blocks:
    """What one program sees. Programs are blocks of heads (times ranks, where there are `ranks`), chunks, batch."""

    def __init__(self, inputs: Inputs, tokens: int, heads: int, ranks: int | None = None):
        rank, groups, d_state = inputs.q_BLRGN.shape[2:]
        self.ranks, self.blocks_a_group = ranks, inputs.dt_BHL.shape[1] // groups // heads
        planes = inputs.first_BHS.shape[-1]
        self.sizes = {"L": tokens, "H": heads, "R": None if ranks else rank, "N": d_state, "S": planes}
        self.angle = self.spec("BL1S" if inputs.angle_BLHS.shape[2] == 1 else "BLHS")

    def spec(self, axes: str, **sizes) -> pl.BlockSpec:
        """`axes` as in a name; J is a block of heads; one entry of those that have no size."""
        sizes = self.sizes | sizes
        ranks = self.ranks or 1

        def index(i, c, b):
            block = i // ranks
            at = {"B": b, "C": c, "L": c, "H": block, "J": block, "G": block // self.blocks_a_group}
            if self.ranks:
                at["R"] = i % ranks
            return tuple(at.get(axis, 0) for axis in axes)

        return pl.BlockSpec(tuple(sizes.get(axis) for axis in axes), index)


def _rotate_fwd(inputs: Inputs, tile: Tile):
    batch, length, rank, _, d_state = inputs.q_BLRGN.shape
    n_heads, heads = inputs.dt_BHL.shape[1], _heads(inputs, tile.heads_turned, tile)
    document_BL = documents_in_chunks(inputs.document_BL, tile.turned)
    start_BHCS, last_BHS = _starts(inputs, document_BL, tile)
    blocks = Blocks(inputs, tile.turned, heads)
    per_token = None if document_BL is None else blocks.spec("BL")
    specs = (blocks.spec("BLRGN"), blocks.spec("HRN"), blocks.angle, blocks.spec("BHL"), blocks.spec("BHCS"), per_token)

    def turned(x_BLRGN, bias_HRN):
        (out_BHLRN,) = call(
            _turn_kernel,
            "mamba3_rotate",
            tile,
            tile.rotate,
            (n_heads // heads, length // tile.turned, batch),
            Turn(x_BLRGN, bias_HRN, inputs.angle_BLHS, inputs.dt_BHL, start_BHCS, document_BL),
            Turn(*specs),
            [((batch, n_heads, length, rank, d_state), x_BLRGN.dtype, blocks.spec("BHLRN"))],
        )
        return out_BHLRN.reshape(batch, n_heads, length * rank, d_state)

    q_BHTN, k_BHTN = turned(inputs.q_BLRGN, inputs.q_bias_HRN), turned(inputs.k_BLRGN, inputs.k_bias_HRN)
    return (q_BHTN, k_BHTN, _radians(last_BHS)), (inputs, start_BHCS)


class Back(NamedTuple):
    """As `Turn`, and the gradient of what was turned."""

    x_BLRGN: jax.Array
    bias_HRN: jax.Array
    angle_BLHS: jax.Array
    dt_BHL: jax.Array
    start_BHCS: jax.Array
    document_BL: jax.Array | None
    dx_BHLRN: jax.Array


class BackOutputs(NamedTuple):
    """Partial sums: over one block of heads (J), or one chunk (C); of one rank (R). float32."""

    dx_JBLRN: jax.Array
    dbias_BCHRN: jax.Array
    dangle_JRBLHS: jax.Array  # from the tokens of the chunk alone
    ddt_RBHL: jax.Array  # likewise
    dphi_RBHCS: jax.Array  # the chunk's sum, for the tokens before it


def _suffix(dphi_TS, document_T, tile: Tile):
    """The sum over t >= s in the chunk and the document."""
    if document_T is None:
        return jnp.sum(dphi_TS, axis=0)[None, :] - jnp.cumsum(dphi_TS, axis=0) + dphi_TS
    mask_TT = _same_document(document_T, transposed=True).astype(jnp.float32)
    return product(mask_TT, dphi_TS, NN, jnp.float32, tile)


def _back_kernel(refs: Back, out: BackOutputs, *, tile: Tile):
    """One rank of a block of heads, a chunk of tokens."""
    planes = refs.start_BHCS.shape[-1]
    turning, still = pl.ds(0, 2 * planes), _still(refs.bias_HRN.shape[-1], planes)
    document_T = None if refs.document_BL is None else refs.document_BL[...]
    angle, shared = _of_head(refs.angle_BLHS), len(refs.angle_BLHS.shape) == 2

    def one(head, sums):
        dt_T = refs.dt_BHL[head, :]
        sin_TS, cos_TS = _sincos(_phi(angle(head), dt_T, refs.start_BHCS[head, :], document_T, tile), tile)

        def load(columns):
            return refs.x_BLRGN[:, columns].astype(jnp.float32) + refs.bias_HRN[head, columns].astype(jnp.float32)[None]

        def load_gradient(columns):
            return refs.dx_BHLRN[head, :, columns].astype(jnp.float32)

        def store_bias(columns, dbias_N):
            out.dbias_BCHRN[head, columns] = dbias_N

        (u_TS, w_TS), (gu_TS, gw_TS) = _pairs(load(turning)), _pairs(load_gradient(turning))
        gu_TS, gw_TS = gu_TS * cos_TS + gw_TS * sin_TS, gw_TS * cos_TS - gu_TS * sin_TS
        dphi_TS = gw_TS * u_TS - gu_TS * w_TS
        store_bias(turning, _joined(jnp.sum(gu_TS, axis=0), jnp.sum(gw_TS, axis=0)))
        more = [gu_TS, gw_TS, *(load_gradient(columns) for columns in still)]
        for columns, g_TN in zip(still, more[2:], strict=True):
            store_bias(columns, jnp.sum(g_TN, axis=0))

        suffix_TS = _suffix(dphi_TS, document_T, tile)
        out.ddt_RBHL[head, :] = jnp.sum(angle(head) * suffix_TS, axis=1)
        if document_T is not None:
            dphi_TS = jnp.where(document_T[:, None] == 0, dphi_TS, 0.0)
        out.dphi_RBHCS[head, :] = jnp.sum(dphi_TS, axis=0)
        dangle_TS = dt_T[:, None] * suffix_TS
        if shared:
            more.append(dangle_TS)
        else:
            out.dangle_JRBLHS[:, head, :] = dangle_TS
        return tuple(sum_ + x for sum_, x in zip(sums, more, strict=True))

    tokens = refs.x_BLRGN.shape[0]
    widths = [planes, planes, *(columns.size for columns in still), *[planes] * shared]
    zeros = tuple(jnp.zeros((tokens, width), jnp.float32) for width in widths)
    first, second, *rest = lax.fori_loop(0, refs.dt_BHL.shape[0], one, zeros)

    def store(columns, x_TN):
        out.dx_JBLRN[:, columns] = x_TN

    store(turning, _joined(first, second))
    for columns, x_TN in zip(still, rest[: len(still)], strict=True):
        store(columns, x_TN)
    if shared:
        out.dangle_JRBLHS[...] = rest[-1]


def _back(inputs: Inputs, start_BHCS, x_BLRGN, bias_HRN, dx_BHTN, tile: Tile):
    """Gradients of queries or keys, of their bias, and the angle's: sums over ranks and blocks of heads."""
    batch, length, rank, groups, d_state = x_BLRGN.shape
    n_heads, planes = start_BHCS.shape[1], start_BHCS.shape[-1]
    heads, chunks, angle_heads = (
        _heads(inputs, tile.heads_back, tile),
        length // tile.turned,
        inputs.angle_BLHS.shape[2],
    )
    blocks = Blocks(inputs, tile.turned, heads, ranks=rank)
    document_BL = documents_in_chunks(inputs.document_BL, tile.turned)
    per_token = None if document_BL is None else blocks.spec("BL")
    dx_BHLRN = dx_BHTN.reshape(batch, n_heads, length, rank, d_state)
    refs = Back(x_BLRGN, bias_HRN, inputs.angle_BLHS, inputs.dt_BHL, start_BHCS, document_BL, dx_BHLRN)
    specs = (blocks.spec("BLRGN"), blocks.spec("HRN"), blocks.angle, blocks.spec("BHL"), blocks.spec("BHCS"), per_token)

    j = n_heads // heads
    dangle = (j, rank, batch, length, 1, planes), jnp.float32, blocks.spec("JRBL1S")
    if angle_heads > 1:
        dangle = (1, rank, batch, length, n_heads, planes), jnp.float32, blocks.spec("1RBLHS")
    outputs = BackOutputs(
        ((j, batch, length, rank, d_state), jnp.float32, blocks.spec("JBLRN")),
        ((batch, chunks, n_heads, rank, d_state), jnp.float32, blocks.spec("BCHRN")),
        dangle,
        ((rank, batch, n_heads, length), jnp.float32, blocks.spec("RBHL")),
        ((rank, batch, n_heads, chunks, planes), jnp.float32, blocks.spec("RBHCS")),
    )
    grid = (j * rank, chunks, batch)  # neighbours share queries or keys
    specs = Back(*specs, blocks.spec("BHLRN"))
    out = call(_back_kernel, "mamba3_rotate_back", tile, tile.rotate_back, grid, refs, specs, outputs)
    dx_GBLRN = jnp.sum(out.dx_JBLRN.reshape(groups, -1, *out.dx_JBLRN.shape[1:]), axis=1)
    dbias_HRN = jnp.sum(out.dbias_BCHRN, axis=(0, 1)).astype(bias_HRN.dtype)
    angles = jnp.sum(out.dangle_JRBLHS, axis=(0, 1)), jnp.sum(out.ddt_RBHL, axis=0), jnp.sum(out.dphi_RBHCS, axis=0)
    return jnp.moveaxis(dx_GBLRN, 0, 3).astype(x_BLRGN.dtype), dbias_HRN, angles


def _rotate_bwd(tile: Tile, residuals, cotangents):
    inputs, start_BHCS = residuals
    dq_BHTN, dk_BHTN, dlast_BHS = cotangents
    dq_BLRGN, dq_bias_HRN, of_q = _back(inputs, start_BHCS, inputs.q_BLRGN, inputs.q_bias_HRN, dq_BHTN, tile)
    dk_BLRGN, dk_bias_HRN, of_k = _back(inputs, start_BHCS, inputs.k_BLRGN, inputs.k_bias_HRN, dk_BHTN, tile)
    dangles = add_later(inputs, *jax.tree.map(jnp.add, of_q, of_k), dlast_BHS, tile)
    return (Inputs(dq_BLRGN, dk_BLRGN, dq_bias_HRN, dk_bias_HRN, *dangles, None),)


class Crossing(NamedTuple):
    """What the states that are kept know of the angle's gradient, so that its sums begin again there.

    A turn of all tokens from t on only turns them against the state h before t, and the last state against what is
    asked of it: with dh the gradient of h, the sum over s >= t of a plane's dphi_s is X_t - X_end, where

        X = sum_p (h_pw dh_pu - h_pu dh_pw)   of the plane (u, w)
    """

    starts_BHGAS: jax.Array  # X before every `anchor` tokens of every segment
    end_BHS: jax.Array  # X after the row
    anchor: int


def add_later(inputs: Inputs, dangle_BLHS, ddt_BHL, dphi_BHCS, dlast_BHS, tile: Tile, crossing: Crossing | None = None):
    """Gradients of angle, dt and the first angle: those that come from the tokens of a chunk, and what comes from later
    ones, whose angles are all turned by a chunk's.

    Args:
        dphi_BHCS: a chunk's sum, for the tokens before it.
        dlast_BHS: of the angle after the row.
        crossing: None: sums over the whole row, whose error grows with its length.
    """
    batch, n_heads, length = inputs.dt_BHL.shape
    chunks, planes = length // tile.turned, dlast_BHS.shape[-1]
    if crossing is None:
        later_BHCS, dfirst_BHS, within_BCQ = _later(inputs, dphi_BHCS, dlast_BHS, tile)
    else:
        later_BHCS, dfirst_BHS, within_BCQ = _later_by_anchor(inputs, dphi_BHCS, dlast_BHS, crossing, tile)
    dt_BHCQ = inputs.dt_BHL.reshape(batch, n_heads, chunks, tile.turned)
    angle_BCQHS = inputs.angle_BLHS.reshape(batch, chunks, tile.turned, -1, planes)
    if within_BCQ is not None:
        dt_BHCQ = jnp.where(within_BCQ[:, None], dt_BHCQ, 0.0)
        angle_BCQHS = jnp.where(within_BCQ[..., None, None], angle_BCQHS, 0.0)
    exact = {"precision": "highest"}
    if angle_BCQHS.shape[3] == 1:
        more_BHCQ = jnp.einsum("bcqs,bhcs->bhcq", angle_BCQHS[:, :, :, 0], later_BHCS, **exact)
        more_BCQHS = jnp.einsum("bhcq,bhcs->bcqs", dt_BHCQ, later_BHCS, **exact)
    else:
        more_BHCQ = jnp.einsum("bcqhs,bhcs->bhcq", angle_BCQHS, later_BHCS, **exact)
        more_BCQHS = jnp.moveaxis(dt_BHCQ[..., None] * later_BHCS[:, :, :, None], 1, 3)
    return dangle_BLHS + more_BCQHS.reshape(dangle_BLHS.shape), ddt_BHL + more_BHCQ.reshape(ddt_BHL.shape), dfirst_BHS


def _later(inputs: Inputs, dphi_BHCS, dlast_BHS, tile: Tile):
    """The gradient that reaches the end of every chunk from later tokens, that of the angle before the row, and which
    tokens of a chunk (B, C, Q) its end reaches (None: all)."""
    if inputs.document_BL is None:
        # Not a sum from the end: XLA for GPU takes a time that is quadratic in the number of chunks for it.
        up_to_BHCS = jnp.cumsum(dphi_BHCS, axis=2)
        all_BHS = up_to_BHCS[:, :, -1] + dlast_BHS
        return all_BHS[:, :, None] - up_to_BHCS, all_BHS, None
    sums_BHCS = jnp.concatenate([dphi_BHCS, dlast_BHS[:, :, None]], axis=2)
    goes_on_BC, within_BCQ = _reached(inputs.document_BL, tile)
    goes_on_BC = jnp.pad(goes_on_BC, ((0, 0), (0, 1)), constant_values=True)[:, None, :, None]
    sums_BHCS, _ = lax.associative_scan(_compose, (sums_BHCS, goes_on_BC), axis=2, reverse=True)
    return sums_BHCS[:, :, 1:], sums_BHCS[:, :, 0], within_BCQ


def _later_by_anchor(inputs: Inputs, dphi_BHCS, dlast_BHS, crossing: Crossing, tile: Tile):
    """As `_later`, with sums between two anchors alone."""
    batch, n_heads, chunks, planes = dphi_BHCS.shape
    segments, anchors = crossing.starts_BHGAS.shape[2:4]
    in_segment, in_anchor = chunks // segments, crossing.anchor // tile.turned
    spare = anchors * in_anchor - in_segment

    def by_anchor(array_BHCS, **how):
        """(B, H, A, chunks between two anchors, S), A of all segments."""
        array_BHGCS = array_BHCS.reshape(*array_BHCS.shape[:2], segments, in_segment, -1)
        array_BHGCS = jnp.pad(array_BHGCS, [(0, 0)] * 3 + [(0, spare), (0, 0)], **how)
        return array_BHGCS.reshape(*array_BHCS.shape[:2], segments * anchors, in_anchor, -1)

    start_BHAS = crossing.starts_BHGAS.reshape(batch, n_heads, -1, planes)
    end_BHAS = jnp.concatenate([start_BHAS[:, :, 1:], crossing.end_BHS[:, :, None]], axis=2)
    first_BHS, after_BHAS = start_BHAS[:, :, 0], (dlast_BHS - crossing.end_BHS)[:, :, None]
    sums_BHACS, within_BCQ = by_anchor(dphi_BHCS), None
    if inputs.document_BL is None:
        end_BHAS, first_BHS = end_BHAS + after_BHAS, first_BHS + after_BHAS[:, :, 0]
        up_to_BHACS = jnp.cumsum(sums_BHACS, axis=3)
        later_BHACS = up_to_BHACS[:, :, :, -1:] - up_to_BHACS + end_BHAS[:, :, :, None]
    else:
        places = [g * in_segment * tile.turned + a * crossing.anchor for g in range(segments) for a in range(anchors)]
        before_BA = jnp.pad(inputs.document_BL, ((0, 0), (1, 0)))[:, np.array([*places, inputs.dt_BHL.shape[2]])]
        is_last_BHAS = (before_BA == before_BA[:, -1:])[:, None, :, None]
        end_BHAS += jnp.where(is_last_BHAS[:, :, 1:], after_BHAS, 0.0)
        first_BHS += jnp.where(is_last_BHAS[:, :, :1], after_BHAS, 0.0)[:, :, 0]
        goes_on_BC, within_BCQ = _reached(inputs.document_BL, tile)
        goes_on_BHACS = by_anchor(goes_on_BC[:, None, :, None], constant_values=True)
        goes_on_BHACS = jnp.pad(goes_on_BHACS, [(0, 0)] * 3 + [(0, 1), (0, 0)], constant_values=True)
        sums_BHACS = jnp.concatenate([sums_BHACS, end_BHAS[:, :, :, None]], axis=3)
        sums_BHACS, _ = lax.associative_scan(_compose, (sums_BHACS, goes_on_BHACS), axis=3, reverse=True)
        later_BHACS = sums_BHACS[:, :, :, 1:]
    later_BHGCS = later_BHACS.reshape(batch, n_heads, segments, -1, planes)[:, :, :, :in_segment]
    return later_BHGCS.reshape(dphi_BHCS.shape), first_BHS, within_BCQ


def _reached(document_BL, tile: Tile):
    """Whether no document begins in a chunk (B, C), and which of its tokens (B, C, Q) are of its last's document."""
    document_BCQ = documents_in_chunks(document_BL, tile.turned).reshape(document_BL.shape[0], -1, tile.turned)
    return document_BCQ[:, :, -1] == 0, document_BCQ == document_BCQ[:, :, -1:]


def _compose(later, sooner):
    """For scans from the end: sums, and whether they go on."""
    (total, goes_on), (more, more_goes_on) = later, sooner
    return more + jnp.where(more_goes_on, total, 0.0), goes_on & more_goes_on


_rotate.defvjp(_rotate_fwd, _rotate_bwd)
