"""The gradients of `scan_fwd`, from its residuals: the backward kernels, one after another, and plain XLA between them.

    epilogue_bwd   do, y               -> dy, gradients of gate, norm and the ranks' weights
    query_bwd      dy, k, v, h         -> dq by head, dphi of queries, h at checkpoints
    key_bwd        dy, q, k, v, dh     -> dk by head, dv, dkappa, dgamma, dphi of keys, dh at checkpoints
    sums_bwd       dq, dk, dphi        -> dq, dk by group, bias gradients, dangle, ddt

What adds up over later tokens begins again at every checkpoint from an inner product of h and dh: see `gradients`.
"""

import jax.numpy as jnp

from pallas_kernels.ssm.contract import Weights
from pallas_kernels.ssm.gradients import combine_splits_bwd, over_row, state_products
from pallas_kernels.ssm.mosaic_gpu import bwd
from pallas_kernels.ssm.mosaic_gpu.epilogue_bwd import Epilogue, epilogue_bwd
from pallas_kernels.ssm.mosaic_gpu.key_bwd import ROWS_BWD, KeyGradients, key_bwd, state_bwd
from pallas_kernels.ssm.mosaic_gpu.query_bwd import QueryGradients, query_bwd
from pallas_kernels.ssm.mosaic_gpu.sums_bwd import angles_bwd, heads_bwd
from pallas_kernels.ssm.mosaic_gpu.tiles import (
    SCALARS_BWD,
    Operands,
    Residuals,
    ScanRefs,
    Tile,
    TokenArrays,
    stack_scalars,
)


def gradients(operands: Operands, residuals: Residuals, cotangents, *, tile: Tile) -> Operands:
    """Return the gradients of the operands, from those of the output and of the state after the row."""
    weights = operands.weights
    do_BLHP, (dangle_BHS, dlast_BHPN) = cotangents
    of_epilogue = Weights(
        gate_rank_HRP=weights.gate_rank_HRP, out_rank_HRP=weights.out_rank_HRP, norm_HP=weights.norm_HP
    )
    epilogue = Epilogue(gate_BLHP=operands.tokens.gate_BLHP, weights=of_epilogue)
    dy_BLHRP, depilogue = epilogue_bwd(epilogue, residuals.y_BLHRP, do_BLHP, tile)
    refs = ScanRefs(
        tokens=operands.tokens._replace(gate_BLHP=None),
        dy_BLHRP=dy_BLHRP,
        phase_BHLS=residuals.phase_BHLS,
        scalars_BHCXT=stack_scalars(operands, SCALARS_BWD, tile),
        h_BHZPN=residuals.starts_BHZPN,
        weights=weights._replace(gate_rank_HRP=None, out_rank_HRP=None, norm_HP=None),
    )
    query = query_bwd(refs, tile)
    # A norm makes the outputs' gradients small against the last state's, and what dh loses by rounding is the same for
    # many tokens: it would add up in the decay's gradient.
    exact, dh_BHZPN = weights.norm_HP is not None, _splits_bwd(refs, residuals.split_decay_BHZ, dlast_BHPN, tile)
    if tile.along is not None:
        dlast_BHPN = dh_BHZPN[:, :, -1]  # the next run's tokens included
    key = key_bwd(refs._replace(h_BHZPN=dh_BHZPN), tile, exact=exact)
    products = _state_products(query, key, residuals, dlast_BHPN, exact=exact)

    sums, dv_rank_HRP = _sum_rows(key, operands, tile)
    dq_BLRGN, dq_bias_HRN = _sum_heads(query.dq_BHLRN, weights.q_bias_HRN, operands, tile)
    dk_BLRGN, dk_bias_HRN = _sum_heads(key.dk_BHLRN, weights.k_bias_HRN, operands, tile)
    of_angle = None
    if operands.angle_BLHS is not None:
        dphi_q_BHLS, dphi_k_BHLS = (x.dphi_BHLS.reshape(*operands.dt_BHL.shape, -1) for x in (query, key))
        of_angle = angles_bwd(operands, dphi_q_BHLS, dphi_k_BHLS, splits=tile.splits, interpret=tile.interpret)
    net_BHL = _sum_ranks(query.incoming_BHCT, operands, tile) - sums["outgoing"]
    how = {"net_BHL": net_BHL, "tokens": tile.tokens, "interval": bwd.CHECKPOINT_INTERVAL, "along": tile.along}
    d_row = over_row(operands, of_angle, dangle_BHS, products, **how)
    return d_row._replace(
        tokens=TokenArrays(
            q_BLRGN=dq_BLRGN,
            k_BLRGN=dk_BLRGN,
            v_BLHP=key.dv_BLHP.reshape(operands.tokens.v_BLHP.shape),
            gate_BLHP=depilogue.gate_BLHP,
        ),
        gamma_BHL=sums["dgamma"],
        kappa_BHL=sums["dkappa"],
        before=d_row.before._replace(h_BHPN=key.dh_BHZPN[:, :, 0]),
        weights=depilogue.weights._replace(
            q_bias_HRN=dq_bias_HRN,
            k_bias_HRN=dk_bias_HRN,
            skip_H=None if weights.skip_H is None else jnp.sum(sums["dskip"], axis=(0, 2)),
            v_rank_HRP=dv_rank_HRP,
        ),
    )


