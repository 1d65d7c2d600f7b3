"""The gradients of keys and values: from the last chunk on, with the gradient dh of the state. See `bwd`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.contract import Weights
from pallas_kernels.ssm.mosaic_gpu import bwd
from pallas_kernels.ssm.mosaic_gpu.tiles import (
    ROWS,
    TILE,
    WIDTH,
    Decay,
    ScanRefs,
    Sizes,
    Tile,
    Transposed,
    down,
    load,
    load_head,
    of_ranks,
    of_tokens,
    product_into,
    products,
    same_token,
    zeros,
)

# What is stored of every row: three gradients, and k . dk, which is outgoing to earlier tokens.
ROWS_BWD = ("dkappa", "dgamma", "dskip", "outgoing")


class KeyGradients(NamedTuple):
    """What the kernel writes; for `state_bwd`, the state's gradient alone."""

    dk_BHLRN: jax.Array | None = None
    dphi_BHLS: jax.Array | None = None
    dv_BLHP: jax.Array | None = None
    rows_BHCXT: jax.Array | None = None  # `ROWS_BWD`
    dv_rank_BHZTP: jax.Array | None = None
    dh_BHZAPN: jax.Array | None = None  # bfloat16, at every checkpoint but the first
    dh_BHZPN: jax.Array | None = None  # float32, of the state before every split


