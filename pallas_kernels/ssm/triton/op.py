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

from pallas_kernels.ssm.gradients import AngleSums, Crossing, add_later, crossing_sums, decay_bwd, documents_in_chunks
from pallas_kernels.ssm.triton import rotate, rotate_back, scan, scan_back
from pallas_kernels.ssm.triton.common import Tile


class Inputs(NamedTuple):
    """Whole chunks, P, N and S padded: see `rotate.rotate` and `scan.check`. q, k, v and gate float32 (true float32
    products) or bfloat16 (float32 sums), the rest float32. None: absent."""

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    angle_BLHS: jax.Array | None  # radians per unit dt; the H axis may be 1; None, with dt and first: nothing turns
    dt_BHL: jax.Array | None
    log_decay_BHL: jax.Array  # since the first token of the chunk, or of its document in the chunk
    decay_rest_BHL: jax.Array | None  # see `scan.Inputs`
    gamma_BHL: jax.Array  # a token's weight in its own output
    kappa_BHL: jax.Array | None  # and in later ones; None: gamma
    first_BHS: jax.Array | None  # radians: the angle before the row
    h_BHPN: jax.Array  # the state before it
    q_bias_HRN: jax.Array | None
    k_bias_HRN: jax.Array | None
    skip_H: jax.Array | None
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


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
def mamba3(inputs: Inputs, document_BL, tile: Tile):
    """o_BLHP, the last state h_BHPN, and the last angle_BHS in radians, in [0, 2 pi) (None: nothing turns).

    Args:
        document_BL: int32, document starts in the row up to each token; None: one document.

    Raises:
        ValueError: sizes that the kernels cannot run.
    """
    return _forward(inputs, document_BL, tile, keep=False)[0]


def _fwd(inputs: Inputs, document_BL, tile: Tile):
    results, kept = _forward(inputs, document_BL, tile, keep=True)
    return results, (inputs, document_BL, kept)


def _forward(inputs: Inputs, document_BL, tile: Tile, *, keep: bool):
    turned = rotate.rotate(_rotated(inputs, document_BL), tile)
    q_BHTN, k_BHTN = checkpoint_name((turned.q_BHTN, turned.k_BHTN), "ssm_rotated")
    scanned = _scanned(inputs, q_BHTN, k_BHTN, inputs.h_BHPN[:, :, None], document_BL, tile)
    out, starts_BHSPN, left_BHS = scan.forward(scanned, tile, keep=keep)
    states = starts_BHSPN, left_BHS, out.h_BHSPN[:, :, -1]
    kept = None
    if keep:
        states = checkpoint_name(states, "ssm_states")
        kept = Kept(q_BHTN, k_BHTN, turned.start_BHCS, checkpoint_name(out.y_BLHRP, "ssm_y"), *states)
    return (out.o_BLHP, states[-1], turned.last_BHS), kept


def _rotated(inputs: Inputs, document_BL) -> rotate.Inputs:
    names = ("q_BLRGN", "k_BLRGN", "q_bias_HRN", "k_bias_HRN", "angle_BLHS", "dt_BHL", "first_BHS")
    return rotate.Inputs(*(getattr(inputs, name) for name in names), document_BL, heads=inputs.v_BLHP.shape[2])


def _scanned(inputs: Inputs, q_BHTN, k_BHTN, h_BHSPN, document_BL, tile: Tile) -> scan.Inputs:
    by_row = lambda array_L: None if array_L is None else jnp.repeat(array_L, tile.rank, axis=-1)  # noqa: E731
    scalars = (inputs.log_decay_BHL, inputs.decay_rest_BHL, inputs.gamma_BHL, inputs.kappa_BHL)
    return scan.Inputs(
        q_BHTN,
        k_BHTN,
        inputs.v_BLHP,
        inputs.gate_BLHP,
        *(by_row(x) for x in (*scalars, documents_in_chunks(document_BL, tile.tokens))),
        h_BHSPN,
        *inputs[-5:],
    )


def _bwd(tile: Tile, residuals, cotangents):
    inputs, document_BL, kept = residuals
    do_BLHP, dlast_BHPN, dangle_BHS = cotangents
    scanned = _scanned(inputs, kept.q_BHTN, kept.k_BHTN, kept.starts_BHSPN, document_BL, tile)
    query, key, value, d = scan_back.backward(scanned, kept.left_BHS, kept.y_BLHRP, do_BLHP, dlast_BHPN, tile)

    rotated = _rotated(inputs, document_BL)
    back = rotate_back.rotate_back(rotated, kept.start_BHCS, query.dq_BHTN, key.dk_BHTN, tile)
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
    if inputs.skip_H is not None:
        d["skip_H"] = jnp.sum(value.dskip_BHT, axis=(0, 2)).astype(inputs.skip_H.dtype)
    if inputs.v_rank_HRP is not None:
        d["v_rank_HRP"] = jnp.sum(value.dv_rank_BHSRP, axis=(0, 2)).astype(inputs.v_rank_HRP.dtype)
    gradients = inputs._replace(
        q_BLRGN=back.dq_BLRGN,
        k_BLRGN=back.dk_BLRGN,
        v_BLHP=value.dv_BLHP,
        angle_BLHS=dangle_BLHS,
        dt_BHL=ddt_BHL,
        log_decay_BHL=dlog_decay_BHL,
        decay_rest_BHL=None if inputs.decay_rest_BHL is None else dlog_decay_BHL,
        gamma_BHL=over_ranks(value.dgamma_BHT),
        kappa_BHL=None if inputs.kappa_BHL is None else over_ranks(value.dkappa_BHT),
        first_BHS=dfirst_BHS,
        h_BHPN=key.dh_BHSPN[:, :, 0],
        q_bias_HRN=back.dq_bias_HRN,
        k_bias_HRN=back.dk_bias_HRN,
        **d,
    )
    return gradients, None


def _crossing(query: scan_back.Query, key: scan_back.Key, last_BHPN, dlast_BHPN, dangle_BHS, tile: Tile):
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
