"""What the kernels share: how they are cut and launched, matrix products, and indices."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

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
    anchor: int = 512  # tokens between two states that the backward pass keeps to start its sums from again
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

    @property
    def anchor_chunks(self) -> int:
        return self.anchor // self.tokens


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


def rounded(x, y, dtype, tile: Tile):
    """Two float32 as a `dtype` has them. bfloat16 is asked for in pairs: one at a time is an eighth as fast."""
    if tile.interpret or dtype == jnp.float32:
        return x.astype(dtype).astype(jnp.float32), y.astype(dtype).astype(jnp.float32)
    both = assembly("cvt.rn.bf16x2.f32 $0, $2, $1;", [x, y], jnp.int32)
    return tuple(lax.bitcast_convert_type(half, jnp.float32) for half in (both << 16, both & ~0xFFFF))


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
    return assembly(f"{instruction} $0, $1;", [x], jnp.float32)


def assembly(instructions: str, arrays, dtype, together: int = 1):
    """PTX on the elements of arrays of one shape, `together` of them at a time: what is less than 32 bits wide shares a
    register. Not in interpret mode."""

    def registers(dtype):
        size = jnp.dtype(dtype).itemsize
        return ["f" if dtype == jnp.float32 else "r"] * max(1, together * size // 4)

    constraints = ["=" + register for register in registers(dtype)]
    (result,) = plt.elementwise_inline_asm(
        instructions,
        args=arrays,
        constraints=",".join(sum((registers(array.dtype) for array in arrays), constraints)),
        pack=together,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, dtype)],
    )
    return result


class Split(NamedTuple):
    """float32 in three bytes, good to 2^-16 of itself: its upper half as bfloat16, and its third byte. Or as it is."""

    upper: jax.Array
    lower: jax.Array | None

    def store(self, at, x, tile: Tile):
        """Of refs."""
        if self.lower is None:
            self.upper[at] = x
            return
        bits = lax.bitcast_convert_type(x, jnp.int32)
        if tile.interpret:
            self.upper[at] = lax.bitcast_convert_type(bits & ~0xFFFF, jnp.float32).astype(jnp.bfloat16)
            self.lower[at] = (bits >> 8).astype(jnp.int8)
            return
        # Bytes are picked out of two registers: a conversion would take several instructions for each number.
        self.upper[at] = assembly("prmt.b32 $0, $1, $2, 0x7632;", [bits], jnp.bfloat16, 2)
        bytes_ = (
            "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0051; prmt.b32 b, $3, $4, 0x0051; prmt.b32 $0, a, b, 0x5410; }"
        )
        self.lower[at] = assembly(bytes_, [bits], jnp.int8, 4)

    def load(self, at, tile: Tile):
        upper = self.upper[at]
        if self.lower is None:
            return upper.astype(jnp.float32)
        lower = self.lower[at]
        if tile.interpret:
            bits = lax.bitcast_convert_type(upper.astype(jnp.float32), jnp.int32)
            bits |= (lower.astype(jnp.int32) & 0xFF) << 8
        else:  # the last byte does not matter: the third once more
            picks = enumerate(zip((4, 4, 5, 5), ("1044", "3255", "1066", "3277"), strict=True))
            bytes_ = " ".join(f"prmt.b32 ${i}, ${reg}, $6, 0x{which};" for i, (reg, which) in picks)
            bits = assembly(bytes_, [upper, lower], jnp.int32, 4)
        return lax.bitcast_convert_type(bits, jnp.float32)


def iota(size: int):
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def index_map(grid_axes: str, array_axes: str):
    """Block indices of an array whose axes are named as the grid's, "." for an axis that is whole: ("bhs", "bh..")."""
    return lambda *indices: tuple(indices[grid_axes.index(axis)] if axis != "." else 0 for axis in array_axes)
