"""The gradients of the chunked scan with its rotation and its end, in one Pallas Mosaic kernel for TPUs.

From the last chunk to the first, with the state before every chunk read and all else recomputed: `scan_bwd_kernel`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.mosaic_tpu.contract import (
    OF_HEADS,
    OF_PACKS,
    Grid,
    Inputs,
    Refs,
    Rest,
    Tiles,
    refs_of,
    tokens_second,
)
from pallas_kernels.ssm.mosaic_tpu.scan_bwd_kernel import Back, Gradients, Scratch, kernel
from pallas_kernels.ssm.mosaic_tpu.scan_fwd import call, specs_of


def backward(inputs: Inputs, rest: Rest, h_BCWNX, cotangents, tiles: Tiles) -> Inputs:
    """The gradients of `Inputs`.

    Args:
        rest: as for `scan_fwd.forward`.
        h_BCWNX: the state before every chunk, as that gives it.
        cotangents: do_BLHP, dh_BHPN and dangle_BHS of what comes after the row; the last two None: 0.
        tiles: as for the forward pass.
    """
    grid = Grid(inputs, tiles, backwards=True)
    do_BLHP, dh_BHPN, dangle_BHS = cotangents
    batch, length, n_heads, width, d_state = grid.batch, grid.length, grid.n_heads, grid.width, grid.d_state
    angles = grid.heads * grid.planes  # 0: nothing turns
    read = refs_of(inputs, rest, grid, h_BCWNX)
    dphi_BKX = None if dangle_BHS is None else grid.of_blocks(dangle_BHS)
    refs = Back(read, do_BLHP.reshape(batch, length, -1), dh_BHPN, dphi_BKX)
    specs = Back(
        specs_of(read, grid, grid.of_states()),
        grid.of_heads(),
        None if dh_BHPN is None else grid.before(grid.heads, width, d_state),
        None if dphi_BKX is None else grid.before(None, 1, angles),
    )
    weights = read.weights()
    like = lambda array: None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)  # noqa: E731
    float32 = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    of_tokens = [name for name in Gradients._fields if name in Refs._fields]
    out = Gradients(
        **{name: like(getattr(read, name)) for name in of_tokens},
        dh_BHPN=None if inputs.h_BHPN is None else float32(batch, n_heads, width, d_state),
        dphi_BKX=None if inputs.first_BHS is None else float32(batch, grid.blocks, 1, angles),
        weights={name: float32(batch, *array.shape) for name, array in weights.items()},
    )
    after = lambda array: grid.after(array.shape[0] // grid.blocks, *array.shape[1:])  # noqa: E731
    out_specs = Gradients(
        **{name: getattr(specs.inputs, name) for name in of_tokens},
        dh_BHPN=None if out.dh_BHPN is None else grid.after(grid.heads, width, d_state),
        dphi_BKX=None if out.dphi_BKX is None else grid.after(None, 1, angles),
        weights={name: after(array) for name, array in weights.items()},
    )
    vmem = lambda *sizes: pltpu.VMEM(sizes, jnp.float32) if all(sizes) else None  # noqa: E731
    scratch = Scratch(
        vmem(n_heads // grid.pack, d_state, grid.lanes),
        vmem(grid.blocks, angles, 1),
        *[grid.columns()] * 4,
        vmem(angles, grid.tokens),
        grid.numbers(),
        vmem(n_heads, grid.tokens),
        {name: vmem(*array.shape) for name, array in weights.items()},
    )
    of_grid = functools.partial(kernel, grid=grid)
    d = call(of_grid, "mamba3_tpu_scan_back", grid, refs, specs, out, out_specs, [scratch])
    return _gradients(inputs, d, grid)


def _gradients(inputs: Inputs, d: Gradients, grid: Grid) -> Inputs:
    """As `Inputs` has them."""
    weights = {}
    for name, dweight in d.weights.items():
        of_row = jnp.sum(dweight, axis=0)
        if name in OF_PACKS:
            weights[OF_PACKS[name]] = grid.unpacked(of_row).reshape(getattr(inputs, OF_PACKS[name]).shape)
        else:
            weights[OF_HEADS[name]] = of_row
    dfirst_BHS = None
    if d.dphi_BKX is not None:
        dfirst_BHS = d.dphi_BKX.reshape(grid.batch, grid.n_heads, grid.planes)
    like = lambda dx, x: None if dx is None else dx.reshape(x.shape)  # noqa: E731
    second = lambda dx: tokens_second(dx, grid.tokens)  # noqa: E731
    return Inputs(
        **dict.fromkeys(OF_HEADS.values())
        | dict.fromkeys(OF_PACKS.values())
        | weights
        | {
            "q_BLGRN": like(d.q_BLX, inputs.q_BLGRN),
            "k_BLGRN": like(d.k_BLX, inputs.k_BLGRN),
            "v_BLHP": like(d.v_BLX, inputs.v_BLHP),
            "gate_BLHP": like(d.gate_BLX, inputs.gate_BLHP),
            "angle_BLHS": second(d.angle_BHSL),
            "dt_BLH": second(d.dt_BHL),
            "log_a_BLH": second(d.log_a_BHL),
            "gamma_BLH": second(d.gamma_BHL),
            "kappa_BLH": second(d.kappa_BHL),
            "first_BHS": dfirst_BHS,
            "h_BHPN": d.dh_BHPN,
        }
    )
