"""The angle before every chunk and after the last token, exact however long the row is, in plain XLA.

Multiples of a power of two add up exactly in float32 below 2^24 of them, in any order; modulo a turn nothing grows. So
every increment angle dt is such a multiple and a small rest (`parts.increments`), summed apart.
"""

import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.ssm.mosaic_tpu.parts import INVERSE_TURN, increments


def starts(angle_BLHS, dt_BLH, first_BHS, document_BL, tokens: int):
    """start_BCHS in turns, in [0, 1), and the last angle_BHS in radians, in [0, 2 pi).

    Args:
        angle_BLHS: radians per unit dt; the H axis may be 1.
        first_BHS: radians.
        document_BL: document starts in the chunk up to each token, or None.
        tokens: of a chunk.
    """
    batch, length, _ = dt_BLH.shape
    step = 2.0 ** (math.ceil(math.log2(tokens / 2 + 2)) - 24)
    chunks = length // tokens
    # Tokens last: XLA for TPU keeps dt and few planes so, and sums along lanes that are full.
    dt_BCH1Q = jnp.moveaxis(dt_BLH.reshape(batch, chunks, tokens, -1), 2, 3)[:, :, :, None]
    angle_BCHSQ = jnp.moveaxis(angle_BLHS.reshape(batch, chunks, tokens, *angle_BLHS.shape[2:]), 2, 4)
    parts = increments(angle_BCHSQ, dt_BCH1Q, step)
    left_BC11 = jnp.ones((batch, chunks, 1, 1), bool)
    if document_BL is not None:
        document_BCQ = document_BL.reshape(batch, chunks, tokens)
        last_BC11Q = (document_BCQ == document_BCQ[:, :, -1:])[:, :, None, None]
        parts = (jnp.where(last_BC11Q, part, 0.0) for part in parts)
        left_BC11 = (document_BCQ[:, :, -1] == 0)[..., None, None]
    exact_BCHS, rest_BCHS = (jnp.sum(part, axis=4) for part in parts)

    first_BHS = first_BHS * INVERSE_TURN
    coarse_BHS = jnp.floor(first_BHS / step + 0.5) * step

    def joined(one_BHS, more_BCHS):
        return jnp.concatenate([one_BHS[:, None], more_BCHS], axis=1)

    def compose(before, more):
        (exact, rest, left), (more_exact, more_rest, more_left) = before, more
        exact = jnp.where(more_left, exact, 0.0) + more_exact
        rest = jnp.where(more_left, rest, 0.0) + more_rest
        moved = jnp.floor(rest / step + 0.5) * step
        exact += moved
        return exact - jnp.floor(exact), rest - moved, left & more_left

    turns = (
        joined(coarse_BHS - jnp.floor(coarse_BHS), exact_BCHS - jnp.floor(exact_BCHS)),
        joined(first_BHS - coarse_BHS, rest_BCHS),
        jnp.concatenate([jnp.ones((batch, 1, 1, 1), bool), left_BC11], axis=1),
    )
    exact_BCHS, rest_BCHS, _ = lax.associative_scan(compose, turns, axis=1)
    start_BCHS = exact_BCHS + rest_BCHS
    for _ in range(2):  # a tiny negative rest rounds up to a whole turn, which is zero
        start_BCHS -= jnp.floor(start_BCHS)
    return start_BCHS[:, :-1], start_BCHS[:, -1] * (2 * math.pi)
