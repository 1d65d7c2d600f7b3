"""Products of few rows with a matrix, in one kernel with the norm before and the epilogue after; see README.md."""

from pallas_kernels.linear.few_rows import Product, available, few_rows, unsupported
from pallas_kernels.linear.tiles import Tile, default_tile, kind_of

__all__ = ["Product", "Tile", "available", "default_tile", "few_rows", "kind_of", "unsupported"]
