"""The gradients of the chunked scan with its rotation, in Pallas Mosaic GPU: what `query_bwd` and `key_bwd` share.

Two passes: queries from the first chunk on, with the state h recomputed; keys and values from the last chunk on, with
the gradient dh of the state. With P_ts the decay e^(c_t - c_s) inside a chunk, S = q k^T, and x' = kappa x:

    dq_t = sum_{s <= t} weight_ts (dy_t . x_s) k_s  +  e^(c_t) h_0^T dy_t
    dk_s = sum_{t > s} P_ts (x'_s . dy_t) q_t  +  gamma_s (own token)  +  e^(c_T - c_s) dh^T x'_s
    dx_s = kappa_s dx'_s + gamma_s own_s + D dy_s,   dx'_s = sum_{t > s} P_ts S_ts dy_t  +  e^(c_T - c_s) dh k_s
    dkappa_s = x_s . dx'_s,   dgamma_s = x_s . own_s

The decay's gradient needs no products of its own: a pair's log weight is c_t - c_s, so c_t gets what token t receives
less what it gives, q_t . dq_t - k_t . dk_t. Both passes round the same weights to the same bits, so that what a pair of
one chunk adds to later sums cancels exactly; what crosses a chunk's end is taken from the
states every `CHECKPOINT_INTERVAL` tokens.

Queries and keys are rotated as they are read, their gradients rotated back as they are stored; the angle of a plane
(u, w) gets dphi = dw u - du w, which does not depend on the frame. Sums over heads, and of dphi over later tokens, are
left to `sums_bwd`; those too cancel for the pairs of a chunk, and begin again at every checkpoint (see
`gradients.Crossing`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.mosaic_gpu import launch
from pallas_kernels.ssm.mosaic_gpu.chunk import Decay, Rotation, token
from pallas_kernels.ssm.mosaic_gpu.config import WIDTH, Tile
from pallas_kernels.ssm.mosaic_gpu.contract import Sizes, n_planes
from pallas_kernels.ssm.mosaic_gpu.registers import ROWS, of_ranks, of_tokens
from pallas_kernels.ssm.mosaic_gpu.tiles import iota, product, tiled

CHECKPOINT_INTERVAL = 1024  # tokens between two states that are stored, where sums over the row begin again


SCALARS = 4  # of a row: see `Inputs`; for packed rows, the document too


class Inputs(NamedTuple):
    """As `scan.Inputs`; scalars: log2 decay, that less log2 kappa, gamma, kappa and, for packed rows, the document."""

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array | None
    v_BLHP: jax.Array | None
    dy_BLHRP: jax.Array
    phase_BHLS: jax.Array | None
    scalars_BHCXT: jax.Array
    h_BHZPN: jax.Array  # the state before every split, or the gradient of the one after
    q_bias_HRN: jax.Array | None
    k_bias_HRN: jax.Array | None
    v_rank_HRP: jax.Array | None
    skip_H: jax.Array | None


class Shared(NamedTuple):
    q_TN: jax.Array  # as it comes
    k_TN: jax.Array | None
    rotated_k_TN: jax.Array | None  # for `query` alone, and the gradient on its way out
    v_QP: jax.Array | None
    x_TP: jax.Array | None
    dy_TP: jax.Array
    weighted_TP: jax.Array | None
    phase_CQS: jax.Array | None
    scalars_CXT: jax.Array
    h_PN: jax.Array
    low_PN: jax.Array | None  # what is left of dh, rounded to bfloat16 in h
    dphi_TS: jax.Array | None
    rows_XT: jax.Array | None
    dv_rank_TP: jax.Array | None
    q_bias_RN: jax.Array | None
    k_bias_RN: jax.Array | None
    v_rank_RP: jax.Array | None


class Barriers(NamedTuple):
    q: jax.Array
    k: jax.Array
    values: jax.Array
    chunk: jax.Array  # phase, scalars: two chunks of `query`, one of `key`
    head: jax.Array


def shared_memory(refs: Inputs, sizes: Sizes, tile: Tile, *, query: bool) -> Shared:
    d_state, planes, ranked = sizes.d_state, sizes.planes, tile.rank > 1
    only_state = refs.k_BLRGN is None
    vectors = lambda ref, size: None if ref is None else plgpu.SMEM((ref.shape[1], size), jnp.float32)  # noqa: E731
    both = not only_state
    return Shared(
        q_TN=tiled(ROWS, d_state),
        k_TN=tiled(ROWS, d_state) if both else None,
        rotated_k_TN=tiled(ROWS, d_state) if query else None,
        v_QP=tiled(tile.tokens, WIDTH) if both else None,
        x_TP=tiled(ROWS, WIDTH) if both and ranked else None,
        dy_TP=tiled(ROWS, WIDTH),
        weighted_TP=tiled(ROWS, WIDTH) if query else None,
        phase_CQS=tiled(1 + query, tile.tokens, planes, dtype=jnp.int16) if planes else None,
        scalars_CXT=plgpu.SMEM((1 + query, refs.scalars_BHCXT.shape[1], ROWS), jnp.float32),
        h_PN=tiled(WIDTH, d_state),
        low_PN=None if query or only_state else tiled(WIDTH, d_state),
        dphi_TS=tiled(ROWS, planes) if ranked and both and planes else None,
        rows_XT=None if only_state else plgpu.SMEM((1 if query else 4, ROWS), jnp.float32),
        dv_rank_TP=None if query or only_state or not ranked else tiled(ROWS, WIDTH, dtype=jnp.float32),
        q_bias_RN=vectors(refs.q_bias_HRN, d_state),
        k_bias_RN=vectors(refs.k_bias_HRN, d_state),
        v_rank_RP=vectors(refs.v_rank_HRP, WIDTH),
    )


VECTORS = {  # of a head: where each goes in shared memory
    "q_bias_HRN": "q_bias_RN",
    "k_bias_HRN": "k_bias_RN",
    "v_rank_HRP": "v_rank_RP",
}


class Program:
    """Which part of the arrays one program works on, and its copies."""

    def __init__(self, refs: Inputs, shared: Shared, barriers: Barriers, sizes: Sizes, tile: Tile):
        self.refs, self.shared, self.barriers, self.sizes, self.tile = refs, shared, barriers, sizes, tile
        program = lax.axis_index("program")
        # Heads run fastest: neighbours read the same queries and keys.
        self.head = lax.rem(program, jnp.int32(sizes.heads))
        rest = lax.div(program, jnp.int32(sizes.heads))
        self.split, self.batch = lax.rem(rest, jnp.int32(tile.splits)), lax.div(rest, jnp.int32(tile.splits))
        self.group = lax.div(self.head, jnp.int32(sizes.heads_a_group))
        self.row = self.batch * sizes.heads + self.head
        self.state = (self.batch, self.head, self.split)
        self.interpret = tile.interpret is not None

    def chunk(self, index):
        return self.split * self.sizes.chunks + index

    def chunk_of_row(self, index):
        return self.row * self.tile.splits * self.sizes.chunks + self.chunk(index)

    def tokens(self, index):
        return pl.ds(self.chunk(index) * self.tile.tokens, self.tile.tokens)

    def rows(self, rank: int):
        return pl.ds(rank * self.tile.tokens, self.tile.tokens)

    def load_head(self):
        """Starts the copies of what does not depend on the chunk, and returns what waits for them."""
        found = [name for name in VECTORS if getattr(self.refs, name) is not None]
        for name in found:
            to = getattr(self.shared, VECTORS[name])
            plgpu.copy_gmem_to_smem(getattr(self.refs, name).at[self.head], to, self.barriers.head)
        return lambda: plgpu.barrier_wait(self.barriers.head) if found else None

    def _load_ranks(self, ref, to, index, barrier):
        for rank in range(self.tile.rank if ref is not None else 0):
            columns = pl.ds((rank * self.sizes.groups + self.group) * self.sizes.d_state, self.sizes.d_state)
            plgpu.copy_gmem_to_smem(ref.at[self.batch, self.tokens(index), columns], to.at[self.rows(rank)], barrier)

    def load_q(self, index):
        self._load_ranks(self.refs.q_BLRGN, self.shared.q_TN, index, self.barriers.q)

    def load_k(self, index):
        self._load_ranks(self.refs.k_BLRGN, self.shared.k_TN, index, self.barriers.k)

    def load_values(self, index):
        tokens, barrier = self.tokens(index), self.barriers.values
        if self.refs.v_BLHP is not None:
            v_QP = self.refs.v_BLHP.at[self.batch, tokens, pl.ds(self.head * WIDTH, WIDTH)]
            plgpu.copy_gmem_to_smem(v_QP, self.shared.v_QP, barrier)
        for rank in range(self.tile.rank):
            columns = pl.ds((self.head * self.tile.rank + rank) * WIDTH, WIDTH)
            dy_QP = self.refs.dy_BLHRP.at[self.batch, tokens, columns]
            plgpu.copy_gmem_to_smem(dy_QP, self.shared.dy_TP.at[self.rows(rank)], barrier)

    def rotation(self, slot) -> Rotation:
        """Returns the rotation of the chunk in a slot."""
        phase_CQS = self.shared.phase_CQS
        return Rotation(None if phase_CQS is None else phase_CQS.at[slot], self.interpret)

    def decay(self, slot) -> Decay:
        """Returns what the scalars of the chunk in a slot weigh."""
        scalars_CXT = self.shared.scalars_CXT
        return Decay(scalars_CXT.at[slot], self.tile, packed=scalars_CXT.shape[1] > SCALARS)

    def load_chunk(self, index, slot):
        barrier = self.barriers.chunk.at[slot]
        if self.refs.phase_BHLS is not None:
            phase_QS = self.refs.phase_BHLS.at[self.row, self.tokens(index)]
            plgpu.copy_gmem_to_smem(phase_QS, self.shared.phase_CQS.at[slot], barrier)
        scalars_XT = self.refs.scalars_BHCXT.at[self.chunk_of_row(index)]
        plgpu.copy_gmem_to_smem(scalars_XT, self.shared.scalars_CXT.at[slot], barrier)

    def store_checkpoint(self, to_BHZAPN, index):
        """Stores what h holds if the chunk begins a checkpoint interval; `to` has all of them, or all but the first."""
        interval = CHECKPOINT_INTERVAL // self.tile.tokens
        left_out = checkpoints(self.sizes, self.tile) - to_BHZAPN.shape[3]
        place = lax.div(index, jnp.int32(interval)) - left_out

        @pl.when((lax.rem(index, jnp.int32(interval)) == 0) & (place >= 0) & (index < self.sizes.chunks))
        def _():
            plgpu.copy_smem_to_gmem(self.shared.h_PN, to_BHZAPN.at[(*self.state, place)])

    def store_rows(self, from_TN, to_BHLX, index):
        """Stores the gradient of q or k."""
        for rank in range(self.tile.rank):
            columns = pl.ds(rank * self.sizes.d_state, self.sizes.d_state)
            to_QN = to_BHLX.at[self.row, self.tokens(index), columns]
            plgpu.copy_smem_to_gmem(from_TN.at[self.rows(rank)], to_QN)

    def store_dphi(self, dphi_TS, to_BHLS, index):
        """Stores the angle's gradient, summed over ranks; None: there is no angle."""
        if dphi_TS is None:
            return
        to_QS = to_BHLS.at[self.row, self.tokens(index)]
        if self.tile.rank == 1:
            to_QS[...] = dphi_TS
            return
        self.shared.dphi_TS[...] = dphi_TS.astype(jnp.bfloat16)
        sum_TS = self.over_ranks(self.shared.dphi_TS)
        self.shared.dphi_TS[...] = sum_TS.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.shared.dphi_TS.at[self.rows(0)], to_QS)

    def over_ranks(self, ref_TP):
        """Returns in every row the sum of its token's: ranks are in different warps, so a product with ones adds up."""
        plgpu.commit_smem()
        token_TT = [token(iota(axis, self.interpret), self.tile) for axis in (0, 1)]
        ones_TT = jnp.where(token_TT[0] == token_TT[1], 1.0, 0.0).astype(jnp.bfloat16)
        sum_TP = product(ones_TT, ref_TP, ref_TP.shape[1], self.interpret)
        plgpu.commit_smem()
        return sum_TP


