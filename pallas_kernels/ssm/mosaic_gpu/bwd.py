"""The gradients of the chunked scan with its rotation, in Pallas Mosaic GPU: what `query_bwd` and `key_bwd` share.

Two passes: queries from the first chunk on, with the state h recomputed; keys and values from the last chunk on, with
the gradient dh of the state. With P_ts = e^(c_t - c_s) the decay inside a chunk, W_ts = P_ts kappa_s the weight of an
earlier token, W_tt = gamma_t a token's own, S = q k^T the scores, and dh the gradient of the state after the chunk:

    dq_t = sum_{s <= t} W_ts (dy_t . x_s) k_s  +  e^(c_t) h_0^T dy_t
    dk_s = sum_{t >= s} W_ts (dy_t . x_s) q_t  +  e^(c_T - c_s) kappa_s dh^T x_s
    dlater_s = sum_{t > s} P_ts S_ts dy_t  +  e^(c_T - c_s) dh k_s
    dx_s = kappa_s dlater_s + gamma_s S_ss dy_s + D dy_s
    dkappa_s = x_s . dlater_s,   dgamma_s = S_ss x_s . dy_s,   dD = sum_s x_s . dy_s

The decay's gradient needs no products of its own: a pair's log weight is c_t - c_s, so the gradient of c_t is what is
incoming to the token, q_t . dq_t, less what is outgoing to earlier ones, k_t . dk_t. Both passes round the same weights
to the same bits, so that what a pair of one chunk adds to sums over later tokens cancels exactly; what crosses a
chunk's end is taken from the states at checkpoints, every `CHECKPOINT_INTERVAL` tokens.

Queries and keys are rotated as they are read, their gradients rotated back as they are stored; the angle of a pair
(u, w) gets dphi = dw u - du w, which does not depend on the frame. Sums over heads, and of dphi over later tokens, are
left to `sums_bwd`; those too cancel for the pairs of tokens of a chunk, and begin again at every checkpoint (see
`gradients.AngleProducts`).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.contract import Weights
from pallas_kernels.ssm.mosaic_gpu.tiles import (
    ROWS,
    SCALARS_BWD,
    WIDTH,
    Decay,
    Program,
    Rotation,
    ScanRefs,
    Sizes,
    Tile,
    call_scan,
    head_barrier,
    head_memory,
    ones_of_tokens,
    product,
    tiled,
)

HALF = 113_664  # bytes that a program may keep in shared memory for two to fit a multiprocessor
CHECKPOINT_INTERVAL = 1024  # tokens between two states that are stored, where sums over the row begin again


class Slots(NamedTuple):
    """How many chunks what is copied in has places for; the copies of a chunk begin as soon as its place is free."""

    chunk: int = 1  # phase, scalars
    k: int = 1
    q: int = 1
    values: int = 1  # v, dy


class GradientShared(NamedTuple):
    """Shared memory; with an axis of slots before those of a chunk's, but in `GradientProgram.turn`."""

    q_TN: jax.Array  # as it comes
    k_TN: jax.Array | None
    rotated_k_TN: jax.Array | None  # of `query_bwd` alone; then the gradient on its way out
    v_QP: jax.Array | None
    x_TP: jax.Array | None
    dy_TP: jax.Array
    weighted_TP: jax.Array | None
    phase_QS: jax.Array | None
    scalars_XT: jax.Array
    h_PN: jax.Array
    low_PN: jax.Array | None  # what rounding dh to bfloat16 in h leaves out
    dphi_TS: jax.Array | None  # of one rank, where it fits
    rows_XT: jax.Array | None
    dv_rank_TP: jax.Array | None
    weights: Weights  # of the head: biases and v_rank

    @classmethod
    def memory(cls, refs: ScanRefs, tile: Tile, slots: Slots, *, query: bool, rows: int) -> "GradientShared":
        """Return what a program of `query_bwd`, or of `key_bwd`, needs; `rows` are the numbers it stores of a row."""
        sizes, ranked, only_state = Sizes.of(refs, tile), tile.rank > 1, refs.tokens.k_BLRGN is None
        d_state, pairs = sizes.d_state, sizes.pairs
        both, keys = not only_state, not (query or only_state)
        dphi_TS = tiled(ROWS, pairs, dtype=dphi_dtype(tile)) if pairs else None
        shared = cls(
            q_TN=tiled(slots.q, ROWS, d_state),
            k_TN=tiled(slots.k, ROWS, d_state) if both else None,
            rotated_k_TN=tiled(ROWS, d_state) if query else None,
            v_QP=tiled(slots.values, tile.tokens, WIDTH) if both else None,
            x_TP=tiled(ROWS, WIDTH) if both and ranked else None,
            dy_TP=tiled(slots.values, ROWS, WIDTH),
            weighted_TP=tiled(ROWS, WIDTH) if query else None,
            phase_QS=tiled(slots.chunk, tile.tokens, pairs, dtype=jnp.int16) if pairs else None,
            scalars_XT=plgpu.SMEM((slots.chunk, *refs.scalars_BHCXT.shape[3:]), jnp.float32),
            h_PN=tiled(WIDTH, d_state),
            low_PN=tiled(WIDTH, d_state) if keys else None,
            dphi_TS=dphi_TS if ranked and both else None,
            rows_XT=plgpu.SMEM((rows, ROWS), jnp.float32) if both else None,
            dv_rank_TP=tiled(ROWS, WIDTH, dtype=jnp.float32) if keys and ranked else None,
            weights=head_memory(refs.weights),
        )
        with_dphi = shared._replace(dphi_TS=dphi_TS)
        return with_dphi if query and fits(with_dphi) else shared


