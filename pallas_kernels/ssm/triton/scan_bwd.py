"""The gradients of the chunked scan.

Three passes, since one with all products at once would not fit in registers: queries from the first chunk on, with the
state h recomputed; keys, then values, from the last chunk on, with the gradient dh of the state. With P_ts the decay
e^(c_t - c_s) inside a chunk, S = q k^T, and x' = kappa x:

    dq_t = sum_{s <= t} weight_ts (dy_t . x_s) k_s  +  e^(c_t) h_0^T dy_t
    dk_s = sum_{t > s} P_ts (x'_s . dy_t) q_t  +  gamma_s (own token)  +  e^(c_T - c_s) dh^T x'_s
    dx_s = kappa_s dx'_s + gamma_s own_s + D dy_s,   dx'_s = sum_{t > s} P_ts S_ts dy_t  +  e^(c_T - c_s) dh k_s
    dkappa_s = x_s . dx'_s,   dgamma_s = x_s . own_s

The gradient of a decay needs no products of its own. A pair's log weight is c_t - c_s, so the gradient of c_t is what
token t receives less what it gives, r_t = q_t . dq_t - k_t . dk_t, and the last row of a chunk adds what crosses its
end, <dh, h>. That in turn is the sum of r over the tokens after it: summed over a few chunks, and every `anchor` tokens
taken from the two states, for rounding must not pile up. Inside a chunk it cannot: queries and keys round the same
weights to the same bits, so what a pair adds to the sums cancels exactly, as long as dq and dk themselves are not
rounded. So they are handed on in three bytes, `Split`, to the rotation's backward pass, which forms r and the gradient
of the angle, of which the same is true.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.ssm.gradients import combine_splits_bwd
from pallas_kernels.ssm.triton.common import NN, NT, TN, Split, Tile, call, product, silu
from pallas_kernels.ssm.triton.scan_fwd import (
    Added,
    Decay,
    Grid,
    Inputs,
    Scales,
    Weights,
    finish,
    rows_of,
    token_rows,
    tokens_of,
    values,
)


class Gradients(NamedTuple):
    """What the backward pass reads beside `Inputs`; h there are the states before every segment."""

    inputs: Inputs
    dy_BLHRP: jax.Array
    dh_BHSPN: jax.Array | None  # of the state after every segment


class Query(NamedTuple):
    dq_BHTN: Split
    h_BHSAPN: jax.Array  # like q, before every `anchor` tokens


class Key(NamedTuple):
    dk_BHTN: Split
    dh_BHSAPN: jax.Array  # likewise
    dh_BHSPN: jax.Array  # float32, of the state before every segment


class Value(NamedTuple):
    dv_BLHP: jax.Array
    dkappa_BHT: jax.Array | None  # None: all of it is gamma's
    dgamma_BHT: jax.Array
    dskip_BHT: jax.Array | None  # a row's part
    dv_rank_BHSRP: jax.Array | None


def _specs(grid: Grid, refs: Gradients) -> Gradients:
    dh = None if refs.dh_BHSPN is None else grid.spec("BHSPN")
    return Gradients(grid.specs(refs.inputs), grid.spec("BLHRP"), dh)


def _dy_TP(refs: Gradients, index, tile: Tile):
    return refs.dy_BLHRP[tokens_of(index, tile), :, :].reshape(tile.rows, refs.dy_BLHRP.shape[-1])


def _since_dy_TP(refs: Gradients, decay: Decay, index, tile: Tile):
    return _dy_TP(refs, index, tile).astype(jnp.float32) * decay.since_T(tile)[:, None]


def _keep(ref, h_PN, index, tile: Tile):
    """Store a state before every `anchor` tokens."""
    h_PN = h_PN.astype(ref.dtype)
    place, between = lax.div(index, jnp.int32(tile.anchor_chunks)), lax.rem(index, jnp.int32(tile.anchor_chunks))
    if tile.interpret:  # whose masked stores write NaN to what was not written yet
        pl.when(between == 0)(lambda: ref.__setitem__(place, h_PN))
        return
    plt.store(ref.at[place], h_PN, mask=jnp.full(h_PN.shape, between == 0))  # a branch holds up the loop's loads


def _query_kernel(refs: Gradients, out: Query, *, tile: Tile):
    inputs, dtype = refs.inputs, refs.inputs.k_BHTN.dtype
    weights = Weights.load(inputs, tile)

    def chunk(index, h_PN):
        _keep(out.h_BHSAPN, h_PN, index, tile)
        rows = rows_of(index, tile)
        k_TN, x_TP, dy_TP = inputs.k_BHTN[rows, :], values(inputs, weights, index, tile), _dy_TP(refs, index, tile)
        decay = Decay.load(inputs, index, tile)
        scales = Scales.load(inputs, rows)
        decay_TT, own_TT = decay.between(tile)

        dmixed_TT = product(dy_TP, x_TP, NT, dtype, tile)
        dmixed_TT *= decay_TT * scales.weight_TT(own_TT)
        dq_TN = product(_since_dy_TP(refs, decay, index, tile), h_PN, NN, dtype, tile)
        dq_TN += product(dmixed_TT, k_TN, NN, dtype, tile)
        out.dq_BHTN.store((rows, slice(None)), dq_TN, tile)

        x_TP = x_TP.astype(jnp.float32) * (decay.until_T(tile) * scales.later_T)[:, None]
        return decay.whole(tile) * h_PN + product(x_TP, k_TN, TN, dtype, tile)

    lax.fori_loop(0, inputs.k_BHTN.shape[0] // tile.rows, chunk, inputs.h_BHSPN[...])


def _demand(refs: Gradients, decay: Decay, q_TN, dh_PN, index, tile: Tile):
    """The gradient of the state before a chunk from that of the state after it and from the chunk's outputs."""
    dy_TP = _since_dy_TP(refs, decay, index, tile)
    return decay.whole(tile) * dh_PN + product(dy_TP, q_TN, TN, refs.inputs.q_BHTN.dtype, tile)


