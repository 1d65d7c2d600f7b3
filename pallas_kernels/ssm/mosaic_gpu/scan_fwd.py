"""The op in Pallas Mosaic GPU: a row by one kernel, and a custom derivative around it whose gradients are `scan_bwd`'s.

    y_t = sum_{s < t} e^(c_t - c_s) kappa_s (q_t . k_s) x_s  +  gamma_t (q_t . k_t) x_t  +  e^(c_t) h_0 q_t  +  D x_t
    h_T = sum_s e^(c_T - c_s) kappa_s x_s k_s^T  +  e^(c_T) h_0
    o_t = sum over ranks of out_rank norm(y_t) silu(gate gate_rank)

within a chunk of 64 rows: c is the log of the decay since its first token, x = v_rank v, h_0 the state before it; q and
k are biased and rotated, by the angles of `phase`, as they are read. Both sums over s are matrix products.

A program, one warpgroup, computes a head of a batch entry, or a split of it, chunk after chunk. The state stays in
registers. Of what a chunk reads, q, the angles and the gate have one place in shared memory, filled again as soon as
they are in registers; what wgmma reads until the chunk's end (k, rotated in place, and v) has two. Two programs share a
multiprocessor, and one computes while the other waits.
"""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import target
from pallas_kernels.ssm.angle import Along
from pallas_kernels.ssm.contract import (
    NORM_EPS,
    Carry,
    Row,
    Scanned,
    Token,
    Weights,
    decay_dtype,
    product_dtype,
    require,
    sizes_of,
)
from pallas_kernels.ssm.mosaic_gpu import scan_bwd
from pallas_kernels.ssm.mosaic_gpu.phase import phase
from pallas_kernels.ssm.mosaic_gpu.tiles import (
    ROWS,
    TILE,
    WIDTH,
    Decay,
    Program,
    Residuals,
    Rotation,
    ScanRefs,
    Sizes,
    Tile,
    Transposed,
    add_products,
    call_scan,
    down,
    head_barrier,
    head_memory,
    interpreter,
    iota,
    load,
    load_head,
    of_ranks,
    of_tokens,
    ones_of_tokens,
    product_tiles,
    stack_scalars,
    tiled,
)
from pallas_kernels.ssm.operands import Operands, combine_splits, operands_of, scanned
from pallas_kernels.ssm.order import Order

HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")  # in jax's device_kind
PROGRAMS = 264  # that fill an H200: two on each of its 132 multiprocessors


def available() -> str | None:
    """Return what the kernels want of the device, and what they got; None: nothing."""
    device = target()
    found = device.platform
    if found == "gpu":
        known = "9.0" if HOPPER.search(device.device_kind) else "unknown"  # of a device that is not here
        capability = getattr(device, "compute_capability", known)
        if capability == "9.0":
            return None
        found = f"a GPU of compute capability {capability}"
    return f"needs a Hopper GPU (compute capability 9.0), not {found}"


def unsupported(inputs: Row | Token) -> str | None:
    """Return what the kernels want of these shapes and dtypes, and what they got; None: nothing."""
    size, dtype = sizes_of(inputs), product_dtype(inputs)
    rank, d_state, width, pairs = size["R"], size["N"], size["P"], size["S"]
    if decay_dtype(inputs) != jnp.float32:
        return f"computes in float32, log_a is {decay_dtype(inputs)}"
    if dtype != jnp.bfloat16:
        return f"wants q, k and v in bfloat16, not {dtype}: Hopper's wgmma has no products of true float32"
    if rank not in (1, 2, 4):
        return f"wants a rank of 1, 2 or 4, not {rank=}"
    if width > WIDTH or order_of("half", d_state, pairs).size > 128:
        limits = f"d_state up to 128 (with the rotary pairs padded to 16, 32 or 64) and P up to {WIDTH}"
        return f"wants {limits}, not {d_state=} with {pairs=}, P={width}"
    return None


