"""The kernel of `scan`: one head of a batch entry, or a split of it, chunk after chunk.

The state stays in registers. Of what a chunk reads, q, the angles and the gate have one place in shared memory, filled
again as soon as they are in registers; what wgmma reads until the chunk's end (k, rotated in place, and v) has two.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.contract import NORM_EPS
from pallas_kernels.ssm.mosaic_gpu.chunk import SHIFTED, Decay, Rotation, token
from pallas_kernels.ssm.mosaic_gpu.config import WIDTH, Tile
from pallas_kernels.ssm.mosaic_gpu.contract import Inputs, Outputs, Sizes
from pallas_kernels.ssm.mosaic_gpu.registers import (
    ROWS,
    TILE,
    of_ranks,
    of_tokens,
)
from pallas_kernels.ssm.mosaic_gpu.tiles import Transposed, add_products, down, iota, load, product_tiles, tiled

SCALARS = 3  # of a row: see `Inputs`; for packed rows, the document too


class Shared(NamedTuple):
    """Shared memory."""

    q_TN: jax.Array | None
    k_2TN: jax.Array  # rotated in place
    v_2QP: jax.Array
    x_TP: jax.Array | None  # v of every rank; None for one rank
    weighted_TP: jax.Array  # x, weighted for the state; later, what is stored
    gate_QP: jax.Array  # for one rank, the output in place
    y_TP: jax.Array | None  # the output of every rank; None for one
    phase_QS: jax.Array | None
    scalars_2XT: jax.Array
    h_PN: jax.Array
    q_bias_RN: jax.Array | None
    k_bias_RN: jax.Array | None
    v_rank_RP: jax.Array | None
    gate_rank_RP: jax.Array | None
    out_rank_RP: jax.Array | None
    norm_1P: jax.Array | None


class Barriers(NamedTuple):
    """Barriers, raised when what was copied has arrived."""

    early: jax.Array  # q and phase
    chunk: jax.Array  # two: k, v, scalars
    gate: jax.Array
    head: jax.Array  # what does not depend on the chunk


def shared(refs: Inputs, n_scalars: int, sizes: Sizes, tile: Tile) -> Shared:
    d_state = sizes.d_state

    def vectors(ref, size):
        return None if ref is None else plgpu.SMEM((ref.shape[1], size), jnp.float32)

    return Shared(
        q_TN=None if refs.q_BLRGN is None else tiled(ROWS, d_state),
        k_2TN=tiled(2, ROWS, d_state),
        v_2QP=tiled(2, tile.tokens, WIDTH),
        x_TP=None if tile.rank == 1 else tiled(ROWS, WIDTH),
        weighted_TP=tiled(ROWS, WIDTH),
        gate_QP=tiled(tile.tokens, WIDTH),
        y_TP=None if tile.rank == 1 else tiled(ROWS, WIDTH),
        phase_QS=None if refs.phase_BHLS is None else tiled(tile.tokens, sizes.planes, dtype=jnp.int16),
        scalars_2XT=plgpu.SMEM((2, n_scalars, ROWS), jnp.float32),
        h_PN=tiled(WIDTH, d_state),
        q_bias_RN=vectors(refs.q_bias_HRN, d_state),
        k_bias_RN=vectors(refs.k_bias_HRN, d_state),
        v_rank_RP=vectors(refs.v_rank_HRP, WIDTH),
        gate_rank_RP=vectors(refs.gate_rank_HRP, WIDTH),
        out_rank_RP=vectors(refs.out_rank_HRP, WIDTH),
        norm_1P=vectors(refs.norm_HP, WIDTH),
    )


VECTORS = {  # of a head: where each goes in shared memory
    "q_bias_HRN": "q_bias_RN",
    "k_bias_HRN": "k_bias_RN",
    "v_rank_HRP": "v_rank_RP",
    "gate_rank_HRP": "gate_rank_RP",
    "out_rank_HRP": "out_rank_RP",
    "norm_HP": "norm_1P",
}


def vectors(shared: Shared):
    """Returns the shared memory of what does not depend on the chunk."""
    return [getattr(shared, name) for name in VECTORS.values()]


def early_copies(refs: Inputs, tile: Tile) -> int:
    """Returns how many copies bring a chunk's queries and angles."""
    return (tile.rank if refs.q_BLRGN is not None else 0) + (refs.phase_BHLS is not None)


