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
    require,
    sizes_of,
)
from pallas_kernels.ssm.decay import documents, log_decay
from pallas_kernels.ssm.gradients import (
    Crossing,
    combine_splits_bwd,
    crossing_sums,
    decay_bwd,
    documents_in_chunks,
)
from pallas_kernels.ssm.mosaic_gpu import bwd, key_bwd, query_bwd, scan_fwd
from pallas_kernels.ssm.mosaic_gpu.config import PROGRAMS, WIDTH, Tile, interpreter, order_of, splits_of, unsupported
from pallas_kernels.ssm.mosaic_gpu.epilogue_bwd import Epilogue, epilogue_bwd
from pallas_kernels.ssm.mosaic_gpu.phase import phase
from pallas_kernels.ssm.mosaic_gpu.sums_bwd import angles_bwd, heads_bwd


class Operands(NamedTuple):
    """A row as the kernels want it: whole chunks, P, N and S padded, one number a token and head with heads first.

    q, k, v and gate are bfloat16, all else float32.
    """

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    angle_BLHS: jax.Array | None
    dt_BHL: jax.Array | None
    log_decay_BHL: jax.Array  # since the first token of the chunk, or of its document in the chunk
    gamma_BHL: jax.Array
    kappa_BHL: jax.Array
    before: Carry
    weights: Weights


