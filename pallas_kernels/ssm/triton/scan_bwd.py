"""The gradients of the chunked scan.

Three passes, since one with all products at once would not fit in registers: queries from the first chunk on, with the
state h recomputed; keys, then values, from the last chunk on, with the gradient dh of the state. With P_ts the decay
e^(c_t - c_s) inside a chunk, W_ts the weight P_ts kappa_s (gamma_s where t and s are one token, the diagonal),
S = q k^T, and x' = kappa x:

    dq_t = sum_{s <= t} W_ts (dy_t . x_s) k_s  +  e^(c_t) h_0^T dy_t
    dk_s = sum_{t >= s} W_ts (dy_t . x_s) q_t  +  e^(c_T - c_s) dh^T x'_s
    dx_s = kappa_s dx'_s + gamma_s S_ss dy_s + D dy_s,   dx'_s = sum_{t > s} P_ts S_ts dy_t  +  e^(c_T - c_s) dh k_s
    dkappa_s = x_s . dx'_s,   dgamma_s = x_s . S_ss dy_s
    dh_0 = e^(c_T) dh + sum_t e^(c_t) dy_t q_t^T

The gradient of a decay needs no products of its own. A pair's log weight is c_t - c_s, so the gradient of c_t is
r_t = q_t . dq_t - k_t . dk_t, and the last row of a chunk adds <dh, h> at the chunk's end. That in turn is the sum of r
over the tokens after it: summed over a few chunks, and at every checkpoint taken from the two states, for rounding must
not pile up. Inside a chunk it cannot: queries and keys round the same weights to the same bits, so what a pair adds to
the sums cancels exactly, as long as dq and dk themselves are not rounded. So they are handed on in three bytes,
`Float24`, to `rotate_bwd`, which forms r and the gradient of the angle, of which the same is true.
"""

import functools
import math
import operator
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.ssm.contract import Weights
from pallas_kernels.ssm.gradients import combine_splits_bwd
from pallas_kernels.ssm.triton.common import NN, NT, TN, Float24, call, product
from pallas_kernels.ssm.triton.config import Tile
from pallas_kernels.ssm.triton.scan_fwd import (
    Decay,
    RowWeights,
    ScanGrid,
    ScanOperands,
    SplitSums,
    epilogue,
    rows_of,
    token_rows,
    tokens_of,
    values,
)


class BwdOperands(NamedTuple):
    """What the backward passes read."""

    scan: ScanOperands  # h: the states before every split
    dy_BLHRP: jax.Array
    dh_BHZPN: jax.Array | None  # of the state after every split


class QueryGradients(NamedTuple):
    """What the pass over queries computes."""

    dq_BHTN: Float24
    h_BHZAPN: jax.Array  # like q, at every checkpoint


class KeyGradients(NamedTuple):
    """What the pass over keys computes."""

    dk_BHTN: Float24
    dh_BHZAPN: jax.Array  # like q, at every checkpoint
    dh_BHZPN: jax.Array  # float32, of the state before every split


class ValueGradients(NamedTuple):
    """What the pass over values computes."""

    dv_BLHP: jax.Array
    dkappa_BHT: jax.Array | None  # None: all of it is gamma's
    dgamma_BHT: jax.Array
    dskip_BHT: jax.Array | None  # a row's part
    dv_rank_BHZRP: jax.Array | None


class EpilogueOperands(NamedTuple):
    """What `epilogue` reads, and the gradient of what it returns."""

    y_BLHRP: jax.Array
    do_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    weights: Weights


class EpilogueGradients(NamedTuple):
    """The gradients of what `epilogue` reads; of weights, a split's part."""

    dy_BLHRP: jax.Array
    dgate_BLHP: jax.Array | None
    dgate_rank_BHZRP: jax.Array | None
    dout_rank_BHZRP: jax.Array | None
    dnorm_BHZP: jax.Array | None


class ScanGradients(NamedTuple):
    """The gradients of all passes."""

    query: QueryGradients
    key: KeyGradients
    value: ValueGradients
    epilogue: EpilogueGradients
    dlast_BHPN: jax.Array  # of the state after this device's tokens, or those of each run


