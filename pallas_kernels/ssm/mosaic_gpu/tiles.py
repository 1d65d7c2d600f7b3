"""Products and vectors of a tile of 64 rows, also in Pallas's interpreter, which has neither wgmma nor layouts."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.mosaic_gpu.registers import ROWS, TILE


def tiled(*shape, dtype=jnp.bfloat16):
    """Shared memory as wgmma and the copy engine want a matrix."""
    swizzle = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def load(ref, layout, interpret: bool, optimized: bool = True):
    return ref[...] if interpret else plgpu.load(ref, (), layout=layout, optimized=optimized)


def iota(axis: int, interpret: bool):
    """(T, T)."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis)
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis, layout=TILE)


def down(x_T, columns: int):
    return lax.broadcast_in_dim(x_T, (x_T.shape[0], columns), (0,))


def across(x_P, rows: int):
    return lax.broadcast_in_dim(x_P, (rows, x_P.shape[0]), (1,))


def products(sums, interpret: bool, then):
    """`then` of functions that wait for c + a . b + a' . b' + ... of every (c, (a, b), ...), and return it.

    They end in the order in which they stand. c is an array, or the number of columns of a sum from zero. Of a product,
    b is a ref and a one or an array, either of them ("t", ref) to be transposed.
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
    return products([(columns, (a, b))], interpret, lambda x: x())


def product_into(c, a, b, interpret: bool):
    """c + a . b."""
    return products([(c, (a, b))], interpret, lambda x: x())


def _waiting(refs, lengths):
    later = [sum(lengths[i + 1 :]) for i in range(len(refs))]
    return [functools.partial(plgpu.wgmma_accumulator_load, ref, wait_n=n) for ref, n in zip(refs, later, strict=True)]


def _operand(x):
    return plgpu.transpose_ref(x[1], (1, 0)) if type(x) is tuple else x


def _value(x):
    value = x[1][...].T if type(x) is tuple else x[...]
    return value.astype(jnp.float32)
