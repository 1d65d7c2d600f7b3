"""What the forward and the backward kernel share: products, masks, decays, rotation, and the end of a token."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.mosaic_tpu.angle import INVERSE_TURN, increments, sincos_of
from pallas_kernels.ssm.mosaic_tpu.contract import Grid, Refs

NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
NORM_EPS = 1e-5


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


def over_ranks(x_TX, rank: int):
    """The sum over the ranks of every token."""
    tokens = x_TX.shape[0] // rank
    return sum(x_TX[r * tokens : (r + 1) * tokens] for r in range(rank))


def per_rank(x_QX, weight_RX):
    """(R Q, X): every token times every rank's weight."""
    return jnp.concatenate([x_QX * weight_RX[r : r + 1] for r in range(weight_RX.shape[0])], axis=0)


class Masks(NamedTuple):
    """Of the tokens of a chunk; the same for all heads."""

    within_QQ: jax.Array  # token s (across) is not after t and in its document
    own_QQ: jax.Array
    carried_Q1: jax.Array | None  # no document starts in the chunk up to here; None: none at all
    left_Q1: jax.Array | None  # no document starts later in the chunk

    @classmethod
    def load(cls, refs: Refs, grid: Grid):
        shape = (grid.tokens, grid.tokens)
        t_QQ, s_QQ = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        if refs.document_BCQ is None:
            return cls(t_QQ >= s_QQ, t_QQ == s_QQ, None, None)
        document_1Q = refs.document_BCQ[...]
        document_Q1 = document_1Q.T
        within_QQ = (t_QQ >= s_QQ) & (document_Q1 == document_1Q)
        return cls(within_QQ, t_QQ == s_QQ, document_Q1 == 0, document_Q1 == document_1Q[:, grid.tokens - 1 :])


class Decay(NamedTuple):
    """Of a head in a chunk, and what a token weighs."""

    within_QQ: jax.Array  # e^(c_t - c_s), zero where s is after t or in another document
    since_Q1: jax.Array  # e^(c_t): of the state before the chunk
    until_Q1: jax.Array  # e^(c_T - c_s): in the state after it
    gamma_1Q: jax.Array
    kappa_1Q: jax.Array
    kappa_Q1: jax.Array
    dt_Q1: jax.Array

    @classmethod
    def load(cls, scalars_XQ, masks: Masks):
        """From `load_numbers`."""
        columns_QX = scalars_XQ.T
        row = lambda x: scalars_XQ[x : x + 1]  # noqa: E731
        column = lambda x: columns_QX[:, x : x + 1]  # noqa: E731
        last = scalars_XQ.shape[1] - 1
        gap_QQ, until_Q1, since_Q1 = column(1) - row(1), row(1)[:, last:] - column(1), column(1)
        if scalars_XQ.shape[0] > 4:
            gap_QQ += column(4) - row(4)
            until_Q1 += row(4)[:, last:] - column(4)
            since_Q1 += column(4)
        # Masked before exp: what lies after a token grows without bound.
        within_QQ = jnp.exp(jnp.where(masks.within_QQ, gap_QQ, -jnp.inf))
        since_Q1, until_Q1 = jnp.exp(since_Q1), jnp.exp(jnp.minimum(until_Q1, 0.0))
        if masks.left_Q1 is not None:
            since_Q1 = jnp.where(masks.carried_Q1, since_Q1, 0.0)
            until_Q1 = jnp.where(masks.left_Q1, until_Q1, 0.0)
        return cls(within_QQ, since_Q1, until_Q1, row(2), row(3), column(3), column(0))

    def whole(self):
        """(1, 1): what the chunk leaves of the state before it."""
        return self.since_Q1[self.since_Q1.shape[0] - 1 :]

    def weight_QQ(self, masks: Masks):
        return self.within_QQ * jnp.where(masks.own_QQ, self.gamma_1Q, self.kappa_1Q)


