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
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ssm.mosaic_tpu import parts
from pallas_kernels.ssm.mosaic_tpu.contract import Grid, Refs
from pallas_kernels.ssm.mosaic_tpu.parts import NN, NT, TN, Decay, Ends, Masks, Turn, over_ranks, product, ranks


class Back(NamedTuple):
    """What the backward pass reads."""

    inputs: Refs
    do_BLX: jax.Array
    dh_BHPN: jax.Array | None  # of the state after the row; None: 0
    dphi_BKX: jax.Array | None  # of the angle after it; (.., 1, J N/2); None: 0


class Gradients(NamedTuple):
    q_BLX: jax.Array
    k_BLX: jax.Array
    v_BLX: jax.Array
    gate_BLX: jax.Array | None
    angle_BHSL: jax.Array
    dt_BHL: jax.Array  # through the angle
    log_a_BHL: jax.Array
    gamma_BHL: jax.Array
    kappa_BHL: jax.Array
    dh_BHPN: jax.Array | None  # of the state before the row, if there is one
    dphi_BKX: jax.Array | None  # of the angle before it
    weights: list  # (B, H, R, ..), of the weights that there are, as in `Refs`


class Scratch(NamedTuple):
    """What is carried: over chunks, but for queries and keys, whose sum is over the heads of a group."""

    dh_HPN: jax.Array
    dphi_KX: jax.Array
    dq_QX: jax.Array
    dk_QX: jax.Array
    angle_QX: jax.Array  # and its gradient, whose sum is over the blocks of heads that share it
    dangle_QX: jax.Array
    scalars_HXQ: jax.Array
    dc_HQ: jax.Array  # the gradient of the decay of all heads in a chunk
    weights: list


class Head(NamedTuple):
    """The gradients of a head in a chunk that wait for those of the others."""

    dphi_QS: jax.Array
    columns: list  # Q1: dc and dkappa but for what is in the rows
    rows: list  # 1Q: dc, dgamma and dkappa


def kernel(refs: Back, out: Gradients, scratch: Scratch, *, grid: Grid):
    step, block = pl.program_id(1), pl.program_id(2)
    heads = pl.ds(block * grid.heads, grid.heads)
    inputs = refs.inputs

    @pl.when(step == 0)
    def _():
        parts.load_states(scratch.dh_HPN, block * grid.heads, refs.dh_BHPN, inputs.order_NM, grid)
        none_1X = jnp.zeros(scratch.dphi_KX.shape[1:], jnp.float32)
        scratch.dphi_KX[block] = none_1X if refs.dphi_BKX is None else refs.dphi_BKX[...]
        for sum_ref in scratch.weights:
            sum_ref[heads] = jnp.zeros((grid.heads, *sum_ref.shape[1:]), jnp.float32)

    of_group = lax.rem(block, grid.blocks_a_group)

    @pl.when(of_group == 0)
    def _():
        for sum_ref in (scratch.dq_QX, scratch.dk_QX):
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    parts.load_angles(scratch.angle_QX, inputs, block, grid)
    parts.load_numbers(scratch.scalars_HXQ, inputs, block, grid)
    masks = Masks.load(inputs, grid)
    decays = [Decay.load(scratch.scalars_HXQ[block * grid.heads + head], masks) for head in range(grid.heads)]
    sin_QX, cos_QX = parts.sincos(scratch.angle_QX[...], inputs, [decay.dt_Q1 for decay in decays], masks, grid)
    rows = [parts.rows_of_groups(ref, inputs.order_NM, grid) for ref in (inputs.q_BLX, inputs.k_BLX)]
    done = []
    for head, (decay, turn) in enumerate(zip(decays, Turn.of_heads(sin_QX, cos_QX, grid), strict=True)):
        q_RQN, k_RQN = (x_GRQN[grid.group_of(head)] for x_GRQN in rows)
        index = block * grid.heads + head
        done.append(_head(head, index, q_RQN, k_RQN, turn, decay, masks, refs, out, scratch, grid))
    dphi_QX = jnp.concatenate([one.dphi_QS for one in done], axis=1)
    ddt = _angles(dphi_QX, block, decays, masks, refs, out, scratch, grid)
    for head, (one, ddt_Q1) in enumerate(zip(done, ddt, strict=True)):
        columns_XQ = jnp.concatenate([ddt_Q1, *one.columns], axis=1).T
        dc_1Q, dgamma_1Q, dkappa_1Q = one.rows
        row = pl.ds(block * grid.heads + head, 1)
        out.dt_BHL[row], out.gamma_BHL[row] = columns_XQ[:1], dgamma_1Q
        out.kappa_BHL[row], scratch.dc_HQ[row] = columns_XQ[2:] + dkappa_1Q, columns_XQ[1:2] + dc_1Q

    @pl.when(block == grid.blocks - 1)
    def _():
        within_QQ = Masks.load(inputs, grid).within_QQ.astype(jnp.float32)
        dlog_a_HQ = product(scratch.dc_HQ[...], within_QQ, NN, grid, jnp.float32)
        out.log_a_BHL[...] = jnp.where(inputs.log_a_BHL[...] > parts.STEEPEST, dlog_a_HQ, 0.0)

    @pl.when(of_group == grid.blocks_a_group - 1)
    def _():
        for ref, sum_ref in ((out.q_BLX, scratch.dq_QX), (out.k_BLX, scratch.dk_QX)):
            for lanes in itertools.starmap(grid.lanes_of, np.ndindex(grid.groups_a_block, grid.rank)):
                dx_QN = sum_ref[:, lanes].astype(ref.dtype)
                ref[:, lanes] = parts.ordered(dx_QN, inputs.order_NM, grid, NT).astype(ref.dtype)

    @pl.when(step == grid.chunks - 1)
    def _():
        if out.dh_BHPN is not None:
            for head in range(grid.heads):
                dh_PN = scratch.dh_HPN[block * grid.heads + head]
                out.dh_BHPN[head] = parts.ordered(dh_PN, inputs.order_NM, grid, NT)
        if out.dphi_BKX is not None:
            out.dphi_BKX[...] = scratch.dphi_KX[block]
        for ref, sum_ref in zip(out.weights, scratch.weights, strict=True):
            ref[...] = sum_ref[heads]


