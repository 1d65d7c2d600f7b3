"""What `query_bwd` and `key_bwd` leave to be added up: over heads, and the angle's gradient over later tokens."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.gradients import AngleSums
from pallas_kernels.ssm.mosaic_gpu.phase import AngleProgram, AngleRefs, Grid, running_sum
from pallas_kernels.ssm.mosaic_gpu.tiles import call, load, zeros
from pallas_kernels.ssm.operands import Operands

TOKENS = 64  # of a tile of `heads_bwd`, at most
COLUMNS = 128  # one a thread
SLOTS = 2  # tiles on their way
PROGRAMS = 512  # that are enough to take more heads each


class HeadSums(NamedTuple):
    """Partial sums."""

    dx_JBLX: jax.Array  # over a block of heads: float32, or like dx where a block is a group
    dbias_BCHX: jax.Array  # over a chunk of tokens, float32


def heads_bwd(dx_BHLRN, *, groups: int, interpret, bias: bool):
    """Return the gradient of the queries or keys that a group's heads share, dx_BLRGN, and of each head's bias.

    A thread has a column of N, a program a chunk of tokens of one rank, and takes a block of heads after another.

    Args:
        dx_BHLRN: every head's, bfloat16.
        bias: whether there is one; without, its gradient is None.
    """
    batch, n_heads, length, rank, d_state = dx_BHLRN.shape
    # Where a row is half as wide, two tokens of a head lie side by side.
    beside = max(1, COLUMNS // (rank * d_state))
    rows, width = length // beside, beside * rank * d_state
    tokens = math.gcd(rows, TOKENS // beside)
    chunks, per_group = rows // tokens, n_heads // groups
    most = max(1, batch * chunks * n_heads * (width // COLUMNS) // PROGRAMS)
    heads = max(size for size in (1, 2, 4, 8, 16, 32, 64) if (size <= most and per_group % size == 0) or size == 1)
    blocks, layout, interpreted = n_heads // heads, columns(), interpret is not None
    dtype = dx_BHLRN.dtype if blocks == groups else jnp.float32
    slots = min(SLOTS, heads)

    def kernel(dx_BHLX, out: HeadSums, shared_CTX, arrived):
        b, c, part, block = (lax.axis_index(name) for name in ("batch", "chunk", "part", "block"))
        here, across = pl.ds(c * tokens, tokens), pl.ds(part * COLUMNS, COLUMNS)

        def fetch(index, slot):
            from_TX = dx_BHLX.at[b, block * heads + index, here, across]
            plgpu.copy_gmem_to_smem(from_TX, shared_CTX.at[slot], arrived.at[slot])

        for index in range(slots):
            fetch(index, index)

        def head(index, sum_TX):
            slot = lax.rem(index, jnp.int32(slots))
            plgpu.barrier_wait(arrived.at[slot])
            dx_TX = load(shared_CTX.at[slot], layout, interpreted, optimized=False).astype(jnp.float32)
            plgpu.commit_smem()  # every warp has read it
            pl.when(index + slots < heads)(lambda: fetch(index + slots, slot))
            if bias:
                out.dbias_BCHX.at[b, c, block * heads + index, across][...] = jnp.sum(dx_TX, axis=0)
            return sum_TX + dx_TX

        sum_TX = lax.fori_loop(0, heads, head, zeros((tokens, COLUMNS), layout, interpreted))
        out.dx_JBLX.at[block, b, here, across][...] = sum_TX.astype(dtype)

    dx_BHLX = dx_BHLRN.reshape(batch, n_heads, rows, width)
    out = HeadSums(
        dx_JBLX=jax.ShapeDtypeStruct((blocks, batch, rows, width), dtype),
        dbias_BCHX=jax.ShapeDtypeStruct((batch, chunks, n_heads, width), jnp.float32) if bias else None,
    )
    grid = {"batch": batch, "chunk": chunks, "part": width // COLUMNS, "block": blocks}
    scratch = plgpu.SMEM((slots, tokens, COLUMNS), dx_BHLRN.dtype), plgpu.Barrier(num_barriers=slots)
    how = {"scratch": scratch, "grid": grid, "interpret": interpret}
    out = call(kernel, name="mamba3_mosaic_heads_bwd", operands=dx_BHLX, out=out, **how)
    dx_GBLRN = out.dx_JBLX.reshape(groups, -1, batch, length, rank, d_state)
    dx_GBLRN = dx_GBLRN[:, 0] if blocks == groups else jnp.sum(dx_GBLRN, axis=1)
    dx_BLRGN = jnp.moveaxis(dx_GBLRN, 0, 3).astype(dx_BHLRN.dtype)
    if not bias:
        return dx_BLRGN, None
    dbias_HX = jnp.sum(out.dbias_BCHX, axis=(0, 1)).reshape(n_heads, beside, -1)
    return dx_BLRGN, jnp.sum(dbias_HX, axis=1).reshape(n_heads, rank, d_state)


class AngleShared(NamedTuple):
    angle_ETS: jax.Array
    dt_HT: jax.Array | None
    dphi_q_HTS: jax.Array
    dphi_k_HTS: jax.Array
    sum_HTS: jax.Array | None


def angles_bwd(operands: Operands, dphi_q_BHLS, dphi_k_BHLS, *, splits: int, interpret) -> AngleSums:
    """Return the gradients of angle and dt from the tokens of a chunk, of those of the angle at each, its two parts."""
    dt_BHL, document_BL = operands.dt_BHL, operands.document_BL
    angle_BELS = jnp.swapaxes(operands.angle_BLHS, 1, 2)
    grid = Grid(angle_BELS, dt_BHL, splits=splits)
    goes_on_BL, in_first_BL = None, None
    if document_BL is not None:
        started_BL = jnp.diff(document_BL, axis=1, prepend=0)
        goes_on_BL = jnp.pad(started_BL[:, 1:] == 0, ((0, 0), (0, 1))).astype(jnp.int32)
        started_BCQ = jnp.cumsum(started_BL.reshape(grid.batch, grid.chunks, -1), axis=2)
        in_first_BL = (started_BCQ == 0).astype(jnp.int32).reshape(document_BL.shape)
    refs = AngleRefs(
        angle_BELS=angle_BELS,
        dt_BHL=dt_BHL,
        dphi_q_BHLS=dphi_q_BHLS,
        dphi_k_BHLS=dphi_k_BHLS,
        goes_on_BL=goes_on_BL,
        counts_BL=in_first_BL,
    )
    length, shape = grid.chunks * grid.tokens, (grid.at_once, grid.tokens, grid.pairs)
    out = {
        "dangle_JBELS": (grid.heads // grid.block if grid.shared_angle else 1, *angle_BELS.shape),
        "ddt_BHL": (grid.batch, grid.heads, length),
        "dphi_BHCS": (grid.batch, grid.heads, grid.chunks, grid.pairs),
    }
    out = {name: jax.ShapeDtypeStruct(sizes, jnp.float32) for name, sizes in out.items()}
    shared = AngleShared(
        angle_ETS=grid.of_angle(),
        dt_HT=grid.of_dt(),
        dphi_q_HTS=plgpu.SMEM(shape, dphi_q_BHLS.dtype),
        dphi_k_HTS=plgpu.SMEM(shape, dphi_k_BHLS.dtype),
        sum_HTS=plgpu.SMEM(shape, jnp.float32) if grid.shared_angle else None,
    )
    barriers = grid.arrived(), plgpu.Barrier(num_arrivals=2)

    def kernel(refs: AngleRefs, out, shared: AngleShared, arrived, gradients_arrived):
        barriers = {"arrived": arrived, "gradients_arrived": gradients_arrived}
        _angles_kernel(refs, out, shared, AngleProgram(grid, interpret), **barriers)

    how = {"scratch": (shared, *barriers), "grid": grid.programs, "interpret": interpret}
    out = call(kernel, name="mamba3_mosaic_angles_bwd", operands=refs, out=out, **how)
    dangle_BLHS = jnp.swapaxes(jnp.sum(out["dangle_JBELS"], axis=0), 1, 2)
    return AngleSums(dangle_BLHS=dangle_BLHS, ddt_BHL=out["ddt_BHL"], dphi_BHCS=out["dphi_BHCS"])


def _angles_kernel(refs: AngleRefs, out, shared: AngleShared, program: AngleProgram, *, arrived, gradients_arrived):
    grid, interpret, b, tokens = program.grid, program.interpret, program.b, program.tokens
    layout = grid.layout

    def fetch(index):
        for ref, to_HTS in ((refs.dphi_q_BHLS, shared.dphi_q_HTS), (refs.dphi_k_BHLS, shared.dphi_k_HTS)):
            plgpu.copy_gmem_to_smem(ref.at[b, program.of_heads(index), tokens], to_HTS, gradients_arrived)

    fetch(0)
    dt_HT = program.load(refs, shared.angle_ETS, shared.dt_HT, arrived)

    def group(index, sum_HTS):
        heads = program.of_heads(index)
        plgpu.barrier_wait(gradients_arrived)
        dphi_q_HTS, dphi_k_HTS = (
            load(ref, layout, interpret, optimized=False).astype(jnp.float32)
            for ref in (shared.dphi_q_HTS, shared.dphi_k_HTS)
        )
        dphi_HTS = dphi_q_HTS + dphi_k_HTS
        plgpu.commit_smem()  # every warp has read them
        pl.when(index + 1 < grid.groups)(lambda: fetch(index + 1))
        goes_on_HTS = None if refs.goes_on_BL is None else program.over_heads(refs.goes_on_BL.at[b, tokens])
        later_HTS = running_sum(dphi_HTS, None, goes_on_HTS, reverse=True, layout=layout, interpret=interpret)
        if refs.counts_BL is not None:
            dphi_HTS = jnp.where(program.over_heads(refs.counts_BL.at[b, tokens]) == 0, 0.0, dphi_HTS)
        out["dphi_BHCS"].at[b, heads, program.c][...] = jnp.sum(dphi_HTS, axis=1)
        out["ddt_BHL"].at[b, heads, tokens][...] = jnp.sum(program.angle(shared.angle_ETS, index) * later_HTS, axis=2)
        dangle_HTS = program.over_pairs(dt_HT, index) * later_HTS
        if grid.shared_angle:
            return sum_HTS + dangle_HTS
        out["dangle_JBELS"].at[0, b, heads, tokens][...] = dangle_HTS
        return sum_HTS

    if not grid.shared_angle:
        lax.fori_loop(0, grid.groups, group, jnp.float32(0))
        return
    # Heads are in different warps, so their sums meet in shared memory.
    shared.sum_HTS[...] = lax.fori_loop(0, grid.groups, group, zeros(program.shape, layout, interpret))
    plgpu.commit_smem()
    sum_TS = sum(shared.sum_HTS[head] for head in range(grid.at_once))
    out["dangle_JBELS"].at[lax.axis_index("block"), b, 0, tokens][...] = sum_TS


def columns():
    """Return the layout of (T, N), N a multiple of 128, in which a thread has whole columns."""
    return plgpu.Layout.TILED(plgpu.Tiling(((1, 128), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
