"""The op in Pallas Mosaic GPU, for Hopper (wgmma): `op` and its kernels.

Forward `phase` (the angles) and `scan_fwd` (all the rest); backward `epilogue_bwd` (norm, gate, ranks), `query_bwd`,
`key_bwd`, and `sums_bwd` (over heads, and of the angles over tokens). `decode` is one token.
"""

from pallas_kernels.ssm.mosaic_gpu.config import available, unsupported
from pallas_kernels.ssm.mosaic_gpu.decode import step
from pallas_kernels.ssm.mosaic_gpu.op import scan

__all__ = ["STEPS", "available", "scan", "step", "unsupported"]
STEPS = 1
