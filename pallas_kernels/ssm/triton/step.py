"""The decoding step by Triton: one kernel for one rank, `decode_fused`; for more, bias and rotation in XLA.

One kernel for more ranks is bound by registers (NOTES.md), so what reads and writes the state is `decode` there.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.ssm.contract import Last, Stepped, Token, cut, pad, require
from pallas_kernels.ssm.order import Order
from pallas_kernels.ssm.triton import decode, decode_fused
from pallas_kernels.ssm.triton.config import known, tile_size


def step(token: Token, rotation: str, *, interpret=None, tile=None, **config) -> Stepped:
    """Computes a decoding step, see `contract`.

    Args:
        tile: a `Tile` of one of the two kernels, and with it the kernel; None: the fastest measured.
        config: fields of it.

    Raises:
        ValueError: float64, a rank that is not a power of two up to 16, or a `tile` that does not fit.
    """
    rank = token.q_BRGN.shape[1]
    if token.log_a_BH.dtype != jnp.float32:
        require("triton", f"computes in float32, log_a is {token.log_a_BH.dtype}")
    if rank & (rank - 1) or rank > 16:
        require("triton", f"wants a rank that is a power of two up to 16, not {rank=}")
    tile = tile or default_tile(rank)
    tile = dataclasses.replace(tile, **known(config, tile), interpret=bool(interpret))
    if isinstance(tile, decode_fused.Tile):
        return decode_fused.decode(token, rotation, tile)
    return _after_rotation(token, rotation, tile)


def default_tile(rank: int):
    """Returns the fastest measured, on an H100 (R 1) and an H200 (R 4); from R 8 on, what fits in registers."""
    if rank == 1:
        return decode_fused.Tile()
    if rank >= 8:
        return decode.Tile(columns=128, update="dot", readout="dot")
    return decode.Tile(columns=32, rows=32, warps=2)


def _after_rotation(token: Token, rotation: str, tile: decode.Tile) -> Stepped:
    """Biases and rotates in plain XLA, then calls `decode`."""
    n_heads, width, d_state = token.last.h_BHPN.shape[1:]
    angle_BHS, q_BHRN, k_BHRN = _rotated(token, rotation)
    a_BH = jnp.exp(token.log_a_BH)
    if token.start_B is not None:
        a_BH = jnp.where(token.start_B[:, None] != 0, 0, a_BH)  # a start has no decayed past: exactly zero
    inputs = decode.Inputs(
        h_BHPN=token.last.h_BHPN,
        last_k_BRHN=token.last.k_BRHN,
        last_v_BHP=token.last.v_BHP,
        q_BHRN=q_BHRN,
        k_BHRN=k_BHRN,
        v_BHP=token.v_BHP,
        a_BH=a_BH,
        beta_BH=None if token.beta_BH is None else a_BH * token.beta_BH,
        gamma_BH=token.gamma_BH,
        start_B=token.start_B,
        gate_BHP=token.gate_BHP,
        weights=token.weights._replace(q_bias_HRN=None, k_bias_HRN=None),
    )
    inputs = pad(inputs, P=tile_size(width), N=tile_size(d_state))
    norm = token.weights.norm_HP is not None
    tile = decode.fitting(tile, tile_size(width), tile_size(d_state), n_heads, width=width, norm=norm)
    out = cut(decode.decode(inputs, tile), P=width, N=d_state)
    last_k_BRHN = last_v_BHP = None
    if token.beta_BH is not None:
        last_k_BRHN, last_v_BHP = jnp.swapaxes(k_BHRN, 1, 2).astype(token.k_BRGN.dtype), token.v_BHP
    return Stepped(last=Last(out.h_BHPN, angle_BHS, last_k_BRHN, last_v_BHP), o_BHP=out.o_BHP)


def _rotated(token: Token, rotation: str):
    """Returns the token's angle, and its queries and keys, biased and rotated, float32."""
    n_heads, d_state = token.last.h_BHPN.shape[1], token.last.h_BHPN.shape[-1]
    angle_BHS = None
    if token.angle_BHS is not None:
        angle_BHS = token.last.angle_BHS
        if token.start_B is not None:
            angle_BHS = jnp.where(token.start_B[:, None, None] != 0, 0, angle_BHS)
        angle_BHS = angle_BHS + token.angle_BHS * token.dt_BH[..., None]
        for _ in range(2):  # a tiny negative angle rounds up to a whole turn, which is zero
            angle_BHS = angle_BHS - 2 * jnp.pi * jnp.floor(angle_BHS / (2 * jnp.pi))
        both = jnp.sin(angle_BHS)[:, :, None], jnp.cos(angle_BHS)[:, :, None]
        sin_BHRS, cos_BHRS = jax.lax.optimization_barrier(both)
        order = Order(rotation, d_state, angle_BHS.shape[-1], size=d_state, halves=False)

    def rotated(x_BRGN, bias_HRN):
        x_BGRN = jnp.swapaxes(x_BRGN.astype(jnp.float32), 1, 2)
        x_BHRN = jnp.repeat(x_BGRN, n_heads // x_BGRN.shape[1], axis=1)
        x_BHRN = x_BHRN if bias_HRN is None else x_BHRN + bias_HRN
        if angle_BHS is None:
            return x_BHRN
        u_BHRS, w_BHRS, rest = order.split(x_BHRN)
        pairs = u_BHRS * cos_BHRS - w_BHRS * sin_BHRS, u_BHRS * sin_BHRS + w_BHRS * cos_BHRS
        return order.joined(*pairs, rest)

    weights = token.weights
    return angle_BHS, rotated(token.q_BRGN, weights.q_bias_HRN), rotated(token.k_BRGN, weights.k_bias_HRN)
