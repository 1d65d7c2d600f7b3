"""The ops of `mamba3_jax.ops`, fused, one folder an op and one file a backend. Imports jax and nothing of ours.

So far the scan in Triton, taken by `implementation="triton"` and by nothing else: it has not run on a GPU yet.
"""
