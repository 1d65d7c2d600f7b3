"""One token of the op in one Pallas Mosaic GPU kernel, bias and turn included: the state is read and written once.

    h' = a h + sum_s w_s X_s k_s^T,   y_r = h' q_r
    o = sum_r out_rank_r norm(y_r + D X_r) silu(gate gate_rank_r)

s runs over the R ranks of the token before (w = beta = (1 - trap) dt a), then over those of this one (w = gamma =
trap dt); X_s = v_rank v. This token's queries and keys are biased here, and turned by the angle phi' = phi + dt turn
(mod 2 pi); the key of the token before comes as it was left.

A program has one head of one row. The copy engine brings the state into shared memory, so that what is on its way holds
no registers, and several programs share a multiprocessor: one computes while others wait. The state's bytes are the
floor. While they come, queries and keys are turned, every entry by one thread; what a rank adds to the output is
finished that way too, a rank a warp.

Letters: B batch, R rank, G groups of q/k, H heads, N state per head, M = N / 2, P head width, S planes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.mosaic_gpu.registers import COLUMN, ROW, TILE, joined_pairs, pairs, pairs_of, ranks_of_warps
from pallas_kernels.ssm.mosaic_gpu.tiles import across, down, load, tiled

WIDTH = 64  # P
RANKS = (1, 2, 4)
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Tile:
    """How the kernel runs."""

    interpret: object = None  # plgpu's InterpretParams: on the CPU, for tests


class Inputs(NamedTuple):
    """None: absent. The first four are the state, of the token before."""

    h_BHPN: jax.Array  # float32
    angle_BHS: jax.Array  # float32
    before_k_BRHN: jax.Array  # biased and turned
    before_v_BHP: jax.Array
    q_BRGN: jax.Array
    k_BRGN: jax.Array
    v_BHP: jax.Array
    dt_BH: jax.Array  # these four float32
    log_a_BH: jax.Array
    trap_BH: jax.Array
    turn_BHS: jax.Array  # radians per unit dt; H may be 1: shared
    start_B: jax.Array | None  # int32; what is not 0 forgets everything before
    q_bias_HRN: jax.Array
    k_bias_HRN: jax.Array
    gate_BHP: jax.Array | None
    skip_H: jax.Array | None
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


class Outputs(NamedTuple):
    """The state after the token, in the buffers of the one before where those are donated, and o."""

    h_BHPN: jax.Array
    angle_BHS: jax.Array
    k_BRHN: jax.Array  # like the token's k
    v_BHP: jax.Array
    o_BHP: jax.Array  # like v


class Shared(NamedTuple):
    """Shared memory: what is copied there, then what is computed."""

    h_PN: jax.Array
    angle_M: jax.Array  # in place; the first S count
    turn_M: jax.Array
    before_k_RN: jax.Array
    before_v_P: jax.Array
    v_P: jax.Array
    gate_P: jax.Array | None
    v_rank_RP: jax.Array | None
    gate_rank_RP: jax.Array | None
    out_rank_RP: jax.Array | None
    norm_P: jax.Array | None
    q_RN: jax.Array
    k_RN: jax.Array
    y_RP: jax.Array


class Barriers(NamedTuple):
    """Raised when what was copied has arrived."""

    turn: jax.Array  # the angle before, and the turn
    rest: jax.Array


def check(inputs: Inputs) -> None:
    """Raise ValueError, naming it, for a size that the kernel cannot run."""
    width, d_state = inputs.h_BHPN.shape[2:]
    rank, planes = inputs.q_BRGN.shape[1], inputs.angle_BHS.shape[2]
    if width != WIDTH or d_state not in (64, 128):
        raise ValueError(f"{width=} is not {WIDTH}, or {d_state=} not 64 or 128")
    if rank not in RANKS or planes % 4:
        raise ValueError(f"{rank=} is not in {RANKS}, or {planes=} not a multiple of 4, as the copy engine wants it")


def decode(inputs: Inputs, rotation: str, tile: Tile) -> Outputs:
    """The state after the token, and its output. `rotation`: "adjacent", plane i is (2 i, 2 i + 1), or "half", (i, i + M).

    Raises:
        ValueError: P not 64, N not 64 or 128, R not 1, 2 or 4, or S not a multiple of 4.
    """
    check(inputs)
    batch, n_heads, width, d_state = inputs.h_BHPN.shape
    rank = inputs.q_BRGN.shape[1]
    refs = jax.tree.map(jax.new_ref, inputs)

    def new(ref, like):
        """In the place of `ref`, or elsewhere if it has another dtype."""
        return ref if ref.dtype == like.dtype else jax.new_ref(lax.empty(ref.shape, like.dtype))

    out = Outputs(
        *(refs.h_BHPN, refs.angle_BHS, new(refs.before_k_BRHN, inputs.k_BRGN), new(refs.before_v_BHP, inputs.v_BHP)),
        jax.new_ref(lax.empty(inputs.v_BHP.shape, inputs.v_BHP.dtype)),
    )

    def vectors(ref, *shape):
        return None if ref is None else plgpu.SMEM(shape, ref.dtype)

    copied = (
        tiled(width, d_state, dtype=jnp.float32),
        vectors(refs.angle_BHS, d_state // 2),
        vectors(refs.turn_BHS, d_state // 2),
        vectors(refs.before_k_BRHN, rank, d_state),
        vectors(refs.before_v_BHP, width),
        vectors(refs.v_BHP, width),
        vectors(refs.gate_BHP, width),
        vectors(refs.v_rank_HRP, rank, width),
        vectors(refs.gate_rank_HRP, rank, width),
        vectors(refs.out_rank_HRP, rank, width),
        vectors(refs.norm_HP, width),
    )
    shared = Shared(*copied, *(plgpu.SMEM((rank, size), jnp.float32) for size in (d_state, d_state, width)))
    copies = sum(x is not None for x in copied)

    @pl.core_map(
        plgpu.Mesh(grid=(n_heads, batch), grid_names=("head", "row")),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        name="mamba3_mosaic_decode",
        **({} if tile.interpret is None else {"interpret": tile.interpret}),
    )
    def _():
        pl.run_scoped(
            lambda *scratch: Program(refs, out, *scratch, rotation, tile).run(),
            *(shared, Barriers(plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=copies - 2))),
        )

    return Outputs(*(ref[...] for ref in out))


class Program:
    """One head of one row."""

    def __init__(self, refs: Inputs, out: Outputs, shared: Shared, barriers: Barriers, rotation: str, tile: Tile):
        self.refs, self.out, self.shared, self.barriers, self.rotation = refs, out, shared, barriers, rotation
        self.interpret = tile.interpret is not None
        self.rank, self.d_state = shared.q_RN.shape
        self.b, self.h = lax.axis_index("row"), lax.axis_index("head")
        self.keep = None if refs.start_B is None else refs.start_B[self.b] == 0

    def run(self):
        b, h, out, shared = self.b, self.h, self.out, self.shared
        self.copy()
        dt, log_a, trap = (ref[b, h] for ref in (self.refs.dt_BH, self.refs.log_a_BH, self.refs.trap_BH))
        k_RN = self.turn(dt)
        plgpu.commit_smem()
        self.store(shared.angle_M.at[self.planes], out.angle_BHS.at[b, h])
        plgpu.barrier_wait(self.barriers.rest)
        out.k_BRHN.at[b, :, h][...] = k_RN.astype(out.k_BRHN.dtype)
        self.store(shared.v_P, out.v_BHP.at[b, h])

        h_PN = self.updated(dt, jnp.exp(log_a), trap)
        shared.h_PN[...] = h_PN
        self.read_out(h_PN)
        plgpu.commit_smem()
        self.store(shared.h_PN, out.h_BHPN.at[b, h])
        self.finish()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @property
    def planes(self):
        return pl.ds(0, self.refs.angle_BHS.shape[-1])

    def copy(self):
        refs, shared, b, h = self.refs, self.shared, self.b, self.h
        turned_by = 0 if refs.turn_BHS.shape[1] == 1 else h
        turn, rest = self.barriers
        for ref, at, to, barrier in (
            (refs.h_BHPN, (b, h), shared.h_PN, rest),
            (refs.angle_BHS, (b, h), shared.angle_M.at[self.planes], turn),
            (refs.turn_BHS, (b, turned_by), shared.turn_M.at[self.planes], turn),
            (refs.before_k_BRHN, (b, slice(None), h), shared.before_k_RN, rest),
            (refs.before_v_BHP, (b, h), shared.before_v_P, rest),
            (refs.v_BHP, (b, h), shared.v_P, rest),
            (refs.gate_BHP, (b, h), shared.gate_P, rest),
            (refs.v_rank_HRP, (h,), shared.v_rank_RP, rest),
            (refs.gate_rank_HRP, (h,), shared.gate_rank_RP, rest),
            (refs.out_rank_HRP, (h,), shared.out_rank_RP, rest),
            (refs.norm_HP, (h,), shared.norm_P, rest),
        ):
            if ref is not None:
                plgpu.copy_gmem_to_smem(ref.at[*at], to, barrier)

    def store(self, shared, to):
        plgpu.copy_smem_to_gmem(shared, to)

    def kept(self, x):
        return x if self.keep is None else jnp.where(self.keep, x, 0.0)

    def load(self, ref, layout, optimized: bool = True):
        return load(ref, layout, self.interpret, optimized).astype(jnp.float32)

    def laid(self, x, layout):
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def turn(self, dt):
        """Advance the angle, turn q and k; also k, a rank a warp."""
        refs, shared, by_rank = self.refs, self.shared, ranks_of_warps(self.rank)
        (planes,), half = refs.angle_BHS.shape[-1:], self.d_state // 2
        heads_a_group = refs.h_BHPN.shape[1] // refs.q_BRGN.shape[2]
        group = lax.div(self.h, jnp.int32(heads_a_group))
        layout = pairs_of(self.rank, self.rotation)

        def biased(x_BRGN, bias_HRN):
            x_RN = self.load(x_BRGN.at[self.b, :, group], layout, optimized=False)
            return x_RN + self.load(bias_HRN.at[self.h], layout, optimized=False)

        q_RN, k_RN = biased(refs.q_BRGN, refs.q_bias_HRN), biased(refs.k_BRGN, refs.k_bias_HRN)
        plgpu.barrier_wait(self.barriers.turn)
        by_plane = by_rank.reduce(0)
        before_M, turn_M = self.load(shared.angle_M, by_plane), self.load(shared.turn_M, by_plane)
        angle_M = within_a_turn(self.kept(before_M) + dt * turn_M)
        shared.angle_M[...] = angle_M
        # The hardware's sine is exact to 2^-21 from -pi to pi, and less so beyond.
        sin_M, cos_M = -jnp.sin(angle_M - jnp.pi), -jnp.cos(angle_M - jnp.pi)
        if planes < half:
            still_M = self.entries(half, by_plane) >= planes
            sin_M, cos_M = jnp.where(still_M, 0.0, sin_M), jnp.where(still_M, 1.0, cos_M)
        sin_RM, cos_RM = (self.laid(across(x_M, self.rank), by_rank) for x_M in (sin_M, cos_M))

        def turned(x_RN):
            u_RM, w_RM = pairs(x_RN, self.rotation, self.interpret)
            firsts_RM, seconds_RM = u_RM * cos_RM - w_RM * sin_RM, u_RM * sin_RM + w_RM * cos_RM
            return joined_pairs(firsts_RM, seconds_RM, self.rotation, self.interpret)

        shared.q_RN[...] = turned(q_RN)
        k_RN = turned(k_RN)
        shared.k_RN[...] = k_RN
        return k_RN

    def entries(self, size: int, layout):
        """0, 1, 2, ..."""
        if self.interpret:
            return lax.iota(jnp.int32, size)
        return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)

    def updated(self, dt, a, trap):
        shared, d_state = self.shared, self.d_state
        of_row = lambda ref: self.load(ref, ROW)  # noqa: E731
        of_column = lambda ref: across(self.load(ref, COLUMN), WIDTH)  # noqa: E731
        v_P, before_v_P = trap * dt * of_row(shared.v_P), (1 - trap) * dt * a * self.kept(of_row(shared.before_v_P))

        # A loop, not one rank after another: all vectors at once would fill the registers, and fewer programs fit.
        def add(r, h_PN):
            ranked = lambda x_P: x_P if shared.v_rank_RP is None else x_P * of_row(shared.v_rank_RP.at[r])  # noqa: E731
            h_PN += down(ranked(before_v_P), d_state) * self.kept(of_column(shared.before_k_RN.at[r]))
            return h_PN + down(ranked(v_P), d_state) * of_column(shared.k_RN.at[r])

        return lax.fori_loop(0, self.rank, add, self.kept(self.load(shared.h_PN, TILE)) * a)

    def read_out(self, h_PN):
        shared = self.shared

        def one(r, _):
            q_PN = across(self.load(shared.q_RN.at[r], COLUMN), WIDTH)
            shared.y_RP.at[r][...] = jnp.sum(h_PN * q_PN, axis=1)

        lax.fori_loop(0, self.rank, one, None)

    def finish(self):
        """SPEC section 7."""
        shared, refs, by_rank = self.shared, self.refs, ranks_of_warps(self.rank)
        of_all = lambda ref_P: self.laid(across(self.load(ref_P, by_rank.reduce(0)), self.rank), by_rank)  # noqa: E731
        times = lambda x_RP, ref_RP: x_RP if ref_RP is None else x_RP * self.load(ref_RP, by_rank)  # noqa: E731
        y_RP = self.load(shared.y_RP, by_rank)
        if refs.skip_H is not None:
            y_RP += refs.skip_H[self.h].astype(jnp.float32) * times(of_all(shared.v_P), shared.v_rank_RP)
        if shared.norm_P is not None:
            scale_R = lax.rsqrt(jnp.sum(y_RP * y_RP, axis=1) * (1 / WIDTH) + NORM_EPS)
            y_RP *= self.laid(down(scale_R, WIDTH), by_rank) * of_all(shared.norm_P)
        if shared.gate_P is not None:
            gate_RP = times(of_all(shared.gate_P), shared.gate_rank_RP)
            y_RP *= gate_RP / (1 + jnp.exp(-gate_RP))
        o_P = jnp.sum(times(y_RP, shared.out_rank_RP), axis=0)
        self.out.o_BHP.at[self.b, self.h][...] = o_P.astype(self.out.o_BHP.dtype)


def within_a_turn(angle):
    """The angle modulo 2 pi, in [0, 2 pi)."""
    for _ in range(2):  # a tiny negative angle rounds up to a whole turn, which is zero
        turns = angle * (1 / (2 * jnp.pi))
        whole = turns.astype(jnp.int32).astype(jnp.float32)  # towards zero: Mosaic has no floor
        angle = angle - 2 * jnp.pi * jnp.where(whole > turns, whole - 1, whole)
    return angle
