"""The op in Pallas Mosaic GPU, forward and backward: `mamba3`, one custom derivative around all its kernels.

The residuals are the inputs, the angles, the outputs before norm and gate, and the state before every split.
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
from pallas_kernels.ssm.mosaic_gpu import bwd, key_bwd, query_bwd, scan
from pallas_kernels.ssm.mosaic_gpu.epilogue_bwd import Epilogue, epilogue_bwd
from pallas_kernels.ssm.mosaic_gpu.phase import phase
from pallas_kernels.ssm.mosaic_gpu.scan import Tile
from pallas_kernels.ssm.mosaic_gpu.sums_bwd import angles_bwd, heads_bwd


class Inputs(NamedTuple):
    """Whole chunks, P and N padded: see `scan.Inputs` and its `check`. bfloat16 tokens, all else float32."""

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    angle_BLHS: jax.Array | None  # radians per unit dt; the H axis may be 1; None: nothing rotates
    dt_BHL: jax.Array | None  # of the angle alone, as first_BHS
    log_decay_BHL: jax.Array  # since the first token of the chunk, or of its document in the chunk
    gamma_BHL: jax.Array  # a token's weight in its own output
    kappa_BHL: jax.Array  # and in later ones
    first_BHS: jax.Array | None  # radians: the angle before the row
    h_BHPN: jax.Array  # the state before it
    q_bias_HRN: jax.Array | None
    k_bias_HRN: jax.Array | None
    skip_H: jax.Array | None
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


class Residuals(NamedTuple):
    """What the backward pass reads beside the inputs."""

    phase_BHLS: jax.Array | None
    y_BLHRP: jax.Array
    starts_BHZPN: jax.Array
    split_decay_BHZ: jax.Array | None
    last_BHPN: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mamba3(inputs: Inputs, document_BL, tile: Tile):
    """Returns o_BLHP, the last state h_BHPN, and the last angle_BHS in radians, in [0, 2 pi) (None without angles).

    Args:
        document_BL: int32, document starts in the row up to each token; None: one document.

    Raises:
        ValueError: see `scan.check`.
    """
    return _forward(inputs, document_BL, tile, residuals=False)[0]


def _fwd(inputs: Inputs, document_BL, tile: Tile):
    results, residuals = _forward(inputs, document_BL, tile, residuals=True)
    names = {"phase_BHLS": "ssm_rotated", "y_BLHRP": "ssm_y"}  # as the Triton op's, the rest its states
    residuals = {
        name: None if x is None else checkpoint_name(x, names.get(name, "ssm_states"))
        for name, x in residuals._asdict().items()
    }
    (o_BLHP, _, angle_BHS), residuals = results, Residuals(**residuals)
    results = o_BLHP, residuals.last_BHPN, angle_BHS
    return results, (inputs, document_BL, residuals)


def _scalars(arrays_BHL, document_BL, tile: Tile):
    """Stacks the scalars of every row of a chunk, ranks one after another; for packed rows, the document too."""
    if document_BL is not None:
        document_BHL = documents_in_chunks(document_BL, tile.tokens)[:, None].astype(jnp.float32)
        arrays_BHL = [*arrays_BHL, jnp.broadcast_to(document_BHL, arrays_BHL[0].shape)]
    batch, n_heads, _ = arrays_BHL[0].shape
    stacked_BHCXQ = jnp.stack([x.reshape(batch, n_heads, -1, tile.tokens) for x in arrays_BHL], axis=3)
    return jnp.tile(stacked_BHCXQ, tile.rank)


def _decays(inputs: Inputs):
    """Returns the decay in powers of two, and that less log2 kappa: a product with kappa is part of the exponent."""
    decay_BHL = inputs.log_decay_BHL * math.log2(math.e)
    return [decay_BHL, decay_BHL - jnp.log2(inputs.kappa_BHL)]


def _forward(inputs: Inputs, document_BL, tile: Tile, *, residuals: bool):
    phase_BHLS, angle_BHS = None, None
    if inputs.angle_BLHS is not None:
        angles = {name: getattr(inputs, name) for name in ("angle_BLHS", "dt_BHL", "first_BHS")}
        phase_BHLS, angle_BHS = phase(**angles, document_BL=document_BL, interpret=tile.interpret)
    same = {name: getattr(inputs, name) for name in scan.Inputs._fields if name in Inputs._fields}
    scanned = scan.Inputs(
        **same,
        phase_BHLS=phase_BHLS,
        scalars_BHCXT=_scalars([*_decays(inputs), inputs.gamma_BHL], document_BL, tile),
        h_BHZPN=inputs.h_BHPN[:, :, None],
    )
    out, starts_BHZPN, split_decay_BHZ = scan.scan(scanned, dataclasses.replace(tile, residuals=residuals))
    last_BHPN = out.h_BHZPN[:, :, -1]
    results = out.o_BLHP, last_BHPN, angle_BHS
    if not residuals:
        return results, None
    return results, Residuals(
        phase_BHLS=phase_BHLS,
        y_BLHRP=out.y_BLHRP,
        starts_BHZPN=starts_BHZPN,
        split_decay_BHZ=split_decay_BHZ,
        last_BHPN=last_BHPN,
    )


class States(NamedTuple):
    """What earlier tokens mean to later ones, by the states at checkpoints: see `gradients`."""

    start_BHZA: jax.Array  # <h, dh> at each, of the decay's gradient
    end_BH: jax.Array  # after the row
    rotated_BHZAS: jax.Array  # likewise of the angle's
    rotated_end_BHS: jax.Array


def _bwd(tile: Tile, kept, cotangents):
    inputs, document_BL, residuals = kept
    do_BLHP, dlast_BHPN, dangle_BHS = cotangents
    epilogue = Epilogue(**{name: getattr(inputs, name) for name in Epilogue._fields})
    dy_BLHRP, dweights = epilogue_bwd(epilogue, residuals.y_BLHRP, do_BLHP, tile)
    refs = bwd.Inputs(
        q_BLRGN=inputs.q_BLRGN,
        k_BLRGN=inputs.k_BLRGN,
        v_BLHP=inputs.v_BLHP,
        dy_BLHRP=dy_BLHRP,
        phase_BHLS=residuals.phase_BHLS,
        scalars_BHCXT=_scalars([*_decays(inputs), inputs.gamma_BHL, inputs.kappa_BHL], document_BL, tile),
        h_BHZPN=residuals.starts_BHZPN,
        q_bias_HRN=inputs.q_bias_HRN,
        k_bias_HRN=inputs.k_bias_HRN,
        v_rank_HRP=inputs.v_rank_HRP,
        skip_H=inputs.skip_H,
    )
    query = query_bwd.query(refs, tile)
    # A norm makes the outputs' gradients small against the last state's, and what dh loses by rounding is the same for
    # many tokens: it would add up in the decay's gradient.
    exact, dh_BHZPN = inputs.norm_HP is not None, _splits_bwd(refs, residuals.split_decay_BHZ, dlast_BHPN, tile)
    key = key_bwd.key(refs._replace(h_BHZPN=dh_BHZPN), tile, exact=exact)
    states = _crossing(query, key, residuals, dlast_BHPN, exact)
    gradients = _row_gradients(inputs, query, key, states, document_BL, tile)
    gradients |= _angle_gradients(inputs, query, key, states, dangle_BHS, document_BL, tile)
    gradients |= dweights._asdict()
    return Inputs(**gradients), None


def _row_gradients(inputs: Inputs, query: query_bwd.Query, key: key_bwd.Key, states: States, document_BL, tile: Tile):
    """Returns the gradients of all inputs but the angles' and the epilogue's."""
    batch, length, rank, groups, d_state = inputs.q_BLRGN.shape
    n_heads = inputs.v_BLHP.shape[2]
    of_heads = lambda x: x.reshape(batch, n_heads, length, rank, d_state)  # noqa: E731
    how = {"groups": groups, "interpret": tile.interpret}
    dq_BLRGN, dq_bias_HRN = heads_bwd(of_heads(query.dq_BHLRN), **how, bias=inputs.q_bias_HRN is not None)
    dk_BLRGN, dk_bias_HRN = heads_bwd(of_heads(key.dk_BHLRN), **how, bias=inputs.k_bias_HRN is not None)

    drows_BHCXRQ = key.drows_BHCXT.reshape(batch, n_heads, -1, 4, rank, tile.tokens)
    dkappa_BHL, dgamma_BHL, dskip_BHL, given_BHL = (
        drows_BHCQ.reshape(batch, n_heads, length) for drows_BHCQ in jnp.moveaxis(jnp.sum(drows_BHCXRQ, axis=4), 3, 0)
    )
    received_BHCRQ = query.received_BHCT.reshape(batch, n_heads, -1, rank, tile.tokens)
    received_BHL = jnp.sum(received_BHCRQ, axis=3).reshape(batch, n_heads, length) - given_BHL
    dv_rank_HRP = None
    if inputs.v_rank_HRP is not None:
        dv_rank_BHZRQP = key.dv_rank_BHZTP.reshape(*key.dv_rank_BHZTP.shape[:3], rank, tile.tokens, -1)
        dv_rank_HRP = jnp.sum(dv_rank_BHZRQP, axis=(0, 2, 4))
    documents_BL = documents_in_chunks(document_BL, tile.tokens)
    dlog_decay_BHL = decay_bwd(
        documents_BL,
        received_BHL,
        states.start_BHZA,
        states.end_BH,
        tokens=tile.tokens,
        interval=bwd.CHECKPOINT_INTERVAL,
    )
    return {
        "q_BLRGN": dq_BLRGN,
        "k_BLRGN": dk_BLRGN,
        "v_BLHP": key.dv_BLHP.reshape(inputs.v_BLHP.shape),
        "log_decay_BHL": dlog_decay_BHL,
        "gamma_BHL": dgamma_BHL,
        "kappa_BHL": dkappa_BHL,
        "h_BHPN": key.dh_BHZPN[:, :, 0],
        "q_bias_HRN": dq_bias_HRN,
        "k_bias_HRN": dk_bias_HRN,
        "skip_H": None if inputs.skip_H is None else jnp.sum(dskip_BHL, axis=(0, 2)),
        "v_rank_HRP": dv_rank_HRP,
    }


def _angle_gradients(
    inputs: Inputs, query: query_bwd.Query, key: key_bwd.Key, states: States, dangle_BHS, document_BL, tile: Tile
):
    """Returns the gradients of angle, dt and the first angle."""
    if inputs.angle_BLHS is None:
        zeros = None if inputs.dt_BHL is None else jnp.zeros_like(inputs.dt_BHL)
        return {"angle_BLHS": None, "dt_BHL": zeros, "first_BHS": None}
    of_heads = lambda dphi_BHLS: dphi_BHLS.reshape(*inputs.dt_BHL.shape, -1)  # noqa: E731
    dangle_BLHS, ddt_BHL, dfirst_BHS = angles_bwd(
        angle_BLHS=inputs.angle_BLHS,
        dt_BHL=inputs.dt_BHL,
        document_BL=document_BL,
        of_q_BHLS=of_heads(query.dphi_BHLS),
        of_k_BHLS=of_heads(key.dphi_BHLS),
        dlast_BHS=dangle_BHS,
        crossing=Crossing(
            starts_BHZAS=states.rotated_BHZAS, end_BHS=states.rotated_end_BHS, interval=bwd.CHECKPOINT_INTERVAL
        ),
        interpret=tile.interpret,
    )
    return {"angle_BLHS": dangle_BLHS, "dt_BHL": ddt_BHL, "first_BHS": dfirst_BHS}


def _crossing(query: query_bwd.Query, key: key_bwd.Key, residuals: Residuals, dlast_BHPN, exact: bool) -> States:
    """Returns inner products of the states with their gradients."""
    planes = 0 if residuals.phase_BHLS is None else residuals.phase_BHLS.shape[-1]

    def sums(h_PN, dh_PN):
        # As the keys before it read dh: what its rounding changes there would stay in every sum over earlier tokens.
        dh_PN = dh_PN if exact else dh_PN.astype(jnp.bfloat16)
        (u_PS, w_PS), (du_PS, dw_PS) = (jnp.split(x.astype(jnp.float32), 2, axis=-1) for x in (h_PN, dh_PN))
        return crossing_sums(u_PS, w_PS, du_PS, dw_PS, planes)

    starts = [sums(query.h_BHZAPN[:, :, :, :1], key.dh_BHZPN[:, :, :, None])]
    if query.h_BHZAPN.shape[3] > 1:
        starts.append(sums(query.h_BHZAPN[:, :, :, 1:], key.dh_BHZAPN))
    starts = [jnp.concatenate(parts, axis=3) for parts in zip(*starts, strict=True)]
    # Or XLA for GPU computes these sums again for each of their users.
    starts, ends = lax.optimization_barrier((starts, sums(residuals.last_BHPN, dlast_BHPN)))
    return States(start_BHZA=starts[0], end_BH=ends[0], rotated_BHZAS=starts[1], rotated_end_BHS=ends[1])


def _splits_bwd(refs: bwd.Inputs, split_decay_BHZ, dlast_BHPN, tile: Tile):
    """Returns the gradient of the state after every split."""
    if tile.splits == 1:
        return dlast_BHPN[:, :, None]
    zeros_BHZPN = jnp.zeros_like(refs.h_BHZPN)
    demanded_BHZPN = key_bwd.key(refs._replace(h_BHZPN=zeros_BHZPN), tile, only_state=True).dh_BHZPN
    return combine_splits_bwd(dlast_BHPN, split_decay_BHZ, demanded_BHZPN)


mamba3.defvjp(_fwd, _bwd)
