"""The op in Pallas Triton, forward and backward: `mamba3`, one custom derivative around rotation and scan.

The residuals of the backward pass are the operands, rotated queries and keys, the outputs before norm and gate, and the
state before every split.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ssm.contract import Carry, Row, Scanned, Weights, product_dtype, require, sizes_of
from pallas_kernels.ssm.gradients import StateProducts, over_row, state_products
from pallas_kernels.ssm.operands import Operands, TokenArrays, documents_in_chunks, operands_of, scanned
from pallas_kernels.ssm.triton import rotate, rotate_bwd, scan_bwd, scan_fwd
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
    sizes = {"L": -(-size["L"] // unit) * unit, "P": tile_size(size["P"]), "S": order.kernel_pairs}
    operands = operands_of(row, order, dtype=dtype, sizes=sizes, tokens=tile.tokens)
    return scanned(row, order, *mamba3(operands, tile))


class Residuals(NamedTuple):
    """What the backward pass reads."""

    operands: Operands
    q_BHTN: jax.Array
    k_BHTN: jax.Array
    start_BHCS: jax.Array | None
    y_BLHRP: jax.Array
    h_BHZPN: jax.Array  # before every split
    decay_BHZ: jax.Array | None  # None: the row is one split
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
        v_BLHP=operands.tokens.v_BLHP,
        gate_BLHP=operands.tokens.gate_BLHP,
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
    products = _state_products(d, residuals.last_BHPN, dafter, tile)
    d_row = over_row(
        operands,
        drotated.angles,
        dafter.angle_BHS,
        products,
        net_BHL=drotated.r_BHL,
        tokens=tile.tokens,
        interval=tile.checkpoint_interval,
        along=tile.along,
    )
    over_ranks = lambda array_BHT: jnp.sum(array_BHT.reshape(*operands.gamma_BHL.shape, tile.rank), axis=-1)  # noqa: E731
    gradients = d_row._replace(
        tokens=TokenArrays(
            q_BLRGN=drotated.dq_BLRGN,
            k_BLRGN=drotated.dk_BLRGN,
            v_BLHP=d.value.dv_BLHP,
            gate_BLHP=d.epilogue.dgate_BLHP,
        ),
        gamma_BHL=over_ranks(d.value.dgamma_BHT),
        kappa_BHL=None if operands.kappa_BHL is None else over_ranks(d.value.dkappa_BHT),
        before=d_row.before._replace(h_BHPN=d.key.dh_BHZPN[:, :, 0]),
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


def _state_products(d: scan_bwd.ScanGradients, last_BHPN, dafter: Carry, tile: Tile) -> StateProducts:
    """Return the inner products at every checkpoint and after the row."""
    rotates = dafter.angle_BHS is not None
    return state_products(
        [(d.query.h_BHZAPN, d.key.dh_BHZAPN)],
        (last_BHPN, d.dlast_BHPN),
        (lambda x_PN: (x_PN[..., ::2], x_PN[..., 1::2])) if rotates else None,
        planes=dafter.angle_BHS.shape[-1] if rotates else 0,
        interval=tile.checkpoint_interval,
    )


mamba3.defvjp(_forward, _backward)
