"""The front door of the state space op: checks, the table of implementations, and `ssm` itself."""

import jax
import jax.numpy as jnp

from mamba3_jax.ops import choices
from mamba3_jax.ops.associative import associative
from mamba3_jax.ops.chunked import chunked
from mamba3_jax.ops.mosaic_gpu import mosaic_gpu
from mamba3_jax.ops.mosaic_gpu import refuses as mosaic_gpu_refuses
from mamba3_jax.ops.recurrent import recurrent
from mamba3_jax.ops.rotary import ROTATIONS
from mamba3_jax.ops.sharded import one_device
from mamba3_jax.ops.tpu import mosaic_tpu
from mamba3_jax.ops.tpu import refuses as mosaic_tpu_refuses
from mamba3_jax.ops.triton import refuses as triton_refuses
from mamba3_jax.ops.triton import triton
from mamba3_jax.ops.types import Heads, State, Tokens, accumulator, empty_state

__all__ = ["IMPLEMENTATIONS", "Heads", "State", "Tokens", "empty_state", "ssm"]

# All take None for `empty_state`, which most of them make; the TPU's scan has no operand then, and no gradient of it.
IMPLEMENTATIONS = {
    "recurrent": recurrent,
    "associative": associative,
    "chunked": chunked,
    "triton": triton,
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
}
# Those of kernels, the first that runs the default where nothing was measured: what keeps inputs from each on this
# process's devices.
KERNELS = {"mosaic_gpu": mosaic_gpu_refuses, "triton": triton_refuses, "mosaic_tpu": mosaic_tpu_refuses}


def ssm(
    tokens: Tokens,
    heads: Heads,
    state: State | None = None,
    *,
    rotation: str = "adjacent",
    implementation: str | None = None,
    chunk: int | None = None,
):
    """Mamba-3 between its two projections: bias, rotation, trapezoidal recurrence, skip, norm, gate (SPEC 4 to 7).

        h_t = a_t h_{t-1} + (1-lambda_t) dt_t a_t X_{t-1} k_{t-1}^T + lambda_t dt_t X_t k_t^T,   y_t = h_t q_t

    Running a sequence in two pieces with the state carried gives what running it whole gives; so training, prefill,
    chunked prefill and decoding are this one function. Differentiable in everything, both states included.

    Args:
        tokens: one entry a token, see `Tokens`. `start` isolates documents exactly: no finite value and no gradient
            crosses. A token that is not finite reaches the later ones of its document, and never another row. In
            `recurrent` that is all; in `chunked` it may also make all of its chunk NaN, earlier tokens and other
            documents included, and what follows the chunk up to the next `start`; in `associative` all from its
            chunk on. Of kernels only the other rows are sure. Gradients may be NaN in all of the row.
        heads: learned, one entry a head, see `Heads`. With more than one rank, v_rank and out_rank are needed.
        state: what the tokens before left, or None for none. It reaches up to the first `start` of its row.
        rotation: "adjacent" (SISO weights) or "half" (MIMO weights).
        implementation: a name in `IMPLEMENTATIONS`, or None for the fastest that supports the inputs here.
        chunk: tokens a chunk; performance only, results do not depend on it. None chooses.

    Returns:
        y_BLHP in v's dtype, and the `State` after the last token.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown rotation or implementation.
    """
    check(tokens, heads, state, rotation, chunk)
    if implementation is None:
        implementation = default_implementation(tokens)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is not one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](tokens, heads, state, rotation=rotation, chunk=chunk)


def default_implementation(tokens: Tokens) -> str:
    """What was measured to be the fastest on this device (`choices`), or else kernels for it; or else plain XLA.

    In plain XLA one token is a step, and anything longer is worth chunks. XLA cannot divide a kernel over devices as it
    divides plain code: that takes `ops.sharded`.

    Raises:
        ValueError: the table of choices names an implementation that is not one.
    """
    plain = "recurrent" if tokens.dt_BLH.shape[1] == 1 else "chunked"
    if not one_device():
        return plain
    entry = choices.choose(jax.devices()[0].device_kind, tokens)
    if entry is not None and entry.implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{choices.PATH} has {entry}, whose implementation is not one of {sorted(IMPLEMENTATIONS)}")
    wanted = [*([entry.implementation] if entry else []), *KERNELS]
    return next((name for name in wanted if name not in KERNELS or KERNELS[name](tokens) is None), plain)


