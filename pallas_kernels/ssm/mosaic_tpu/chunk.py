"""What the forward and the backward kernel share: products, masks, decays, rotation, and the epilogue of a token."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ssm.angle import INVERSE_TURN
from pallas_kernels.ssm.contract import NORM_EPS
from pallas_kernels.ssm.mosaic_tpu.angle import increments, sincos_of
from pallas_kernels.ssm.mosaic_tpu.grid import Grid, PackedWeights
from pallas_kernels.ssm.operands import STEEPEST

NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def product(a, b, dimensions, grid: Grid, *, dtype=None):
    """Return a . b with float32 sums; operands are rounded to the dtype of the products first."""
    dtype = dtype or grid.dtype
    a, b = a.astype(dtype), b.astype(dtype)
    if grid.tiles.interpret is not None:  # not every CPU has this product of bfloat16
        a, b, dtype = a.astype(jnp.float32), b.astype(jnp.float32), jnp.float32
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def ranks(x, rank: int, axis: int = 0):
    """Repeat what is one number a token for every rank, one rank after another."""
    return x if rank == 1 else jnp.concatenate([x] * rank, axis)


def of_ranks(x, rank: int, axis: int = 0) -> list:
    """Return every rank's tokens of rows, or of columns (`axis` 1)."""
    tokens = x.shape[axis] // rank
    return [lax.slice_in_dim(x, r * tokens, (r + 1) * tokens, axis=axis) for r in range(rank)]


def over_ranks(x, rank: int, axis: int = 0):
    """Return the sum over the ranks of every token."""
    return sum(of_ranks(x, rank, axis))


def side_by_side(values: list, width: int):
    """Put each head's value in the head's `width` lanes of a pack: each is as wide as the pack, or a column."""
    picked = values[0]
    for head, value in enumerate(values[1:], 1):
        lane_1X = lax.broadcasted_iota(jnp.int32, (1, len(values) * width), 1)
        picked = jnp.where(lane_1X >= head * width, value, picked)
    return picked


def alone(x_YX, head: int, grid: Grid):
    """Set the lanes of the pack's other heads to 0, by a product: the compiler's simulation cannot do `where` here."""
    if grid.pack == 1:
        return x_YX
    head_1X = lax.div(lax.broadcasted_iota(jnp.int32, (1, grid.lanes), 1), grid.width)
    return x_YX * (head_1X == head).astype(jnp.float32)


def per_rank(x_QX, weight_RX):
    """Return every token times every rank's weight, (R Q, X)."""
    return jnp.concatenate([x_QX * weight_RX[r : r + 1] for r in range(weight_RX.shape[0])], axis=0)


class Masks(NamedTuple):
    """Masks over the tokens of a chunk; the same for all heads. Where documents do not start they are None."""

    within_QQ: jax.Array  # token s (across) is not after t and in its document
    diagonal_QQ: jax.Array
    continues_Q1: jax.Array | None  # no document starts in the chunk up to this token
    reaches_Q1: jax.Array | None  # no document starts later in the chunk: the token reaches its end
    continues_1Q: jax.Array | None
    reaches_1Q: jax.Array | None

    @classmethod
    def load(cls, document_BC1Q, grid: Grid):
        """Compute them from the document starts in the chunk up to each token."""
        shape = (grid.tokens, grid.tokens)
        t_QQ, s_QQ = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        masks = cls(**dict.fromkeys(cls._fields))._replace(within_QQ=t_QQ >= s_QQ, diagonal_QQ=t_QQ == s_QQ)
        if document_BC1Q is None:
            return masks
        document_1Q = document_BC1Q[...]
        document_Q1, last_11 = document_1Q.T, document_1Q[:, grid.tokens - 1 :]
        return masks._replace(
            within_QQ=masks.within_QQ & (document_Q1 == document_1Q),
            continues_Q1=document_Q1 == 0,
            reaches_Q1=document_Q1 == last_11,
            continues_1Q=document_1Q == 0,
            reaches_1Q=document_1Q == last_11,
        )


