"""The op for TPUs in Pallas Mosaic: `scan_fwd` and `scan_bwd`, the fused chunked scan; `decode`, one token."""

from pallas_kernels.ssm.mosaic_tpu.config import STEPS, available
from pallas_kernels.ssm.mosaic_tpu.decode import step
from pallas_kernels.ssm.mosaic_tpu.op import scan, unsupported

__all__ = ["SPANS", "STEPS", "available", "scan", "step", "unsupported"]
SPANS = True
