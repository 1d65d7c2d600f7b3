"""The scan in Pallas Mosaic for TPUs: padding and the order of N, and one custom derivative around the kernels.

The backward pass reads the operands again, and the state and the angle before every chunk.

Rows that go on over devices (`along`) take one more pass over states alone, forward and backward. It computes what this
device's run adds to the state, or to the state's gradient. From those of all runs `before_device` computes the state
before this run, or the gradient after it. From there the kernels run as from any state and give all gradients of the
run: the decay's has the inner product of the state and its gradient in every chunk, and the angle's starts from what
later runs give (`_after_run`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.ssm.angle import Along, before_device
from pallas_kernels.ssm.contract import (
    Carry,
    Row,
    Scanned,
    Token,
    cast,
    cut,
    ordered,
    pad,
    product_dtype,
    require,
    sizes_of,
    wants_float32_or_bfloat16,
    wants_normed,
)
from pallas_kernels.ssm.gradients import from_next_run, state_products
from pallas_kernels.ssm.mosaic_tpu import decode, scan_bwd, scan_fwd, state_bwd
from pallas_kernels.ssm.mosaic_tpu.angle import angle_before_chunks
from pallas_kernels.ssm.mosaic_tpu.config import Tiles, limits, order_matrix, order_of, padded_width, tiles_of
from pallas_kernels.ssm.mosaic_tpu.grid import BlockCarry, Constants, Grid, Operands
from pallas_kernels.ssm.operands import STEEPEST, documents


class Results(NamedTuple):
    """What the kernels compute: outputs, and what the next tokens need."""

    o_BLX: jax.Array
    after: BlockCarry  # its angle in [0, 2 pi)
    k_BX: jax.Array  # of the last token that is not padding
    v_BX: jax.Array


class OverDevices(NamedTuple):
    """The states around this device's run of a row that goes on over devices: residuals of the backward pass."""

    before_BHPN: jax.Array
    after_BHPN: jax.Array
    decay_BH: jax.Array  # the factor of the state before the run in the one after it: 0 where a document starts inside


