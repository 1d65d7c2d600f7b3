"""The decoding step by Triton: one kernel for one rank, `decode_fused`; for more, `decode_rotated` after XLA.

One kernel for more ranks is bound by registers (NOTES.md), so there bias and rotation are XLA's.
"""

import dataclasses

from pallas_kernels.ssm.contract import Stepped, Token, require
from pallas_kernels.ssm.triton.config import known, unsupported
from pallas_kernels.ssm.triton.decode_fused import FusedTile, decode_fused
from pallas_kernels.ssm.triton.decode_rotated import RotatedTile, decode_rotated


def step(token: Token, rotation: str, *, interpret=None, tile=None, **config) -> Stepped:
    """Compute a decoding step, see `contract`.

    Args:
        tile: of one of the two kernels, and with it the kernel; None: the fastest measured.
        config: fields of it.

    Raises:
        ValueError: what `unsupported` says, or a `tile` that does not fit.
    """
    require("triton", unsupported(token))
    tile = tile or default_tile(token.q_BRGN.shape[1])
    tile = dataclasses.replace(tile, **known(config, tile), interpret=bool(interpret))
    decode = decode_fused if isinstance(tile, FusedTile) else decode_rotated
    return decode(token, rotation, tile)


def default_tile(rank: int) -> FusedTile | RotatedTile:
    """Return the fastest measured, on an H100 (R 1) and an H200 (R 4); from R 8 on, what fits in registers."""
    if rank == 1:
        return FusedTile()
    if rank >= 8:
        return RotatedTile(columns=128, sums="dot")
    return RotatedTile(columns=32, rows=32, warps=2)
