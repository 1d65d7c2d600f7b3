"""The gradients of the chunked scan with its rotation and its epilogue, in one Pallas Mosaic kernel for TPUs.

The kernel goes from the last chunk to the first. It carries dh, the gradient of the state after the chunk, in VMEM,
reads h, the state before the chunk, and computes the rest again. With P_ts the decay e^(c_t - c_s), S = q k^T, M = dy
x^T, x' = kappa x and weight_ts = P_ts kappa_s, or gamma_t where s = t:

    dq_t = sum_s weight_ts M_ts k_s  +  e^(c_t) h^T dy_t
    dk_s = sum_t weight_ts M_ts q_t  +  e^(c_T - c_s) dh^T x'_s
    dx_s = sum_t weight_ts S_ts dy_t +  e^(c_T - c_s) kappa_s dh k_s  +  D dy_s
    dgamma_s = M_ss S_ss,   dkappa_s = sum_{t > s} P_ts M_ts S_ts  +  e^(c_T - c_s) x_s . dh k_s
    dc_t = sum_{s < t} weight_ts M_ts S_ts  +  e^(c_t) dy_t . h q_t  -  kappa_t dkappa_t
    dh before the chunk = e^(c_T) dh  +  sum_t e^(c_t) dy_t q_t^T

and dc_T also has what crosses the end of the chunk: e^(c_T) <dh, h> + sum_s e^(c_T - c_s) x'_s . dh k_s.

The inverse rotation gives the gradients of queries and keys. The angle of a rotary pair (u, w) has the gradient dphi =
dw u - du w, and a token's increment of the angle has the sum of dphi from this token on.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.mosaic_tpu import chunk as chunks
from pallas_kernels.ssm.mosaic_tpu.chunk import (
    NN,
    NT,
    TN,
    Chunk,
    Masks,
    alone,
    of_ranks,
    over_ranks,
    product,
    ranks,
    side_by_side,
)
from pallas_kernels.ssm.mosaic_tpu.grid import BlockCarry, Constants, Grid, Operands, PackedWeights
from pallas_kernels.ssm.operands import STEEPEST


class BwdRefs(NamedTuple):
    """What the kernels read."""

    operands: Operands  # without `before`
    constants: Constants
    h_BCWNX: jax.Array | None  # the state before every chunk; None: the pass over states does not need it
    do_BLX: jax.Array
    dafter: BlockCarry  # None in it: 0


class BwdScratch(NamedTuple):
    """What the kernel carries: dh, dphi and dweights over chunks, the rest over the blocks of heads of one chunk."""

    dh_WNX: jax.Array
    dphi_KX1: jax.Array | None  # None: nothing rotates
    q_GNT: jax.Array
    k_GNT: jax.Array
    dq_GNT: jax.Array
    dk_GNT: jax.Array
    dangle_XQ: jax.Array | None  # the angle's gradient, whose sum is over the blocks of heads that share it
    scalars_HXQ: jax.Array
    dc_HQ: jax.Array  # the gradient of the decay of all heads in a chunk
    dweights: PackedWeights


class Again(NamedTuple):
    """What the forward pass computed of a pack of heads in a chunk; lists have one entry a head."""

    v_QX: jax.Array
    x_TX: jax.Array
    h_NX: jax.Array
    rotated: list  # queries and keys
    scores: list
    weight_of_pairs: list
    from_start_TX: jax.Array
    read_TX: jax.Array  # h q
    y_TX: jax.Array


class Head(NamedTuple):
    """Gradients of a head in a chunk, until all heads have theirs; dc and dkappa are each the sum of column and row."""

    dphi_SQ: jax.Array | None
    dc_Q1: jax.Array
    dkappa_Q1: jax.Array
    dc_1Q: jax.Array
    dgamma_1Q: jax.Array
    dkappa_1Q: jax.Array


def backward(operands: Operands, constants: Constants, h_BCWNX, grid: Grid, *, do_BLX, dafter: BlockCarry) -> Operands:
    """Run the kernel and return the gradients of the operands.

    Args:
        h_BCWNX: the state before every chunk, as `scan_fwd.forward` gives it.
        do_BLX: the gradient of the output.
        dafter: that of what comes after the row; None in it: 0.
    """
    refs = BwdRefs(
        operands=operands._replace(before=None),
        constants=constants,
        h_BCWNX=h_BCWNX,
        do_BLX=do_BLX,
        dafter=dafter,
    )
    out = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), operands)
    of_rows = lambda array: jax.ShapeDtypeStruct((grid.batch, *array.shape), jnp.float32)  # noqa: E731
    out = out._replace(weights=jax.tree.map(of_rows, operands.weights))
    vmem = lambda *sizes: pltpu.VMEM(sizes, jnp.float32) if all(sizes) else None  # noqa: E731
    of_angles = grid.heads * grid.pairs  # 0: nothing rotates
    scratch = BwdScratch(
        dh_WNX=grid.states(),
        dphi_KX1=vmem(grid.blocks, of_angles, 1),
        q_GNT=grid.columns(),
        k_GNT=grid.columns(),
        dq_GNT=grid.columns(),
        dk_GNT=grid.columns(),
        dangle_XQ=vmem(of_angles, grid.tokens),
        scalars_HXQ=grid.numbers(),
        dc_HQ=vmem(grid.n_heads, grid.tokens),
        dweights=jax.tree.map(lambda array: vmem(*array.shape), operands.weights),
    )
    kernel, name = functools.partial(_kernel, grid=grid), "mamba3_tpu_scan_back"
    d = grid.call(kernel, name, refs, out=out, scratch=scratch)
    return d._replace(weights=jax.tree.map(lambda dweight: jnp.sum(dweight, axis=0), d.weights))


def _kernel(refs: BwdRefs, out: Operands, scratch: BwdScratch, *, grid: Grid):
    step, block = pl.program_id(1), pl.program_id(2)
    operands, constants = refs.operands, refs.constants
    of_block = lambda ref: pl.ds(block * ref.shape[0], ref.shape[0])  # noqa: E731  # of heads, or of packs

    @pl.when(step == 0)
    def _():
        chunks.load_states(scratch.dh_WNX, refs.dafter.h_BHPN, constants.order_MN, block=block, grid=grid)
        if grid.pairs:
            dphi_ref, zeros_X1 = refs.dafter.angle_BK1X, jnp.zeros(scratch.dphi_KX1.shape[1:], jnp.float32)
            scratch.dphi_KX1[block] = zeros_X1 if dphi_ref is None else dphi_ref[...].T

        def clear(ref, sum_ref):
            sum_ref[of_block(ref)] = jnp.zeros(ref.shape, jnp.float32)

        jax.tree.map(clear, out.weights, scratch.dweights)

    of_group = grid.of_group(block)

    @pl.when(of_group == 0)
    def _():
        for sum_ref in (scratch.dq_GNT, scratch.dk_GNT):
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    chunk, found = chunks.load(refs, scratch, block, grid), []
    for pack in range(grid.packs):
        found += _pack(pack, chunk, refs=refs, out=out, scratch=scratch)
    if grid.pairs:
        dphi_XQ = jnp.concatenate([one.dphi_SQ for one in found], axis=0)
        for head, ddt_1Q in enumerate(_angles(dphi_XQ, chunk, refs=refs, out=out, scratch=scratch)):
            out.dt_BHL[pl.ds(block * grid.heads + head, 1)] = ddt_1Q
    for head, one in enumerate(found):
        columns_XQ = jnp.concatenate([one.dc_Q1, one.dkappa_Q1], axis=1).T
        row, dkappa_1Q = pl.ds(block * grid.heads + head, 1), columns_XQ[1:] + one.dkappa_1Q
        if out.kappa_BHL is None:
            out.gamma_BHL[row] = one.dgamma_1Q + dkappa_1Q
        else:
            out.gamma_BHL[row], out.kappa_BHL[row] = one.dgamma_1Q, dkappa_1Q
        scratch.dc_HQ[row] = columns_XQ[:1] + one.dc_1Q

    @pl.when(block == grid.blocks - 1)
    def _():
        within_QQ = Masks.load(constants.document_BC1Q, grid).within_QQ.astype(jnp.float32)
        dlog_a_HQ = product(scratch.dc_HQ[...], within_QQ, NN, grid, dtype=jnp.float32)
        out.log_a_BHL[...] = jnp.where(operands.log_a_BHL[...] > STEEPEST, dlog_a_HQ, 0.0)

    @pl.when(of_group == grid.blocks_a_group - 1)
    def _():
        for ref, sum_ref in ((out.q_BLY, scratch.dq_GNT), (out.k_BLY, scratch.dk_GNT)):
            for group in range(grid.groups_a_block):
                for r, dx_NQ in enumerate(of_ranks(sum_ref[group], grid.rank, 1)):
                    dx_QN = chunks.outwards(dx_NQ.astype(ref.dtype), constants.order_MN, grid)
                    ref[:, grid.lanes_of(group, r)] = dx_QN.astype(ref.dtype)

    @pl.when(step == grid.last)
    def _():
        if out.before is not None:
            chunks.store_states(out.before.h_BHPN, scratch.dh_WNX, constants.order_MN, block=block, grid=grid)
            if out.before.angle_BK1X is not None:
                out.before.angle_BK1X[...] = scratch.dphi_KX1[block].T

        def store(ref, sum_ref):
            ref[...] = sum_ref[of_block(ref)]

        jax.tree.map(store, out.weights, scratch.dweights)


def again_of(pack: int, chunk: Chunk, *, refs: BwdRefs, scratch) -> Again:
    """Compute what the forward pass computed of a pack of heads, up to the epilogue."""
    operands, grid, rank, v_rank_WRX = refs.operands, chunk.grid, chunk.grid.rank, refs.operands.weights.v_rank_WRX
    by_head = lambda values: side_by_side(values, grid.width)  # noqa: E731
    v_QX = operands.v_BLX[:, grid.lanes_of_pack(pack)].astype(jnp.float32)
    x_TX = v_QX if v_rank_WRX is None else chunks.per_rank(v_QX, v_rank_WRX[pack])
    h_NX = refs.h_BCWNX[pack].astype(jnp.float32)
    rotated, scores, weight_of_pairs, reads, within = [], [], [], [], []
    for head in grid.heads_of(pack):
        # In the dtype of products, so that what pairs of a chunk give to the angle cancels in its sum over the row.
        q_NT, k_NT = (x_NT.astype(grid.dtype) for x_NT in chunks.queries_and_keys(refs, scratch, chunk, head))
        q_TN = q_NT.T
        rotated.append((q_NT, k_NT))
        scores.append(product(q_TN, k_NT, NN, grid))
        weight_of_pairs.append(ranks(ranks(chunk.decays[head].weight_QQ(chunk.masks), rank, 0), rank, 1))
        reads.append(product(q_TN, h_NX, NN, grid))
        within.append(product(scores[-1] * weight_of_pairs[-1], x_TX, NN, grid))
    read_TX = by_head(reads)
    from_start_TX = by_head([ranks(chunk.decays[head].from_start_Q1, rank) for head in grid.heads_of(pack)])
    return Again(
        v_QX=v_QX,
        x_TX=x_TX,
        h_NX=h_NX,
        rotated=rotated,
        scores=scores,
        weight_of_pairs=weight_of_pairs,
        from_start_TX=from_start_TX,
        read_TX=read_TX,
        y_TX=by_head(within) + from_start_TX * read_TX,
    )


def _pack(pack: int, chunk: Chunk, *, refs: BwdRefs, out: Operands, scratch: BwdScratch) -> list[Head]:
    """Compute the gradients of a pack of heads, all but those of the angles."""
    operands, grid, block, masks = refs.operands, chunk.grid, chunk.block, chunk.masks
    rank, weights = grid.rank, operands.weights
    heads, of_pack, index = grid.heads_of(pack), grid.lanes_of_pack(pack), block * grid.packs + pack
    decays, rotations = ([of_heads[head] for head in heads] for of_heads in (chunk.decays, chunk.rotations))
    by_head = lambda values: side_by_side(values, grid.width)  # noqa: E731
    # What a token weighs in the state after the chunk.
    at_end = [decay.to_end_Q1 * decay.later_Q1 for decay in decays]
    at_end_TX = by_head([ranks(at_end_Q1, rank) for at_end_Q1 in at_end])
    again = again_of(pack, chunk, refs=refs, scratch=scratch)
    h_NX, dh_NX = again.h_NX, scratch.dh_WNX[index]
    v_QX, x_TX, from_start_TX, read_TX = again.v_QX, again.x_TX, again.from_start_TX, again.read_TX
    gate_QX = None if operands.gate_BLX is None else operands.gate_BLX[:, of_pack].astype(jnp.float32)
    of_epilogue = functools.partial(chunks.epilogue, grid=grid)
    _, pull = jax.vjp(of_epilogue, again.y_TX, x_TX, gate_QX, chunks.epilogue_weights(weights, pack))
    dy_TX, dx_TX, dgate_QX, depilogue = pull(refs.do_BLX[:, of_pack].astype(jnp.float32))
    if dgate_QX is not None:
        out.gate_BLX[:, of_pack] = dgate_QX.astype(out.gate_BLX.dtype)

    of_start_dy_TX, at_end_x_TX = from_start_TX * dy_TX, at_end_TX * x_TX
    of_pairs, dqs, dks, dxs, laters, dhs = [], [], [], [], [], []
    for place, (q_NT, k_NT) in enumerate(again.rotated):
        decay, score_TT, weight_TT = decays[place], again.scores[place], again.weight_of_pairs[place]
        dmixed_TT = product(alone(dy_TX, place, grid), x_TX, NT, grid)
        dscore_TT = dmixed_TT * weight_TT
        dqs.append(product(k_NT, dscore_TT, NT, grid) + product(alone(h_NX, place, grid), of_start_dy_TX, NT, grid))
        dks.append(product(q_NT, dscore_TT, NN, grid) + product(alone(dh_NX, place, grid), at_end_x_TX, NT, grid))
        dxs.append(product(score_TT * weight_TT, dy_TX, TN, grid))
        laters.append(product(k_NT.T, dh_NX, NN, grid))
        dhs.append(product(q_NT, of_start_dy_TX, NN, grid))

        both_QQ = over_ranks(over_ranks(dmixed_TT * score_TT, rank), rank, 1)
        pairs_QQ = jnp.where(masks.diagonal_QQ, 0.0, both_QQ) * decay.within_QQ
        dgamma_1Q = jnp.sum(jnp.where(masks.diagonal_QQ, both_QQ, 0.0), axis=0, keepdims=True)
        dkappa_1Q = jnp.sum(pairs_QQ, axis=0, keepdims=True)
        dc_Q1 = jnp.sum(pairs_QQ * decay.later_1Q, axis=1, keepdims=True)
        of_pairs.append((dgamma_1Q, dkappa_1Q, dc_Q1))
    later_TX, chunk_decay_1X = by_head(laters), by_head([decay.chunk_decay() for decay in decays])
    dx_TX += by_head(dxs) + at_end_TX * later_TX
    scratch.dh_WNX[index] = chunk_decay_1X * dh_NX + by_head(dhs)

    dv_QX, dv_rank_RX = dx_TX, None
    if weights.v_rank_WRX is not None:
        v_rank_RX, by_rank = weights.v_rank_WRX[pack], of_ranks(dx_TX, rank)
        dv_QX = sum(dx_QX * v_rank_RX[r : r + 1] for r, dx_QX in enumerate(by_rank))
        dv_rank_RX = jnp.concatenate([jnp.sum(dx_QX * v_QX, axis=0, keepdims=True) for dx_QX in by_rank], axis=0)
    out.v_BLX[:, of_pack] = dv_QX.astype(out.v_BLX.dtype)

    def add(sum_ref, more):
        sum_ref[index] += more

    sums = scratch.dweights._replace(q_bias_HRN=None, k_bias_HRN=None)
    jax.tree.map(add, sums, depilogue._replace(v_rank_WRX=dv_rank_RX))

    outgoing_TX, incoming_TX = over_ranks(x_TX * later_TX, rank), over_ranks(of_start_dy_TX * read_TX, rank)
    inner_1X = jnp.sum(dh_NX * h_NX, axis=0, keepdims=True) * chunk_decay_1X  # e^(c_T) <dh, h>
    found = []
    for place, head in enumerate(heads):
        decay, (dgamma_1Q, dkappa_1Q, dc_Q1) = decays[place], of_pairs[place]
        outgoing_Q1, incoming_Q1, end_11 = (
            jnp.sum(alone(x, place, grid), axis=1, keepdims=True) for x in (outgoing_TX, incoming_TX, inner_1X)
        )
        dc_Q1 += incoming_Q1 - at_end[place] * outgoing_Q1
        end_11 += jnp.sum(at_end[place] * outgoing_Q1, axis=0, keepdims=True)
        token_1Q = lax.broadcasted_iota(jnp.int32, dkappa_1Q.shape, 1)
        dc_1Q = jnp.where(token_1Q == grid.tokens - 1, end_11, 0.0) - decay.later_1Q * dkappa_1Q
        gradients = (dqs[place], dks[place])
        dphi_SQ = None
        if grid.pairs:
            dphi_SQ = _dphi(rotations[place], gradients, again.rotated[place], rank)
        _add_queries_and_keys(gradients, head, chunk, scratch)
        found.append(
            Head(
                dphi_SQ=dphi_SQ,
                dc_Q1=dc_Q1,
                dkappa_Q1=decay.to_end_Q1 * outgoing_Q1,
                dc_1Q=dc_1Q,
                dgamma_1Q=dgamma_1Q,
                dkappa_1Q=dkappa_1Q,
            )
        )
    return found


def _dphi(rotation: chunks.Rotation, gradients, rotated, rank: int):
    """Return the gradient of a head's angles from those of its rotated queries and keys."""
    dphi_ST = 0.0
    for dx_NT, x_NT in zip(gradients, rotated, strict=True):
        (du_ST, dw_ST), (u_ST, w_ST) = rotation.pair(dx_NT), rotation.pair(x_NT.astype(jnp.float32))
        dphi_ST += dw_ST * u_ST - du_ST * w_ST
    return over_ranks(dphi_ST, rank, 1)


