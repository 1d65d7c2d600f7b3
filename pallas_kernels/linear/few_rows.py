"""Products of a few rows with a matrix, in one Pallas Triton kernel that reads the matrix once.

    x' = x / sqrt(mean(x^2) + eps) scale   (or x itself),   y = epilogue(x' W_1^T, x' W_2^T, ..., vectors)

W_1, W_2, ... are rows of the matrix. One call computes several such products, each with outputs of its own. x' is
rounded to the matrix's dtype, sums are float32.

The time is at least that of reading the matrix once. One layer's matrices are small for a GPU, so what counts is that
all multiprocessors load at once, and all their loads are under way at once. So a program computes some columns of one
product, over all of K, in one of two ways, which `tiles` chooses:

- Threads multiply and add, one row after another. A program issues the loads of all its weights before anything else,
  and computes the norm by itself, from a few kilobytes that are in the cache.
- Tensor cores multiply 16 rows or more in a loop over K, whose loads run some steps ahead. XLA computes the norm.

Letters: B rows, K entries of a row, M rows of the matrix, N columns of a product, A blocks of K.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.device import target
from pallas_kernels.linear.tiles import Tile, default_tile, kind_of

NORM_EPS = 1e-5
NT = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Product:
    """N rows of the matrix from each of `firsts` on, and an epilogue of their products.

    `epilogue(*products, *vectors)` returns a tuple of outputs. Its arguments and results are float32, for some of the
    columns and for one row or more.
    """

    columns: int  # N
    dtypes: tuple  # of the outputs, (B, N) each
    firsts: tuple[int, ...] = (0,)
    epilogue: Callable = lambda *products: products
    vectors: tuple[jax.Array, ...] = ()  # (N,) or (B, N)


def available() -> str | None:
    """Return what the kernel wants of the device, and what it got; None: it can run."""
    device = target().device_kind
    return None if "NVIDIA" in device else f"needs an NVIDIA GPU, not {device!r}"


def unsupported(x_BK, weight_MK, products: Sequence[Product]) -> str | None:
    """Return what the kernel wants of shapes and dtypes, and what it got; None: it takes these."""
    dtypes = {x_BK.dtype, weight_MK.dtype}
    if not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"wants float32 or bfloat16, not {sorted(map(str, dtypes))}"
    if x_BK.ndim != 2 or weight_MK.ndim != 2 or x_BK.shape[1] != weight_MK.shape[1]:
        return f"wants (B, K) and (M, K), not {x_BK.shape} and {weight_MK.shape}"
    for product in products:
        if min(product.firsts) < 0 or max(product.firsts) + product.columns > len(weight_MK):
            return f"wants columns in {len(weight_MK)} rows, not {product.columns} from {product.firsts} on"
    return None


def few_rows(
    x_BK,
    weight_MK,
    products: Sequence[Product],
    *,
    scale_K=None,
    eps: float = NORM_EPS,
    tile: Tile | None = None,
    name: str = "few_rows",
    interpret: bool = False,
) -> list[tuple[jax.Array, ...]]:
    """Return the outputs of every product.

    Args:
        x_BK: float32 or bfloat16.
        weight_MK: float32 or bfloat16.
        products: at least one.
        scale_K: of an RMSNorm of the rows; None: there is no norm.
        eps: of the norm.
        tile: how the kernel is cut; None: as `default_tile` says.
        name: of the kernel.
        interpret: runs on any backend, slowly, for tests.

    Raises:
        ValueError: the inputs are `unsupported`.
    """
    wish = unsupported(x_BK, weight_MK, products)
    if wish is not None:
        raise ValueError(f"few_rows {wish}")
    (rows, size), first = x_BK.shape, 0
    tile = tile or default_tile(rows, size, kind_of(products, scale_K is not None), weight_MK.dtype) or Tile()
    if tile.dot and scale_K is not None:
        # In the kernel, every program would read the rows twice and convert them.
        x_BK, scale_K = _rms_norm(x_BK, scale_K, eps).astype(weight_MK.dtype), None
    programs = []  # for each product: its first program, and the columns of a program
    for product in products:
        columns = _power_of_two(max(8 if tile.dot else 1, tile.columns // len(product.firsts)))
        programs.append((first, columns))
        first += -(-product.columns // columns)
    given = (x_BK, scale_K, weight_MK, [product.vectors for product in products])
    out = [
        tuple(jax.ShapeDtypeStruct((rows, product.columns), dtype) for dtype in product.dtypes) for product in products
    ]
    whole = lambda array: pl.BlockSpec(array.shape, lambda *_, axes=array.ndim: (0,) * axes)  # noqa: E731
    how = {"compiler_params": plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages if tile.dot else 1)}
    body = functools.partial(_kernel, products=products, programs=programs, last=first, eps=eps, tile=tile)
    (outputs,) = pl.pallas_call(
        functools.partial(body, interpret=interpret),
        grid=(first, -(-rows // tile.rows) if tile.dot else 1),
        in_specs=jax.tree.map(whole, given),
        out_specs=[jax.tree.map(whole, out)],
        out_shape=[out],
        name=name,
        **({"interpret": True} if interpret else how),
    )(*given)
    return outputs


def _rms_norm(x_BK, scale_K, eps: float):
    x_BK = x_BK.astype(jnp.float32)
    return x_BK * lax.rsqrt(jnp.mean(jnp.square(x_BK), axis=-1, keepdims=True) + eps) * scale_K


def _kernel(x_ref, scale_ref, w_ref, vectors, outs, *, products, programs, last, eps, tile: Tile, interpret: bool):
    program = pl.program_id(0)
    sums_of = _in_a_loop if tile.dot else _row_by_row
    operands = Operands(x_ref, scale_ref, w_ref, eps=eps, tile=tile, interpret=interpret)
    ends = [first for first, _ in programs[1:]] + [last]
    for product, (first, columns), end, v_refs, out_refs in zip(products, programs, ends, vectors, outs, strict=True):

        @pl.when((program >= first) & (program < end))
        def _(product=product, first=first, columns=columns, v_refs=v_refs, out_refs=out_refs):
            n_N = (program - first) * columns + lax.broadcasted_iota(jnp.int32, (columns,), 0)
            for at, inside, sums in sums_of(operands, product, n_N):
                got = product.epilogue(*sums, *(_load(ref, at[-ref.ndim :], inside) for ref in v_refs))
                for ref, value in zip(out_refs, got, strict=True):
                    at, value = _together(at, value)
                    plt.store(ref.at[at], value.astype(ref.dtype), mask=jnp.broadcast_to(inside, value.shape))


class Operands:
    """What a program reads, in blocks of K: the rows, the norm's scale and the matrix."""

    def __init__(self, x_ref, scale_ref, w_ref, *, eps: float, tile: Tile, interpret: bool):
        self.x_ref, self.scale_ref, self.w_ref, self.eps, self.interpret = x_ref, scale_ref, w_ref, eps, interpret
        self.rows, self.size = x_ref.shape
        self.block = max(16 if tile.dot else 1, _block(self.size, tile))
        if tile.dot:  # the rows of this program, and which of them exist
            padded = min(tile.rows, max(16, _power_of_two(self.rows)))
            self.b_B1 = (pl.program_id(1) * padded + lax.broadcasted_iota(jnp.int32, (padded,), 0))[:, None]
            self.inside_B1 = self.b_B1 < self.rows

    def blocks(self):
        """Return, for all blocks of K, k_K and which of these entries exist; None: all of them."""
        firsts = range(0, self.size, self.block)
        return [self.inside(first + lax.broadcasted_iota(jnp.int32, (self.block,), 0)) for first in firsts]

    def inside(self, k_K):
        """Return k_K and which of these entries exist; None: all of them."""
        return k_K, None if self.size % self.block == 0 else k_K < self.size

    def weights(self, n_N, inside_N, k_K, inside_K):
        """Load a block of some rows of the matrix."""
        inside = inside_N[:, None] if inside_K is None else inside_N[:, None] & inside_K[None]
        return _load(self.w_ref, (n_N[:, None], k_K[None]), inside, None)

    def all_weights(self, product: Product, n_N):
        """Load all blocks of each of a product's matrices."""
        inside_N = n_N < product.columns
        return [[self.weights(first + n_N, inside_N, *block) for block in self.blocks()] for first in product.firsts]

    def scales(self):
        """Load all blocks of the norm's scale; None: there is no norm."""
        if self.scale_ref is None:
            return None
        return [_load(self.scale_ref, (k_K,), inside_K) for k_K, inside_K in self.blocks()]

    def normed(self, x, scales):
        """Return all blocks of a row, after its norm, in the matrix's dtype."""
        if scales is not None:
            over_rms = lax.rsqrt(jnp.sum(sum(block * block for block in x)) / self.size + self.eps)
            x = [block * over_rms * scale_K for block, scale_K in zip(x, scales, strict=True)]
        return [block.astype(self.w_ref.dtype) for block in x]

    def dot(self, x_BK, w_NK):
        """Return x w^T with float32 sums."""
        if self.interpret:  # XLA for CPU has no product of bfloat16 with float32 sums
            x_BK, w_NK = x_BK.astype(jnp.float32), w_NK.astype(jnp.float32)
        precision = lax.Precision.HIGHEST if w_NK.dtype == jnp.float32 else None
        return lax.dot_general(x_BK, w_NK, NT, precision=precision, preferred_element_type=jnp.float32)