def order_of(rotation: str, d_state: int, pairs: int) -> Order:
    """Return the kernels' order of N: pair i at (i, i + N/2), as MIMO weights have it, what does not rotate between.

    S is 16, 32 or 64 there, and N 64 or 128.
    """
    padded = max(16, 1 << (pairs - 1).bit_length()) if pairs else 0
    size = max(64, 1 << (2 * padded + d_state - 2 * pairs - 1).bit_length())
    return Order(rotation, d_state, pairs, size=size, kernel_pairs=padded, halves=True)


def splits_of(row: Row, programs: int) -> int:
    """Return how many parts of the length fill the device, of four chunks or more."""
    size = sizes_of(row)
    chunks = -(-size["L"] // (ROWS // size["R"]))
    return max(1, min(programs // (size["B"] * size["H"]), chunks // 4))


def scan(
    row: Row,
    rotation: str,
    *,
    interpret=None,
    chunk: int | None = None,
    splits: int | None = None,
    programs: int | None = None,
    along: Along | None = None,
) -> Scanned:
    """Compute a row in one kernel, and its angles in two before it. See `contract`.

    Queries and keys are rotated inside the scans: they are read as they come, once a head, and never stored rotated.

    Args:
        chunk: ignored: it is always 64 rows, ranks times tokens.
        splits: how many parts of the length run side by side; None: as many as there are `programs` for.
        programs: how many fill the device; None: two on each of an H200's multiprocessors.
        along: how rows go on over devices (`contract`).

    Raises:
        ValueError: q, k and v not bfloat16, a rank other than 1, 2 or 4, P over 64, or d_state over 128 with the pairs
            padded to 16, 32 or 64.
    """
    del chunk
    require("mosaic_gpu", unsupported(row))
    size = sizes_of(row)
    order = order_of(rotation, size["N"], size["S"])
    splits = splits or splits_of(row, programs or PROGRAMS)
    tile = Tile(
        rank=size["R"], width=size["P"], splits=splits, interpret=interpreter() if interpret else None, along=along
    )
    unit = tile.tokens * tile.splits
    weights = jax.tree.map(lambda array: array.astype(jnp.float32), row.weights)
    given = row._replace(weights=weights)
    if size["R"] == 1 and weights.v_rank_HRP is not None:  # the kernels have weights of several ranks only
        v_BLHP = row.v_BLHP.astype(jnp.float32) * weights.v_rank_HRP[:, 0]
        given = given._replace(v_BLHP=v_BLHP, weights=weights._replace(v_rank_HRP=None))
    sizes = {"L": -(-size["L"] // unit) * unit, "P": WIDTH, "S": order.kernel_pairs}
    operands = operands_of(given, order, dtype=jnp.bfloat16, sizes=sizes, tokens=tile.tokens)
    if operands.kappa_BHL is None:
        operands = operands._replace(kappa_BHL=operands.gamma_BHL)
    return scanned(row, order, *mamba3(operands, tile))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def mamba3(operands: Operands, tile: Tile):
    """Return o_BLHP, and the state after the row.

    Raises:
        ValueError: see `check`.
    """
    return _forward(operands, tile)[0]


def _fwd(operands: Operands, tile: Tile):
    """Return results and residuals, named as the Triton op's for policies of rematerialisation."""
    (o_BLHP, after), residuals = _forward(operands, dataclasses.replace(tile, residuals=True))
    names = {"phase_BHLS": "ssm_rotated", "y_BLHRP": "ssm_y"}
    residuals = Residuals(
        **{
            name: None if array is None else checkpoint_name(array, names.get(name, "ssm_states"))
            for name, array in residuals._asdict().items()
        }
    )
    return (o_BLHP, after._replace(h_BHPN=residuals.last_BHPN)), (operands, residuals)


def _bwd(tile: Tile, saved, cotangents):
    return (scan_bwd.gradients(*saved, cotangents, tile=tile),)


mamba3.defvjp(_fwd, _bwd)


class ScanOut(NamedTuple):
    """What the kernel writes."""

    o_BLHP: jax.Array | None  # like v
    h_BHZPN: jax.Array  # float32, the state after every split
    y_BLHRP: jax.Array | None  # before norm and gate


def _forward(operands: Operands, tile: Tile):
    """Return output and state, and the residuals (y only where the tile says so).

    Where heads and batch entries are too few to fill the device, or rows go on over several, a first pass leaves
    what every split adds to the state; `combine_splits` gives the state before each, and the kernel then runs all
    splits at once.
    """
    phase_BHLS, angle_BHS = None, None
    if operands.angle_BLHS is not None:
        phase_BHLS, angle_BHS = phase(
            angle_BLHS=operands.angle_BLHS,
            dt_BHL=operands.dt_BHL,
            first_BHS=operands.before.angle_BHS,
            document_BL=operands.document_BL,
            interpret=tile.interpret,
            along=tile.along,
        )
    refs = ScanRefs(
        tokens=operands.tokens,
        dy_BLHRP=None,
        phase_BHLS=phase_BHLS,
        scalars_BHCXT=stack_scalars(operands, tile.scalars, tile),
        h_BHZPN=operands.before.h_BHPN[:, :, None],
        weights=operands.weights,
    )
    refs, split_decay_BHZ = _with_starts(refs, tile)
    out = run(refs, tile)
    last_BHPN = out.h_BHZPN[:, :, -1]
    residuals = Residuals(
        phase_BHLS=phase_BHLS,
        y_BLHRP=out.y_BLHRP,
        starts_BHZPN=refs.h_BHZPN,
        split_decay_BHZ=split_decay_BHZ,
        last_BHPN=last_BHPN,
    )
    return (out.o_BLHP, Carry(angle_BHS=angle_BHS, h_BHPN=last_BHPN)), residuals


def _with_starts(refs: ScanRefs, tile: Tile):
    """Return `refs` with the state before every split for the one before the row, and what each split leaves of it."""
    if tile.splits == 1 and tile.along is None:
        return refs, None
    batch, n_heads, _, width, d_state = refs.h_BHZPN.shape
    only_state = refs._replace(
        tokens=refs.tokens._replace(q_BLRGN=None, gate_BLHP=None),
        h_BHZPN=jnp.zeros((batch, n_heads, tile.splits, width, d_state), jnp.float32),
        weights=Weights(k_bias_HRN=refs.weights.k_bias_HRN, v_rank_HRP=refs.weights.v_rank_HRP),
    )
    added_BHZPN = run(only_state, tile).h_BHZPN
    last_BHZCX = refs.scalars_BHCXT[..., -1].reshape(batch, n_heads, tile.splits, -1, refs.scalars_BHCXT.shape[3])
    split_decay_BHZ = jnp.exp2(jnp.sum(last_BHZCX[..., tile.scalars.index("decay")], axis=-1))
    if last_BHZCX.shape[-1] > len(tile.scalars):  # the row is packed: the document follows
        goes_on_BHZ = jnp.all(last_BHZCX[..., len(tile.scalars)] == 0, axis=-1)
        split_decay_BHZ = jnp.where(goes_on_BHZ, split_decay_BHZ, 0.0)
    h_BHZPN, _ = combine_splits(refs.h_BHZPN[:, :, 0], split_decay_BHZ, added_BHZPN, tile.along)
    return refs._replace(h_BHZPN=h_BHZPN), split_decay_BHZ


def check(refs: ScanRefs, tile: Tile) -> None:
    """Raise ValueError, naming it, for a size that the kernel cannot run."""
    length, rank, groups, d_state = refs.tokens.k_BLRGN.shape[1:]
    n_heads, width = refs.tokens.v_BLHP.shape[2:]
    pairs = None if refs.phase_BHLS is None else refs.phase_BHLS.shape[-1]
    if tile.rank not in (1, 2, 4) or rank != tile.rank:
        raise ValueError(f"{tile.rank=} is not 1, 2 or 4, or k has another {rank=}")
    if d_state not in (64, 128) or width != WIDTH:
        raise ValueError(f"{d_state=} is not 64 or 128, or {width=} not {WIDTH}")
    if pairs is not None and (pairs not in (16, 32, 64) or 2 * pairs > d_state):
        raise ValueError(f"{pairs=} is not 16, 32 or 64, or more than {d_state=} holds")
    if length % (tile.tokens * tile.splits) or length == 0:
        raise ValueError(f"{length=} is not a multiple of {tile.splits=} chunks of {tile.tokens} tokens")
    if n_heads % groups:
        raise ValueError(f"{n_heads=} is not a multiple of {groups=}")
    if tile.rank == 1 and refs.weights.v_rank_HRP is not None:
        raise ValueError("v_rank of one rank is part of v")


def run(refs: ScanRefs, tile: Tile) -> ScanOut:
    """Run the kernel, all splits at once.

    Raises:
        ValueError: see `check`.
    """
    check(refs, tile)
    like, rank = refs.tokens.v_BLHP, tile.rank
    batch, length, n_heads, _ = like.shape
    of_heads = lambda size: jax.ShapeDtypeStruct((batch, length, n_heads * size), like.dtype)  # noqa: E731
    only_state = refs.tokens.q_BLRGN is None
    out = ScanOut(
        o_BLHP=None if only_state else of_heads(WIDTH),
        h_BHZPN=jax.ShapeDtypeStruct((batch, n_heads, tile.splits, *refs.h_BHZPN.shape[3:]), jnp.float32),
        y_BLHRP=of_heads(rank * WIDTH) if tile.residuals and not only_state else None,
    )
    shared = ScanShared.memory(refs, tile)
    barriers = ScanBarriers(
        early=plgpu.Barrier(num_arrivals=max(1, _early_copies(refs, tile))),
        chunk=plgpu.Barrier(num_arrivals=rank + 2, num_barriers=2),
        gate=plgpu.Barrier(),
        head=head_barrier(shared.weights),
    )
    # A norm's sums are within warps too, but what is compiled stays as it was measured.
    how = {"out": out, "scratch": (shared, barriers), "tile": tile, "sums": False}
    out = call_scan(_kernel, ScanProgram, refs, name="mamba3_mosaic_scan", **how)
    return ScanOut(
        o_BLHP=None if out.o_BLHP is None else out.o_BLHP.reshape(like.shape),
        h_BHZPN=out.h_BHZPN,
        y_BLHRP=None if out.y_BLHRP is None else out.y_BLHRP.reshape(batch, length, n_heads, rank, WIDTH),
    )


class ScanShared(NamedTuple):
    """Shared memory."""

    q_TN: jax.Array | None
    k_2TN: jax.Array  # rotated in place
    v_2QP: jax.Array
    x_TP: jax.Array | None  # v of every rank; None for one rank
    weighted_TP: jax.Array  # x, weighted for the state; later, what is stored
    gate_QP: jax.Array  # for one rank, the output in place
    y_TP: jax.Array | None  # the output of every rank; None for one
    phase_QS: jax.Array | None
    scalars_2XT: jax.Array
    h_PN: jax.Array
    weights: Weights  # of the head

    @classmethod
    def memory(cls, refs: ScanRefs, tile: Tile) -> "ScanShared":
        """Return what a program needs."""
        sizes = Sizes.of(refs, tile)
        return cls(
            q_TN=None if refs.tokens.q_BLRGN is None else tiled(ROWS, sizes.d_state),
            k_2TN=tiled(2, ROWS, sizes.d_state),
            v_2QP=tiled(2, tile.tokens, WIDTH),
            x_TP=None if tile.rank == 1 else tiled(ROWS, WIDTH),
            weighted_TP=tiled(ROWS, WIDTH),
            gate_QP=tiled(tile.tokens, WIDTH),
            y_TP=None if tile.rank == 1 else tiled(ROWS, WIDTH),
            phase_QS=tiled(tile.tokens, sizes.pairs, dtype=jnp.int16) if sizes.pairs else None,
            scalars_2XT=plgpu.SMEM((2, *refs.scalars_BHCXT.shape[3:]), jnp.float32),
            h_PN=tiled(WIDTH, sizes.d_state),
            weights=head_memory(refs.flat().weights),
        )


class ScanBarriers(NamedTuple):
    """Barriers, raised when what was copied has arrived."""

    early: jax.Array  # q and phase
    chunk: jax.Array  # two: k, v, scalars
    gate: jax.Array
    head: jax.Array  # what does not depend on the chunk


def _early_copies(refs: ScanRefs, tile: Tile) -> int:
    """Return how many copies bring a chunk's queries and angles."""
    return (tile.rank if refs.tokens.q_BLRGN is not None else 0) + (refs.phase_BHLS is not None)


class ScanProgram(Program):
    """The part of the arrays one program works on, and its copies."""

    def load_early(self, index):
        """Start the copies of q and the angles of a chunk."""
        if self.refs.tokens.q_BLRGN is not None:
            self.load_ranks(self.refs.tokens.q_BLRGN, self.shared.q_TN, index, self.barriers.early)
        self.load_phase(self.shared.phase_QS, index, self.barriers.early)

    def load_chunk(self, index, slot):
        """Start the copies of k, v and scalars of a chunk."""
        tokens, shared, barrier = self.refs.tokens, self.shared, self.barriers.chunk.at[slot]
        self.load_ranks(tokens.k_BLRGN, shared.k_2TN.at[slot], index, barrier)
        plgpu.copy_gmem_to_smem(tokens.v_BLHP.at[self.of_head(self.tokens(index))], shared.v_2QP.at[slot], barrier)
        self.load_scalars(shared.scalars_2XT.at[slot], index, barrier)

    def load_gate(self, index):
        """Start the copy of a chunk's gate."""
        gate_QP = self.refs.tokens.gate_BLHP.at[self.of_head(self.tokens(index))]
        plgpu.copy_gmem_to_smem(gate_QP, self.shared.gate_QP, self.barriers.gate)

    def store(self, from_TP, index):
        """Store the output of a chunk, its first rows."""
        plgpu.copy_smem_to_gmem(from_TP.at[self.rows(0)], self.out.o_BLHP.at[self.of_head(self.tokens(index))])

    def store_y(self, from_TP, index):
        """Store the output of every rank."""
        for to_QP, from_QP in self.by_rank(self.out.y_BLHRP, from_TP, index):
            plgpu.copy_smem_to_gmem(from_QP, to_QP)


def _kernel(program: ScanProgram):
    refs, out, shared, barriers = program.refs, program.out, program.shared, program.barriers
    tile, chunks, interpret = program.tile, program.sizes.chunks, program.interpret
    gated = refs.tokens.gate_BLHP is not None
    only_state, weights = refs.tokens.q_BLRGN is None, shared.weights
    skip = None if refs.weights.skip_H is None else refs.weights.skip_H[program.head]
    head_arrived = load_head(refs.weights, program.head, weights, barriers.head)
    program.load_early(0)
    for index in range(min(2, chunks)):
        program.load_chunk(index, index)
    if gated:
        program.load_gate(0)
    head_arrived()

    def chunk(program, index, h_PN):
        shared, weights = program.shared, program.shared.weights
        slot = lax.rem(index, jnp.int32(2))
        k_TN, v_QP = shared.k_2TN.at[slot], shared.v_2QP.at[slot]
        if _early_copies(refs, tile):
            plgpu.barrier_wait(barriers.early)
        plgpu.barrier_wait(barriers.chunk.at[slot])
        decay = Decay(shared.scalars_2XT.at[slot], tile.scalars, tile)

        rotation = Rotation(shared.phase_QS, interpret)
        if rotation.changes(weights.k_bias_HRN):
            k_TN[...] = rotation.apply(k_TN, weights.k_bias_HRN)
        if not only_state:
            q_TN = rotation.apply(shared.q_TN, weights.q_bias_HRN)
            shared.h_PN[...] = h_PN.astype(jnp.bfloat16)
        # The last chunk's copies out of shared memory are done.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if gated:
            pl.when(index > 0)(lambda: program.load_gate(index))
        x_ref = program.store_values(v_QP, decay)
        pl.when(index + 1 < chunks)(lambda: program.load_early(index + 1))

        h_sum = (h_PN * decay.chunk_decay(), Transposed(shared.weighted_TP), k_TN)
        if only_state:
            (h_PN,) = add_products([h_sum], interpret)
            plgpu.commit_smem()
        else:
            score_TT, y_TP = product_tiles(
                [(q_TN, Transposed(k_TN), ROWS), (q_TN, Transposed(shared.h_PN), WIDTH)], interpret
            )
            score_TT *= decay.weight_TT(shifted=True)
            if skip is not None:
                row_TT, column_TT = (iota(axis, interpret) for axis in (0, 1))
                score_TT = jnp.where(row_TT == column_TT, score_TT + skip, score_TT)
            y_TP *= down(decay.decay_from_start_T(), WIDTH)
            y_TP, h_PN = add_products([(y_TP, score_TT.astype(jnp.bfloat16), x_ref), h_sum], interpret)
            _epilogue(y_TP, program, index)
        pl.when(index + 2 < chunks)(lambda: program.load_chunk(index + 2, slot))
        return h_PN

    h_PN = load(refs.h_BHZPN.at[program.state], TILE, interpret, optimized=False)
    # Of one rank, addresses fit in the registers beside all else.
    turn = program.fresh if tile.rank > 1 else lambda: program
    h_PN = lax.fori_loop(0, chunks, lambda *of_chunk: chunk(turn(), *of_chunk), h_PN)
    out.h_BHZPN.at[program.state][...] = h_PN
    plgpu.wait_smem_to_gmem(0)


def _epilogue(y_TP, program: ScanProgram, index):
    """Apply norm, gate and the sum over ranks, and store. Ends with a barrier: all have read what was copied in."""
    refs, shared, weights = program.refs, program.shared, program.shared.weights
    tile, interpret = program.tile, program.interpret
    if tile.residuals:
        plgpu.commit_smem()  # all products with `weighted` are done
        shared.weighted_TP[...] = y_TP.astype(jnp.bfloat16)
        plgpu.commit_smem()
        program.store_y(shared.weighted_TP, index)
    if weights.norm_HP is not None:
        mean_T = jnp.sum(jnp.square(y_TP), axis=1) * (1 / tile.width)
        y_TP *= down(lax.rsqrt(mean_T + NORM_EPS), WIDTH) * of_ranks(weights.norm_HP, interpret)
    if refs.tokens.gate_BLHP is not None:
        plgpu.barrier_wait(program.barriers.gate)
        gate_TP = of_tokens(shared.gate_QP, interpret).astype(jnp.float32)
        if weights.gate_rank_HRP is not None:
            gate_TP *= of_ranks(weights.gate_rank_HRP, interpret)
        y_TP *= gate_TP * (0.5 + 0.5 * jnp.tanh(0.5 * gate_TP))
    if weights.out_rank_HRP is not None:
        y_TP *= of_ranks(weights.out_rank_HRP, interpret)
    if tile.rank == 1:
        shared.gate_QP[...] = y_TP.astype(jnp.bfloat16)
        plgpu.commit_smem()
        program.store(shared.gate_QP, index)
        return
    # Ranks are in different warps: a product with ones adds them up, for each of the warps alike.
    shared.y_TP[...] = y_TP.astype(jnp.bfloat16)
    plgpu.commit_smem()
    (o_TP,) = product_tiles([(ones_of_tokens(tile), shared.y_TP, WIDTH)], interpret)
    if tile.residuals:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    shared.weighted_TP[...] = o_TP.astype(jnp.bfloat16)
    plgpu.commit_smem()
    program.store(shared.weighted_TP, index)
