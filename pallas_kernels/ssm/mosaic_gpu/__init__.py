"""The op in Pallas Mosaic GPU, for Hopper (wgmma): `scan_fwd` and its kernels, of tiles of 64 rows (`tiles`).

Forward `phase` (the angles) and `scan_fwd` (all the rest); backward `scan_bwd`: `epilogue_bwd` (norm, gate, ranks),
`query_bwd`, `key_bwd`, and `sums_bwd` (over heads, and of the angles over tokens). `decode` is one token.
"""

from pallas_kernels.ssm.mosaic_gpu.decode import step
from pallas_kernels.ssm.mosaic_gpu.scan_fwd import available, scan, unsupported

__all__ = ["SPANS", "STEPS", "available", "scan", "step", "unsupported"]
STEPS = 1
SPANS = True
