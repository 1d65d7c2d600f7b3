"""One token of the op in a Pallas kernel, for NVIDIA GPUs: Mosaic GPU on Hopper, Triton elsewhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mamba3_jax.ops.output import finish
from mamba3_jax.ops.recurrent import per_head, ranked, recurrent, within_a_turn
from mamba3_jax.ops.rotary import rotate
from mamba3_jax.ops.triton import check
from mamba3_jax.ops.types import Heads, State, Tokens


def decode(tokens: Tokens, heads: Heads, state: State, *, rotation: str, interpret: bool = False, tile=None):
    """`recurrent` for one token, the state's ssm in place where it is donated.

    On Hopper one kernel, `pallas_kernels.ssm.mosaic_gpu.decode`, with all of the state in place: see `mosaic_gpu`. By
    Triton one rank is one kernel too, `triton.decode_fused`; with more, bias, rotation and coefficients are plain XLA,
    and what reads or writes the state is `triton.decode`. The backward pass is that of `recurrent`, on the inputs.

    Args:
        interpret: run the kernel's program on any backend, slowly, for tests.
        tile: a `Tile` of one of them, and with it the kernel; None: the fastest of Triton's. Performance only.

    Raises:
        ValueError: more than one token, or what `triton` raises for.
    """
    check(tokens, interpret)
    if tokens.log_a_BLH.shape[1] != 1:
        raise ValueError(f"decode is one token, not length={tokens.log_a_BLH.shape[1]}")
    return _decode(tokens, heads, state, rotation, interpret, tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _decode(tokens: Tokens, heads: Heads, state: State, rotation: str, interpret: bool, tile):
    return _step(tokens, heads, state, rotation, interpret, tile)


def _decode_fwd(tokens, heads, state, rotation, interpret, tile):
    return _step(tokens, heads, state, rotation, interpret, tile), (tokens, heads, state)


def _decode_bwd(rotation, interpret, tile, inputs, cotangents):
    _, pull = jax.vjp(functools.partial(recurrent, rotation=rotation), *inputs)
    return pull(cotangents)


_decode.defvjp(_decode_fwd, _decode_bwd)


def _step(tokens: Tokens, heads: Heads, state: State, rotation: str, interpret: bool, tile):
    # Here, since everything else works without the kernel.
    from pallas_kernels.ssm.mosaic_gpu import decode as mosaic_decode
    from pallas_kernels.ssm.triton import decode as kernel
    from pallas_kernels.ssm.triton import decode_fused

    token = jax.tree.map(lambda array: jnp.squeeze(array, 1), tokens)
    tile = tile or default_tile(token.q_BLRGN.shape[1])
    whole = None
    if isinstance(tile, decode_fused.Tile):
        tile, whole = dataclasses.replace(tile, interpret=interpret), decode_fused
    elif isinstance(tile, mosaic_decode.Tile):
        whole = mosaic_decode
    if whole is not None:
        o_BHP, state = in_one_kernel(token, heads, state, rotation, tile, whole)
        return o_BHP[:, None], state
    n_heads, width, d_state = state.ssm_BHPN.shape[1:]
    spare_P, spare_N = _tile_size(width) - width, _tile_size(d_state) - d_state
    angle_BHS, q_BHRN, k_BHRN = _turned(token, heads, state, rotation)
    a_BH, beta_BH, gamma_BH = _coefficients(token)

    tile = kernel.Tile(**{**tile.__dict__, "width": width, "interpret": interpret})
    tile = kernel.fitting(tile, width + spare_P, d_state + spare_N, n_heads, norm=heads.norm_HP is not None)
    wide = functools.partial(_padded_last, spare=spare_P)
    long = functools.partial(_padded_last, spare=spare_N)
    inputs = kernel.Inputs(
        jnp.pad(state.ssm_BHPN, [(0, 0), (0, 0), (0, spare_P), (0, spare_N)]),
        *(long(state.k_BRHN), wide(state.v_BHP)),
        *(long(q_BHRN), long(k_BHRN), wide(token.v_BLHP)),
        *(a_BH, beta_BH, gamma_BH),
        None if token.start_BL is None else token.start_BL.astype(jnp.int32),
        *(wide(token.gate_BLHP), heads.skip_H),
        *(wide(x) for x in (heads.v_rank_HRP, heads.gate_rank_HRP, heads.out_rank_HRP, heads.norm_HP)),
    )
    out = kernel.decode(inputs, tile)
    o_BHP = out.o_BHP
    if o_BHP is None:
        x_BHRP = ranked(token.v_BLHP.astype(jnp.float32), heads)
        o_BHP = finish(out.y_BHRP[..., :width], x_BHRP, token.gate_BLHP, heads)
    y_BLHP = o_BHP[:, None, :, :width].astype(tokens.v_BLHP.dtype)
    h_BHPN = out.h_BHPN[:, :, :width, :d_state]
    if token.beta_BLH is None:
        return y_BLHP, State(angle_BHS, h_BHPN)
    last_k_BRHN = jnp.swapaxes(k_BHRN, 1, 2).astype(tokens.k_BLRGN.dtype)
    return y_BLHP, State(angle_BHS, h_BHPN, last_k_BRHN, token.v_BLHP)


def in_one_kernel(token: Tokens, heads: Heads, state: State, rotation: str, tile, kernel):
    """o_BHP and the state, by the `decode` of a module that does it all; of `token`, without the axis L."""
    from pallas_kernels.ssm.one_token import Inputs

    dt_BH = None if token.angle_BLHS is None else token.dt_BLH
    inputs = Inputs(
        *(state.ssm_BHPN, state.angle_BHS, state.k_BRHN, state.v_BHP),
        *(token.q_BLRGN, token.k_BLRGN, token.v_BLHP),
        *(token.log_a_BLH, token.gamma_BLH, token.beta_BLH, dt_BH, token.angle_BLHS),
        None if token.start_BL is None else token.start_BL.astype(jnp.int32),
        *(heads.q_bias_HRN, heads.k_bias_HRN, token.gate_BLHP, heads.skip_H),
        *(heads.v_rank_HRP, heads.gate_rank_HRP, heads.out_rank_HRP, heads.norm_HP),
    )
    out = kernel.decode(inputs, rotation, tile)
    return out.o_BHP, State(out.angle_BHS, out.h_BHPN, out.k_BRHN, out.v_BHP)


def default_tile(rank: int):
    """The fastest measured, on an H100 (R 1) and an H200 (R 4); from R 8 on, what fits in registers."""
    from pallas_kernels.ssm.triton import decode as kernel
    from pallas_kernels.ssm.triton import decode_fused

    if rank == 1:
        return decode_fused.Tile()

    if rank >= 8:
        return kernel.Tile(columns=128, update="dot", readout="dot")
    return kernel.Tile(columns=32, rows=32, warps=2)


def _turned(token: Tokens, heads: Heads, state: State, rotation: str):
    """The token's angle, and its queries and keys, biased and rotated, float32."""
    n_heads = token.log_a_BLH.shape[-1]
    angle_BHS = None
    if token.angle_BLHS is not None:
        before_BHS = state.angle_BHS.astype(jnp.float32)
        if token.start_BL is not None:
            before_BHS = jnp.where(token.start_BL[:, None, None], 0, before_BHS)
        angle_BHS = within_a_turn(before_BHS + token.angle_BLHS.astype(jnp.float32) * token.dt_BLH[..., None])

    def turned(x_BRGN, bias_HRN):
        x_BHRN = per_head(x_BRGN.astype(jnp.float32), n_heads)
        x_BHRN = x_BHRN if bias_HRN is None else x_BHRN + bias_HRN
        return x_BHRN if angle_BHS is None else rotate(x_BHRN, angle_BHS[:, :, None], rotation)

    return angle_BHS, turned(token.q_BLRGN, heads.q_bias_HRN), turned(token.k_BLRGN, heads.k_bias_HRN)


def _coefficients(token: Tokens):
    """a, a beta, gamma: see `recurrent`. A start has no decayed past: both are exactly zero."""
    a_BH = jnp.exp(token.log_a_BLH)
    if token.start_BL is not None:
        a_BH = jnp.where(token.start_BL[:, None], 0, a_BH)
    return a_BH, None if token.beta_BLH is None else a_BH * token.beta_BLH, token.gamma_BLH


def _padded_last(array, spare: int):
    if array is None or not spare:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, spare)])


def _tile_size(size: int) -> int:
    """The smallest power of two from 16 that is not below."""
    return max(16, 1 << (size - 1).bit_length())
