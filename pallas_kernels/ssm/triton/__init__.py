"""The op's kernels in Pallas Triton, for NVIDIA GPUs from Ampere on: `rotate`, then `scan`; `decode` for one token.

Pallas Triton is deprecated upstream (jax 0.11): nothing but the `triton` implementation may import this folder, and of
`mosaic_gpu` what streams through memory, until it is there in Mosaic GPU: `phase`, `sums_back`, `op`.
"""
