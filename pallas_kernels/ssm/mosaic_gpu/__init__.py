"""The op in Pallas Mosaic GPU, for Hopper (wgmma): `op.mamba3` and its kernels.

Forward `phase` (the angles) and `scan` (all the rest); backward `query_back`, `key_back`, and `sums_back` over heads.
"""
