"""What the forward and the backward kernel share: products, masks, decays, rotation, and the end of a token."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ssm.angle import INVERSE_TURN
from pallas_kernels.ssm.contract import NORM_EPS
from pallas_kernels.ssm.mosaic_tpu.angle import increments, sincos_of
from pallas_kernels.ssm.mosaic_tpu.contract import Grid, Refs

NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def product(a, b, dimensions, grid: Grid, dtype=None):
    """a . b with float32 sums; operands are rounded to the dtype of the products first."""
    dtype = dtype or grid.dtype
    a, b = a.astype(dtype), b.astype(dtype)
    if grid.tiles.interpret is not None:  # not every CPU has this product of bfloat16
        a, b, dtype = a.astype(jnp.float32), b.astype(jnp.float32), jnp.float32
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def ranks(x, rank: int, axis: int = 0):
    """One number a token for every rank, one rank after another."""
    return x if rank == 1 else jnp.concatenate([x] * rank, axis)


def of_ranks(x, rank: int, axis: int = 0) -> list:
    """Every rank's tokens of rows, or of columns (`axis` 1)."""
    tokens = x.shape[axis] // rank
    return [lax.slice_in_dim(x, r * tokens, (r + 1) * tokens, axis=axis) for r in range(rank)]


def over_ranks(x, rank: int, axis: int = 0):
    """The sum over the ranks of every token."""
    return sum(of_ranks(x, rank, axis))


def side_by_side(values: list, width: int):
    """Every head's own of `values` in its `width` lanes of a pack: each as wide as the pack, or a column."""
    picked = values[0]
    for head, value in enumerate(values[1:], 1):
        lane_1X = lax.broadcasted_iota(jnp.int32, (1, len(values) * width), 1)
        picked = jnp.where(lane_1X >= head * width, value, picked)
    return picked


def alone(x_YX, head: int, grid: Grid):
    """Zeros in the lanes of the pack's other heads, where those are finite: simulation stops at products of `where`."""
    if grid.pack == 1:
        return x_YX
    head_1X = lax.div(lax.broadcasted_iota(jnp.int32, (1, grid.lanes), 1), grid.width)
    return x_YX * (head_1X == head).astype(jnp.float32)


def per_rank(x_QX, weight_RX):
    """(R Q, X): every token times every rank's weight."""
    return jnp.concatenate([x_QX * weight_RX[r : r + 1] for r in range(weight_RX.shape[0])], axis=0)


class Masks(NamedTuple):
    """Of the tokens of a chunk; the same for all heads."""

    within_QQ: jax.Array  # token s (across) is not after t and in its document
    own_QQ: jax.Array
    carried_Q1: jax.Array | None  # no document starts in the chunk up to here; None: none at all
    left_Q1: jax.Array | None  # no document starts later in the chunk
    carried_1Q: jax.Array | None
    left_1Q: jax.Array | None

    @classmethod
    def load(cls, refs: Refs, grid: Grid):
        shape = (grid.tokens, grid.tokens)
        t_QQ, s_QQ = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        if refs.document_BCQ is None:
            return cls(t_QQ >= s_QQ, t_QQ == s_QQ, *[None] * 4)
        document_1Q = refs.document_BCQ[...]
        document_Q1 = document_1Q.T
        within_QQ = (t_QQ >= s_QQ) & (document_Q1 == document_1Q)
        last_11 = document_1Q[:, grid.tokens - 1 :]
        columns, rows = ((x == 0, x == last_11) for x in (document_Q1, document_1Q))
        return cls(within_QQ, t_QQ == s_QQ, *columns, *rows)


