"""The op in Pallas Mosaic GPU, forward and backward: `mamba3`, one custom derivative around all its kernels.

The backward pass keeps the inputs, the angles, the outputs before norm and gate, and the state before every segment.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ssm.gradients import (
    Crossing,
    combine_splits_bwd,
    crossing_sums,
    decay_bwd,
    documents_in_chunks,
)
from pallas_kernels.ssm.mosaic_gpu import back, key_back, query_back, scan
from pallas_kernels.ssm.mosaic_gpu.phase import phase
from pallas_kernels.ssm.mosaic_gpu.scan import ROWS, Tile
from pallas_kernels.ssm.mosaic_gpu.sums_back import angles_back, heads_back
from pallas_kernels.ssm.triton import common, rotate
from pallas_kernels.ssm.triton import scan as triton_scan
from pallas_kernels.ssm.triton import scan_back as triton_back


class Inputs(NamedTuple):
    """Whole chunks, P and N padded: see `scan.Inputs` and its `check`. bfloat16 tokens, all else float32."""

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    angle_BLHS: jax.Array  # radians per unit dt; the H axis may be 1
    dt_BHL: jax.Array
    log_decay_BHL: jax.Array  # since the first token of the chunk, or of its document in the chunk
    gamma_BHL: jax.Array  # a token's weight in its own output
    kappa_BHL: jax.Array  # and in later ones
    first_BHS: jax.Array  # radians: the angle before the row
    h_BHPN: jax.Array  # the state before it
    q_bias_HRN: jax.Array
    k_bias_HRN: jax.Array
    skip_H: jax.Array | None
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


class Kept(NamedTuple):
    """What the backward pass reads beside the inputs."""

    phase_BHLS: jax.Array
    y_BLHRP: jax.Array
    starts_BHSPN: jax.Array
    left_BHS: jax.Array | None
    last_BHPN: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mamba3(inputs: Inputs, document_BL, tile: Tile):
    """o_BLHP, the last state h_BHPN, and the last angle_BHS in radians, in [0, 2 pi).

    Args:
        document_BL: int32, document starts in the row up to each token; None: one document.

    Raises:
        ValueError: see `scan.check`.
    """
    return _forward(inputs, document_BL, tile, keep=False)[0]


def _fwd(inputs: Inputs, document_BL, tile: Tile):
    results, kept = _forward(inputs, document_BL, tile, keep=True)
    names = {"phase_BHLS": "ssm_rotated", "y_BLHRP": "ssm_y"}  # as the Triton op's, the rest its states
    kept = {name: checkpoint_name(x, names.get(name, "ssm_states")) for name, x in kept._asdict().items()}
    (o_BLHP, _, angle_BHS), kept = results, Kept(**kept)
    results = o_BLHP, kept.last_BHPN, angle_BHS
    return results, (inputs, document_BL, kept)


def _angles(inputs: Inputs, document_BL) -> rotate.Inputs:
    angles = (inputs.angle_BLHS, inputs.dt_BHL, inputs.first_BHS, document_BL)
    return rotate.Inputs(inputs.q_BLRGN, inputs.k_BLRGN, None, None, *angles)


def _scalars(arrays_BHL, document_BL, tile: Tile):
    """Of every row of a chunk, ranks one after another; for packed rows, the document too."""
    if document_BL is not None:
        document_BHL = documents_in_chunks(document_BL, tile.tokens)[:, None].astype(jnp.float32)
        arrays_BHL = [*arrays_BHL, jnp.broadcast_to(document_BHL, arrays_BHL[0].shape)]
    batch, n_heads, _ = arrays_BHL[0].shape
    stacked_BHCXQ = jnp.stack([x.reshape(batch, n_heads, -1, tile.tokens) for x in arrays_BHL], axis=3)
    return jnp.tile(stacked_BHCXQ, tile.rank)


def _decays(inputs: Inputs):
    """In powers of two, and that less log2 kappa: a product with kappa is part of the exponent."""
    decay_BHL = inputs.log_decay_BHL * math.log2(math.e)
    return [decay_BHL, decay_BHL - jnp.log2(inputs.kappa_BHL)]


def _forward(inputs: Inputs, document_BL, tile: Tile, *, keep: bool):
    phase_BHLS, angle_BHS = phase(_angles(inputs, document_BL), _triton_tile(tile))
    scanned = scan.Inputs(
        *inputs[:4],
        phase_BHLS,
        _scalars([*_decays(inputs), inputs.gamma_BHL], document_BL, tile),
        inputs.h_BHPN[:, :, None],
        *inputs[-7:],
    )
    out, starts_BHSPN, left_BHS = scan.scan(scanned, dataclasses.replace(tile, keep=keep))
    last_BHPN = out.h_BHSPN[:, :, -1]
    kept = Kept(phase_BHLS, out.y_BLHRP, starts_BHSPN, left_BHS, last_BHPN) if keep else None
    return (out.o_BLHP, last_BHPN, angle_BHS), kept


def _triton_tile(tile: Tile, **how) -> common.Tile:
    return common.Tile(width=tile.width, interpret=tile.interpret is not None, **how)


def _bwd(tile: Tile, residuals, cotangents):
    inputs, document_BL, kept = residuals
    do_BLHP, dlast_BHPN, dangle_BHS = cotangents
    batch, length, rank, groups, d_state = inputs.q_BLRGN.shape
    n_heads = inputs.v_BLHP.shape[2]
    rows_BHTN = jax.ShapeDtypeStruct((batch, n_heads, length * rank, d_state), inputs.q_BLRGN.dtype)
    weights = {name: getattr(inputs, name) for name in ("gate_BLHP", "gate_rank_HRP", "out_rank_HRP", "norm_HP")}
    none = dict.fromkeys(triton_scan.Inputs._fields)
    ends = triton_scan.Inputs(**none | weights | {"q_BHTN": rows_BHTN, "v_BLHP": inputs.v_BLHP})
    rows = _triton_tile(tile, rows=ROWS, rank=rank)
    dy_BLHRP, d = triton_back.finish_back(ends, kept.y_BLHRP, do_BLHP, rows)

    refs = back.Inputs(
        inputs.q_BLRGN,
        inputs.k_BLRGN,
        inputs.v_BLHP,
        dy_BLHRP,
        kept.phase_BHLS,
        _scalars([*_decays(inputs), inputs.gamma_BHL, inputs.kappa_BHL], document_BL, tile),
        kept.starts_BHSPN,
        inputs.q_bias_HRN,
        inputs.k_bias_HRN,
        inputs.v_rank_HRP,
        inputs.skip_H,
    )
    query = query_back.query(refs, tile)
    # A norm makes the outputs' gradients small against the last state's: see `triton.scan_back.backward`.
    exact, asked_BHSPN = inputs.norm_HP is not None, _segments_back(refs, kept.left_BHS, dlast_BHPN, tile)
    key = key_back.key(refs._replace(h_BHSPN=asked_BHSPN), tile, exact=exact)

    heads_tile = _triton_tile(tile)
    per_head = lambda dx_BHLX: dx_BHLX.reshape(batch, n_heads, length, rank, d_state)  # noqa: E731
    dq_BLRGN, dq_bias_HRN = heads_back(per_head(query.dq_BHLRN), groups, heads_tile)
    dk_BLRGN, dk_bias_HRN = heads_back(per_head(key.dk_BHLRN), groups, heads_tile)
    crossing_BHSA, end_BH, turned = _crossing(query, key, kept.last_BHPN, dlast_BHPN, dangle_BHS.shape[-1], exact)
    of_heads = lambda dphi_BHLS: dphi_BHLS.reshape(batch, n_heads, length, -1)  # noqa: E731
    dphi = of_heads(query.dphi_BHLS), of_heads(key.dphi_BHLS)
    # Twice as many tokens a program are 0.027 ms of 0.184 faster (H100, B16 L2048 H32).
    angles_tile = dataclasses.replace(heads_tile, turned=min(32, tile.tokens))
    dangles = angles_back(_angles(inputs, document_BL), *dphi, dangle_BHS, turned, angles_tile)

    drows_BHCXRQ = key.drows_BHCXT.reshape(batch, n_heads, -1, 4, rank, tile.tokens)
    dkappa_BHL, dgamma_BHL, dskip_BHL, given_BHL = (
        drows_BHCQ.reshape(batch, n_heads, length) for drows_BHCQ in jnp.moveaxis(jnp.sum(drows_BHCXRQ, axis=4), 3, 0)
    )
    received_BHCRQ = query.received_BHCT.reshape(batch, n_heads, -1, rank, tile.tokens)
    received_BHL = jnp.sum(received_BHCRQ, axis=3).reshape(batch, n_heads, length) - given_BHL
    if inputs.skip_H is not None:
        d["skip_H"] = jnp.sum(dskip_BHL, axis=(0, 2))
    if inputs.v_rank_HRP is not None:
        dv_rank_BHSRQP = key.dv_rank_BHSTP.reshape(*key.dv_rank_BHSTP.shape[:3], rank, tile.tokens, -1)
        d["v_rank_HRP"] = jnp.sum(dv_rank_BHSRQP, axis=(0, 2, 4))
    documents_BL = documents_in_chunks(document_BL, tile.tokens)
    dlog_decay_BHL = decay_bwd(documents_BL, received_BHL, crossing_BHSA, end_BH, tile.tokens, back.ANCHOR)
    gradients = inputs._replace(
        q_BLRGN=dq_BLRGN.astype(inputs.q_BLRGN.dtype),
        k_BLRGN=dk_BLRGN.astype(inputs.k_BLRGN.dtype),
        v_BLHP=key.dv_BLHP.reshape(inputs.v_BLHP.shape),
        angle_BLHS=dangles[0],
        dt_BHL=dangles[1],
        first_BHS=dangles[2],
        log_decay_BHL=dlog_decay_BHL,
        gamma_BHL=dgamma_BHL,
        kappa_BHL=dkappa_BHL,
        h_BHPN=key.dh_BHSPN[:, :, 0],
        q_bias_HRN=dq_bias_HRN,
        k_bias_HRN=dk_bias_HRN,
        **d,
    )
    return gradients, None


def _crossing(query: query_back.Query, key: key_back.Key, last_BHPN, dlast_BHPN, planes: int, exact: bool):
    """What earlier tokens mean to later ones, by the states kept: of the decay's gradient, and of the angle's."""

    def sums(h_PN, dh_PN):
        # As the keys before it read dh: what its rounding changes there would stay in every sum over earlier tokens.
        dh_PN = dh_PN if exact else dh_PN.astype(jnp.bfloat16)
        (u_PS, w_PS), (du_PS, dw_PS) = (jnp.split(x.astype(jnp.float32), 2, axis=-1) for x in (h_PN, dh_PN))
        return crossing_sums(u_PS, w_PS, du_PS, dw_PS, planes)

    starts = [sums(query.h_BHSAPN[:, :, :, :1], key.dh_BHSPN[:, :, :, None])]
    if query.h_BHSAPN.shape[3] > 1:
        starts.append(sums(query.h_BHSAPN[:, :, :, 1:], key.dh_BHSAPN))
    starts = [jnp.concatenate(parts, axis=3) for parts in zip(*starts, strict=True)]
    # Or XLA for GPU computes these sums again for each of their users.
    (start_BHSA, turned_BHGAS), (end_BH, end_BHS) = lax.optimization_barrier((starts, sums(last_BHPN, dlast_BHPN)))
    return start_BHSA, end_BH, Crossing(turned_BHGAS, end_BHS, back.ANCHOR)


def _segments_back(refs: back.Inputs, left_BHS, dlast_BHPN, tile: Tile):
    """The gradient of the state after every segment."""
    if tile.segments == 1:
        return dlast_BHPN[:, :, None]
    zeros_BHSPN = jnp.zeros_like(refs.h_BHSPN)
    demanded_BHSPN = key_back.key(refs._replace(h_BHSPN=zeros_BHSPN), tile, only_state=True).dh_BHSPN
    return combine_splits_bwd(dlast_BHPN, left_BHS, demanded_BHSPN)


mamba3.defvjp(_fwd, _bwd)
