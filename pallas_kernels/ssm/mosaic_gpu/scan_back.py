"""The gradients of the chunked scan with its rotation, in Pallas Mosaic GPU.

Two passes: queries from the first chunk on, with the state h recomputed; keys and values from the last chunk on, with
the gradient dh of the state. With P_ts the decay e^(c_t - c_s) inside a chunk, S = q k^T, and x' = kappa x:

    dq_t = sum_{s <= t} weight_ts (dy_t . x_s) k_s  +  e^(c_t) h_0^T dy_t
    dk_s = sum_{t > s} P_ts (x'_s . dy_t) q_t  +  gamma_s (own token)  +  e^(c_T - c_s) dh^T x'_s
    dx_s = kappa_s dx'_s + gamma_s own_s + D dy_s,   dx'_s = sum_{t > s} P_ts S_ts dy_t  +  e^(c_T - c_s) dh k_s
    dkappa_s = x_s . dx'_s,   dgamma_s = x_s . own_s

Queries and keys are turned as they are read, their gradients turned back as they are stored; the angle of a plane
(u, w) gets dphi = dw u - du w, which does not depend on the frame. Sums over heads, and of dphi over later tokens, are
left to `sums_back`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.mosaic_gpu.registers import COLUMN, ROW, ROWS, TILE, joined, of_ranks, of_tokens
from pallas_kernels.ssm.mosaic_gpu.scan import WIDTH, Sizes, Tile
from pallas_kernels.ssm.mosaic_gpu.tiles import across, down, iota, load, product, product_into, products, tiled

ANCHOR = 256  # tokens between two states that are kept, for the sums of the decay's gradient to start from again
DECAY, SHIFTED, GAMMA, KAPPA, DOCUMENT = range(5)


class Inputs(NamedTuple):
    """As `scan.Inputs`; scalars: log2 decay, that less log2 kappa, gamma, kappa and, for packed rows, the document."""

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array | None
    v_BLHP: jax.Array | None
    dy_BLHRP: jax.Array
    phase_BHLS: jax.Array
    scalars_BHCXT: jax.Array
    h_BHSPN: jax.Array  # the state before every segment, or the gradient of the one after
    q_bias_HRN: jax.Array
    k_bias_HRN: jax.Array | None
    v_rank_HRP: jax.Array | None
    skip_H: jax.Array | None


class Query(NamedTuple):
    dq_BHLRN: jax.Array  # turned back
    dphi_BHLS: jax.Array
    received_BHCT: jax.Array  # q . dq of every row
    h_BHSAPN: jax.Array  # bfloat16, the state before every `anchor` chunks


class Key(NamedTuple):
    """And value. None but the state's: only what a segment asks of the state before it."""

    dk_BHLRN: jax.Array | None
    dphi_BHLS: jax.Array | None
    dv_BLHP: jax.Array | None
    drows_BHCXT: jax.Array | None  # of a row: dkappa, dgamma, the skip's, and k . dk, which it gives
    dv_rank_BHSTP: jax.Array | None
    dh_BHSAPN: jax.Array | None  # bfloat16, as `Query`, but for the first
    dh_BHSPN: jax.Array  # float32, of the state before every segment


class Shared(NamedTuple):
    q_TN: jax.Array  # as it comes
    k_TN: jax.Array | None
    turned_k_TN: jax.Array | None  # for `query` alone, and the gradient on its way out
    v_QP: jax.Array | None
    x_TP: jax.Array | None
    dy_TP: jax.Array
    weighted_TP: jax.Array | None
    phase_CQS: jax.Array
    scalars_CXT: jax.Array
    h_PN: jax.Array
    low_PN: jax.Array | None  # what is left of dh, rounded to bfloat16 in h
    dphi_TS: jax.Array | None
    rows_XT: jax.Array | None
    dv_rank_TP: jax.Array | None
    q_bias_RN: jax.Array
    k_bias_RN: jax.Array | None
    v_rank_RP: jax.Array | None


class Barriers(NamedTuple):
    q: jax.Array
    k: jax.Array
    values: jax.Array
    chunk: jax.Array  # phase, scalars: two chunks of `query`, one of `key`
    head: jax.Array