def _backwards(chunks: int, chunk, dh_PN):
    return lax.fori_loop(0, chunks, lambda step, dh_PN: chunk(chunks - 1 - step, dh_PN), dh_PN)


def _demanded_kernel(refs: Gradients, out: Added, *, tile: Tile):
    """The gradient of the state before a segment from the outputs of the segment."""

    def chunk(index, dh_PN):
        decay = Decay.load(refs.inputs, index, tile)
        return _demand(refs, decay, refs.inputs.q_BHTN[rows_of(index, tile), :], dh_PN, index, tile)

    chunks = refs.inputs.q_BHTN.shape[0] // tile.rows
    out.h_BHSPN[...] = _backwards(chunks, chunk, jnp.zeros(out.h_BHSPN.shape, jnp.float32))


def _key_kernel(refs: Gradients, out: Key, *, exact: bool, tile: Tile):
    """
    Args:
        exact: take in what rounding dh for its product leaves out.
    """
    inputs, dtype = refs.inputs, refs.inputs.q_BHTN.dtype
    weights = Weights.load(inputs, tile)

    def chunk(index, dh_PN):
        rows = rows_of(index, tile)
        q_TN, x_TP, dy_TP = inputs.q_BHTN[rows, :], values(inputs, weights, index, tile), _dy_TP(refs, index, tile)
        decay = Decay.load(inputs, index, tile)
        scales = Scales.load(inputs, rows)
        decay_TT, own_TT = decay.between(tile, transposed=True)

        dmixed_TT = product(x_TP, dy_TP, NT, dtype, tile)  # of sources (down) and targets
        dmixed_TT *= decay_TT * scales.weight_TT(own_TT, transposed=True)
        until_x_TP = (x_TP.astype(jnp.float32) * (decay.until_T(tile) * scales.later_T)[:, None]).astype(dtype)
        dk_TN = product(until_x_TP, dh_PN, NN, dtype, tile)
        if exact:
            dk_TN += product(until_x_TP, dh_PN - dh_PN.astype(dtype).astype(jnp.float32), NN, dtype, tile)
        dk_TN += product(dmixed_TT, q_TN, NN, dtype, tile)
        out.dk_BHTN.store((rows, slice(None)), dk_TN, tile)

        dh_PN = _demand(refs, decay, q_TN, dh_PN, index, tile)
        _keep(out.dh_BHSAPN, dh_PN, index, tile)
        return dh_PN

    out.dh_BHSPN[...] = _backwards(inputs.q_BHTN.shape[0] // tile.rows, chunk, refs.dh_BHSPN[...])


def _value_kernel(refs: Gradients, out: Value, *, tile: Tile):
    inputs, dtype = refs.inputs, refs.inputs.q_BHTN.dtype
    ranked = inputs.v_rank_HRP is not None

    def by_rank(x_TP):
        return x_TP.reshape(tile.tokens, tile.rank, x_TP.shape[-1])

    def chunk(index, carry):
        dh_PN, *dv_rank_RP = carry
        rows, tokens = rows_of(index, tile), tokens_of(index, tile)
        q_TN, k_TN, dy_TP = inputs.q_BHTN[rows, :], inputs.k_BHTN[rows, :], _dy_TP(refs, index, tile)
        v_QRP = inputs.v_BLHP[tokens, :].astype(jnp.float32)[:, None, :]
        if ranked:
            v_rank_1RP = inputs.v_rank_HRP[...].astype(jnp.float32)[None]
            x_TP = (v_QRP * v_rank_1RP).astype(dtype).reshape(dy_TP.shape).astype(jnp.float32)
        else:
            x_TP = v_QRP.reshape(dy_TP.shape)
        decay = Decay.load(inputs, index, tile)
        scales = Scales.load(inputs, rows)
        decay_TT, own_TT = decay.between(tile, transposed=True)

        score_TT = product(k_TN, q_TN, NT, dtype, tile)  # of sources (down) and targets
        dlater_TP = decay.until_T(tile)[:, None] * product(k_TN, dh_PN, NT, dtype, tile)
        same = scales.kappa_T is None  # own and later outputs weigh a token alike
        pairs_TT = score_TT * decay_TT if same else jnp.where(own_TT, 0.0, score_TT * decay_TT)
        dlater_TP += product(pairs_TT, dy_TP, NN, dtype, tile)
        own_TT = jnp.where(own_TT, score_TT, 0.0)
        dskip_T = jnp.sum(x_TP * dy_TP.astype(jnp.float32), axis=1)
        if same:  # what dlater has of the diagonal is the token's own
            out.dgamma_BHT[rows] = jnp.sum(x_TP * dlater_TP, axis=1)
            dx_TP = scales.gamma_T[:, None] * dlater_TP
        elif tile.rank == 1:
            own_T = jnp.sum(own_TT, axis=1)
            dgamma_T, down_TP = own_T * dskip_T, own_T[:, None] * dy_TP.astype(jnp.float32)
        else:
            down_TP = product(own_TT, dy_TP, NN, dtype, tile)
            dgamma_T = jnp.sum(x_TP * down_TP, axis=1)
        if not same:
            out.dkappa_BHT[rows] = jnp.sum(x_TP * dlater_TP, axis=1)
            out.dgamma_BHT[rows] = dgamma_T
            dx_TP = scales.kappa_T[:, None] * dlater_TP + scales.gamma_T[:, None] * down_TP
        if inputs.skip_H is not None:
            out.dskip_BHT[rows] = dskip_T
            dx_TP += inputs.skip_H[...].astype(jnp.float32) * dy_TP.astype(jnp.float32)

        if ranked:
            dv_rank_RP = [dv_rank_RP[0] + jnp.sum(by_rank(dx_TP) * v_QRP, axis=0)]
            dx_TP = jnp.sum(by_rank(dx_TP) * v_rank_1RP, axis=1)
        out.dv_BLHP[tokens, :] = dx_TP.astype(out.dv_BLHP.dtype)
        return _demand(refs, decay, q_TN, dh_PN, index, tile), *dv_rank_RP

    more = [jnp.zeros((tile.rank, inputs.v_BLHP.shape[-1]), jnp.float32)] * ranked
    _, *more = _backwards(inputs.q_BHTN.shape[0] // tile.rows, chunk, (refs.dh_BHSPN[...], *more))
    if ranked:
        out.dv_rank_BHSRP[...] = more[0]


class Back(NamedTuple):
    query: Query
    key: Key
    value: Value
    weights: dict  # gradients of gate_BLHP and of the weights that `finish` reads, by their names in `Inputs`


def backward(inputs: Inputs, left_BHS, y_BLHRP, do_BLHP, dlast_BHPN, tile: Tile) -> Back:
    """Gradients from those of the outputs and of the last state.

    Args:
        inputs: h the states before every segment.
        left_BHS: what every segment leaves of it; None: one segment.
        y_BLHRP: before norm and gate.
    """
    dy_BLHRP, weights = finish_back(inputs, y_BLHRP, do_BLHP, tile)
    refs = Gradients(inputs._replace(gate_BLHP=None), dy_BLHRP, dlast_BHPN[:, :, None])
    refs = _without(refs, "gate_rank_HRP", "out_rank_HRP", "norm_HP")
    refs = refs._replace(dh_BHSPN=_segments_back(refs, left_BHS, tile))
    grid, dtype = Grid(inputs, tile), inputs.q_BHTN.dtype
    rows = Split(grid.out("BHTN", dtype), grid.out("BHTN", jnp.int8) if dtype == jnp.bfloat16 else None)
    states = grid.out("BHSAPN", dtype)

    query = _call(
        grid,
        _query_kernel,
        "mamba3_query_gradient",
        tile.query,
        _without(refs._replace(dh_BHSPN=None), "q_BHTN", "skip_H"),
        Query(rows, states),
    )
    refs = _without(refs, "h_BHSPN")
    # A norm makes the outputs' gradients small against the last state's, and what dh loses is the same for many tokens:
    # it would add up in the decay's gradient.
    exact = inputs.norm_HP is not None and dtype == jnp.bfloat16
    key = _call(
        grid,
        functools.partial(_key_kernel, exact=exact),
        "mamba3_key_gradient",
        tile.key,
        _without(refs, "k_BHTN", "skip_H"),
        Key(rows, states, grid.out("BHSPN")),
    )
    skip, kappa = (None if x is None else grid.out("BHT") for x in (inputs.skip_H, inputs.kappa_BHT))
    ranks = None if inputs.v_rank_HRP is None else grid.out("BHSRP")
    value = _call(
        grid,
        _value_kernel,
        "mamba3_value_gradient",
        tile.value,
        refs,
        Value(grid.out("BLHP", dtype), kappa, grid.out("BHT"), skip, ranks),
    )
    return Back(query, key, value, weights)


def _call(grid: Grid, kernel, name: str, how, refs: Gradients, out):
    return call(kernel, name, grid.tile, how, grid.shape, refs, _specs(grid, refs), out)


def _without(refs: Gradients, *fields: str) -> Gradients:
    """Less to read: only `fields` of the inputs set to None."""
    return refs._replace(inputs=refs.inputs._replace(**dict.fromkeys(fields)))


class Finish(NamedTuple):
    """What `finish` reads, as in `Inputs`, and the gradient of what it returns."""

    y_BLHRP: jax.Array
    do_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


class FinishOutputs(NamedTuple):
    dy_BLHRP: jax.Array
    gate_BLHP: jax.Array | None  # its gradient, and those of the weights, a segment each
    gate_rank_BHSRP: jax.Array | None
    out_rank_BHSRP: jax.Array | None
    norm_BHSP: jax.Array | None


def _finish_kernel(refs: Finish, out: FinishOutputs, *, tile: Tile):
    names = ("gate_rank_HRP", "out_rank_HRP", "norm_HP")
    act = lambda gate_TP: silu(gate_TP, refs.do_BLHP.dtype, tile)  # noqa: E731
    weights = dict(zip(names, Weights.load(refs, tile)[1:], strict=True))
    weights = {name: weight for name, weight in weights.items() if weight is not None}

    def finished(y_TP, gate_TP, weights):
        return finish(y_TP, gate_TP, *(weights.get(name) for name in names), act, tile)

    def by_rank(x_TP):
        return x_TP.reshape(tile.tokens, tile.rank, x_TP.shape[-1])

    def chunk(index, sums):
        tokens = tokens_of(index, tile)
        y_TP = refs.y_BLHRP[tokens, :, :].reshape(tile.rows, refs.y_BLHRP.shape[-1]).astype(jnp.float32)
        gate_TP = None
        if refs.gate_BLHP is not None:
            gate_TP = token_rows(refs.gate_BLHP, index, tile).astype(jnp.float32)
        do_TP = token_rows(refs.do_BLHP, index, tile).astype(jnp.float32)
        dy_TP, dgate_TP, d = jax.vjp(finished, y_TP, gate_TP, weights)[1](do_TP)
        out.dy_BLHRP[tokens, :, :] = by_rank(dy_TP).astype(out.dy_BLHRP.dtype)
        if dgate_TP is not None:
            dgate_QP = dgate_TP if tile.rank == 1 else jnp.sum(by_rank(dgate_TP), axis=1)
            out.gate_BLHP[tokens, :] = dgate_QP.astype(out.gate_BLHP.dtype)
        return jax.tree.map(jnp.add, sums, d)

    zeros = {name: jnp.zeros(weight.shape, jnp.float32) for name, weight in weights.items()}
    sums = lax.fori_loop(0, refs.y_BLHRP.shape[0] // tile.tokens, chunk, zeros)
    for name, ref in zip(names, out[2:], strict=True):
        if ref is not None:
            ref[...] = sums[name] if name == "norm_HP" else jnp.sum(by_rank(sums[name]), axis=0)


def finish_back(inputs: Inputs, y_BLHRP, do_BLHP, tile: Tile):
    """dy, and the gradients of what `finish` alone reads."""
    tile = replace(tile, rows=max(16, tile.rows // 2))  # fewer registers a program, more programs
    chunks = inputs.q_BHTN.shape[2] // tile.rows
    grid = Grid(inputs, replace(tile, segments=chunks // math.gcd(chunks, 8)))
    names = ("gate_BLHP", "gate_rank_HRP", "out_rank_HRP", "norm_HP")
    given = [getattr(inputs, name) for name in names]
    refs = Finish(y_BLHRP, do_BLHP, *given)
    out = [grid.out("BLHP", do_BLHP.dtype), grid.out("BHSRP"), grid.out("BHSRP"), grid.out("BHSP")]
    out = [None if array is None else axes for array, axes in zip(given, out, strict=True)]
    out = FinishOutputs(grid.out("BLHRP", do_BLHP.dtype), *out)
    out = grid(_finish_kernel, "mamba3_finish_back", tile.finish, refs, out)
    d = {"gate_BLHP": out.gate_BLHP}
    for name, array, sums in zip(names[1:], given[1:], out[2:], strict=True):
        d[name] = None if array is None else jnp.sum(sums, axis=(0, 2)).astype(array.dtype)
    return out.dy_BLHRP, d


def _segments_back(refs: Gradients, left_BHS, tile: Tile):
    """The gradient of the state after every segment."""
    if tile.segments == 1:
        return refs.dh_BHSPN
    grid = Grid(refs.inputs, tile)
    needed = _without(refs._replace(dh_BHSPN=None), "k_BHTN", "gamma_BHT", "kappa_BHT", "h_BHSPN", "skip_H")
    out = Added(grid.out("BHSPN"), None)
    added = _call(grid, _demanded_kernel, "mamba3_segments_back", tile.added, needed, out)
    return combine_splits_bwd(refs.dh_BHSPN[:, :, 0], left_BHS, added.h_BHSPN)
