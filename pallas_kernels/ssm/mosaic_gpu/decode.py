"""One token of the op in a Pallas Mosaic GPU kernel: the state is read once and written once, in place.

    h' = a h + sum_s w_s X_s k_s^T,   y_r = h' q_r
    o = sum_r out_rank_r (y_r + D X_r) silu(gate gate_rank_r)

s runs over the R ranks of the token before (w = beta = (1 - trap) dt a), then over those of this one (w = gamma =
trap dt); X_s = v_rank v. Keys and queries come biased and rotated.

A program has one head of one row. The copy engine brings the state into shared memory, so that what is on its way holds
no registers, and several programs share a multiprocessor: one computes while others wait. The state's bytes are the
floor. Right in the interpreter and compiled without spills; it has not run on a GPU yet, so nothing chooses it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.mosaic_gpu.registers import COLUMN, ROW, TILE
from pallas_kernels.ssm.mosaic_gpu.tiles import across, down, load, tiled

WIDTH = 64  # P


@dataclass(frozen=True)
class Tile:
    """How the kernel runs."""

    interpret: object = None  # plgpu's InterpretParams: on the CPU, for tests


class Inputs(NamedTuple):
    """None: absent."""

    h_BHPN: jax.Array  # float32, the state before the token
    before_k_BRHN: jax.Array  # of the token before
    before_v_BHP: jax.Array
    q_BHRN: jax.Array  # float32
    k_BHRN: jax.Array  # float32
    v_BHP: jax.Array
    a_BH: jax.Array  # these three float32
    beta_BH: jax.Array
    gamma_BH: jax.Array
    start_B: jax.Array | None  # int32; what is not 0 forgets everything before
    gate_BHP: jax.Array | None
    skip_H: jax.Array | None  # these four float32
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None


class Outputs(NamedTuple):
    h_BHPN: jax.Array  # in the buffer of the one before, where that is donated
    o_BHP: jax.Array  # like v


class Shared(NamedTuple):
    """Shared memory."""

    h_PN: jax.Array
    before_k_RN: jax.Array
    before_v_P: jax.Array
    q_RN: jax.Array
    k_RN: jax.Array
    v_P: jax.Array
    gate_P: jax.Array | None
    v_rank_RP: jax.Array | None
    gate_rank_RP: jax.Array | None
    out_rank_RP: jax.Array | None
    o_P: jax.Array


def check(inputs: Inputs) -> None:
    """Raise ValueError, naming it, for a size that the kernel cannot run."""
    width, d_state = inputs.h_BHPN.shape[2:]
    if width != WIDTH or d_state not in (64, 128):
        raise ValueError(f"{width=} is not {WIDTH}, or {d_state=} not 64 or 128")
    if (inputs.v_rank_HRP is None) != (inputs.out_rank_HRP is None):
        raise ValueError("v_rank and out_rank come together")


def decode(inputs: Inputs, tile: Tile) -> Outputs:
    """The state after the token, and its output.

    Raises:
        ValueError: P not 64, or N not 64 or 128.
    """
    check(inputs)
    batch, n_heads, width, d_state = inputs.h_BHPN.shape
    rank = inputs.q_BHRN.shape[2]
    refs = jax.tree.map(jax.new_ref, inputs)
    o_ref = jax.new_ref(lax.empty((batch, n_heads, width), inputs.v_BHP.dtype))

    def vectors(ref, *shape):
        return None if ref is None else plgpu.SMEM(shape, ref.dtype)

    shared = Shared(
        tiled(width, d_state, dtype=jnp.float32),
        vectors(inputs.before_k_BRHN, rank, d_state),
        vectors(inputs.before_v_BHP, width),
        vectors(inputs.q_BHRN, rank, d_state),
        vectors(inputs.k_BHRN, rank, d_state),
        vectors(inputs.v_BHP, width),
        vectors(inputs.gate_BHP, width),
        vectors(inputs.v_rank_HRP, rank, width),
        vectors(inputs.gate_rank_HRP, rank, width),
        vectors(inputs.out_rank_HRP, rank, width),
        vectors(inputs.v_BHP, width),
    )
    copies = sum(x is not None for x in shared) - 1

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
            lambda *scratch: _kernel(refs, o_ref, *scratch, tile=tile), shared, plgpu.Barrier(num_arrivals=copies)
        )

    return Outputs(refs.h_BHPN[...], o_ref[...])


def _kernel(refs: Inputs, o_ref, shared: Shared, barrier, *, tile: Tile):
    interpret = tile.interpret is not None
    b, h = lax.axis_index("row"), lax.axis_index("head")
    rank, d_state = shared.q_RN.shape
    for ref, to in (
        (refs.h_BHPN.at[b, h], shared.h_PN),
        (refs.before_k_BRHN.at[b, :, h], shared.before_k_RN),
        (refs.before_v_BHP.at[b, h], shared.before_v_P),
        (refs.q_BHRN.at[b, h], shared.q_RN),
        (refs.k_BHRN.at[b, h], shared.k_RN),
        (refs.v_BHP.at[b, h], shared.v_P),
        *[
            (ref.at[*at], to)
            for ref, at, to in (
                (refs.gate_BHP, (b, h), shared.gate_P),
                (refs.v_rank_HRP, (h,), shared.v_rank_RP),
                (refs.gate_rank_HRP, (h,), shared.gate_rank_RP),
                (refs.out_rank_HRP, (h,), shared.out_rank_RP),
            )
            if ref is not None
        ],
    ):
        plgpu.copy_gmem_to_smem(ref, to, barrier)
    a, beta, gamma = refs.a_BH[b, h], refs.beta_BH[b, h], refs.gamma_BH[b, h]
    keep = None if refs.start_B is None else refs.start_B[b] == 0
    kept = lambda x: x if keep is None else jnp.where(keep, x, 0.0)  # noqa: E731
    of_row = lambda ref: load(ref, ROW, interpret).astype(jnp.float32)  # noqa: E731
    of_column = lambda ref: across(load(ref, COLUMN, interpret).astype(jnp.float32), WIDTH)  # noqa: E731
    plgpu.barrier_wait(barrier)

    v_P, before_v_P = of_row(shared.v_P), kept(of_row(shared.before_v_P)) * beta
    ranked = lambda x_P, r: x_P if shared.v_rank_RP is None else x_P * of_row(shared.v_rank_RP.at[r])  # noqa: E731

    # Loops, not one rank after another: all vectors at once would fill the registers, and fewer programs fit.
    def update(r, h_PN):
        h_PN += down(ranked(before_v_P, r), d_state) * kept(of_column(shared.before_k_RN.at[r]))
        return h_PN + down(ranked(gamma * v_P, r), d_state) * of_column(shared.k_RN.at[r])

    h_PN = lax.fori_loop(0, rank, update, kept(load(shared.h_PN, TILE, interpret)) * a)
    shared.h_PN[...] = h_PN
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.h_PN, refs.h_BHPN.at[b, h])
    gate_P = None if shared.gate_P is None else of_row(shared.gate_P)

    def output(r, o_P):
        y_P = jnp.sum(h_PN * of_column(shared.q_RN.at[r]), axis=1)
        if refs.skip_H is not None:
            y_P += refs.skip_H[h] * ranked(v_P, r)
        if gate_P is not None:
            act_P = gate_P if shared.gate_rank_RP is None else gate_P * of_row(shared.gate_rank_RP.at[r])
            y_P *= act_P / (1 + jnp.exp(-act_P))
        return o_P + (y_P if shared.out_rank_RP is None else y_P * of_row(shared.out_rank_RP.at[r]))

    zeros_P = jnp.zeros((WIDTH,), jnp.float32)
    o_P = lax.fori_loop(0, rank, output, zeros_P if interpret else plgpu.layout_cast(zeros_P, ROW))
    shared.o_P[...] = o_P.astype(o_ref.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.o_P, o_ref.at[b, h])
    plgpu.wait_smem_to_gmem(0)
