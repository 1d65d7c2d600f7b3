"""The kernel of `decode`: one head of one row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.contract import NORM_EPS, Stepped, Token
from pallas_kernels.ssm.mosaic_gpu.angle import sine_and_cosine, within_a_turn
from pallas_kernels.ssm.mosaic_gpu.config import WIDTH
from pallas_kernels.ssm.mosaic_gpu.registers import (
    COLUMN,
    ROW,
    TILE,
    joined_pairs,
    pairs,
    pairs_of,
    ranks_of_warps,
    spread,
)
from pallas_kernels.ssm.mosaic_gpu.tiles import across, down, load


class Shared(NamedTuple):
    """Shared memory; float32."""

    h_PN: jax.Array
    sin_M: jax.Array | None  # the first S count
    cos_M: jax.Array | None
    k_JN: jax.Array
    x_JP: jax.Array  # w X
    q_RN: jax.Array
    y_RP: jax.Array
    skip_RP: jax.Array | None  # D X
    scale_RP: jax.Array | None  # what y is multiplied by: weights of norm and rank, gate


class Loaded(NamedTuple):
    """Registers, a rank a warp; float32."""

    angle_S: jax.Array | None  # of the token before; these two are the same in all warps
    turn_S: jax.Array | None
    q_RN: jax.Array  # these five as `pairs` wants them
    k_RN: jax.Array
    q_bias_RN: jax.Array | None
    k_bias_RN: jax.Array | None
    before_k_RN: jax.Array | None
    v_P: jax.Array  # these four are the same in all warps
    before_v_P: jax.Array | None
    gate_P: jax.Array | None
    norm_P: jax.Array | None
    v_rank_RP: jax.Array | None
    gate_rank_RP: jax.Array | None
    out_rank_RP: jax.Array | None


class Program:
    """One head of one row."""

    def __init__(
        self, refs: Token, out: Stepped, shared: Shared, arrived, *, rotation: str, width: int, interpret: bool
    ):
        self.refs, self.out, self.shared, self.arrived, self.rotation = refs, out, shared, arrived, rotation
        self.width, self.interpret = width, interpret  # P without its padding
        self.rank, self.d_state = shared.q_RN.shape
        self.b, self.h = lax.axis_index("row"), lax.axis_index("head")
        self.keep = None if refs.start_B is None else refs.start_B[self.b] == 0
        self.by_rank = ranks_of_warps(self.rank)
        self.ranks = slice(None) if self.rank > 1 else 0  # jax 0.10 has no (1, N) with strides

    def run(self):
        refs, out, shared, at = self.refs, self.out, self.shared, (self.b, self.h)
        plgpu.copy_gmem_to_smem(refs.last.h_BHPN.at[*at], shared.h_PN, self.arrived)
        numbers = (refs.log_a_BH, refs.gamma_BH, refs.beta_BH, refs.dt_BH)
        log_a, gamma, beta, dt = (None if ref is None else ref[*at] for ref in numbers)
        a = jnp.exp(log_a)
        loaded = self.loaded()
        if dt is not None:
            angle_S = within_a_turn(self.kept(loaded.angle_S) + dt * loaded.turn_S)
            planes = pl.ds(0, angle_S.shape[0])
            shared.sin_M.at[planes][...], shared.cos_M.at[planes][...] = sine_and_cosine(angle_S)
        self.values(loaded, None if beta is None else a * beta, gamma)
        self.scale(loaded)
        plgpu.commit_smem()  # and all have read what is overwritten from here on
        k_RN = self.turn(loaded)
        plgpu.commit_smem()
        if dt is not None:
            out.last.angle_BHS.at[*at][...] = angle_S
        if beta is not None:
            k_RN = jnp.sum(k_RN, axis=0) if self.rank == 1 else k_RN
            out.last.k_BRHN.at[self.b, self.ranks, self.h][...] = k_RN.astype(out.last.k_BRHN.dtype)
            out.last.v_BHP.at[*at][...] = loaded.v_P.astype(out.last.v_BHP.dtype)

        plgpu.barrier_wait(self.arrived)
        h_PN = self.updated(a)
        shared.h_PN[...] = h_PN
        self.read_out(h_PN)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.h_PN, out.last.h_BHPN.at[*at])
        self.finish()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def loaded(self) -> Loaded:
        """All at once, before anything is stored: one wait for all."""
        refs, b, h = self.refs, self.b, self.h
        in_pairs, by_rank = pairs_of(self.rank, self.rotation), self.by_rank
        group = lax.div(h, jnp.int32(refs.last.h_BHPN.shape[1] // refs.q_BRGN.shape[2]))

        def load_as(layout, ref, *at):
            if ref is None:
                return None
            return load(ref.at[*at], layout, self.interpret, optimized=False).astype(jnp.float32)

        def load_ranks(layout, ref, *at):
            if self.rank > 1:
                return load_as(layout, ref, *at)
            row = load_as(layout.reduce(0), ref, *at)
            return None if row is None else self.laid(across(row, 1), layout)

        angle_S = turn_S = None
        if refs.angle_BHS is not None:
            turned_by, of_planes = 0 if refs.angle_BHS.shape[1] == 1 else h, spread(refs.last.angle_BHS.shape[-1])
            angle_S = load_as(of_planes, refs.last.angle_BHS, b, h)
            turn_S = load_as(of_planes, refs.angle_BHS, b, turned_by)
        weights = refs.weights
        return Loaded(
            angle_S=angle_S,
            turn_S=turn_S,
            q_RN=load_ranks(in_pairs, refs.q_BRGN, b, self.ranks, group),
            k_RN=load_ranks(in_pairs, refs.k_BRGN, b, self.ranks, group),
            q_bias_RN=load_ranks(in_pairs, weights.q_bias_HRN, h, self.ranks),
            k_bias_RN=load_ranks(in_pairs, weights.k_bias_HRN, h, self.ranks),
            before_k_RN=load_ranks(in_pairs, refs.last.k_BRHN, b, self.ranks, h),
            v_P=load_as(by_rank.reduce(0), refs.v_BHP, b, h),
            before_v_P=load_as(by_rank.reduce(0), refs.last.v_BHP, b, h),
            gate_P=load_as(by_rank.reduce(0), refs.gate_BHP, b, h),
            norm_P=load_as(by_rank.reduce(0), weights.norm_HP, h),
            v_rank_RP=load_ranks(by_rank, weights.v_rank_HRP, h, self.ranks),
            gate_rank_RP=load_ranks(by_rank, weights.gate_rank_HRP, h, self.ranks),
            out_rank_RP=load_ranks(by_rank, weights.out_rank_HRP, h, self.ranks),
        )

    def values(self, loaded: Loaded, beta, gamma):
        """What goes into the state, and past it."""
        shared, skip_H = self.shared, self.refs.weights.skip_H
        x_RP = times(self.all_ranks(loaded.v_P), loaded.v_rank_RP)
        if beta is not None:
            before_x_RP = times(self.all_ranks(self.kept(loaded.before_v_P)), loaded.v_rank_RP)
            shared.x_JP.at[pl.ds(0, self.rank)][...] = beta * before_x_RP
        shared.x_JP.at[self.own()][...] = gamma * x_RP
        if skip_H is not None:
            shared.skip_RP[...] = skip_H[self.h].astype(jnp.float32) * x_RP

    def scale(self, loaded: Loaded):
        gate_RP = times(self.all_ranks(loaded.gate_P), loaded.gate_rank_RP)
        scale_RP = None if gate_RP is None else gate_RP / (1 + jnp.exp(-gate_RP))
        scale_RP = times(times(scale_RP, self.all_ranks(loaded.norm_P)), loaded.out_rank_RP)
        if scale_RP is not None:
            self.shared.scale_RP[...] = scale_RP

    def turn(self, loaded: Loaded):
        """Bias and turn queries and keys; also k."""
        shared = self.shared
        if loaded.before_k_RN is not None:
            shared.k_JN.at[pl.ds(0, self.rank)][...] = self.kept(loaded.before_k_RN)
        if shared.sin_M is not None:
            sin_RM, cos_RM = (self.all_ranks(x_M) for x_M in self.sine_and_cosine_M())

        def turned(x_RN, bias_RN):
            x_RN = x_RN if bias_RN is None else x_RN + bias_RN
            if shared.sin_M is None:
                return x_RN
            u_RM, w_RM = pairs(x_RN, self.rotation, self.interpret)
            firsts_RM, seconds_RM = u_RM * cos_RM - w_RM * sin_RM, u_RM * sin_RM + w_RM * cos_RM
            return joined_pairs(firsts_RM, seconds_RM, self.rotation, self.interpret)

        shared.q_RN[...] = turned(loaded.q_RN, loaded.q_bias_RN)
        k_RN = turned(loaded.k_RN, loaded.k_bias_RN)
        shared.k_JN.at[self.own()][...] = k_RN
        return k_RN

    def own(self):
        """Where this token's ranks are among all that go into the state: behind those of the token before, if any."""
        return pl.ds(self.shared.k_JN.shape[0] - self.rank, self.rank)

    def sine_and_cosine_M(self):
        layout, half, planes = self.by_rank.reduce(0), self.d_state // 2, self.refs.last.angle_BHS.shape[-1]
        sin_M, cos_M = (load(ref, layout, self.interpret) for ref in (self.shared.sin_M, self.shared.cos_M))
        if planes == half:
            return sin_M, cos_M
        turns_M = self.laid(lax.broadcasted_iota(jnp.int32, (half,), 0), layout) < planes
        return jnp.where(turns_M, sin_M, 0.0), jnp.where(turns_M, cos_M, 1.0)

    def updated(self, a):
        # A loop, not one rank after another: all vectors at once would fill the registers, and fewer programs fit.
        def add(j, h_PN):
            x_P, k_N = (
                load(self.shared.x_JP.at[j], ROW, self.interpret),
                load(self.shared.k_JN.at[j], COLUMN, self.interpret),
            )
            return h_PN + down(x_P, self.d_state) * across(k_N, WIDTH)

        h_PN = self.kept(load(self.shared.h_PN, TILE, self.interpret))
        return lax.fori_loop(0, self.shared.k_JN.shape[0], add, a * h_PN)

    def read_out(self, h_PN):
        def one(r, _):
            q_N = load(self.shared.q_RN.at[r], COLUMN, self.interpret)
            self.shared.y_RP.at[r][...] = jnp.sum(h_PN * across(q_N, WIDTH), axis=1)

        lax.fori_loop(0, self.rank, one, None)

    def finish(self):
        """SPEC section 7."""
        y_RP, skip_RP, scale_RP = (
            None if ref is None else load(ref, self.by_rank, self.interpret)
            for ref in (self.shared.y_RP, self.shared.skip_RP, self.shared.scale_RP)
        )
        if skip_RP is not None:
            y_RP += skip_RP
        if self.refs.weights.norm_HP is not None:
            scale_R = lax.rsqrt(jnp.sum(y_RP * y_RP, axis=1) * (1 / self.width) + NORM_EPS)
            y_RP *= self.laid(down(scale_R, WIDTH), self.by_rank)
        if scale_RP is not None:
            y_RP *= scale_RP
        self.out.o_BHP.at[self.b, self.h][...] = jnp.sum(y_RP, axis=0).astype(self.out.o_BHP.dtype)

    def all_ranks(self, x_P):
        return None if x_P is None else self.laid(across(x_P, self.rank), self.by_rank)

    def laid(self, x, layout):
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def kept(self, x):
        return x if self.keep is None else jnp.where(self.keep, x, 0.0)


def times(x, y):
    """None is one."""
    return y if x is None else x if y is None else x * y
