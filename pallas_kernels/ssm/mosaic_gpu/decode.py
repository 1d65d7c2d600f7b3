"""One token of the op in one Pallas Mosaic GPU kernel, bias and rotation included: the state is read and written once.

    h' = a h + sum_s w_s X_s k_s^T,   y_r = h' q_r
    o = sum_r out_rank_r norm(y_r + D X_r) silu(gate gate_rank_r)

s runs over the R ranks of the token before (w = a beta), then over those of this one (w = gamma); X_s = v_rank v. This
token's queries and keys are biased here, and rotated by phi' = phi + dt angle (mod 2 pi); the key of the token before
comes as it was left. What is None is left out.

A program has one head of one row. The copy engine brings the state into shared memory, so that what is on its way holds
no registers, and several programs share a multiprocessor: one computes while others wait. The state's bytes are the
floor. While they come, everything else is computed, every number by one thread, a rank a warp: the keys and values that
go into the state, the queries, and what the output is made of beside them.

Letters: B batch, R rank, J = 2 R, the two tokens' ranks, G groups of q/k, H heads, N state per head, M = N / 2, P head
width, S rotary pairs.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssm.contract import (
    Stepped,
    Token,
    cut,
    ordered,
    pad,
    require,
    stepped_like,
    wants_float32_or_bfloat16,
)
from pallas_kernels.ssm.mosaic_gpu.decode_kernel import StepProgram, StepShared
from pallas_kernels.ssm.mosaic_gpu.tiles import WIDTH, interpreter, tiled
from pallas_kernels.ssm.order import Order

RANKS = (1, 2, 4)


def step(token: Token, rotation: str, *, interpret=None, programs: int | None = None) -> Stepped:
    """Compute a decoding step, see `contract`; in place where P is 64 and N 64 or 128, which others are padded to.

    Args:
        rotation: "adjacent", pair i is (2 i, 2 i + 1), or "half", (i, i + M).
        programs: ignored: it is a scan's.

    Raises:
        ValueError: dtypes that are not float32 or bfloat16, P over 64, N over 128, or R not 1, 2 or 4.
    """
    del programs
    width, d_state = token.last.h_BHPN.shape[2:]
    rank = token.q_BRGN.shape[1]
    require("mosaic_gpu", wants_float32_or_bfloat16(token))
    if width > WIDTH or d_state > 128 or rank not in RANKS:
        raise ValueError(
            f"implementation='mosaic_gpu' decodes {width=} up to {WIDTH}, {d_state=} to 128, {rank=} of {RANKS}"
        )
    pairs = 0 if token.angle_BHS is None else token.angle_BHS.shape[-1]
    size = 64 if d_state <= 64 else 128
    order = Order(rotation, d_state, pairs, size=size, halves=rotation == "half")
    token = ordered(pad(token, P=WIDTH), order.to)
    stepped = _decode(
        token, rotation=rotation, width=width, d_state=d_state, interpret=interpreter() if interpret else None
    )
    return cut(ordered(stepped, order.back), P=width)


def _decode(token: Token, *, rotation: str, width: int, d_state: int, interpret) -> Stepped:
    """Run the kernel; `width` and `d_state` are P and N without their padding."""
    batch, n_heads, _, padded = token.last.h_BHPN.shape
    rank = token.q_BRGN.shape[1]
    refs, like = jax.tree.map(jax.new_ref, token), stepped_like(token)
    new = lambda like: jax.new_ref(lax.empty(like.shape, like.dtype))  # noqa: E731
    # The ref to overwrite, or a new one if that has another dtype.
    last = jax.tree.map(lambda ref, like: ref if ref.dtype == like.dtype else new(like), refs.last, like.last)
    out = Stepped(last=last, o_BHP=new(like.o_BHP))

    def vectors(*shape, present=True):
        return plgpu.SMEM(shape, jnp.float32) if present else None

    sources = rank if token.beta_BH is None else 2 * rank
    rotates, weights = token.last.angle_BHS is not None, token.weights
    scaled = any(x is not None for x in (token.gate_BHP, weights.out_rank_HRP, weights.norm_HP))
    shared = StepShared(
        h_PN=tiled(WIDTH, padded, dtype=jnp.float32),
        sin_M=vectors(padded // 2, present=rotates),
        cos_M=vectors(padded // 2, present=rotates),
        k_JN=vectors(sources, padded),
        x_JP=vectors(sources, WIDTH),
        q_RN=vectors(rank, padded),
        y_RP=vectors(rank, WIDTH),
        skip_RP=vectors(rank, WIDTH, present=weights.skip_H is not None),
        scale_RP=vectors(rank, WIDTH, present=scaled),
    )

    @pl.core_map(
        plgpu.Mesh(grid=(batch, n_heads), grid_names=("row", "head")),  # heads run fastest, as they lie in memory
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        name="mamba3_mosaic_decode",
        **({} if interpret is None else {"interpret": interpret}),
    )
    def _():
        pl.run_scoped(
            lambda shared, arrived: StepProgram(
                refs,
                out,
                shared,
                arrived,
                rotation=rotation,
                width=width,
                true_d_state=d_state,
                interpret=interpret is not None,
            ).run(),
            shared,
            plgpu.Barrier(num_arrivals=1),
        )

    return jax.tree.map(lambda ref: ref[...], out)
