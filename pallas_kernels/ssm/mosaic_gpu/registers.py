"""What Pallas has no word for: registers of a tile (T, N), in wgmma's layout, from those of smaller ones.

Rows 16 w to 16 w + 15 of the 64 are in warp w. Where rows are tokens of rank 0, then those of rank 1, ..., a warp holds
rows of one rank: what is the same for all tokens is then one vector a warp, what is the same for all ranks one block of
tokens that every rank's warps hold alike.
"""

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of a tile: what wgmma computes at least
WARPS, LANES = 4, 32
TILE, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def joined(parts, interpret: bool):
    """Puts columns side by side: lax.concatenate, which jax 0.10 does not lower here."""
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
    """Returns the first entries of the planes (i, i + N / 2), what lies between, the second entries, and the rest."""
    half = x_TN.shape[1] // 2
    u_TS, w_TS = x_TN[:, :planes], x_TN[:, half : half + planes]
    if planes == half:
        return u_TS, None, w_TS, None
    return u_TS, x_TN[:, planes:half], w_TS, x_TN[:, half + planes :]


def joined_planes(parts, interpret: bool):
    """Undoes `planes_of`, in bfloat16."""
    return joined([part.astype(jnp.bfloat16) for part in parts if part is not None], interpret)


def of_ranks(ref_RN, interpret: bool):
    """Returns (T, N) where every row is its rank's of a ref (R, N), float32."""
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
    """Returns (T, N), the rows of a tiled ref (Q, N), once for every rank."""
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


