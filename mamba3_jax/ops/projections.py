"""The projections of a decoding step: products of one token's rows with a matrix, a norm before and an epilogue.

    x' = rms_norm(x, scale)   (or x itself),   y = epilogue(x' W_1^T, x' W_2^T, ..., vectors)

`plain` is the definition. On an NVIDIA GPU one kernel, `pallas_kernels.linear`, computes it for few rows.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mamba3_jax.ops.einsum import product as dot
from mamba3_jax.ops.norm import EPS, rms_norm


@dataclasses.dataclass(frozen=True)
class Product:
    """N rows of the matrix from each of `firsts` on, and an epilogue of their products.

    `epilogue(*products, *vectors)` returns a tuple of outputs. Its arguments and results are float32. It must treat
    every column, and every row, by itself: a kernel calls it with some of them.
    """

    columns: int  # N
    dtypes: tuple  # of the outputs, (B, N) each
    firsts: tuple[int, ...] = (0,)
    epilogue: Callable = lambda *products: products
    vectors: tuple[jax.Array, ...] = ()  # (N,) or (B, N)


def plain(x_BK, weight_MK, products: Sequence[Product], scale_K=None) -> list[tuple[jax.Array, ...]]:
    """Return the outputs of every product; x' is rounded to the matrix's dtype, sums are float32.

    Args:
        x_BK: float32 or bfloat16.
        weight_MK: float32 or bfloat16; each of its rows gives one column of a product.
        products: at least one.
        scale_K: of an RMSNorm of the rows; None: there is no norm.
    """
    x_BK = (x_BK if scale_K is None else rms_norm(x_BK, scale_K)).astype(weight_MK.dtype)
    sums_BM, results = dot("bk,mk->bm", x_BK, weight_MK, jnp.float32), []
    for product in products:
        sums = [sums_BM[:, first : first + product.columns] for first in product.firsts]
        got = product.epilogue(*sums, *product.vectors)
        results.append(tuple(y.astype(dtype) for y, dtype in zip(got, product.dtypes, strict=True)))
    return results


def project(x_BK, weight_MK, products: Sequence[Product], scale_K=None, *, name: str, interpret: bool = False):
    """Compute `plain`, by the kernel where it is the faster one. `refused()` must be None.

    Args:
        x_BK: as for `plain`.
        weight_MK: as for `plain`.
        products: as for `plain`.
        scale_K: as for `plain`.
        name: of the kernel, for profiles.
        interpret: runs the kernel on any backend, slowly, for tests.
    """
    from pallas_kernels import linear

    given = [linear.Product(**vars(product)) for product in products]
    kind = linear.kind_of(given, scale_K is not None)
    tile = linear.default_tile(*x_BK.shape, kind, weight_MK.dtype)
    if tile is None:
        return plain(x_BK, weight_MK, products, scale_K)
    return linear.few_rows(
        x_BK, weight_MK, given, scale_K=scale_K, eps=EPS, tile=tile, name=f"rows_{name}", interpret=interpret
    )


def refused() -> str | None:
    """Return why `project` cannot run on this process's devices; None: it can."""
    from pallas_kernels import linear

    return linear.available()
