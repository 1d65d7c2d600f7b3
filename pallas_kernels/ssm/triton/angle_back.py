"""The gradient of the cumulative angle inside a chunk: its sum over later tokens."""

import jax.numpy as jnp

from pallas_kernels.ssm.triton.common import NN, Tile, product
from pallas_kernels.ssm.triton.rotate import _same_document


def suffix(dphi_TS, document_T, tile: Tile):
    """Returns the sum over t >= s in the chunk and the document."""
    if document_T is None:
        return jnp.sum(dphi_TS, axis=0)[None, :] - jnp.cumsum(dphi_TS, axis=0) + dphi_TS
    mask_TT = _same_document(document_T, transposed=True).astype(jnp.float32)
    return product(mask_TT, dphi_TS, NN, jnp.float32, tile)
