"""What the Hopper kernels share: tiles of 64 rows in wgmma's layout, their products, decay and rotation, and copies.

A row is one rank of one token, **tokens fastest**. Rows 16 w to 16 w + 15 of the 64 are in warp w, so a warp holds rows
of one rank: what is the same for all tokens is one vector a warp, what is the same for all ranks one block of tokens
that every rank's warps hold alike.

Pallas's interpreter, for tests, has neither wgmma nor layouts: what needs them has a branch for it.

Letters: T = R Q rows of a chunk, Q its tokens, C chunks, Z splits of the length, S rotary pairs, pair i at entries
(i, i + N / 2) of N, X the scalars of a row.
"""

import copy
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.angle import Along
from pallas_kernels.ssm.contract import Weights
from pallas_kernels.ssm.operands import Operands, TokenArrays, documents_in_chunks

ROWS = 64  # of a tile: what wgmma computes at least
WIDTH = 64  # P, padded
WARPS, LANES = 4, 32
TILE, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
# The scalars of every row, in this order; of packed rows, the document follows them.
SCALARS = ("decay", "shifted", "gamma")  # log2 of the decay since the chunk's start; that less log2 kappa; gamma
SCALARS_BWD = (*SCALARS, "kappa")


@dataclass(frozen=True)
class Tile:
    """How the kernels are cut. Performance only, but for `rank` and `width`, the shape's."""

    rank: int = 1
    width: int = WIDTH  # entries of P that are not padding
    splits: int = 1  # parts of the length side by side, all of the same number of chunks
    residuals: bool = False  # store y too, which the backward pass reads
    along: Along | None = None  # how rows go on over devices
    interpret: object = None  # plgpu's InterpretParams: on the CPU, for tests

    @property
    def tokens(self) -> int:
        """Return how many a chunk has."""
        return ROWS // self.rank

    @property
    def scalars(self) -> tuple[str, ...]:
        """Return which the forward pass reads: those of the backward pass if there is one, so that XLA stacks one."""
        return SCALARS_BWD if self.residuals else SCALARS

    @property
    def interpreted(self) -> bool:
        """Return whether the kernels run in Pallas's interpreter."""
        return self.interpret is not None


class Residuals(NamedTuple):
    """What the backward pass reads beside the operands."""

    phase_BHLS: jax.Array | None
    y_BLHRP: jax.Array
    starts_BHZPN: jax.Array
    split_decay_BHZ: jax.Array | None
    last_BHPN: jax.Array


class ScanRefs(NamedTuple):
    """What the kernels of a scan read, forward or backward; None: absent, or not read by this kernel."""

    tokens: TokenArrays
    dy_BLHRP: jax.Array | None  # of the backward pass
    phase_BHLS: jax.Array | None  # int16, fractions of a turn; None: nothing rotates
    scalars_BHCXT: jax.Array  # float32: `SCALARS`, or `SCALARS_BWD`
    h_BHZPN: jax.Array  # float32, the state before every split, or the gradient of the one after
    weights: Weights

    def flat(self) -> "ScanRefs":
        """Put all that a token has side by side: the copy engine sees at most five axes, those of a tile twice."""
        joined = lambda x, axes: None if x is None else x.reshape(-1, *x.shape[axes:])  # noqa: E731
        of_token = lambda x: x.reshape(*x.shape[:2], -1)  # noqa: E731
        norm_HP = self.weights.norm_HP
        return self._replace(
            tokens=jax.tree.map(of_token, self.tokens),
            dy_BLHRP=jax.tree.map(of_token, self.dy_BLHRP),
            phase_BHLS=joined(self.phase_BHLS, 2),
            scalars_BHCXT=joined(self.scalars_BHCXT, 3),
            weights=self.weights._replace(norm_HP=None if norm_HP is None else norm_HP[:, None]),
        )


