"""The op in Pallas Triton, forward and backward: `mamba3`, one custom derivative around rotation and scan.

The residuals of the backward pass are the operands, rotated queries and keys, the outputs before norm and gate, and the
state before every split.
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
from pallas_kernels.ssm.decay import documents, documents_in_chunks, log_decay
from pallas_kernels.ssm.gradients import AngleProducts, add_later, decay_bwd, state_products
from pallas_kernels.ssm.triton import rotate, rotate_bwd, scan_bwd, scan_fwd
from pallas_kernels.ssm.triton.common import Operands
from pallas_kernels.ssm.triton.config import Tile, order_of, tile_of, tile_size, unsupported


def scan(row: Row, rotation: str, *, interpret=None, chunk: int | None = None, **config) -> Scanned:
    """Compute a row in two kernels, rotate and scan, see `contract`.

    Args:
        chunk: tokens a chunk; the kernel takes the power of two at or below it that its tiles allow.
        config: fields of `Tile` (`splits`: parts of the length that run side by side), and `programs`, how many fill
            the device.

    Raises:
        ValueError: a rank that is not a power of two up to 16, d_state over 256, P over 128, float32 with P d_state
            over 128 x 128, float64, or an unknown entry of `config`.
    """
    require("triton", unsupported(row))
    size, dtype = sizes_of(row), product_dtype(row)
    order = order_of(rotation, size["N"], size["S"])
    tile = tile_of(row, order.size, config | {"chunk": chunk}, bool(interpret))
    unit = max(tile.tokens, tile.rotate_tokens) * tile.splits
    last_k_BRGN, last_v_BHP = row.k_BLRGN[:, -1], row.v_BLHP[:, -1]

    row = row._replace(before=row.before or empty_carry(row))
    row = row._replace(
        **{name: cast(getattr(row, name), dtype) for name in ("q_BLRGN", "k_BLRGN", "v_BLHP", "gate_BLHP")}
    )
    sizes = {"L": -(-size["L"] // unit) * unit, "P": tile_size(size["P"]), "S": order.kernel_pairs}
    row = ordered(pad(row, **sizes), order.to)
    exact_BHL, rest_BHL = log_decay(heads_first(row.log_a_BLH), row.start_BL, tile.tokens)
    if dtype != jnp.float32:  # its products have fewer digits than the two parts
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
        document_BL=documents(row.start_BL),
        before=row.before,
        weights=row.weights,
    )
    o_BLHP, after = mamba3(operands, tile)
    o_BLHP = o_BLHP[:, : size["L"], :, : size["P"]].astype(last_v_BHP.dtype)
    after = cut(ordered(after, order.back), P=size["P"], S=size["S"])
    return Scanned(o_BLHP=o_BLHP, after=after, k_BRGN=last_k_BRGN, v_BHP=last_v_BHP)


class Residuals(NamedTuple):
    """What the backward pass reads."""

    operands: Operands
    q_BHTN: jax.Array
    k_BHTN: jax.Array
    start_BHCS: jax.Array | None
    y_BLHRP: jax.Array
    h_BHZPN: jax.Array  # before every split
    decay_BHZ: jax.Array | None  # None: there is one split
    last_BHPN: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def mamba3(operands: Operands, tile: Tile):
    """Return o_BLHP, and the state after the row.

    Raises:
        ValueError: sizes that the kernels cannot run.
    """
    results, _ = _forward(operands, tile, residuals=False)
    return results


def _forward(operands: Operands, tile: Tile, *, residuals: bool = True):
    """Return the results of `mamba3`, and the residuals where wanted."""
    rotated = rotate.rotate(operands, tile)
    q_BHTN, k_BHTN = checkpoint_name((rotated.q_BHTN, rotated.k_BHTN), "ssm_rotated")
    scan_operands = _scan_operands(operands, q_BHTN, k_BHTN, operands.before.h_BHPN[:, :, None], tile=tile)
    out, h_BHZPN, decay_BHZ = scan_fwd.forward(scan_operands, tile, residuals=residuals)
    last_BHPN = out.h_BHZPN[:, :, -1]
    if not residuals:
        return (out.o_BLHP, Carry(rotated.last_BHS, last_BHPN)), None
    h_BHZPN, decay_BHZ, last_BHPN = checkpoint_name((h_BHZPN, decay_BHZ, last_BHPN), "ssm_states")
    return (out.o_BLHP, Carry(rotated.last_BHS, last_BHPN)), Residuals(
        operands=operands,
        q_BHTN=q_BHTN,
        k_BHTN=k_BHTN,
        start_BHCS=rotated.start_BHCS,
        y_BLHRP=checkpoint_name(out.y_BLHRP, "ssm_y"),
        h_BHZPN=h_BHZPN,
        decay_BHZ=decay_BHZ,
        last_BHPN=last_BHPN,
    )


def _scan_operands(operands: Operands, q_BHTN, k_BHTN, h_BHZPN, *, tile: Tile) -> scan_fwd.ScanOperands:
    by_row = lambda array_L: None if array_L is None else jnp.repeat(array_L, tile.rank, axis=-1)  # noqa: E731
    return scan_fwd.ScanOperands(
        q_BHTN=q_BHTN,
        k_BHTN=k_BHTN,
        v_BLHP=operands.v_BLHP,
        gate_BLHP=operands.gate_BLHP,
        log_decay_BHT=by_row(operands.log_decay_BHL),
        decay_rest_BHT=by_row(operands.decay_rest_BHL),
        gamma_BHT=by_row(operands.gamma_BHL),
        kappa_BHT=by_row(operands.kappa_BHL),
        document_BT=by_row(documents_in_chunks(operands.document_BL, tile.tokens)),
        h_BHZPN=h_BHZPN,
        weights=operands.weights._replace(q_bias_HRN=None, k_bias_HRN=None),
    )


def _backward(tile: Tile, residuals: Residuals, cotangents):
    operands = residuals.operands
    do_BLHP, dafter = cotangents
    scan_operands = _scan_operands(operands, residuals.q_BHTN, residuals.k_BHTN, residuals.h_BHZPN, tile=tile)
    d = scan_bwd.backward(
        scan_operands,
        decay_BHZ=residuals.decay_BHZ,
        y_BLHRP=residuals.y_BLHRP,
        do_BLHP=do_BLHP,
        dlast_BHPN=dafter.h_BHPN,
        tile=tile,
    )
    angles = rotate.angles_of(operands, residuals.start_BHCS, tile)
    drotated = rotate_bwd.rotate_bwd(operands, angles, d.query.dq_BHTN, d.key.dk_BHTN, tile=tile)
    products_BHZA, end_BH, of_angle = _state_products(d, residuals.last_BHPN, dafter, tile)
    dangle_BLHS = ddt_BHL = dfirst_BHS = None
    if of_angle is not None:
        dangle_BLHS, ddt_BHL, dfirst_BHS = add_later(
            angle_BLHS=operands.angle_BLHS,
            dt_BHL=operands.dt_BHL,
            document_BL=operands.document_BL,
            sums=drotated.angles,
            dlast_BHS=dafter.angle_BHS,
            products=of_angle,
        )
    dlog_decay_BHL = decay_bwd(
        document_BL=documents_in_chunks(operands.document_BL, tile.tokens),
        net_BHL=drotated.r_BHL,
        products_BHZA=products_BHZA,
        end_BH=end_BH,
        tokens=tile.tokens,
        interval=tile.checkpoint_interval,
    )
    over_ranks = lambda array_BHT: jnp.sum(array_BHT.reshape(*operands.gamma_BHL.shape, tile.rank), axis=-1)  # noqa: E731
    gradients = Operands(
        q_BLRGN=drotated.dq_BLRGN,
        k_BLRGN=drotated.dk_BLRGN,
        v_BLHP=d.value.dv_BLHP,
        gate_BLHP=d.epilogue.dgate_BLHP,
        angle_BLHS=dangle_BLHS,
        dt_BHL=ddt_BHL,
        log_decay_BHL=dlog_decay_BHL,
        decay_rest_BHL=None if operands.decay_rest_BHL is None else dlog_decay_BHL,
        gamma_BHL=over_ranks(d.value.dgamma_BHT),
        kappa_BHL=None if operands.kappa_BHL is None else over_ranks(d.value.dkappa_BHT),
        document_BL=None,
        before=Carry(angle_BHS=dfirst_BHS, h_BHPN=d.key.dh_BHZPN[:, :, 0]),
        weights=_weight_gradients(operands.weights, d, drotated),
    )
    return (gradients,)


def _weight_gradients(weights: Weights, d: scan_bwd.ScanGradients, drotated: rotate_bwd.RotateGradients) -> Weights:
    """Add up the partial gradients over batch and splits."""

    def summed(weight, partial):
        return None if weight is None else jnp.sum(partial, axis=(0, 2)).astype(weight.dtype)

    return Weights(
        q_bias_HRN=drotated.dq_bias_HRN,
        k_bias_HRN=drotated.dk_bias_HRN,
        skip_H=summed(weights.skip_H, d.value.dskip_BHT),
        v_rank_HRP=summed(weights.v_rank_HRP, d.value.dv_rank_BHZRP),
        gate_rank_HRP=summed(weights.gate_rank_HRP, d.epilogue.dgate_rank_BHZRP),
        out_rank_HRP=summed(weights.out_rank_HRP, d.epilogue.dout_rank_BHZRP),
        norm_HP=summed(weights.norm_HP, d.epilogue.dnorm_BHZP),
    )


def _state_products(d: scan_bwd.ScanGradients, last_BHPN, dafter: Carry, tile: Tile):
    """Return the inner products of states and their gradients, for the decay's gradient: at the checkpoints and of the
    last state; and for the angle's (None where nothing rotates)."""
    pairs = 0 if dafter.angle_BHS is None else dafter.angle_BHS.shape[-1]

    def products(h_PN, dh_PN):
        h_PN, dh_PN = h_PN.astype(jnp.float32), dh_PN.astype(jnp.float32)
        if not pairs:
            return jnp.sum(h_PN * dh_PN, axis=(-2, -1)), None
        u_PS, w_PS, du_PS, dw_PS = h_PN[..., ::2], h_PN[..., 1::2], dh_PN[..., ::2], dh_PN[..., 1::2]
        return state_products(u_PS=u_PS, w_PS=w_PS, du_PS=du_PS, dw_PS=dw_PS, planes=pairs)

    found = products(d.query.h_BHZAPN, d.key.dh_BHZAPN), products(last_BHPN, dafter.h_BHPN)
    # Without the barrier XLA for GPU computes these sums again for each of their users.
    (start_BHZA, start_BHZAS), (end_BH, end_BHS) = lax.optimization_barrier(found)
    return start_BHZA, end_BH, AngleProducts(start_BHZAS, end_BHS, tile.checkpoint_interval) if pairs else None


mamba3.defvjp(_forward, _backward)
