"""One token of the op in one Pallas Mosaic GPU kernel, bias and turn included: the state is read and written once.

    h' = a h + sum_s w_s X_s k_s^T,   y_r = h' q_r
    o = sum_r out_rank_r norm(y_r + D X_r) silu(gate gate_rank_r)

s runs over the R ranks of the token before (w = a beta), then over those of this one (w = gamma); X_s = v_rank v. This
token's queries and keys are biased here, and turned by the angle phi' = phi + dt turn (mod 2 pi); the key of the token
before comes as it was left. What is None is left out.

A program has one head of one row. The copy engine brings the state into shared memory, so that what is on its way holds
no registers, and several programs share a multiprocessor: one computes while others wait. The state's bytes are the
floor. While they come, everything else is computed, every number by one thread, a rank a warp: the keys and values that
go into the state, the queries, and what the output is made of beside them.

Letters: B batch, R rank, J = 2 R, the two tokens' ranks, G groups of q/k, H heads, N state per head, M = N / 2, P head
width, S planes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.mosaic_gpu.contract import WIDTH
from pallas_kernels.ssm.mosaic_gpu.decode_kernel import Program, Shared
from pallas_kernels.ssm.mosaic_gpu.tiles import tiled
from pallas_kernels.ssm.one_token import Inputs, Outputs

RANKS = (1, 2, 4)


@dataclass(frozen=True)
class Tile:
    """How the kernel runs."""

    interpret: object = None  # plgpu's InterpretParams: on the CPU, for tests


def check(inputs: Inputs) -> None:
    """Raise ValueError, naming it, for a size that the kernel cannot run."""
    width, d_state = inputs.h_BHPN.shape[2:]
    rank = inputs.q_BRGN.shape[1]
    if width != WIDTH or d_state not in (64, 128):
        raise ValueError(f"{width=} is not {WIDTH}, or {d_state=} not 64 or 128")
    if rank not in RANKS:
        raise ValueError(f"{rank=} is not in {RANKS}")


def decode(inputs: Inputs, rotation: str, tile: Tile) -> Outputs:
    """The state after the token, and its output.

    Args:
        rotation: "adjacent", plane i is (2 i, 2 i + 1), or "half", (i, i + M).

    Raises:
        ValueError: P not 64, N not 64 or 128, or R not 1, 2 or 4.
    """
    check(inputs)
    batch, n_heads, width, d_state = inputs.h_BHPN.shape
    rank = inputs.q_BRGN.shape[1]
    refs = jax.tree.map(jax.new_ref, inputs)

    def new(ref, like):
        """In the place of `ref`, or elsewhere if it has another dtype."""
        return ref if ref is None or ref.dtype == like.dtype else jax.new_ref(lax.empty(ref.shape, like.dtype))

    out = Outputs(
        *(refs.h_BHPN, refs.angle_BHS, new(refs.before_k_BRHN, inputs.k_BRGN), new(refs.before_v_BHP, inputs.v_BHP)),
        jax.new_ref(lax.empty(inputs.v_BHP.shape, inputs.v_BHP.dtype)),
    )

    def vectors(*shape, present=True):
        return plgpu.SMEM(shape, jnp.float32) if present else None

    sources, turns = rank if inputs.beta_BH is None else 2 * rank, inputs.angle_BHS is not None
    shared = Shared(
        tiled(width, d_state, dtype=jnp.float32),
        *(vectors(d_state // 2, present=turns) for _ in range(2)),
        *(vectors(sources, d_state), vectors(sources, width), vectors(rank, d_state), vectors(rank, width)),
        vectors(rank, width, present=inputs.skip_H is not None),
        vectors(
            rank, width, present=any(x is not None for x in (inputs.gate_BHP, inputs.out_rank_HRP, inputs.norm_HP))
        ),
    )

    @pl.core_map(
        plgpu.Mesh(grid=(batch, n_heads), grid_names=("row", "head")),  # heads run fastest, as they lie in memory
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        name="mamba3_mosaic_decode",
        **({} if tile.interpret is None else {"interpret": tile.interpret}),
    )
    def _():
        pl.run_scoped(
            lambda *scratch: Program(refs, out, *scratch, rotation, tile.interpret is not None).run(),
            shared,
            plgpu.Barrier(num_arrivals=1),
        )

    return jax.tree.map(lambda ref: ref[...], out)
