"""The decoding step by Triton: one kernel for one rank, `decode_fused`; for more, `decode_rotated` after XLA.

One kernel for more ranks is bound by registers (NOTES.md), so there bias and rotation are XLA's.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.ssm.contract import Stepped, Token, require
from pallas_kernels.ssm.triton.config import known
from pallas_kernels.ssm.triton.decode_fused import FusedTile, decode_fused
from pallas_kernels.ssm.triton.decode_rotated import RotatedTile, decode_rotated


def step(token: Token, rotation: str, *, interpret=None, tile=None, **config) -> Stepped:
    """Compute a decoding step, see `contract`.

    Args:
        tile: of one of the two kernels, and with it the kernel; None: the fastest measured.
        config: fields of it.

    Raises:
        ValueError: float64, a rank that is not a power of two up to 16, or a `tile` that does not fit.
    """
    rank = token.q_BRGN.shape[1]
    if token.log_a_BH.dtype != jnp.float32:
        require("triton", f"computes in float32, log_a is {token.log_a_BH.dtype}")
    if rank & (rank - 1) or rank > 16:
        require("triton", f"wants a rank that is a power of two up to 16, not {rank=}")
    tile = tile or default_tile(rank)
    tile = dataclasses.replace(tile, **known(config, tile), interpret=bool(interpret))
    decode = decode_fused if isinstance(tile, FusedTile) else decode_rotated
    return decode(token, rotation, tile)


def default_tile(rank: int) -> FusedTile | RotatedTile:
    """Return the fastest measured, on an H100 (R 1) and an H200 (R 4); from R 8 on, what fits in registers."""
    if rank == 1:
        return FusedTile()
    if rank >= 8:
        return RotatedTile(columns=128, update="dot", readout="dot")
    return RotatedTile(columns=32, rows=32, warps=2)