def fits(shared: GradientShared) -> bool:
    """Tell whether two programs with such shared memory share a multiprocessor."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(shared)) <= HALF


class GradientBarriers(NamedTuple):
    """Barriers, raised when what was copied has arrived: one a slot."""

    q: jax.Array
    k: jax.Array
    values: jax.Array  # v, dy
    chunk: jax.Array  # phase, scalars
    head: jax.Array  # what does not depend on the chunk


class GradientProgram(Program):
    """The part of the arrays one program works on, and its copies."""

    def __init__(self, *places, slots: Slots, **how):
        super().__init__(*places, **how)
        self.slots = slots

    def turn(self, number) -> Self:
        """Return the program for its chunk of this number, counted from 0, in the slots of that."""
        program, slots = self.fresh(), self.slots

        def at(slots, ref):
            return None if ref is None else ref.at[0 if slots == 1 else lax.rem(jnp.int32(number), jnp.int32(slots))]

        shared, barriers = program.shared, program.barriers
        program.shared = shared._replace(
            q_TN=at(slots.q, shared.q_TN),
            k_TN=at(slots.k, shared.k_TN),
            v_QP=at(slots.values, shared.v_QP),
            dy_TP=at(slots.values, shared.dy_TP),
            phase_QS=at(slots.chunk, shared.phase_QS),
            scalars_XT=at(slots.chunk, shared.scalars_XT),
        )
        of_slots = {name: at(n, getattr(barriers, name)) for name, n in slots._asdict().items()}
        program.barriers = barriers._replace(**of_slots)
        return program

    def load_q(self, index):
        """Start the copies of a chunk's queries."""
        self.load_ranks(self.refs.tokens.q_BLRGN, self.shared.q_TN, index, self.barriers.q)

    def load_k(self, index):
        """Start the copies of a chunk's keys, where they are read."""
        if self.refs.tokens.k_BLRGN is not None:
            self.load_ranks(self.refs.tokens.k_BLRGN, self.shared.k_TN, index, self.barriers.k)

    def load_values(self, index):
        """Start the copies of v, where it is read, and of dy."""
        v_BLX, barrier = self.refs.tokens.v_BLHP, self.barriers.values
        if v_BLX is not None:
            plgpu.copy_gmem_to_smem(v_BLX.at[self.of_head(self.tokens(index))], self.shared.v_QP, barrier)
        for dy_QP, to_QP in self.by_rank(self.refs.dy_BLHRP, self.shared.dy_TP, index):
            plgpu.copy_gmem_to_smem(dy_QP, to_QP, barrier)

    def rotation(self) -> Rotation:
        """Return the rotation of the chunk."""
        return Rotation(self.shared.phase_QS, self.interpret)

    def decay(self) -> Decay:
        """Return what the scalars of the chunk weigh."""
        return Decay(self.shared.scalars_XT, SCALARS_BWD, self.tile)

    def load_chunk(self, index):
        """Start the copies of a chunk's angles and scalars."""
        self.load_phase(self.shared.phase_QS, index, self.barriers.chunk)
        self.load_scalars(self.shared.scalars_XT, index, self.barriers.chunk)

    def copies(self) -> tuple[tuple[int, Callable], ...]:
        """Return what starts the copies of a chunk, in the order in which they are waited for, and their places."""
        slots = self.slots
        return (
            (slots.chunk, self.load_chunk),
            (slots.k, self.load_k),
            (slots.q, self.load_q),
            (slots.values, self.load_values),
        )

    def store_checkpoint(self, to_BHZAPN, index):
        """Store what h holds if the chunk begins a checkpoint interval; `to` has all of them, or all but the first."""
        interval = CHECKPOINT_INTERVAL // self.tile.tokens
        left_out = checkpoints(self.sizes, self.tile) - to_BHZAPN.shape[3]
        place = lax.div(index, jnp.int32(interval)) - left_out

        @pl.when((lax.rem(index, jnp.int32(interval)) == 0) & (place >= 0) & (index < self.sizes.chunks))
        def _():
            plgpu.copy_smem_to_gmem(self.shared.h_PN, to_BHZAPN.at[(*self.state, place)])

    def store_rows(self, from_TN, to_BHLX, index):
        """Store the gradient of q or k."""
        for rank in range(self.tile.rank):
            columns = pl.ds(rank * self.sizes.d_state, self.sizes.d_state)
            to_QN = to_BHLX.at[self.row, self.tokens(index), columns]
            plgpu.copy_smem_to_gmem(from_TN.at[self.rows(rank)], to_QN)

    def store_dphi(self, dphi_TS, to_BHLS, index):
        """Store the angle's gradient, summed over ranks; None: there is no angle.

        Through shared memory where there is a place for it: a store from registers holds up the next barrier.
        """
        if dphi_TS is None:
            return
        to_QS, shared_TS = to_BHLS.at[self.row, self.tokens(index)], self.shared.dphi_TS
        if shared_TS is None:
            to_QS[...] = dphi_TS
            return
        shared_TS[...] = dphi_TS.astype(shared_TS.dtype)
        if self.tile.rank > 1:
            sum_TS = self.over_ranks(shared_TS)
            shared_TS[...] = sum_TS.astype(shared_TS.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared_TS.at[self.rows(0)], to_QS)

    def over_ranks(self, ref_TP):
        """Return in every row the sum of its token's: ranks are in different warps, so a product with ones adds up."""
        plgpu.commit_smem()
        sum_TP = product(ones_of_tokens(self.tile), ref_TP, ref_TP.shape[1], self.interpret)
        plgpu.commit_smem()
        return sum_TP