class Decay(NamedTuple):
    """Of a head in a chunk, and what a token weighs."""

    within_QQ: jax.Array  # e^(c_t - c_s), zero where s is after t or in another document
    since_Q1: jax.Array  # e^(c_t): of the state before the chunk
    until_Q1: jax.Array  # e^(c_T - c_s): in the state after it
    gamma_1Q: jax.Array | None  # in its own output; None: as in later ones
    later_1Q: jax.Array  # and in later ones
    later_Q1: jax.Array
    dt_1Q: jax.Array | None

    @classmethod
    def load(cls, scalars_XQ, masks: Masks, grid: Grid):
        """From `load_numbers`."""
        columns_QX, places = scalars_XQ.T, {name: slice(x, x + 1) for x, name in enumerate(grid.scalars)}
        row = lambda name: scalars_XQ[places[name]]  # noqa: E731
        column = lambda name: columns_QX[:, places[name]]  # noqa: E731
        last = scalars_XQ.shape[1] - 1
        gap_QQ, until_Q1, since_Q1 = column("c") - row("c"), row("c")[:, last:] - column("c"), column("c")
        if "rest" in places:
            gap_QQ += column("rest") - row("rest")
            until_Q1 += row("rest")[:, last:] - column("rest")
            since_Q1 += column("rest")
        # Masked before exp: what lies after a token grows without bound.
        within_QQ = jnp.exp(jnp.where(masks.within_QQ, gap_QQ, -jnp.inf))
        since_Q1, until_Q1 = jnp.exp(since_Q1), jnp.exp(jnp.minimum(until_Q1, 0.0))
        if masks.left_Q1 is not None:
            since_Q1 = jnp.where(masks.carried_Q1, since_Q1, 0.0)
            until_Q1 = jnp.where(masks.left_Q1, until_Q1, 0.0)
        gamma_1Q, later = (row("gamma"), "kappa") if "kappa" in places else (None, "gamma")
        dt_1Q = row("dt") if "dt" in places else None
        return cls(within_QQ, since_Q1, until_Q1, gamma_1Q, row(later), column(later), dt_1Q)

    def whole(self):
        """(1, 1): what the chunk leaves of the state before it."""
        return self.since_Q1[self.since_Q1.shape[0] - 1 :]

    def weight_QQ(self, masks: Masks):
        if self.gamma_1Q is None:
            return self.within_QQ * self.later_1Q
        return self.within_QQ * jnp.where(masks.own_QQ, self.gamma_1Q, self.later_1Q)


class Turn(NamedTuple):
    """(u, w) -> (u cos - w sin, u sin + w cos) of the planes of a head: u the first rows of N, w those from N / 2 on.

    With N in the sublanes they are rows to take, tokens fill the lanes, and what does not turn costs nothing.
    """

    sin_ST: jax.Array
    cos_ST: jax.Array

    @classmethod
    def of_heads(cls, sin_XQ, cos_XQ, grid: Grid) -> list:
        """From those of all heads of a block, one head after another."""
        rows = [slice(head * grid.planes, (head + 1) * grid.planes) for head in range(grid.heads)]
        return [cls(*(ranks(x_XQ[of_head], grid.rank, 1) for x_XQ in (sin_XQ, cos_XQ))) for of_head in rows]

    def there(self, x_NT):
        return self._by(x_NT, self.sin_ST)

    def back(self, dx_NT):
        return self._by(dx_NT, -self.sin_ST)

    def _by(self, x_NT, sin_ST):
        u_ST, w_ST = self.pair(x_NT)
        planes, half = u_ST.shape[0], x_NT.shape[0] // 2
        turned = (u_ST * self.cos_ST - w_ST * sin_ST, u_ST * sin_ST + w_ST * self.cos_ST)
        if planes == half:
            return jnp.concatenate(turned, axis=0)
        return jnp.concatenate([turned[0], x_NT[planes:half], turned[1], x_NT[half + planes :]], axis=0)

    def pair(self, x_NT):
        """u and w."""
        planes, half = self.sin_ST.shape[0], x_NT.shape[0] // 2
        return x_NT[:planes], x_NT[half : half + planes]


STEEPEST = -104.0  # exp of it is 0 in float32, so a steeper log_a decays no more