class Turn(NamedTuple):
    """(u, w) -> (u cos - w sin, u sin + w cos) of the planes of a head: rows of Q tokens."""

    sin_QN: jax.Array  # -sin, sin
    cos_QN: jax.Array

    @classmethod
    def of_heads(cls, sin_QX, cos_QX, grid: Grid) -> list:
        """From those of all heads of a block, one head after another."""
        lane_1N = lax.broadcasted_iota(jnp.int32, (1, grid.d_state), 1)
        low_1N = lane_1N < grid.half
        turns = []
        for begin in range(0, sin_QX.shape[1], grid.d_state):
            if sin_QX.shape[1] - begin < grid.d_state:  # one head is left
                sin_QN, cos_QN = (jnp.concatenate([x_QX[:, begin:]] * 2, axis=1) for x_QX in (sin_QX, cos_QX))
                turns.append(cls(jnp.where(low_1N, -sin_QN, sin_QN), cos_QN))
                continue
            sin_QN, cos_QN = (x_QX[:, begin : begin + grid.d_state] for x_QX in (sin_QX, cos_QX))  # of two heads
            sin_there_QN, cos_there_QN = partner(sin_QN), partner(cos_QN)
            turns.append(cls(jnp.where(low_1N, -sin_QN, sin_there_QN), jnp.where(low_1N, cos_QN, cos_there_QN)))
            turns.append(cls(jnp.where(low_1N, -sin_there_QN, sin_QN), jnp.where(low_1N, cos_there_QN, cos_QN)))
        return turns

    def there(self, x_QN):
        return x_QN * self.cos_QN + partner(x_QN) * self.sin_QN

    def back(self, dx_QN):
        return dx_QN * self.cos_QN - partner(dx_QN) * self.sin_QN