class Decay(NamedTuple):
    """The decay of a head in a chunk, and what a token weighs."""

    within_QQ: jax.Array  # e^(c_t - c_s), zero where s is after t or in another document
    from_start_Q1: jax.Array  # e^(c_t): of the state before the chunk
    to_end_Q1: jax.Array  # e^(c_T - c_s): in the state after it
    from_start_1Q: jax.Array
    to_end_1Q: jax.Array
    gamma_1Q: jax.Array | None  # the weight in a token's own output; None: as in later ones
    later_1Q: jax.Array  # the weight in later outputs
    later_Q1: jax.Array
    dt_1Q: jax.Array | None

    @classmethod
    def load(cls, scalars_XQ, masks: Masks, grid: Grid):
        """Compute it from the numbers of `load_numbers`."""
        columns_QX, places = scalars_XQ.T, {name: slice(x, x + 1) for x, name in enumerate(grid.scalars)}
        row = lambda name: scalars_XQ[places[name]]  # noqa: E731
        column = lambda name: columns_QX[:, places[name]]  # noqa: E731
        last = scalars_XQ.shape[1] - 1
        gap_QQ = column("c") - row("c")
        if "rest" in places:
            gap_QQ += column("rest") - row("rest")
        # The mask comes before exp: what lies after a token grows without bound.
        within_QQ = jnp.exp(jnp.where(masks.within_QQ, gap_QQ, -jnp.inf))

        def ends(of, continues, reaches):
            """Return both of `from_start` and `to_end`, as columns or rows."""
            from_start, to_end = of("c"), row("c")[:, last:] - of("c")
            if "rest" in places:
                from_start += of("rest")
                to_end += row("rest")[:, last:] - of("rest")
            from_start, to_end = jnp.exp(from_start), jnp.exp(jnp.minimum(to_end, 0.0))
            if reaches is None:
                return from_start, to_end
            return jnp.where(continues, from_start, 0.0), jnp.where(reaches, to_end, 0.0)

        from_start_Q1, to_end_Q1 = ends(column, masks.continues_Q1, masks.reaches_Q1)
        from_start_1Q, to_end_1Q = ends(row, masks.continues_1Q, masks.reaches_1Q)
        later = "kappa" if "kappa" in places else "gamma"
        return cls(
            within_QQ=within_QQ,
            from_start_Q1=from_start_Q1,
            to_end_Q1=to_end_Q1,
            from_start_1Q=from_start_1Q,
            to_end_1Q=to_end_1Q,
            gamma_1Q=row("gamma") if "kappa" in places else None,
            later_1Q=row(later),
            later_Q1=column(later),
            dt_1Q=row("dt") if "dt" in places else None,
        )

    def chunk_decay(self):
        """Return what the chunk leaves of the state before it, (1, 1)."""
        return self.from_start_Q1[self.from_start_Q1.shape[0] - 1 :]

    def at_end_1Q(self):
        """Return what a token weighs in the state after the chunk."""
        return self.to_end_1Q * self.later_1Q

    def weight_QQ(self, masks: Masks):
        """Return what token s (across) weighs in the output of t."""
        if self.gamma_1Q is None:
            return self.within_QQ * self.later_1Q
        return self.within_QQ * jnp.where(masks.diagonal_QQ, self.gamma_1Q, self.later_1Q)