class Program:
    """Which part of the arrays one program works on, and its copies."""

    def __init__(self, refs: Inputs, out: Outputs, shared: Shared, barriers: Barriers, sizes: Sizes, tile: Tile):
        self.refs, self.out, self.shared, self.barriers, self.sizes, self.tile = (
            refs,
            out,
            shared,
            barriers,
            sizes,
            tile,
        )
        program = lax.axis_index("program")
        # Heads run fastest: neighbours read the same queries and keys.
        self.head = lax.rem(program, jnp.int32(sizes.heads))
        rest = lax.div(program, jnp.int32(sizes.heads))
        self.split, self.batch = lax.rem(rest, jnp.int32(tile.splits)), lax.div(rest, jnp.int32(tile.splits))
        self.group = lax.div(self.head, jnp.int32(sizes.heads_a_group))
        self.row = self.batch * sizes.heads + self.head

    def tokens(self, index):
        return pl.ds((self.split * self.sizes.chunks + index) * self.tile.tokens, self.tile.tokens)

    def _rows(self, rank: int):
        return pl.ds(rank * self.tile.tokens, self.tile.tokens)

    def load_head(self):
        """Starts the copies of what does not depend on the chunk, and returns what waits for them."""
        found = [name for name in VECTORS if getattr(self.refs, name) is not None]
        for name in found:
            to = getattr(self.shared, VECTORS[name])
            plgpu.copy_gmem_to_smem(getattr(self.refs, name).at[self.head], to, self.barriers.head)
        return lambda: plgpu.barrier_wait(self.barriers.head) if found else None

    def load_early(self, index):
        """Starts the copies of q and the angles of a chunk."""
        tokens, barrier = self.tokens(index), self.barriers.early
        if self.refs.q_BLRGN is not None:
            self._load_ranks(self.refs.q_BLRGN, tokens, self.shared.q_TN, barrier)
        if self.refs.phase_BHLS is not None:
            plgpu.copy_gmem_to_smem(self.refs.phase_BHLS.at[self.row, tokens], self.shared.phase_QS, barrier)

    def load_chunk(self, index, slot):
        """Starts the copies of k, v and scalars of a chunk."""
        tokens, barrier = self.tokens(index), self.barriers.chunk.at[slot]
        self._load_ranks(self.refs.k_BLRGN, tokens, self.shared.k_2TN.at[slot], barrier)
        v_QP = self.refs.v_BLHP.at[self.batch, tokens, pl.ds(self.head * WIDTH, WIDTH)]
        plgpu.copy_gmem_to_smem(v_QP, self.shared.v_2QP.at[slot], barrier)
        chunk = (self.row * self.tile.splits + self.split) * self.sizes.chunks + index
        plgpu.copy_gmem_to_smem(self.refs.scalars_BHCXT.at[chunk], self.shared.scalars_2XT.at[slot], barrier)

    def _load_ranks(self, ref, tokens, to_TN, barrier):
        d_state = self.sizes.d_state
        for rank in range(self.tile.rank):
            columns = pl.ds((rank * self.sizes.groups + self.group) * d_state, d_state)
            plgpu.copy_gmem_to_smem(ref.at[self.batch, tokens, columns], to_TN.at[self._rows(rank)], barrier)

    def load_gate(self, index):
        gate_QP = self.refs.gate_BLHP.at[self.batch, self.tokens(index), pl.ds(self.head * WIDTH, WIDTH)]
        plgpu.copy_gmem_to_smem(gate_QP, self.shared.gate_QP, self.barriers.gate)

    def store(self, from_TP, index):
        """Stores the output of a chunk, its first rows."""
        to = self.out.o_BLHP.at[self.batch, self.tokens(index), pl.ds(self.head * WIDTH, WIDTH)]
        plgpu.copy_smem_to_gmem(from_TP.at[self._rows(0)], to)

    def store_y(self, from_TP, index):
        for rank in range(self.tile.rank):
            columns = pl.ds((self.head * self.tile.rank + rank) * WIDTH, WIDTH)
            to = self.out.y_BLHRP.at[self.batch, self.tokens(index), columns]
            plgpu.copy_smem_to_gmem(from_TP.at[self._rows(rank)], to)


