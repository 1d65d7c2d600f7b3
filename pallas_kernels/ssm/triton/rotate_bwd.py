"""The gradients of `rotate`: of queries and keys, their bias, the angle and dt.

With g the gradient of a turned plane (u, w), the angle at a token gets dphi = g_w u - g_u w, summed over queries and
keys, and angle_t dt_t the sum of that over the tokens from t on. u and w are those that the scan read, rounded as they
were: then what a pair of one chunk adds to these sums cancels. So do its parts of q . dq - k . dk, which the gradient
of the decay takes from here.

Entries that turn and those that do not are in two kernels: more programs of fewer registers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ssm.gradients import documents_in_chunks
from pallas_kernels.ssm.triton.angle_back import suffix
from pallas_kernels.ssm.triton.common import Split, Tile, call, rounded
from pallas_kernels.ssm.triton.rotate import Blocks, Inputs, _heads, _joined, _of_head, _pairs, _phi, _sincos


class Side(NamedTuple):
    """Queries or keys, and the gradient of what they were turned to."""

    x_BLRGN: jax.Array
    bias_HRN: jax.Array | None
    dx_BHLRN: Split


class Back(NamedTuple):
    """What one program sees: one rank of a chunk of a block of heads, as `rotate.Turn`."""

    q: Side
    k: Side
    dt_BHL: jax.Array | None  # these None: of the entries that do not turn
    angle_BLHS: jax.Array | None
    start_BHCS: jax.Array | None
    document_BL: jax.Array | None


class SideOutputs(NamedTuple):
    """Partial sums, float32: over one block of heads (J), or one chunk (C)."""

    dx_JBLRN: jax.Array
    dbias_BCHRN: jax.Array | None


class Angles(NamedTuple):
    """Partial sums, float32: of one rank (R), of one block of heads (J)."""

    dangle_JRBLHS: jax.Array  # from the tokens of the chunk alone
    ddt_RBHL: jax.Array  # likewise
    dphi_RBHCS: jax.Array  # the chunk's sum, for the tokens before it


class BackOutputs(NamedTuple):
    q: SideOutputs
    k: SideOutputs
    received_RBHL: jax.Array  # q . dq - k . dk
    angles: Angles | None


class Gradients(NamedTuple):
    """Sums over ranks and blocks of heads; those of the angle as in `Angles`. None: of what is absent."""

    dq_BLRGN: jax.Array
    dk_BLRGN: jax.Array
    dq_bias_HRN: jax.Array | None
    dk_bias_HRN: jax.Array | None
    received_BHL: jax.Array
    dangle_BLHS: jax.Array | None
    ddt_BHL: jax.Array | None
    dphi_BHCS: jax.Array | None


def _kernel(refs: Back, out: BackOutputs, *, tile: Tile):
    turning = refs.angle_BLHS is not None
    if turning:
        document_T = None if refs.document_BL is None else refs.document_BL[...]
        angle, shared = _of_head(refs.angle_BLHS), len(refs.angle_BLHS.shape) == 2
    tokens, width = refs.q.x_BLRGN.shape

    def one(head, sums):
        if turning:
            dt_T = refs.dt_BHL[head, :]
            sin_TS, cos_TS = _sincos(_phi(angle(head), dt_T, refs.start_BHCS[head, :], document_T, tile), tile)
        received_TS, dphi_TS, more = 0.0, 0.0, []
        for side, to, sign in ((refs.q, out.q, 1), (refs.k, out.k, -1)):
            x_TN = side.x_BLRGN[...].astype(jnp.float32)
            if side.bias_HRN is not None:
                x_TN += side.bias_HRN[head, :].astype(jnp.float32)[None]
            (u_TS, w_TS), (gu_TS, gw_TS) = (
                _pairs(x_TN),
                _pairs(side.dx_BHLRN.load((head, slice(None), slice(None)), tile)),
            )
            if turning:
                u_TS, w_TS = u_TS * cos_TS - w_TS * sin_TS, u_TS * sin_TS + w_TS * cos_TS
            u_TS, w_TS = rounded(u_TS, w_TS, side.x_BLRGN.dtype, tile)
            received_TS += sign * (gu_TS * u_TS + gw_TS * w_TS)
            if turning:
                dphi_TS += gw_TS * u_TS - gu_TS * w_TS
                gu_TS, gw_TS = gu_TS * cos_TS + gw_TS * sin_TS, gw_TS * cos_TS - gu_TS * sin_TS
            if side.bias_HRN is not None:
                to.dbias_BCHRN[head, :] = _joined(jnp.sum(gu_TS, axis=0), jnp.sum(gw_TS, axis=0))
            more += [gu_TS, gw_TS]
        out.received_RBHL[head, :] = jnp.sum(received_TS, axis=1)

        if turning:
            suffix_TS = suffix(dphi_TS, document_T, tile)
            out.angles.ddt_RBHL[head, :] = jnp.sum(angle(head) * suffix_TS, axis=1)
            if document_T is not None:
                dphi_TS = jnp.where(document_T[:, None] == 0, dphi_TS, 0.0)
            out.angles.dphi_RBHCS[head, :] = jnp.sum(dphi_TS, axis=0)
            dangle_TS = dt_T[:, None] * suffix_TS
            if shared:
                more.append(dangle_TS)
            else:
                out.angles.dangle_JRBLHS[:, head, :] = dangle_TS
        return tuple(sum_ + x for sum_, x in zip(sums, more, strict=True))

    zeros = (jnp.zeros((tokens, width // 2), jnp.float32),) * (4 + (turning and shared))
    sums = lax.fori_loop(0, out.received_RBHL.shape[0], one, zeros)
    out.q.dx_JBLRN[...], out.k.dx_JBLRN[...] = _joined(*sums[:2]), _joined(*sums[2:4])
    if turning and shared:
        out.angles.dangle_JRBLHS[...] = sums[4]


TURNING = ("dt_BHL", "angle_BLHS", "start_BHCS", "document_BL")


def rotate_back(inputs: Inputs, start_BHCS, dq_BHTN: Split, dk_BHTN: Split, tile: Tile) -> Gradients:
    batch, length, rank, groups, d_state = inputs.q_BLRGN.shape
    n_heads, planes = inputs.n_heads, inputs.planes
    per_rank = lambda x: x.reshape(batch, n_heads, length, rank, d_state)  # noqa: E731
    dq_BHLRN, dk_BHLRN = jax.tree.map(per_rank, (dq_BHTN, dk_BHTN))
    refs = Back(
        Side(inputs.q_BLRGN, inputs.q_bias_HRN, dq_BHLRN),
        Side(inputs.k_BLRGN, inputs.k_bias_HRN, dk_BHLRN),
        inputs.dt_BHL,
        inputs.angle_BLHS,
        start_BHCS,
        None if inputs.angle_BLHS is None else documents_in_chunks(inputs.document_BL, tile.turned),
    )
    parts = [_call(inputs, refs, 0, tile)]
    if d_state > 2 * planes:
        parts.append(_call(inputs, refs._replace(**dict.fromkeys(TURNING)), 1, tile))

    def of_heads(name: str):
        dx_JBLRN = jnp.concatenate([getattr(part, name).dx_JBLRN for part in parts], axis=-1)
        dx_GBLRN = jnp.sum(dx_JBLRN.reshape(groups, -1, batch, length, rank, d_state), axis=1)
        side, dx_BLRGN = getattr(refs, name), jnp.moveaxis(dx_GBLRN, 0, 3)
        if side.bias_HRN is None:
            return dx_BLRGN.astype(side.x_BLRGN.dtype), None
        dbias_BCHRN = jnp.concatenate([getattr(part, name).dbias_BCHRN for part in parts], axis=-1)
        dbias_HRN = jnp.sum(dbias_BCHRN, axis=(0, 1))
        return dx_BLRGN.astype(side.x_BLRGN.dtype), dbias_HRN.astype(side.bias_HRN.dtype)

    (dq_BLRGN, dq_bias_HRN), (dk_BLRGN, dk_bias_HRN) = of_heads("q"), of_heads("k")
    received_BHL = sum(jnp.sum(part.received_RBHL, axis=0) for part in parts)
    angles, of_angles = parts[0].angles, [None] * 3
    if angles is not None:
        sums = ((angles.dangle_JRBLHS, (0, 1)), (angles.ddt_RBHL, 0), (angles.dphi_RBHCS, 0))
        of_angles = [jnp.sum(x, axis=axis) for x, axis in sums]
    return Gradients(dq_BLRGN, dk_BLRGN, dq_bias_HRN, dk_bias_HRN, received_BHL, *of_angles)


def _call(inputs: Inputs, refs: Back, part: int, tile: Tile) -> BackOutputs:
    """Of the entries that turn (`part` 0), the first 2 S of N, or of the others, as many."""
    batch, length, rank = inputs.q_BLRGN.shape[:3]
    n_heads, planes, chunks = inputs.n_heads, inputs.planes, length // tile.turned
    heads = _heads(inputs, tile.heads_back, tile)
    blocks, j = Blocks(inputs, tile.turned, heads, ranks=rank, part=part), n_heads // heads
    gradient = jax.tree.map(lambda _: blocks.spec("BHLRN"), refs.q.dx_BHLRN)
    biased = [None if side.bias_HRN is None else blocks.spec("HRN") for side in (refs.q, refs.k)]
    sides = [Side(blocks.spec("BLRGN"), bias, gradient) for bias in biased]
    specs = Back(*sides, blocks.spec("BHL"), blocks.angle, blocks.spec("BHCS"), blocks.spec("BL"))
    specs = Back(*(None if x is None else spec for x, spec in zip(refs, specs, strict=True)))
    of_tokens = (j, batch, length, rank, 2 * planes), jnp.float32, blocks.spec("JBLRX")
    of_bias = (batch, chunks, n_heads, rank, 2 * planes), jnp.float32, blocks.spec("BCHRX")
    sides_out = [SideOutputs(of_tokens, None if bias is None else of_bias) for bias in biased]
    rows = (rank, batch, n_heads, length), jnp.float32, blocks.spec("RBHL")
    angles = None
    if refs.angle_BLHS is not None:
        dangle = (j, rank, batch, length, 1, planes), jnp.float32, blocks.spec("JRBL1S")
        if refs.angle_BLHS.shape[2] > 1:
            dangle = (1, rank, batch, length, n_heads, planes), jnp.float32, blocks.spec("1RBLHS")
        angles = Angles(dangle, rows, ((rank, batch, n_heads, chunks, planes), jnp.float32, blocks.spec("RBHCS")))
    out = BackOutputs(*sides_out, rows, angles)
    grid = (j * rank, chunks, batch)  # neighbours share queries or keys
    name = "mamba3_still_back" if angles is None else "mamba3_rotate_back"
    return call(_kernel, name, tile, tile.rotate_back, grid, refs, specs, out)
