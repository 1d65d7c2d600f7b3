"""The gradients of `rotate`: of queries and keys, their bias, the angle and dt.

    dphi_t = sum over queries and keys of (g_w u - g_u w),   d(angle_t dt_t) = sum_{s >= t} dphi_s
    r_t = q_t . dq_t - k_t . dk_t

with g the gradient of a rotated pair (u, w); r is what the decay's gradient comes from (`gradients.decay_bwd`). u and w
are those that the scan read, rounded as they were: then what a pair of tokens of one chunk adds to these sums cancels.

Entries that rotate and those that do not are in two kernels: more programs of fewer registers.
"""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ssm.gradients import AngleSums
from pallas_kernels.ssm.operands import Operands
from pallas_kernels.ssm.triton.common import NN, Float24, call, product, rounded
from pallas_kernels.ssm.triton.config import Tile
from pallas_kernels.ssm.triton.rotate import (
    Angles,
    Blocks,
    by_head,
    heads_of_program,
    joined,
    pairs_of,
    phi,
    rotary_pairs,
    same_document,
    sincos,
)


class Side(NamedTuple):
    """Queries or keys, and the gradient of what they were rotated to."""

    x_BLRGN: jax.Array
    bias_HRN: jax.Array | None
    dx_BHLRN: Float24


class RotateBwdRefs(NamedTuple):
    """What one program sees: one rank of a chunk of a block of heads."""

    q: Side
    k: Side
    angles: Angles | None  # None: of the entries that do not rotate


class SideSums(NamedTuple):
    """Partial sums, float32: over one block of heads (J), or one chunk (C)."""

    dx_JBLRX: jax.Array
    dbias_BCHRX: jax.Array | None


class PartialAngleSums(NamedTuple):
    """`AngleSums` of one rank (R) and of one block of heads (J)."""

    dangle_JRBLHS: jax.Array
    ddt_RBHL: jax.Array
    dphi_RBHCS: jax.Array


class RotateBwdSums(NamedTuple):
    """What one program adds up."""

    q: SideSums
    k: SideSums
    r_RBHL: jax.Array
    angles: PartialAngleSums | None


class RotateGradients(NamedTuple):
    """Sums over ranks and blocks of heads. None: of what is absent."""

    dq_BLRGN: jax.Array
    dk_BLRGN: jax.Array
    dq_bias_HRN: jax.Array | None
    dk_bias_HRN: jax.Array | None
    r_BHL: jax.Array
    angles: AngleSums | None


def rotate_bwd(operands: Operands, angles: Angles | None, dq_BHTN: Float24, dk_BHTN: Float24, *, tile: Tile):
    """Return the `RotateGradients` from the gradients of rotated queries and keys."""
    batch, length, rank, groups, d_state = operands.tokens.q_BLRGN.shape
    n_heads, pairs = operands.n_heads, rotary_pairs(operands)
    by_rank = lambda x: x.reshape(batch, n_heads, length, rank, d_state)  # noqa: E731
    dq_BHLRN, dk_BHLRN = jax.tree.map(by_rank, (dq_BHTN, dk_BHTN))
    q = Side(operands.tokens.q_BLRGN, operands.weights.q_bias_HRN, dq_BHLRN)
    k = Side(operands.tokens.k_BLRGN, operands.weights.k_bias_HRN, dk_BHLRN)
    parts = [_sums(operands, RotateBwdRefs(q, k, angles), 0, tile)]
    if d_state > 2 * pairs:
        parts.append(_sums(operands, RotateBwdRefs(q, k, None), 1, tile))

    def over_heads(side: Side, sums: list[SideSums]):
        dx_JBLRN = jnp.concatenate([each.dx_JBLRX for each in sums], axis=-1)
        dx_GBLRN = jnp.sum(dx_JBLRN.reshape(groups, -1, batch, length, rank, d_state), axis=1)
        dx_BLRGN = jnp.moveaxis(dx_GBLRN, 0, 3).astype(side.x_BLRGN.dtype)
        if side.bias_HRN is None:
            return dx_BLRGN, None
        dbias_BCHRN = jnp.concatenate([each.dbias_BCHRX for each in sums], axis=-1)
        return dx_BLRGN, jnp.sum(dbias_BCHRN, axis=(0, 1)).astype(side.bias_HRN.dtype)

    dq_BLRGN, dq_bias_HRN = over_heads(q, [part.q for part in parts])
    dk_BLRGN, dk_bias_HRN = over_heads(k, [part.k for part in parts])
    r_BHL = sum(jnp.sum(part.r_RBHL, axis=0) for part in parts)
    of_angles = None
    if angles is not None:
        sums = parts[0].angles
        of_angles = AngleSums(
            dangle_BLHS=jnp.sum(sums.dangle_JRBLHS, axis=(0, 1)),
            ddt_BHL=jnp.sum(sums.ddt_RBHL, axis=0),
            dphi_BHCS=jnp.sum(sums.dphi_RBHCS, axis=0),
        )
    return RotateGradients(
        dq_BLRGN=dq_BLRGN,
        dk_BLRGN=dk_BLRGN,
        dq_bias_HRN=dq_bias_HRN,
        dk_bias_HRN=dk_bias_HRN,
        r_BHL=r_BHL,
        angles=of_angles,
    )