def _splits_bwd(refs: ScanRefs, split_decay_BHZ, dlast_BHPN, tile: Tile):
    """Return the gradient of the state after every split."""
    if tile.splits == 1 and tile.along is None:
        return dlast_BHPN[:, :, None]
    added_BHZPN = state_bwd(refs._replace(h_BHZPN=jnp.zeros_like(refs.h_BHZPN)), tile)
    return combine_splits_bwd(dlast_BHPN, split_decay_BHZ, added_BHZPN, tile.along)


def _sum_ranks(rows_BHCT, operands: Operands, tile: Tile):
    """Add up numbers of rows, (B H C, T), over the ranks of every token."""
    batch, n_heads, length = operands.gamma_BHL.shape
    rows_BHCRQ = rows_BHCT.reshape(batch, n_heads, -1, tile.rank, tile.tokens)
    return jnp.sum(rows_BHCRQ, axis=3).reshape(batch, n_heads, length)


def _sum_rows(key: KeyGradients, operands: Operands, tile: Tile):
    """Add up what `key_bwd` leaves by row: `ROWS_BWD` over ranks, by name, and the gradient of v_rank over tokens."""
    batch, n_heads, length = operands.gamma_BHL.shape
    rows_BHCXRQ = key.rows_BHCXT.reshape(batch, n_heads, -1, len(ROWS_BWD), tile.rank, tile.tokens)
    rows_XBHCQ = jnp.moveaxis(jnp.sum(rows_BHCXRQ, axis=4), 3, 0)
    sums = {name: x.reshape(batch, n_heads, length) for name, x in zip(ROWS_BWD, rows_XBHCQ, strict=True)}
    dv_rank_HRP = None
    if operands.weights.v_rank_HRP is not None:
        dv_rank_BHZRQP = key.dv_rank_BHZTP.reshape(*key.dv_rank_BHZTP.shape[:3], tile.rank, tile.tokens, -1)
        dv_rank_HRP = jnp.sum(dv_rank_BHZRQP, axis=(0, 2, 4))
    return sums, dv_rank_HRP


def _sum_heads(dx_BHLRN, bias_HRN, operands: Operands, tile: Tile):
    """Return the gradient of queries or keys, by group, and of their bias."""
    batch, length, rank, groups, d_state = operands.tokens.q_BLRGN.shape
    dx_BHLRN = dx_BHLRN.reshape(batch, operands.tokens.v_BLHP.shape[2], length, rank, d_state)
    return heads_bwd(dx_BHLRN, groups=groups, interpret=tile.interpret, bias=bias_HRN is not None)


def _state_products(query: QueryGradients, key: KeyGradients, residuals: Residuals, dlast_BHPN, *, exact: bool):
    """Return the inner products at every checkpoint and after the row."""
    # dh is rounded as the keys before it read it: any difference would stay in every sum over earlier tokens.
    read = (lambda dh_PN: dh_PN) if exact else lambda dh_PN: dh_PN.astype(jnp.bfloat16)
    h_BHZAPN, first_BHZPN = query.h_BHZAPN, key.dh_BHZPN
    starts = [(h_BHZAPN[:, :, :, :1], read(first_BHZPN[:, :, :, None]))]
    if h_BHZAPN.shape[3] > 1:
        starts.append((h_BHZAPN[:, :, :, 1:], read(key.dh_BHZAPN)))
    return state_products(
        starts,
        (residuals.last_BHPN, read(dlast_BHPN)),
        lambda x_PN: jnp.split(x_PN, 2, axis=-1),
        planes=0 if residuals.phase_BHLS is None else residuals.phase_BHLS.shape[-1],
        interval=bwd.CHECKPOINT_INTERVAL,
    )