@dataclass(frozen=True)
class Sizes:
    """The sizes that a program of a scan needs."""

    batch: int
    heads: int
    groups: int
    chunks: int  # of a split
    d_state: int
    pairs: int

    @classmethod
    def of(cls, refs: ScanRefs, tile: Tile) -> "Sizes":
        """Return the sizes of what a scan reads."""
        x_BLRGN = refs.tokens.q_BLRGN if refs.tokens.k_BLRGN is None else refs.tokens.k_BLRGN
        batch, heads, chunks = refs.scalars_BHCXT.shape[:3]
        return cls(
            batch=batch,
            heads=heads,
            groups=x_BLRGN.shape[3],
            chunks=chunks // tile.splits,
            d_state=x_BLRGN.shape[4],
            pairs=0 if refs.phase_BHLS is None else refs.phase_BHLS.shape[-1],
        )


def interpreter():
    """Return what runs the kernels on the CPU."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.10 has no public name

    return InterpretGPUParams()


def stack_scalars(operands: Operands, names: tuple[str, ...], tile: Tile):
    """Stacks the named scalars of every row of a chunk, rank by rank; of packed rows, the document too."""
    decay_BHL, document_BL = operands.log_decay_BHL * math.log2(math.e), operands.document_BL
    scalars_BHL = {
        "decay": decay_BHL,
        "shifted": decay_BHL - jnp.log2(operands.kappa_BHL),  # a product with kappa is part of the exponent
        "gamma": operands.gamma_BHL,
        "kappa": operands.kappa_BHL,
    }
    arrays_BHL = [scalars_BHL[name] for name in names]
    if document_BL is not None:
        document_BHL = documents_in_chunks(document_BL, tile.tokens)[:, None].astype(jnp.float32)
        arrays_BHL.append(jnp.broadcast_to(document_BHL, decay_BHL.shape))
    batch, n_heads, _ = decay_BHL.shape
    stacked_BHCXQ = jnp.stack([x.reshape(batch, n_heads, -1, tile.tokens) for x in arrays_BHL], axis=3)
    return jnp.tile(stacked_BHCXQ, tile.rank)


def tiled(*shape, dtype=jnp.bfloat16):
    """Return shared memory as wgmma and the copy engine want a matrix."""
    swizzle = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def load(ref, layout, interpret: bool, optimized: bool = True):
    """Load a ref into registers of a layout, which the interpreter has none of."""
    return ref[...] if interpret else plgpu.load(ref, (), layout=layout, optimized=optimized)


def iota(axis: int, interpret: bool):
    """Return the row (axis 0) or column of every entry of a (T, T) tile."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis)
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis, layout=TILE)


def zeros(shape: tuple[int, ...], layout, interpret: bool):
    """Return float32 zeros in registers of a layout."""
    x = jnp.zeros(shape, jnp.float32)
    return x if interpret else plgpu.layout_cast(x, layout)


def down(x_T, columns: int):
    """Broadcasts one number a row to `columns` columns."""
    return lax.broadcast_in_dim(x_T, (x_T.shape[0], columns), (0,))


def across(x_P, rows: int):
    """Broadcasts one number a column to `rows` rows."""
    return lax.broadcast_in_dim(x_P, (rows, x_P.shape[0]), (1,))


def same_token(tile: Tile):
    """Return where row and column of a (T, T) tile are of one token."""
    down_TT, across_TT = (token(iota(axis, tile.interpreted), tile) for axis in (0, 1))
    return down_TT == across_TT


def ones_of_tokens(tile: Tile):
    """Return ones where row and column are of one token.

    Ranks are in different warps: a product with these adds them up, for each of the warps alike.
    """
    return jnp.where(same_token(tile), 1.0, 0.0).astype(jnp.bfloat16)


def token(row, tile: Tile):
    """Return the token of a row."""
    return row if tile.rank == 1 else row & (tile.tokens - 1)


def join_columns(parts, interpret: bool):
    """Put columns side by side, as lax.concatenate would, which jax 0.10 does not lower here."""
    if interpret:
        return jnp.concatenate(parts, axis=1)
    shape = (ROWS, sum(part.shape[1] for part in parts))

    @plgpu.inline_mgpu(
        arg_types=(TILE,) * len(parts), return_type=plgpu.ShapeDtypeStruct(shape, parts[0].dtype, layout=TILE)
    )
    def join(_, *parts):
        return tile_fragments(np.concatenate([part.registers for part in parts], axis=1), parts[0])

    return join(*parts)


