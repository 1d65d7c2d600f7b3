"""The decoding step in one kernel, bias and rotation included; the fastest for one rank, see NOTES.md.

    h' = a h + sum_s w_s X_s k_s^T,   y_r = h' q_r
    o = sum_r out_rank_r norm(y_r + D X_r) silu(gate gate_rank_r)

s runs over the R ranks of the token before (w = a beta), then over those of this one (w = gamma); X_s = v_rank v. This
token's queries and keys are biased here, and rotated by phi' = phi + dt angle (mod 2 pi); the key of the token before
is so already. What is None is left out.

A program has one head of one row: 64 x 128 numbers of state are 64 registers of each of 128 threads. The state's bytes
are the floor, so everything else has to hide behind them. Two things do not by themselves: sums over N that cross
threads, R of them for each row of P, and what every thread does again for the keys of its columns. So N is cut in
blocks of few columns, and a thread has the same few columns of every block: little is left to exchange after it has
summed its own. And keys and queries are rotated in tiles of one number a thread, which Triton then hands around.

Letters: B batch, R rank, G groups of q/k, H heads, N state per head, P head width, S rotary pairs; N is A blocks
of C columns.
"""

import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.ssm.contract import NORM_EPS, Stepped, Token, in_place, stepped_like
from pallas_kernels.ssm.triton.common import Grid, call, gather, indices, iota, sigmoid
from pallas_kernels.ssm.triton.config import Launch, tile_size


@dataclass(frozen=True)
class FusedTile:
    """How the kernel is cut. Performance only."""

    columns: int = 32  # of N a block, at most: a power of two
    warps: int = 4
    interpret: bool = False  # on the CPU, for tests


def decode_fused(token: Token, rotation: str, tile: FusedTile) -> Stepped:
    """Compute a step; pair i is (2 i, 2 i + 1) where `rotation` is "adjacent", (i, i + N / 2) where it is "half"."""
    batch, n_heads = token.last.h_BHPN.shape[:2]
    if tile.columns & (tile.columns - 1) or tile.columns < 1:
        raise ValueError(f"{tile.columns=} is not a power of two")
    heads_a_group = n_heads // token.q_BRGN.shape[2]

    def place(b, h):
        return {"B": b, "H": h, "G": lax.div(h, jnp.int32(heads_a_group))}

    out = stepped_like(token)
    return call(
        functools.partial(_kernel, rotation=rotation),
        token,
        out,
        name="mamba3_decode",
        # Rows run fastest: neighbours share a head's weights.
        grid=Grid((batch, n_heads), dict.fromkeys("BHG"), place),
        tile=tile,
        launch=Launch(tile.warps, 1),
        in_place=in_place(token.last, out.last),
    )