def _shared(refs: Inputs, sizes: Sizes, tile: Tile, *, query: bool) -> Shared:
    d_state, planes, ranked = sizes.d_state, sizes.planes, tile.rank > 1
    only_state = refs.k_BLRGN is None
    vectors = lambda ref, size: None if ref is None else plgpu.SMEM((ref.shape[1], size), jnp.float32)  # noqa: E731
    both = not only_state
    return Shared(
        tiled(ROWS, d_state),
        tiled(ROWS, d_state) if both else None,
        tiled(ROWS, d_state) if query else None,
        tiled(tile.tokens, WIDTH) if both else None,
        tiled(ROWS, WIDTH) if both and ranked else None,
        tiled(ROWS, WIDTH),
        tiled(ROWS, WIDTH) if query else None,
        tiled(1 + query, tile.tokens, planes, dtype=jnp.int16),
        plgpu.SMEM((1 + query, refs.scalars_BHCXT.shape[1], ROWS), jnp.float32),
        tiled(WIDTH, d_state),
        None if query or only_state else tiled(WIDTH, d_state),
        tiled(ROWS, planes) if ranked and both else None,
        None if only_state else plgpu.SMEM((1 if query else 4, ROWS), jnp.float32),
        None if query or only_state or not ranked else tiled(ROWS, WIDTH, dtype=jnp.float32),
        vectors(refs.q_bias_HRN, d_state),
        vectors(refs.k_bias_HRN, d_state),
        vectors(refs.v_rank_HRP, WIDTH),
    )


