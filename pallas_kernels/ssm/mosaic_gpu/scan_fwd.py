"""Bias, rotation and the chunked scan in one Pallas Mosaic GPU kernel, forward.

    y_t = sum_{s < t} e^(c_t - c_s) kappa_s (q_t . k_s) x_s  +  gamma_t (q_t . k_t) x_t  +  e^(c_t) h_0 q_t  +  D x_t
    h_T = sum_s e^(c_T - c_s) kappa_s x_s k_s^T  +  e^(c_T) h_0
    o_t = sum over ranks of out_rank norm(y_t) silu(gate gate_rank)

within a chunk of 64 rows, c the log2 of the decay since its first token; q and k are biased and rotated, by the angles
of `phase`, as they are read. A row is one rank of one token, **tokens fastest**: of the four warps that share a tile,
each then holds rows of one rank, see `registers`.

One program, one warpgroup, computes a head of a batch entry, or a split of it, see `scan_kernel`; two programs share
a multiprocessor, and one computes while the other waits.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.gradients import combine_splits
from pallas_kernels.ssm.mosaic_gpu import scan_kernel
from pallas_kernels.ssm.mosaic_gpu.config import WIDTH, Tile
from pallas_kernels.ssm.mosaic_gpu.contract import Inputs, Outputs, Sizes, check, n_planes
from pallas_kernels.ssm.mosaic_gpu.launch import call
from pallas_kernels.ssm.mosaic_gpu.registers import ROWS


def forward(inputs: Inputs, tile: Tile) -> Outputs:
    """Runs the kernel; h of `inputs` is what comes before every split.

    Raises:
        ValueError: see `check`.
    """
    check(inputs, tile)
    batch, length, rank, groups, d_state = inputs.k_BLRGN.shape
    n_heads, dtype = inputs.v_BLHP.shape[2], inputs.v_BLHP.dtype
    n_chunks = length // tile.tokens
    rows = lambda array: None if array is None else array.reshape(batch, length, -1)  # noqa: E731
    phase_BHLS = None if inputs.phase_BHLS is None else inputs.phase_BHLS.reshape(batch * n_heads, length, -1)
    flat = inputs._replace(  # the copy engine sees at most five axes, those of a tile twice
        **{name: rows(getattr(inputs, name)) for name in ("q_BLRGN", "k_BLRGN", "v_BLHP", "gate_BLHP")},
        phase_BHLS=phase_BHLS,
        scalars_BHCXT=inputs.scalars_BHCXT.reshape(batch * n_heads * n_chunks, -1, ROWS),
        norm_HP=None if inputs.norm_HP is None else inputs.norm_HP[:, None],
    )
    sizes = Sizes(
        heads=n_heads,
        heads_a_group=n_heads // groups,
        groups=groups,
        chunks=n_chunks // tile.splits,
        d_state=d_state,
        planes=n_planes(inputs.phase_BHLS),
    )
    out = Outputs(
        o_BLHP=None if inputs.q_BLRGN is None else jax.ShapeDtypeStruct((batch, length, n_heads * WIDTH), dtype),
        h_BHZPN=jax.ShapeDtypeStruct((batch, n_heads, tile.splits, WIDTH, d_state), jnp.float32),
        y_BLHRP=jax.ShapeDtypeStruct((batch, length, n_heads * rank * WIDTH), dtype) if tile.residuals else None,
    )
    shared = scan_kernel.shared(flat, inputs.scalars_BHCXT.shape[3], sizes, tile)
    barriers = scan_kernel.Barriers(
        early=plgpu.Barrier(num_arrivals=max(1, scan_kernel.early_copies(inputs, tile))),
        chunk=plgpu.Barrier(num_arrivals=rank + 2, num_barriers=2),
        gate=plgpu.Barrier(),
        head=plgpu.Barrier(num_arrivals=max(1, sum(x is not None for x in scan_kernel.vectors(shared)))),
    )
    kernel = functools.partial(scan_kernel.kernel, sizes=sizes, tile=tile)
    grid = {"program": batch * n_heads * tile.splits}
    # The sums of a norm are within warps too, but what is compiled stays as it was measured.
    out = call(kernel, "mamba3_mosaic_scan", flat, out, (shared, barriers), grid, tile.interpret, sums=False)
    o_BLHP = None if out.o_BLHP is None else out.o_BLHP.reshape(inputs.v_BLHP.shape)
    y_BLHRP = None if out.y_BLHRP is None else out.y_BLHRP.reshape(batch, length, n_heads, rank, WIDTH)
    return Outputs(o_BLHP=o_BLHP, h_BHZPN=out.h_BHZPN, y_BLHRP=y_BLHRP)


def scan(inputs: Inputs, tile: Tile):
    """Returns outputs, the state before every split, and what every split leaves of it (None for one split).

    Where heads and batch entries are too few to fill the device, a first pass leaves what every split adds to the
    state; `combine_splits` gives the state before each, and the kernel then runs all splits at once.

    Args:
        inputs: h of shape (B, H, 1, P, N), the state before the row.

    Raises:
        ValueError: see `check`.
    """
    if tile.splits == 1:
        return forward(inputs, tile), inputs.h_BHZPN, None
    nothing = dict.fromkeys(("q_BLRGN", "gate_BLHP", "skip_H", "gate_rank_HRP", "out_rank_HRP", "norm_HP"))
    batch, n_heads, _, width, d_state = inputs.h_BHZPN.shape
    zeros_BHZPN = jnp.zeros((batch, n_heads, tile.splits, width, d_state), jnp.float32)
    needed = inputs._replace(**nothing, q_bias_HRN=None, h_BHZPN=zeros_BHZPN)
    added_BHZPN = forward(needed, replace(tile, residuals=False)).h_BHZPN
    split_decay_BHZ = _split_decay(inputs.scalars_BHCXT, tile.splits)
    h_BHZPN, _ = combine_splits(inputs.h_BHZPN[:, :, 0], split_decay_BHZ, added_BHZPN)
    return forward(inputs._replace(h_BHZPN=h_BHZPN), tile), h_BHZPN, split_decay_BHZ


def _split_decay(scalars_BHCXT, splits: int):
    """Returns what every split leaves of the state before it."""
    batch, n_heads = scalars_BHCXT.shape[:2]
    last_BHZCX = scalars_BHCXT[..., -1].reshape(batch, n_heads, splits, -1, scalars_BHCXT.shape[3])
    split_decay_BHZ = jnp.exp2(jnp.sum(last_BHZCX[..., 0], axis=-1))
    if last_BHZCX.shape[-1] == 4:
        split_decay_BHZ = jnp.where(jnp.all(last_BHZCX[..., 3] == 0, axis=-1), split_decay_BHZ, 0.0)
    return split_decay_BHZ
