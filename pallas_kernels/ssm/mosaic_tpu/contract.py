"""What the scan reads and how it is cut.

A grid step is one chunk of a block of J heads; heads run fastest, so that what they share (queries, keys, angles) is
fetched once a chunk, and the state of all heads waits in VMEM. A chunk has Q tokens and T = R Q rows: **ranks outer,
tokens inner**, so that a rank is a slice of rows and what is one number a token is repeated by concatenation.
Queries and keys are turned as columns of N, (N, T); the values of a **pack** of heads lie side by side in X of the 128
lanes, and so do their states, (N, X).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MIB = 2**20


@dataclass(frozen=True)
class Tiles:
    """How the kernels are cut. Performance only."""

    tokens: int = 128  # of a chunk, Q: a multiple of 16
    heads: int | None = None  # a grid step, J; None: left to the shapes
    width: int | None = None  # entries of P that are not padding; None: all
    vmem: int = 56  # MiB that the kernels may take
    interpret: object = None  # pltpu's InterpretParams: on the CPU, for tests


class Inputs(NamedTuple):
    """Whole chunks, L = C Q. N a multiple of 128: inside, plane i is (i, i + N/2), what does not turn has angle 0.

    q, k and the states may have N in another order, see `mamba3`; biases have the kernels'. q, k, v and gate in the
    dtype of the products, all else float32.
    """

    q_BLGRN: jax.Array
    k_BLGRN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    angle_BLHS: jax.Array | None  # radians per unit dt, S <= N/2, a multiple of 8; the H axis is 1 where heads share it
    dt_BLH: jax.Array | None  # None, as the angle: nothing turns
    log_a_BLH: jax.Array  # log of a token's decay
    gamma_BLH: jax.Array  # a token's weight in its own output
    kappa_BLH: jax.Array | None  # and in later ones; None: gamma
    first_BHS: jax.Array | None  # radians: the angle before the row; None: 0
    h_BHPN: jax.Array | None  # the state before it; None: 0
    q_bias_HRN: jax.Array | None
    k_bias_HRN: jax.Array | None
    skip_HP: jax.Array | None  # the same for all of P
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


class Rest(NamedTuple):
    """What both kernels read beside `Inputs`, and has no gradient."""

    start_BCHS: jax.Array | None  # the angle before every chunk, in turns; None: nothing turns
    document_BL: jax.Array | None  # document starts in the chunk up to each token
    order_MN: jax.Array | None  # a one where in the kernels an entry of N goes; None: where it is


class Refs(NamedTuple):
    """What the kernels see: `Inputs` with trailing axes joined, or (L) with tokens last, see `tokens_last`."""

    q_BLX: jax.Array
    k_BLX: jax.Array
    v_BLX: jax.Array
    gate_BLX: jax.Array | None
    angle_BHSL: jax.Array | None
    dt_BHL: jax.Array | None
    log_a_BHL: jax.Array
    gamma_BHL: jax.Array
    kappa_BHL: jax.Array | None
    start_BCKX: jax.Array | None  # turns: the angle before every chunk; K blocks of heads, (.., 1, J S)
    document_BCQ: jax.Array | None  # float32, document starts in the chunk up to here; (.., 1, Q)
    order_MN: jax.Array | None
    h_BHPN: jax.Array | None  # before the row, None: 0; the backward pass: before every chunk, (B, C, W, N, X)
    q_bias_HRN: jax.Array | None
    k_bias_HRN: jax.Array | None
    skip_WRX: jax.Array | None  # W packs of heads, each (R, X)
    v_rank_WRX: jax.Array | None
    gate_rank_WRX: jax.Array | None
    out_rank_WRX: jax.Array | None
    norm_WRX: jax.Array | None

    def weights(self) -> dict:
        """Those that there are, by name."""
        names = (*OF_HEADS, *OF_PACKS)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


# Weights in `Refs`, and what they are in `Inputs`.
OF_HEADS = {"q_bias_HRN": "q_bias_HRN", "k_bias_HRN": "k_bias_HRN"}
OF_PACKS = {
    "skip_WRX": "skip_HP",
    "v_rank_WRX": "v_rank_HRP",
    "gate_rank_WRX": "gate_rank_HRP",
    "out_rank_WRX": "out_rank_HRP",
    "norm_WRX": "norm_HP",
}


def tokens_last(x_BL, tokens: int):
    """(B, .., L), no copy of what XLA for TPU keeps so. Where Q is no multiple of 128 lanes, (B, C, .., Q)."""
    if x_BL is None:
        return None
    last = jnp.moveaxis(x_BL, 1, -1)
    if tokens % LANES == 0:
        return last
    return jnp.moveaxis(last.reshape(*last.shape[:-1], -1, tokens), -2, 1)


def tokens_second(x, tokens: int):
    """Back from `tokens_last`."""
    if x is None:
        return None
    if tokens % LANES:
        x = jnp.moveaxis(x, 1, -2)
        x = x.reshape(*x.shape[:-2], -1)
    return jnp.moveaxis(x, -1, 1)


def chunk_of(sizes: tuple[int, ...], tokens: int, index):
    """The block of a chunk of `tokens_last`, its index of the grid's: (b, c, those of `sizes`)."""

    def moved(*steps):
        b, c, others = index(*steps)
        return (b, *others, c) if tokens % LANES == 0 else (b, c, *others, 0)

    return pl.BlockSpec((None, *sizes, tokens) if tokens % LANES == 0 else (None, None, *sizes, tokens), moved)


