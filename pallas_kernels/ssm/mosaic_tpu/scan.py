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
from pallas_kernels.ssm.mosaic_tpu.contract import MIB, Grid, Inputs, Refs, Rest, refs_of
from pallas_kernels.ssm.mosaic_tpu.parts import NN, NT, TN, Decay, Ends, Masks, Turn, product, ranks
from pallas_kernels.ssm.mosaic_tpu.tiles import check_vmem


class Outputs(NamedTuple):
    o_BLX: jax.Array  # like v
    h_BHPN: jax.Array  # float32, after the row
    h_BCHPN: jax.Array | None  # before every chunk, as products take it: what the backward pass keeps


def forward(inputs: Inputs, rest: Rest, tiles, *, keep: bool):
    """o_BLHP, the state after the row, and the states before every chunk (N in the kernels' order) or None."""
    grid = Grid(inputs, tiles)
    refs = refs_of(inputs, rest, grid, inputs.h_BHPN)
    specs = specs_of(refs, grid, None if refs.h_BHPN is None else grid.before(grid.width, grid.d_state))
    batch, chunks, n_heads, width, d_state = grid.batch, grid.chunks, grid.n_heads, grid.width, grid.d_state
    states = jax.ShapeDtypeStruct((batch, chunks, n_heads, width, d_state), grid.dtype)
    out = Outputs(
        jax.ShapeDtypeStruct(refs.v_BLX.shape, refs.v_BLX.dtype),
        jax.ShapeDtypeStruct((batch, n_heads, width, d_state), jnp.float32),
        states if keep else None,
    )
    out_specs = Outputs(grid.of_heads(), grid.after(width, d_state), grid.of_states() if keep else None)
    out = call(
        functools.partial(_kernel, grid=grid),
        "mamba3_tpu_scan",
        grid,
        refs,
        specs,
        out,
        out_specs,
        [
            pltpu.VMEM((n_heads, width, d_state), jnp.float32),
            pltpu.VMEM((grid.tokens, grid.heads * grid.half), jnp.float32),
            grid.numbers(),
        ],
    )
    return out.o_BLX.reshape(inputs.v_BLHP.shape), out.h_BHPN, out.h_BCHPN


def specs_of(refs: Refs, grid: Grid, state) -> Refs:
    """The blocks of `refs`."""
    return Refs(
        grid.of_groups(),
        grid.of_groups(),
        grid.of_heads(),
        None if refs.gate_BLX is None else grid.of_heads(),
        grid.of_angles(),
        *[grid.of_numbers()] * 4,
        grid.of_starts(),
        None if refs.document_BCQ is None else grid.of_documents(),
        None if refs.order_NM is None else grid.of_order(),
        state,
        *grid.weights(refs),
    )


def call(kernel, name: str, grid: Grid, refs, specs, out, out_specs, scratch):
    """pallas_call of `kernel(refs, out, *scratch)`, both trees as they are here.

    Raises:
        ValueError: more VMEM than there is.
    """
    is_spec = lambda x: isinstance(x, pl.BlockSpec)  # noqa: E731
    arrays, blocks = jax.tree.leaves((refs, out)), jax.tree.leaves((specs, out_specs), is_leaf=is_spec)
    of_blocks = [(spec.block_shape, array.dtype) for spec, array in zip(blocks, arrays, strict=True)]
    check_vmem(name, grid, of_blocks, [(x.shape, x.dtype) for x in jax.tree.leaves(scratch)])
    (result,) = pl.pallas_call(
        lambda refs, out, *scratch: kernel(refs, out, *scratch),
        grid=grid.shape,
        in_specs=(specs,),
        out_specs=[out_specs],
        out_shape=[out],
        scratch_shapes=scratch,
        name=name,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=grid.tiles.vmem * MIB
        ),
        cost_estimate=_cost(arrays, grid),
        **({} if grid.tiles.interpret is None else {"interpret": grid.tiles.interpret}),
    )(refs)
    return result


def _cost(arrays, grid: Grid) -> pl.CostEstimate:
    """Every array once; the products of `_kernel`, or of `scan_back`, and the triangle of the angles."""
    rows, d_state, width = grid.rows, grid.d_state, grid.width
    states = 5 if grid.backwards else 2  # products of T rows with a state
    of_rows = 3 * d_state + 3 * width if grid.backwards else d_state + width
    products = rows * rows * of_rows + states * rows * d_state * width + 2 * grid.tokens**2 * grid.d_state
    steps = grid.batch * grid.chunks * grid.n_heads
    return pl.CostEstimate(
        flops=2 * steps * products,
        transcendentals=steps * (grid.tokens**2 + rows * width),
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
    )


def _kernel(refs: Refs, out: Outputs, h_HPN, angle_QX, scalars_HXQ, *, grid: Grid):
    chunk, block = pl.program_id(1), pl.program_id(2)
    first = block * grid.heads

    @pl.when(chunk == 0)
    def _():
        parts.load_states(h_HPN, first, refs.h_BHPN, refs.order_NM, grid)

    parts.load_angles(angle_QX, refs, block, grid)

    if out.h_BCHPN is not None:
        out.h_BCHPN[...] = h_HPN[pl.ds(first, grid.heads)].astype(grid.dtype)
    parts.load_numbers(scalars_HXQ, refs, block, grid)
    masks = Masks.load(refs, grid)
    decays = [Decay.load(scalars_HXQ[first + head], masks) for head in range(grid.heads)]
    sin_QX, cos_QX = parts.sincos(angle_QX[...], refs, [decay.dt_Q1 for decay in decays], masks, grid)
    q_GRQN, k_GRQN = (parts.rows_of_groups(ref, refs.order_NM, grid) for ref in (refs.q_BLX, refs.k_BLX))
    for head, (decay, turn) in enumerate(zip(decays, Turn.of_heads(sin_QX, cos_QX, grid), strict=True)):
        of_head = slice(head * grid.width, (head + 1) * grid.width)
        q_TN = parts.turned(q_GRQN[grid.group_of(head)], refs.q_bias_HRN[head], turn)
        k_TN = parts.turned(k_GRQN[grid.group_of(head)], refs.k_bias_HRN[head], turn)
        x_TP = refs.v_BLX[:, of_head].astype(jnp.float32)
        if refs.v_rank_HRP is not None:
            x_TP = parts.per_rank(x_TP, refs.v_rank_HRP[head])
        h_PN = h_HPN[first + head]

        weight_TT = ranks(ranks(decay.weight_QQ(masks), grid.rank, 0), grid.rank, 1)
        mixed_TT = product(q_TN, k_TN, NT, grid) * weight_TT
        y_TP = product(mixed_TT, x_TP, NN, grid)
        y_TP += ranks(decay.since_Q1, grid.rank) * product(q_TN, h_PN, NT, grid)
        weighted_TP = x_TP * ranks(decay.until_Q1 * decay.kappa_Q1, grid.rank)
        h_HPN[first + head] = decay.whole() * h_PN + product(weighted_TP, k_TN, TN, grid)

        gate_QP = None if refs.gate_BLX is None else refs.gate_BLX[:, of_head].astype(jnp.float32)
        o_QP = parts.finish(y_TP, x_TP, gate_QP, Ends.load(refs, head), grid.rank, grid.own_width)
        out.o_BLX[:, of_head] = o_QP.astype(out.o_BLX.dtype)

    @pl.when(chunk == grid.chunks - 1)
    def _():
        for head in range(grid.heads):
            out.h_BHPN[head] = parts.ordered(h_HPN[first + head], refs.order_NM, grid, NT)
