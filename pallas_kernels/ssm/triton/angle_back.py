"""The gradient of the cumulative angle, summed over later tokens: `suffix` in a chunk, `add_later` from later ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.ssm.triton.common import NN, Tile, documents_in_chunks, product
from pallas_kernels.ssm.triton.rotate import Inputs, _same_document


def suffix(dphi_TS, document_T, tile: Tile):
    """The sum over t >= s in the chunk and the document."""
    if document_T is None:
        return jnp.sum(dphi_TS, axis=0)[None, :] - jnp.cumsum(dphi_TS, axis=0) + dphi_TS
    mask_TT = _same_document(document_T, transposed=True).astype(jnp.float32)
    return product(mask_TT, dphi_TS, NN, jnp.float32, tile)


class Crossing(NamedTuple):
    """What the states that are kept know of the angle's gradient, so that its sums begin again there.

    A turn of all tokens from t on only turns them against the state h before t, and the last state against what is
    asked of it: with dh the gradient of h, the sum over s >= t of a plane's dphi_s is X_t - X_end, where

        X = sum_p (h_pw dh_pu - h_pu dh_pw)   of the plane (u, w)
    """

    starts_BHGAS: jax.Array  # X before every `anchor` tokens of every segment
    end_BHS: jax.Array  # X after the row
    anchor: int


def crossing_sums(u_PS, w_PS, du_PS, dw_PS, planes: int):
    """Of a state (u, w) and its gradient, float32: <h, dh>, which the decay's gradient wants, and X of every plane."""
    # Both in one pass over the states, which XLA would not fuse.
    both, zeros = (u_PS * du_PS + w_PS * dw_PS, w_PS * du_PS - u_PS * dw_PS), (jnp.float32(0),) * 2
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    alike_S, across_S = lax.reduce(both, zeros, add, (both[0].ndim - 2,))
    return jnp.sum(alike_S, axis=-1), across_S[..., :planes]


def add_later(inputs: Inputs, dangle_BLHS, ddt_BHL, dphi_BHCS, dlast_BHS, crossing: Crossing, tile: Tile):
    """Gradients of angle, dt and the first angle: those that come from the tokens of a chunk, and what comes from later
    ones, whose angles are all turned by a chunk's.

    Args:
        dphi_BHCS: a chunk's sum, for the tokens before it.
        dlast_BHS: of the angle after the row.
    """
    batch, n_heads, length = inputs.dt_BHL.shape
    chunks, planes = length // tile.turned, dlast_BHS.shape[-1]
    later_BHCS, dfirst_BHS, within_BCQ = _later(inputs, dphi_BHCS, dlast_BHS, crossing, tile)
    dt_BHCQ = inputs.dt_BHL.reshape(batch, n_heads, chunks, tile.turned)
    angle_BCQHS = inputs.angle_BLHS.reshape(batch, chunks, tile.turned, -1, planes)
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
    return dangle_BLHS + more_BCQHS.reshape(dangle_BLHS.shape), ddt_BHL + more_BHCQ.reshape(ddt_BHL.shape), dfirst_BHS


def _later(inputs: Inputs, dphi_BHCS, dlast_BHS, crossing: Crossing, tile: Tile):
    """The gradient that reaches the end of every chunk from later tokens, that of the angle before the row, and which
    tokens of a chunk (B, C, Q) its end reaches (None: all)."""
    batch, n_heads, chunks, planes = dphi_BHCS.shape
    segments, anchors = crossing.starts_BHGAS.shape[2:4]
    in_segment, in_anchor = chunks // segments, crossing.anchor // tile.turned
    spare = anchors * in_anchor - in_segment

    def by_anchor(array_BHCS, **how):
        """(B, H, A, chunks between two anchors, S), A of all segments."""
        array_BHGCS = array_BHCS.reshape(*array_BHCS.shape[:2], segments, in_segment, -1)
        array_BHGCS = jnp.pad(array_BHGCS, [(0, 0)] * 3 + [(0, spare), (0, 0)], **how)
        return array_BHGCS.reshape(*array_BHCS.shape[:2], segments * anchors, in_anchor, -1)

    start_BHAS = crossing.starts_BHGAS.reshape(batch, n_heads, -1, planes)
    end_BHAS = jnp.concatenate([start_BHAS[:, :, 1:], crossing.end_BHS[:, :, None]], axis=2)
    first_BHS, after_BHAS = start_BHAS[:, :, 0], (dlast_BHS - crossing.end_BHS)[:, :, None]
    sums_BHACS, within_BCQ = by_anchor(dphi_BHCS), None
    if inputs.document_BL is None:
        end_BHAS, first_BHS = end_BHAS + after_BHAS, first_BHS + after_BHAS[:, :, 0]
        up_to_BHACS = jnp.cumsum(sums_BHACS, axis=3)
        later_BHACS = up_to_BHACS[:, :, :, -1:] - up_to_BHACS + end_BHAS[:, :, :, None]
    else:
        places = [g * in_segment * tile.turned + a * crossing.anchor for g in range(segments) for a in range(anchors)]
        before_BA = jnp.pad(inputs.document_BL, ((0, 0), (1, 0)))[:, np.array([*places, inputs.dt_BHL.shape[2]])]
        is_last_BHAS = (before_BA == before_BA[:, -1:])[:, None, :, None]
        end_BHAS += jnp.where(is_last_BHAS[:, :, 1:], after_BHAS, 0.0)
        first_BHS += jnp.where(is_last_BHAS[:, :, :1], after_BHAS, 0.0)[:, :, 0]
        goes_on_BC, within_BCQ = _reached(inputs.document_BL, tile)
        goes_on_BHACS = by_anchor(goes_on_BC[:, None, :, None], constant_values=True)
        goes_on_BHACS = jnp.pad(goes_on_BHACS, [(0, 0)] * 3 + [(0, 1), (0, 0)], constant_values=True)
        sums_BHACS = jnp.concatenate([sums_BHACS, end_BHAS[:, :, :, None]], axis=3)
        sums_BHACS, _ = lax.associative_scan(_compose, (sums_BHACS, goes_on_BHACS), axis=3, reverse=True)
        later_BHACS = sums_BHACS[:, :, :, 1:]
    later_BHGCS = later_BHACS.reshape(batch, n_heads, segments, -1, planes)[:, :, :, :in_segment]
    return later_BHGCS.reshape(dphi_BHCS.shape), first_BHS, within_BCQ


def _reached(document_BL, tile: Tile):
    """Whether no document begins in a chunk (B, C), and which of its tokens (B, C, Q) are of its last's document."""
    document_BCQ = documents_in_chunks(document_BL, tile.turned).reshape(document_BL.shape[0], -1, tile.turned)
    return document_BCQ[:, :, -1] == 0, document_BCQ == document_BCQ[:, :, -1:]


def _compose(later, sooner):
    """For scans from the end: sums, and whether they go on."""
    (total, goes_on), (more, more_goes_on) = later, sooner
    return more + jnp.where(more_goes_on, total, 0.0), goes_on & more_goes_on