def scan(
    row: Row,
    rotation: str,
    *,
    interpret=None,
    chunk: int | None = None,
    splits: int | None = None,
    programs: int | None = None,
) -> Scanned:
    """Computes a row in one kernel, and its angles in two before it. See `contract`.

    Queries and keys are rotated inside the scans: they are read as they come, once a head, and never stored rotated.

    Args:
        chunk: ignored: it is always 64 rows, ranks times tokens.
        splits: how many parts of the length run side by side; None: as many as there are `programs` for.
        programs: how many fill the device; None: two on each of an H200's multiprocessors.

    Raises:
        ValueError: q, k and v not bfloat16, a rank other than 1, 2 or 4, P over 64, or d_state over 128 with the planes
            padded to 16, 32 or 64.
    """
    del chunk
    require("mosaic_gpu", unsupported(row))
    size = sizes_of(row)
    order = order_of(rotation, size["N"], size["S"])
    splits = splits or splits_of(row, programs or PROGRAMS)
    tile = Tile(rank=size["R"], width=size["P"], splits=splits, interpret=interpreter() if interpret else None)
    unit = tile.tokens * tile.splits
    last = {"k_BRGN": row.k_BLRGN[:, -1], "v_BHP": row.v_BLHP[:, -1]}

    row = row._replace(before=row.before or empty_carry(row))
    if size["R"] == 1 and row.weights.v_rank_HRP is not None:  # the kernels have weights of several ranks only
        v_BLHP = row.v_BLHP.astype(jnp.float32) * row.weights.v_rank_HRP[:, 0]
        row = row._replace(v_BLHP=v_BLHP, weights=row.weights._replace(v_rank_HRP=None))
    tokens = ("q_BLRGN", "k_BLRGN", "v_BLHP", "gate_BLHP")
    row = row._replace(
        **{name: cast(getattr(row, name), jnp.bfloat16) for name in tokens},
        weights=jax.tree.map(lambda array: array.astype(jnp.float32), row.weights),
    )
    row = ordered(pad(row, L=-(-size["L"] // unit) * unit, P=WIDTH, S=order.room), order.to)
    operands = Operands(
        **{name: getattr(row, name) for name in tokens},
        angle_BLHS=row.angle_BLHS,
        dt_BHL=heads_first(row.dt_BLH),
        log_decay_BHL=sum(log_decay(heads_first(row.log_a_BLH), row.start_BL, tile.tokens)),
        gamma_BHL=heads_first(row.gamma_BLH),
        kappa_BHL=heads_first(row.gamma_BLH if row.kappa_BLH is None else row.kappa_BLH),
        before=row.before,
        weights=row.weights,
    )
    o_BLHP, after = mamba3(operands, documents(row.start_BL), tile)
    o_BLHP = o_BLHP[:, : size["L"], :, : size["P"]].astype(last["v_BHP"].dtype)
    return Scanned(o_BLHP, cut(ordered(after, order.back), P=size["P"], S=size["S"]), **last)


class Residuals(NamedTuple):
    """What the backward pass reads beside the inputs."""

    phase_BHLS: jax.Array | None
    y_BLHRP: jax.Array
    starts_BHZPN: jax.Array
    split_decay_BHZ: jax.Array | None
    last_BHPN: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mamba3(inputs: Operands, document_BL, tile: Tile):
    """Returns o_BLHP, and the state after the row.

    Args:
        document_BL: int32, document starts in the row up to each token; None: one document.

    Raises:
        ValueError: see `contract.check`.
    """
    return _forward(inputs, document_BL, tile, residuals=False)[0]


def _fwd(inputs: Operands, document_BL, tile: Tile):
    results, residuals = _forward(inputs, document_BL, tile, residuals=True)
    names = {"phase_BHLS": "ssm_rotated", "y_BLHRP": "ssm_y"}  # as the Triton op's, the rest its states
    residuals = {
        name: None if x is None else checkpoint_name(x, names.get(name, "ssm_states"))
        for name, x in residuals._asdict().items()
    }
    (o_BLHP, after), residuals = results, Residuals(**residuals)
    results = o_BLHP, after._replace(h_BHPN=residuals.last_BHPN)
    return results, (inputs, document_BL, residuals)


def _scalars(arrays_BHL, document_BL, tile: Tile):
    """Stacks the scalars of every row of a chunk, ranks one after another; for packed rows, the document too."""
    if document_BL is not None:
        document_BHL = documents_in_chunks(document_BL, tile.tokens)[:, None].astype(jnp.float32)
        arrays_BHL = [*arrays_BHL, jnp.broadcast_to(document_BHL, arrays_BHL[0].shape)]
    batch, n_heads, _ = arrays_BHL[0].shape
    stacked_BHCXQ = jnp.stack([x.reshape(batch, n_heads, -1, tile.tokens) for x in arrays_BHL], axis=3)
    return jnp.tile(stacked_BHCXQ, tile.rank)


def _decays(inputs: Operands):
    """Returns the decay in powers of two, and that less log2 kappa: a product with kappa is part of the exponent."""
    decay_BHL = inputs.log_decay_BHL * math.log2(math.e)
    return [decay_BHL, decay_BHL - jnp.log2(inputs.kappa_BHL)]


def _forward(inputs: Operands, document_BL, tile: Tile, *, residuals: bool):
    phase_BHLS, angle_BHS = None, None
    if inputs.angle_BLHS is not None:
        phase_BHLS, angle_BHS = phase(
            angle_BLHS=inputs.angle_BLHS,
            dt_BHL=inputs.dt_BHL,
            first_BHS=inputs.before.angle_BHS,
            document_BL=document_BL,
            interpret=tile.interpret,
        )
    same = {name: getattr(inputs, name) for name in ("q_BLRGN", "k_BLRGN", "v_BLHP", "gate_BLHP")}
    scanned = scan_fwd.Inputs(
        **same,
        **inputs.weights._asdict(),
        phase_BHLS=phase_BHLS,
        scalars_BHCXT=_scalars([*_decays(inputs), inputs.gamma_BHL], document_BL, tile),
        h_BHZPN=inputs.before.h_BHPN[:, :, None],
    )
    out, starts_BHZPN, split_decay_BHZ = scan_fwd.scan(scanned, dataclasses.replace(tile, residuals=residuals))
    last_BHPN = out.h_BHZPN[:, :, -1]
    results = out.o_BLHP, Carry(angle_BHS=angle_BHS, h_BHPN=last_BHPN)
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
    do_BLHP, (dangle_BHS, dlast_BHPN) = cotangents
    of_weights = {name: getattr(inputs.weights, name) for name in Epilogue._fields if name in Weights._fields}
    epilogue = Epilogue(gate_BLHP=inputs.gate_BLHP, **of_weights)
    dy_BLHRP, depilogue = epilogue_bwd(epilogue, residuals.y_BLHRP, do_BLHP, tile)
    refs = bwd.Inputs(
        q_BLRGN=inputs.q_BLRGN,
        k_BLRGN=inputs.k_BLRGN,
        v_BLHP=inputs.v_BLHP,
        dy_BLHRP=dy_BLHRP,
        phase_BHLS=residuals.phase_BHLS,
        scalars_BHCXT=_scalars([*_decays(inputs), inputs.gamma_BHL, inputs.kappa_BHL], document_BL, tile),
        h_BHZPN=residuals.starts_BHZPN,
        q_bias_HRN=inputs.weights.q_bias_HRN,
        k_bias_HRN=inputs.weights.k_bias_HRN,
        v_rank_HRP=inputs.weights.v_rank_HRP,
        skip_H=inputs.weights.skip_H,
    )
    query = query_bwd.query(refs, tile)
    # A norm makes the outputs' gradients small against the last state's, and what dh loses by rounding is the same for
    # many tokens: it would add up in the decay's gradient.
    exact, dh_BHZPN = inputs.weights.norm_HP is not None, _splits_bwd(refs, residuals.split_decay_BHZ, dlast_BHPN, tile)
    key = key_bwd.key(refs._replace(h_BHZPN=dh_BHZPN), tile, exact=exact)
    states = _crossing(query, key, residuals, dlast_BHPN, exact)
    drow, dweights = _row_gradients(inputs, query, key, states, document_BL, tile)
    dangles, dfirst_BHS = _angle_gradients(inputs, query, key, states, dangle_BHS, document_BL, tile)
    depilogue = depilogue._asdict()
    gradients = Operands(
        **drow,
        **dangles,
        gate_BLHP=depilogue.pop("gate_BLHP"),
        before=Carry(angle_BHS=dfirst_BHS, h_BHPN=key.dh_BHZPN[:, :, 0]),
        weights=Weights(**dweights, **depilogue),
    )
    return gradients, None


def _row_gradients(inputs: Operands, query: query_bwd.Query, key: key_bwd.Key, states: States, document_BL, tile: Tile):
    """Returns the gradients of the row and of the weights, but for the angles' and the epilogue's, by name."""
    batch, length, rank, groups, d_state = inputs.q_BLRGN.shape
    n_heads = inputs.v_BLHP.shape[2]
    of_heads = lambda x: x.reshape(batch, n_heads, length, rank, d_state)  # noqa: E731
    how = {"groups": groups, "interpret": tile.interpret}
    dq_BLRGN, dq_bias_HRN = heads_bwd(of_heads(query.dq_BHLRN), **how, bias=inputs.weights.q_bias_HRN is not None)
    dk_BLRGN, dk_bias_HRN = heads_bwd(of_heads(key.dk_BHLRN), **how, bias=inputs.weights.k_bias_HRN is not None)

    drows_BHCXRQ = key.drows_BHCXT.reshape(batch, n_heads, -1, 4, rank, tile.tokens)
    dkappa_BHL, dgamma_BHL, dskip_BHL, given_BHL = (
        drows_BHCQ.reshape(batch, n_heads, length) for drows_BHCQ in jnp.moveaxis(jnp.sum(drows_BHCXRQ, axis=4), 3, 0)
    )
    received_BHCRQ = query.received_BHCT.reshape(batch, n_heads, -1, rank, tile.tokens)
    received_BHL = jnp.sum(received_BHCRQ, axis=3).reshape(batch, n_heads, length) - given_BHL
    dv_rank_HRP = None
    if inputs.weights.v_rank_HRP is not None:
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
    drow = {
        "q_BLRGN": dq_BLRGN,
        "k_BLRGN": dk_BLRGN,
        "v_BLHP": key.dv_BLHP.reshape(inputs.v_BLHP.shape),
        "log_decay_BHL": dlog_decay_BHL,
        "gamma_BHL": dgamma_BHL,
        "kappa_BHL": dkappa_BHL,
    }
    dweights = {
        "q_bias_HRN": dq_bias_HRN,
        "k_bias_HRN": dk_bias_HRN,
        "skip_H": None if inputs.weights.skip_H is None else jnp.sum(dskip_BHL, axis=(0, 2)),
        "v_rank_HRP": dv_rank_HRP,
    }
    return drow, dweights


def _angle_gradients(
    inputs: Operands, query: query_bwd.Query, key: key_bwd.Key, states: States, dangle_BHS, document_BL, tile: Tile
):
    """Returns the gradients of angle and dt, by name, and of the angle before the row."""
    if inputs.angle_BLHS is None:
        return {"angle_BLHS": None, "dt_BHL": None}, None
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
    return {"angle_BLHS": dangle_BLHS, "dt_BHL": ddt_BHL}, dfirst_BHS


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