def scan(
    row: Row,
    rotation: str,
    *,
    interpret=None,
    chunk: int | None = None,
    tiles: Tiles | None = None,
    along: Along | None = None,
) -> Scanned:
    """Compute a row in one fused kernel, and its angles in one before it. See `contract`.

    Queries and keys are biased and rotated inside the kernel: they are read once a chunk for all heads of a group, and
    nothing of size L H N is ever stored. Residuals are the operands and the state before every chunk.

    Args:
        interpret: pltpu.InterpretParams, or True.
        chunk: tokens a chunk, rounded up to a multiple of 16; None: the tiles'.
        tiles: how the kernels are cut; None: by this process's TPU.
        along: how rows go on over devices; None: one device has all of them.

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
    row, order_MN = pad(row, **padded), None
    if not order.same_order:
        order_NM = order_matrix(order)
        reordered = lambda bias_HRN: jnp.matmul(bias_HRN, order_NM, precision="highest")  # noqa: E731
        row, order_MN = row._replace(weights=ordered(row.weights, reordered)), order_NM.T.astype(dtype)
    document_BC1Q = documents(row.start_BL, tiles.tokens)
    if document_BC1Q is not None:
        document_BC1Q = document_BC1Q.astype(jnp.float32).reshape(size["B"], -1, 1, tiles.tokens)
    grid = Grid.of(row, size, tiles, along)
    results = mamba3(grid.operands(row), document_BC1Q, order_MN, grid)
    k_BGRN = results.k_BX.reshape(size["B"], size["G"], size["R"], -1)
    scanned = Scanned(
        o_BLHP=results.o_BLX.reshape(row.v_BLHP.shape).astype(v_dtype),
        after=Carry(angle_BHS=grid.of_heads_again(results.after.angle_BK1X), h_BHPN=results.after.h_BHPN),
        k_BRGN=jnp.swapaxes(k_BGRN, 1, 2).astype(k_dtype),
        v_BHP=results.v_BX.reshape(size["B"], size["H"], -1).astype(v_dtype),
    )
    return cut(scanned, **{axis: size[axis] for axis in padded})


def unsupported(inputs: Row | Token) -> str | None:
    """Return what the kernels want of these shapes and dtypes, VMEM included, and what they got; None: nothing.

    This traces what would run, both passes of a scan: how much VMEM they take depends on all of the shapes.
    """

    def run_step(token):
        return decode.step(token, "adjacent")

    def run_scan(row):
        floats, start_BL = row._replace(start_BL=None), row.start_BL
        run = lambda floats: scan(floats._replace(start_BL=start_BL), "adjacent")  # noqa: E731
        results, pull = jax.vjp(run, floats)
        return pull(results)

    is_token = isinstance(inputs, Token)
    wish = wants_float32_or_bfloat16(inputs) or wants_normed(inputs) if is_token else limits(inputs)
    if wish is not None:
        return wish
    try:
        jax.eval_shape(run_step if is_token else run_scan, inputs)
    except ValueError as error:
        return str(error)
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mamba3(operands: Operands, document_BC1Q, order_MN, grid: Grid) -> Results:
    """Run the kernels; the last two arrays are as in `Constants`."""
    return _forward(operands, document_BC1Q, order_MN, grid, residuals=False)[0]


def _forward(operands: Operands, document_BC1Q, order_MN, grid: Grid, *, residuals: bool):
    start_BCHS = angle_BHS = None
    if grid.pairs:
        before_BK1X = None if operands.before is None else operands.before.angle_BK1X
        start_BCHS, angle_BHS = angle_before_chunks(
            operands.angle_BHSL,
            operands.dt_BHL,
            grid.of_heads_again(before_BK1X),
            document_BC1Q=document_BC1Q,
            tiles=grid.tiles,
            along=grid.along,
        )
    constants = Constants(start_BCK1X=grid.of_blocks(start_BCHS), document_BC1Q=document_BC1Q, order_MN=order_MN)
    over = None
    if grid.along is not None:
        before_BHPN, decay_BH = _before_run(operands, constants, grid)
        before_BHPN, decay_BH = checkpoint_name((before_BHPN, decay_BH), "ssm_states")
        operands = operands._replace(before=BlockCarry(angle_BK1X=None, h_BHPN=before_BHPN))
    out = scan_fwd.forward(operands, constants, grid, residuals=residuals)
    if grid.along is not None:
        over = OverDevices(before_BHPN, checkpoint_name(out.after.h_BHPN, "ssm_states"), decay_BH)
    # Sliced from the arrays as they lie in memory: else XLA for TPU copies all of them into another order.
    k_BX, v_BX = (x_BLX[:, grid.given_length - 1] for x_BLX in (operands.k_BLY, operands.v_BLX))
    after = BlockCarry(angle_BK1X=grid.of_blocks(angle_BHS), h_BHPN=out.after.h_BHPN)
    return Results(o_BLX=out.o_BLX, after=after, k_BX=k_BX, v_BX=v_BX), (constants, out.h_BCWNX, over)


def _before_run(operands: Operands, constants: Constants, grid: Grid):
    """Return `before_BHPN` and `decay_BH` of `OverDevices`."""
    tokens = -1 if operands.log_a_BHL.ndim == 3 else (1, -1)  # `tokens_last`
    decay_BH = jnp.exp(jnp.sum(jnp.maximum(operands.log_a_BHL, STEEPEST), axis=tokens))
    decay_BH = jnp.where(_carried(constants, grid)[:, None], decay_BH, 0.0)
    before_BHPN = before_device(decay_BH, scan_fwd.state_after(operands, constants, grid), grid.along)
    if operands.before is not None:
        before_BHPN += operands.before.h_BHPN
    return before_BHPN, decay_BH


def _carried(constants: Constants, grid: Grid):
    """Return whether no document starts in this device's run, of every row."""
    if constants.document_BC1Q is None:
        return jnp.ones(grid.batch, bool)
    return jnp.all(constants.document_BC1Q[..., -1] == 0, axis=(1, 2))


