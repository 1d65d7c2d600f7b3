"""The decoding step of more ranks: bias and rotation in XLA, then a kernel that reads and writes the state once.

    h' = a h + sum_s w_s X_s k_s^T,   y_r = h' q_r
    o = sum_r out_rank_r norm(y_r + D X_r) silu(gate gate_rank_r)

s runs over the R ranks of the token before (w = beta, which has the decay a here), then over those of this one
(w = gamma); X_s = v_rank v; k and q are biased and rotated.

The state's bytes are the floor, so everything else has to hide behind them. The sums over N that cross threads, R of
them for each row of P, do not by themselves. So the kernel takes N in blocks of few columns, whose products add up
thread by thread, and threads exchange what is left once a row.

Letters: B batch, R rank, H heads, N state per head, P head width; J = 2 R, the two tokens' ranks; C columns of N at a
time; I ranks and K = J, padded for a tensor core.
"""

import functools
import operator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.ssm.contract import NORM_EPS, Last, Stepped, Token, Weights, cut, pad
from pallas_kernels.ssm.order import Order
from pallas_kernels.ssm.triton.common import NN, NT, Grid, call, gather, iota, product, sigmoid
from pallas_kernels.ssm.triton.config import Launch, tile_size


@dataclass(frozen=True)
class RotatedTile:
    """How the kernel is cut, and what computes its sums. Performance only, but for `width`, the shape's.

    Sums are "fma", element by element, or "dot", on tensor cores by three products of TF32 parts.
    """

    rows: int = 64  # of P a program, at most
    columns: int = 32  # of N at a time, at most
    warps: int = 4
    sums: str = "fma"  # over ranks, into the state, and over N
    width: int | None = None  # entries of P that are not padding; None: all
    interpret: bool = False  # on the CPU, for tests


class RotatedToken(NamedTuple):
    """A `Token` whose queries and keys are biased and rotated, N and P powers of two from 16 on."""

    last: Last  # without the angle
    q_BHRN: jax.Array
    k_BHRN: jax.Array
    v_BHP: jax.Array
    gate_BHP: jax.Array | None
    a_BH: jax.Array  # these three float32
    beta_BH: jax.Array | None  # the decay of this step included
    gamma_BH: jax.Array
    start_B: jax.Array | None  # int32; what is not 0 forgets everything before
    weights: Weights  # without biases


def decode_rotated(token: Token, rotation: str, tile: RotatedTile) -> Stepped:
    """Biases and rotates in plain XLA, then calls the kernel."""
    width, d_state = token.last.h_BHPN.shape[2:]
    angle_BHS, q_BHRN, k_BHRN = _rotated(token, rotation)
    a_BH = jnp.exp(token.log_a_BH)
    if token.start_B is not None:
        a_BH = jnp.where(token.start_B[:, None] != 0, 0, a_BH)  # a start forgets exactly
    rotated = RotatedToken(
        last=token.last._replace(angle_BHS=None),
        q_BHRN=q_BHRN,
        k_BHRN=k_BHRN,
        v_BHP=token.v_BHP,
        gate_BHP=token.gate_BHP,
        a_BH=a_BH,
        beta_BH=None if token.beta_BH is None else a_BH * token.beta_BH,
        gamma_BH=token.gamma_BH,
        start_B=token.start_B,
        weights=token.weights._replace(q_bias_HRN=None, k_bias_HRN=None),
    )
    rotated = pad(rotated, P=tile_size(width), N=tile_size(d_state))
    out = cut(_decode(rotated, _fitting(tile, rotated, width)), P=width, N=d_state)
    last = out.last._replace(angle_BHS=angle_BHS)
    if token.beta_BH is not None:
        last = last._replace(k_BRHN=jnp.swapaxes(k_BHRN, 1, 2).astype(token.k_BRGN.dtype), v_BHP=token.v_BHP)
    return out._replace(last=last)