class Program:
    """Which part of the arrays one program works on, and its copies."""

    def __init__(self, refs: Inputs, shared: Shared, barriers: Barriers, sizes: Sizes, tile: Tile):
        self.refs, self.shared, self.barriers, self.sizes, self.tile = refs, shared, barriers, sizes, tile
        program = lax.axis_index("program")
        # Heads run fastest: neighbours read the same queries and keys.
        self.head = lax.rem(program, jnp.int32(sizes.heads))
        rest = lax.div(program, jnp.int32(sizes.heads))
        self.segment, self.batch = lax.rem(rest, jnp.int32(tile.segments)), lax.div(rest, jnp.int32(tile.segments))
        self.group = lax.div(self.head, jnp.int32(sizes.heads_a_group))
        self.row = self.batch * sizes.heads + self.head
        self.state = (self.batch, self.head, self.segment)
        self.interpret = tile.interpret is not None

    def chunk(self, index):
        return self.segment * self.sizes.chunks + index

    def chunk_of_row(self, index):
        return self.row * self.tile.segments * self.sizes.chunks + self.chunk(index)

    def tokens(self, index):
        return pl.ds(self.chunk(index) * self.tile.tokens, self.tile.tokens)

    def rows(self, rank: int):
        return pl.ds(rank * self.tile.tokens, self.tile.tokens)

    def load_head(self):
        for name in ("q_bias", "k_bias", "v_rank"):
            ref = getattr(self.refs, name + ("_HRP" if name == "v_rank" else "_HRN"))
            if ref is not None:
                to = getattr(self.shared, name + ("_RP" if name == "v_rank" else "_RN"))
                plgpu.copy_gmem_to_smem(ref.at[self.head], to, self.barriers.head)

    def _load_ranks(self, ref, to, index, barrier):
        for rank in range(self.tile.rank if ref is not None else 0):
            columns = pl.ds((rank * self.sizes.groups + self.group) * self.sizes.d_state, self.sizes.d_state)
            plgpu.copy_gmem_to_smem(ref.at[self.batch, self.tokens(index), columns], to.at[self.rows(rank)], barrier)

    def load_q(self, index):
        self._load_ranks(self.refs.q_BLRGN, self.shared.q_TN, index, self.barriers.q)

    def load_k(self, index):
        self._load_ranks(self.refs.k_BLRGN, self.shared.k_TN, index, self.barriers.k)

    def load_values(self, index):
        tokens, barrier = self.tokens(index), self.barriers.values
        if self.refs.v_BLHP is not None:
            v_QP = self.refs.v_BLHP.at[self.batch, tokens, pl.ds(self.head * WIDTH, WIDTH)]
            plgpu.copy_gmem_to_smem(v_QP, self.shared.v_QP, barrier)
        for rank in range(self.tile.rank):
            columns = pl.ds((self.head * self.tile.rank + rank) * WIDTH, WIDTH)
            dy_QP = self.refs.dy_BLHRP.at[self.batch, tokens, columns]
            plgpu.copy_gmem_to_smem(dy_QP, self.shared.dy_TP.at[self.rows(rank)], barrier)

    def load_chunk(self, index, slot):
        barrier = self.barriers.chunk.at[slot]
        phase_QS = self.refs.phase_BHLS.at[self.row, self.tokens(index)]
        plgpu.copy_gmem_to_smem(phase_QS, self.shared.phase_CQS.at[slot], barrier)
        scalars_XT = self.refs.scalars_BHCXT.at[self.chunk_of_row(index)]
        plgpu.copy_gmem_to_smem(scalars_XT, self.shared.scalars_CXT.at[slot], barrier)

    def keep(self, to_BHSAPN, index):
        """What h holds now, if it is before every `ANCHOR` tokens: of `to`, all of them or but the first."""
        anchor = ANCHOR // self.tile.tokens
        left_out = anchors(self.sizes, self.tile) - to_BHSAPN.shape[3]
        place = lax.div(index, jnp.int32(anchor)) - left_out

        @pl.when((lax.rem(index, jnp.int32(anchor)) == 0) & (place >= 0) & (index < self.sizes.chunks))
        def _():
            plgpu.copy_smem_to_gmem(self.shared.h_PN, to_BHSAPN.at[(*self.state, place)])

    def store_turned(self, from_TN, to_BHLX, index):
        """The gradient of q or k."""
        for rank in range(self.tile.rank):
            columns = pl.ds(rank * self.sizes.d_state, self.sizes.d_state)
            to_QN = to_BHLX.at[self.row, self.tokens(index), columns]
            plgpu.copy_smem_to_gmem(from_TN.at[self.rows(rank)], to_QN)

    def store_dphi(self, dphi_TS, to_BHLS, index):
        """Summed over ranks."""
        to_QS = to_BHLS.at[self.row, self.tokens(index)]
        if self.tile.rank == 1:
            to_QS[...] = dphi_TS.astype(jnp.bfloat16)
            return
        self.shared.dphi_TS[...] = dphi_TS.astype(jnp.bfloat16)
        sum_TS = self.over_ranks(self.shared.dphi_TS)
        self.shared.dphi_TS[...] = sum_TS.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.shared.dphi_TS.at[self.rows(0)], to_QS)

    def over_ranks(self, ref_TP):
        """Every row the sum of its token's: ranks are in different warps, so a product with ones adds them up."""
        plgpu.commit_smem()
        token_TT = [_token(iota(axis, self.interpret), self.tile) for axis in (0, 1)]
        ones_TT = jnp.where(token_TT[0] == token_TT[1], 1.0, 0.0).astype(jnp.bfloat16)
        sum_TP = product(ones_TT, ref_TP, ref_TP.shape[1], self.interpret)
        plgpu.commit_smem()
        return sum_TP


