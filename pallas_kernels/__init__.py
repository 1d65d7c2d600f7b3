"""The ops of `mamba3_jax.ops`, fused, one folder an op and one file a backend. Imports jax and nothing of ours.

Empty so far: on every backend the ops are plain XLA (`chunked`).
"""