class Rotation(NamedTuple):
    """Maps the rotary pairs (u, w) of a head to (u cos - w sin, u sin + w cos): u are the first rows of N, w those from
    N / 2 on. With N in the sublanes they are rows to take, tokens fill the lanes, and other entries cost nothing.
    """

    sin_ST: jax.Array
    cos_ST: jax.Array

    @classmethod
    def of_heads(cls, sin_XQ, cos_XQ, grid: Grid) -> list:
        """Return one for each head of a block, from the sines of all, one head after another."""
        by_head = lambda x_XQ: [ranks(x_SQ, grid.rank, 1) for x_SQ in jnp.split(x_XQ, grid.heads, axis=0)]  # noqa: E731
        return [cls(sin_ST=sin, cos_ST=cos) for sin, cos in zip(by_head(sin_XQ), by_head(cos_XQ), strict=True)]

    def apply(self, x_NT):
        return self._by(x_NT, self.sin_ST)

    def inverse(self, dx_NT):
        return self._by(dx_NT, -self.sin_ST)

    def _by(self, x_NT, sin_ST):
        u_ST, w_ST = self.pair(x_NT)
        pairs, half = u_ST.shape[0], x_NT.shape[0] // 2
        first, second = u_ST * self.cos_ST - w_ST * sin_ST, u_ST * sin_ST + w_ST * self.cos_ST
        if pairs == half:
            return jnp.concatenate([first, second], axis=0)
        return jnp.concatenate([first, x_NT[pairs:half], second, x_NT[half + pairs :]], axis=0)

    def pair(self, x_NT):
        """Return u and w."""
        pairs, half = self.sin_ST.shape[0], x_NT.shape[0] // 2
        return x_NT[:pairs], x_NT[half : half + pairs]


class Chunk(NamedTuple):
    """What a grid step, one chunk of a block of heads, knows of its tokens; lists have one entry a head."""

    block: jax.Array
    grid: Grid
    masks: Masks
    decays: list
    rotations: list  # of None where nothing rotates


def load(refs, scratch, block, grid: Grid) -> Chunk:
    """Load what heads share into `scratch` where the block is the first to need it, and compute a block's own."""
    _load_groups(refs, scratch, block, grid)
    _load_numbers(refs, scratch.scalars_HXQ, block, grid)
    masks = Masks.load(refs.constants.document_BC1Q, grid)
    numbers = [scratch.scalars_HXQ[block * grid.heads + head] for head in range(grid.heads)]
    decays = [Decay.load(scalars_XQ, masks, grid) for scalars_XQ in numbers]
    rotations = [None] * grid.heads
    if grid.pairs:
        rotations = Rotation.of_heads(*_sincos(refs, decays, masks, grid), grid)
    return Chunk(block=block, grid=grid, masks=masks, decays=decays, rotations=rotations)


def _load_groups(refs, scratch, block, grid: Grid) -> None:
    """Load queries and keys of every group of the block, float32: once a chunk for all blocks of a group."""

    @pl.when(grid.of_group(block) == 0)
    def _():
        for x_GNT, ref in ((scratch.q_GNT, refs.operands.q_BLY), (scratch.k_GNT, refs.operands.k_BLY)):
            if ref is None:
                continue
            for group in range(grid.groups_a_block):
                x_TN = jnp.concatenate([ref[:, grid.lanes_of(group, r)] for r in range(grid.rank)], axis=0)
                x_GNT[group] = inwards(x_TN, refs.constants.order_MN, grid)


def _load_numbers(refs, scalars_HXQ, block, grid: Grid) -> None:
    """Load `Grid.scalars`, dt, c, gamma, kappa and c's rest (where present), one head after another: once a chunk.

    c_t is the sum of log_a from the first token of the chunk, or of its document in it, to t. Differences of plain
    float32 sums would lose the digits of a gentle decay after steep ones. What lies on a grid adds up exactly, and for
    products of float32 the rest stays apart.
    """

    @pl.when(block == 0)
    def _():
        operands = refs.operands
        step = 2.0 ** (math.ceil(math.log2(-STEEPEST * grid.tokens)) - 24)
        log_a_HQ = jnp.maximum(operands.log_a_BHL[...], STEEPEST)
        exact_HQ = jnp.floor(log_a_HQ / step + 0.5) * step
        within_QQ = Masks.load(refs.constants.document_BC1Q, grid).within_QQ.astype(jnp.float32)
        parts = (exact_HQ, log_a_HQ - exact_HQ)
        exact_HQ, rest_HQ = (product(x, within_QQ, NT, grid, dtype=jnp.float32) for x in parts)
        apart = "rest" in grid.scalars
        c = {"c": exact_HQ, "rest": rest_HQ} if apart else {"c": exact_HQ + rest_HQ}
        given = {"dt": operands.dt_BHL, "gamma": operands.gamma_BHL, "kappa": operands.kappa_BHL}
        for x, name in enumerate(grid.scalars):
            number_HQ = c[name] if name in c else given[name][...]
            scalars_HXQ[:, x : x + 1] = number_HQ[:, None]