def _sums(operands: Operands, refs: RotateBwdRefs, part: int, tile: Tile) -> RotateBwdSums:
    """Run the kernel of the entries that rotate (`part` 0), the first 2 S of N, or of the others, as many."""
    batch, length, rank = operands.tokens.q_BLRGN.shape[:3]
    n_heads, pairs, chunks = operands.n_heads, rotary_pairs(operands), length // tile.rotate_tokens
    heads = heads_of_program(operands, tile.rotate_bwd_heads, tile)
    j = n_heads // heads
    array = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731

    def side_sums(side: Side):
        dbias_BCHRX = None if side.bias_HRN is None else array(batch, chunks, n_heads, rank, 2 * pairs)
        return SideSums(array(j, batch, length, rank, 2 * pairs), dbias_BCHRX)

    angles = None
    if refs.angles is not None:
        blocks, angle_heads = (j, 1) if refs.angles.angle_BLHS.shape[2] == 1 else (1, n_heads)
        angles = PartialAngleSums(
            dangle_JRBLHS=array(blocks, rank, batch, length, angle_heads, pairs),
            ddt_RBHL=array(rank, batch, n_heads, length),
            dphi_RBHCS=array(rank, batch, n_heads, chunks, pairs),
        )
    return call(
        _kernel,
        refs,
        RotateBwdSums(side_sums(refs.q), side_sums(refs.k), array(rank, batch, n_heads, length), angles),
        name="mamba3_still_back" if angles is None else "mamba3_rotate_back",
        # Neighbouring programs share queries or keys.
        grid=Blocks(operands, tokens=tile.rotate_tokens, heads=heads, ranks=rank, part=part),
        tile=tile,
        launch=tile.rotate_bwd,
    )


class HeadSums(NamedTuple):
    """What a program adds up over its heads: gradients of the pairs (u, w), and of an angle that heads share."""

    dq_TS: tuple
    dk_TS: tuple
    dangle_TS: jax.Array | None


def _kernel(refs: RotateBwdRefs, out: RotateBwdSums, *, tile: Tile):
    angles, shared = refs.angles, False
    if angles is not None:
        document_T = None if angles.document_BL is None else angles.document_BL[...]
        angle, shared = by_head(angles.angle_BLHS), len(angles.angle_BLHS.shape) == 2
    tokens, width = refs.q.x_BLRGN.shape

    def one(head, sums: HeadSums):
        if angles is not None:
            dt_T = angles.dt_BHL[head, :]
            phi_TS = phi(angle(head), dt_T, angles.start_BHCS[head, :], document_T=document_T, tile=tile)
            sin_TS, cos_TS = sincos(phi_TS, tile)
        r_TS, dphi_TS, d = 0.0, 0.0, []
        for side, to, sign in ((refs.q, out.q, 1), (refs.k, out.k, -1)):
            x_TN = side.x_BLRGN[...].astype(jnp.float32)
            if side.bias_HRN is not None:
                x_TN += side.bias_HRN[head, :].astype(jnp.float32)[None]
            u_TS, w_TS = pairs_of(x_TN)
            gu_TS, gw_TS = pairs_of(side.dx_BHLRN.load((head, slice(None), slice(None)), tile))
            if angles is not None:
                u_TS, w_TS = u_TS * cos_TS - w_TS * sin_TS, u_TS * sin_TS + w_TS * cos_TS
            u_TS, w_TS = rounded(u_TS, w_TS, side.x_BLRGN.dtype, tile)
            r_TS += sign * (gu_TS * u_TS + gw_TS * w_TS)
            if angles is not None:
                dphi_TS += gw_TS * u_TS - gu_TS * w_TS
                gu_TS, gw_TS = gu_TS * cos_TS + gw_TS * sin_TS, gw_TS * cos_TS - gu_TS * sin_TS
            if side.bias_HRN is not None:
                to.dbias_BCHRX[head, :] = joined(jnp.sum(gu_TS, axis=0), jnp.sum(gw_TS, axis=0))
            d.append((gu_TS, gw_TS))
        out.r_RBHL[head, :] = jnp.sum(r_TS, axis=1)

        dangle_TS = None
        if angles is not None:
            later_TS = _later(dphi_TS, document_T, tile)
            out.angles.ddt_RBHL[head, :] = jnp.sum(angle(head) * later_TS, axis=1)
            if document_T is not None:
                dphi_TS = jnp.where(document_T[:, None] == 0, dphi_TS, 0.0)
            out.angles.dphi_RBHCS[head, :] = jnp.sum(dphi_TS, axis=0)
            dangle_TS = dt_T[:, None] * later_TS
            if not shared:
                out.angles.dangle_JRBLHS[:, head, :], dangle_TS = dangle_TS, None
        dq_TS, dk_TS = d
        return jax.tree.map(operator.add, sums, HeadSums(dq_TS, dk_TS, dangle_TS))

    zeros_TS = jnp.zeros((tokens, width // 2), jnp.float32)
    zeros = HeadSums((zeros_TS, zeros_TS), (zeros_TS, zeros_TS), zeros_TS if shared else None)
    sums = lax.fori_loop(0, out.r_RBHL.shape[0], one, zeros)
    out.q.dx_JBLRX[...], out.k.dx_JBLRX[...] = joined(*sums.dq_TS), joined(*sums.dk_TS)
    if shared:
        out.angles.dangle_JRBLHS[...] = sums.dangle_TS


def _later(dphi_TS, document_T, tile: Tile):
    """Return the sum over the tokens s >= t of the chunk and the document."""
    if document_T is None:
        return jnp.sum(dphi_TS, axis=0)[None, :] - jnp.cumsum(dphi_TS, axis=0) + dphi_TS
    mask_TT = same_document(document_T, transposed=True).astype(jnp.float32)
    return product(mask_TT, dphi_TS, NN, dtype=jnp.float32, tile=tile)