class Decay:
    """What the scalars of a chunk weigh. Vectors are loaded where they are used: they would fill the registers."""

    def __init__(self, scalars_XT, tile: Tile):
        self.scalars_XT, self.tile, self.interpret = scalars_XT, tile, tile.interpret is not None
        self.packed = scalars_XT.shape[0] == 5

    def rows(self, which: int):
        return load(self.scalars_XT.at[which], ROW, self.interpret)

    def columns(self, which: int):
        return load(self.scalars_XT.at[which], COLUMN, self.interpret)

    def last(self, which: int):
        return self.scalars_XT[which, ROWS - 1]

    def tokens(self):
        """Down and across."""
        return (_token(iota(axis, self.interpret), self.tile) for axis in (0, 1))

    def _together(self, before_TT):
        if not self.packed:
            return before_TT
        return before_TT & (down(self.rows(DOCUMENT), ROWS) == across(self.columns(DOCUMENT), ROWS))

    def weight_TT(self):
        """e^(c_t - c_s) kappa_s for targets t (down) after sources s, in a document; gamma_t where t = s."""
        target_TT, source_TT = self.tokens()
        gap_TT = down(self.rows(DECAY), ROWS) - across(self.columns(DECAY), ROWS)
        later_TT = jnp.exp2(gap_TT) * across(self.columns(KAPPA), ROWS)  # to the bit as `key` has it
        own_TT = jnp.where(target_TT == source_TT, across(self.columns(GAMMA), ROWS), 0.0)
        return jnp.where(self._together(target_TT > source_TT), later_TT, own_TT)

    def later_TT(self):
        """e^(c_t - c_s) for targets t (across) after sources s (down), in a document; 0 elsewhere."""
        source_TT, target_TT = self.tokens()
        gap_TT = across(self.columns(DECAY), ROWS) - down(self.rows(DECAY), ROWS)
        return jnp.where(self._together(target_TT > source_TT), jnp.exp2(gap_TT), 0.0)

    def own_TT(self):
        down_TT, across_TT = self.tokens()
        return down_TT == across_TT

    def since_T(self):
        """What is left at each row of the state before the chunk."""
        since_T = jnp.exp2(self.rows(DECAY))
        return jnp.where(self.rows(DOCUMENT) == 0.0, since_T, 0.0) if self.packed else since_T

    def until_T(self, which: int = DECAY):
        """What is left of each row at the end of the chunk; SHIFTED: times kappa."""
        until_T = jnp.exp2(self.last(DECAY) - self.rows(which))
        return jnp.where(self.rows(DOCUMENT) == self.last(DOCUMENT), until_T, 0.0) if self.packed else until_T

    def whole(self):
        """What is left at the end of the chunk of the state before it."""
        whole = jnp.exp2(self.last(DECAY))
        return jnp.where(self.last(DOCUMENT) == 0.0, whole, 0.0) if self.packed else whole


def _token(row, tile: Tile):
    return row if tile.rank == 1 else row & (tile.tokens - 1)


class Turn:
    """The angles of a chunk: of turning there and back. Computed where it is used, as registers are few."""

    def __init__(self, phase_QS, interpret: bool):
        radians_TS = of_tokens(phase_QS, interpret).astype(jnp.float32) * (2 * jnp.pi / 2.0**16)
        self.sin_TS, self.cos_TS, self.interpret = jnp.sin(radians_TS), jnp.cos(radians_TS), interpret

    def _joined(self, u_TS, w_TS, rest_TN):
        """bfloat16."""
        parts = [part.astype(jnp.bfloat16) for part in (u_TS, w_TS, rest_TN) if part.shape[1]]
        return joined(parts, self.interpret)

    def _split(self, x_TN):
        planes = self.sin_TS.shape[1]
        rest_TN = x_TN[:, 2 * planes :] if x_TN.shape[1] > 2 * planes else jnp.zeros((ROWS, 0))
        return x_TN[:, :planes], x_TN[:, planes : 2 * planes], rest_TN

    def there(self, x_ref, bias_RN):
        x_TN = load(x_ref, TILE, self.interpret).astype(jnp.float32) + of_ranks(bias_RN, self.interpret)
        u_TS, w_TS, rest_TN = self._split(x_TN)
        sin_TS, cos_TS = self.sin_TS, self.cos_TS
        return self._joined(u_TS * cos_TS - w_TS * sin_TS, u_TS * sin_TS + w_TS * cos_TS, rest_TN)

    def back(self, dx_TN, x_TN):
        """The gradient of what was turned into x, and of the angle."""
        du_TS, dw_TS, rest_TN = self._split(dx_TN)
        u_TS, w_TS, _ = (part.astype(jnp.float32) for part in self._split(x_TN))
        sin_TS, cos_TS = self.sin_TS, self.cos_TS
        dphi_TS = dw_TS * u_TS - du_TS * w_TS
        return self._joined(du_TS * cos_TS + dw_TS * sin_TS, dw_TS * cos_TS - du_TS * sin_TS, rest_TN), dphi_TS


def _x_TP(program: Program):
    """Values times their rank's weight, float32."""
    x_TP = of_tokens(program.shared.v_QP, program.interpret).astype(jnp.float32)
    return x_TP if program.shared.v_rank_RP is None else x_TP * of_ranks(program.shared.v_rank_RP, program.interpret)