def angles(refs, grid: Grid):
    """Return the angles of the heads of a block, one head after another: (J S, Q)."""
    heads = [0] * grid.heads if grid.shared_angle else range(grid.heads)
    return jnp.concatenate([refs.operands.angle_BHSL[head] for head in heads], axis=0)


def dt_of_pairs(decays: list, grid: Grid):
    """Return the dt of every head, for each of its rotary pairs: (J S, Q)."""
    return jnp.concatenate([jnp.broadcast_to(decay.dt_1Q, (grid.pairs, grid.tokens)) for decay in decays], axis=0)


def _sincos(refs, decays: list, masks: Masks, grid: Grid):
    """Return sin and cos of phi_t = phi_0 + sum_{s <= t} angle_s dt_s, one head of a block after another: (J S, Q).

    Sums of numbers of 8 bits times zeros and ones are exact in bfloat16 products; modulo a turn nothing grows.
    """
    angle_XQ, dt_XQ = angles(refs, grid), dt_of_pairs(decays, grid)
    if grid.dtype == jnp.float32:
        exact_XQ, rest_XQ = increments(angle_XQ, dt_XQ, 2.0**-16)
    else:
        exact_XQ, rest_XQ = (angle_XQ * INVERSE_TURN) * dt_XQ, 0.0
    exact_XQ -= jnp.floor(exact_XQ + 0.5)
    high_XQ = jnp.floor(exact_XQ * 2.0**8 + 0.5) * 2.0**-8
    low_XQ = exact_XQ - high_XQ
    middle_XQ = jnp.floor(low_XQ * 2.0**16 + 0.5) * 2.0**-16
    pieces_XQ = jnp.concatenate([high_XQ, middle_XQ, (low_XQ - middle_XQ) + rest_XQ], axis=0)
    sums_XQ = product(pieces_XQ, masks.within_QQ.astype(jnp.float32), NT, grid, dtype=jnp.bfloat16)
    high_XQ, middle_XQ, rest_XQ = jnp.split(sums_XQ, 3, axis=0)
    start_XQ = jnp.broadcast_to(refs.constants.start_BCK1X[...].T, high_XQ.shape)
    if masks.continues_1Q is not None:
        start_XQ = jnp.where(masks.continues_1Q, start_XQ, 0.0)
    high_XQ = high_XQ - jnp.floor(high_XQ)
    return sincos_of(high_XQ + start_XQ, middle_XQ + rest_XQ)


def inwards(x_YN, order_MN, grid: Grid):
    """Put rows of N, as the op orders them, into columns of the kernels' N: (N, Y), float32.

    Exact, also as a product with ones and zeros: the matrix unit is idle, and what moves across lanes is not.
    """
    if order_MN is None:
        return x_YN.astype(jnp.float32).T
    return product(order_MN[...], x_YN, NT, grid, dtype=x_YN.dtype)


def outwards(x_NY, order_MN, grid: Grid):
    """Take back `inwards`: (Y, N), float32."""
    if order_MN is None:
        return x_NY.astype(jnp.float32).T
    return product(x_NY, order_MN[...], TN, grid, dtype=x_NY.dtype)