def key_bwd(refs: ScanRefs, tile: Tile, *, exact: bool) -> KeyGradients:
    """Return the gradients of keys, values and states; h of `refs` is the gradient of the state after every split.

    Args:
        exact: of keys, take in what rounding dh to bfloat16 leaves out.
    """
    length, rank, _, d_state = refs.tokens.q_BLRGN.shape[1:]
    sizes = Sizes.of(refs, tile)
    shape, rows = jax.ShapeDtypeStruct, sizes.batch * sizes.heads
    heads = (sizes.batch, sizes.heads, tile.splits)
    stored = max(1, bwd.checkpoints(sizes, tile) - 1)
    out = KeyGradients(
        dk_BHLRN=shape((rows, length, rank * d_state), jnp.bfloat16),
        dphi_BHLS=shape((rows, length, sizes.pairs), bwd.dphi_dtype(tile)) if sizes.pairs else None,
        dv_BLHP=shape((sizes.batch, length, sizes.heads * WIDTH), jnp.bfloat16),
        rows_BHCXT=shape((rows * length // tile.tokens, len(ROWS_BWD), ROWS), jnp.float32),
        dv_rank_BHZTP=shape((*heads, ROWS, WIDTH), jnp.float32) if rank > 1 else None,
        dh_BHZAPN=shape((*heads, stored, WIDTH, d_state), jnp.bfloat16),
        dh_BHZPN=shape((*heads, WIDTH, d_state), jnp.float32),
    )
    kernel = functools.partial(_kernel, exact=exact)
    how = {"query": False, "rows": len(ROWS_BWD)}
    slots = bwd.Slots(chunk=2, k=2)
    if not bwd.fits(bwd.GradientShared.memory(refs, tile, slots, **how)):
        slots = bwd.Slots()
    how |= {"tile": tile, "slots": slots}
    return bwd.call(kernel, name="mamba3_mosaic_key_gradient", refs=refs, out=out, **how)


def state_bwd(refs: ScanRefs, tile: Tile):
    """Return what every split adds to the gradient of the state before it, dh_BHZPN; h of `refs` is zeros."""
    tokens = refs.tokens._replace(k_BLRGN=None, v_BLHP=None)
    refs = refs._replace(tokens=tokens, weights=Weights(q_bias_HRN=refs.weights.q_bias_HRN))
    out = KeyGradients(dh_BHZPN=jax.ShapeDtypeStruct(refs.h_BHZPN.shape, jnp.float32))
    how = {"tile": tile, "slots": bwd.Slots(chunk=2, q=2, values=2), "query": False}
    return bwd.call(_kernel, name="mamba3_mosaic_splits_bwd", refs=refs, out=out, **how).dh_BHZPN


def _kernel(program: bwd.GradientProgram, *, exact: bool = False):
    refs, out, sizes, interpret = program.refs, program.out, program.sizes, program.interpret
    chunks, only_state = sizes.chunks, refs.tokens.k_BLRGN is None
    head_arrived = load_head(refs.weights, program.head, program.shared.weights, program.barriers.head)
    for step in range(min(max(program.slots), chunks)):
        for places, start in program.turn(step).copies():
            if step < places:
                start(chunks - 1 - step)
    head_arrived()

    def chunk(program, step, dh_PN):
        shared, barriers, weights = program.shared, program.barriers, program.shared.weights
        index, decay = chunks - 1 - step, program.decay()
        q_TN, k_TN = shared.q_TN, shared.k_TN
        plgpu.barrier_wait(barriers.chunk)
        rotation = program.rotation()
        if not only_state:
            plgpu.barrier_wait(barriers.k)
            if rotation.changes(weights.k_bias_HRN):
                k_TN[...] = rotation.apply(k_TN, weights.k_bias_HRN)
        plgpu.barrier_wait(barriers.q)
        if rotation.changes(weights.q_bias_HRN):
            q_TN[...] = rotation.apply(q_TN, weights.q_bias_HRN)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's copies out of shared memory are done
        if not only_state:
            # dh waits in two halves, good to 2^-17, until all else is done: registers are few.
            shared.h_PN[...] = dh_PN.astype(jnp.bfloat16)
            shared.low_PN[...] = (dh_PN - dh_PN.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)
        plgpu.barrier_wait(barriers.values)
        plgpu.commit_smem()
        if not only_state:
            program.store_checkpoint(out.dh_BHZAPN, index + 1)
            weighted_TP, mixed_TT, dv_ref = _values_bwd(program, decay)
            dk_pairs = [(weighted_TP, shared.h_PN), (mixed_TT, q_TN)]
            if exact:
                dk_pairs.append((weighted_TP, shared.low_PN))
        dy_TP = load(shared.dy_TP, TILE, interpret).astype(jnp.float32) * down(decay.decay_from_start_T(), WIDTH)
        shared.dy_TP[...] = dy_TP.astype(jnp.bfloat16)
        plgpu.commit_smem()
        dh_pair = (Transposed(shared.dy_TP), q_TN)
        if only_state:
            dh_PN = product_into(dh_PN * decay.chunk_decay(), *dh_pair, interpret)
        else:
            plgpu.copy_smem_to_gmem(dv_ref.at[program.rows(0)], out.dv_BLHP.at[program.of_head(program.tokens(index))])
            high_PN, low_PN = (load(ref, TILE, interpret).astype(jnp.float32) for ref in (shared.h_PN, shared.low_PN))

            def rotated_back(dk, dh):
                dk_TN, rotated_TN = dk(), load(k_TN, TILE, interpret)
                outgoing_T = jnp.sum(rotated_TN.astype(jnp.float32) * dk_TN, axis=1)
                shared.rows_XT.at[ROWS_BWD.index("outgoing")][...] = outgoing_T
                return *program.rotation().inverse(dk_TN, rotated_TN), dh()

            dh_sum = ((high_PN + low_PN) * decay.chunk_decay(), dh_pair)
            dk_TN, dphi_TS, dh_PN = products([(sizes.d_state, *dk_pairs), dh_sum], interpret, rotated_back)
        plgpu.commit_smem()  # all products are done, and every warp has read what was copied in
        if not only_state:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copies of dv, from the place of v, and of h are done
        for places, start in program.copies():
            pl.when(step + places < chunks)(functools.partial(start, index - places))
        if not only_state:
            program.store_dphi(dphi_TS, out.dphi_BHLS, index)
            shared.h_PN[...] = dk_TN
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.rows_XT, out.rows_BHCXT.at[program.chunk_of_row(index)])
            program.store_rows(shared.h_PN, out.dk_BHLRN, index)
        return dh_PN

    dv_rank_TP = program.shared.dv_rank_TP
    if dv_rank_TP is not None:
        dv_rank_TP[...] = zeros((ROWS, WIDTH), TILE, interpret)
    dh_PN = load(refs.h_BHZPN.at[program.state], TILE, interpret, optimized=False)
    dh_PN = lax.fori_loop(0, chunks, lambda step, dh_PN: chunk(program.turn(step), step, dh_PN), dh_PN)
    out.dh_BHZPN.at[program.state][...] = dh_PN
    if dv_rank_TP is not None:
        out.dv_rank_BHZTP.at[program.state][...] = load(dv_rank_TP, TILE, interpret)
    plgpu.wait_smem_to_gmem(0)


def _values_bwd(program: bwd.GradientProgram, decay: Decay):
    """Store the gradients of a chunk's values and scalars in shared memory, and return where those of values are.

    Returns before it what multiplies dh and the queries in the keys' gradient. It loads and computes again what it can,
    as registers are few. All products with dy are done at its end.
    """
    shared, interpret, ranked = program.shared, program.interpret, program.tile.rank > 1
    q_TN, k_TN = shared.q_TN, shared.k_TN

    def weighted(score, mixed, from_state):
        """Return weights of outputs for values and of values for keys inside the chunk, the diagonal's scores, and what
        comes from the state after the chunk."""
        later_TT, diagonal_TT = decay.later_TT(), same_token(program.tile)
        score_TT = score()
        diagonal_score_TT = jnp.where(diagonal_TT, score_TT, 0.0)
        diagonal = diagonal_score_TT.astype(jnp.bfloat16) if ranked else jnp.sum(diagonal_score_TT, axis=1)
        score_TT = (score_TT * later_TT).astype(jnp.bfloat16)
        weight_TT = jnp.where(diagonal_TT, down(decay.rows("gamma"), ROWS), later_TT * down(decay.rows("kappa"), ROWS))
        mixed_TT = (mixed() * weight_TT).astype(jnp.bfloat16)
        return score_TT, mixed_TT, diagonal, from_state() * down(decay.decay_to_end_T(), WIDTH)

    sums = [
        (ROWS, (k_TN, Transposed(q_TN))),
        (ROWS, (program.values(shared.v_QP).astype(jnp.bfloat16), Transposed(shared.dy_TP))),
        (WIDTH, (k_TN, Transposed(shared.h_PN))),
    ]
    score_TT, mixed_TT, diagonal, dlater_TP = products(sums, interpret, weighted)
    sums = [(dlater_TP, (score_TT, shared.dy_TP))] + [(WIDTH, (diagonal, shared.dy_TP))] * ranked

    def summed(dlater, diagonal_product=None):
        dy_TP, x_TP = load(shared.dy_TP, TILE, interpret).astype(jnp.float32), program.values(shared.v_QP)
        dskip_T = jnp.sum(x_TP * dy_TP, axis=1)
        dx_TP = dlater()
        dkappa_T = jnp.sum(x_TP * dx_TP, axis=1)
        dx_TP *= down(decay.rows("kappa"), WIDTH)
        if ranked:
            diagonal_TP = diagonal_product()
            dgamma_T = jnp.sum(x_TP * diagonal_TP, axis=1)
        else:
            diagonal_TP, dgamma_T = down(diagonal, WIDTH) * dy_TP, diagonal * dskip_T
        dx_TP += down(decay.rows("gamma"), WIDTH) * diagonal_TP
        if program.refs.weights.skip_H is not None:
            dx_TP += program.refs.weights.skip_H[program.head] * dy_TP
        for name, row_T in (("dkappa", dkappa_T), ("dgamma", dgamma_T), ("dskip", dskip_T)):
            shared.rows_XT.at[ROWS_BWD.index(name)][...] = row_T
        return dx_TP, (x_TP * down(decay.decay_to_end_T("shifted"), WIDTH)).astype(jnp.bfloat16)

    dx_TP, weighted_TP = products(sums, interpret, summed)
    dv_ref = shared.v_QP
    if ranked:
        dv_rank_TP = dx_TP * of_tokens(shared.v_QP, interpret).astype(jnp.float32)
        shared.dv_rank_TP[...] = load(shared.dv_rank_TP, TILE, interpret) + dv_rank_TP
        dv_ref = shared.x_TP
        dv_ref[...] = (dx_TP * of_ranks(shared.weights.v_rank_HRP, interpret)).astype(jnp.bfloat16)
        dx_TP = program.over_ranks(dv_ref)
    else:
        plgpu.commit_smem()
    dv_ref[...] = dx_TP.astype(jnp.bfloat16)
    return weighted_TP, mixed_TT, dv_ref
