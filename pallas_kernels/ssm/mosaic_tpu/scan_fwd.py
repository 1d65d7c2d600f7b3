"""Bias, rotation, chunked scan, skip, norm and gate in one Pallas Mosaic kernel for TPUs, forward.

    y_t = sum_{s < t} e^(c_t - c_s) kappa_s (q_t . k_s) x_s  +  gamma_t (q_t . k_t) x_t  +  e^(c_t) h_0 q_t  +  D x_t
    h_T = sum_s e^(c_T - c_s) kappa_s x_s k_s^T  +  e^(c_T) h_0
    o_t = sum over ranks of out_rank norm(y_t) silu(gate gate_rank)

within a chunk, c the log of the decay since its first token; q and k are biased and turned as they are read.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.mosaic_tpu import parts
from pallas_kernels.ssm.mosaic_tpu.contract import Grid, Inputs, Refs, Rest, refs_of
from pallas_kernels.ssm.mosaic_tpu.parts import NN, Decay, Ends, Masks, product, ranks, side_by_side
from pallas_kernels.ssm.mosaic_tpu.tiles import between, vmem_limit


class Outputs(NamedTuple):
    o_BLX: jax.Array  # like v
    h_BHPN: jax.Array  # float32, after the row
    h_BCWNX: jax.Array | None  # before every chunk, as products take it: what the backward pass keeps


def forward(inputs: Inputs, rest: Rest, tiles, *, keep: bool):
    """o_BLHP, the state after the row, and the states before every chunk (as the kernels keep them) or None."""
    grid = Grid(inputs, tiles)
    refs = refs_of(inputs, rest, grid, inputs.h_BHPN)
    of_row = (grid.heads, grid.width, grid.d_state)
    specs = specs_of(refs, grid, None if refs.h_BHPN is None else grid.before(*of_row))
    packs = (grid.n_heads // grid.pack, grid.d_state, grid.lanes)
    states = jax.ShapeDtypeStruct((grid.batch, grid.chunks, *packs), grid.dtype)
    out = Outputs(
        jax.ShapeDtypeStruct(refs.v_BLX.shape, refs.v_BLX.dtype),
        jax.ShapeDtypeStruct((grid.batch, grid.n_heads, *of_row[1:]), jnp.float32),
        states if keep else None,
    )
    out_specs = Outputs(grid.of_heads(), grid.after(*of_row), grid.of_states() if keep else None)
    out = call(
        functools.partial(_kernel, grid=grid),
        "mamba3_tpu_scan",
        grid,
        refs,
        specs,
        out,
        out_specs,
        [
            pltpu.VMEM(packs, jnp.float32),
            grid.columns(),
            grid.columns(),
            grid.numbers(),
        ],
    )
    return out.o_BLX.reshape(inputs.v_BLHP.shape), out.h_BHPN, out.h_BCWNX


def specs_of(refs: Refs, grid: Grid, state) -> Refs:
    """The blocks of `refs`."""
    specs = {
        "q_BLX": grid.of_groups(),
        "k_BLX": grid.of_groups(),
        "v_BLX": grid.of_heads(),
        "gate_BLX": grid.of_heads(),
        "angle_BHSL": grid.of_angles(),
        **dict.fromkeys(("dt_BHL", "log_a_BHL", "gamma_BHL", "kappa_BHL"), grid.of_numbers()),
        "start_BCKX": grid.of_starts(),
        "document_BCQ": grid.of_documents(),
        "order_MN": grid.of_order(),
        "h_BHPN": state,
        **{name: grid.of_weights(array) for name, array in refs.weights().items()},
    }
    there = [name for name, array in refs._asdict().items() if array is not None]
    return Refs(**dict.fromkeys(Refs._fields) | {name: specs[name] for name in there})


def call(kernel, name: str, grid: Grid, refs, specs, out, out_specs, scratch):
    """pallas_call of `kernel(refs, out, *scratch)`, both trees as they are here.

    Raises:
        ValueError: more VMEM than there is.
    """
    limit = vmem_limit(name, grid.tiles, between(grid), (refs, out), (specs, out_specs), scratch)
    (result,) = pl.pallas_call(
        kernel,
        grid=grid.shape,
        in_specs=(specs,),
        out_specs=[out_specs],
        out_shape=[out],
        scratch_shapes=scratch,
        name=name,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=limit
        ),
        cost_estimate=_cost(jax.tree.leaves((refs, out)), grid),
        **({} if grid.tiles.interpret is None else {"interpret": grid.tiles.interpret}),
    )(refs)
    return result


def _cost(arrays, grid: Grid) -> pl.CostEstimate:
    """Every array once; the products of `_kernel`, or of `scan_back`, and the triangle of the angles."""
    rows, d_state, width = grid.rows, grid.d_state, grid.width
    states = 5 if grid.backwards else 2  # products of T rows with a state
    of_rows = 3 * d_state + 3 * width if grid.backwards else d_state + width
    of_angles = 5 if grid.backwards else 3  # pieces
    products = rows * rows * of_rows + states * rows * d_state * width + of_angles * grid.tokens**2 * grid.planes
    steps = grid.batch * grid.chunks * grid.n_heads
    return pl.CostEstimate(
        flops=2 * steps * products,
        transcendentals=steps * (grid.tokens**2 + rows * width),
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
    )


def _kernel(refs: Refs, out: Outputs, h_WNX, q_GNT, k_GNT, scalars_HXQ, *, grid: Grid):
    chunk, block = pl.program_id(1), pl.program_id(2)
    first = block * grid.packs

    @pl.when(chunk == 0)
    def _():
        parts.load_states(h_WNX, refs.h_BHPN, block, refs.order_MN, grid)

    if out.h_BCWNX is not None:
        out.h_BCWNX[...] = h_WNX[pl.ds(first, grid.packs)].astype(grid.dtype)
    parts.load_groups(q_GNT, k_GNT, refs, block, grid)
    parts.load_numbers(scalars_HXQ, refs, block, grid)
    masks = Masks.load(refs, grid)
    decays = [Decay.load(scalars_HXQ[block * grid.heads + head], masks, grid) for head in range(grid.heads)]
    turns = parts.turns(refs, decays, masks, grid)
    for pack in range(grid.packs):
        heads, of_pack = grid.heads_of(pack), grid.lanes_of_pack(pack)
        by_head = lambda value, heads=heads: side_by_side([value(decays[head]) for head in heads], grid.width)  # noqa: E731
        x_TX = refs.v_BLX[:, of_pack].astype(jnp.float32)
        if refs.v_rank_WRX is not None:
            x_TX = parts.per_rank(x_TX, refs.v_rank_WRX[pack])
        h_NX = h_WNX[first + pack]
        weighted_TX = x_TX * by_head(lambda decay: ranks(decay.until_Q1 * decay.later_Q1, grid.rank))

        own, before, after = [], [], []
        for head in heads:
            q_NT = parts.turned(q_GNT[grid.group_of(head)], refs.q_bias_HRN, head, turns[head], grid)
            k_NT = parts.turned(k_GNT[grid.group_of(head)], refs.k_bias_HRN, head, turns[head], grid)
            q_TN = q_NT.T
            weight_TT = ranks(ranks(decays[head].weight_QQ(masks), grid.rank, 0), grid.rank, 1)
            mixed_TT = product(q_TN, k_NT, NN, grid) * weight_TT
            own.append(product(mixed_TT, x_TX, NN, grid))
            before.append(product(q_TN, h_NX, NN, grid))
            after.append(product(k_NT, weighted_TX, NN, grid))
        since_TX = by_head(lambda decay: ranks(decay.since_Q1, grid.rank))
        y_TX = side_by_side(own, grid.width) + since_TX * side_by_side(before, grid.width)
        h_WNX[first + pack] = by_head(Decay.whole) * h_NX + side_by_side(after, grid.width)

        gate_QX = None if refs.gate_BLX is None else refs.gate_BLX[:, of_pack].astype(jnp.float32)
        o_QX = parts.finish(y_TX, x_TX, gate_QX, Ends.load(refs, pack), grid)
        out.o_BLX[:, of_pack] = o_QX.astype(out.o_BLX.dtype)

    @pl.when(chunk == grid.chunks - 1)
    def _():
        parts.store_states(out.h_BHPN, h_WNX, block, refs.order_MN, grid)