def _head(
    head: int,
    index,
    q_RQN,
    k_RQN,
    turn: Turn,
    decay: Decay,
    masks: Masks,
    refs: Back,
    out,
    scratch: Scratch,
    grid: Grid,
):
    """One head: all but the angles."""
    inputs, rank = refs.inputs, grid.rank
    of_head = slice(head * grid.width, (head + 1) * grid.width)
    since_T1, left_Q1 = ranks(decay.since_Q1, rank), decay.until_Q1 * decay.kappa_Q1
    left_T1 = ranks(left_Q1, rank)
    q_TN = parts.turned(q_RQN, inputs.q_bias_HRN[head], turn)
    k_TN = parts.turned(k_RQN, inputs.k_bias_HRN[head], turn)
    v_QP = inputs.v_BLX[:, of_head].astype(jnp.float32)
    x_TP = v_QP if inputs.v_rank_HRP is None else parts.per_rank(v_QP, inputs.v_rank_HRP[head])
    gate_QP = None if inputs.gate_BLX is None else inputs.gate_BLX[:, of_head].astype(jnp.float32)
    h_PN, dh_PN = inputs.h_BHPN[head].astype(jnp.float32), scratch.dh_HPN[index]

    weight_TT = ranks(ranks(decay.weight_QQ(masks), rank, 0), rank, 1)
    score_TT = product(q_TN, k_TN, NT, grid)
    mixed_TT = score_TT * weight_TT
    read_TP = product(q_TN, h_PN, NT, grid)
    y_TP = product(mixed_TT, x_TP, NN, grid) + since_T1 * read_TP
    finish = functools.partial(parts.finish, rank=rank, width=grid.own_width)
    _, pull = jax.vjp(finish, y_TP, x_TP, gate_QP, Ends.load(inputs, head))
    dy_TP, dx_TP, dgate_QP, dends = pull(refs.do_BLX[:, of_head].astype(jnp.float32))
    if dgate_QP is not None:
        out.gate_BLX[:, of_head] = dgate_QP.astype(out.gate_BLX.dtype)

    dmixed_TT = product(dy_TP, x_TP, NT, grid)
    dscore_TT = dmixed_TT * weight_TT
    since_dy_TP = since_T1 * dy_TP
    dq_TN = product(dscore_TT, k_TN, NN, grid) + product(since_dy_TP, h_PN, NN, grid)
    dk_TN = product(dscore_TT, q_TN, TN, grid) + product(left_T1 * x_TP, dh_PN, NN, grid)
    later_TP = product(k_TN, dh_PN, NT, grid)
    dx_TP += product(mixed_TT, dy_TP, TN, grid) + left_T1 * later_TP
    whole_11 = decay.whole()
    scratch.dh_HPN[index] = whole_11 * dh_PN + product(since_dy_TP, q_TN, TN, grid)

    both_QQ = _over_both_ranks(dmixed_TT * score_TT, rank)
    pairs_QQ = jnp.where(masks.own_QQ, 0.0, both_QQ) * decay.within_QQ
    dgamma_1Q = jnp.sum(jnp.where(masks.own_QQ, both_QQ, 0.0), axis=0, keepdims=True)
    dkappa_1Q = jnp.sum(pairs_QQ, axis=0, keepdims=True)
    gave_Q1 = over_ranks(jnp.sum(x_TP * later_TP, axis=1, keepdims=True), rank)
    received_Q1 = over_ranks(jnp.sum(since_dy_TP * read_TP, axis=1, keepdims=True), rank)
    received_Q1 += jnp.sum(pairs_QQ * decay.kappa_1Q, axis=1, keepdims=True) - left_Q1 * gave_Q1
    crossing_11 = jnp.sum(jnp.sum(dh_PN * h_PN, axis=1, keepdims=True), axis=0, keepdims=True) * whole_11
    crossing_11 += jnp.sum(left_Q1 * gave_Q1, axis=0, keepdims=True)
    token_1Q = lax.broadcasted_iota(jnp.int32, dkappa_1Q.shape, 1)
    dc_1Q = jnp.where(token_1Q == grid.tokens - 1, crossing_11, 0.0) - decay.kappa_1Q * dkappa_1Q

    dv_QP, dv_rank_RP = dx_TP, None
    if inputs.v_rank_HRP is not None:
        v_rank_RP = inputs.v_rank_HRP[head]
        by_rank = [dx_TP[r * grid.tokens : (r + 1) * grid.tokens] for r in range(rank)]
        dv_QP = sum(dx_QP * v_rank_RP[r : r + 1] for r, dx_QP in enumerate(by_rank))
        dv_rank_RP = _over_tokens([dx_QP * v_QP for dx_QP in by_rank])
    out.v_BLX[:, of_head] = dv_QP.astype(out.v_BLX.dtype)

    dphi_QN = over_ranks(dq_TN * parts.partner(q_TN) + dk_TN * parts.partner(k_TN), rank)
    dq_bias_RN = _turned_back(dq_TN, scratch.dq_QX, head, turn, grid)
    dk_bias_RN = _turned_back(dk_TN, scratch.dk_QX, head, turn, grid)
    weights = (dq_bias_RN, dk_bias_RN, dends.skip_1P, dv_rank_RP, *dends[1:])
    for sum_ref, more in zip(scratch.weights, (weight for weight in weights if weight is not None), strict=True):
        sum_ref[index] += more
    dphi_QS = dphi_QN[:, grid.half :] - dphi_QN[:, : grid.half]
    return Head(dphi_QS, [received_Q1, decay.until_Q1 * gave_Q1], [dc_1Q, dgamma_1Q, dkappa_1Q])


