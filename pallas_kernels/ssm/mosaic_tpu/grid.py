"""What both scan kernels read, how it is cut into blocks, and how a kernel is called.

A grid step is one chunk of a block of J heads; heads run fastest, so that what they share (queries, keys, angles) is
fetched once a chunk, and the state of all heads waits in VMEM. A chunk has Q tokens and T = R Q rows: **ranks outer,
tokens inner**, so that a rank is a slice of rows and what is one number a token is repeated by concatenation.
Queries and keys are rotated as columns of N, (N, T); the values of a **pack** of heads lie side by side in X of the 128
lanes, and so do their states, (N, X).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.angle import Along
from pallas_kernels.ssm.contract import Row, Weights, map_axes, sizes_of
from pallas_kernels.ssm.mosaic_tpu.config import LANES, Tiles, vmem_limit


class PackedWeights(NamedTuple):
    """`Weights` as the kernels see them: biases in their order of N, the rest in W packs of heads, each (R, X)."""

    q_bias_HRN: jax.Array | None
    k_bias_HRN: jax.Array | None
    skip_WRX: jax.Array | None
    v_rank_WRX: jax.Array | None
    gate_rank_WRX: jax.Array | None
    out_rank_WRX: jax.Array | None
    norm_WRX: jax.Array | None


class BlockCarry(NamedTuple):
    """`Carry` as the kernels see it. The state may have another order of N than the kernels, see `Constants`."""

    angle_BK1X: jax.Array | None  # radians; K blocks of heads, X is J S
    h_BHPN: jax.Array | None


class Operands(NamedTuple):
    """A row in whole chunks, L = C Q, as the kernels see it, and likewise its gradients. N is a multiple of 128.

    Trailing axes are joined, to X (H P) or Y (G R N), or tokens are last, see `tokens_last`. q, k, v and gate have the
    dtype of the products, all else is float32.
    """

    q_BLY: jax.Array
    k_BLY: jax.Array
    v_BLX: jax.Array
    gate_BLX: jax.Array | None
    angle_BHSL: jax.Array | None  # radians per unit dt; S a multiple of 8; the H axis is 1 where heads share it
    dt_BHL: jax.Array | None
    log_a_BHL: jax.Array
    gamma_BHL: jax.Array
    kappa_BHL: jax.Array | None
    before: BlockCarry | None
    weights: PackedWeights


class Constants(NamedTuple):
    """What both kernels read beside `Operands`, and has no gradient."""

    start_BCK1X: jax.Array | None  # turns: the angle before every chunk; None: nothing rotates
    document_BC1Q: jax.Array | None  # float32, document starts in the chunk up to each token
    order_MN: jax.Array | None  # a one where in the kernels an entry of N goes; None: where it is


def tokens_last(x_BL, tokens: int):
    """Return (B, .., L), no copy of what XLA for TPU keeps so; where Q is no multiple of 128 lanes, (B, C, .., Q)."""
    if x_BL is None:
        return None
    last = jnp.moveaxis(x_BL, 1, -1)
    if tokens % LANES == 0:
        return last
    return jnp.moveaxis(last.reshape(*last.shape[:-1], -1, tokens), -2, 1)


def chunk_of(sizes: tuple[int, ...], tokens: int, index):
    """Return the block of a chunk of `tokens_last`; `index` gives (b, c, those of `sizes`) from the grid's."""

    def moved(*steps):
        b, c, others = index(*steps)
        return (b, *others, c) if tokens % LANES == 0 else (b, c, *others, 0)

    return pl.BlockSpec((None, *sizes, tokens) if tokens % LANES == 0 else (None, None, *sizes, tokens), moved)


def present(blocks: NamedTuple, arrays: NamedTuple):
    """Return the blocks of those arrays that are not None."""
    return blocks._replace(**{name: None for name, array in arrays._asdict().items() if array is None})