def kernel(refs: Inputs, out: Outputs, shared: Shared, barriers: Barriers, *, sizes: Sizes, tile: Tile):
    program = Program(refs=refs, out=out, shared=shared, barriers=barriers, sizes=sizes, tile=tile)
    chunks, gated, interpret = sizes.chunks, refs.gate_BLHP is not None, tile.interpret is not None
    only_state = refs.q_BLRGN is None
    skip = None if refs.skip_H is None else refs.skip_H[program.head]
    head_arrived = program.load_head()
    program.load_early(0)
    for index in range(min(2, chunks)):
        program.load_chunk(index, index)
    if gated:
        program.load_gate(0)
    head_arrived()

    def chunk(index, h_PN):
        slot = lax.rem(index, jnp.int32(2))
        k_TN, v_QP, scalars_XT = shared.k_2TN.at[slot], shared.v_2QP.at[slot], shared.scalars_2XT.at[slot]
        if early_copies(refs, tile):
            plgpu.barrier_wait(barriers.early)
        plgpu.barrier_wait(barriers.chunk.at[slot])
        decay = Decay(scalars_XT, tile, packed=scalars_XT.shape[0] > SCALARS)

        rotation = Rotation(shared.phase_QS, interpret)
        if rotation.changes(shared.k_bias_RN):
            k_TN[...] = rotation.apply(k_TN, shared.k_bias_RN)
        if not only_state:
            q_TN = rotation.apply(shared.q_TN, shared.q_bias_RN)
            shared.h_PN[...] = h_PN.astype(jnp.bfloat16)
        # The last chunk's copies out of shared memory are done.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if gated:
            pl.when(index > 0)(lambda: program.load_gate(index))
        x_ref, x_TP = v_QP, of_tokens(v_QP, interpret).astype(jnp.float32)
        if tile.rank > 1:
            if shared.v_rank_RP is not None:
                x_TP *= of_ranks(shared.v_rank_RP, interpret)
            x_ref = shared.x_TP
            x_ref[...] = x_TP.astype(jnp.bfloat16)
        shared.weighted_TP[...] = (x_TP * down(decay.decay_to_end_T(SHIFTED), WIDTH)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        pl.when(index + 1 < chunks)(lambda: program.load_early(index + 1))

        h_sum = (h_PN * decay.chunk_decay(), Transposed(shared.weighted_TP), k_TN)
        if only_state:
            (h_PN,) = add_products([h_sum], interpret)
            plgpu.commit_smem()
        else:
            score_TT, y_TP = product_tiles(
                [(q_TN, Transposed(k_TN), ROWS), (q_TN, Transposed(shared.h_PN), WIDTH)], interpret
            )
            score_TT *= decay.shifted_weight_TT()
            if skip is not None:
                row_TT, column_TT = (iota(axis, tile.interpret is not None) for axis in (0, 1))
                score_TT = jnp.where(row_TT == column_TT, score_TT + skip, score_TT)
            y_TP *= down(decay.decay_from_start_T(), WIDTH)
            y_TP, h_PN = add_products([(y_TP, score_TT.astype(jnp.bfloat16), x_ref), h_sum], interpret)
            _epilogue(y_TP, program, index, tile)
        pl.when(index + 2 < chunks)(lambda: program.load_chunk(index + 2, slot))
        return h_PN

    h_ref = (program.batch, program.head, program.split)
    h_PN = lax.fori_loop(0, chunks, chunk, load(refs.h_BHZPN.at[h_ref], TILE, interpret, optimized=False))
    out.h_BHZPN.at[h_ref][...] = h_PN
    plgpu.wait_smem_to_gmem(0)


def _epilogue(y_TP, program: Program, index, tile: Tile):
    """Applies norm, gate and the sum over ranks, and stores. Ends with a barrier: all have read what was copied in."""
    refs, shared, interpret = program.refs, program.shared, tile.interpret is not None
    if tile.residuals:
        plgpu.commit_smem()  # all products with `weighted` are done
        shared.weighted_TP[...] = y_TP.astype(jnp.bfloat16)
        plgpu.commit_smem()
        program.store_y(shared.weighted_TP, index)
    if shared.norm_1P is not None:
        mean_T = jnp.sum(jnp.square(y_TP), axis=1) * (1 / tile.width)
        y_TP *= down(lax.rsqrt(mean_T + NORM_EPS), WIDTH) * of_ranks(shared.norm_1P, interpret)
    if refs.gate_BLHP is not None:
        plgpu.barrier_wait(program.barriers.gate)
        gate_TP = of_tokens(shared.gate_QP, interpret).astype(jnp.float32)
        if shared.gate_rank_RP is not None:
            gate_TP *= of_ranks(shared.gate_rank_RP, interpret)
        y_TP *= gate_TP * (0.5 + 0.5 * jnp.tanh(0.5 * gate_TP))
    if shared.out_rank_RP is not None:
        y_TP *= of_ranks(shared.out_rank_RP, interpret)
    if tile.rank == 1:
        shared.gate_QP[...] = y_TP.astype(jnp.bfloat16)
        plgpu.commit_smem()
        program.store(shared.gate_QP, index)
        return
    # Ranks are in different warps: a product with ones adds them up, for each of the warps alike.
    shared.y_TP[...] = y_TP.astype(jnp.bfloat16)
    plgpu.commit_smem()
    token_TT = [token(iota(axis, tile.interpret is not None), tile) for axis in (0, 1)]
    ones_TT = jnp.where(token_TT[0] == token_TT[1], 1.0, 0.0).astype(jnp.bfloat16)
    (o_TP,) = product_tiles([(ones_TT, shared.y_TP, WIDTH)], interpret)
    if tile.residuals:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    shared.weighted_TP[...] = o_TP.astype(jnp.bfloat16)
    plgpu.commit_smem()
    program.store(shared.weighted_TP, index)
