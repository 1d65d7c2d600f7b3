"""The gradient of the queries: from the first chunk on, with the state computed again. See `back`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.mosaic_gpu.back import (
    Barriers,
    Inputs,
    Program,
    Shared,
    anchors,
    call,
    dphi_dtype,
    sizes_of,
    values,
)
from pallas_kernels.ssm.mosaic_gpu.chunk import SHIFTED, Decay
from pallas_kernels.ssm.mosaic_gpu.contract import WIDTH, Sizes, Tile
from pallas_kernels.ssm.mosaic_gpu.registers import ROWS, TILE
from pallas_kernels.ssm.mosaic_gpu.tiles import down, load, products


class Query(NamedTuple):
    dq_BHLRN: jax.Array  # turned back
    dphi_BHLS: jax.Array | None  # of the angle at each token, see `back.dphi_dtype`
    received_BHCT: jax.Array  # q . dq of every row
    h_BHSAPN: jax.Array  # bfloat16, the state before every `anchor` chunks


def query(inputs: Inputs, tile: Tile) -> Query:
    """h of `inputs`: the state before every segment."""
    batch, length, rank, _, d_state = inputs.q_BLRGN.shape
    sizes = sizes_of(inputs, tile)
    shape, rows = jax.ShapeDtypeStruct, batch * sizes.heads
    states = (batch, sizes.heads, tile.segments, anchors(sizes, tile), WIDTH, d_state)
    out = Query(
        dq_BHLRN=shape((rows, length, rank * d_state), jnp.bfloat16),
        dphi_BHLS=shape((rows, length, sizes.planes), dphi_dtype(tile)) if sizes.planes else None,
        received_BHCT=shape((rows * length // tile.tokens, ROWS), jnp.float32),
        h_BHSAPN=shape(states, jnp.bfloat16),
    )
    inputs = inputs._replace(skip_H=None)
    return call(_kernel, "mamba3_mosaic_query_gradient", inputs, out, sizes, tile, query=True)


def _kernel(refs: Inputs, out: Query, shared: Shared, barriers: Barriers, *, sizes: Sizes, tile: Tile):
    program = Program(refs, shared, barriers, sizes, tile)
    chunks, interpret = sizes.chunks, program.interpret
    head_arrived = program.load_head()
    program.load_k(0)
    program.load_values(0)
    program.load_q(0)
    for index in range(min(2, chunks)):
        program.load_chunk(index, index)
    head_arrived()

    def chunk(index, h_PN):
        slot = lax.rem(index, jnp.int32(2))
        decay = Decay(shared.scalars_CXT.at[slot], tile)
        plgpu.barrier_wait(barriers.chunk.at[slot])
        plgpu.barrier_wait(barriers.k)
        turned_k_TN = program.turn(slot).there(shared.k_TN, shared.k_bias_RN)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the last chunk stored has left
        shared.h_PN[...] = h_PN.astype(jnp.bfloat16)
        k_TN = shared.turned_k_TN
        k_TN[...] = turned_k_TN
        plgpu.barrier_wait(barriers.values)
        x_ref, x_TP = shared.v_QP, values(program)
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
            dq_TN = dq()
            turn = program.turn(slot)
            q_TN = turn.there(shared.q_TN, shared.q_bias_RN)
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
