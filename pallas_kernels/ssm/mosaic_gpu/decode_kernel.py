"""The kernel of `decode`, whose program computes one head of one row, its sines, and its layouts: a rank a warp."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.contract import NORM_EPS, Stepped, Token, map_axes
from pallas_kernels.ssm.mosaic_gpu.tiles import COLUMN, LANES, ROW, TILE, WARPS, WIDTH, across, down, fragments, load


class StepShared(NamedTuple):
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


class StepProgram:
    """One head of one row."""

    def __init__(
        self,
        refs: Token,
        out: Stepped,
        shared: StepShared,
        arrived,
        *,
        rotation: str,
        width: int,
        true_d_state: int,
        interpret: bool,
    ):
        self.refs, self.out, self.shared, self.arrived, self.rotation = refs, out, shared, arrived, rotation
        self.width, self.true_d_state, self.interpret = width, true_d_state, interpret  # P and N without padding
        self.rank, self.d_state = shared.q_RN.shape
        self.b, self.h = lax.axis_index("row"), lax.axis_index("head")
        self.group = lax.div(self.h, jnp.int32(refs.last.h_BHPN.shape[1] // refs.q_BRGN.shape[2]))
        self.goes_on = None if refs.start_B is None else refs.start_B[self.b] == 0
        self.by_rank = ranks_of_warps(self.rank)
        self.ranks = slice(None) if self.rank > 1 else 0  # jax 0.10 has no (1, N) with strides

    def run(self):
        """Compute the token. Barriers stand wherever a warp reads what another stored."""
        refs, out, shared, at = self.refs, self.out, self.shared, (self.b, self.h)
        plgpu.copy_gmem_to_smem(refs.last.h_BHPN.at[*at], shared.h_PN, self.arrived)
        numbers = (refs.log_a_BH, refs.gamma_BH, refs.beta_BH, refs.dt_BH)
        log_a, gamma, beta, dt = (None if ref is None else ref[*at] for ref in numbers)
        a = jnp.exp(log_a)
        loaded = self.loaded()
        if dt is not None:
            angle_S = within_a_turn(self.unless_start(loaded.last.angle_BHS) + dt * loaded.angle_BHS)
            pairs = pl.ds(0, angle_S.shape[0])
            shared.sin_M.at[pairs][...], shared.cos_M.at[pairs][...] = sine_and_cosine(angle_S)
        self.values(loaded, None if beta is None else a * beta, gamma)
        self.scale(loaded)
        plgpu.commit_smem()  # every warp has also read what is overwritten from here on
        k_RN = self.rotate(loaded)
        plgpu.commit_smem()
        if dt is not None:
            out.last.angle_BHS.at[*at][...] = angle_S
        if beta is not None:
            k_RN = jnp.sum(k_RN, axis=0) if self.rank == 1 else k_RN
            out.last.k_BRHN.at[self.b, self.ranks, self.h][...] = k_RN.astype(out.last.k_BRHN.dtype)
            out.last.v_BHP.at[*at][...] = loaded.v_BHP.astype(out.last.v_BHP.dtype)

        plgpu.barrier_wait(self.arrived)
        h_PN = self.updated(a)
        shared.h_PN[...] = h_PN
        self.read_out(h_PN)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.h_PN, out.last.h_BHPN.at[*at])
        self.epilogue()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def loaded(self) -> Token:
        """Load everything but the state and single numbers at once, before anything is stored: there is one wait."""
        numbers = dict.fromkeys(("dt_BH", "log_a_BH", "gamma_BH", "beta_BH", "start_B"))
        last, weights = self.refs.last._replace(h_BHPN=None), self.refs.weights._replace(skip_H=None)
        return map_axes(self.load, self.refs._replace(last=last, weights=weights, **numbers))

    def load(self, axes: str, ref):
        """Load what is of the program's row, head and group, float32: a rank a warp; what ranks share, in all warps."""
        layout = layout_of_pairs(self.rank, self.rotation) if axes[-1] == "N" else self.by_rank
        of_ranks = "R" in axes
        shared = axes == "BHS" and ref.shape[1] == 1
        places = {"B": self.b, "H": 0 if shared else self.h, "G": self.group, "R": self.ranks}
        at = tuple(places[axis] for axis in axes[:-1])
        of_row = spread(ref.shape[-1]) if axes[-1] == "S" else layout.reduce(0)
        row_layout = layout if of_ranks and self.rank > 1 else of_row
        x = load(ref.at[at] if at else ref, row_layout, self.interpret, optimized=False).astype(jnp.float32)
        return self.laid(across(x, 1), layout) if of_ranks and self.rank == 1 else x

    def values(self, loaded: Token, beta, gamma):
        """Store what goes into the state, w X of every source, and what goes past it, D X."""
        shared, skip_H = self.shared, self.refs.weights.skip_H
        x_RP = times(self.all_ranks(loaded.v_BHP), loaded.weights.v_rank_HRP)
        if beta is not None:
            before_x_RP = times(self.all_ranks(self.unless_start(loaded.last.v_BHP)), loaded.weights.v_rank_HRP)
            shared.x_JP.at[pl.ds(0, self.rank)][...] = beta * before_x_RP
        shared.x_JP.at[self.this_token()][...] = gamma * x_RP
        if skip_H is not None:
            shared.skip_RP[...] = skip_H[self.h].astype(jnp.float32) * x_RP

    def scale(self, loaded: Token):
        """Store what y is multiplied by: gate, norm's weight and rank's weight."""
        gate_RP = times(self.all_ranks(loaded.gate_BHP), loaded.weights.gate_rank_HRP)
        scale_RP = None if gate_RP is None else gate_RP / (1 + jnp.exp(-gate_RP))
        scale_RP = times(times(scale_RP, self.all_ranks(loaded.weights.norm_HP)), loaded.weights.out_rank_HRP)
        if scale_RP is not None:
            self.shared.scale_RP[...] = scale_RP

    def rotate(self, loaded: Token):
        """Store biased and rotated queries and keys, with the keys of the token before; return this token's keys."""
        shared = self.shared
        if loaded.last.k_BRHN is not None:
            shared.k_JN.at[pl.ds(0, self.rank)][...] = self.unless_start(loaded.last.k_BRHN)
        if shared.sin_M is not None:
            sin_RM, cos_RM = (self.all_ranks(x_M) for x_M in self.sine_and_cosine_M())

        def rotated(x_RN, norm_N, bias_RN):
            x_RN = x_RN if norm_N is None else self.normed(x_RN, norm_N)
            x_RN = x_RN if bias_RN is None else x_RN + bias_RN
            if shared.sin_M is None:
                return x_RN
            u_RM, w_RM = split_pairs(x_RN, self.rotation, self.interpret)
            firsts_RM, seconds_RM = u_RM * cos_RM - w_RM * sin_RM, u_RM * sin_RM + w_RM * cos_RM
            return join_pairs(firsts_RM, seconds_RM, self.rotation, self.interpret)

        weights = loaded.weights
        shared.q_RN[...] = rotated(loaded.q_BRGN, weights.q_norm_N, weights.q_bias_HRN)
        k_RN = rotated(loaded.k_BRGN, weights.k_norm_N, weights.k_bias_HRN)
        shared.k_JN.at[self.this_token()][...] = k_RN
        return k_RN

    def normed(self, x_RN, norm_N):
        """Return the RMSNorm of every rank's row, rounded to the dtype of values."""
        over_rms_R = lax.rsqrt(jnp.sum(x_RN * x_RN, axis=1) * (1 / self.true_d_state) + NORM_EPS)
        layout = layout_of_pairs(self.rank, self.rotation)
        x_RN = x_RN * self.laid(down(over_rms_R, self.d_state), layout) * self.laid(across(norm_N, self.rank), layout)
        return x_RN.astype(self.refs.v_BHP.dtype).astype(jnp.float32)

    def this_token(self):
        """Return the place of this token's ranks among all sources: behind those of the token before, if any."""
        return pl.ds(self.shared.k_JN.shape[0] - self.rank, self.rank)

    def sine_and_cosine_M(self):
        """Load sine and cosine of all N / 2 pairs: what does not rotate has 0 and 1."""
        layout, half, n_pairs = self.by_rank.reduce(0), self.d_state // 2, self.refs.last.angle_BHS.shape[-1]
        sin_M, cos_M = (load(ref, layout, self.interpret) for ref in (self.shared.sin_M, self.shared.cos_M))
        if n_pairs == half:
            return sin_M, cos_M
        rotates_M = self.laid(lax.broadcasted_iota(jnp.int32, (half,), 0), layout) < n_pairs
        return jnp.where(rotates_M, sin_M, 0.0), jnp.where(rotates_M, cos_M, 1.0)

    def updated(self, a):
        """Return the state after the token."""

        # This is a loop since all vectors at once would fill the registers, and fewer programs would fit.
        def add(j, h_PN):
            x_P, k_N = (
                load(self.shared.x_JP.at[j], ROW, self.interpret),
                load(self.shared.k_JN.at[j], COLUMN, self.interpret),
            )
            return h_PN + down(x_P, self.d_state) * across(k_N, WIDTH)

        h_PN = self.unless_start(load(self.shared.h_PN, TILE, self.interpret))
        return lax.fori_loop(0, self.shared.k_JN.shape[0], add, a * h_PN)

    def read_out(self, h_PN):
        """Store y, the state times the queries of every rank."""

        def one(r, _):
            q_N = load(self.shared.q_RN.at[r], COLUMN, self.interpret)
            self.shared.y_RP.at[r][...] = jnp.sum(h_PN * across(q_N, WIDTH), axis=1)

        lax.fori_loop(0, self.rank, one, None)

    def epilogue(self):
        """Store the output: y with skip, norm and scale, summed over ranks."""
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
        """Broadcasts what all ranks share."""
        return None if x_P is None else self.laid(across(x_P, self.rank), self.by_rank)

    def laid(self, x, layout):
        """Put registers in a layout, which the interpreter has none of."""
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def unless_start(self, x):
        """Return what was before the token; zeros where it starts a document."""
        return x if self.goes_on is None else jnp.where(self.goes_on, x, 0.0)


