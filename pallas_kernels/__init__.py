"""The ops of `mamba3_jax.ops`, fused, one folder an op, in it one a backend.

Imports jax and nothing of ours.

Mosaic GPU for Hopper and Triton for other NVIDIA GPUs and other sizes, the defaults there; Mosaic for TPUs.
"""
