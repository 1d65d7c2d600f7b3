"""The op in Pallas Mosaic GPU, for Hopper (wgmma): `op.mamba3` and its kernels.

Forward `phase` (the angles) and `scan` (all the rest); backward `epilogue_bwd` (norm, gate, ranks), `query_bwd`,
`key_bwd`, and `sums_bwd` (over heads, and of the angles over tokens).
"""
