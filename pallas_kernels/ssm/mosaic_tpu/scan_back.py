"""The gradients of the chunked scan with its rotation and its end, in one Pallas Mosaic kernel for TPUs.

From the last chunk to the first, with the state before every chunk read and all else recomputed: `scan_back_kernel`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.mosaic_tpu.contract import Grid, Inputs, Refs, Rest, Tiles, refs_of, tokens_second
from pallas_kernels.ssm.mosaic_tpu.scan import call, specs_of
from pallas_kernels.ssm.mosaic_tpu.scan_back_kernel import Back, Gradients, Scratch, kernel


def backward(inputs: Inputs, rest: Rest, h_BCWNX, cotangents, tiles: Tiles) -> Inputs:
    """The gradients of `Inputs`.

    Args:
        rest: as for `scan.forward`.
        h_BCWNX: the state before every chunk, as that gives it.
        cotangents: do_BLHP, dh_BHPN and dangle_BHS of what comes after the row; the last two None: 0.
        tiles: as for the forward pass.
    """
    grid = Grid(inputs, tiles, backwards=True)
    do_BLHP, dh_BHPN, dangle_BHS = cotangents
    batch, length, n_heads, width, d_state = grid.batch, grid.length, grid.n_heads, grid.width, grid.d_state
    angles = grid.heads * grid.planes
    read = refs_of(inputs, rest, grid, h_BCWNX)
    dphi_BKX = None if dangle_BHS is None else grid.of_blocks(dangle_BHS)
    refs = Back(read, do_BLHP.reshape(batch, length, -1), dh_BHPN, dphi_BKX)
    specs = Back(
        specs_of(read, grid, grid.of_states()),
        grid.of_heads(),
        None if dh_BHPN is None else grid.before(grid.heads, width, d_state),
        None if dphi_BKX is None else grid.before(None, 1, angles),
    )
    weights = [array for array in read[-7:] if array is not None]
    like = lambda array: None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)  # noqa: E731
    float32 = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    out = Gradients(
        *(like(array) for array in read[:9]),
        None if inputs.h_BHPN is None else float32(batch, n_heads, width, d_state),
        None if inputs.first_BHS is None else float32(batch, grid.blocks, 1, angles),
        [float32(batch, *array.shape) for array in weights],
    )
    out_specs = Gradients(
        grid.of_groups(),
        grid.of_groups(),
        grid.of_heads(),
        None if out.gate_BLX is None else grid.of_heads(),
        grid.of_angles(),
        *[grid.of_numbers()] * 4,
        None if out.dh_BHPN is None else grid.after(grid.heads, width, d_state),
        None if out.dphi_BKX is None else grid.after(None, 1, angles),
        [grid.after(array.shape[0] // grid.blocks, *array.shape[1:]) for array in weights],
    )
    scratch = Scratch(
        pltpu.VMEM((n_heads // grid.pack, d_state, grid.lanes), jnp.float32),
        pltpu.VMEM((grid.blocks, angles, 1), jnp.float32),
        *[grid.columns()] * 4,
        pltpu.VMEM((angles, grid.tokens), jnp.float32),
        grid.numbers(),
        pltpu.VMEM((n_heads, grid.tokens), jnp.float32),
        [pltpu.VMEM(array.shape, jnp.float32) for array in weights],
    )
    of_grid = functools.partial(kernel, grid=grid)
    d = call(of_grid, "mamba3_tpu_scan_back", grid, refs, specs, out, out_specs, [scratch])
    return _gradients(inputs, read, d, grid)


def _gradients(inputs: Inputs, read: Refs, d: Gradients, grid: Grid) -> Inputs:
    """As `Inputs` has them."""
    present = (jnp.sum(dweight, axis=0) for dweight in d.weights)
    of_heads = [next(present) for _ in read[-7:-5]]
    of_packs = [None if array is None else grid.unpacked(next(present)) for array in read[-5:]]
    of_packs = (
        None if weight is None else weight.reshape(array.shape)
        for weight, array in zip(of_packs, inputs[-5:], strict=True)
    )
    dfirst_BHS = None
    if d.dphi_BKX is not None:
        dfirst_BHS = d.dphi_BKX.reshape(grid.batch, grid.n_heads, grid.planes)
    return Inputs(
        *(None if dx is None else dx.reshape(x.shape) for dx, x in zip(d[:4], inputs[:4], strict=True)),
        *(tokens_second(dx, grid.tokens) for dx in d[4:9]),
        dfirst_BHS,
        d.dh_BHPN,
        *of_heads,
        *of_packs,
    )