def ranks_of_warps(rank: int, vector: int = 1):
    """Returns the layout of few rows (R, N): a warp has one (R 2, 1: others the same), a lane every 32nd column.

    Of `vector` columns side by side, every 32nd such group.
    """
    warps = () if rank == WARPS else (plgpu.Replicated(WARPS // rank),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((rank, 32 * vector), (vector,))),
        warp_dims=(*(() if rank == 1 else (-3,)), *warps),
        lane_dims=(-2,),
        vector_dim=-1,
    )


def spread(size: int):
    """Returns the layout of (S,): over as many lanes as divide S, the others and all warps with the same."""
    lanes = min(LANES, size & -size)
    same = () if lanes == LANES else (plgpu.Replicated(LANES // lanes),)
    tiles, own = (((1,),), ()) if lanes == 1 else (((lanes,), (1,)), (-2,))
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(plgpu.Replicated(WARPS),), lane_dims=(*same, *own), vector_dim=-1
    )


def pairs_of(rank: int, rotation: str):
    """Returns the layout of (R, N) for `pairs`, which give (R, N / 2) in that of `ranks_of_warps`."""
    return ranks_of_warps(rank, 2 if rotation == "adjacent" else 1)


def pairs(x_RN, rotation: str, interpret: bool):
    """Returns the first and the second entries of the planes: (2 i, 2 i + 1), "adjacent", or (i, i + N / 2), "half"."""
    rank, size = x_RN.shape
    if rotation == "half":
        return x_RN[:, : size // 2], x_RN[:, size // 2 :]
    if interpret:
        return x_RN[:, ::2], x_RN[:, 1::2]
    half = plgpu.ShapeDtypeStruct((rank, size // 2), x_RN.dtype, layout=ranks_of_warps(rank))

    @plgpu.inline_mgpu(arg_types=(pairs_of(rank, rotation),), return_type=(half, half))
    def split(_, x):
        from jax.experimental.mosaic.gpu import utils

        one = lambda i: np.vectorize(lambda x: utils.vector_slice(x, slice(i, i + 1)), otypes=[object])  # noqa: E731
        return tuple(_array(one(i)(x.registers), ranks_of_warps(rank), x) for i in range(2))

    return split(x_RN)


def joined_pairs(u_RM, w_RM, rotation: str, interpret: bool):
    """Undoes `pairs`."""
    rank, size = u_RM.shape
    if interpret:
        axis = 2 if rotation == "adjacent" else 1
        return jnp.stack([u_RM, w_RM], axis=axis).reshape(rank, 2 * size)
    half, whole = ranks_of_warps(rank), pairs_of(rank, rotation)

    @plgpu.inline_mgpu(
        arg_types=(half, half), return_type=plgpu.ShapeDtypeStruct((rank, 2 * size), u_RM.dtype, layout=whole)
    )
    def join(_, u, w):
        from jax.experimental.mosaic.gpu import utils

        if rotation == "half":
            return _array(np.concatenate([u.registers, w.registers], axis=1), whole, u)
        both = np.vectorize(lambda *pair: utils.vector_concat(pair), otypes=[object])
        return _array(both(u.registers, w.registers), whole, u)

    return join(u_RM, w_RM)


def _array(registers, layout, like):
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=like.is_signed)


def _tile(registers, like):
    return _array(registers, TILE, like)


def columns():
    """Returns the layout of (T, N), N a multiple of 128, in which a thread has whole columns."""
    return plgpu.Layout.TILED(plgpu.Tiling(((1, 128), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def planes_of_heads(heads: int, planes: int):
    """Returns the layout of (H, T, S), H 1, 2 or 4, in which a thread has all tokens of a plane of one head.

    A warp has a head (where they are fewer than 4, others the same), a lane every 32nd plane.
    """
    lanes = min(LANES, planes)
    warps = () if heads == WARPS else (plgpu.Replicated(WARPS // heads),)
    same = () if lanes == LANES else (plgpu.Replicated(LANES // lanes),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((heads, 1, lanes), (1,))),
        warp_dims=(*(() if heads == 1 else (-4,)), *warps),
        lane_dims=(*same, -2),
        vector_dim=-1,
    )


def laid_out(x, shape, dimensions, layout, interpret: bool):
    """Broadcasts x, whose axes are `dimensions` of `shape`, to that shape in a layout."""
    x = lax.broadcast_in_dim(x, shape, dimensions)
    return x if interpret else plgpu.layout_cast(x, layout)


def running_sum(x_HTS, start_HTS, goes_on_HTS, *, reverse: bool, layout, interpret: bool):
    """Returns sums of x over the tokens up to each (from each on: `reverse`), in registers of `planes_of_heads`.

    Args:
        start_HTS: where the sum starts from, the same for all tokens; None: from zero.
        goes_on_HTS: int32, 0 where the sum up to the token before (after) is forgotten; None: nowhere.
    """
    given = [array for array in (start_HTS, goes_on_HTS) if array is not None]

    def unpacked(arrays):
        arrays = list(arrays)
        return None if start_HTS is None else arrays.pop(0), None if goes_on_HTS is None else arrays.pop(0)

    tokens = range(x_HTS.shape[1])[:: -1 if reverse else 1]
    if interpret:
        start_HTS, goes_on_HTS = unpacked(given)
        keep_HTS = jnp.ones_like(x_HTS) if goes_on_HTS is None else goes_on_HTS.astype(x_HTS.dtype)

        def step(sum_HS, token):
            x_HS, keep_HS = token
            sum_HS = keep_HS * sum_HS + x_HS
            return sum_HS, sum_HS

        sum_HS = jnp.zeros_like(x_HTS[:, 0]) if start_HTS is None else start_HTS[:, 0]
        in_order = (lambda x: jnp.flip(x, 0)) if reverse else (lambda x: x)  # the interpreter's scan has no reverse
        by_token = tuple(in_order(jnp.swapaxes(x, 0, 1)) for x in (x_HTS, keep_HTS))
        return jnp.swapaxes(in_order(lax.scan(step, sum_HS, by_token)[1]), 0, 1)

    @plgpu.inline_mgpu(
        arg_types=(layout,) * (1 + len(given)),
        return_type=plgpu.ShapeDtypeStruct(x_HTS.shape, x_HTS.dtype, layout=layout),
    )
    def walk(_, x, *given):
        from jaxlib.mlir.dialects import arith

        start, goes_on = unpacked(given)
        registers, sum_ = x.registers.copy(), None
        add = np.vectorize(arith.addf if x.is_signed is None else arith.addi, otypes=[object])

        def forgotten(keep, sum_):
            zero = arith.constant(sum_.type, _zeros(sum_.type))
            none = arith.constant(keep.type, _zeros(keep.type))
            return arith.select(arith.cmpi(arith.CmpIPredicate.ne, keep, none), sum_, zero)

        if start is not None:
            sum_ = start.registers[:, tokens[0]]
        for token in tokens:
            if sum_ is not None:
                if goes_on is not None:
                    sum_ = np.vectorize(forgotten, otypes=[object])(goes_on.registers[:, token], sum_)
                registers[:, token] = add(sum_, registers[:, token])
            sum_ = registers[:, token]
        return _array(registers, layout, x)

    return walk(x_HTS, *given)


def _zeros(vector_type):
    """Returns the attribute of a vector of zeros."""
    from jaxlib.mlir import ir

    element = ir.VectorType(vector_type).element_type
    zero = ir.FloatAttr.get(element, 0.0) if isinstance(element, ir.FloatType) else ir.IntegerAttr.get(element, 0)
    return ir.DenseElementsAttr.get_splat(vector_type, zero)
