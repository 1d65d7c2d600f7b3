"""The ops of `mamba3_jax.ops`, fused, one folder an op, in it one a backend.

Imports jax and nothing of ours.

So far Triton, for NVIDIA GPUs: `implementation="triton"`, the default on one of them.
"""