@dataclasses.dataclass(frozen=True)
class Grid:
    """Sizes, and the block of every array that one grid step sees.

    Raises:
        ValueError: sizes that the kernels cannot run.
    """

    batch: int
    length: int
    rank: int
    groups: int
    n_heads: int
    d_state: int
    width: int
    pairs: int  # S; 0: nothing rotates
    shared_angle: bool
    kappa: bool  # whether a token has a weight of its own in later outputs
    dtype: jnp.dtype  # of the products
    given_length: int  # L without padding
    given_width: int  # P without padding
    tiles: Tiles
    backwards: bool = False
    only_states: bool = False  # a kernel that computes states, or their gradients, and nothing for single tokens
    along: Along | None = None  # how rows go on over devices

    @classmethod
    def of(cls, row: Row, given: dict[str, int], tiles: Tiles, along: Along | None = None):
        """Return that of a padded row; `given` are its sizes without padding."""
        size = sizes_of(row)
        return cls(
            batch=size["B"],
            length=size["L"],
            rank=size["R"],
            groups=size["G"],
            n_heads=size["H"],
            d_state=size["N"],
            width=size["P"],
            pairs=size["S"],
            shared_angle=row.angle_BLHS is not None and row.angle_BLHS.shape[2] == 1,
            kappa=row.kappa_BLH is not None,
            dtype=row.q_BLRGN.dtype,
            given_length=given["L"],
            given_width=given["P"],
            tiles=tiles,
            along=along,
        )

    def __post_init__(self):
        tokens, heads, n_heads = self.tokens, self.heads, self.n_heads
        width, a_group = self.width, self.heads_a_group
        if self.length % tokens or self.length == 0 or tokens % 16:
            raise ValueError(f"{self.length=} is not a multiple of tiles.tokens={tokens}, a multiple of 16")
        if n_heads % self.groups or n_heads % heads:
            raise ValueError(f"{n_heads=} is not a multiple of {self.groups=} and tiles.heads={heads}")
        if a_group % heads and heads % a_group:
            raise ValueError(f"tiles.heads={heads} and the {a_group} heads of a group do not divide one another")
        if heads != n_heads and heads * width % LANES:
            raise ValueError(f"tiles.heads={heads} heads of P={width} are not a multiple of {LANES} lanes")

    @property
    def tokens(self) -> int:
        return self.tiles.tokens

    @property
    def heads(self) -> int:
        return self.tiles.heads

    @property
    def rows(self) -> int:
        return self.rank * self.tokens

    @property
    def chunks(self) -> int:
        return self.length // self.tokens

    @property
    def last(self) -> int:
        """Return the index of the last chunk."""
        return self.chunks - 1

    @property
    def blocks(self) -> int:
        """Return the number of blocks of heads."""
        return self.n_heads // self.heads

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.chunks, self.blocks

    @property
    def scalars(self) -> list[str]:
        """Return the names of what is one number a token and head, in the order of `chunk.load` in VMEM."""
        there = {"dt": self.pairs > 0, "c": True, "gamma": True, "kappa": self.kappa}
        there["rest"] = self.dtype == jnp.float32
        return [name for name, present in there.items() if present]

    @property
    def pack(self) -> int:
        """Return the heads of a pack: as many of a block as fill 128 lanes."""
        sizes = range(self.heads, 0, -1)
        return next(n for n in sizes if self.heads % n == 0 and (n == 1 or n * self.width <= LANES))

    @property
    def packs(self) -> int:
        """Return the packs of a block."""
        return self.heads // self.pack

    @property
    def lanes(self) -> int:
        """Return the lanes of a pack."""
        return self.pack * self.width

    @property
    def heads_a_group(self) -> int:
        return self.n_heads // self.groups

    @property
    def blocks_a_group(self) -> int:
        """Return the grid steps that see the same group."""
        return max(1, self.heads_a_group // self.heads)

    @property
    def groups_a_block(self) -> int:
        return max(1, self.heads // self.heads_a_group)

    def spec(self, axes: str, array, *, written: bool) -> pl.BlockSpec:
        """Return the block of an array that a grid step sees, from the letters of its axes.

        What a row has once is read in the row's first steps, and later steps stay at its last block. It is written in
        the row's last steps, and earlier ones stay at its first block. Staying at a block costs nothing.
        """
        cut = {"B": None, "C": None, "K": None, "L": self.tokens, "H": self.heads, "W": self.packs}
        if axes == "BLX":
            cut["X"] = self.heads * self.width
        if axes == "BLY":
            cut["Y"] = self.groups_a_block * self.rank * self.d_state
        if axes == "BHL" or (axes == "BHSL" and self.shared_angle):  # those of all heads, fetched once a chunk
            del cut["H"]
        if array.ndim > len(axes):  # `tokens_last` cut in chunks, or sums over a row for weights
            axes = f"BC{axes[1:-1]}Q" if axes[-1] == "L" else f"B{axes}"

        def index(b, step, j):
            if "B" in axes and not {"C", "L"} & {*axes}:
                j = jnp.where(step == self.last, j, 0) if written else jnp.where(step == 0, j, self.blocks - 1)

            def place(axis: str):
                if axis not in cut:
                    return 0
                if axis in "CL":
                    return self.last - step if self.backwards else step
                return b if axis == "B" else lax.div(j, self.blocks_a_group) if axis == "Y" else j

            return tuple(map(place, axes))

        return pl.BlockSpec(tuple(cut.get(axis, size) for axis, size in zip(axes, array.shape, strict=True)), index)

    def numbers(self):
        """Return VMEM for what is one number a token and head: `scalars`."""
        return pltpu.VMEM((self.n_heads, len(self.scalars), self.tokens), jnp.float32)

    def columns(self):
        """Return VMEM for queries or keys of a block's groups, or for their gradients."""
        return pltpu.VMEM((self.groups_a_block, self.d_state, self.rows), jnp.float32)

    def states(self):
        """Return VMEM for the state of all heads, or for its gradient."""
        return pltpu.VMEM((self.n_heads // self.pack, self.d_state, self.lanes), jnp.float32)

    def of_blocks(self, angle_HS):
        """Reshape (.., H, S) to (.., K, 1, J S)."""
        if angle_HS is None:
            return None
        return angle_HS.reshape(*angle_HS.shape[:-2], self.blocks, 1, self.heads * self.pairs)

    def of_heads_again(self, angle_BK1X):
        """Take back `of_blocks`."""
        return None if angle_BK1X is None else angle_BK1X.reshape(self.batch, self.n_heads, self.pairs)

    def packed(self, array_HRP):
        """Lay the heads of a pack side by side: (H, R, P) -> (W, R, X)."""
        if array_HRP is None:
            return None
        array_WHRP = array_HRP.reshape(-1, self.pack, *array_HRP.shape[1:])
        return jnp.swapaxes(array_WHRP, 1, 2).reshape(array_WHRP.shape[0], -1, self.lanes)

    def pack_weights(self, weights: Weights) -> PackedWeights:
        """Return what the kernels see of weights whose biases have the kernels' order of N."""
        skip_HRP, norm_HRP = weights.skip_H, weights.norm_HP
        if skip_HRP is not None:  # the same for all of P
            skip_HRP = jnp.broadcast_to(skip_HRP[:, None, None], (self.n_heads, 1, self.width))
        if norm_HRP is not None:
            norm_HRP = norm_HRP[:, None]
        return PackedWeights(
            q_bias_HRN=weights.q_bias_HRN,
            k_bias_HRN=weights.k_bias_HRN,
            skip_WRX=self.packed(skip_HRP),
            v_rank_WRX=self.packed(weights.v_rank_HRP),
            gate_rank_WRX=self.packed(weights.gate_rank_HRP),
            out_rank_WRX=self.packed(weights.out_rank_HRP),
            norm_WRX=self.packed(norm_HRP),
        )

    def operands(self, row: Row) -> Operands:
        """Return what the kernels see of a padded row whose biases have the kernels' order of N."""
        flat = lambda x: None if x is None else x.reshape(self.batch, self.length, -1)  # noqa: E731
        last = lambda x: tokens_last(x, self.tokens)  # noqa: E731
        before = row.before
        if before is not None:
            before = BlockCarry(angle_BK1X=self.of_blocks(before.angle_BHS), h_BHPN=before.h_BHPN)
        return Operands(
            q_BLY=flat(jnp.swapaxes(row.q_BLRGN, 2, 3)),
            k_BLY=flat(jnp.swapaxes(row.k_BLRGN, 2, 3)),
            v_BLX=flat(row.v_BLHP),
            gate_BLX=flat(row.gate_BLHP),
            angle_BHSL=last(row.angle_BLHS),
            dt_BHL=last(row.dt_BLH),
            log_a_BHL=last(row.log_a_BLH),
            gamma_BHL=last(row.gamma_BLH),
            kappa_BHL=last(row.kappa_BLH),
            before=before,
            weights=self.pack_weights(row.weights),
        )

    def of_group(self, block):
        """Return which of the blocks that see its group a block is."""
        return block if self.blocks_a_group == self.blocks else lax.rem(block, self.blocks_a_group)

    def group_of(self, head: int) -> int:
        """Return which of the block's groups its head (of J) reads."""
        return head // self.heads_a_group

    def heads_of(self, pack: int) -> range:
        """Return the block's heads of a pack."""
        return range(pack * self.pack, (pack + 1) * self.pack)

    def lanes_of_pack(self, pack: int) -> slice:
        """Return where in the block's lanes a pack's values are."""
        return slice(pack * self.lanes, (pack + 1) * self.lanes)

    def lanes_of(self, group: int, rank: int) -> slice:
        """Return where in the block's lanes the queries of a group are."""
        begin = (group * self.rank + rank) * self.d_state
        return slice(begin, begin + self.d_state)

    def intermediates(self) -> int:
        """Estimate the bytes that the compiler holds of a chunk: Q x Q a head of the block, T x T and T x N of a pack.

        The estimate adds a quarter, for what the compiler for v4 takes, or a half where products take three pieces of
        each operand.
        """
        if self.backwards:
            of_tokens, of_rows, columns = 2 + self.heads, 2 + self.pack, 8 + 4 * self.pack
        else:
            of_tokens, of_rows, columns = self.heads, 2, 4 + 2 * self.pack
        held = of_tokens * self.tokens**2 + of_rows * self.rows**2 + columns * self.rows * self.d_state
        return held * (6 if self.dtype == jnp.float32 else 5)

    def call(self, kernel, name: str, refs, *, out, scratch):
        """Run `kernel(refs, out, scratch)`, all of them trees, over the grid; `out` are the shapes of the results.

        Raises:
            ValueError: more VMEM than there is.
        """
        specs, out_specs = (
            map_axes(functools.partial(self.spec, written=written), tree)
            for tree, written in ((refs, False), (out, True))
        )
        held = {"arrays": (refs, out), "specs": (specs, out_specs), "scratch": scratch}
        limit = vmem_limit(name, self.tiles, self.intermediates(), **held)
        (result,) = pl.pallas_call(
            kernel,
            grid=self.shape,
            in_specs=(specs,),
            out_specs=[out_specs],
            out_shape=[out],
            scratch_shapes=[scratch],
            name=name,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=limit
            ),
            cost_estimate=self._cost(refs, out),
            **({} if self.tiles.interpret is None else {"interpret": self.tiles.interpret}),
        )(refs)
        return result

    def _cost(self, refs, out) -> pl.CostEstimate:
        """Count every array once, the products of a kernel, and the triangle of the angles."""
        rows, d_state, width, arrays = self.rows, self.d_state, self.width, jax.tree.leaves((refs, out))
        pairs = None not in (refs.operands.q_BLY, refs.operands.k_BLY)  # of tokens
        times, states, of_angles = (3, 5, 5) if self.backwards and not self.only_states else (1, 1 + pairs, 3)
        of_rows = times * (d_state + width) * pairs
        products = rows * rows * of_rows + states * rows * d_state * width + of_angles * self.tokens**2 * self.pairs
        steps = self.batch * self.chunks * self.n_heads
        return pl.CostEstimate(
            flops=2 * steps * products,
            transcendentals=steps * (self.tokens**2 + rows * width),
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
        )
