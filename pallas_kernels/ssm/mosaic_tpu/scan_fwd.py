"""Bias, rotation, chunked scan, skip, norm and gate in one Pallas Mosaic kernel for TPUs, forward.

    y_t = sum_{s < t} e^(c_t - c_s) kappa_s (q_t . k_s) x_s  +  gamma_t (q_t . k_t) x_t  +  e^(c_t) h_0 q_t
    h_T = sum_s e^(c_T - c_s) kappa_s x_s k_s^T  +  e^(c_T) h_0
    o_t = sum over ranks of out_rank norm(y_t + D x_t) silu(gate gate_rank)

within a chunk. c is the sum of log_a from its first token on, h_0 and h_T the states before and after it; q and k are
biased and rotated as they are read. Between chunks the states wait in VMEM.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ssm.mosaic_tpu import chunk as chunks
from pallas_kernels.ssm.mosaic_tpu.chunk import NN, product, ranks, side_by_side
from pallas_kernels.ssm.mosaic_tpu.grid import BlockCarry, Constants, Grid, Operands, PackedWeights


class ScanRefs(NamedTuple):
    """What the kernel reads."""

    operands: Operands  # without `before`
    constants: Constants
    before: BlockCarry  # its angle is None: `constants` has it


class ScanOutputs(NamedTuple):
    """What the kernel writes."""

    o_BLX: jax.Array | None  # like v; None: without queries
    after: BlockCarry  # its angle is None
    h_BCWNX: jax.Array | None  # states before every chunk, in the dtype of products: a residual of the backward pass


class ScanScratch(NamedTuple):
    """What the kernel carries: states from chunk to chunk, the rest over the blocks of heads of one chunk."""

    h_WNX: jax.Array
    q_GNT: jax.Array | None
    k_GNT: jax.Array
    scalars_HXQ: jax.Array


def state_after(operands: Operands, constants: Constants, grid: Grid):
    """Return h_BHPN, the state after the row, by the kernel without queries: it reads less and computes no outputs."""
    read = PackedWeights(**dict.fromkeys(PackedWeights._fields))
    read = read._replace(k_bias_HRN=operands.weights.k_bias_HRN, v_rank_WRX=operands.weights.v_rank_WRX)
    operands = operands._replace(q_BLY=None, gate_BLX=None, weights=read)
    return forward(operands, constants, dataclasses.replace(grid, only_states=True), residuals=False).after.h_BHPN


def forward(operands: Operands, constants: Constants, grid: Grid, *, residuals: bool) -> ScanOutputs:
    """Run the kernel; the states before every chunk are None unless they are wanted as `residuals`."""
    before = BlockCarry(angle_BK1X=None, h_BHPN=None if operands.before is None else operands.before.h_BHPN)
    refs = ScanRefs(operands=operands._replace(before=None), constants=constants, before=before)
    states, of_row = grid.states(), (grid.batch, grid.n_heads, grid.width, grid.d_state)
    out = ScanOutputs(
        o_BLX=None if grid.only_states else jax.ShapeDtypeStruct(operands.v_BLX.shape, operands.v_BLX.dtype),
        after=BlockCarry(angle_BK1X=None, h_BHPN=jax.ShapeDtypeStruct(of_row, jnp.float32)),
        h_BCWNX=jax.ShapeDtypeStruct((grid.batch, grid.chunks, *states.shape), grid.dtype) if residuals else None,
    )
    q_GNT, name = (None, "mamba3_tpu_states") if grid.only_states else (grid.columns(), "mamba3_tpu_scan")
    scratch = ScanScratch(h_WNX=states, q_GNT=q_GNT, k_GNT=grid.columns(), scalars_HXQ=grid.numbers())
    return grid.call(functools.partial(_kernel, grid=grid), name, refs, out=out, scratch=scratch)


def _kernel(refs: ScanRefs, out: ScanOutputs, scratch: ScanScratch, *, grid: Grid):
    step, block = pl.program_id(1), pl.program_id(2)
    operands, order_MN, first = refs.operands, refs.constants.order_MN, block * grid.packs
    weights, h_WNX = operands.weights, scratch.h_WNX

    @pl.when(step == 0)
    def _():
        chunks.load_states(h_WNX, refs.before.h_BHPN, order_MN, block=block, grid=grid)

    if out.h_BCWNX is not None:
        out.h_BCWNX[...] = h_WNX[pl.ds(first, grid.packs)].astype(grid.dtype)
    chunk = chunks.load(refs, scratch, block, grid)
    for pack in range(grid.packs):
        heads, of_pack = grid.heads_of(pack), grid.lanes_of_pack(pack)
        decays = [chunk.decays[head] for head in heads]
        by_head = lambda values: side_by_side(values, grid.width)  # noqa: E731
        x_TX = operands.v_BLX[:, of_pack].astype(jnp.float32)
        if weights.v_rank_WRX is not None:
            x_TX = chunks.per_rank(x_TX, weights.v_rank_WRX[pack])
        h_NX = h_WNX[first + pack]

        within, before, after = [], [], []
        for head, decay in zip(heads, decays, strict=True):
            q_NT, k_NT = chunks.queries_and_keys(refs, scratch, chunk, head)
            if not grid.only_states:
                q_TN = q_NT.astype(grid.dtype).T
                weight_TT = ranks(ranks(decay.weight_QQ(chunk.masks), grid.rank, 0), grid.rank, 1)
                mixed_TT = product(q_TN, k_NT, NN, grid) * weight_TT
                within.append(product(mixed_TT, x_TX, NN, grid))
                before.append(product(q_TN, h_NX, NN, grid))
            after.append(product(chunks.weighted(k_NT, decay.at_end_1Q(), grid), x_TX, NN, grid))
        h_WNX[first + pack] = by_head([decay.chunk_decay() for decay in decays]) * h_NX + by_head(after)
        if grid.only_states:
            continue
        from_start_TX = by_head([ranks(decay.from_start_Q1, grid.rank) for decay in decays])
        y_TX = by_head(within) + from_start_TX * by_head(before)

        gate_QX = None if operands.gate_BLX is None else operands.gate_BLX[:, of_pack].astype(jnp.float32)
        o_QX = chunks.epilogue(y_TX, x_TX, gate_QX, chunks.epilogue_weights(weights, pack), grid=grid)
        out.o_BLX[:, of_pack] = o_QX.astype(out.o_BLX.dtype)

    @pl.when(step == grid.last)
    def _():
        chunks.store_states(out.after.h_BHPN, h_WNX, order_MN, block=block, grid=grid)
