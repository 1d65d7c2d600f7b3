"""The op in Pallas Mosaic for TPUs, forward and backward: `mamba3`, one custom derivative around both kernels.

The backward pass keeps the inputs, the state and the angle before every chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.ssm.contract import Carry, Row, Scanned, cast, cut, ordered, pad, product_dtype, require, sizes_of
from pallas_kernels.ssm.decay import documents
from pallas_kernels.ssm.mosaic_tpu import scan_bwd, scan_fwd
from pallas_kernels.ssm.mosaic_tpu.config import STEPS, limits, order_matrix, order_of, padded_width, tiles_of
from pallas_kernels.ssm.mosaic_tpu.contract import Inputs, Rest, Tiles
from pallas_kernels.ssm.mosaic_tpu.turns import starts


def scan(row: Row, rotation: str, *, interpret=None, chunk: int | None = None, tiles: Tiles | None = None) -> Scanned:
    """Computes a row in one fused kernel, and its angles in one before it. See `contract`.

    Queries and keys are biased and rotated inside the kernel: they are read once a chunk for all heads of a group, and
    nothing of size L H N is ever stored. The backward pass keeps the inputs and the state before every chunk.

    Args:
        interpret: pltpu.InterpretParams, or True.
        chunk: tokens a chunk, rounded up to a multiple of 16; None: the tiles'.
        tiles: how the kernels are cut; None: by this process's TPU.

    Raises:
        ValueError: float64, a rank other than 1, 2, 4 or 8, d_state over 256, P over 128, or tiles that do not fit in
            VMEM.
    """
    require("mosaic_tpu", limits(row))
    size, dtype = sizes_of(row), product_dtype(row)
    tiles, order = tiles_of(row, chunk, tiles, interpret), order_of(rotation, size["N"], size["S"])
    tokens, v_dtype, k_dtype = ("q_BLRGN", "k_BLRGN", "v_BLHP", "gate_BLHP"), row.v_BLHP.dtype, row.k_BLRGN.dtype
    row = row._replace(
        **{name: cast(getattr(row, name), dtype) for name in tokens},
        weights=jax.tree.map(lambda array: array.astype(jnp.float32), row.weights),
    )
    padded = {
        "L": -(-size["L"] // tiles.tokens) * tiles.tokens,
        "P": padded_width(size["H"], size["P"], tiles.heads),
        "S": max(-(-size["S"] // 8), 1) * 8,
        "N": order.size,
    }
    row, order_NM = pad(row, **padded), None
    weights = row.weights
    if not order.same_order:
        order_NM = order_matrix(order)
        reordered = lambda bias_HRN: jnp.matmul(bias_HRN, order_NM, precision="highest")  # noqa: E731
        weights, order_NM = ordered(weights, reordered), order_NM.T.astype(dtype)
    skip_HP = None
    if weights.skip_H is not None:
        skip_HP = jnp.broadcast_to(weights.skip_H[:, None], (size["H"], padded["P"]))
    inputs = Inputs(
        q_BLGRN=jnp.swapaxes(row.q_BLRGN, 2, 3),
        k_BLGRN=jnp.swapaxes(row.k_BLRGN, 2, 3),
        v_BLHP=row.v_BLHP,
        gate_BLHP=row.gate_BLHP,
        angle_BLHS=row.angle_BLHS,
        dt_BLH=row.dt_BLH,
        log_a_BLH=row.log_a_BLH,
        gamma_BLH=row.gamma_BLH,
        kappa_BLH=row.kappa_BLH,
        first_BHS=None if row.before is None else row.before.angle_BHS,
        h_BHPN=None if row.before is None else row.before.h_BHPN,
        skip_HP=skip_HP,
        **{name: array for name, array in weights._asdict().items() if name != "skip_H"},
    )
    document_BL = documents(row.start_BL, tiles.tokens)
    o_BLHP, h_BHPN, angle_BHS, k_BGRN, v_BHP = mamba3(inputs, document_BL, order_NM, size["L"] - 1, tiles)
    scanned = Scanned(
        o_BLHP=o_BLHP.astype(v_dtype),
        after=Carry(angle_BHS=angle_BHS, h_BHPN=h_BHPN),
        k_BRGN=jnp.swapaxes(k_BGRN, 1, 2).astype(k_dtype),
        v_BHP=v_BHP.astype(v_dtype),
    )
    return cut(scanned, **{axis: size[axis] for axis in padded})


def unsupported(row: Row) -> str | None:
    """Returns what the kernels want of these shapes and dtypes, VMEM included, and what they got; None: nothing.

    Traces both passes: how much VMEM they take depends on all of the shapes.
    """
    if (wish := limits(row)) is not None or sizes_of(row)["L"] <= STEPS:
        return wish

    def both(row):
        floats, others = row._replace(start_BL=None), row.start_BL
        run = lambda floats: scan(floats._replace(start_BL=others), "adjacent")  # noqa: E731
        results, pull = jax.vjp(run, floats)
        return pull(results)

    try:
        jax.eval_shape(both, row)
    except ValueError as error:
        return str(error)
    return None


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
    o_BLHP, h_BHPN, h_BCWNX = scan_fwd.forward(inputs, rest, tiles, keep=keep)
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
    d = scan_bwd.backward(inputs, rest, h_BCWNX, (do_BLHP, dh_BHPN, dangle_BHS), tiles)
    dk_BLGRN, dv_BLHP = _with(d.k_BLGRN, last, dk_BGRN), _with(d.v_BLHP, last, dv_BHP)
    return d._replace(k_BLGRN=dk_BLGRN, v_BLHP=dv_BLHP), None, None


def _with(dx_BL, last: int, more_B):
    """In place: the sum with zeros for all other tokens would be one more pass over them."""
    if more_B is None:
        return dx_BL
    flat_BLX = dx_BL.reshape(*dx_BL.shape[:2], -1)
    return flat_BLX.at[:, last].add(more_B.reshape(more_B.shape[0], -1)).reshape(dx_BL.shape)


mamba3.defvjp(_fwd, _bwd, symbolic_zeros=True)