def _over_both_ranks(x_TT, rank: int):
    tokens = x_TT.shape[0] // rank
    x_QT = over_ranks(x_TT, rank)
    return sum(x_QT[:, r * tokens : (r + 1) * tokens] for r in range(rank))


def _over_tokens(rows: list):
    """(R, X): of every rank, the sum over its tokens."""
    return jnp.concatenate([jnp.sum(x_QX, axis=0, keepdims=True) for x_QX in rows], axis=0)


def _turned_back(dx_TN, sum_QX, head: int, turn: Turn, grid: Grid):
    """Add the gradient of queries or keys to their group's; the bias's."""
    tokens = grid.tokens
    back = [turn.back(dx_TN[r * tokens : (r + 1) * tokens]) for r in range(grid.rank)]
    for r, dx_QN in enumerate(back):
        sum_QX[:, grid.lanes_of(grid.group_of(head), r)] += dx_QN
    return _over_tokens(back)


def _angles(dphi_QX, block, decays, masks: Masks, refs: Back, out: Gradients, scratch: Scratch, grid: Grid):
    """The angle's gradient; returns dt's, of every head (Q, 1)."""
    within_QQ = masks.within_QQ.astype(jnp.float32)
    if grid.dtype == jnp.float32:
        suffix_QX = product(within_QQ, dphi_QX, TN, grid)
    else:  # two roundings, not one
        high_QX = dphi_QX.astype(jnp.bfloat16).astype(jnp.float32)
        suffix_QX = product(within_QQ, jnp.concatenate([high_QX, dphi_QX - high_QX], axis=1), TN, grid)
        suffix_QX = sum(jnp.split(suffix_QX, 2, axis=1))
    carried_1X = scratch.dphi_KX[block]
    if masks.left_Q1 is None:
        suffix_QX += carried_1X
        scratch.dphi_KX[block] = suffix_QX[:1]
    else:
        suffix_QX += jnp.where(masks.left_Q1, carried_1X, 0.0)
        scratch.dphi_KX[block] = jnp.where(masks.carried_Q1[:1], suffix_QX[:1], 0.0)
    of_dt = [jnp.broadcast_to(decay.dt_Q1, (grid.tokens, grid.half)) for decay in decays]
    dangle_QX = suffix_QX * jnp.concatenate(of_dt, axis=1)
    first, last = (block == 0, block == grid.blocks - 1) if grid.shared_angle else (True, True)
    scratch.dangle_QX[...] = dangle_QX + jnp.where(first, 0.0, scratch.dangle_QX[...])

    @pl.when(last)
    def _():
        rows_XQ = scratch.dangle_QX[...].T
        dangle_HSQ = [rows_XQ[head * grid.half :][: grid.planes] for head in range(grid.heads)]
        for head, dangle_SQ in enumerate([sum(dangle_HSQ)] if grid.shared_angle else dangle_HSQ):
            out.angle_BHSL[head] = dangle_SQ

    ddt_QX = suffix_QX * scratch.angle_QX[...]
    per_head = (ddt_QX[:, head * grid.half : (head + 1) * grid.half] for head in range(grid.heads))
    return [jnp.sum(ddt_QS, axis=1, keepdims=True) for ddt_QS in per_head]