def load_numbers(scalars_HXQ, refs: Refs, block, grid: Grid) -> None:
    """What there is of dt, c, gamma, kappa and, for float32, c's rest, into VMEM one head after another: once a chunk.

    c_t is the sum of log_a from the first token of the chunk, or of its document in it, to t. Differences of plain
    float32 sums would lose the digits of a gentle decay after steep ones. What lies on a grid adds up exactly, and for
    products of float32 the rest stays apart.
    """

    @pl.when(block == 0)
    def _():
        step = 2.0 ** (math.ceil(math.log2(-STEEPEST * grid.tokens)) - 24)
        log_a_HQ = jnp.maximum(refs.log_a_BHL[...], STEEPEST)
        exact_HQ = jnp.floor(log_a_HQ / step + 0.5) * step
        within_QQ = Masks.load(refs, grid).within_QQ.astype(jnp.float32)
        exact_HQ, rest_HQ = (product(x, within_QQ, NT, grid, jnp.float32) for x in (exact_HQ, log_a_HQ - exact_HQ))
        apart = "rest" in grid.scalars
        c = {"c": exact_HQ, "rest": rest_HQ} if apart else {"c": exact_HQ + rest_HQ}
        given = {"dt": refs.dt_BHL, "gamma": refs.gamma_BHL, "kappa": refs.kappa_BHL}
        for x, name in enumerate(grid.scalars):
            number_HQ = c[name] if name in c else given[name][...]
            scalars_HXQ[:, x : x + 1] = number_HQ[:, None]


def turns(refs: Refs, decays: list, masks: Masks, grid: Grid) -> list:
    """The `Turn` of every head of a block; None where nothing turns."""
    if not grid.planes:
        return [None] * grid.heads
    return Turn.of_heads(*sincos(refs, decays, masks, grid), grid)


def angles(refs: Refs, grid: Grid):
    """Those of the heads of a block, one head after another: (J S, Q)."""
    heads = [0] * grid.heads if grid.shared_angle else range(grid.heads)
    return jnp.concatenate([refs.angle_BHSL[head] for head in heads], axis=0)


def of_planes(of_heads: list, grid: Grid):
    """One row a head, (1, Q), for each of its planes: (J S, Q)."""
    return jnp.concatenate([jnp.broadcast_to(x_1Q, (grid.planes, grid.tokens)) for x_1Q in of_heads], axis=0)


def sincos(refs: Refs, decays: list, masks: Masks, grid: Grid):
    """sin and cos of phi_t = phi_0 + sum_{s <= t} angle_s dt_s for the heads of a block: (J S, Q), heads in turn.

    Sums of numbers of 8 bits times zeros and ones are exact in bfloat16 products; modulo a turn nothing grows.
    """
    angle_XQ, dt_XQ = angles(refs, grid), of_planes([decay.dt_1Q for decay in decays], grid)
    if grid.dtype == jnp.float32:
        exact_XQ, rest_XQ = increments(angle_XQ, dt_XQ, 2.0**-16)
    else:
        exact_XQ, rest_XQ = (angle_XQ * INVERSE_TURN) * dt_XQ, 0.0
    exact_XQ -= jnp.floor(exact_XQ + 0.5)
    high_XQ = jnp.floor(exact_XQ * 2.0**8 + 0.5) * 2.0**-8
    low_XQ = exact_XQ - high_XQ
    middle_XQ = jnp.floor(low_XQ * 2.0**16 + 0.5) * 2.0**-16
    pieces_XQ = jnp.concatenate([high_XQ, middle_XQ, (low_XQ - middle_XQ) + rest_XQ], axis=0)
    sums_XQ = product(pieces_XQ, masks.within_QQ.astype(jnp.float32), NT, grid, jnp.bfloat16)
    high_XQ, middle_XQ, rest_XQ = jnp.split(sums_XQ, 3, axis=0)
    start_XQ = jnp.broadcast_to(refs.start_BCKX[...].T, high_XQ.shape)
    if masks.carried_1Q is not None:
        start_XQ = jnp.where(masks.carried_1Q, start_XQ, 0.0)
    high_XQ = high_XQ - jnp.floor(high_XQ)
    return sincos_of(high_XQ + start_XQ, middle_XQ + rest_XQ)


def inwards(x_YN, order_MN, grid: Grid):
    """Rows of N, as the op orders them, into columns of the kernels' N: (N, Y), float32.

    Exact, also as a product with ones and zeros: the matrix unit is idle, and what moves across lanes is not.
    """
    if order_MN is None:
        return x_YN.astype(jnp.float32).T
    return product(order_MN[...], x_YN, NT, grid, x_YN.dtype)


