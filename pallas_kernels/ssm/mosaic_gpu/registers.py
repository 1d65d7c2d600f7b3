"""What Pallas has no word for: registers of a tile (T, N), in wgmma's layout, from those of smaller ones.

Rows 16 w to 16 w + 15 of the 64 are in warp w. Where rows are tokens of rank 0, then those of rank 1, ..., a warp holds
rows of one rank: what is the same for all tokens is then one vector a warp, what is the same for all ranks one block of
tokens that every rank's warps hold alike.
"""

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a tile: what wgmma computes at least
WARPS = 4
TILE, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def joined(parts, interpret: bool):
    """Columns side by side: lax.concatenate, which jax 0.10 does not lower here."""
    if interpret:
        return jnp.concatenate(parts, axis=1)
    shape = (ROWS, sum(part.shape[1] for part in parts))

    @plgpu.inline_mgpu(
        arg_types=(TILE,) * len(parts), return_type=plgpu.ShapeDtypeStruct(shape, parts[0].dtype, layout=TILE)
    )
    def join(_, *parts):
        return _tile(np.concatenate([part.registers for part in parts], axis=1), parts[0])

    return join(*parts)


def planes_of(x_TN, planes: int):
    """The first entries of the planes, what lies between, the second ones, and the rest: plane i is (i, i + N / 2)."""
    half = x_TN.shape[1] // 2
    u_TS, w_TS = x_TN[:, :planes], x_TN[:, half : half + planes]
    if planes == half:
        return u_TS, None, w_TS, None
    return u_TS, x_TN[:, planes:half], w_TS, x_TN[:, half + planes :]


def joined_planes(parts, interpret: bool):
    """`planes_of` undone, in bfloat16."""
    return joined([part.astype(jnp.bfloat16) for part in parts if part is not None], interpret)


def of_ranks(ref_RN, interpret: bool):
    """(T, N): every row is its rank's of a ref (R, N), float32."""
    rank, size = ref_RN.shape
    if interpret:
        return jnp.repeat(ref_RN[...], ROWS // rank, axis=0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((ROWS, size), jnp.float32, layout=TILE)
    )
    def load(_, ref):
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        i32 = ir.IntegerType.get_signless(32)
        warp = arith.remui(utils.warp_idx(sync=False), utils.c(WARPS, i32))
        row = arith.index_cast(ir.IndexType.get(), arith.divui(warp, utils.c(WARPS // rank, i32)))
        vector = mgpu.FragmentedArray.load_untiled(
            utils.memref_slice(ref, row), layout=COLUMN.to_mgpu(), optimized=False
        )
        return vector.broadcast_in_dim((ROWS, size), (1,), TILE.to_mgpu())

    return load(ref_RN)


def of_tokens(ref_QN, interpret: bool):
    """(T, N): the rows of a tiled ref (Q, N), once for every rank."""
    tokens, size = ref_QN.shape
    if interpret:
        return jnp.tile(ref_QN[...], (ROWS // tokens, 1))
    if tokens == ROWS:
        return plgpu.load(ref_QN, (), layout=TILE)
    # wgmma's layout, less some of its warps, which hold copies instead.
    tiles, own = {16: ((), ()), 32: (((32, 8),), (-7,))}[tokens]
    layout = plgpu.Layout.TILED(
        plgpu.Tiling((*tiles, (16, 8), (8, 8), (2,))),
        warp_dims=(plgpu.Replicated(ROWS // tokens), *own),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
    dtype = ref_QN.dtype

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((ROWS, size), dtype, layout=TILE))
    def repeat(_, x):
        return _tile(x.registers.reshape(TILE.to_mgpu().registers_shape((ROWS, size))), x)

    return repeat(plgpu.load(ref_QN, (), layout=layout))


def _tile(registers, like):
    return mgpu.FragmentedArray(_registers=registers, _layout=TILE.to_mgpu(), _is_signed=like.is_signed)