def _row_by_row(operands: Operands, product: Product, n_N):
    """Yield, for each row, the places of its outputs, which of these exist, and its sums over K."""
    weights, scales = operands.all_weights(product, n_N), operands.scales()
    for b in range(operands.rows):
        x = [_load(operands.x_ref, (b, k_K), inside_K) for k_K, inside_K in operands.blocks()]
        x = [x_K.astype(jnp.float32)[None] for x_K in operands.normed(x, scales)]
        sums = [sum(w_NK.astype(jnp.float32) * x_K for w_NK, x_K in zip(w, x, strict=True)) for w in weights]
        yield (b, n_N), n_N < product.columns, [jnp.sum(sum_NK, axis=1) for sum_NK in sums]


def _in_a_loop(operands: Operands, product: Product, n_N):
    """Yield, for all rows of a program at once, the places of the outputs, which of these exist, and the sums over K.

    The matrix and the rows stream through shared memory.
    """
    b_B1, inside_B1 = operands.b_B1, operands.inside_B1
    inside_N = n_N < product.columns

    def add(step, sums):
        k_K, inside_K = operands.inside(step * operands.block + lax.broadcasted_iota(jnp.int32, (operands.block,), 0))
        inside = inside_B1 if inside_K is None else inside_B1 & inside_K[None]
        x_BK = _load(operands.x_ref, (b_B1, k_K[None]), inside, None).astype(operands.w_ref.dtype)
        w = [operands.weights(first + n_N, inside_N, k_K, inside_K) for first in product.firsts]
        return [sum_BN + operands.dot(x_BK, w_NK) for sum_BN, w_NK in zip(sums, w, strict=True)]

    zeros = [jnp.zeros((b_B1.shape[0], n_N.size), jnp.float32) for _ in product.firsts]
    sums = lax.fori_loop(0, -(-operands.size // operands.block), add, zeros)
    yield (b_B1, n_N[None]), inside_B1 & inside_N[None], sums


def _load(ref, at, inside, dtype=jnp.float32):
    """Load ref[at] in a dtype (None: its own), and zeros where `inside` is False (None: nowhere)."""
    at, inside = _together(at, inside)
    loaded = plt.load(ref.at[at], mask=inside, other=None if inside is None else 0)
    return loaded if dtype is None else loaded.astype(dtype)


def _together(at, array):
    """Broadcast indices, and an array or None, to one shape."""
    at = tuple(jnp.asarray(index, jnp.int32) for index in at)
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (*at, array) if x is not None))
    *at, array = (None if x is None else jnp.broadcast_to(x, shape) for x in (*at, array))
    return tuple(at), array


def _block(size: int, tile: Tile) -> int:
    """Return how many entries of K a load has: a power of two, which divides K unless it would then be small."""
    whole = min(tile.block, size & -size)
    return whole if whole >= min(tile.block, 64) else min(tile.block, _power_of_two(size))


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is not less than a size."""
    return 1 << (size - 1).bit_length()