def backward(operands: ScanOperands, *, decay_BHZ, y_BLHRP, do_BLHP, dlast_BHPN, tile: Tile) -> ScanGradients:
    """Return the gradients from those of the outputs and of the last state.

    Args:
        operands: h the states before every split.
        decay_BHZ: of every split; None: the row is one.
        y_BLHRP: before norm and gate.
    """
    weights, dtype = operands.weights, operands.q_BHTN.dtype
    epilogue = epilogue_bwd(operands, y_BLHRP, do_BLHP, tile)
    scan = operands._replace(gate_BLHP=None, weights=Weights(skip_H=weights.skip_H, v_rank_HRP=weights.v_rank_HRP))
    without_skip = scan._replace(weights=Weights(v_rank_HRP=weights.v_rank_HRP))
    dh_BHZPN = _after_splits(without_skip, decay_BHZ, epilogue.dy_BLHRP, dlast_BHPN[:, :, None], tile=tile)
    grid = ScanGrid(operands, tile)
    run = functools.partial(call, grid=grid, tile=tile)
    by_row = Float24(grid.array("BHTN", dtype), grid.array("BHTN", jnp.int8) if dtype == jnp.bfloat16 else None)
    checkpoints = grid.array("BHZAPN", dtype)

    query = run(
        _query_kernel,
        BwdOperands(without_skip._replace(q_BHTN=None), epilogue.dy_BLHRP, None),
        QueryGradients(dq_BHTN=by_row, h_BHZAPN=checkpoints),
        name="mamba3_query_gradient",
        launch=tile.query,
    )
    # A norm makes the outputs' gradients small against the last state's, and what dh loses is the same for many tokens:
    # it would add up in the decay's gradient.
    exact = weights.norm_HP is not None and dtype == jnp.bfloat16
    key = run(
        functools.partial(_key_kernel, exact=exact),
        BwdOperands(without_skip._replace(k_BHTN=None, h_BHZPN=None), epilogue.dy_BLHRP, dh_BHZPN),
        KeyGradients(dk_BHTN=by_row, dh_BHZAPN=checkpoints, dh_BHZPN=grid.array("BHZPN")),
        name="mamba3_key_gradient",
        launch=tile.key,
    )
    value = run(
        _value_kernel,
        BwdOperands(scan._replace(h_BHZPN=None), epilogue.dy_BLHRP, dh_BHZPN),
        ValueGradients(
            dv_BLHP=grid.array("BLHP", dtype),
            dkappa_BHT=None if operands.kappa_BHT is None else grid.array("BHT"),
            dgamma_BHT=grid.array("BHT"),
            dskip_BHT=None if weights.skip_H is None else grid.array("BHT"),
            dv_rank_BHZRP=None if weights.v_rank_HRP is None else grid.array("BHZRP"),
        ),
        name="mamba3_value_gradient",
        launch=tile.value,
    )
    if tile.along is not None:
        dlast_BHPN = dh_BHZPN[:, :, -1]  # the next run's tokens included
    return ScanGradients(query=query, key=key, value=value, epilogue=epilogue, dlast_BHPN=dlast_BHPN)


def _after_splits(scan: ScanOperands, decay_BHZ, dy_BLHRP, dlast_BHZPN, *, tile: Tile):
    """Return the gradient of the state after every split."""
    if tile.splits == 1 and tile.along is None:
        return dlast_BHZPN
    needed = scan._replace(k_BHTN=None, gamma_BHT=None, kappa_BHT=None, h_BHZPN=None)
    grid = ScanGrid(scan, tile)
    sums = call(
        _split_sums_kernel,
        BwdOperands(needed, dy_BLHRP, None),
        SplitSums(h_BHZPN=grid.array("BHZPN"), decay_BHZ=None),
        name="mamba3_segments_back",
        grid=grid,
        tile=tile,
        launch=tile.split_sums,
    )
    return combine_splits_bwd(dlast_BHZPN[:, :, 0], decay_BHZ, sums.h_BHZPN, tile.along)


def _dy_TP(refs: BwdOperands, index, tile: Tile):
    return refs.dy_BLHRP[tokens_of(index, tile), :, :].reshape(tile.rows, refs.dy_BLHRP.shape[-1])


def _decayed_dy_TP(refs: BwdOperands, decay: Decay, index, tile: Tile):
    """Return e^(c_t) dy_t."""
    return _dy_TP(refs, index, tile).astype(jnp.float32) * decay.from_start_T(tile)[:, None]


