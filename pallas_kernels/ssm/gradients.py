"""The parts of backward passes in plain XLA: sums over a row in which rounding errors must not grow.

Both GPU backends use all of it. `mosaic_tpu` sums in its kernel; it uses `state_products` and `from_next_run`,
for what crosses devices.

The gradients of decays and angles are sums over later tokens. They are summed inside a chunk, where the contributions
of a pair of tokens cancel exactly, and over the chunks of one checkpoint interval. At every checkpoint the sum begins
again, from the inner product of the state h with its gradient dh. Z counts splits of the row over programs, A the
checkpoints of a split.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.ssm.angle import Along, before_device
from pallas_kernels.ssm.operands import Operands, combine_splits, documents_in_chunks


def combine_splits_bwd(dlast_BHPN, decay_BHZ, added_BHZPN, along: Along | None = None):
    """Run the scan over splits from the end; return the gradient of the state after every split.

        dh_end[z] = dh_start[z + 1],   dh_start[z] = decay[z] dh_end[z] + added[z]

    Args:
        dlast_BHPN: the gradient of the state after the row.
        decay_BHZ: the decay of the state over each split.
        added_BHZPN: what the outputs of a split add to the gradient of the state before it.
        along: how rows go on over devices; the gradient from the tokens of the next run is then added to `dlast_BHPN`.
    """
    added_BHZPN, decay_BHZ = jnp.flip(added_BHZPN, axis=2), jnp.flip(decay_BHZ, axis=2)
    ends_BHZPN, _ = combine_splits(dlast_BHPN, decay_BHZ, added_BHZPN, along, backwards=True)
    return jnp.flip(ends_BHZPN, axis=2)


class AngleProducts(NamedTuple):
    """Inner products of the states at the checkpoints with their gradients, where the angle's sums begin again.

    Rotating all tokens from t on by one angle only rotates them against the state h before t, and the last state
    against its gradient. So, with dh the gradient of h, the sum over s >= t of a rotary pair's dphi_s is X_t - X_end,
    where

        X = sum_p (h_pw dh_pu - h_pu dh_pw)   of the pair (u, w)
    """

    starts_BHZAS: jax.Array  # X before every `interval` tokens of every split
    end_BHS: jax.Array  # X after the row
    interval: int


class StateProducts(NamedTuple):
    """Inner products of the states with their gradients, where sums over later tokens begin again."""

    start_BHZA: jax.Array  # <h, dh> at every checkpoint, for the decay's gradient
    end_BH: jax.Array  # <h, dh> after the row
    of_angle: AngleProducts | None  # None: nothing rotates


def state_products(starts, end, pairs, *, planes: int, interval: int) -> StateProducts:
    """Return the inner products of states with their gradients, at the checkpoints and after the row.

    Args:
        starts: (h, dh) at the checkpoints, each (B, H, Z, A, P, N), in several parts along A.
        end: (h, dh) after the row.
        pairs: a function that splits a state into the first and the second entries of its rotary pairs, of which the
            first `planes` rotate; None: there are no pairs.
        planes: S; 0: nothing rotates.
        interval: tokens between two checkpoints.
    """

    def products(h_PN, dh_PN):
        h_PN, dh_PN = h_PN.astype(jnp.float32), dh_PN.astype(jnp.float32)
        if pairs is None:
            return jnp.sum(h_PN * dh_PN, axis=(-2, -1)), None
        (u_PS, w_PS), (du_PS, dw_PS) = pairs(h_PN), pairs(dh_PN)
        # One reduction computes both in one pass over the states, which XLA would not fuse.
        both, zeros = (u_PS * du_PS + w_PS * dw_PS, w_PS * du_PS - u_PS * dw_PS), (jnp.float32(0),) * 2
        add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
        alike_S, across_S = lax.reduce(both, zeros, add, (both[0].ndim - 2,))
        return jnp.sum(alike_S, axis=-1), across_S[..., :planes]

    start = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *(products(*part) for part in starts))
    # Without the barrier, XLA for GPU computes these sums again for each of their users.
    (start_BHZA, start_BHZAS), (end_BH, end_BHS) = lax.optimization_barrier((start, products(*end)))
    of_angle = AngleProducts(starts_BHZAS=start_BHZAS, end_BHS=end_BHS, interval=interval) if planes else None
    return StateProducts(start_BHZA=start_BHZA, end_BH=end_BH, of_angle=of_angle)


class AngleSums(NamedTuple):
    """Gradients of angle and dt, float32, with contributions of the tokens of the same chunk alone."""

    dangle_BLHS: jax.Array
    ddt_BHL: jax.Array
    dphi_BHCS: jax.Array  # the sum over a chunk, which tokens of earlier chunks have in their gradients


def over_row(
    operands: Operands,
    sums: AngleSums | None,
    dlast_BHS,
    products: StateProducts,
    *,
    net_BHL,
    tokens: int,
    interval: int,
    along: Along | None = None,
) -> Operands:
    """Return `operands` with the gradients of decay, angle, dt and the first angle in their places.

    Args:
        operands: of the row.
        sums: the angle's gradients inside of chunks; None: nothing rotates.
        dlast_BHS: the gradient of the angle after the row.
        products: of the states with their gradients.
        net_BHL: see `decay_bwd`, as for the next two.
        tokens: in a chunk.
        interval: tokens between two checkpoints.
        along: how rows go on over devices; the gradient from the tokens of the next run is then added to `dlast_BHS`.
    """
    dlog_decay_BHL = decay_bwd(
        document_BL=documents_in_chunks(operands.document_BL, tokens),
        net_BHL=net_BHL,
        products_BHZA=products.start_BHZA,
        end_BH=products.end_BH,
        tokens=tokens,
        interval=interval,
    )
    dangle_BLHS = ddt_BHL = dfirst_BHS = None
    if sums is not None:
        if along is not None:
            carried_B = jnp.ones(dlast_BHS.shape[0], bool)
            if operands.document_BL is not None:
                carried_B = operands.document_BL[:, -1] == 0
            dlast_BHS = dlast_BHS + from_next_run(carried_B, dlast_BHS, products.of_angle, along)
        dangle_BLHS, ddt_BHL, dfirst_BHS = _add_later(operands, sums, dlast_BHS, products.of_angle)
    return operands._replace(
        angle_BLHS=dangle_BLHS,
        dt_BHL=ddt_BHL,
        log_decay_BHL=dlog_decay_BHL,
        decay_rest_BHL=None if operands.decay_rest_BHL is None else dlog_decay_BHL,
        document_BL=None,
        before=operands.before._replace(angle_BHS=dfirst_BHS),
    )


def from_next_run(carried_B, dlast_BHS, products: AngleProducts, along: Along):
    """Return the gradient of the angle before the next run, from the next run's tokens on; 0 for the last run.

    Args:
        carried_B: bool, whether no document starts in this run.
        dlast_BHS: the gradient of the angle after this run, without that from the next run's tokens.
        products: of this run.
        along: where the runs lie.
    """
    carried_B = carried_B.astype(jnp.float32)
    after_BHS = carried_B[:, None, None] * (dlast_BHS - products.end_BHS)
    return before_device(carried_B, products.starts_BHZAS[:, :, 0, 0] + after_BHS, along, backwards=True)


def _add_later(operands: Operands, sums: AngleSums, dlast_BHS, products: AngleProducts):
    """Return the gradients of angle, dt and the first angle: those inside of chunks, and those from later chunks."""
    angle_BLHS, dt_BHL, document_BL = operands.angle_BLHS, operands.dt_BHL, operands.document_BL
    batch, n_heads, length = dt_BHL.shape
    chunks, planes = sums.dphi_BHCS.shape[2:]
    later_BHCS, dfirst_BHS, within_BCQ = _later(document_BL, sums.dphi_BHCS, dlast_BHS, products, length=length)
    dt_BHCQ = dt_BHL.reshape(batch, n_heads, chunks, -1)
    angle_BCQHS = angle_BLHS.reshape(batch, chunks, length // chunks, -1, planes)
    if within_BCQ is not None:
        dt_BHCQ = jnp.where(within_BCQ[:, None], dt_BHCQ, 0.0)
        angle_BCQHS = jnp.where(within_BCQ[..., None, None], angle_BCQHS, 0.0)
    exact = {"precision": "highest"}
    if angle_BCQHS.shape[3] == 1:
        more_BHCQ = jnp.einsum("bcqs,bhcs->bhcq", angle_BCQHS[:, :, :, 0], later_BHCS, **exact)
        more_BCQHS = jnp.einsum("bhcq,bhcs->bcqs", dt_BHCQ, later_BHCS, **exact)
    else:
        more_BHCQ = jnp.einsum("bcqhs,bhcs->bhcq", angle_BCQHS, later_BHCS, **exact)
        more_BCQHS = jnp.moveaxis(dt_BHCQ[..., None] * later_BHCS[:, :, :, None], 1, 3)
    dangle_BLHS = sums.dangle_BLHS + more_BCQHS.reshape(sums.dangle_BLHS.shape)
    return dangle_BLHS, sums.ddt_BHL + more_BHCQ.reshape(sums.ddt_BHL.shape), dfirst_BHS


def _later(document_BL, dphi_BHCS, dlast_BHS, products: AngleProducts, *, length: int):
    """Sum the gradient of the angle that reaches the end of every chunk from later tokens.

    Returns:
        later_BHCS; the gradient of the angle before the row; and a mask (B, C, Q) of the tokens that the end of their
        chunk reaches backward, those of its last document (None: all).
    """
    batch, n_heads, chunks, planes = dphi_BHCS.shape
    splits, checkpoints = products.starts_BHZAS.shape[2:4]
    tokens = length // chunks
    in_split, in_interval = chunks // splits, products.interval // tokens
    padding = checkpoints * in_interval - in_split

    def by_checkpoint(array_BHCS, **how):
        """Group chunks by checkpoint: (B, H, A, chunks between two, S), where A counts those of all splits."""
        array_BHZCS = array_BHCS.reshape(*array_BHCS.shape[:2], splits, in_split, -1)
        array_BHZCS = jnp.pad(array_BHZCS, [(0, 0)] * 3 + [(0, padding), (0, 0)], **how)
        return array_BHZCS.reshape(*array_BHCS.shape[:2], splits * checkpoints, in_interval, -1)

    start_BHAS = products.starts_BHZAS.reshape(batch, n_heads, -1, planes)
    end_BHAS = jnp.concatenate([start_BHAS[:, :, 1:], products.end_BHS[:, :, None]], axis=2)
    first_BHS, after_BHAS = start_BHAS[:, :, 0], (dlast_BHS - products.end_BHS)[:, :, None]
    sums_BHACS, within_BCQ = by_checkpoint(dphi_BHCS), None
    if document_BL is None:
        end_BHAS, first_BHS = end_BHAS + after_BHAS, first_BHS + after_BHAS[:, :, 0]
        up_to_BHACS = jnp.cumsum(sums_BHACS, axis=3)
        later_BHACS = up_to_BHACS[:, :, :, -1:] - up_to_BHACS + end_BHAS[:, :, :, None]
    else:
        places = [z * in_split * tokens + a * products.interval for z in range(splits) for a in range(checkpoints)]
        before_BA = jnp.pad(document_BL, ((0, 0), (1, 0)))[:, np.array([*places, length])]
        is_last_BHAS = (before_BA == before_BA[:, -1:])[:, None, :, None]
        end_BHAS += jnp.where(is_last_BHAS[:, :, 1:], after_BHAS, 0.0)
        first_BHS += jnp.where(is_last_BHAS[:, :, :1], after_BHAS, 0.0)[:, :, 0]
        goes_on_BC, within_BCQ = _reached(document_BL, tokens)
        goes_on_BHACS = by_checkpoint(goes_on_BC[:, None, :, None], constant_values=True)
        goes_on_BHACS = jnp.pad(goes_on_BHACS, [(0, 0)] * 3 + [(0, 1), (0, 0)], constant_values=True)
        sums_BHACS = jnp.concatenate([sums_BHACS, end_BHAS[:, :, :, None]], axis=3)
        sums_BHACS, _ = lax.associative_scan(_compose, (sums_BHACS, goes_on_BHACS), axis=3, reverse=True)
        later_BHACS = sums_BHACS[:, :, :, 1:]
    later_BHZCS = later_BHACS.reshape(batch, n_heads, splits, -1, planes)[:, :, :, :in_split]
    return later_BHZCS.reshape(dphi_BHCS.shape), first_BHS, within_BCQ


def _reached(document_BL, tokens: int):
    """Return whether no document begins in a chunk (B, C), and which tokens (B, C, Q) are of its last document."""
    document_BCQ = documents_in_chunks(document_BL, tokens).reshape(document_BL.shape[0], -1, tokens)
    return document_BCQ[:, :, -1] == 0, document_BCQ == document_BCQ[:, :, -1:]


def _compose(later, sooner):
    """Compose two parts of a scan from the end: sums, and whether no document starts in them."""
    (total, goes_on), (more, more_goes_on) = later, sooner
    return more + jnp.where(more_goes_on, total, 0.0), goes_on & more_goes_on


def decay_bwd(document_BL, net_BHL, products_BHZA, end_BH, tokens: int, interval: int):
    """Return the gradient of c, the log decay since the first token of a chunk (or of its document in the chunk).

    With r_t the incoming less the outgoing gradient of token t, over all pairs of tokens that it is part of,

        dc_t = r_t,   and for the last token T of a chunk   dc_T = r_T + over,   over = sum_s r_s + <dh, h>

    The sum is over the tokens s after the chunk, up to the next checkpoint, that the state at the end of the chunk
    reaches. h is the state at that checkpoint; if the state at the end of the chunk does not reach it, <dh, h> is left
    out.

    Args:
        document_BL: the number of document starts in a token's chunk up to the token; None: one document.
        net_BHL: r.
        products_BHZA: <dh, h> before every `interval` tokens of every split.
        end_BH: <dh, h> of the last state.
        tokens: in a chunk.
        interval: tokens between two checkpoints.
    """
    batch, n_heads, length = net_BHL.shape
    splits, checkpoints = products_BHZA.shape[2:]
    chunks, between = length // tokens // splits, interval // tokens

    def by_checkpoint(array_BHZC):
        """Group chunks by checkpoint: (B, H, Z, A, chunks between two), zeros after a split's last chunk."""
        padding = checkpoints * between - chunks
        array_BHZC = jnp.pad(array_BHZC, [(0, 0)] * 3 + [(0, padding)])
        return array_BHZC.reshape(*array_BHZC.shape[:3], checkpoints, between)

    net_BHZCQ = net_BHL.reshape(batch, n_heads, splits, chunks, tokens)
    carried_BHZCQ, reach_BHZACC, reach_end_BHZAC = net_BHZCQ, jnp.tri(between, k=-1, dtype=bool).T, True
    if document_BL is not None:
        document_BHZCQ = document_BL.reshape(batch, 1, splits, chunks, tokens)
        carried_BHZCQ = jnp.where(document_BHZCQ == 0, net_BHZCQ, 0.0)
        begun_BHZAC = jnp.cumsum(by_checkpoint((document_BHZCQ[..., -1] > 0).astype(jnp.int32)), axis=-1)
        begun_before_BHZAC = jnp.pad(begun_BHZAC[..., :-1], [(0, 0)] * 4 + [(1, 0)])
        reach_BHZACC = reach_BHZACC & (begun_BHZAC[..., :, None] == begun_before_BHZAC[..., None, :])
        reach_end_BHZAC = begun_BHZAC == begun_BHZAC[..., -1:]
    carried_BHZAC = by_checkpoint(jnp.sum(carried_BHZCQ, axis=-1))
    products_BHA = jnp.concatenate([products_BHZA.reshape(batch, n_heads, -1), end_BH[..., None]], axis=-1)
    ends_BHZA = products_BHA[..., 1:].reshape(products_BHZA.shape)
    over_BHZAC = jnp.sum(jnp.where(reach_BHZACC, carried_BHZAC[..., None, :], 0.0), axis=-1)
    over_BHZAC += jnp.where(reach_end_BHZAC, ends_BHZA[..., None], 0.0)
    over_BHZC = lax.optimization_barrier(over_BHZAC.reshape(batch, n_heads, splits, -1)[..., :chunks])
    is_last_Q = jnp.arange(tokens) == tokens - 1
    return (net_BHZCQ + jnp.where(is_last_Q, over_BHZC[..., None], 0.0)).reshape(net_BHL.shape)
