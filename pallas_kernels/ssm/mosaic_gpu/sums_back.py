"""What `query_back` and `key_back` leave to be added up: over heads, and the angle's gradient over later tokens.

In Pallas Triton, as `phase`: both stream through memory, and Mosaic GPU has no sums along a tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ssm.gradients import AngleSums, Crossing, add_later, documents_in_chunks
from pallas_kernels.ssm.triton import angle_back, rotate
from pallas_kernels.ssm.triton.common import Launch, Tile, call

HEADS = 16  # at most, that a program takes one after another


class Shared(NamedTuple):
    """Partial sums, float32."""

    dx_JBLX: jax.Array  # over a block of heads
    dbias_BCHX: jax.Array  # over a chunk of tokens


def heads_back(dx_BHLRN, groups: int, tile: Tile):
    """The gradient of the queries or keys that a group's heads share, and of each head's bias.

    Args:
        dx_BHLRN: every head's, bfloat16.

    Returns:
        dx_BLRGN and dbias_HRN, float32.
    """
    batch, n_heads, length, rank, d_state = dx_BHLRN.shape
    chunks = length // tile.turned
    heads = _heads(n_heads // groups, batch * n_heads * chunks * rank)
    blocks = n_heads // heads

    def spec(axes: str) -> pl.BlockSpec:
        sizes = {"L": tile.turned, "H": heads, "X": d_state}
        index = lambda i, c, b: {"B": b, "C": c, "L": c, "H": i // rank, "J": i // rank, "X": i % rank}  # noqa: E731
        return pl.BlockSpec(
            tuple(sizes.get(axis) for axis in axes), lambda *at: tuple(index(*at)[axis] for axis in axes)
        )

    (out,) = call(
        _heads_kernel,
        "mamba3_heads_back",
        tile,
        Launch(1, 1),
        (blocks * rank, chunks, batch),
        (dx_BHLRN.reshape(batch, n_heads, length, rank * d_state),),
        (spec("BHLX"),),
        [
            Shared(
                ((blocks, batch, length, rank * d_state), jnp.float32, spec("JBLX")),
                ((batch, chunks, n_heads, rank * d_state), jnp.float32, spec("BCHX")),
            )
        ],
    )
    dx_GBLX = jnp.sum(out.dx_JBLX.reshape(groups, -1, batch, length, rank * d_state), axis=1)
    dx_BLRGN = jnp.moveaxis(dx_GBLX.reshape(groups, batch, length, rank, d_state), 0, 3)
    return dx_BLRGN, jnp.sum(out.dbias_BCHX, axis=(0, 1)).reshape(n_heads, rank, d_state)


def _heads(a_group: int, programs: int) -> int:
    """Heads that one program takes: a power of two, all of one group, few where programs are few."""
    most = max(1, min(HEADS, programs // 4096))
    return max(size for size in (1, 2, 4, 8, 16) if size <= most and a_group % size == 0)


def _heads_kernel(refs, outs, *, tile: Tile):
    del tile
    (dx_HLX,), (out,) = refs, outs

    def one(head, sum_LX):
        head_LX = dx_HLX[head, :, :].astype(jnp.float32)
        out.dbias_BCHX[head, :] = jnp.sum(head_LX, axis=0)
        return sum_LX + head_LX

    out.dx_JBLX[...] = lax.fori_loop(0, dx_HLX.shape[0], one, jnp.zeros(out.dx_JBLX.shape, jnp.float32))


class Angles(NamedTuple):
    """What one program sees: a chunk of a block of heads."""

    angle_BLHS: jax.Array
    dt_BHL: jax.Array
    document_BL: jax.Array | None
    of_q_BHLS: jax.Array  # the gradient of the angle at each token, its two parts
    of_k_BHLS: jax.Array


class AnglesOutputs(NamedTuple):
    """float32, from the tokens of a chunk alone: see `rotate_back.Angles`."""

    dangle_JBLHS: jax.Array
    ddt_BHL: jax.Array
    dphi_BHCS: jax.Array


def angles_back(inputs: rotate.Inputs, of_q_BHLS, of_k_BHLS, dlast_BHS, crossing: Crossing, tile: Tile):
    """Gradients of angle_BLHS, dt_BHL and first_BHS from those of the angle at every token and after the last."""
    batch, n_heads, length = inputs.dt_BHL.shape
    chunks, planes, angle_heads = length // tile.turned, dlast_BHS.shape[-1], inputs.angle_BLHS.shape[2]
    heads = _heads(n_heads, batch * n_heads * chunks)
    document_BL = documents_in_chunks(inputs.document_BL, tile.turned)

    def spec(axes: str) -> pl.BlockSpec:
        sizes = {"L": tile.turned, "H": heads, "S": planes}
        index = lambda j, c, b: {"B": b, "C": c, "L": c, "H": j, "J": j, "S": 0, "1": 0}  # noqa: E731
        return pl.BlockSpec(
            tuple(sizes.get(axis) for axis in axes), lambda *at: tuple(index(*at)[axis] for axis in axes)
        )

    blocks = n_heads // heads
    if angle_heads == 1:
        angle, dangle = spec("BL1S"), ((blocks, batch, length, 1, planes), jnp.float32, spec("JBL1S"))
    else:
        angle, dangle = spec("BLHS"), ((1, batch, length, n_heads, planes), jnp.float32, spec("1BLHS"))
    per_token = None if document_BL is None else spec("BL")
    (out,) = call(
        _angles_kernel,
        "mamba3_angles_back",
        tile,
        Launch(1, 1),
        (blocks, chunks, batch),
        Angles(inputs.angle_BLHS, inputs.dt_BHL, document_BL, of_q_BHLS, of_k_BHLS),
        Angles(angle, spec("BHL"), per_token, spec("BHLS"), spec("BHLS")),
        [
            AnglesOutputs(
                dangle,
                ((batch, n_heads, length), jnp.float32, spec("BHL")),
                ((batch, n_heads, chunks, planes), jnp.float32, spec("BHCS")),
            )
        ],
    )
    dangle_BLHS = jnp.sum(out.dangle_JBLHS, axis=0)
    sums = AngleSums(dangle_BLHS, out.ddt_BHL, out.dphi_BHCS)
    return add_later(inputs.angle_BLHS, inputs.dt_BHL, inputs.document_BL, sums, dlast_BHS, crossing)


def _angles_kernel(refs: Angles, outs, *, tile: Tile):
    (out,) = outs
    document_T = None if refs.document_BL is None else refs.document_BL[...]
    angle, shared = rotate._of_head(refs.angle_BLHS), len(refs.angle_BLHS.shape) == 2

    def one(head, sum_TS):
        dphi_TS = refs.of_q_BHLS[head, :, :].astype(jnp.float32) + refs.of_k_BHLS[head, :, :].astype(jnp.float32)
        suffix_TS = angle_back.suffix(dphi_TS, document_T, tile)
        out.ddt_BHL[head, :] = jnp.sum(angle(head) * suffix_TS, axis=1)
        if document_T is not None:
            dphi_TS = jnp.where(document_T[:, None] == 0, dphi_TS, 0.0)
        out.dphi_BHCS[head, :] = jnp.sum(dphi_TS, axis=0)
        dangle_TS = refs.dt_BHL[head, :][:, None] * suffix_TS
        if shared:
            return sum_TS + dangle_TS
        out.dangle_JBLHS[:, head, :] = dangle_TS
        return sum_TS

    sum_TS = jnp.zeros((refs.dt_BHL.shape[1], out.dphi_BHCS.shape[-1]), jnp.float32)
    sum_TS = lax.fori_loop(0, refs.dt_BHL.shape[0], one, sum_TS)
    if shared:
        out.dangle_JBLHS[...] = sum_TS