def _kernel(refs: Token, out: Stepped, *, rotation: str, tile: FusedTile):
    """Compute one head of one row; a ref has the axes of its name but for B, H and G."""
    width, d_state = refs.last.h_BHPN.shape
    columns = min(tile.columns, tile_size(d_state))
    p_P = iota(tile_size(width))
    n_AC = _iota2(tile_size(d_state) // columns, columns)
    goes_on = None if refs.start_B is None else refs.start_B[...] == 0
    inside_P, inside_AC = _inside(p_P, width), _inside(n_AC, d_state)
    inside_PAC = _both(None if inside_P is None else inside_P[:, None, None], _in_rows(inside_AC))

    at_PAC = p_P[:, None, None], n_AC[None]
    h_PAC = gather(refs.last.h_BHPN, *at_PAC, mask=_both(inside_PAC, goes_on))

    a, gamma = jnp.exp(refs.log_a_BH[...]), refs.gamma_BH[...]
    rotated = _Rotated(refs, n_AC, inside_AC, goes_on=goes_on, rotation=rotation)
    rank = refs.q_BRGN.shape[0]
    v_P = gather(refs.v_BHP, p_P, mask=inside_P)
    last_v_P = None
    if refs.beta_BH is not None:
        last_v_P = a * refs.beta_BH[...] * gather(refs.last.v_BHP, p_P, mask=_both(inside_P, goes_on))
    angle_S, s_S = (None, None) if refs.last.angle_BHS is None else _advanced_angle(refs, goes_on)

    def row(ref, r):
        return None if ref is None else gather(ref, r, p_P, mask=inside_P)

    def load_keys(r):
        last_k_AC = None
        if last_v_P is not None:
            last_k_AC = gather(refs.last.k_BRHN, r, n_AC, mask=_both(inside_AC, goes_on))
        return last_k_AC, rotated.load(refs.k_BRGN, refs.weights.k_bias_HRN, r), row(refs.weights.v_rank_HRP, r)

    def update(r, loaded, h_PAC):  # rank after rank, since a sum over a stacked axis would cross threads
        last_k_AC, k, v_rank_P = loaded
        if last_k_AC is not None:
            h_PAC += _times(last_v_P, v_rank_P)[:, None][:, None] * last_k_AC[None]
        k_AC = rotated(k)
        h_PAC += _times(gamma * v_P, v_rank_P)[:, None][:, None] * k_AC[None]
        if out.last.k_BRHN is not None:
            _barrier(tile)
            _store(out.last.k_BRHN, k_AC, r, n_AC, mask=inside_AC)
        return h_PAC

    h_PAC = _for_ranks(rank, load_keys, update, a * h_PAC)
    _store(out.last.h_BHPN, h_PAC, *at_PAC, mask=inside_PAC)
    if angle_S is not None:
        _store(out.last.angle_BHS, angle_S, s_S, mask=_inside(s_S, refs.last.angle_BHS.shape[0]))
    if out.last.v_BHP is not None:
        _store(out.last.v_BHP, v_P, p_P, mask=inside_P)

    skip = 0.0 if refs.weights.skip_H is None else refs.weights.skip_H[...].astype(jnp.float32)
    gate_P = None if refs.gate_BHP is None else gather(refs.gate_BHP, p_P, mask=inside_P)
    norm_P = None if refs.weights.norm_HP is None else gather(refs.weights.norm_HP, p_P, mask=inside_P)

    def load_queries(r):
        q = rotated.load(refs.q_BRGN, refs.weights.q_bias_HRN, r)
        return q, row(refs.weights.v_rank_HRP, r), row(refs.weights.gate_rank_HRP, r), row(refs.weights.out_rank_HRP, r)

    def readout(r, loaded, o_P):
        """Add rank r to the output: SPEC section 7."""
        q, v_rank_P, gate_rank_P, out_rank_P = loaded
        y_P = jnp.sum(jnp.sum(h_PAC * rotated(q)[None], axis=1), axis=1)
        y_P += skip * _times(v_P, v_rank_P)
        if norm_P is not None:
            y_P *= lax.rsqrt(jnp.sum(y_P * y_P) / width + NORM_EPS) * norm_P
        if gate_P is not None:
            gated_P = _times(gate_P, gate_rank_P)
            y_P *= gated_P * sigmoid(gated_P, out.o_BHP.dtype, tile)
        return o_P + _times(y_P, out_rank_P)

    o_P = _for_ranks(rank, load_queries, readout, jnp.zeros(p_P.shape, jnp.float32))
    _store(out.o_BHP, o_P, p_P, mask=inside_P)


def _for_ranks(rank: int, load, step, carry):
    """Call step(r, load(r), carry) for every r, and load(r + 1) before it."""

    def ahead(r, carry):
        loaded, carry = carry
        return load(r + 1), step(r, loaded, carry)

    loaded, carry = lax.fori_loop(0, rank - 1, ahead, (load(0), carry))
    return step(rank - 1, loaded, carry)


def _barrier(tile: FusedTile):
    """Keep threads from writing over what others have yet to read."""
    if not tile.interpret:
        plt.debug_barrier()


class _Rotated:
    """Queries or keys of this token, biased and rotated: an entry and the other one of its pair, times cos and sin."""

    def __init__(self, refs: Token, n_AC, inside_AC, *, goes_on, rotation: str):
        self.n_AC, self.inside_AC, self.partner_AC = n_AC, inside_AC, None
        if refs.last.angle_BHS is None:
            return
        (pairs,), half = refs.last.angle_BHS.shape, refs.last.h_BHPN.shape[1] // 2
        if rotation == "adjacent":
            pair_AC, is_second_AC, self.partner_AC = n_AC >> 1, n_AC & 1 == 1, n_AC ^ 1
        else:
            is_second_AC = n_AC >= half
            pair_AC = jnp.where(is_second_AC, n_AC - half, n_AC)
            self.partner_AC = jnp.where(is_second_AC, n_AC - half, n_AC + half)
        angle_AC = _advanced(refs, pair_AC, pair_AC < pairs, goes_on)  # what has no pair rotates by 0
        sin_AC, self.cos_AC = jnp.sin(angle_AC), jnp.cos(angle_AC)
        self.sin_AC = jnp.where(is_second_AC, sin_AC, -sin_AC)

    def load(self, x_ref, bias_ref, r):
        """Return an entry and its bias, and those of its partner; None: no bias, and nothing rotates."""

        def biased(at_AC):
            bias_AC = None if bias_ref is None else gather(bias_ref, r, at_AC, mask=self.inside_AC)
            return gather(x_ref, r, at_AC, mask=self.inside_AC), bias_AC

        return biased(self.n_AC), None if self.partner_AC is None else biased(self.partner_AC)

    def __call__(self, loaded):
        entry, partner = loaded
        if partner is None:
            return _plus(*entry)
        return _plus(*entry) * self.cos_AC + _plus(*partner) * self.sin_AC


def _advanced_angle(refs: Token, goes_on):
    s_S = iota(tile_size(refs.last.angle_BHS.shape[0]))
    return _advanced(refs, s_S, _inside(s_S, refs.last.angle_BHS.shape[0]), goes_on), s_S


def _advanced(refs: Token, at, mask, goes_on):
    """Return this token's angle of the pairs `at`, in [0, 2 pi); 0 where `mask` is false."""
    angle = gather(refs.last.angle_BHS, at, mask=_both(mask, goes_on)) + refs.dt_BH[...] * gather(
        refs.angle_BHS, at, mask=mask
    )
    for _ in range(2):  # a tiny negative angle rounds up to 2 pi, which is zero
        angle = angle - 2 * np.pi * jnp.floor(angle * (1 / (2 * np.pi)))
    return angle


def _plus(x, bias):
    return x if bias is None else x + bias


def _times(x_P, rank_P):
    return x_P if rank_P is None else x_P * rank_P


def _iota2(rows: int, columns: int):
    """Return 0, 1, 2, ... row by row."""
    one = functools.partial(lax.broadcasted_iota, jnp.int32, (rows, columns))
    return columns * one(0) + one(1)


def _inside(index, size: int):
    """Says which of these are not padding; None: all."""
    return None if index.size == size else index < size


def _in_rows(mask_AC):
    return None if mask_AC is None else mask_AC[None]


def _both(mask, other):
    """Return where both masks are true; None: everywhere."""
    return other if mask is None else mask if other is None else mask & other


def _store(ref, value, *at, mask=None):
    at = indices(at)
    mask = None if mask is None else jnp.broadcast_to(mask, at[0].shape)
    plt.store(ref.at[at], value.astype(ref.dtype), mask=mask)
