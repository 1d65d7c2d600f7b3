"""The op in Pallas Mosaic for TPUs, forward and backward: `mamba3`, one custom derivative around both kernels.

The backward pass keeps the inputs, the state and the angle before every chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.ssm.mosaic_tpu import scan, scan_back
from pallas_kernels.ssm.mosaic_tpu.contract import Inputs, Rest, Tiles
from pallas_kernels.ssm.mosaic_tpu.turns import starts


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def mamba3(inputs: Inputs, document_BL, order_MN, last: int, tiles: Tiles):
    """o_BLHP, and what the row leaves: h_BHPN, angle_BHS in radians, in [0, 2 pi), k_BGRN and v_BHP of its last token.

    Where nothing turns the angle is None.

    Args:
        document_BL: int32, document starts in the chunk up to each token; None: one document.
        order_MN: a one where an entry of N, of queries, keys and states, goes in the kernels, in the dtype of the
            products; None: where it is.
        last: index of the last token that is not padding.

    Raises:
        ValueError: see `contract.Grid`.
    """
    return _forward(inputs, document_BL, order_MN, last, tiles, keep=False)[0]


def _forward(inputs: Inputs, document_BL, order_MN, last: int, tiles: Tiles, *, keep: bool):
    start_BCHS = angle_BHS = None
    if inputs.angle_BLHS is not None:
        start_BCHS, angle_BHS = starts(inputs.angle_BLHS, inputs.dt_BLH, inputs.first_BHS, document_BL, tiles)
    rest = Rest(start_BCHS, document_BL, order_MN)
    o_BLHP, h_BHPN, h_BCWNX = scan.forward(inputs, rest, tiles, keep=keep)
    # Of the arrays as they lie in memory: or XLA for TPU copies all of them into another order.
    k_BGRN, v_BHP = (
        x.reshape(*x.shape[:2], -1)[:, last].reshape(-1, *x.shape[2:]) for x in (inputs.k_BLGRN, inputs.v_BLHP)
    )
    return (o_BLHP, h_BHPN, angle_BHS, k_BGRN, v_BHP), (rest, h_BCWNX)


def _fwd(inputs: Inputs, document_BL, order_MN, last: int, tiles: Tiles):
    inputs, document_BL, order_MN = jax.tree.map(lambda primal: primal.value, (inputs, document_BL, order_MN))
    results, (rest, h_BCWNX) = _forward(inputs, document_BL, order_MN, last, tiles, keep=True)
    return results, (inputs, rest, checkpoint_name(h_BCWNX, "ssm_states"))


def _bwd(last: int, tiles: Tiles, residuals, cotangents):
    inputs, rest, h_BCWNX = residuals
    # None where nobody uses a result: most often the state after the row, whose zeros would be large.
    cotangents = [None if isinstance(d, SymbolicZero) else d for d in cotangents]
    do_BLHP, dh_BHPN, dangle_BHS, dk_BGRN, dv_BHP = cotangents
    do_BLHP = jnp.zeros_like(inputs.v_BLHP) if do_BLHP is None else do_BLHP
    d = scan_back.backward(inputs, rest, h_BCWNX, (do_BLHP, dh_BHPN, dangle_BHS), tiles)
    dk_BLGRN, dv_BLHP = _with(d.k_BLGRN, last, dk_BGRN), _with(d.v_BLHP, last, dv_BHP)
    return d._replace(k_BLGRN=dk_BLGRN, v_BLHP=dv_BLHP), None, None


def _with(dx_BL, last: int, more_B):
    """In place: the sum with zeros for all other tokens would be one more pass over them."""
    if more_B is None:
        return dx_BL
    flat_BLX = dx_BL.reshape(*dx_BL.shape[:2], -1)
    return flat_BLX.at[:, last].add(more_B.reshape(more_B.shape[0], -1)).reshape(dx_BL.shape)


mamba3.defvjp(_fwd, _bwd, symbolic_zeros=True)
