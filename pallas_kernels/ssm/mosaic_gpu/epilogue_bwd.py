"""The gradient of what the scan does to its outputs y last: norm, gate, weights of ranks, and the sum over ranks.

    o_t = sum over ranks of out_rank n(y_t) act(gate gate_rank),   n(y) = norm y / rms(y),   act(g) = g sigmoid(g)

Of one rank without a norm that is elementwise, and plain XLA; else one kernel over tiles of 64 rows, a row one rank of
one token as in `scan_fwd`. A program has a part of the length of one head, and adds up the gradients of that head's
weights in registers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.contract import NORM_EPS, Weights
from pallas_kernels.ssm.mosaic_gpu.tiles import (
    ROWS,
    TILE,
    WIDTH,
    Program,
    Sizes,
    Tile,
    call,
    down,
    head_barrier,
    head_memory,
    load,
    load_head,
    of_ranks,
    of_tokens,
    ones_of_tokens,
    opened,
    product,
    tiled,
    zeros,
)

PROGRAMS = 1024  # that are enough to take more chunks each
SLOTS = 2  # chunks on their way


class Epilogue(NamedTuple):
    """What y goes through last, or the gradients of that; None: absent."""

    gate_BLHP: jax.Array | None
    weights: Weights  # gate_rank, out_rank and norm


def epilogue_bwd(epilogue: Epilogue, y_BLHRP, do_BLHP, tile: Tile):
    """Return dy_BLHRP, like y, and the gradients of `epilogue`."""
    if tile.rank > 1 or epilogue.weights.norm_HP is not None:
        return _by_kernel(epilogue, y_BLHRP, do_BLHP, tile)
    return _of_one_rank(epilogue, y_BLHRP, do_BLHP)


def _of_one_rank(epilogue: Epilogue, y_BLHRP, do_BLHP):
    """Differentiates the epilogue of one rank without a norm."""

    def apply(y_BLHP, epilogue: Epilogue):
        o_BLHP = y_BLHP.astype(jnp.float32)
        if epilogue.gate_BLHP is not None:
            gate_BLHP = epilogue.gate_BLHP.astype(jnp.float32)
            if epilogue.weights.gate_rank_HRP is not None:
                gate_BLHP *= epilogue.weights.gate_rank_HRP[:, 0]
            o_BLHP *= jax.nn.silu(gate_BLHP)
        return o_BLHP if epilogue.weights.out_rank_HRP is None else o_BLHP * epilogue.weights.out_rank_HRP[:, 0]

    dy_BLHP, gradients = jax.vjp(apply, y_BLHRP[:, :, :, 0], epilogue)[1](do_BLHP.astype(jnp.float32))
    return dy_BLHP[:, :, :, None], gradients


class EpilogueRefs(NamedTuple):
    """What the kernel reads: rows of all heads side by side."""

    y_BLX: jax.Array
    do_BLX: jax.Array
    gate_BLX: jax.Array | None
    weights: Weights  # gate_rank, out_rank, and the norm as (H, 1, P)


class EpilogueOut(NamedTuple):
    """What the kernel writes."""

    dy_BLX: jax.Array
    dgate_BLX: jax.Array | None
    weights: Weights  # gradients by split of the length and row of a tile, to be added up: (B, H, Z, T, P)


class EpilogueShared(NamedTuple):
    """Shared memory."""

    y_2TP: jax.Array
    do_2QP: jax.Array
    gate_2QP: jax.Array | None
    dy_TP: jax.Array
    dgate_TP: jax.Array | None
    weights: Weights  # of the head


def _by_kernel(epilogue: Epilogue, y_BLHRP, do_BLHP, tile: Tile):
    """Run the kernel, and add up the gradients of the weights."""
    batch, length, n_heads, rank, _ = y_BLHRP.shape
    flat = lambda x: None if x is None else x.reshape(batch, length, -1)  # noqa: E731
    weights, norm_HP = epilogue.weights, epilogue.weights.norm_HP
    weights = weights._replace(norm_HP=None if norm_HP is None else norm_HP[:, None])
    refs = EpilogueRefs(y_BLX=flat(y_BLHRP), do_BLX=flat(do_BLHP), gate_BLX=flat(epilogue.gate_BLHP), weights=weights)
    n_chunks = length // tile.tokens
    splits = 1
    while n_chunks % (2 * splits) == 0 and batch * n_heads * splits < PROGRAMS:
        splits *= 2
    sizes = Sizes(batch=batch, heads=n_heads, groups=n_heads, chunks=n_chunks // splits, d_state=0, pairs=0)
    gated = epilogue.gate_BLHP is not None
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    sums = jax.ShapeDtypeStruct((batch, n_heads, splits, ROWS, WIDTH), jnp.float32)
    out = EpilogueOut(
        dy_BLX=like(refs.y_BLX),
        dgate_BLX=like(refs.gate_BLX) if gated else None,
        weights=jax.tree.map(lambda _: sums, weights),
    )
    shared = EpilogueShared(
        y_2TP=tiled(SLOTS, ROWS, WIDTH),
        do_2QP=tiled(SLOTS, tile.tokens, WIDTH),
        gate_2QP=tiled(SLOTS, tile.tokens, WIDTH) if gated else None,
        dy_TP=tiled(ROWS, WIDTH),
        dgate_TP=tiled(ROWS, WIDTH) if gated else None,
        weights=head_memory(weights),
    )
    arrived = plgpu.Barrier(num_arrivals=rank + 1 + gated, num_barriers=SLOTS)

    def kernel(refs: EpilogueRefs, out: EpilogueOut, shared: EpilogueShared, arrived, weights_arrived):
        program = EpilogueProgram(refs, out, shared, arrived, sizes=sizes, tile=tile)
        load_head(refs.weights, program.head, program.shared.weights, weights_arrived)()
        program.run()

    out = call(
        kernel,
        name="mamba3_mosaic_epilogue_bwd",
        operands=refs,
        out=out,
        scratch=(opened(shared), arrived, head_barrier(shared.weights)),
        grid={"batch": batch, "split": splits, "head": n_heads},
        interpret=tile.interpret,
    )

    def by_rank(sums_BHZTP):
        sums_BHZRQP = sums_BHZTP.reshape(batch, n_heads, splits, rank, tile.tokens, WIDTH)
        return jnp.sum(sums_BHZRQP, axis=(0, 2, 4))

    sums = out.weights
    dnorm_HP = None if norm_HP is None else jnp.sum(sums.norm_HP, axis=(0, 2, 3))
    gradients = Epilogue(
        gate_BLHP=out.dgate_BLX.reshape(epilogue.gate_BLHP.shape) if gated else None,
        weights=jax.tree.map(by_rank, sums._replace(norm_HP=None))._replace(norm_HP=dnorm_HP),
    )
    return out.dy_BLX.reshape(y_BLHRP.shape), gradients


class EpilogueProgram(Program):
    """A part of the length of one head."""

    def place(self):
        """Return the batch entry, the part of the length and the head."""
        return tuple(lax.axis_index(name) for name in ("batch", "split", "head"))

    def fetch(self, index, slot):
        """Start the copies of a chunk's y, do and gate."""
        refs, shared, at, arrived = self.refs, self.shared, self.of_head(self.tokens(index)), self.barriers.at[slot]
        for y_QP, to_QP in self.by_rank(refs.y_BLX, shared.y_2TP.at[slot], index):
            plgpu.copy_gmem_to_smem(y_QP, to_QP, arrived)
        plgpu.copy_gmem_to_smem(refs.do_BLX.at[at], shared.do_2QP.at[slot], arrived)
        if refs.gate_BLX is not None:
            plgpu.copy_gmem_to_smem(refs.gate_BLX.at[at], shared.gate_2QP.at[slot], arrived)

    def run(self):
        """Store all gradients, those of the weights at the end."""
        for index in range(min(SLOTS, self.sizes.chunks)):
            self.fetch(index, index)
        zeros_TP = zeros((ROWS, WIDTH), TILE, self.interpret)
        sums = jax.tree.map(lambda _: zeros_TP, self.out.weights)
        sums = lax.fori_loop(0, self.sizes.chunks, self.add_chunk, sums)
        for ref, sum_TP in zip(jax.tree.leaves(self.out.weights), jax.tree.leaves(sums), strict=True):
            ref.at[self.batch, self.head, self.split][...] = sum_TP
        plgpu.wait_smem_to_gmem(0)

    def weight(self, ref_RP, x_TP):
        """Multiplies by a rank's weights; None is one."""
        return x_TP if ref_RP is None else x_TP * of_ranks(ref_RP, self.interpret)

    def normalized(self, y_TP):
        """Return y / rms(y), and 1 / rms(y) of every row; without a norm y, and None."""
        if self.shared.weights.norm_HP is None:
            return y_TP, None
        inverse_T = lax.rsqrt(jnp.sum(jnp.square(y_TP), axis=1) * (1 / self.tile.width) + NORM_EPS)
        return y_TP * down(inverse_T, WIDTH), inverse_T

    def add_chunk(self, index, sums: Weights) -> Weights:
        """Store the gradients of a chunk, and return the sums with its part."""
        shared, weights, interpret = self.shared, self.shared.weights, self.interpret
        slot = lax.rem(index, jnp.int32(SLOTS))
        plgpu.barrier_wait(self.barriers.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copies of the last chunk's gradients are done
        unit_TP, inverse_T = self.normalized(load(shared.y_2TP.at[slot], TILE, interpret).astype(jnp.float32))
        do_TP = of_tokens(shared.do_2QP.at[slot], interpret).astype(jnp.float32)
        dn_TP = do_TP  # the gradient of n(y), here and below
        if shared.gate_2QP is not None:
            gate_TP = of_tokens(shared.gate_2QP.at[slot], interpret).astype(jnp.float32)
            scaled_TP = self.weight(weights.gate_rank_HRP, gate_TP)
            sigmoid_TP = 0.5 + 0.5 * jnp.tanh(0.5 * scaled_TP)
            act_TP = scaled_TP * sigmoid_TP
            dn_TP = do_TP * act_TP
            of_act_TP = do_TP * self.weight(weights.norm_HP, unit_TP)
            dscaled_TP = self.weight(weights.out_rank_HRP, of_act_TP) * (sigmoid_TP + act_TP * (1 - sigmoid_TP))
            shared.dgate_TP[...] = self.weight(weights.gate_rank_HRP, dscaled_TP).astype(jnp.bfloat16)
            if weights.gate_rank_HRP is not None:
                sums = sums._replace(gate_rank_HRP=sums.gate_rank_HRP + dscaled_TP * gate_TP)
        if weights.out_rank_HRP is not None:
            dout_rank_TP = dn_TP * self.weight(weights.norm_HP, unit_TP)
            sums = sums._replace(out_rank_HRP=sums.out_rank_HRP + dout_rank_TP)
        dn_TP = self.weight(weights.out_rank_HRP, dn_TP)
        if inverse_T is not None:
            sums = sums._replace(norm_HP=sums.norm_HP + dn_TP * unit_TP)
            dn_TP = self.weight(weights.norm_HP, dn_TP)
            mean_T = jnp.sum(dn_TP * unit_TP, axis=1) * (1 / self.tile.width)
            dn_TP = (dn_TP - unit_TP * down(mean_T, WIDTH)) * down(inverse_T, WIDTH)
        shared.dy_TP[...] = dn_TP.astype(jnp.bfloat16)
        plgpu.commit_smem()  # every warp has also read the slot
        pl.when(index + SLOTS < self.sizes.chunks)(lambda: self.fetch(index + SLOTS, slot))
        self.store(index)
        return sums

    def store(self, index):
        """Start the copies of a chunk's gradients out of shared memory."""
        shared, out = self.shared, self.out
        for to_QP, dy_QP in self.by_rank(out.dy_BLX, shared.dy_TP, index):
            plgpu.copy_smem_to_gmem(dy_QP, to_QP)
        if shared.dgate_TP is None:
            return
        if self.tile.rank > 1:
            sum_TP = product(ones_of_tokens(self.tile), shared.dgate_TP, WIDTH, self.interpret)
            plgpu.commit_smem()
            shared.dgate_TP[...] = sum_TP.astype(jnp.bfloat16)
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.dgate_TP.at[self.rows(0)], out.dgate_BLX.at[self.of_head(self.tokens(index))])