def values(program: Program):
    """Returns values times their rank's weight, float32."""
    x_TP = of_tokens(program.shared.v_QP, program.interpret).astype(jnp.float32)
    return x_TP if program.shared.v_rank_RP is None else x_TP * of_ranks(program.shared.v_rank_RP, program.interpret)


def call(kernel, name: str, inputs: Inputs, out, sizes: Sizes, tile: Tile, *, query: bool):
    """Runs a kernel of the backward pass, one program a head and split."""
    flat = lambda array, *sizes: None if array is None else array.reshape(*sizes, -1)  # noqa: E731
    batch, length = inputs.dy_BLHRP.shape[:2]
    scalars, phase_BHLS = inputs.scalars_BHCXT, inputs.phase_BHLS
    if phase_BHLS is not None:
        phase_BHLS = phase_BHLS.reshape(-1, *phase_BHLS.shape[2:])
    inputs = inputs._replace(
        q_BLRGN=flat(inputs.q_BLRGN, batch, length),
        k_BLRGN=flat(inputs.k_BLRGN, batch, length),
        v_BLHP=flat(inputs.v_BLHP, batch, length),
        dy_BLHRP=flat(inputs.dy_BLHRP, batch, length),
        phase_BHLS=phase_BHLS,
        scalars_BHCXT=scalars.reshape(-1, *scalars.shape[3:]),
    )
    both, vectors = inputs.k_BLRGN is not None, [name for name in VECTORS if getattr(inputs, name) is not None]
    barriers = Barriers(
        q=plgpu.Barrier(num_arrivals=tile.rank),
        k=plgpu.Barrier(num_arrivals=tile.rank),
        values=plgpu.Barrier(num_arrivals=both + tile.rank),
        chunk=plgpu.Barrier(num_arrivals=1 + (inputs.phase_BHLS is not None), num_barriers=1 + query),
        head=plgpu.Barrier(num_arrivals=max(1, len(vectors))),
    )
    shared = shared_memory(inputs, sizes, tile, query=query)
    kernel, grid = functools.partial(kernel, sizes=sizes, tile=tile), {"program": batch * sizes.heads * tile.splits}
    return launch.call(kernel, name, inputs, out, (shared, barriers), grid, tile.interpret)


def dphi_dtype(tile: Tile):
    """Returns the dtype in which dphi is stored: float32 for rank 1.

    The query's and the key's share of a pair inside a chunk then cancel exactly in the sum over the row. It costs
    134 MB at B16 L2048.
    """
    return jnp.float32 if tile.rank == 1 else jnp.bfloat16


def sizes_of(inputs: Inputs, tile: Tile) -> Sizes:
    """Returns the sizes that a program needs."""
    _, length, _, groups, d_state = inputs.q_BLRGN.shape
    n_heads = inputs.dy_BLHRP.shape[2]
    return Sizes(
        heads=n_heads,
        heads_a_group=n_heads // groups,
        groups=groups,
        chunks=length // tile.tokens // tile.splits,
        d_state=d_state,
        planes=n_planes(inputs.phase_BHLS),
    )


def checkpoints(sizes: Sizes, tile: Tile) -> int:
    """Returns how many states of a split are stored."""
    return -(-sizes.chunks // (CHECKPOINT_INTERVAL // tile.tokens))