def split_pairs(x_TN, pairs: int):
    """Return the first entries of the rotary pairs, what lies between, the second entries, and the rest."""
    half = x_TN.shape[1] // 2
    u_TS, w_TS = x_TN[:, :pairs], x_TN[:, half : half + pairs]
    if pairs == half:
        return u_TS, None, w_TS, None
    return u_TS, x_TN[:, pairs:half], w_TS, x_TN[:, half + pairs :]


def join_pairs(parts, interpret: bool):
    """Undoes `split_pairs`, in bfloat16."""
    return join_columns([part.astype(jnp.bfloat16) for part in parts if part is not None], interpret)


def of_ranks(ref_RN, interpret: bool):
    """Return (T, N), every row that of its rank in a ref (R, N), float32."""
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
    """Return (T, N), the rows of a tiled ref (Q, N), once for every rank."""
    tokens, size = ref_QN.shape
    if interpret:
        return jnp.tile(ref_QN[...], (ROWS // tokens, 1))
    if tokens == ROWS:
        return plgpu.load(ref_QN, (), layout=TILE)
    # This is wgmma's layout without some of its warps, which hold copies.
    tiles, warps = {16: ((), ()), 32: (((32, 8),), (-7,))}[tokens]
    layout = plgpu.Layout.TILED(
        plgpu.Tiling((*tiles, (16, 8), (8, 8), (2,))),
        warp_dims=(plgpu.Replicated(ROWS // tokens), *warps),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
    dtype = ref_QN.dtype

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((ROWS, size), dtype, layout=TILE))
    def repeat(_, x):
        return tile_fragments(x.registers.reshape(TILE.to_mgpu().registers_shape((ROWS, size))), x)

    return repeat(plgpu.load(ref_QN, (), layout=layout))


def tile_fragments(registers, like):
    """Return registers as a tile."""
    return fragments(registers, TILE, like)


def fragments(registers, layout, like):
    """Return registers as an array in a layout, of the signedness of another."""
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=like.is_signed)


class Transposed(NamedTuple):
    """A ref that a product reads transposed."""

    ref: jax.Array


def products(sums, interpret: bool, then):
    """Return `then` of functions that wait for c + a . b + a' . b' + ... of every (c, (a, b), ...), and return it.

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
    """Return a . b, of as many columns."""
    return products([(columns, (a, b))], interpret, lambda x: x())


def product_into(c, a, b, interpret: bool):
    """Return c + a . b."""
    return products([(c, (a, b))], interpret, lambda x: x())


def product_tiles(pairs, interpret: bool):
    """Return a . b of every (a, b, columns of b), computed side by side."""
    if interpret:
        return [jnp.dot(_value(a), _value(b), precision="highest") for a, b, _ in pairs]

    def run(*sums):
        for sum_, (a, b, _) in zip(sums, pairs, strict=True):
            plgpu.wgmma(sum_, _operand(a), _operand(b))
        return [sum_[...] for sum_ in sums]

    return pl.run_scoped(run, *(plgpu.ACC((ROWS, columns), jnp.float32) for _, _, columns in pairs))


def add_products(sums, interpret: bool):
    """Return c + a . b of every (c, a, b), computed side by side in the registers of c."""
    if interpret:
        return [c + jnp.dot(_value(a), _value(b), precision="highest") for c, a, b in sums]

    def run(refs):
        for ref, (_, a, b) in zip(refs, sums, strict=True):
            plgpu.wgmma(ref, _operand(a), _operand(b))

    return pl.run_state(run)([plgpu.ACC.init(c) for c, _, _ in sums])


def _waiting(refs, lengths):
    """Return what waits for a sum's products and those before it, and loads the sum, of every sum."""
    later = [sum(lengths[i + 1 :]) for i in range(len(refs))]
    return [functools.partial(plgpu.wgmma_accumulator_load, ref, wait_n=n) for ref, n in zip(refs, later, strict=True)]


def _operand(x):
    """Return an operand as wgmma takes it."""
    return plgpu.transpose_ref(x.ref, (1, 0)) if isinstance(x, Transposed) else x


def _value(x):
    """Return an operand as the interpreter takes it, which has no wgmma on registers."""
    value = x.ref[...].T if isinstance(x, Transposed) else x[...]
    return value.astype(jnp.float32)


class Decay:
    """What the scalars of a chunk weigh. Vectors are loaded where they are used: they would fill the registers."""

    def __init__(self, scalars_XT, names: tuple[str, ...], tile: Tile):
        """`names` are those of the scalars; of packed rows, the document follows them."""
        self.scalars_XT, self.tile, self.interpret = scalars_XT, tile, tile.interpreted
        self.places = {name: place for place, name in enumerate((*names, "document"))}
        self.packed = scalars_XT.shape[0] > len(names)

    def rows(self, name: str):
        """Load a scalar of every row, for the rows of a tile."""
        return load(self.scalars_XT.at[self.places[name]], ROW, self.interpret)

    def columns(self, name: str):
        """Load a scalar of every row, for the columns of a tile."""
        return load(self.scalars_XT.at[self.places[name]], COLUMN, self.interpret)

    def last(self, name: str):
        """Load a scalar of the last row."""
        return self.scalars_XT[self.places[name], ROWS - 1]

    def tokens(self):
        """Return the token of every row of a (T, T) tile, and of every column."""
        return (token(iota(axis, self.interpret), self.tile) for axis in (0, 1))

    def _together(self, before_TT):
        """Restricts pairs of rows and columns to those of one document."""
        if not self.packed:
            return before_TT
        return before_TT & (down(self.rows("document"), ROWS) == across(self.columns("document"), ROWS))

    def weight_TT(self, *, shifted: bool = False):
        """Return e^(c_t - c_s) kappa_s for targets t (down) after sources s, in a document; gamma_t where t = s.

        kappa is a factor, so that the weight is to the bit as the gradient of keys has it; `shifted`: in the exponent.
        """
        target_TT, source_TT = self.tokens()
        later_TT = jnp.exp2(
            down(self.rows("decay"), ROWS) - across(self.columns("shifted" if shifted else "decay"), ROWS)
        )
        if not shifted:
            later_TT *= across(self.columns("kappa"), ROWS)
        diagonal_TT = jnp.where(target_TT == source_TT, across(self.columns("gamma"), ROWS), 0.0)
        # What lies after a token may be infinite.
        return jnp.where(self._together(target_TT > source_TT), later_TT, diagonal_TT)

    def later_TT(self):
        """Return e^(c_t - c_s) for targets t (across) after sources s (down), in a document; 0 elsewhere."""
        source_TT, target_TT = self.tokens()
        gap_TT = across(self.columns("decay"), ROWS) - down(self.rows("decay"), ROWS)
        return jnp.where(self._together(target_TT > source_TT), jnp.exp2(gap_TT), 0.0)

    def decay_from_start_T(self):
        """Return what is left at each row of the state before the chunk."""
        decay_T = jnp.exp2(self.rows("decay"))
        return jnp.where(self.rows("document") == 0.0, decay_T, 0.0) if self.packed else decay_T

    def decay_to_end_T(self, name: str = "decay"):
        """Return what is left of each row at the end of the chunk; of "shifted": times kappa."""
        decay_T = jnp.exp2(self.last("decay") - self.rows(name))
        if not self.packed:
            return decay_T
        return jnp.where(self.rows("document") == self.last("document"), decay_T, 0.0)

    def chunk_decay(self):
        """Return what is left at the end of the chunk of the state before it."""
        decay = jnp.exp2(self.last("decay"))
        return jnp.where(self.last("document") == 0.0, decay, 0.0) if self.packed else decay


class Rotation:
    """Bias and rotation by the angles of a chunk. Computed where it is used, as registers are few."""

    def __init__(self, phase_QS, interpret: bool):
        self.interpret, self.sin_TS, self.cos_TS = interpret, None, None
        if phase_QS is not None:
            radians_TS = of_tokens(phase_QS, interpret).astype(jnp.float32) * (2 * jnp.pi / 2.0**16)
            self.sin_TS, self.cos_TS = jnp.sin(radians_TS), jnp.cos(radians_TS)

    def changes(self, bias_RN) -> bool:
        """Return whether anything is done to queries or keys with this bias (None: no bias)."""
        return bias_RN is not None or self.sin_TS is not None

    def apply(self, x_ref, bias_RN):
        """Return queries or keys, biased and rotated, in registers, bfloat16."""
        x_TN = load(x_ref, TILE, self.interpret)
        if not self.changes(bias_RN):
            return x_TN
        x_TN = x_TN.astype(jnp.float32)
        if bias_RN is not None:
            x_TN += of_ranks(bias_RN, self.interpret)
        if self.sin_TS is None:
            return x_TN.astype(jnp.bfloat16)
        u_TS, rest, w_TS, more = split_pairs(x_TN, self.sin_TS.shape[1])
        sin_TS, cos_TS = self.sin_TS, self.cos_TS
        rotated = (u_TS * cos_TS - w_TS * sin_TS, rest, u_TS * sin_TS + w_TS * cos_TS, more)
        return join_pairs(rotated, self.interpret)

    def inverse(self, dx_TN, x_TN):
        """Return the gradient of what was rotated into x, bfloat16, and of the angle (None without angles)."""
        if self.sin_TS is None:
            return dx_TN.astype(jnp.bfloat16), None
        pairs, sin_TS, cos_TS = self.sin_TS.shape[1], self.sin_TS, self.cos_TS
        du_TS, rest, dw_TS, more = split_pairs(dx_TN, pairs)
        u_TS, _, w_TS, _ = split_pairs(x_TN, pairs)
        dphi_TS = dw_TS * u_TS.astype(jnp.float32) - du_TS * w_TS.astype(jnp.float32)
        parts = (du_TS * cos_TS + dw_TS * sin_TS, rest, dw_TS * cos_TS - du_TS * sin_TS, more)
        return join_pairs(parts, self.interpret), dphi_TS


def head_memory(weights: Weights) -> Weights:
    """Return the shared memory of the weights of a program's head, without the axis H of their names.

    The norm is (1, P) there, (H, 1, P) before; a skip is read where it lies.
    """
    return jax.tree.map(lambda x: plgpu.SMEM(x.shape[1:], jnp.float32), weights._replace(skip_H=None))


def head_barrier(memory: Weights):
    """Return the barrier of `load_head`."""
    return plgpu.Barrier(num_arrivals=max(1, len(jax.tree.leaves(memory))))


def load_head(weights: Weights, head, memory: Weights, barrier):
    """Start the copies of a head's weights, and return what waits for them."""
    copy = lambda to, x_H: plgpu.copy_gmem_to_smem(x_H.at[head], to, barrier)  # noqa: E731
    jax.tree.map(copy, memory, weights._replace(skip_H=None))
    return lambda: plgpu.barrier_wait(barrier) if jax.tree.leaves(memory) else None


def opened(memory):
    """Return a tree of shared memory with an axis of 1 in front, for `Program.fresh`."""
    return jax.tree.map(lambda x: plgpu.SMEM((1, *x.shape), x.dtype, transforms=x.transforms), memory)


def zero():
    """Return the index 0, of which LLVM does not know what it is; the assembler does."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())))
    def opaque(_):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        i32 = ir.IntegerType.get_signless(32)
        value = llvm.inline_asm(i32, [], "mov.b32 $0, 0;", "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return opaque()


class Program:
    """Which part of the arrays a program of a scan works on: a head of a batch entry, or a split of it.

    Its shared memory is `opened`.
    """

    def __init__(self, refs, out, memory, barriers, *, sizes: Sizes, tile: Tile):
        self.refs, self.out, self.memory, self.barriers = refs, out, memory, barriers
        self.shared = jax.tree.map(lambda ref: ref.at[0], memory)
        self.sizes, self.tile, self.interpret = sizes, tile, tile.interpreted
        self.batch, self.split, self.head = self.place()
        self.group = lax.div(self.head, jnp.int32(sizes.heads // sizes.groups))
        self.row = self.batch * sizes.heads + self.head
        self.state = (self.batch, self.head, self.split)

    def place(self):
        """Return the batch entry, the split and the head."""
        program, heads, splits = lax.axis_index("program"), jnp.int32(self.sizes.heads), jnp.int32(self.tile.splits)
        # Heads run fastest: neighbours read the same queries and keys.
        rest = lax.div(program, heads)
        return lax.div(rest, splits), lax.rem(rest, splits), lax.rem(program, heads)

    def fresh(self) -> Self:
        """Return the program for one turn of a loop, which computes anew where its shared memory is.

        Addresses are the same every time, so LLVM would compute them before the loop: those of all operands of
        products, two registers each, which then leave too few for what changes.
        """
        program = copy.copy(self)
        if not self.interpret:
            place = zero()
            program.shared = jax.tree.map(lambda ref: ref.at[place], self.memory)
        return program

    def chunk(self, index):
        """Return the place of a chunk of the split in its row."""
        return self.split * self.sizes.chunks + index

    def chunk_of_row(self, index):
        """Return its place among the chunks of all rows."""
        return self.row * self.tile.splits * self.sizes.chunks + self.chunk(index)

    def tokens(self, index):
        """Return the tokens of a chunk."""
        return pl.ds(self.chunk(index) * self.tile.tokens, self.tile.tokens)

    def rows(self, rank: int):
        """Return the rows of a rank in a tile."""
        return pl.ds(rank * self.tile.tokens, self.tile.tokens)

    def of_head(self, tokens, rank: int = 0, ranks: int = 1):
        """Return where the entries of the head (of a rank of it) are for these tokens, in (B, L, H R P)."""
        return self.batch, tokens, pl.ds((self.head * ranks + rank) * WIDTH, WIDTH)

    def load_ranks(self, from_BLX, to_TN, index, barrier):
        """Start the copies of a chunk's queries or keys."""
        tokens, d_state = self.tokens(index), self.sizes.d_state
        for rank in range(self.tile.rank):
            columns = pl.ds((rank * self.sizes.groups + self.group) * d_state, d_state)
            from_QN = from_BLX.at[self.batch, tokens, columns]
            plgpu.copy_gmem_to_smem(from_QN, to_TN.at[self.rows(rank)], barrier)

    def load_phase(self, to_QS, index, barrier):
        """Start the copy of a chunk's angles, if there are any."""
        if self.refs.phase_BHLS is not None:
            plgpu.copy_gmem_to_smem(self.refs.phase_BHLS.at[self.row, self.tokens(index)], to_QS, barrier)

    def load_scalars(self, to_XT, index, barrier):
        """Start the copy of a chunk's scalars."""
        plgpu.copy_gmem_to_smem(self.refs.scalars_BHCXT.at[self.chunk_of_row(index)], to_XT, barrier)

    def values(self, v_QP):
        """Return values times their rank's weight, float32."""
        x_TP, v_rank_RP = of_tokens(v_QP, self.interpret).astype(jnp.float32), self.shared.weights.v_rank_HRP
        return x_TP if v_rank_RP is None else x_TP * of_ranks(v_rank_RP, self.interpret)

    def store_values(self, v_QP, decay: Decay):
        """Store what the values of a chunk weigh at its end, and return where they are, of every rank."""
        x_ref, x_TP = v_QP, self.values(v_QP)
        if self.tile.rank > 1:
            x_ref = self.shared.x_TP
            x_ref[...] = x_TP.astype(jnp.bfloat16)
        self.shared.weighted_TP[...] = (x_TP * down(decay.decay_to_end_T("shifted"), WIDTH)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        return x_ref

    def by_rank(self, array_BLX, tile_TP, index):
        """Return where every rank of a chunk is in an array (B, L, H R P) and in a tile."""
        tokens, ranks = self.tokens(index), self.tile.rank
        return [(array_BLX.at[self.of_head(tokens, r, ranks)], tile_TP.at[self.rows(r)]) for r in range(ranks)]


def call_scan(
    kernel, program: type[Program], refs: ScanRefs, *, name: str, out, scratch, tile: Tile, sums: bool = True
):
    """Run `kernel(program)` for every head of a row, and split of it; see `call`.

    Args:
        program: made of refs, out, what there is of `scratch` (shared memory, and barriers), sizes and tile.
    """
    sizes, (shared, barriers) = Sizes.of(refs, tile), scratch
    return call(
        lambda *places: kernel(program(*places, sizes=sizes, tile=tile)),
        name=name,
        operands=refs.flat(),
        out=out,
        scratch=(opened(shared), barriers),
        grid={"program": sizes.batch * sizes.heads * tile.splits},
        interpret=tile.interpret,
        sums=sums,
    )


def call(kernel, *, name: str, operands, out, scratch, grid: dict[str, int], interpret, sums: bool = True):
    """Run `kernel(operands, out, *scratch)`, trees of refs, for every point of the grid, whose last axis runs fastest.

    Under `jax.vmap` the grid gets one more axis, over which the kernel runs as it is: one launch for all.

    Args:
        out: a tree of shapes and dtypes, returned as arrays.
        scratch: trees of what a program has in shared memory, and its barriers.
        grid: sizes by name; programs ask for their place by `lax.axis_index(name)`.
        interpret: plgpu's InterpretParams: on the CPU, for tests; None: on the GPU.
        sums: whether the kernel adds up within warps, and nowhere else.
    """
    arrays, tree = jax.tree.flatten(operands)
    out_types, out_tree = jax.tree.flatten(out)

    def body(*refs):
        operands = jax.tree.unflatten(tree, refs[: len(arrays)])
        pl.run_scoped(functools.partial(kernel, operands, jax.tree.unflatten(out_tree, refs[len(arrays) :])), *scratch)

    how = {
        "compiler_params": plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # commit_smem stands wherever warps exchange something
            **({"reduction_scratch_bytes": 512} if sums else {}),
        ),
        "kernel_name": name,
        **({} if interpret is None else {"interpret": interpret}),
    }
    return jax.tree.unflatten(out_tree, mapped(body, out_types, grid, how)(*arrays))


def mapped(body, out_types: list, grid: dict[str, int], how: dict, batched: tuple[tuple[bool, ...], ...] = ()):
    """Return the function of arrays that runs `body(*refs)` over a grid, and that `jax.vmap` can batch.

    Args:
        batched: of every `jax.vmap` so far, the outermost first, which arrays have its axis; the outputs all have it.
            Its axis of the grid is called "vmap", and a number from the innermost on.
    """

    def at_its_place(*refs):
        flags = [*zip(*batched, strict=True)] if batched else [()] * (len(refs) - len(out_types))
        flags += [(True,) * len(batched)] * len(out_types)
        place = [lax.axis_index(f"vmap{len(batched) - level}") for level in range(len(batched))]
        indices = [tuple(index for index, has in zip(place, of, strict=True) if has) for of in flags]
        body(*(ref.at[index] if index else ref for ref, index in zip(refs, indices, strict=True)))

    run = jax.custom_batching.custom_vmap(
        plgpu.kernel(at_its_place, out_type=out_types, grid=tuple(grid.values()), grid_names=tuple(grid), **how)
    )

    @run.def_vmap
    def over_one_more(size, in_batched, *arrays):
        outer = [jax.ShapeDtypeStruct((size, *out.shape), out.dtype) for out in out_types]
        wider = {f"vmap{len(batched) + 1}": size, **grid}
        return mapped(body, outer, wider, how, (tuple(in_batched), *batched))(*arrays), [True] * len(out_types)

    return run
