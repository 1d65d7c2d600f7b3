"""What the kernels share: their operands, how they are called, matrix products, and functions in PTX."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.ssm.contract import axes_of
from pallas_kernels.ssm.triton.config import Launch, Tile

NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


class Grid(NamedTuple):
    """The programs of a kernel, and what each sees of an array whose axes are named."""

    programs: tuple[int, ...]  # along each axis
    blocks: dict[str, int | None]  # of axes that programs share; None: one entry
    place: Callable  # a program's places -> those of its blocks, by axis

    def spec(self, axes: str, array) -> pl.BlockSpec:
        """Return what a program sees; an axis of size 1 is there for all."""
        sizes = list(zip(axes, array.shape, strict=True))

        def index(*program):
            at = self.place(*program)
            return tuple(at.get(axis, 0) if size > 1 else 0 for axis, size in sizes)

        return pl.BlockSpec(tuple(self.blocks.get(axis, size) for axis, size in sizes), index)


def call(kernel, inputs, out, *, name: str, grid, tile, launch: Launch, in_place: dict | None = None):
    """Run `kernel(refs, out_refs, tile=tile)` over a grid; refs are trees like `inputs` and `out`.

    Args:
        out: like the outputs; None: not wanted.
        grid: a `Grid`, or what has its `programs` and `spec`.
        in_place: which outputs take the buffer of which input.
    """

    def specs(tree):
        def spec(path, x):
            return jax.tree.map(lambda array: grid.spec(axes_of(path), array), x)

        return jax.tree_util.tree_map_with_path(spec, tree, is_leaf=lambda x: isinstance(x, Float24))

    how = {"compiler_params": plt.CompilerParams(num_warps=launch.warps, num_stages=launch.stages)}
    (outputs,) = pl.pallas_call(
        functools.partial(kernel, tile=tile),
        grid=grid.programs,
        in_specs=(specs(inputs),),
        out_specs=[specs(out)],
        out_shape=[out],
        input_output_aliases=in_place or {},
        name=name,
        **({"interpret": True} if tile.interpret else how),
    )(inputs)
    return outputs


def product(a, b, dimensions, *, dtype, tile: Tile):
    """Multiplies matrices with float32 sums; rounds both to `dtype` first: bfloat16, or float32 for true float32."""
    a, b = a.astype(dtype), b.astype(dtype)
    if tile.interpret:  # the CPU has neither product of bfloat16 with float32 sums nor that of TF32 parts
        a, b, precision = a.astype(jnp.float32), b.astype(jnp.float32), lax.Precision.HIGHEST
    else:
        precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def rounded(x, y, dtype, tile: Tile):
    """Round two float32 to `dtype`, and return them as float32: one at a time would be an eighth as fast."""
    if tile.interpret or dtype == jnp.float32:
        return x.astype(dtype).astype(jnp.float32), y.astype(dtype).astype(jnp.float32)
    both = assembly("cvt.rn.bf16x2.f32 $0, $2, $1;", [x, y], jnp.int32)
    return tuple(lax.bitcast_convert_type(half, jnp.float32) for half in (both << 16, both & ~0xFFFF))


def exp(x, tile: Tile):
    """Return e^x to 2^-22 of itself; what is below 1e-38 is zero, which saves most of the instructions of jnp.exp."""
    if tile.interpret or x.ndim == 0:
        return jnp.exp(x)
    return approximate("ex2.approx.ftz.f32", x * math.log2(math.e))


def sigmoid(x, dtype, tile: Tile):
    """Return the sigmoid; where `dtype` is bfloat16, by a tanh that is good to 7e-6."""
    if tile.interpret or dtype == jnp.float32:
        return 1 / (1 + exp(-x, tile))
    return 0.5 + 0.5 * approximate("tanh.approx.f32", 0.5 * x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def silu(x, dtype, tile: Tile):
    """Return x sigmoid(x)."""
    return x * sigmoid(x, dtype, tile)


@silu.defjvp
def _silu_jvp(dtype, tile, primals, tangents):
    (x,), (dx,) = primals, tangents
    gate = sigmoid(x, dtype, tile)
    return x * gate, (gate + x * gate * (1 - gate)) * dx


def approximate(instruction: str, x):
    """Run one PTX instruction of a float32 on every element. Interpret mode has none."""
    return assembly(f"{instruction} $0, $1;", [x], jnp.float32)


def assembly(instructions: str, arrays, dtype, together: int = 1):
    """Run PTX on the elements of arrays of one shape, `together` of them at a time: those of less than 32 bits share a
    register. Interpret mode has none."""

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


class Float24(NamedTuple):
    """float32 in three bytes, good to 2^-16 of itself: its upper half as bfloat16, and its third byte. Or as it is."""

    upper: jax.Array
    lower: jax.Array | None  # None: `upper` is float32

    def store(self, at, x, tile: Tile):
        """Write `x` to refs."""
        if self.lower is None:
            self.upper[at] = x
            return
        bits = lax.bitcast_convert_type(x, jnp.int32)
        if tile.interpret:
            self.upper[at] = lax.bitcast_convert_type(bits & ~0xFFFF, jnp.float32).astype(jnp.bfloat16)
            self.lower[at] = (bits >> 8).astype(jnp.int8)
            return
        # This picks bytes out of two registers: a conversion would take several instructions for each number.
        self.upper[at] = assembly("prmt.b32 $0, $1, $2, 0x7632;", [bits], jnp.bfloat16, 2)
        bytes_ = (
            "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0051; prmt.b32 b, $3, $4, 0x0051; prmt.b32 $0, a, b, 0x5410; }"
        )
        self.lower[at] = assembly(bytes_, [bits], jnp.int8, 4)

    def load(self, at, tile: Tile):
        """Read float32 from refs."""
        upper = self.upper[at]
        if self.lower is None:
            return upper.astype(jnp.float32)
        lower = self.lower[at]
        if tile.interpret:
            bits = lax.bitcast_convert_type(upper.astype(jnp.float32), jnp.int32)
            bits |= (lower.astype(jnp.int32) & 0xFF) << 8
        else:  # the last byte does not matter, so it is the third once more
            picks = enumerate(zip((4, 4, 5, 5), ("1044", "3255", "1066", "3277"), strict=True))
            bytes_ = " ".join(f"prmt.b32 ${i}, ${reg}, $6, 0x{which};" for i, (reg, which) in picks)
            bits = assembly(bytes_, [upper, lower], jnp.int32, 4)
        return lax.bitcast_convert_type(bits, jnp.float32)


def iota(size: int):
    """Return 0, 1, 2, ..., int32."""
    return lax.broadcasted_iota(jnp.int32, (size,), 0)


def gather(ref, *at, mask=None):
    """Return ref[at] in float32; where the mask is false, zeros without reading. Indices are arrays or numbers."""
    at = indices(at)
    mask = None if mask is None else jnp.broadcast_to(mask, at[0].shape)
    other = None if mask is None else 0
    return plt.load(ref.at[at], mask=mask, other=other).astype(jnp.float32)


def indices(at):
    """Return numbers and arrays as arrays of one shape."""
    shape = jnp.broadcast_shapes(*(jnp.shape(index) for index in at))
    return tuple(jnp.broadcast_to(jnp.asarray(index, jnp.int32), shape) for index in at)
