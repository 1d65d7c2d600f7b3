"""The op's kernels in Pallas Triton, for NVIDIA GPUs from Ampere on: `rotate`, then `scan`; `decode` for one token.

Pallas Triton is deprecated upstream (jax 0.11): nothing outside this folder imports it but by the table of backends.
"""

from pallas_kernels.ssm.triton.config import available, unsupported
from pallas_kernels.ssm.triton.op import scan
from pallas_kernels.ssm.triton.step import step

__all__ = ["SPANS", "STEPS", "available", "scan", "step", "unsupported"]
STEPS = 1
SPANS = True