def _add_queries_and_keys(gradients, head: int, chunk: Chunk, scratch: BwdScratch) -> None:
    """Add a head's gradients of rotated queries and keys to the sums of its group, and to those of its biases."""
    grid, rotation, biases = chunk.grid, chunk.rotations[head], []
    sums = ((scratch.dq_GNT, scratch.dweights.q_bias_HRN), (scratch.dk_GNT, scratch.dweights.k_bias_HRN))
    for dx_NT, (sum_ref, bias_ref) in zip(gradients, sums, strict=True):
        dx_NT = dx_NT if rotation is None else rotation.inverse(dx_NT)
        sum_ref[grid.group_of(head)] += dx_NT
        if bias_ref is not None:
            by_rank = [jnp.sum(dx_NQ, axis=1, keepdims=True) for dx_NQ in of_ranks(dx_NT, grid.rank, 1)]
            biases.append((bias_ref, by_rank))
    if biases:  # one transpose for both
        both_RN = jnp.concatenate([x_N1 for _, by_rank in biases for x_N1 in by_rank], axis=1).T
        for (bias_ref, _), more_RN in zip(biases, of_ranks(both_RN, len(biases)), strict=True):
            bias_ref[chunk.block * grid.heads + head] += more_RN


def _angles(dphi_XQ, chunk: Chunk, *, refs: BwdRefs, out: Operands, scratch: BwdScratch) -> list:
    """Store the angle's gradient; return dt's, of every head (1, Q)."""
    grid, block, masks = chunk.grid, chunk.block, chunk.masks
    within_QQ = masks.within_QQ.astype(jnp.float32)
    if grid.dtype == jnp.float32:
        suffix_XQ = product(dphi_XQ, within_QQ, NN, grid)
    else:  # two roundings, not one
        high_XQ = dphi_XQ.astype(jnp.bfloat16).astype(jnp.float32)
        suffix_XQ = product(jnp.concatenate([high_XQ, dphi_XQ - high_XQ], axis=0), within_QQ, NN, grid)
        suffix_XQ = sum(jnp.split(suffix_XQ, 2, axis=0))
    carried_X1 = scratch.dphi_KX1[block]
    if masks.reaches_1Q is None:
        suffix_XQ += carried_X1
        scratch.dphi_KX1[block] = suffix_XQ[:, :1]
    else:
        suffix_XQ += jnp.where(masks.reaches_1Q, carried_X1, 0.0)
        scratch.dphi_KX1[block] = jnp.where(masks.continues_1Q[:, :1], suffix_XQ[:, :1], 0.0)
    dangle_XQ = suffix_XQ * chunks.dt_of_pairs(chunk.decays, grid)
    first, last = (block == 0, block == grid.blocks - 1) if grid.shared_angle else (True, True)
    scratch.dangle_XQ[...] = dangle_XQ + jnp.where(first, 0.0, scratch.dangle_XQ[...])

    @pl.when(last)
    def _():
        dangle_HSQ = jnp.split(scratch.dangle_XQ[...], grid.heads, axis=0)
        for head, dangle_SQ in enumerate([sum(dangle_HSQ)] if grid.shared_angle else dangle_HSQ):
            out.angle_BHSL[head] = dangle_SQ

    ddt_XQ = suffix_XQ * chunks.angles(refs, grid)
    return [jnp.sum(ddt_SQ, axis=0, keepdims=True) for ddt_SQ in jnp.split(ddt_XQ, grid.heads, axis=0)]