def _rotated(token: Token, rotation: str):
    """Return the token's angle, and its queries and keys, biased and rotated, float32."""
    n_heads, d_state = token.last.h_BHPN.shape[1], token.last.h_BHPN.shape[-1]
    angle_BHS = None
    if token.angle_BHS is not None:
        angle_BHS = token.last.angle_BHS
        if token.start_B is not None:
            angle_BHS = jnp.where(token.start_B[:, None, None] != 0, 0, angle_BHS)
        angle_BHS = angle_BHS + token.angle_BHS * token.dt_BH[..., None]
        for _ in range(2):  # a tiny negative angle rounds up to 2 pi, which is zero
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


def _fitting(tile: RotatedTile, token: RotatedToken, width: int) -> RotatedTile:
    """Return `tile` cut down to the sizes; a norm needs all of P, of which `width` is not padding, in one program."""
    padded_width, d_state = token.last.h_BHPN.shape[2:]
    rows = min(tile.rows, padded_width) if token.weights.norm_HP is None else padded_width
    warps = min(8, tile.warps * max(1, rows // tile.rows))  # so a thread has as many registers
    return replace(tile, rows=rows, columns=min(tile.columns, d_state), warps=warps, width=width)


def _decode(token: RotatedToken, tile: RotatedTile) -> Stepped:
    """Return the state after the token, h alone, and the output.

    Raises:
        ValueError: N or P not a power of two of at least 16, R not one up to 16, or a tile that does not fit.
    """
    batch, n_heads, width, d_state = token.last.h_BHPN.shape
    rank = token.q_BHRN.shape[2]
    for name, size, least, most in (
        ("d_state", d_state, 16, 1024),
        ("width", width, 16, 1024),
        ("rank", rank, 1, 16),
        ("tile.rows", tile.rows, 16, width),
        ("tile.columns", tile.columns, 16, d_state),
    ):
        if size & (size - 1) or not least <= size <= most:
            raise ValueError(f"{name}={size} is not a power of two from {least} to {most}")
    if tile.sums not in ("fma", "dot"):
        raise ValueError(f"{tile.sums=} is neither 'fma' nor 'dot'")
    blocks = {"B": None, "H": None, "P": tile.rows}
    place = lambda *at: dict(zip("PHB", at, strict=True))  # noqa: E731
    h_BHPN = jax.ShapeDtypeStruct(token.last.h_BHPN.shape, jnp.float32)
    return call(
        _kernel,
        token,
        Stepped(
            last=Last(h_BHPN=h_BHPN, angle_BHS=None, k_BRHN=None, v_BHP=None),
            o_BHP=jax.ShapeDtypeStruct(token.v_BHP.shape, token.v_BHP.dtype),
        ),
        name="mamba3_decode",
        grid=Grid((width // tile.rows, n_heads, batch), blocks, place),
        tile=tile,
        launch=Launch(tile.warps, 1),
        in_place={0: 0},  # h
    )


class Vectors(NamedTuple):
    """What a program knows of a head but its state, float32: its decay, and one vector a rank."""

    a: jax.Array
    last_x_P: list  # times beta; empty: the token before has no weight
    x_P: list
    weighted_x_P: list  # times gamma


def _kernel(refs: RotatedToken, out: Stepped, *, tile: RotatedTile):
    """Compute some rows of one head; a ref has the axes of its name but for B and H."""
    blocks = [pl.ds(start, tile.columns) for start in range(0, refs.last.h_BHPN.shape[-1], tile.columns)]
    goes_on = None if refs.start_B is None else refs.start_B[...] == 0
    h_PC = [_past(refs.last.h_BHPN, (slice(None), columns), goes_on) for columns in blocks]
    vectors = _vectors(refs, goes_on)
    readout = (_ReadoutDot if tile.sums == "dot" else _ReadoutFma)(refs, tile)
    x_PK = _stacked_x(refs, goes_on, tile) if tile.sums == "dot" else None
    for columns, old_PC in zip(blocks, h_PC, strict=True):
        if tile.sums == "dot":
            k_KC = _stacked_k(refs, columns, goes_on)
            new_PC = vectors.a * old_PC + product(x_PK, k_KC, NN, dtype=jnp.float32, tile=tile)
        else:
            new_PC = _updated(refs, columns, old_PC, vectors=vectors, goes_on=goes_on)
        out.last.h_BHPN[:, columns] = new_PC
        readout.add(new_PC, columns)
    o_P = [
        _epilogue(refs, r, y_P=y_P, x_P=x_P, dtype=out.o_BHP.dtype, tile=tile)
        for r, (y_P, x_P) in enumerate(zip(readout.ranks(), vectors.x_P, strict=True))
    ]
    out.o_BHP[...] = functools.reduce(operator.add, o_P).astype(out.o_BHP.dtype)


def _past(ref, at, goes_on):
    """Return ref[at]; where a document starts zeros, and the kernel does not even read."""
    if goes_on is None:
        return ref[at].astype(jnp.float32)
    mask = jnp.broadcast_to(goes_on, _shape(ref, at))
    at = tuple(jnp.int32(index) if type(index) is int else index for index in at)  # the interpreter wants arrays
    return plt.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)


def _shape(ref, at):
    """Return the shape of ref[at], of numbers, whole axes and `pl.ds`."""
    sizes = zip(ref.shape, at, strict=True)
    return tuple(size if isinstance(index, slice) else index.size for size, index in sizes if type(index) is not int)


def _vectors(refs: RotatedToken, goes_on) -> Vectors:
    rank = refs.q_BHRN.shape[0]
    v_P = refs.v_BHP[...].astype(jnp.float32)
    last_v_P, gamma = [], refs.gamma_BH[...]
    if refs.beta_BH is not None:
        last_v_P = [refs.beta_BH[...] * _past(refs.last.v_BHP, (slice(None),), goes_on)]
    if refs.weights.v_rank_HRP is None:
        return Vectors(a=refs.a_BH[...], last_x_P=last_v_P, x_P=[v_P], weighted_x_P=[gamma * v_P])
    v_ranks_P = [refs.weights.v_rank_HRP[r, :].astype(jnp.float32) for r in range(rank)]
    x_P = [v_rank_P * v_P for v_rank_P in v_ranks_P]
    last_x_P = [v_rank_P * x_P for v_rank_P in v_ranks_P for x_P in last_v_P]
    return Vectors(a=refs.a_BH[...], last_x_P=last_x_P, x_P=x_P, weighted_x_P=[gamma * x for x in x_P])


def _updated(refs: RotatedToken, columns, h_PC, *, vectors: Vectors, goes_on):
    """Return the new state of some columns; a sum over a stacked axis would cross threads."""
    h_PC = vectors.a * h_PC
    for r, x_P in enumerate(vectors.weighted_x_P):
        if vectors.last_x_P:
            last_k_C = _past(refs.last.k_BRHN, (r, columns), goes_on)
            h_PC += vectors.last_x_P[r][:, None] * last_k_C[None, :]
        h_PC += x_P[:, None] * refs.k_BHRN[r, columns].astype(jnp.float32)[None, :]
    return h_PC


class _ReadoutFma:
    """The sums over N, element by element."""

    def __init__(self, refs: RotatedToken, tile: RotatedTile):
        del tile
        self.refs = refs
        self.sums_PC = [0.0] * refs.q_BHRN.shape[0]

    def add(self, h_PC, columns):
        for r, sum_PC in enumerate(self.sums_PC):
            q_C = self.refs.q_BHRN[r, columns].astype(jnp.float32)
            self.sums_PC[r] = sum_PC + h_PC * q_C[None, :]

    def ranks(self):
        """Return y_r, one vector of P a rank."""
        return [jnp.sum(sum_PC, axis=1) for sum_PC in self.sums_PC]


def _sources(rank: int):
    """Return which rank a row of the 2 R stacked ones is, whether of the token before, and whether of this one."""
    s_K = iota(max(16, 2 * rank))  # products over fewer are silently wrong
    return s_K & (rank - 1), s_K < rank, (s_K >= rank) & (s_K < 2 * rank)


def _stacked_k(refs: RotatedToken, columns, goes_on):
    """Return keys of the token before, then of this one, then zeros: (K, C)."""
    rank_K, last_K, now_K = _sources(refs.q_BHRN.shape[0])
    if goes_on is not None:
        last_K &= goes_on
    column_C = columns.start + iota(columns.size)
    mask = lambda mask_K: jnp.broadcast_to(mask_K[:, None], (mask_K.shape[0], columns.size))  # noqa: E731
    now_KC = gather(refs.k_BHRN, rank_K[:, None], column_C[None, :], mask=mask(now_K))
    if refs.last.k_BRHN is None:
        return now_KC
    return now_KC + gather(refs.last.k_BRHN, rank_K[:, None], column_C[None, :], mask=mask(last_K))


def _stacked_x(refs: RotatedToken, goes_on, tile: RotatedTile):
    """Return w_s X_s, likewise: (P, K)."""
    rank_K, last_K, now_K = _sources(refs.q_BHRN.shape[0])
    v_P = refs.gamma_BH[...] * refs.v_BHP[...].astype(jnp.float32)
    x_PK = jnp.where(now_K[None, :], v_P[:, None], 0.0)
    if refs.beta_BH is not None:
        last_v_P = refs.beta_BH[...] * _past(refs.last.v_BHP, (slice(None),), goes_on)
        x_PK = jnp.where(last_K[None, :], last_v_P[:, None], x_PK)
    if refs.weights.v_rank_HRP is None:
        return x_PK
    used_PK = jnp.broadcast_to((last_K | now_K)[None, :], x_PK.shape)
    return x_PK * gather(refs.weights.v_rank_HRP, rank_K[None, :], iota(tile.rows)[:, None], mask=used_PK)


class _ReadoutDot:
    """The sums over N by tensor cores."""

    def __init__(self, refs: RotatedToken, tile: RotatedTile):
        self.refs, self.tile = refs, tile
        self.rank = refs.q_BHRN.shape[0]
        self.rank_I = iota(max(8, self.rank))
        self.sum_PI = None

    def add(self, h_PC, columns):
        column_1C = (columns.start + iota(columns.size))[None, :]
        rank_I1 = jnp.minimum(self.rank_I, self.rank - 1)[:, None]  # padding reads the last rank, in bounds
        mask_IC = jnp.broadcast_to((self.rank_I < self.rank)[:, None], (self.rank_I.shape[0], columns.size))
        q_IC = gather(self.refs.q_BHRN, rank_I1, column_1C, mask=mask_IC)
        y_PI = product(h_PC, q_IC, NT, dtype=jnp.float32, tile=self.tile)
        self.sum_PI = y_PI if self.sum_PI is None else self.sum_PI + y_PI

    def ranks(self):
        return [jnp.sum(jnp.where((self.rank_I == r)[None, :], self.sum_PI, 0.0), axis=1) for r in range(self.rank)]


def _epilogue(refs: RotatedToken, r: int, *, y_P, x_P, dtype, tile: RotatedTile):
    """Return what rank r adds to the output: SPEC section 7."""
    if refs.weights.skip_H is not None:
        y_P += refs.weights.skip_H[...].astype(jnp.float32) * x_P
    if refs.weights.norm_HP is not None:
        mean_square = jnp.sum(y_P * y_P) / (tile.width or tile.rows)
        y_P *= lax.rsqrt(mean_square + NORM_EPS) * refs.weights.norm_HP[...].astype(jnp.float32)
    if refs.gate_BHP is not None:
        gate_P = refs.gate_BHP[...].astype(jnp.float32)
        if refs.weights.gate_rank_HRP is not None:
            gate_P *= refs.weights.gate_rank_HRP[r, :].astype(jnp.float32)
        y_P *= gate_P * sigmoid(gate_P, dtype, tile)
    if refs.weights.out_rank_HRP is not None:
        y_P *= refs.weights.out_rank_HRP[r, :].astype(jnp.float32)
    return y_P
