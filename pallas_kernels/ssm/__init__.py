"""The chunked scan of Mamba-3, from rotated queries and keys to outputs: one file a backend, all as `triton.scan`."""
