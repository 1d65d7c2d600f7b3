"""The cumulative angle of every token and head, for `scan`: phi_t = phi_{t-1} + angle_t dt_t, in 2^-16 turns.

Summed as in `pallas_kernels.ssm.triton.rotate`, in 32 bits, and rounded at the end: to 5e-5 rad, where bfloat16 queries
and keys have 2e-3 of themselves. Pallas Triton too: Mosaic GPU has no sums along a tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ssm.angle import to_radians
from pallas_kernels.ssm.gradients import documents_in_chunks
from pallas_kernels.ssm.triton import rotate
from pallas_kernels.ssm.triton.common import Tile, call


class Phase(NamedTuple):
    """What one program sees: a chunk of a block of heads."""

    angle_BLHS: jax.Array
    dt_BHL: jax.Array
    start_BHCS: jax.Array
    document_BL: jax.Array | None


def phase(inputs: rotate.Inputs, tile: Tile):
    """phase_BHLS, int16, and the last angle in radians, in [0, 2 pi); of `inputs`, no biases."""
    batch, length = inputs.q_BLRGN.shape[:2]
    n_heads, planes = inputs.first_BHS.shape[1:]
    document_BL = documents_in_chunks(inputs.document_BL, tile.turned)
    start_BHCS, last_BHS = rotate._starts(inputs, document_BL, tile)
    heads = rotate._heads(inputs, tile.heads_turned, tile)
    blocks = rotate.Blocks(inputs, tile.turned, heads)
    per_token = None if document_BL is None else blocks.spec("BL")
    (phase_BHLS,) = call(
        _kernel,
        "mamba3_phase",
        tile,
        tile.rotate,
        (n_heads // heads, length // tile.turned, batch),
        Phase(inputs.angle_BLHS, inputs.dt_BHL, start_BHCS, document_BL),
        Phase(blocks.angle, blocks.spec("BHL"), blocks.spec("BHCS"), per_token),
        [((batch, n_heads, length, planes), jnp.int16, blocks.spec("BHLS"))],
    )
    return phase_BHLS, to_radians(last_BHS)


def _kernel(refs: Phase, out_ref, *, tile: Tile):
    document_T = None if refs.document_BL is None else refs.document_BL[...]
    angle = rotate._of_head(refs.angle_BLHS)

    def one(head, done):
        phi_TS = rotate._phi(angle(head), refs.dt_BHL[head, :], refs.start_BHCS[head, :], document_T, tile)
        out_ref[0][head, :, :] = ((phi_TS + 2**15) >> 16).astype(jnp.int16)
        return done

    lax.fori_loop(0, refs.dt_BHL.shape[0], one, 0)
