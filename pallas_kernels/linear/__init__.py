"""Products of few rows with a matrix, in one kernel with what comes before and after them: README.md says which."""

from pallas_kernels.linear.few_rows import Product, available, few_rows, unsupported
from pallas_kernels.linear.tiles import Tile, default_tile, kind_of

__all__ = ["Product", "Tile", "available", "default_tile", "few_rows", "kind_of", "unsupported"]