def partner(x_QN):
    """The other entry of every entry's plane."""
    return pltpu.roll(x_QN, x_QN.shape[1] // 2, 1)


STEEPEST = -104.0  # exp of it is 0 in float32, so a steeper log_a decays no more


def load_numbers(scalars_HXQ, refs: Refs, block, grid: Grid) -> None:
    """dt, c, gamma, kappa and, for float32, c's rest, into VMEM one head after another: once a chunk.

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
        apart = grid.dtype == jnp.float32
        c = [exact_HQ, rest_HQ] if apart else [exact_HQ + rest_HQ]
        numbers = [refs.dt_BHL[...], c[0], refs.gamma_BHL[...], refs.kappa_BHL[...], *c[1:]]
        for x, number_HQ in enumerate(numbers):
            scalars_HXQ[:, x : x + 1] = number_HQ[:, None]


def load_angles(angle_QX, refs: Refs, block, grid: Grid) -> None:
    """The angles of the heads of a block, (Q, J N/2), into VMEM: those that heads share once a chunk."""

    @pl.when((block == 0) | (not grid.shared_angle))
    def _():
        still_XQ = jnp.zeros((grid.half - grid.planes, grid.tokens), jnp.float32)
        heads = [0] * grid.heads if grid.shared_angle else range(grid.heads)
        rows = [x for head in heads for x in (refs.angle_BHSL[head], still_XQ) if x.shape[0]]
        angle_QX[...] = jnp.concatenate(rows, axis=0).T


def sincos(angle_QX, refs: Refs, dt_QJ, masks: Masks, grid: Grid):
    """sin and cos of phi_t = phi_0 + sum_{s <= t} angle_s dt_s for the heads of a block: (Q, J N/2), heads in turn.

    Sums of numbers of 8 bits times zeros and ones are exact in bfloat16 products; modulo a turn nothing grows.
    """
    dt_QX = jnp.concatenate([jnp.broadcast_to(dt_Q1, (grid.tokens, grid.half)) for dt_Q1 in dt_QJ], axis=1)
    if grid.dtype == jnp.float32:
        exact_QX, rest_QX = increments(angle_QX, dt_QX, 2.0**-16)
    else:
        exact_QX, rest_QX = (angle_QX * INVERSE_TURN) * dt_QX, 0.0
    exact_QX -= jnp.floor(exact_QX + 0.5)
    high_QX = jnp.floor(exact_QX * 2.0**8 + 0.5) * 2.0**-8
    low_QX = exact_QX - high_QX
    middle_QX = jnp.floor(low_QX * 2.0**16 + 0.5) * 2.0**-16
    pieces_QX = jnp.concatenate([high_QX, middle_QX, (low_QX - middle_QX) + rest_QX], axis=1)
    sums_QX = product(masks.within_QQ.astype(jnp.float32), pieces_QX, NN, grid, jnp.bfloat16)
    high_QX, middle_QX, rest_QX = jnp.split(sums_QX, 3, axis=1)
    start_1X = refs.start_BCKX[...]
    start_QX = jnp.broadcast_to(start_1X, high_QX.shape)
    if masks.carried_Q1 is not None:
        start_QX = jnp.where(masks.carried_Q1, start_QX, 0.0)
    high_QX = high_QX - jnp.floor(high_QX)
    return sincos_of(high_QX + start_QX, middle_QX + rest_QX)


def ordered(x_XN, order_NM, grid: Grid, dimensions=NN):
    """Into the kernels' order of N, float32; NT: out of it. Exact, as a product with ones and zeros."""
    if order_NM is None:
        return x_XN.astype(jnp.float32)
    return product(x_XN, order_NM[...], dimensions, grid, x_XN.dtype)


def load_states(h_HPN, first, ref, order_NM, grid: Grid) -> None:
    """What a block's heads, from `first` on, begin with, into VMEM: zeros without a `ref`."""
    none_PN = jnp.zeros(h_HPN.shape[1:], jnp.float32)
    for head in range(grid.heads):
        h_HPN[first + head] = none_PN if ref is None else ordered(ref[head], order_NM, grid)


def rows_of_groups(ref, order_NM, grid: Grid):
    """Queries or keys of every group of the block and every rank, (Q, N), float32."""
    lanes = ((grid.lanes_of(group, r) for r in range(grid.rank)) for group in range(grid.groups_a_block))
    return [[ordered(ref[:, each], order_NM, grid) for each in ranks_] for ranks_ in lanes]


def turned(x_RQN, bias_RN, turn: Turn):
    """(T, N), float32."""
    return jnp.concatenate([turn.there(x_QN + bias_RN[r : r + 1]) for r, x_QN in enumerate(x_RQN)], axis=0)


class Ends(NamedTuple):
    """The weights of `finish`, of a head."""

    skip_1P: jax.Array | None
    gate_rank_RP: jax.Array | None
    out_rank_RP: jax.Array | None
    norm_1P: jax.Array | None

    @classmethod
    def load(cls, refs: Refs, head: int):
        fields = (refs.skip_HRP, refs.gate_rank_HRP, refs.out_rank_HRP, refs.norm_HRP)
        return cls(*(None if ref is None else ref[head] for ref in fields))


def finish(y_TP, x_TP, gate_QP, ends: Ends, rank: int, width: int):
    """o = sum over ranks of out_rank norm(y + D x) silu(gate gate_rank), (Q, P); `width` of P are no padding."""
    tokens = y_TP.shape[0] // rank
    if ends.skip_1P is not None:
        y_TP = y_TP + ends.skip_1P * x_TP
    if ends.norm_1P is not None:
        mean_square_T1 = jnp.sum(y_TP * y_TP, axis=1, keepdims=True) / width
        y_TP = y_TP * lax.rsqrt(mean_square_T1 + NORM_EPS) * ends.norm_1P
    out_QP = 0.0
    for r in range(rank):
        y_QP = y_TP[r * tokens : (r + 1) * tokens]
        if gate_QP is not None:
            gated_QP = gate_QP if ends.gate_rank_RP is None else gate_QP * ends.gate_rank_RP[r : r + 1]
            y_QP = y_QP * (gated_QP * jax.nn.sigmoid(gated_QP))
        if ends.out_rank_RP is not None:
            y_QP = y_QP * ends.out_rank_RP[r : r + 1]
        out_QP = out_QP + y_QP
    return out_QP
