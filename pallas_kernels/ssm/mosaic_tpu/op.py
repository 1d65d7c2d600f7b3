"""The op in Pallas Mosaic for TPUs, forward and backward: `mamba3`, one custom derivative around both kernels.

The backward pass keeps the inputs, the state and the angle before every chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ssm.mosaic_tpu import scan, scan_back
from pallas_kernels.ssm.mosaic_tpu.contract import Inputs, Tiles
from pallas_kernels.ssm.mosaic_tpu.starts import starts


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mamba3(inputs: Inputs, document_BL, tiles: Tiles):
    """o_BLHP, the last state h_BHPN, and the last angle_BHS in radians, in [0, 2 pi).

    Args:
        document_BL: int32, document starts in the chunk up to each token; None: one document.

    Raises:
        ValueError: see `contract.Grid`.
    """
    return _forward(inputs, document_BL, tiles, keep=False)[0]


def _forward(inputs: Inputs, document_BL, tiles: Tiles, *, keep: bool):
    size = inputs.first_BHS.shape[-1]
    planes = tiles.planes or size
    angle_BLHS, first_BHS = inputs.angle_BLHS[..., :planes], inputs.first_BHS[..., :planes]
    if angle_BLHS.shape[2] != inputs.dt_BLH.shape[2]:
        angle_BLHS = angle_BLHS[:, :, :1]  # copies
    turning = starts(angle_BLHS, inputs.dt_BLH, first_BHS, document_BL, tiles.tokens)
    start_BCHS, angle_BHS = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - planes)]) for x in turning)
    o_BLHP, h_BHPN, h_BCHPN = scan.forward(inputs, start_BCHS, document_BL, tiles, keep=keep)
    return (o_BLHP, h_BHPN, angle_BHS), (start_BCHS, h_BCHPN)


def _fwd(inputs: Inputs, document_BL, tiles: Tiles):
    results, (start_BCHS, h_BCHPN) = _forward(inputs, document_BL, tiles, keep=True)
    return results, (inputs, document_BL, start_BCHS, checkpoint_name(h_BCHPN, "ssm_states"))


def _bwd(tiles: Tiles, residuals, cotangents):
    inputs, document_BL, start_BCHS, h_BCHPN = residuals
    return scan_back.backward(inputs, start_BCHS, document_BL, h_BCHPN, cotangents, tiles), None


mamba3.defvjp(_fwd, _bwd)