class Grid:
    """Sizes, and the block of every array that one grid step sees.

    Raises:
        ValueError: sizes that the kernels cannot run.
    """

    def __init__(self, inputs: Inputs, tiles: Tiles, *, backwards: bool = False):
        self.batch, self.length, self.groups, self.rank, self.d_state = inputs.q_BLGRN.shape
        self.n_heads, self.width = inputs.v_BLHP.shape[2:]
        self.tiles, self.backwards, self.dtype = tiles, backwards, inputs.q_BLGRN.dtype
        self.tokens, self.heads = tiles.tokens, tiles.heads
        self.planes, self.shared_angle = 0, False
        if inputs.angle_BLHS is not None:
            self.planes, self.shared_angle = inputs.angle_BLHS.shape[3], inputs.angle_BLHS.shape[2] == 1
        there = {"dt": self.planes > 0, "c": True, "gamma": True, "kappa": inputs.kappa_BLH is not None}
        there["rest"] = self.dtype == jnp.float32
        self.scalars = [name for name, present in there.items() if present]  # see `parts.load_numbers`
        self.rows = self.rank * self.tokens
        _check(self)
        # Heads of a pack, packs of a block, lanes of a pack.
        self.pack = next(
            n for n in range(self.heads, 0, -1) if self.heads % n == 0 and (n == 1 or n * self.width <= LANES)
        )
        self.packs, self.lanes = self.heads // self.pack, self.pack * self.width
        self.chunks, self.blocks = self.length // self.tokens, self.n_heads // self.heads
        a_group = self.n_heads // self.groups
        self.blocks_a_group = max(1, a_group // self.heads)  # grid steps that see the same group
        self.groups_a_block = max(1, self.heads // a_group)
        self.heads_a_group = a_group
        self.shape = (self.batch, self.chunks, self.blocks)
        self.last = self.chunks - 1

    def _spec(self, block, index):
        if self.backwards:
            return pl.BlockSpec(block, lambda b, step, j: index(b, self.last - step, j))
        return pl.BlockSpec(block, index)

    def _tokens_last(self, *sizes: int, index):
        return chunk_of(sizes, self.tokens, lambda b, c, j: (b, self.last - c if self.backwards else c, index(j)))

    def of_groups(self):
        """q, k: (B, L, G R N)."""
        lanes = self.groups_a_block * self.rank * self.d_state
        return self._spec((None, self.tokens, lanes), lambda b, c, j: (b, c, lax.div(j, self.blocks_a_group)))

    def of_heads(self):
        """v, gate, output: (B, L, H P)."""
        return self._spec((None, self.tokens, self.heads * self.width), lambda b, c, j: (b, c, j))

    def of_angles(self):
        shared = self.shared_angle
        return self._tokens_last(1 if shared else self.heads, self.planes, index=lambda j: (0 if shared else j, 0))

    def of_numbers(self):
        """dt and others: those of all heads, fetched once a chunk."""
        return self._tokens_last(self.n_heads, index=lambda j: (0,))

    def of_order(self):
        return pl.BlockSpec((self.d_state, self.d_state), lambda b, c, j: (0, 0))

    def of_starts(self):
        return self._spec((None, None, None, 1, self.heads * self.planes), lambda b, c, j: (b, c, j, 0, 0))

    def of_documents(self):
        return self._spec((None, None, 1, self.tokens), lambda b, c, j: (b, c, 0, 0))

    def of_states(self):
        """Of every chunk: (B, C, W, N, X)."""
        return self._spec((None, None, self.packs, self.d_state, self.lanes), lambda b, c, j: (b, c, j, 0, 0))

    def before(self, heads: int | None, *sizes: int):
        """(B, H, ..): read in the first steps of a row; later ones stay at the last block, which costs nothing.

        `heads` of a block; None: (B, K, ..).
        """
        zeros, last = (0,) * len(sizes), self.blocks - 1
        return pl.BlockSpec((None, heads, *sizes), lambda b, step, j: (b, jnp.where(step == 0, j, last), *zeros))

    def after(self, heads: int | None, *sizes: int):
        """(B, H, ..): written in the last steps of a row; earlier ones stay at the first block."""
        zeros = (0,) * len(sizes)
        return pl.BlockSpec((None, heads, *sizes), lambda b, step, j: (b, jnp.where(step == self.last, j, 0), *zeros))

    def of_weights(self, array_XRX):
        """Of heads, or of packs."""
        if array_XRX is None:
            return None
        count, *sizes = array_XRX.shape
        return pl.BlockSpec((count // self.blocks, *sizes), lambda b, c, j: (j, 0, 0))

    def numbers(self):
        """VMEM for what is one number a token and head: `scalars`."""
        return pltpu.VMEM((self.n_heads, len(self.scalars), self.tokens), jnp.float32)

    def columns(self):
        """VMEM for queries or keys of a block's groups, or for their gradients."""
        return pltpu.VMEM((self.groups_a_block, self.d_state, self.rows), jnp.float32)

    def of_blocks(self, angle_HS):
        """(.., H, S) as (.., K, 1, J S)."""
        if angle_HS is None:
            return None
        return angle_HS.reshape(*angle_HS.shape[:-2], self.blocks, 1, self.heads * self.planes)

    def packed(self, array_HRP):
        """(H, R, P) as (W, R, X)."""
        if array_HRP is None:
            return None
        array_WHRP = array_HRP.reshape(-1, self.pack, *array_HRP.shape[1:])
        return jnp.swapaxes(array_WHRP, 1, 2).reshape(array_WHRP.shape[0], -1, self.lanes)

    def unpacked(self, array_WRX):
        """Back from `packed`."""
        array_WRHP = array_WRX.reshape(*array_WRX.shape[:2], self.pack, self.width)
        return jnp.swapaxes(array_WRHP, 1, 2).reshape(self.n_heads, -1, self.width)

    @property
    def own_width(self) -> int:
        """P without its padding."""
        return self.tiles.width or self.width

    def of_group(self, block):
        """Which of the blocks that see its group."""
        return block if self.blocks_a_group == self.blocks else lax.rem(block, self.blocks_a_group)

    def group_of(self, head: int) -> int:
        """Which of the block's groups its head (of J) reads."""
        return head // self.heads_a_group

    def heads_of(self, pack: int) -> range:
        """The block's heads of a pack."""
        return range(pack * self.pack, (pack + 1) * self.pack)

    def lanes_of_pack(self, pack: int) -> slice:
        """Where in the block's lanes a pack's values are."""
        return slice(pack * self.lanes, (pack + 1) * self.lanes)

    def lanes_of(self, group: int, rank: int) -> slice:
        """Where in the block's lanes the queries of a group are."""
        begin = (group * self.rank + rank) * self.d_state
        return slice(begin, begin + self.d_state)


def _check(grid: Grid) -> None:
    tokens, heads, n_heads, width = grid.tokens, grid.heads, grid.n_heads, grid.width
    if grid.length % tokens or grid.length == 0 or tokens % 16:
        raise ValueError(f"{grid.length=} is not a multiple of tiles.tokens={tokens}, a multiple of 16")
    if n_heads % grid.groups or n_heads % heads:
        raise ValueError(f"{n_heads=} is not a multiple of {grid.groups=} and tiles.heads={heads}")
    a_group = n_heads // grid.groups
    if a_group % heads and heads % a_group:
        raise ValueError(f"tiles.heads={heads} and the {a_group} heads of a group do not divide one another")
    if heads != n_heads and heads * width % LANES:
        raise ValueError(f"tiles.heads={heads} heads of P={width} are not a multiple of {LANES} lanes")
    if grid.d_state % LANES:
        raise ValueError(f"{grid.d_state=} is not a multiple of {LANES}")
    if grid.planes % 8 or 2 * grid.planes > grid.d_state:
        raise ValueError(f"{grid.planes=} is not a multiple of 8 up to {grid.d_state // 2}")
    if grid.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q is {grid.dtype}, wanted float32 or bfloat16")


def refs_of(inputs: Inputs, rest: Rest, grid: Grid, h) -> Refs:
    """`Refs` from `Inputs`."""
    batch, length, chunks = grid.batch, grid.length, grid.chunks
    flat = lambda array: None if array is None else array.reshape(batch, length, -1)  # noqa: E731
    one = lambda array: None if array is None else array[:, None]  # noqa: E731
    document_BCQ = None
    if rest.document_BL is not None:
        document_BCQ = rest.document_BL.astype(jnp.float32).reshape(batch, chunks, 1, grid.tokens)
    last = lambda array: tokens_last(array, grid.tokens)  # noqa: E731
    return Refs(
        q_BLX=flat(inputs.q_BLGRN),
        k_BLX=flat(inputs.k_BLGRN),
        v_BLX=flat(inputs.v_BLHP),
        gate_BLX=flat(inputs.gate_BLHP),
        angle_BHSL=last(inputs.angle_BLHS),
        dt_BHL=last(inputs.dt_BLH),
        log_a_BHL=last(inputs.log_a_BLH),
        gamma_BHL=last(inputs.gamma_BLH),
        kappa_BHL=last(inputs.kappa_BLH),
        start_BCKX=grid.of_blocks(rest.start_BCHS),
        document_BCQ=document_BCQ,
        order_MN=rest.order_MN,
        h_BHPN=h,
        q_bias_HRN=inputs.q_bias_HRN,
        k_bias_HRN=inputs.k_bias_HRN,
        skip_WRX=grid.packed(one(inputs.skip_HP)),
        v_rank_WRX=grid.packed(inputs.v_rank_HRP),
        gate_rank_WRX=grid.packed(inputs.gate_rank_HRP),
        out_rank_WRX=grid.packed(inputs.out_rank_HRP),
        norm_WRX=grid.packed(one(inputs.norm_HP)),
    )