def _fwd(operands: Operands, document_BC1Q, order_MN, grid: Grid):
    operands, document_BC1Q, order_MN = jax.tree.map(lambda primal: primal.value, (operands, document_BC1Q, order_MN))
    results, (constants, h_BCWNX, over) = _forward(operands, document_BC1Q, order_MN, grid, residuals=True)
    return results, (operands, constants, checkpoint_name(h_BCWNX, "ssm_states"), over)


def _bwd(grid: Grid, residuals, cotangents: Results):
    operands, constants, h_BCWNX, over = residuals
    # None where nobody uses a result. Most often that is the state after the row, for which zeros would be large.
    cotangents = jax.tree.map(lambda d: None if isinstance(d, SymbolicZero) else d, cotangents)
    do_BLX = jnp.zeros_like(operands.v_BLX) if cotangents.o_BLX is None else cotangents.o_BLX
    grid, dafter = dataclasses.replace(grid, backwards=True), cotangents.after
    if over is not None:
        how = {"do_BLX": do_BLX, "dlast_BHPN": dafter.h_BHPN}
        dstart_BHPN = state_bwd.state_before(operands, constants, h_BCWNX, grid, **how)
        dafter = _after_run(dstart_BHPN, dafter, over, constants, grid)
    d = scan_bwd.backward(operands, constants, h_BCWNX, grid, do_BLX=do_BLX, dafter=dafter)

    def with_last(dx_BLX, more_BX):
        """Add the last token's gradient in place: a sum with zeros for the others would be one more pass over them."""
        return dx_BLX if more_BX is None else dx_BLX.at[:, grid.given_length - 1].add(more_BX)

    dk_BLX, dv_BLX = with_last(d.k_BLY, cotangents.k_BX), with_last(d.v_BLX, cotangents.v_BX)
    return d._replace(k_BLY=dk_BLX, v_BLX=dv_BLX), None, None


def _after_run(dstart_BHPN, dlast: BlockCarry, over: OverDevices, constants: Constants, grid: Grid) -> BlockCarry:
    """Return the gradient of the angle and the state after this device's run.

    Args:
        dstart_BHPN: the gradient of the state before the run, without the share of later runs.
        dlast: the gradient of the angle and the state after the run, also without it; None in it: 0.
        over: the states around the run.
        constants: of the run.
        grid: of the run.
    """
    dnext_BHPN = before_device(over.decay_BH, dstart_BHPN, grid.along, backwards=True)
    dstart_BHPN += over.decay_BH[..., None, None] * dnext_BHPN
    dend_BHPN = dnext_BHPN if dlast.h_BHPN is None else dnext_BHPN + dlast.h_BHPN
    if not grid.pairs:
        return BlockCarry(angle_BK1X=None, h_BHPN=dend_BHPN)

    def pairs(x_PN):
        if constants.order_MN is not None:
            x_PN = jnp.matmul(x_PN, constants.order_MN.T.astype(jnp.float32), precision="highest")
        return jnp.split(x_PN, 2, axis=-1)

    starts = (x_BHPN[:, :, None, None] for x_BHPN in (over.before_BHPN, dstart_BHPN))  # one split, one checkpoint
    of_states = {"planes": grid.pairs, "interval": grid.length}
    products = state_products([tuple(starts)], (over.after_BHPN, dend_BHPN), pairs, **of_states)
    dlast_BHS = jnp.zeros((grid.batch, grid.n_heads, grid.pairs), jnp.float32)
    if dlast.angle_BK1X is not None:
        dlast_BHS = grid.of_heads_again(dlast.angle_BK1X)
    dlast_BHS += from_next_run(_carried(constants, grid), dlast_BHS, products.of_angle, grid.along)
    return BlockCarry(angle_BK1X=grid.of_blocks(dlast_BHS), h_BHPN=dend_BHPN)


mamba3.defvjp(_fwd, _bwd, symbolic_zeros=True)
