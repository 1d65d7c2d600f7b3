"""The backward pass over states alone, for rows that go on over devices, in a Pallas Mosaic kernel for TPUs.

    dh before the chunk = e^(c_T) dh  +  sum_t e^(c_t) dy_t q_t^T

from the last chunk to the first, dh being the gradient of the state after the chunk. Without a norm, dy comes from the
gradient of the outputs and the gate alone; with one it needs y, which is computed again as in `scan_bwd`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ssm.mosaic_tpu import chunk as chunks
from pallas_kernels.ssm.mosaic_tpu.chunk import NN, Chunk, product, side_by_side
from pallas_kernels.ssm.mosaic_tpu.grid import BlockCarry, Constants, Grid, Operands
from pallas_kernels.ssm.mosaic_tpu.scan_bwd import BwdRefs, again_of


class StateScratch(NamedTuple):
    """What the kernel carries: dh from chunk to chunk, the rest over the blocks of heads of one chunk."""

    dh_WNX: jax.Array
    q_GNT: jax.Array
    k_GNT: jax.Array | None
    scalars_HXQ: jax.Array


def state_before(operands: Operands, constants: Constants, h_BCWNX, grid: Grid, *, do_BLX, dlast_BHPN):
    """Return dh_BHPN, the gradient of the state before the row, by a kernel that computes nothing else.

    Without a norm the gradient of y does not depend on y, and keys, values and states are not read.

    Args:
        dlast_BHPN: the gradient of the state after the row; None: 0. The others are as for `scan_bwd.backward`.
    """
    grid = dataclasses.replace(grid, only_states=True)
    operands = operands._replace(before=None)
    if operands.weights.norm_WRX is None:
        read = operands.weights._replace(k_bias_HRN=None, v_rank_WRX=None, skip_WRX=None)
        operands, h_BCWNX = operands._replace(k_BLY=None, v_BLX=None, weights=read), None
    dafter = BlockCarry(angle_BK1X=None, h_BHPN=dlast_BHPN)
    refs = BwdRefs(operands=operands, constants=constants, h_BCWNX=h_BCWNX, do_BLX=do_BLX, dafter=dafter)
    of_row = jax.ShapeDtypeStruct((grid.batch, grid.n_heads, grid.width, grid.d_state), jnp.float32)
    scratch = StateScratch(
        dh_WNX=grid.states(),
        q_GNT=grid.columns(),
        k_GNT=None if operands.k_BLY is None else grid.columns(),
        scalars_HXQ=grid.numbers(),
    )
    kernel, out = functools.partial(_state_kernel, grid=grid), BlockCarry(angle_BK1X=None, h_BHPN=of_row)
    return grid.call(kernel, "mamba3_tpu_states_back", refs, out=out, scratch=scratch).h_BHPN


def _state_kernel(refs: BwdRefs, out: BlockCarry, scratch: StateScratch, *, grid: Grid):
    step, block = pl.program_id(1), pl.program_id(2)
    order_MN = refs.constants.order_MN

    @pl.when(step == 0)
    def _():
        chunks.load_states(scratch.dh_WNX, refs.dafter.h_BHPN, order_MN, block=block, grid=grid)

    chunk = chunks.load(refs, scratch, block, grid)
    for pack in range(grid.packs):
        index, decays = block * grid.packs + pack, [chunk.decays[head] for head in grid.heads_of(pack)]
        queries, dy_TX = _read(pack, chunk, refs=refs, scratch=scratch)
        weighted = [chunks.weighted(q, decay.from_start_1Q, grid) for q, decay in zip(queries, decays, strict=True)]
        added_NX = side_by_side([product(q_NT, dy_TX, NN, grid) for q_NT in weighted], grid.width)
        chunk_decay_1X = side_by_side([decay.chunk_decay() for decay in decays], grid.width)
        scratch.dh_WNX[index] = chunk_decay_1X * scratch.dh_WNX[index] + added_NX

    @pl.when(step == grid.last)
    def _():
        chunks.store_states(out.h_BHPN, scratch.dh_WNX, order_MN, block=block, grid=grid)


def _read(pack: int, chunk: Chunk, *, refs: BwdRefs, scratch: StateScratch):
    """Return the queries of a pack's heads, biased and rotated, and the gradient of y."""
    grid, operands, heads = chunk.grid, refs.operands, chunk.grid.heads_of(pack)
    of_pack, weights = grid.lanes_of_pack(pack), chunks.epilogue_weights(operands.weights, pack)
    if weights.norm_WRX is None:
        queries = [chunks.queries_and_keys(refs, scratch, chunk, head)[0] for head in heads]
        x_TX, y_TX = None, jnp.zeros((grid.rows, grid.lanes), jnp.float32)
    else:
        again = again_of(pack, chunk, refs=refs, scratch=scratch)
        queries, x_TX, y_TX = [q_NT for q_NT, _ in again.rotated], again.x_TX, again.y_TX
    gate_QX = None if operands.gate_BLX is None else operands.gate_BLX[:, of_pack].astype(jnp.float32)
    _, pull = jax.vjp(lambda y_TX: chunks.epilogue(y_TX, x_TX, gate_QX, weights, grid=grid), y_TX)
    (dy_TX,) = pull(refs.do_BLX[:, of_pack].astype(jnp.float32))
    return queries, dy_TX
