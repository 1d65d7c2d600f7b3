"""The gradient of the queries: from the first chunk on, with the state computed again. See `bwd`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.mosaic_gpu import bwd
from pallas_kernels.ssm.mosaic_gpu.tiles import (
    ROWS,
    TILE,
    WIDTH,
    ScanRefs,
    Sizes,
    Tile,
    Transposed,
    down,
    load,
    load_head,
    products,
)


class QueryGradients(NamedTuple):
    """What the kernel writes."""

    dq_BHLRN: jax.Array  # in the frame of the inputs
    dphi_BHLS: jax.Array | None  # of the angle at each token, see `bwd.dphi_dtype`
    incoming_BHCT: jax.Array  # q . dq of every row
    h_BHZAPN: jax.Array  # bfloat16, the state at every checkpoint


def query_bwd(refs: ScanRefs, tile: Tile) -> QueryGradients:
    """Return the gradients of queries and angles; h of `refs` is the state before every split."""
    length, rank, _, d_state = refs.tokens.q_BLRGN.shape[1:]
    sizes = Sizes.of(refs, tile)
    shape, rows = jax.ShapeDtypeStruct, sizes.batch * sizes.heads
    states = (sizes.batch, sizes.heads, tile.splits, bwd.checkpoints(sizes, tile), WIDTH, d_state)
    out = QueryGradients(
        dq_BHLRN=shape((rows, length, rank * d_state), jnp.bfloat16),
        dphi_BHLS=shape((rows, length, sizes.pairs), bwd.dphi_dtype(tile)) if sizes.pairs else None,
        incoming_BHCT=shape((rows * length // tile.tokens, ROWS), jnp.float32),
        h_BHZAPN=shape(states, jnp.bfloat16),
    )
    refs = refs._replace(weights=refs.weights._replace(skip_H=None))
    how = {"slots": bwd.Slots(chunk=2), "query": True, "rows": 1}
    return bwd.call(_kernel, name="mamba3_mosaic_query_gradient", refs=refs, out=out, tile=tile, **how)


def _kernel(program: bwd.GradientProgram):
    refs, out, sizes, interpret = program.refs, program.out, program.sizes, program.interpret
    chunks, slots = sizes.chunks, program.slots.chunk
    head_arrived = load_head(refs.weights, program.head, program.shared.weights, program.barriers.head)
    first = program.turn(0)
    first.load_k(0)
    first.load_values(0)
    first.load_q(0)
    for index in range(min(slots, chunks)):
        program.turn(index).load_chunk(index)
    head_arrived()

    def chunk(program, index, h_PN):
        shared, barriers, weights = program.shared, program.barriers, program.shared.weights
        decay = program.decay()
        plgpu.barrier_wait(barriers.chunk)
        plgpu.barrier_wait(barriers.k)
        rotated_k_TN = program.rotation().apply(shared.k_TN, weights.k_bias_HRN)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's copies out of shared memory are done
        shared.h_PN[...] = h_PN.astype(jnp.bfloat16)
        k_TN = shared.rotated_k_TN
        k_TN[...] = rotated_k_TN
        plgpu.barrier_wait(barriers.values)
        x_ref = program.store_values(shared.v_QP, decay)
        pl.when(index + 1 < chunks)(lambda: program.load_k(index + 1))
        program.store_checkpoint(out.h_BHZAPN, index)

        def weighted(mixed):
            weight_TT = decay.weight_TT()
            dy_TP = load(shared.dy_TP, TILE, interpret).astype(jnp.float32) * down(decay.decay_from_start_T(), WIDTH)
            return (mixed() * weight_TT).astype(jnp.bfloat16), dy_TP.astype(jnp.bfloat16)

        mixed_TT, dy_TP = products([(ROWS, (shared.dy_TP, Transposed(x_ref)))], interpret, weighted)

        def rotated_back(dq, h):
            plgpu.barrier_wait(barriers.q)
            dq_TN = dq()
            rotation = program.rotation()
            q_TN = rotation.apply(shared.q_TN, weights.q_bias_HRN)
            shared.rows_XT.at[0][...] = jnp.sum(q_TN.astype(jnp.float32) * dq_TN, axis=1)
            return *rotation.inverse(dq_TN, q_TN), h()

        dq_sum = (sizes.d_state, (dy_TP, shared.h_PN), (mixed_TT, k_TN))
        h_sum = (h_PN * decay.chunk_decay(), (Transposed(shared.weighted_TP), k_TN))
        dq_TN, dphi_TS, h_PN = products([dq_sum, h_sum], interpret, rotated_back)
        plgpu.commit_smem()  # all products are done, and every warp has read q
        pl.when(index + 1 < chunks)(lambda: program.load_values(index + 1))
        pl.when(index + 1 < chunks)(lambda: program.load_q(index + 1))
        pl.when(index + slots < chunks)(lambda: program.load_chunk(index + slots))
        shared.rotated_k_TN[...] = dq_TN
        program.store_dphi(dphi_TS, out.dphi_BHLS, index)
        plgpu.commit_smem()
        program.store_rows(shared.rotated_k_TN, out.dq_BHLRN, index)
        plgpu.copy_smem_to_gmem(shared.rows_XT.at[0], out.incoming_BHCT.at[program.chunk_of_row(index)])
        return h_PN

    h_PN = load(refs.h_BHZPN.at[program.state], TILE, interpret, optimized=False)
    lax.fori_loop(0, chunks, lambda index, h_PN: chunk(program.turn(index), index, h_PN), h_PN)
    plgpu.wait_smem_to_gmem(0)
