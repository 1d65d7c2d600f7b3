"""What the kernels share: how they are cut and launched, matrix products, and indices."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


@dataclass(frozen=True)
class Launch:
    """How one kernel runs: warps a program, and how many steps ahead its loop loads."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Tile:
    """How the kernels are cut and launched. Performance only, but for `rank` and `width`, the shape's."""

    rows: int = 64  # of a chunk, ranks times tokens: a power of two, at least 16, a multiple of the rank
    rank: int = 1
    width: int | None = None  # entries of P that are not padding; None: all
    segments: int = 1  # parts of the length side by side, of equally many chunks
    turned: int = 16  # tokens that a program of the rotation turns
    heads_turned: int = 8  # at most, that a program of the rotation takes one after another
    heads_back: int = 16  # likewise, of its backward pass, which adds up their gradients
    anchor: int = 16  # chunks between two states that the backward pass keeps to start its sums from again
    rotate: Launch = Launch(2, 1)
    rotate_back: Launch = Launch(1, 1)
    forward: Launch = Launch(4, 2)
    added: Launch = Launch(4, 3)
    query: Launch = Launch(4, 2)
    key: Launch = Launch(4, 2)
    value: Launch = Launch(4, 2)
    finish: Launch = Launch(4, 1)
    interpret: bool = False  # on the CPU, for tests

    @property
    def tokens(self) -> int:
        """Of a chunk."""
        return self.rows // self.rank


def call(kernel, name: str, tile: Tile, launch: Launch, grid, inputs, in_specs, out):
    """pallas_call of `kernel(inputs, outputs, tile=)`, both trees as they are here.

    Args:
        in_specs: like `inputs`.
        out: a NamedTuple of (shape, dtype, spec); None: not wanted.
    """
    is_leaf = lambda x: type(x) is tuple  # noqa: E731
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(*x[:2]), out, is_leaf=is_leaf)
    out_specs = jax.tree.map(lambda x: x[2], out, is_leaf=is_leaf)
    how = {"compiler_params": plt.CompilerParams(num_warps=launch.warps, num_stages=launch.stages)}
    (outputs,) = pl.pallas_call(
        functools.partial(kernel, tile=tile),
        grid=grid,
        in_specs=(in_specs,),
        out_specs=[out_specs],
        out_shape=[shapes],
        name=name,
        **({"interpret": True} if tile.interpret else how),
    )(inputs)
    return outputs


def product(a, b, dimensions, dtype, tile: Tile):
    """a . b with float32 sums; operands are rounded to `dtype` first: bfloat16, or float32 for true float32."""
    a, b = a.astype(dtype), b.astype(dtype)
    if tile.interpret:  # the CPU has no such product of bfloat16, nor the split one of float32
        a, b, precision = a.astype(jnp.float32), b.astype(jnp.float32), lax.Precision.HIGHEST
    else:
        precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def exp(x, tile: Tile):
    """To 2^-22 of itself; what is below 1e-38 is zero, which saves most of the instructions of jnp.exp."""
    if tile.interpret or x.ndim == 0:
        return jnp.exp(x)
    return approximate("ex2.approx.ftz.f32", x * math.log2(math.e))


def sigmoid(x, dtype, tile: Tile):
    """Where the result is rounded to bfloat16, by a tanh that is good to 7e-6."""
    if tile.interpret or dtype == jnp.float32:
        return 1 / (1 + exp(-x, tile))
    return 0.5 + 0.5 * approximate("tanh.approx.f32", 0.5 * x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def silu(x, dtype, tile: Tile):
    """x sigmoid(x)."""
    return x * sigmoid(x, dtype, tile)


@silu.defjvp
def _silu_jvp(dtype, tile, primals, tangents):
    (x,), (dx,) = primals, tangents
    gate = sigmoid(x, dtype, tile)
    return x * gate, (gate + x * gate * (1 - gate)) * dx


def approximate(instruction: str, x):
    """One PTX instruction of a float32 on every element. Not in interpret mode."""
    (result,) = plt.elementwise_inline_asm(
        f"{instruction} $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def iota(size: int):
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def index_map(grid_axes: str, array_axes: str):
    """Block indices of an array whose axes are named as the grid's, "." for an axis that is whole: ("bhs", "bh..")."""
    return lambda *indices: tuple(indices[grid_axes.index(axis)] if axis != "." else 0 for axis in array_axes)


def documents_in_chunks(document_BL, tokens: int):
    """From the number of starts in a row up to each token, the number in its chunk of `tokens`."""
    if document_BL is None:
        return None
    document_BCQ = document_BL.reshape(document_BL.shape[0], -1, tokens)
    before_BC = jnp.pad(document_BCQ[:, :-1, -1], ((0, 0), (1, 0)))
    return (document_BCQ - before_BC[..., None]).reshape(document_BL.shape)
