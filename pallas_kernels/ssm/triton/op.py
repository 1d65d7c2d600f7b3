"""The op in Pallas Triton, forward and backward: `mamba3`, one custom derivative around rotation and scan.

The backward pass keeps the inputs, rotated queries and keys, the outputs before norm and gate, and the state before
every segment.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ssm.contract import (
    Carry,
    Row,
    Scanned,
    Weights,
    cast,
    cut,
    empty_carry,
    heads_first,
    ordered,
    pad,
    product_dtype,
    require,
    sizes_of,
)
from pallas_kernels.ssm.decay import documents, log_decay
from pallas_kernels.ssm.gradients import AngleSums, Crossing, add_later, crossing_sums, decay_bwd, documents_in_chunks
from pallas_kernels.ssm.triton import rotate, rotate_bwd, scan_bwd, scan_fwd
from pallas_kernels.ssm.triton.common import Tile
from pallas_kernels.ssm.triton.config import order_of, tile_of, tile_size, unsupported


class Operands(NamedTuple):
    """A row as the kernels want it: whole chunks, P, N and S padded, one number a token and head with heads first.

    q, k, v and gate are float32 (true float32 products) or bfloat16 (float32 sums), the rest float32.
    """

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    angle_BLHS: jax.Array | None
    dt_BHL: jax.Array | None
    log_decay_BHL: jax.Array  # since the first token of the chunk, or of its document in the chunk
    decay_rest_BHL: jax.Array | None  # see `scan_fwd.Inputs`
    gamma_BHL: jax.Array
    kappa_BHL: jax.Array | None
    before: Carry
    weights: Weights


def scan(row: Row, rotation: str, *, interpret=None, chunk: int | None = None, **config) -> Scanned:
    """Computes a row in two kernels: rotate, scan. See `contract`; for the rest the backward pass, see above.

    Args:
        chunk: tokens a chunk; the kernel takes the power of two at or below it that its tiles allow.
        config: fields of `Tile` (`segments`: parts of the length side by side), and `programs`, how many fill the
            device.

    Raises:
        ValueError: a rank that is not a power of two up to 16, d_state over 256, P over 128, float32 with P d_state
            over 128 x 128, float64, or an unknown entry of `config`.
    """
    require("triton", unsupported(row))
    size, dtype = sizes_of(row), product_dtype(row)
    order = order_of(rotation, size["N"], size["S"])
    tile = tile_of(row, order.size, config | {"chunk": chunk}, bool(interpret))
    unit = max(tile.tokens, tile.turned) * tile.segments
    last = {"k_BRGN": row.k_BLRGN[:, -1], "v_BHP": row.v_BLHP[:, -1]}

    row = row._replace(before=row.before or empty_carry(row))
    row = row._replace(
        **{name: cast(getattr(row, name), dtype) for name in ("q_BLRGN", "k_BLRGN", "v_BLHP", "gate_BLHP")}
    )
    sizes = {"L": -(-size["L"] // unit) * unit, "P": tile_size(size["P"]), "S": order.room}
    row = ordered(pad(row, **sizes), order.to)
    exact_BHL, rest_BHL = log_decay(heads_first(row.log_a_BLH), row.start_BL, tile.tokens)
    if dtype != jnp.float32:  # whose products have fewer digits than the sum's parts
        exact_BHL, rest_BHL = exact_BHL + rest_BHL, None
    operands = Operands(
        q_BLRGN=row.q_BLRGN,
        k_BLRGN=row.k_BLRGN,
        v_BLHP=row.v_BLHP,
        gate_BLHP=row.gate_BLHP,
        angle_BLHS=row.angle_BLHS,
        dt_BHL=heads_first(row.dt_BLH),
        log_decay_BHL=exact_BHL,
        decay_rest_BHL=rest_BHL,
        gamma_BHL=heads_first(row.gamma_BLH),
        kappa_BHL=heads_first(row.kappa_BLH),
        before=row.before,
        weights=row.weights,
    )
    o_BLHP, after = mamba3(operands, documents(row.start_BL), tile)
    o_BLHP = o_BLHP[:, : size["L"], :, : size["P"]].astype(last["v_BHP"].dtype)
    after = cut(ordered(after, order.back), P=size["P"], S=size["S"])
    return Scanned(o_BLHP, after, **last)


class Kept(NamedTuple):
    """What the backward pass reads beside the inputs."""

    q_BHTN: jax.Array
    k_BHTN: jax.Array
    start_BHCS: jax.Array | None
    y_BLHRP: jax.Array
    starts_BHSPN: jax.Array
    left_BHS: jax.Array | None
    last_BHPN: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mamba3(inputs: Operands, document_BL, tile: Tile):
    """Returns o_BLHP, and the state after the row.

    Args:
        document_BL: int32, document starts in the row up to each token; None: one document.

    Raises:
        ValueError: sizes that the kernels cannot run.
    """
    return _forward(inputs, document_BL, tile, keep=False)[0]


def _fwd(inputs: Operands, document_BL, tile: Tile):
    results, kept = _forward(inputs, document_BL, tile, keep=True)
    return results, (inputs, document_BL, kept)


def _forward(inputs: Operands, document_BL, tile: Tile, *, keep: bool):
    turned = rotate.rotate(_rotated(inputs, document_BL), tile)
    q_BHTN, k_BHTN = checkpoint_name((turned.q_BHTN, turned.k_BHTN), "ssm_rotated")
    scanned = _scanned(inputs, q_BHTN, k_BHTN, inputs.before.h_BHPN[:, :, None], document_BL, tile)
    out, starts_BHSPN, left_BHS = scan_fwd.forward(scanned, tile, keep=keep)
    states = starts_BHSPN, left_BHS, out.h_BHSPN[:, :, -1]
    kept = None
    if keep:
        states = checkpoint_name(states, "ssm_states")
        kept = Kept(q_BHTN, k_BHTN, turned.start_BHCS, checkpoint_name(out.y_BLHRP, "ssm_y"), *states)
    return (out.o_BLHP, Carry(angle_BHS=turned.last_BHS, h_BHPN=states[-1])), kept


def _rotated(inputs: Operands, document_BL) -> rotate.Inputs:
    return rotate.Inputs(
        q_BLRGN=inputs.q_BLRGN,
        k_BLRGN=inputs.k_BLRGN,
        q_bias_HRN=inputs.weights.q_bias_HRN,
        k_bias_HRN=inputs.weights.k_bias_HRN,
        angle_BLHS=inputs.angle_BLHS,
        dt_BHL=inputs.dt_BHL,
        first_BHS=inputs.before.angle_BHS,
        document_BL=document_BL,
        heads=inputs.v_BLHP.shape[2],
    )


def _scanned(inputs: Operands, q_BHTN, k_BHTN, h_BHSPN, document_BL, tile: Tile) -> scan_fwd.Inputs:
    by_row = lambda array_L: None if array_L is None else jnp.repeat(array_L, tile.rank, axis=-1)  # noqa: E731
    names = ("skip_H", "v_rank_HRP", "gate_rank_HRP", "out_rank_HRP", "norm_HP")
    return scan_fwd.Inputs(
        q_BHTN=q_BHTN,
        k_BHTN=k_BHTN,
        v_BLHP=inputs.v_BLHP,
        gate_BLHP=inputs.gate_BLHP,
        log_decay_BHT=by_row(inputs.log_decay_BHL),
        decay_rest_BHT=by_row(inputs.decay_rest_BHL),
        gamma_BHT=by_row(inputs.gamma_BHL),
        kappa_BHT=by_row(inputs.kappa_BHL),
        document_BT=by_row(documents_in_chunks(document_BL, tile.tokens)),
        h_BHSPN=h_BHSPN,
        **{name: getattr(inputs.weights, name) for name in names},
    )


def _bwd(tile: Tile, residuals, cotangents):
    inputs, document_BL, kept = residuals
    do_BLHP, (dangle_BHS, dlast_BHPN) = cotangents
    scanned = _scanned(inputs, kept.q_BHTN, kept.k_BHTN, kept.starts_BHSPN, document_BL, tile)
    query, key, value, d = scan_bwd.backward(scanned, kept.left_BHS, kept.y_BLHRP, do_BLHP, dlast_BHPN, tile)

    rotated = _rotated(inputs, document_BL)
    back = rotate_bwd.rotate_back(rotated, kept.start_BHCS, query.dq_BHTN, key.dk_BHTN, tile)
    crossing_BHSA, end_BH, turned = _crossing(query, key, kept.last_BHPN, dlast_BHPN, dangle_BHS, tile)
    dangle_BLHS = ddt_BHL = dfirst_BHS = None
    if turned is not None:
        sums = AngleSums(dangle_BLHS=back.dangle_BLHS, ddt_BHL=back.ddt_BHL, dphi_BHCS=back.dphi_BHCS)
        dangle_BLHS, ddt_BHL, dfirst_BHS = add_later(
            inputs.angle_BLHS, inputs.dt_BHL, document_BL, sums, dangle_BHS, turned
        )
    document_BL = documents_in_chunks(document_BL, tile.tokens)
    dlog_decay_BHL = decay_bwd(document_BL, back.received_BHL, crossing_BHSA, end_BH, tile.tokens, tile.anchor)

    over_ranks = lambda array_BHT: jnp.sum(array_BHT.reshape(*inputs.gamma_BHL.shape, tile.rank), axis=-1)  # noqa: E731
    weights = {"q_bias_HRN": back.dq_bias_HRN, "k_bias_HRN": back.dk_bias_HRN}
    if inputs.weights.skip_H is not None:
        weights["skip_H"] = jnp.sum(value.dskip_BHT, axis=(0, 2)).astype(inputs.weights.skip_H.dtype)
    if inputs.weights.v_rank_HRP is not None:
        dv_rank_HRP = jnp.sum(value.dv_rank_BHSRP, axis=(0, 2))
        weights["v_rank_HRP"] = dv_rank_HRP.astype(inputs.weights.v_rank_HRP.dtype)
    dgate_BLHP = d.pop("gate_BLHP")
    gradients = Operands(
        q_BLRGN=back.dq_BLRGN,
        k_BLRGN=back.dk_BLRGN,
        v_BLHP=value.dv_BLHP,
        gate_BLHP=dgate_BLHP,
        angle_BLHS=dangle_BLHS,
        dt_BHL=ddt_BHL,
        log_decay_BHL=dlog_decay_BHL,
        decay_rest_BHL=None if inputs.decay_rest_BHL is None else dlog_decay_BHL,
        gamma_BHL=over_ranks(value.dgamma_BHT),
        kappa_BHL=None if inputs.kappa_BHL is None else over_ranks(value.dkappa_BHT),
        before=Carry(angle_BHS=dfirst_BHS, h_BHPN=key.dh_BHSPN[:, :, 0]),
        weights=Weights(**weights, **d),
    )
    return gradients, None


def _crossing(query: scan_bwd.Query, key: scan_bwd.Key, last_BHPN, dlast_BHPN, dangle_BHS, tile: Tile):
    """What earlier tokens mean to later ones, by the states kept: of the decay's gradient, and of the angle's (None
    where nothing turns)."""
    planes = 0 if dangle_BHS is None else dangle_BHS.shape[-1]

    def sums(h_PN, dh_PN):
        h_PN, dh_PN = h_PN.astype(jnp.float32), dh_PN.astype(jnp.float32)
        if not planes:
            return jnp.sum(h_PN * dh_PN, axis=(-2, -1)), None
        u_PS, w_PS, du_PS, dw_PS = h_PN[..., ::2], h_PN[..., 1::2], dh_PN[..., ::2], dh_PN[..., 1::2]
        return crossing_sums(u_PS, w_PS, du_PS, dw_PS, planes)

    found = sums(query.h_BHSAPN, key.dh_BHSAPN), sums(last_BHPN, dlast_BHPN)
    # Or XLA for GPU computes these sums again for each of their users.
    (start_BHSA, turned_BHSAS), (end_BH, end_BHS) = lax.optimization_barrier(found)
    return start_BHSA, end_BH, Crossing(turned_BHSAS, end_BHS, tile.anchor) if planes else None


mamba3.defvjp(_fwd, _bwd)