def call(kernel, *, name: str, refs: ScanRefs, out, tile: Tile, slots: Slots, query: bool, rows: int = 0):
    """Run `query_bwd`'s kernel, or one of `key_bwd`'s, one program a head and split."""
    shared = GradientShared.memory(refs, tile, slots, query=query, rows=rows)
    arrivals = {
        "q": tile.rank,
        "k": tile.rank,
        "values": tile.rank + (refs.tokens.v_BLHP is not None),
        "chunk": 1 + (refs.phase_BHLS is not None),
    }
    barriers = GradientBarriers(
        **{name: plgpu.Barrier(num_arrivals=n, num_barriers=getattr(slots, name)) for name, n in arrivals.items()},
        head=head_barrier(shared.weights),
    )
    program = functools.partial(GradientProgram, slots=slots)
    return call_scan(kernel, program, refs, name=name, out=out, scratch=(shared, barriers), tile=tile)


def dphi_dtype(tile: Tile):
    """Return the dtype in which dphi is stored: float32 for rank 1.

    The query's and the key's share of a pair inside a chunk then cancel exactly in the sum over the row. It costs
    134 MB at B16 L2048.
    """
    return jnp.float32 if tile.rank == 1 else jnp.bfloat16


def checkpoints(sizes: Sizes, tile: Tile) -> int:
    """Return how many states of a split are stored."""
    return -(-sizes.chunks // (CHECKPOINT_INTERVAL // tile.tokens))