def _query_kernel(refs: Inputs, out: Query, shared: Shared, barriers: Barriers, *, sizes: Sizes, tile: Tile):
    program = Program(refs, shared, barriers, sizes, tile)
    chunks, interpret = sizes.chunks, program.interpret
    program.load_head()
    program.load_k(0)
    program.load_values(0)
    program.load_q(0)
    for index in range(min(2, chunks)):
        program.load_chunk(index, index)
    plgpu.barrier_wait(barriers.head)

    def chunk(index, h_PN):
        slot = lax.rem(index, jnp.int32(2))
        decay, phase_QS = Decay(shared.scalars_CXT.at[slot], tile), shared.phase_CQS.at[slot]
        plgpu.barrier_wait(barriers.chunk.at[slot])
        plgpu.barrier_wait(barriers.k)
        turned_k_TN = Turn(phase_QS, interpret).there(shared.k_TN, shared.k_bias_RN)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk stored has left
        shared.h_PN[...] = h_PN.astype(jnp.bfloat16)
        k_TN = shared.turned_k_TN
        k_TN[...] = turned_k_TN
        plgpu.barrier_wait(barriers.values)
        x_ref, x_TP = shared.v_QP, _x_TP(program)
        if tile.rank > 1:
            x_ref = shared.x_TP
            x_ref[...] = x_TP.astype(jnp.bfloat16)
        shared.weighted_TP[...] = (x_TP * down(decay.until_T(SHIFTED), WIDTH)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        pl.when(index + 1 < chunks)(lambda: program.load_k(index + 1))
        program.keep(out.h_BHSAPN, index)

        def weighted(mixed):
            weight_TT = decay.weight_TT()
            dy_TP = load(shared.dy_TP, TILE, interpret).astype(jnp.float32) * down(decay.since_T(), WIDTH)
            return (mixed() * weight_TT).astype(jnp.bfloat16), dy_TP.astype(jnp.bfloat16)

        mixed_TT, dy_TP = products([(ROWS, (shared.dy_TP, ("t", x_ref)))], interpret, weighted)

        def turned_back(dq, h):
            plgpu.barrier_wait(barriers.q)
            turn = Turn(phase_QS, interpret)
            q_TN, dq_TN = turn.there(shared.q_TN, shared.q_bias_RN), dq()
            shared.rows_XT.at[0][...] = jnp.sum(q_TN.astype(jnp.float32) * dq_TN, axis=1)
            return *turn.back(dq_TN, q_TN), h()

        dq_sum = (sizes.d_state, (dy_TP, shared.h_PN), (mixed_TT, k_TN))
        h_sum = (h_PN * decay.whole(), (("t", shared.weighted_TP), k_TN))
        dq_TN, dphi_TS, h_PN = products([dq_sum, h_sum], interpret, turned_back)
        plgpu.commit_smem()  # all products are done, all of q is read
        pl.when(index + 1 < chunks)(lambda: program.load_values(index + 1))
        pl.when(index + 1 < chunks)(lambda: program.load_q(index + 1))
        pl.when(index + 2 < chunks)(lambda: program.load_chunk(index + 2, slot))
        shared.turned_k_TN[...] = dq_TN
        program.store_dphi(dphi_TS, out.dphi_BHLS, index)
        plgpu.commit_smem()
        program.store_turned(shared.turned_k_TN, out.dq_BHLRN, index)
        plgpu.copy_smem_to_gmem(shared.rows_XT.at[0], out.received_BHCT.at[program.chunk_of_row(index)])
        return h_PN

    lax.fori_loop(0, chunks, chunk, load(refs.h_BHSPN.at[program.state], TILE, interpret, optimized=False))
    plgpu.wait_smem_to_gmem(0)


def _key_kernel(refs: Inputs, out: Key, shared: Shared, barriers: Barriers, *, sizes: Sizes, tile: Tile):
    program = Program(refs, shared, barriers, sizes, tile)
    chunks, interpret = sizes.chunks, program.interpret
    only_state = refs.k_BLRGN is None
    program.load_head()
    program.load_k(chunks - 1)
    program.load_q(chunks - 1)
    program.load_values(chunks - 1)
    program.load_chunk(chunks - 1, 0)
    plgpu.barrier_wait(barriers.head)

    def chunk(step, dh_PN):
        index = chunks - 1 - step
        decay, phase_QS = Decay(shared.scalars_CXT.at[0], tile), shared.phase_CQS.at[0]
        q_TN, k_TN = shared.q_TN, shared.k_TN
        plgpu.barrier_wait(barriers.chunk.at[0])
        turn = Turn(phase_QS, interpret)
        if not only_state:
            plgpu.barrier_wait(barriers.k)
            k_TN[...] = turn.there(k_TN, shared.k_bias_RN)
        plgpu.barrier_wait(barriers.q)
        q_TN[...] = turn.there(q_TN, shared.q_bias_RN)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk stored has left
        if not only_state:
            # It waits in two halves, good to 2^-17, until all else is done: registers are few.
            shared.h_PN[...] = dh_PN.astype(jnp.bfloat16)
            shared.low_PN[...] = (dh_PN - dh_PN.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)
        plgpu.barrier_wait(barriers.values)
        plgpu.commit_smem()
        if not only_state:
            program.keep(out.dh_BHSAPN, index + 1)
            dk_pairs, dv_ref = _values_back(program, decay)
        dy_TP = load(shared.dy_TP, TILE, interpret).astype(jnp.float32) * down(decay.since_T(), WIDTH)
        shared.dy_TP[...] = dy_TP.astype(jnp.bfloat16)
        plgpu.commit_smem()
        if not only_state:
            to_QP = out.dv_BLHP.at[program.batch, program.tokens(index), pl.ds(program.head * WIDTH, WIDTH)]
            plgpu.copy_smem_to_gmem(dv_ref.at[program.rows(0)], to_QP)

            def turned_back(dk):
                dk_TN, turned_TN = dk(), load(k_TN, TILE, interpret)
                shared.rows_XT.at[3][...] = jnp.sum(turned_TN.astype(jnp.float32) * dk_TN, axis=1)
                return Turn(phase_QS, interpret).back(dk_TN, turned_TN)

            dk_TN, dphi_TS = products([(sizes.d_state, *dk_pairs)], interpret, turned_back)
            high_PN, low_PN = (load(ref, TILE, interpret).astype(jnp.float32) for ref in (shared.h_PN, shared.low_PN))
            dh_PN = high_PN + low_PN
            program.store_dphi(dphi_TS, out.dphi_BHLS, index)
            # What was kept of h has left; dv, and a sum over ranks, may not have. All have read h.
            plgpu.wait_smem_to_gmem(1 + (tile.rank > 1), wait_read_only=True)
            shared.h_PN[...] = dk_TN
        dh_PN = product_into(dh_PN * decay.whole(), ("t", shared.dy_TP), q_TN, interpret)
        plgpu.commit_smem()  # all products are done

        @pl.when(step + 1 < chunks)
        def _():
            program.load_chunk(index - 1, 0)
            program.load_k(index - 1)
            program.load_q(index - 1)

        if not only_state:
            plgpu.copy_smem_to_gmem(shared.rows_XT, out.drows_BHCXT.at[program.chunk_of_row(index)])
            program.store_turned(shared.h_PN, out.dk_BHLRN, index)
            if tile.rank == 1:
                plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # dv has left, the others may not have
        pl.when(step + 1 < chunks)(lambda: program.load_values(index - 1))
        return dh_PN

    dv_rank_TP = shared.dv_rank_TP
    if dv_rank_TP is not None:
        zeros_TP = jnp.zeros((ROWS, WIDTH), jnp.float32)
        dv_rank_TP[...] = zeros_TP if interpret else plgpu.layout_cast(zeros_TP, TILE)
    dh_PN = load(refs.h_BHSPN.at[program.state], TILE, interpret, optimized=False)
    dh_PN = lax.fori_loop(0, chunks, chunk, dh_PN)
    out.dh_BHSPN.at[program.state][...] = dh_PN
    if dv_rank_TP is not None:
        out.dv_rank_BHSTP.at[program.state][...] = load(dv_rank_TP, TILE, interpret)
    plgpu.wait_smem_to_gmem(0)


def _values_back(program: Program, decay: Decay):
    """The gradient of the values of a chunk and of its scalars, into shared memory; what sums to the keys' gradient.

    What can be loaded or computed again is: registers are few. Ends with all products with dy done.
    """
    shared, interpret, ranked = program.shared, program.interpret, program.tile.rank > 1
    q_TN, k_TN = shared.q_TN, shared.k_TN

    def weighted(score, mixed):
        """Inside the chunk: weights of outputs for values, of values for keys; and a token's own score."""
        later_TT, own_TT = decay.later_TT(), decay.own_TT()
        score_TT = score()
        own_score_TT = jnp.where(own_TT, score_TT, 0.0)
        own = own_score_TT.astype(jnp.bfloat16) if ranked else jnp.sum(own_score_TT, axis=1)
        score_TT = (score_TT * later_TT).astype(jnp.bfloat16)
        weight_TT = jnp.where(own_TT, down(decay.rows(GAMMA), ROWS), later_TT * down(decay.rows(KAPPA), ROWS))
        return score_TT, (mixed() * weight_TT).astype(jnp.bfloat16), own

    sums = [(ROWS, (k_TN, ("t", q_TN))), (ROWS, (_x_TP(program).astype(jnp.bfloat16), ("t", shared.dy_TP)))]
    score_TT, mixed_TT, own = products(sums, interpret, weighted)

    dlater_TP = product(k_TN, ("t", shared.h_PN), WIDTH, interpret) * down(decay.until_T(), WIDTH)
    sums = [(dlater_TP, (score_TT, shared.dy_TP))] + [(WIDTH, (own, shared.dy_TP))] * ranked

    def summed(dlater, down_=None):
        dy_TP, x_TP = load(shared.dy_TP, TILE, interpret).astype(jnp.float32), _x_TP(program)
        dskip_T = jnp.sum(x_TP * dy_TP, axis=1)
        dx_TP = dlater()
        dkappa_T = jnp.sum(x_TP * dx_TP, axis=1)
        dx_TP *= down(decay.rows(KAPPA), WIDTH)
        if ranked:
            own_TP = down_()
            dgamma_T = jnp.sum(x_TP * own_TP, axis=1)
        else:
            own_TP, dgamma_T = down(own, WIDTH) * dy_TP, own * dskip_T
        dx_TP += down(decay.rows(GAMMA), WIDTH) * own_TP
        if program.refs.skip_H is not None:
            dx_TP += program.refs.skip_H[program.head] * dy_TP
        for place, row_T in enumerate((dkappa_T, dgamma_T, dskip_T)):
            shared.rows_XT.at[place][...] = row_T
        return dx_TP, (x_TP * down(decay.until_T(SHIFTED), WIDTH)).astype(jnp.bfloat16)

    dx_TP, weighted_TP = products(sums, interpret, summed)
    dv_ref = shared.v_QP
    if ranked:
        dv_rank_TP = dx_TP * of_tokens(shared.v_QP, interpret).astype(jnp.float32)
        shared.dv_rank_TP[...] = load(shared.dv_rank_TP, TILE, interpret) + dv_rank_TP
        dv_ref = shared.x_TP
        dv_ref[...] = (dx_TP * of_ranks(shared.v_rank_RP, interpret)).astype(jnp.bfloat16)
        dx_TP = program.over_ranks(dv_ref)
    else:
        plgpu.commit_smem()
    dv_ref[...] = dx_TP.astype(jnp.bfloat16)
    return [(weighted_TP, shared.h_PN), (mixed_TT, q_TN)], dv_ref


def _call(kernel, name: str, inputs: Inputs, out, sizes: Sizes, tile: Tile):
    flat = lambda array, *sizes: None if array is None else array.reshape(*sizes, -1)  # noqa: E731
    batch, length = inputs.dy_BLHRP.shape[:2]
    scalars = inputs.scalars_BHCXT
    inputs = inputs._replace(
        q_BLRGN=flat(inputs.q_BLRGN, batch, length),
        k_BLRGN=flat(inputs.k_BLRGN, batch, length),
        v_BLHP=flat(inputs.v_BLHP, batch, length),
        dy_BLHRP=flat(inputs.dy_BLHRP, batch, length),
        phase_BHLS=inputs.phase_BHLS.reshape(-1, *inputs.phase_BHLS.shape[2:]),
        scalars_BHCXT=scalars.reshape(-1, *scalars.shape[3:]),
    )
    arrays, tree = jax.tree.flatten(inputs)
    out_types, out_tree = jax.tree.flatten(out)

    def body(*refs):
        inputs, out = jax.tree.unflatten(tree, refs[: len(arrays)]), jax.tree.unflatten(out_tree, refs[len(arrays) :])
        both, query = inputs.k_BLRGN is not None, kernel is _query_kernel
        heads = (inputs.q_bias_HRN, inputs.k_bias_HRN, inputs.v_rank_HRP)
        barriers = Barriers(
            plgpu.Barrier(num_arrivals=tile.rank),
            plgpu.Barrier(num_arrivals=tile.rank),
            plgpu.Barrier(num_arrivals=both + tile.rank),
            plgpu.Barrier(num_arrivals=2, num_barriers=1 + query),
            plgpu.Barrier(num_arrivals=sum(x is not None for x in heads)),
        )
        shared = _shared(inputs, sizes, tile, query=query)
        pl.run_scoped(functools.partial(kernel, inputs, out, sizes=sizes, tile=tile), shared, barriers)

    outputs = plgpu.kernel(
        body,
        out_type=out_types,
        grid=(batch * sizes.heads * tile.segments,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # commit_smem stands wherever warps exchange something
            reduction_scratch_bytes=512,  # sums are within a warp
        ),
        kernel_name=name,
        **({} if tile.interpret is None else {"interpret": tile.interpret}),
    )(*arrays)
    return jax.tree.unflatten(out_tree, outputs)


def _sizes(inputs: Inputs, tile: Tile) -> Sizes:
    _, length, _, groups, d_state = inputs.q_BLRGN.shape
    n_heads, planes = inputs.dy_BLHRP.shape[2], inputs.phase_BHLS.shape[-1]
    return Sizes(n_heads, n_heads // groups, groups, length // tile.tokens // tile.segments, d_state, planes)


def anchors(sizes: Sizes, tile: Tile) -> int:
    """States that are kept of a segment."""
    return -(-sizes.chunks // (ANCHOR // tile.tokens))


def query(inputs: Inputs, tile: Tile) -> Query:
    """h of `inputs`: the state before every segment."""
    batch, length, rank, _, d_state = inputs.q_BLRGN.shape
    sizes = _sizes(inputs, tile)
    shape, rows = jax.ShapeDtypeStruct, batch * sizes.heads
    out = Query(
        shape((rows, length, rank * d_state), jnp.bfloat16),
        shape((rows, length, sizes.planes), jnp.bfloat16),
        shape((rows * length // tile.tokens, ROWS), jnp.float32),
        shape((batch, sizes.heads, tile.segments, anchors(sizes, tile), WIDTH, d_state), jnp.bfloat16),
    )
    inputs = inputs._replace(skip_H=None)
    return _call(_query_kernel, "mamba3_mosaic_query_gradient", inputs, out, sizes, tile)


def key(inputs: Inputs, tile: Tile, *, only_state: bool = False) -> Key:
    """h of `inputs`: the gradient of the state after every segment."""
    batch, length, rank, _, d_state = inputs.q_BLRGN.shape
    sizes = _sizes(inputs, tile)
    shape, rows = jax.ShapeDtypeStruct, batch * sizes.heads
    heads = (batch, sizes.heads, tile.segments)
    if only_state:
        inputs = inputs._replace(k_BLRGN=None, v_BLHP=None, k_bias_HRN=None, v_rank_HRP=None, skip_H=None)
        out = Key(*[None] * 6, shape((*heads, WIDTH, d_state), jnp.float32))
        return _call(_key_kernel, "mamba3_mosaic_segments_back", inputs, out, sizes, tile)
    kept = max(1, anchors(sizes, tile) - 1)
    out = Key(
        shape((rows, length, rank * d_state), jnp.bfloat16),
        shape((rows, length, sizes.planes), jnp.bfloat16),
        shape((batch, length, sizes.heads * WIDTH), jnp.bfloat16),
        shape((rows * length // tile.tokens, 4, ROWS), jnp.float32),
        shape((*heads, ROWS, WIDTH), jnp.float32) if rank > 1 else None,
        shape((*heads, kept, WIDTH, d_state), jnp.bfloat16),
        shape((*heads, WIDTH, d_state), jnp.float32),
    )
    return _call(_key_kernel, "mamba3_mosaic_key_gradient", inputs, out, sizes, tile)