def times(x, y):
    """Return the product; None is one."""
    return y if x is None else x if y is None else x * y


def ranks_of_warps(rank: int, vector: int = 1):
    """Return the layout of few rows (R, N): a warp has one (R 2, 1: others the same), a lane every 32nd column.

    Of `vector` columns side by side, every 32nd such group.
    """
    warps = () if rank == WARPS else (plgpu.Replicated(WARPS // rank),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((rank, 32 * vector), (vector,))),
        warp_dims=(*(() if rank == 1 else (-3,)), *warps),
        lane_dims=(-2,),
        vector_dim=-1,
    )


def spread(size: int):
    """Return the layout of (S,): over as many lanes as divide S, the others and all warps with the same."""
    lanes = min(LANES, size & -size)
    same = () if lanes == LANES else (plgpu.Replicated(LANES // lanes),)
    tiles, divided = (((1,),), ()) if lanes == 1 else (((lanes,), (1,)), (-2,))
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(plgpu.Replicated(WARPS),), lane_dims=(*same, *divided), vector_dim=-1
    )


def layout_of_pairs(rank: int, rotation: str):
    """Return the layout of (R, N) for `split_pairs`, which gives (R, N / 2) in that of `ranks_of_warps`."""
    return ranks_of_warps(rank, 2 if rotation == "adjacent" else 1)


def split_pairs(x_RN, rotation: str, interpret: bool):
    """Return the first and the second entries of the pairs: (2 i, 2 i + 1), "adjacent", or (i, i + N / 2), "half"."""
    rank, size = x_RN.shape
    if rotation == "half":
        return x_RN[:, : size // 2], x_RN[:, size // 2 :]
    if interpret:
        return x_RN[:, ::2], x_RN[:, 1::2]
    half = plgpu.ShapeDtypeStruct((rank, size // 2), x_RN.dtype, layout=ranks_of_warps(rank))

    @plgpu.inline_mgpu(arg_types=(layout_of_pairs(rank, rotation),), return_type=(half, half))
    def split(_, x):
        from jax.experimental.mosaic.gpu import utils

        one = lambda i: np.vectorize(lambda x: utils.vector_slice(x, slice(i, i + 1)), otypes=[object])  # noqa: E731
        return tuple(fragments(one(i)(x.registers), ranks_of_warps(rank), x) for i in range(2))

    return split(x_RN)


def join_pairs(u_RM, w_RM, rotation: str, interpret: bool):
    """Undoes `split_pairs`."""
    rank, size = u_RM.shape
    if interpret:
        axis = 2 if rotation == "adjacent" else 1
        return jnp.stack([u_RM, w_RM], axis=axis).reshape(rank, 2 * size)
    half, whole = ranks_of_warps(rank), layout_of_pairs(rank, rotation)

    @plgpu.inline_mgpu(
        arg_types=(half, half), return_type=plgpu.ShapeDtypeStruct((rank, 2 * size), u_RM.dtype, layout=whole)
    )
    def join(_, u, w):
        from jax.experimental.mosaic.gpu import utils

        if rotation == "half":
            return fragments(np.concatenate([u.registers, w.registers], axis=1), whole, u)
        both = np.vectorize(lambda *pair: utils.vector_concat(pair), otypes=[object])
        return fragments(both(u.registers, w.registers), whole, u)

    return join(u_RM, w_RM)


def within_a_turn(angle):
    """Return the angle modulo 2 pi, in [0, 2 pi)."""
    for _ in range(2):  # a tiny negative angle rounds up to a whole turn, which is zero
        turns = angle * (1 / (2 * jnp.pi))
        whole = turns.astype(jnp.int32).astype(jnp.float32)  # this rounds towards zero: Mosaic has no floor
        angle = angle - 2 * jnp.pi * jnp.where(whole > turns, whole - 1, whole)
    return angle


def sine_and_cosine(angle):
    """Return sine and cosine of angles in [0, 2 pi), to 1e-7.

    The hardware's sine is off by 5e-7, which sums of products that cancel show.
    """
    quarter = (angle * (2 / jnp.pi) + 0.5).astype(jnp.int32)
    x = angle
    for part in (1.5703125, 4.837512969970703125e-4, 7.54978995489188216e-8):  # pi / 2; the first two times 4 are exact
        x -= quarter.astype(jnp.float32) * part
    # These are Cephes' sinf and cosf, from -pi / 4 to pi / 4.
    z = x * x
    sin = x + x * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cos = 1 - 0.5 * z + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2)
    odd = (quarter & 1) == 1
    sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, sin, cos)
    return jnp.where((quarter & 2) == 0, sin, -sin), jnp.where(((quarter + 1) & 2) == 0, cos, -cos)