def load_states(h_WNX, ref, order_MN, *, block, grid: Grid) -> None:
    """Load the states that a block's heads begin with; zeros without a `ref`."""
    for pack in range(grid.packs):
        h_NX = jnp.zeros(h_WNX.shape[1:], jnp.float32)
        if ref is not None:
            h_XN = jnp.concatenate([ref[head] for head in grid.heads_of(pack)], axis=0)
            h_NX = inwards(h_XN, order_MN, grid)
        h_WNX[block * grid.packs + pack] = h_NX


def store_states(ref, h_WNX, order_MN, *, block, grid: Grid) -> None:
    """Take back `load_states`."""
    for pack in range(grid.packs):
        h_XN = outwards(h_WNX[block * grid.packs + pack], order_MN, grid)
        for place, head in enumerate(grid.heads_of(pack)):
            ref[head] = h_XN[place * grid.width : (place + 1) * grid.width]


def weighted(x_NT, weight_1Q, grid: Grid):
    """Return queries or keys, rounded as in other products, each times the weight of its token.

    Weights lie along the lanes here, where those of values would have to cross them.
    """
    if grid.dtype == jnp.bfloat16:  # Veltkamp's rounding: the compiler's simulation cannot do a cast there and back
        scaled_NT = x_NT * (2.0**16 + 1)
        x_NT = scaled_NT - (scaled_NT - x_NT)
    return x_NT * ranks(weight_1Q, grid.rank, 1)


def queries_and_keys(refs, scratch, chunk: Chunk, head: int):
    """Return a head's queries and keys, biased and rotated, (N, T), float32; None: not read."""
    group, weights = chunk.grid.group_of(head), refs.operands.weights
    sides = ((scratch.q_GNT, weights.q_bias_HRN), (scratch.k_GNT, weights.k_bias_HRN))
    return [None if x_GNT is None else _rotated(x_GNT[group], bias, chunk, head) for x_GNT, bias in sides]


def _rotated(x_NT, bias_HRN, chunk: Chunk, head: int):
    rank, rotation = chunk.grid.rank, chunk.rotations[head]
    if bias_HRN is not None:
        bias_NR = bias_HRN[head].T
        by_rank = [x_NQ + bias_NR[:, r : r + 1] for r, x_NQ in enumerate(of_ranks(x_NT, rank, 1))]
        x_NT = by_rank[0] if rank == 1 else jnp.concatenate(by_rank, axis=1)
    return x_NT if rotation is None else rotation.apply(x_NT)


def epilogue_weights(weights: PackedWeights, pack: int) -> PackedWeights:
    """Load what `epilogue` reads, of a pack of the block: arrays without the axis W of their names."""
    read = weights._replace(q_bias_HRN=None, k_bias_HRN=None, v_rank_WRX=None)
    return jax.tree.map(lambda ref: ref[pack], read)


def epilogue(y_TX, x_TX, gate_QX, weights: PackedWeights, *, grid: Grid):
    """Return o = sum over ranks of out_rank norm(y + D x) silu(gate gate_rank), (Q, X), of a pack of heads."""
    if weights.skip_WRX is not None:
        y_TX = y_TX + weights.skip_WRX * x_TX
    if weights.norm_WRX is not None:
        square_TX = y_TX * y_TX
        sums = [jnp.sum(alone(square_TX, head, grid), axis=1, keepdims=True) for head in range(grid.pack)]
        scales = [lax.rsqrt(sum_T1 / grid.given_width + NORM_EPS) for sum_T1 in sums]
        y_TX = y_TX * side_by_side(scales, grid.width) * weights.norm_WRX
    out_QX = 0.0
    for r, y_QX in enumerate(of_ranks(y_TX, grid.rank)):
        if gate_QX is not None:
            gated_QX = gate_QX if weights.gate_rank_WRX is None else gate_QX * weights.gate_rank_WRX[r : r + 1]
            y_QX = y_QX * (gated_QX * jax.nn.sigmoid(gated_QX))
        if weights.out_rank_WRX is not None:
            y_QX = y_QX * weights.out_rank_WRX[r : r + 1]
        out_QX = out_QX + y_QX
    return out_QX
