"""The op's kernels in Pallas Triton, for NVIDIA GPUs from Ampere on: `rotate`, then `scan`; `decode` for one token.

Pallas Triton is deprecated upstream (jax 0.11): only what serves the `triton` implementation and its decoding step may
import this folder.
"""