def _store_checkpoint(ref, h_PN, index, tile: Tile):
    """Store a state before every `checkpoint_interval` tokens."""
    h_PN, chunks = h_PN.astype(ref.dtype), jnp.int32(tile.checkpoint_chunks)
    place, between = lax.div(index, chunks), lax.rem(index, chunks)
    if tile.interpret:  # its masked stores write NaN to what nobody has written
        pl.when(between == 0)(lambda: ref.__setitem__(place, h_PN))
        return
    plt.store(ref.at[place], h_PN, mask=jnp.full(h_PN.shape, between == 0))  # a branch holds up the loop's loads


def _query_kernel(refs: BwdOperands, out: QueryGradients, *, tile: Tile):
    scan, dtype = refs.scan, refs.scan.k_BHTN.dtype
    dot = functools.partial(product, dtype=dtype, tile=tile)
    weights = RowWeights.load(scan.weights, tile)

    def chunk(index, h_PN):
        _store_checkpoint(out.h_BHZAPN, h_PN, index, tile)
        rows = rows_of(index, tile)
        k_TN, x_TP, dy_TP = scan.k_BHTN[rows, :], values(scan, weights, index, tile), _dy_TP(refs, index, tile)
        decay = Decay.load(scan, index, tile)
        decay_TT, diagonal_TT = decay.between(tile)

        dmixed_TT = dot(dy_TP, x_TP, NT)
        dmixed_TT *= decay_TT * decay.weight_TT(diagonal_TT)
        dq_TN = dot(_decayed_dy_TP(refs, decay, index, tile), h_PN, NN)
        dq_TN += dot(dmixed_TT, k_TN, NN)
        out.dq_BHTN.store((rows, slice(None)), dq_TN, tile)

        x_TP = x_TP.astype(jnp.float32) * decay.later_to_end_T(tile)[:, None]
        return decay.of_chunk(tile) * h_PN + dot(x_TP, k_TN, TN)

    lax.fori_loop(0, scan.k_BHTN.shape[0] // tile.rows, chunk, scan.h_BHZPN[...])


def _chunk_bwd(refs: BwdOperands, decay: Decay, q_TN, dh_PN, *, index, tile: Tile):
    """Return the gradient of the state before a chunk from that of the state after it and from the chunk's outputs."""
    dy_TP = _decayed_dy_TP(refs, decay, index, tile)
    return decay.of_chunk(tile) * dh_PN + product(dy_TP, q_TN, TN, dtype=q_TN.dtype, tile=tile)


def _last_to_first(chunks: int, chunk, dh_PN):
    return lax.fori_loop(0, chunks, lambda step, dh_PN: chunk(chunks - 1 - step, dh_PN), dh_PN)


def _split_sums_kernel(refs: BwdOperands, out: SplitSums, *, tile: Tile):
    """Compute the gradient of the state before a split from the outputs of the split."""

    def chunk(index, dh_PN):
        decay = Decay.load(refs.scan, index, tile)
        q_TN = refs.scan.q_BHTN[rows_of(index, tile), :]
        return _chunk_bwd(refs, decay, q_TN, dh_PN, index=index, tile=tile)

    chunks = refs.scan.q_BHTN.shape[0] // tile.rows
    out.h_BHZPN[...] = _last_to_first(chunks, chunk, jnp.zeros(out.h_BHZPN.shape, jnp.float32))


def _key_kernel(refs: BwdOperands, out: KeyGradients, *, exact: bool, tile: Tile):
    """Compute the gradients of keys and of the state.

    Args:
        exact: whether to take in what rounding dh for its product leaves out.
    """
    scan, dtype = refs.scan, refs.scan.q_BHTN.dtype
    dot = functools.partial(product, dtype=dtype, tile=tile)
    weights = RowWeights.load(scan.weights, tile)

    def chunk(index, dh_PN):
        rows = rows_of(index, tile)
        q_TN, x_TP, dy_TP = scan.q_BHTN[rows, :], values(scan, weights, index, tile), _dy_TP(refs, index, tile)
        decay = Decay.load(scan, index, tile)
        decay_TT, diagonal_TT = decay.between(tile, transposed=True)

        dmixed_TT = dot(x_TP, dy_TP, NT)  # of sources (down) and targets
        dmixed_TT *= decay_TT * decay.weight_TT(diagonal_TT, transposed=True)
        x_to_end_TP = (x_TP.astype(jnp.float32) * decay.later_to_end_T(tile)[:, None]).astype(dtype)
        dk_TN = dot(x_to_end_TP, dh_PN, NN)
        if exact:
            dk_TN += dot(x_to_end_TP, dh_PN - dh_PN.astype(dtype).astype(jnp.float32), NN)
        dk_TN += dot(dmixed_TT, q_TN, NN)
        out.dk_BHTN.store((rows, slice(None)), dk_TN, tile)

        dh_PN = _chunk_bwd(refs, decay, q_TN, dh_PN, index=index, tile=tile)
        _store_checkpoint(out.dh_BHZAPN, dh_PN, index, tile)
        return dh_PN

    out.dh_BHZPN[...] = _last_to_first(scan.q_BHTN.shape[0] // tile.rows, chunk, refs.dh_BHZPN[...])


def _value_kernel(refs: BwdOperands, out: ValueGradients, *, tile: Tile):
    scan, dtype = refs.scan, refs.scan.q_BHTN.dtype
    dot = functools.partial(product, dtype=dtype, tile=tile)
    v_rank_HRP, skip_H = scan.weights.v_rank_HRP, scan.weights.skip_H

    def by_rank(x_TP):
        return x_TP.reshape(tile.tokens, tile.rank, x_TP.shape[-1])

    def chunk(index, carry):
        dh_PN, dv_rank_RP = carry
        rows, tokens = rows_of(index, tile), tokens_of(index, tile)
        q_TN, k_TN, dy_TP = scan.q_BHTN[rows, :], scan.k_BHTN[rows, :], _dy_TP(refs, index, tile)
        v_QRP = scan.v_BLHP[tokens, :].astype(jnp.float32)[:, None, :]
        if v_rank_HRP is None:
            x_TP = v_QRP.reshape(dy_TP.shape)
        else:
            v_rank_1RP = v_rank_HRP[...].astype(jnp.float32)[None]
            x_TP = (v_QRP * v_rank_1RP).astype(dtype).reshape(dy_TP.shape).astype(jnp.float32)
        decay = Decay.load(scan, index, tile)
        decay_TT, diagonal_TT = decay.between(tile, transposed=True)

        score_TT = dot(k_TN, q_TN, NT)  # of sources (down) and targets
        dlater_TP = decay.to_end_T(tile)[:, None] * dot(k_TN, dh_PN, NT)
        same = decay.kappa_T is None  # a token weighs alike in its own output and in later ones
        pairs_TT = score_TT * decay_TT if same else jnp.where(diagonal_TT, 0.0, score_TT * decay_TT)
        dlater_TP += dot(pairs_TT, dy_TP, NN)
        diagonal_TT = jnp.where(diagonal_TT, score_TT, 0.0)
        dskip_T = jnp.sum(x_TP * dy_TP.astype(jnp.float32), axis=1)
        if same:  # then dlater has the diagonal too
            out.dgamma_BHT[rows] = jnp.sum(x_TP * dlater_TP, axis=1)
            dx_TP = decay.gamma_T[:, None] * dlater_TP
        elif tile.rank == 1:
            diagonal_T = jnp.sum(diagonal_TT, axis=1)
            dgamma_T, ddiagonal_TP = diagonal_T * dskip_T, diagonal_T[:, None] * dy_TP.astype(jnp.float32)
        else:
            ddiagonal_TP = dot(diagonal_TT, dy_TP, NN)
            dgamma_T = jnp.sum(x_TP * ddiagonal_TP, axis=1)
        if not same:
            out.dkappa_BHT[rows] = jnp.sum(x_TP * dlater_TP, axis=1)
            out.dgamma_BHT[rows] = dgamma_T
            dx_TP = decay.kappa_T[:, None] * dlater_TP + decay.gamma_T[:, None] * ddiagonal_TP
        if skip_H is not None:
            out.dskip_BHT[rows] = dskip_T
            dx_TP += skip_H[...].astype(jnp.float32) * dy_TP.astype(jnp.float32)

        if v_rank_HRP is not None:
            dv_rank_RP += jnp.sum(by_rank(dx_TP) * v_QRP, axis=0)
            dx_TP = jnp.sum(by_rank(dx_TP) * v_rank_1RP, axis=1)
        out.dv_BLHP[tokens, :] = dx_TP.astype(out.dv_BLHP.dtype)
        return _chunk_bwd(refs, decay, q_TN, dh_PN, index=index, tile=tile), dv_rank_RP

    zeros_RP = None if v_rank_HRP is None else jnp.zeros((tile.rank, scan.v_BLHP.shape[-1]), jnp.float32)
    chunks = scan.q_BHTN.shape[0] // tile.rows
    _, dv_rank_RP = _last_to_first(chunks, chunk, (refs.dh_BHZPN[...], zeros_RP))
    if v_rank_HRP is not None:
        out.dv_rank_BHZRP[...] = dv_rank_RP


def epilogue_bwd(operands: ScanOperands, y_BLHRP, do_BLHP, tile: Tile) -> EpilogueGradients:
    """Return dy, and the gradients of what `epilogue` alone reads."""
    tile = replace(tile, rows=max(16, tile.rows // 2))  # programs are more and take fewer registers
    chunks = operands.q_BHTN.shape[2] // tile.rows
    grid, weights = ScanGrid(operands, replace(tile, splits=chunks // math.gcd(chunks, 8))), operands.weights
    like = lambda array, axes, dtype=jnp.float32: None if array is None else grid.array(axes, dtype)  # noqa: E731
    return call(
        _epilogue_kernel,
        EpilogueOperands(
            y_BLHRP=y_BLHRP,
            do_BLHP=do_BLHP,
            gate_BLHP=operands.gate_BLHP,
            weights=weights._replace(skip_H=None, v_rank_HRP=None),
        ),
        EpilogueGradients(
            dy_BLHRP=grid.array("BLHRP", do_BLHP.dtype),
            dgate_BLHP=like(operands.gate_BLHP, "BLHP", do_BLHP.dtype),
            dgate_rank_BHZRP=like(weights.gate_rank_HRP, "BHZRP"),
            dout_rank_BHZRP=like(weights.out_rank_HRP, "BHZRP"),
            dnorm_BHZP=like(weights.norm_HP, "BHZP"),
        ),
        name="mamba3_finish_back",
        grid=grid,
        tile=tile,
        launch=tile.epilogue_bwd,
    )


def _epilogue_kernel(refs: EpilogueOperands, out: EpilogueGradients, *, tile: Tile):
    weights = RowWeights.load(refs.weights, tile)
    function = functools.partial(epilogue, dtype=refs.do_BLHP.dtype, tile=tile)

    def by_rank(x_TP):
        return x_TP.reshape(tile.tokens, tile.rank, x_TP.shape[-1])

    def chunk(index, sums: RowWeights):
        tokens = tokens_of(index, tile)
        y_TP = refs.y_BLHRP[tokens, :, :].reshape(tile.rows, refs.y_BLHRP.shape[-1]).astype(jnp.float32)
        gate_TP = None
        if refs.gate_BLHP is not None:
            gate_TP = token_rows(refs.gate_BLHP, index, tile).astype(jnp.float32)
        do_TP = token_rows(refs.do_BLHP, index, tile).astype(jnp.float32)
        _, pull = jax.vjp(function, y_TP, gate_TP, weights)
        dy_TP, dgate_TP, dweights = pull(do_TP)
        out.dy_BLHRP[tokens, :, :] = by_rank(dy_TP).astype(out.dy_BLHRP.dtype)
        if dgate_TP is not None:
            dgate_QP = dgate_TP if tile.rank == 1 else jnp.sum(by_rank(dgate_TP), axis=1)
            out.dgate_BLHP[tokens, :] = dgate_QP.astype(out.dgate_BLHP.dtype)
        return jax.tree.map(operator.add, sums, dweights)

    zeros = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), weights)
    sums = lax.fori_loop(0, refs.y_BLHRP.shape[0] // tile.tokens, chunk, zeros)
    if out.dgate_rank_BHZRP is not None:
        out.dgate_rank_BHZRP[...] = jnp.sum(by_rank(sums.gate_rank_TP), axis=0)
    if out.dout_rank_BHZRP is not None:
        out.dout_rank_BHZRP[...] = jnp.sum(by_rank(sums.out_rank_TP), axis=0)
    if out.dnorm_BHZP is not None:
        out.dnorm_BHZP[...] = sums.norm_P
