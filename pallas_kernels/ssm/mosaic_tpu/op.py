"""The scan in Pallas Mosaic for TPUs: padding and the order of N, and one custom derivative around the kernels.

The backward pass reads the operands again, and the state and the angle before every chunk.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

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
from pallas_kernels.ssm.mosaic_tpu import decode, scan_bwd, scan_fwd
from pallas_kernels.ssm.mosaic_tpu.angle import angle_before_chunks
from pallas_kernels.ssm.mosaic_tpu.config import Tiles, limits, order_matrix, order_of, padded_width, tiles_of
from pallas_kernels.ssm.mosaic_tpu.grid import BlockCarry, Constants, Grid, Operands
from pallas_kernels.ssm.operands import documents


class Results(NamedTuple):
    """What the kernels give and leave."""

    o_BLX: jax.Array
    after: BlockCarry  # its angle in [0, 2 pi)
    k_BX: jax.Array  # of the last token that is not padding
    v_BX: jax.Array


def scan(row: Row, rotation: str, *, interpret=None, chunk: int | None = None, tiles: Tiles | None = None) -> Scanned:
    """Compute a row in one fused kernel, and its angles in one before it. See `contract`.

    Queries and keys are biased and rotated inside the kernel: they are read once a chunk for all heads of a group, and
    nothing of size L H N is ever stored. Residuals are the operands and the state before every chunk.

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
    row, order_MN = pad(row, **padded), None
    if not order.same_order:
        order_NM = order_matrix(order)
        reordered = lambda bias_HRN: jnp.matmul(bias_HRN, order_NM, precision="highest")  # noqa: E731
        row, order_MN = row._replace(weights=ordered(row.weights, reordered)), order_NM.T.astype(dtype)
    document_BC1Q = documents(row.start_BL, tiles.tokens)
    if document_BC1Q is not None:
        document_BC1Q = document_BC1Q.astype(jnp.float32).reshape(size["B"], -1, 1, tiles.tokens)
    grid = Grid.of(row, size, tiles)
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

    Traces what would run, of a scan both passes: how much VMEM they take depends on all of the shapes.
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
        )
    constants = Constants(start_BCK1X=grid.of_blocks(start_BCHS), document_BC1Q=document_BC1Q, order_MN=order_MN)
    out = scan_fwd.forward(operands, constants, grid, residuals=residuals)
    # Of the arrays as they lie in memory: or XLA for TPU copies all of them into another order.
    k_BX, v_BX = (x_BLX[:, grid.given_length - 1] for x_BLX in (operands.k_BLY, operands.v_BLX))
    after = BlockCarry(angle_BK1X=grid.of_blocks(angle_BHS), h_BHPN=out.after.h_BHPN)
    return Results(o_BLX=out.o_BLX, after=after, k_BX=k_BX, v_BX=v_BX), (constants, out.h_BCWNX)


def _fwd(operands: Operands, document_BC1Q, order_MN, grid: Grid):
    operands, document_BC1Q, order_MN = jax.tree.map(lambda primal: primal.value, (operands, document_BC1Q, order_MN))
    results, (constants, h_BCWNX) = _forward(operands, document_BC1Q, order_MN, grid, residuals=True)
    return results, (operands, constants, checkpoint_name(h_BCWNX, "ssm_states"))


def _bwd(grid: Grid, residuals, cotangents: Results):
    operands, constants, h_BCWNX = residuals
    # None where nobody uses a result: most often the state after the row, whose zeros would be large.
    cotangents = jax.tree.map(lambda d: None if isinstance(d, SymbolicZero) else d, cotangents)
    do_BLX = jnp.zeros_like(operands.v_BLX) if cotangents.o_BLX is None else cotangents.o_BLX
    grid = dataclasses.replace(grid, backwards=True)
    d = scan_bwd.backward(operands, constants, h_BCWNX, grid, do_BLX=do_BLX, dafter=cotangents.after)

    def with_last(dx_BLX, more_BX):
        """Add the last token's in place: the sum with zeros for all others would be one more pass over them."""
        return dx_BLX if more_BX is None else dx_BLX.at[:, grid.given_length - 1].add(more_BX)

    dk_BLX, dv_BLX = with_last(d.k_BLY, cotangents.k_BX), with_last(d.v_BLX, cotangents.v_BX)
    return d._replace(k_BLY=dk_BLX, v_BLX=dv_BLX), None, None


mamba3.defvjp(_fwd, _bwd, symbolic_zeros=True)
