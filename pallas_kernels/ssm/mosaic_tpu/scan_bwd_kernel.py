"""The gradients of the chunked scan with its rotation and its end, for a block of heads: `kernel`.

From the last chunk to the first, with the gradient dh of the state after the chunk carried in VMEM and the state h
before it read: the rest is recomputed. With P_ts the decay e^(c_t - c_s), S = q k^T, M = dy x^T, x' = kappa x and
weight_ts = P_ts kappa_s, or gamma_t where s = t:

    dq_t = sum_s weight_ts M_ts k_s  +  e^(c_t) h^T dy_t
    dk_s = sum_t weight_ts M_ts q_t  +  e^(c_T - c_s) dh^T x'_s
    dx_s = sum_t weight_ts S_ts dy_t +  e^(c_T - c_s) kappa_s dh k_s  +  D dy_s
    dgamma_s = M_ss S_ss,   dkappa_s = sum_{t > s} P_ts M_ts S_ts  +  e^(c_T - c_s) x_s . dh k_s
    dc_t = sum_{s < t} weight_ts M_ts S_ts  +  e^(c_t) dy_t . h q_t  -  kappa_t dkappa_t
    dh before the chunk = e^(c_T) dh  +  sum_t e^(c_t) dy_t q_t^T

and dc_T has what crosses the end of the chunk as well: e^(c_T) <dh, h> + sum_s e^(c_T - c_s) x'_s . dh k_s.

The gradients of queries and keys are turned back; the angle of a plane (u, w) gets dphi = dw u - du w, and what a token
adds to the angle the sum of dphi from it on.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ssm.mosaic_tpu import parts
from pallas_kernels.ssm.mosaic_tpu.contract import Grid, Refs
from pallas_kernels.ssm.mosaic_tpu.parts import (
    NN,
    NT,
    TN,
    Decay,
    Ends,
    Masks,
    alone,
    of_ranks,
    over_ranks,
    product,
    ranks,
    side_by_side,
)


class Back(NamedTuple):
    """What the backward pass reads."""

    inputs: Refs
    do_BLX: jax.Array
    dh_BHPN: jax.Array | None  # of the state after the row; None: 0
    dphi_BKX: jax.Array | None  # of the angle after it; (.., 1, J S)


class Gradients(NamedTuple):
    q_BLX: jax.Array
    k_BLX: jax.Array
    v_BLX: jax.Array
    gate_BLX: jax.Array | None
    angle_BHSL: jax.Array | None
    dt_BHL: jax.Array | None  # through the angle
    log_a_BHL: jax.Array
    gamma_BHL: jax.Array
    kappa_BHL: jax.Array | None  # None: all of it is gamma's
    dh_BHPN: jax.Array | None  # of the state before the row; None: there is none
    dphi_BKX: jax.Array | None  # of the angle before it
    weights: dict  # (B, ..), of the weights that there are, by their names in `Refs`


class Scratch(NamedTuple):
    """What is carried: dh, dphi and weights over chunks, the rest over the blocks of heads of one."""

    dh_WNX: jax.Array
    dphi_KX1: jax.Array | None  # None: nothing turns
    q_GNT: jax.Array
    k_GNT: jax.Array
    dq_GNT: jax.Array
    dk_GNT: jax.Array
    dangle_XQ: jax.Array | None  # the angle's gradient, whose sum is over the blocks of heads that share it
    scalars_HXQ: jax.Array
    dc_HQ: jax.Array  # the gradient of the decay of all heads in a chunk
    weights: dict


class Head(NamedTuple):
    """The gradients of a head in a chunk that wait for those of the others."""

    dphi_SQ: jax.Array | None
    columns: list  # Q1: dc and dkappa but for what is in the rows
    rows: list  # 1Q: dc, dgamma and dkappa


def kernel(refs: Back, out: Gradients, scratch: Scratch, *, grid: Grid):
    step, block = pl.program_id(1), pl.program_id(2)
    inputs = refs.inputs
    # Of heads, or of packs.
    places = {name: pl.ds(block * ref.shape[0], ref.shape[0]) for name, ref in out.weights.items()}

    @pl.when(step == 0)
    def _():
        parts.load_states(scratch.dh_WNX, refs.dh_BHPN, block, inputs.order_MN, grid)
        if grid.planes:
            none_X1 = jnp.zeros(scratch.dphi_KX1.shape[1:], jnp.float32)
            scratch.dphi_KX1[block] = none_X1 if refs.dphi_BKX is None else refs.dphi_BKX[...].T
        for name, sum_ref in scratch.weights.items():
            sum_ref[places[name]] = jnp.zeros((places[name].size, *sum_ref.shape[1:]), jnp.float32)

    of_group = grid.of_group(block)

    @pl.when(of_group == 0)
    def _():
        for sum_ref in (scratch.dq_GNT, scratch.dk_GNT):
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    parts.load_groups(scratch.q_GNT, scratch.k_GNT, inputs, block, grid)
    parts.load_numbers(scratch.scalars_HXQ, inputs, block, grid)
    masks = Masks.load(inputs, grid)
    decays = [Decay.load(scratch.scalars_HXQ[block * grid.heads + head], masks, grid) for head in range(grid.heads)]
    turns = parts.turns(inputs, decays, masks, grid)
    done = []
    for pack in range(grid.packs):
        done += _pack(pack, block, turns, decays, masks, refs, out, scratch, grid)
    if grid.planes:
        dphi_XQ = jnp.concatenate([one.dphi_SQ for one in done], axis=0)
        for head, ddt_1Q in enumerate(_angles(dphi_XQ, block, decays, masks, refs, out, scratch, grid)):
            out.dt_BHL[pl.ds(block * grid.heads + head, 1)] = ddt_1Q
    for head, one in enumerate(done):
        columns_XQ = jnp.concatenate(one.columns, axis=1).T
        dc_1Q, dgamma_1Q, dkappa_1Q = one.rows
        row, dkappa_1Q = pl.ds(block * grid.heads + head, 1), columns_XQ[1:] + dkappa_1Q
        if out.kappa_BHL is None:
            out.gamma_BHL[row] = dgamma_1Q + dkappa_1Q
        else:
            out.gamma_BHL[row], out.kappa_BHL[row] = dgamma_1Q, dkappa_1Q
        scratch.dc_HQ[row] = columns_XQ[:1] + dc_1Q

    @pl.when(block == grid.blocks - 1)
    def _():
        within_QQ = Masks.load(inputs, grid).within_QQ.astype(jnp.float32)
        dlog_a_HQ = product(scratch.dc_HQ[...], within_QQ, NN, grid, jnp.float32)
        out.log_a_BHL[...] = jnp.where(inputs.log_a_BHL[...] > parts.STEEPEST, dlog_a_HQ, 0.0)

    @pl.when(of_group == grid.blocks_a_group - 1)
    def _():
        for ref, sum_ref in ((out.q_BLX, scratch.dq_GNT), (out.k_BLX, scratch.dk_GNT)):
            for group in range(grid.groups_a_block):
                for r, dx_NQ in enumerate(of_ranks(sum_ref[group], grid.rank, 1)):
                    dx_QN = parts.outwards(dx_NQ.astype(ref.dtype), inputs.order_MN, grid)
                    ref[:, grid.lanes_of(group, r)] = dx_QN.astype(ref.dtype)

    @pl.when(step == grid.chunks - 1)
    def _():
        if out.dh_BHPN is not None:
            parts.store_states(out.dh_BHPN, scratch.dh_WNX, block, inputs.order_MN, grid)
        if out.dphi_BKX is not None:
            out.dphi_BKX[...] = scratch.dphi_KX1[block].T
        for name, ref in out.weights.items():
            ref[...] = scratch.weights[name][places[name]]


def _pack(pack: int, block, turns, decays, masks: Masks, refs: Back, out, scratch: Scratch, grid: Grid) -> list:
    """A pack of heads: all but the angles."""
    inputs, rank, width = refs.inputs, grid.rank, grid.width
    heads, of_pack, index = grid.heads_of(pack), grid.lanes_of_pack(pack), block * grid.packs + pack
    by_head = lambda values: side_by_side(values, width)  # noqa: E731
    left = [decays[head].until_Q1 * decays[head].later_Q1 for head in heads]
    since_TX = by_head([ranks(decays[head].since_Q1, rank) for head in heads])
    left_TX = by_head([ranks(left_Q1, rank) for left_Q1 in left])
    v_QX = inputs.v_BLX[:, of_pack].astype(jnp.float32)
    x_TX = v_QX if inputs.v_rank_WRX is None else parts.per_rank(v_QX, inputs.v_rank_WRX[pack])
    gate_QX = None if inputs.gate_BLX is None else inputs.gate_BLX[:, of_pack].astype(jnp.float32)
    h_NX, dh_NX = inputs.h_BHPN[pack].astype(jnp.float32), scratch.dh_WNX[index]

    turned, scores, weights, reads, own = [], [], [], [], []
    for head in heads:
        # As products take them: so what pairs of a chunk give to the angle cancels where it adds up over the row.
        q_NT, k_NT = (
            parts.turned(x_GNT[grid.group_of(head)], bias_HRN, head, turns[head], grid)
            for x_GNT, bias_HRN in zip(
                (scratch.q_GNT, scratch.k_GNT), (inputs.q_bias_HRN, inputs.k_bias_HRN), strict=True
            )
        )
        q_TN = q_NT.T
        turned.append((q_NT, k_NT))
        scores.append(product(q_TN, k_NT, NN, grid))
        weights.append(ranks(ranks(decays[head].weight_QQ(masks), rank, 0), rank, 1))
        reads.append(product(q_TN, h_NX, NN, grid))
        own.append(product(scores[-1] * weights[-1], x_TX, NN, grid))
    read_TX = by_head(reads)
    y_TX = by_head(own) + since_TX * read_TX
    _, pull = jax.vjp(functools.partial(parts.finish, grid=grid), y_TX, x_TX, gate_QX, Ends.load(inputs, pack))
    dy_TX, dx_TX, dgate_QX, dends = pull(refs.do_BLX[:, of_pack].astype(jnp.float32))
    if dgate_QX is not None:
        out.gate_BLX[:, of_pack] = dgate_QX.astype(out.gate_BLX.dtype)

    since_dy_TX, left_x_TX = since_TX * dy_TX, left_TX * x_TX
    over_tokens, dqs, dks, dxs, laters, dhs = [], [], [], [], [], []
    for place, (q_NT, k_NT) in enumerate(turned):
        decay, score_TT, weight_TT = decays[heads[place]], scores[place], weights[place]
        dmixed_TT = product(alone(dy_TX, place, grid), x_TX, NT, grid)
        dscore_TT = dmixed_TT * weight_TT
        dqs.append(product(k_NT, dscore_TT, NT, grid) + product(alone(h_NX, place, grid), since_dy_TX, NT, grid))
        dks.append(product(q_NT, dscore_TT, NN, grid) + product(alone(dh_NX, place, grid), left_x_TX, NT, grid))
        dxs.append(product(score_TT * weight_TT, dy_TX, TN, grid))
        laters.append(product(k_NT.T, dh_NX, NN, grid))
        dhs.append(product(q_NT, since_dy_TX, NN, grid))

        both_QQ = over_ranks(over_ranks(dmixed_TT * score_TT, rank), rank, 1)
        pairs_QQ = jnp.where(masks.own_QQ, 0.0, both_QQ) * decay.within_QQ
        dgamma_1Q = jnp.sum(jnp.where(masks.own_QQ, both_QQ, 0.0), axis=0, keepdims=True)
        dkappa_1Q = jnp.sum(pairs_QQ, axis=0, keepdims=True)
        received_Q1 = jnp.sum(pairs_QQ * decay.later_1Q, axis=1, keepdims=True)
        over_tokens.append((dgamma_1Q, dkappa_1Q, received_Q1))
    later_TX, whole_1X = by_head(laters), by_head([decays[head].whole() for head in heads])
    dx_TX += by_head(dxs) + left_TX * later_TX
    scratch.dh_WNX[index] = whole_1X * dh_NX + by_head(dhs)

    dv_QX, dv_rank_RX = dx_TX, None
    if inputs.v_rank_WRX is not None:
        v_rank_RX, by_rank = inputs.v_rank_WRX[pack], of_ranks(dx_TX, rank)
        dv_QX = sum(dx_QX * v_rank_RX[r : r + 1] for r, dx_QX in enumerate(by_rank))
        dv_rank_RX = jnp.concatenate([jnp.sum(dx_QX * v_QX, axis=0, keepdims=True) for dx_QX in by_rank], axis=0)
    out.v_BLX[:, of_pack] = dv_QX.astype(out.v_BLX.dtype)
    of_pack_weights = {
        "skip_WRX": dends.skip_1X,
        "v_rank_WRX": dv_rank_RX,
        "gate_rank_WRX": dends.gate_rank_RX,
        "out_rank_WRX": dends.out_rank_RX,
        "norm_WRX": dends.norm_1X,
    }
    for name, more in of_pack_weights.items():
        if more is not None:
            scratch.weights[name][index] += more

    gave_TX, received_TX = over_ranks(x_TX * later_TX, rank), over_ranks(since_dy_TX * read_TX, rank)
    crossing_1X = jnp.sum(dh_NX * h_NX, axis=0, keepdims=True) * whole_1X
    done = []
    for place, head in enumerate(heads):
        decay, turn, (q_NT, k_NT) = decays[head], turns[head], turned[place]
        dgamma_1Q, dkappa_1Q, received_Q1 = over_tokens[place]
        gave_Q1, of_h_Q1, crossing_11 = (
            jnp.sum(alone(x, place, grid), axis=1, keepdims=True) for x in (gave_TX, received_TX, crossing_1X)
        )
        received_Q1 += of_h_Q1 - left[place] * gave_Q1
        crossing_11 += jnp.sum(left[place] * gave_Q1, axis=0, keepdims=True)
        token_1Q = lax.broadcasted_iota(jnp.int32, dkappa_1Q.shape, 1)
        dc_1Q = jnp.where(token_1Q == grid.tokens - 1, crossing_11, 0.0) - decay.later_1Q * dkappa_1Q

        dphi_SQ = None
        if turn is not None:
            dphi_ST = 0.0
            for dx_NT, x_NT in ((dqs[place], q_NT), (dks[place], k_NT)):
                (du_ST, dw_ST), (u_ST, w_ST) = turn.pair(dx_NT), turn.pair(x_NT.astype(jnp.float32))
                dphi_ST += dw_ST * u_ST - du_ST * w_ST
            dphi_SQ = over_ranks(dphi_ST, rank, 1)
        biases = {}
        for name, dx_NT, sum_ref in (
            ("q_bias_HRN", dqs[place], scratch.dq_GNT),
            ("k_bias_HRN", dks[place], scratch.dk_GNT),
        ):
            back_NT = dx_NT if turn is None else turn.back(dx_NT)
            sum_ref[grid.group_of(head)] += back_NT
            if name in scratch.weights:
                biases[name] = [jnp.sum(back_NQ, axis=1, keepdims=True) for back_NQ in of_ranks(back_NT, rank, 1)]
        if biases:  # of queries and of keys in one
            both_RN = jnp.concatenate([x_N1 for of_side in biases.values() for x_N1 in of_side], axis=1).T
            for name, more_RN in zip(biases, of_ranks(both_RN, len(biases)), strict=True):
                scratch.weights[name][block * grid.heads + head] += more_RN
        columns, rows_ = [received_Q1, decay.until_Q1 * gave_Q1], [dc_1Q, dgamma_1Q, dkappa_1Q]
        done.append(Head(dphi_SQ, columns, rows_))
    return done


def _angles(dphi_XQ, block, decays, masks: Masks, refs: Back, out: Gradients, scratch: Scratch, grid: Grid):
    """The angle's gradient; returns dt's, of every head (1, Q)."""
    within_QQ = masks.within_QQ.astype(jnp.float32)
    if grid.dtype == jnp.float32:
        suffix_XQ = product(dphi_XQ, within_QQ, NN, grid)
    else:  # two roundings, not one
        high_XQ = dphi_XQ.astype(jnp.bfloat16).astype(jnp.float32)
        suffix_XQ = product(jnp.concatenate([high_XQ, dphi_XQ - high_XQ], axis=0), within_QQ, NN, grid)
        suffix_XQ = sum(jnp.split(suffix_XQ, 2, axis=0))
    carried_X1 = scratch.dphi_KX1[block]
    if masks.left_1Q is None:
        suffix_XQ += carried_X1
        scratch.dphi_KX1[block] = suffix_XQ[:, :1]
    else:
        suffix_XQ += jnp.where(masks.left_1Q, carried_X1, 0.0)
        scratch.dphi_KX1[block] = jnp.where(masks.carried_1Q[:, :1], suffix_XQ[:, :1], 0.0)
    dangle_XQ = suffix_XQ * parts.of_planes([decay.dt_1Q for decay in decays], grid)
    first, last = (block == 0, block == grid.blocks - 1) if grid.shared_angle else (True, True)
    scratch.dangle_XQ[...] = dangle_XQ + jnp.where(first, 0.0, scratch.dangle_XQ[...])

    @pl.when(last)
    def _():
        dangle_HSQ = jnp.split(scratch.dangle_XQ[...], grid.heads, axis=0)
        for head, dangle_SQ in enumerate([sum(dangle_HSQ)] if grid.shared_angle else dangle_HSQ):
            out.angle_BHSL[head] = dangle_SQ

    ddt_XQ = suffix_XQ * parts.angles(refs.inputs, grid)
    return [jnp.sum(ddt_SQ, axis=0, keepdims=True) for ddt_SQ in jnp.split(ddt_XQ, grid.heads, axis=0)]
