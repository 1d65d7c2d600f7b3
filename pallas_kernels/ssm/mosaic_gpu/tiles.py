"""Products and vectors of a tile of 64 rows, also in Pallas's interpreter, which has neither wgmma nor layouts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.mosaic_gpu.registers import ROWS, TILE


def tiled(*shape, dtype=jnp.bfloat16):
    """Returns shared memory as wgmma and the copy engine want a matrix."""
    swizzle = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def load(ref, layout, interpret: bool, optimized: bool = True):
    """Loads a ref into registers of a layout, which the interpreter has none of."""
    return ref[...] if interpret else plgpu.load(ref, (), layout=layout, optimized=optimized)


def iota(axis: int, interpret: bool):
    """Returns the row (axis 0) or column of every entry of a (T, T) tile."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis)
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis, layout=TILE)


def down(x_T, columns: int):
    """Broadcasts one number a row to `columns` columns."""
    return lax.broadcast_in_dim(x_T, (x_T.shape[0], columns), (0,))


def across(x_P, rows: int):
    """Broadcasts one number a column to `rows` rows."""
    return lax.broadcast_in_dim(x_P, (rows, x_P.shape[0]), (1,))


class Transposed(NamedTuple):
    """A ref that a product reads transposed."""

    ref: jax.Array


def products(sums, interpret: bool, then):
    """Returns `then` of functions that wait for c + a . b + a' . b' + ... of every (c, (a, b), ...), and return it.

    They end in the order in which they stand. c is an array, or the number of columns of a sum from zero. Of a product,
    b is a ref or `Transposed`, and a one of these or an array.
    """
    if interpret:
        values = [
            sum((jnp.dot(_value(a), _value(b), precision="highest") for a, b in pairs), 0.0 if type(c) is int else c)
            for c, *pairs in sums
        ]
        return then(*[lambda value=value: value for value in values])

    def run(*refs):
        for ref, (c, *_) in zip(refs, sums, strict=True):
            if type(c) is not int:
                ref[...] = c
        for ref, (_, *pairs) in zip(refs, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(ref, _operand(a), _operand(b))
        return then(*_waiting(refs, [len(pairs) - 1 for pairs in sums]))

    shapes = [(ROWS, c) if type(c) is int else c.shape for c, *_ in sums]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def product(a, b, columns: int, interpret: bool):
    """Returns a . b, of as many columns."""
    return products([(columns, (a, b))], interpret, lambda x: x())


def product_into(c, a, b, interpret: bool):
    """Returns c + a . b."""
    return products([(c, (a, b))], interpret, lambda x: x())


def product_tiles(pairs, interpret: bool):
    """Returns a . b of every (a, b, columns of b), computed side by side."""
    if interpret:
        return [jnp.dot(_value(a), _value(b), precision="highest") for a, b, _ in pairs]

    def run(*sums):
        for sum_, (a, b, _) in zip(sums, pairs, strict=True):
            plgpu.wgmma(sum_, _operand(a), _operand(b))
        return [sum_[...] for sum_ in sums]

    return pl.run_scoped(run, *(plgpu.ACC((ROWS, columns), jnp.float32) for _, _, columns in pairs))


def add_products(sums, interpret: bool):
    """Returns c + a . b of every (c, a, b), computed side by side in the registers of c."""
    if interpret:
        return [c + jnp.dot(_value(a), _value(b), precision="highest") for c, a, b in sums]

    def run(refs):
        for ref, (_, a, b) in zip(refs, sums, strict=True):
            plgpu.wgmma(ref, _operand(a), _operand(b))

    return pl.run_state(run)([plgpu.ACC.init(c) for c, _, _ in sums])


def _waiting(refs, lengths):
    later = [sum(lengths[i + 1 :]) for i in range(len(refs))]
    return [functools.partial(plgpu.wgmma_accumulator_load, ref, wait_n=n) for ref, n in zip(refs, later, strict=True)]


def _operand(x):
    return plgpu.transpose_ref(x.ref, (1, 0)) if isinstance(x, Transposed) else x


def _value(x):
    """Returns an operand as the interpreter takes it, which has no wgmma on registers."""
    value = x.ref[...].T if isinstance(x, Transposed) else x[...]
    return value.astype(jnp.float32)