def outwards(x_NY, order_MN, grid: Grid):
    """Back from `inwards`: (Y, N), float32."""
    if order_MN is None:
        return x_NY.astype(jnp.float32).T
    return product(x_NY, order_MN[...], TN, grid, x_NY.dtype)


def load_states(h_WNX, ref, block, order_MN, grid: Grid) -> None:
    """What a block's heads begin with, into VMEM: zeros without a `ref`."""
    for pack in range(grid.packs):
        h_NX = jnp.zeros(h_WNX.shape[1:], jnp.float32)
        if ref is not None:
            h_XN = jnp.concatenate([ref[head] for head in grid.heads_of(pack)], axis=0)
            h_NX = inwards(h_XN, order_MN, grid)
        h_WNX[block * grid.packs + pack] = h_NX


def store_states(ref, h_WNX, block, order_MN, grid: Grid) -> None:
    """Back from `load_states`."""
    for pack in range(grid.packs):
        h_XN = outwards(h_WNX[block * grid.packs + pack], order_MN, grid)
        for place, head in enumerate(grid.heads_of(pack)):
            ref[head] = h_XN[place * grid.width : (place + 1) * grid.width]


def load_groups(q_GNT, k_GNT, refs: Refs, block, grid: Grid) -> None:
    """Queries and keys of every group of the block, float32, into VMEM: once a chunk for all blocks of a group."""

    @pl.when(grid.of_group(block) == 0)
    def _():
        for x_GNT, ref in ((q_GNT, refs.q_BLX), (k_GNT, refs.k_BLX)):
            for group in range(grid.groups_a_block):
                x_TN = jnp.concatenate([ref[:, grid.lanes_of(group, r)] for r in range(grid.rank)], axis=0)
                x_GNT[group] = inwards(x_TN, refs.order_MN, grid)


def turned(x_NT, bias_HRN, head: int, turn: Turn | None, grid: Grid):
    """A head's queries or keys, biased and turned where there is a bias and a turn: (N, T), for products."""
    if bias_HRN is not None:
        bias_NR = bias_HRN[head].T
        by_rank = [x_NQ + bias_NR[:, r : r + 1] for r, x_NQ in enumerate(of_ranks(x_NT, grid.rank, 1))]
        x_NT = by_rank[0] if grid.rank == 1 else jnp.concatenate(by_rank, axis=1)
    return (x_NT if turn is None else turn.there(x_NT)).astype(grid.dtype)


class Ends(NamedTuple):
    """The weights of `finish`, of a pack of heads."""

    skip_1X: jax.Array | None
    gate_rank_RX: jax.Array | None
    out_rank_RX: jax.Array | None
    norm_1X: jax.Array | None

    @classmethod
    def load(cls, refs: Refs, pack: int):
        fields = (refs.skip_WRX, refs.gate_rank_WRX, refs.out_rank_WRX, refs.norm_WRX)
        return cls(*(None if ref is None else ref[pack] for ref in fields))


def finish(y_TX, x_TX, gate_QX, ends: Ends, grid: Grid):
    """o = sum over ranks of out_rank norm(y + D x) silu(gate gate_rank), (Q, X), of a pack of heads."""
    if ends.skip_1X is not None:
        y_TX = y_TX + ends.skip_1X * x_TX
    if ends.norm_1X is not None:
        square_TX = y_TX * y_TX
        sums = [jnp.sum(alone(square_TX, head, grid), axis=1, keepdims=True) for head in range(grid.pack)]
        scales = [lax.rsqrt(sum_T1 / grid.own_width + NORM_EPS) for sum_T1 in sums]
        y_TX = y_TX * side_by_side(scales, grid.width) * ends.norm_1X
    out_QX = 0.0
    for r, y_QX in enumerate(of_ranks(y_TX, grid.rank)):
        if gate_QX is not None:
            gated_QX = gate_QX if ends.gate_rank_RX is None else gate_QX * ends.gate_rank_RX[r : r + 1]
            y_QX = y_QX * (gated_QX * jax.nn.sigmoid(gated_QX))
        if ends.out_rank_RX is not None:
            y_QX = y_QX * ends.out_rank_RX[r : r + 1]
        out_QX = out_QX + y_QX
    return out_QX