def check(tokens: Tokens, heads: Heads, state: State | None, rotation: str, chunk: int | None) -> None:
    """Raise ValueError, naming the array, its shape and the wish, for anything the op cannot mean."""
    if tokens.q_BLRGN.ndim != 5:
        raise ValueError(f"q has shape {tokens.q_BLRGN.shape}, wanted five axes (B, L, R, G, N)")
    batch, length, rank, groups, d_state = tokens.q_BLRGN.shape
    if tokens.v_BLHP.ndim != 4:
        raise ValueError(f"v has shape {tokens.v_BLHP.shape}, wanted four axes (B, L, H, P)")
    n_heads, width = tokens.v_BLHP.shape[2:]
    planes = tokens.angle_BLHS.shape[-1]
    angle_heads = 1 if tokens.angle_BLHS.ndim == 4 and tokens.angle_BLHS.shape[2] == 1 else n_heads
    if rotation not in ROTATIONS:
        raise ValueError(f"{rotation=} is not one of {ROTATIONS}")
    if length < 1 or batch < 1:
        raise ValueError(f"q has shape {tokens.q_BLRGN.shape}: needs at least one row and one token")
    if n_heads % groups:
        raise ValueError(f"{n_heads=} is not a multiple of {groups=}")
    if d_state % 2 or 2 * planes > d_state:
        raise ValueError(f"{planes=} planes do not fit in {d_state=} (even, at least twice the planes)")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{chunk=} is not a positive number of tokens")
    if rank > 1 and (heads.v_rank_HRP is None or heads.out_rank_HRP is None):
        raise ValueError(f"{rank=} needs v_rank and out_rank")

    shapes = {
        "k": (tokens.k_BLRGN, (batch, length, rank, groups, d_state)),
        "v": (tokens.v_BLHP, (batch, length, n_heads, width)),
        "dt": (tokens.dt_BLH, (batch, length, n_heads)),
        "log_a": (tokens.log_a_BLH, (batch, length, n_heads)),
        "trap": (tokens.trap_BLH, (batch, length, n_heads)),
        "angle": (tokens.angle_BLHS, (batch, length, angle_heads, planes)),
        "gate": (tokens.gate_BLHP, (batch, length, n_heads, width)),
        "start": (tokens.start_BL, (batch, length)),
        "q_bias": (heads.q_bias_HRN, (n_heads, rank, d_state)),
        "k_bias": (heads.k_bias_HRN, (n_heads, rank, d_state)),
        "skip": (heads.skip_H, (n_heads,)),
        "v_rank": (heads.v_rank_HRP, (n_heads, rank, width)),
        "gate_rank": (heads.gate_rank_HRP, (n_heads, rank, width)),
        "out_rank": (heads.out_rank_HRP, (n_heads, rank, width)),
        "norm": (heads.norm_HP, (n_heads, width)),
    }
    if state is not None:
        shapes |= {
            "state.angle": (state.angle_BHS, (batch, n_heads, planes)),
            "state.ssm": (state.ssm_BHPN, (batch, n_heads, width, d_state)),
            "state.k": (state.k_BRHN, (batch, rank, n_heads, d_state)),
            "state.v": (state.v_BHP, (batch, n_heads, width)),
        }
    for name, (array, wanted) in shapes.items():
        if array is not None and array.shape != wanted:
            raise ValueError(f"{name} has shape {array.shape}, wanted {wanted}")

    dtype = accumulator(tokens)
    exact = {"dt": tokens.dt_BLH, "log_a": tokens.log_a_BLH, "trap": tokens.trap_BLH, "angle": tokens.angle_BLHS}
    if state is not None:
        exact |= {"state.angle": state.angle_BHS, "state.ssm": state.ssm_BHPN}
    for name, array in exact.items():
        if array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype}, wanted {dtype}")
    if tokens.start_BL is not None and tokens.start_BL.dtype != jnp.bool_:
        raise ValueError(f"start is {tokens.start_BL.dtype}, wanted bool")
    for name, array in {"q": tokens.q_BLRGN, "k": tokens.k_BLRGN, "v": tokens.v_BLHP}.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}, wanted a floating point dtype")
