"""One token of the op in a Pallas Triton kernel: the state is read once and written once, in place.

    h' = a h + sum_s w_s X_s k_s^T,   y_r = h' q_r
    o = sum_r out_rank_r norm(y_r + D X_r) silu(gate gate_rank_r)

s runs over the R ranks of the token before (w = beta, which has the decay a here),
then over those of this one (w = gamma); X_s = v_rank v; keys and queries come biased and rotated.

The state's bytes are the floor, so everything else has to hide behind them. What does not by itself is the sums over N
that cross threads: R of them for each row of P. So N is taken in blocks of few columns, whose products add up thread by
thread, and threads exchange what is left once a row.

Letters: B batch, R rank, H heads, N state per head, P head width; J = 2 R, the two tokens' ranks; C columns of N at a
time; I ranks and K = J, padded for a tensor core.
"""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.ssm.contract import NORM_EPS, Weights, map_axes
from pallas_kernels.ssm.triton.common import NN, NT, iota, product, sigmoid


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut, and what computes its sums. Performance only, but for `width`, the shape's.

    Sums are "fma", element by element, or "dot", on tensor cores by three products of TF32 parts.
    """

    rows: int = 64  # of P a program, at most
    columns: int = 32  # of N at a time, at most
    heads: int = 1  # a program, one after another, the next one's state on its way
    warps: int = 4
    update: str = "fma"  # the sum over ranks that goes into the state
    readout: str = "fma"  # the sums over N
    width: int | None = None  # entries of P that are not padding; None: all
    interpret: bool = False  # on the CPU, for tests


class Inputs(NamedTuple):
    """None: absent."""

    h_BHPN: jax.Array  # float32, the state before the token
    last_k_BRHN: jax.Array | None  # of the token before; these two None, with beta: it has no weight
    last_v_BHP: jax.Array | None
    q_BHRN: jax.Array
    k_BHRN: jax.Array
    v_BHP: jax.Array
    a_BH: jax.Array  # these three float32
    beta_BH: jax.Array | None  # the decay of this step included
    gamma_BH: jax.Array
    start_B: jax.Array | None  # int32; what is not 0 forgets everything before
    gate_BHP: jax.Array | None
    weights: Weights  # without biases


class Outputs(NamedTuple):
    h_BHPN: jax.Array  # in the buffer of the one before, where that is donated
    o_BHP: jax.Array  # like v


def fitting(tile: Tile, padded_width: int, padded_d_state: int, n_heads: int, *, width: int, norm: bool) -> Tile:
    """Returns `tile` cut down to the sizes, padded to powers of two; a norm needs all of P in one program."""
    heads = tile.heads
    while n_heads % heads:
        heads //= 2
    rows = padded_width if norm else min(tile.rows, padded_width)
    warps = min(8, tile.warps * max(1, rows // tile.rows))  # as many registers a thread
    columns = min(tile.columns, padded_d_state)
    return replace(tile, heads=heads, rows=rows, columns=columns, warps=warps, width=width)


def decode(inputs: Inputs, tile: Tile) -> Outputs:
    """Returns the state after the token, and its output; `tile` as `fitting` gives it.

    Raises:
        ValueError: N or P not a power of two of at least 16, R not one up to 16, or a tile that does not fit.
    """
    batch, n_heads, width, d_state = inputs.h_BHPN.shape
    rank = inputs.q_BHRN.shape[2]
    for name, size, least, most in (
        ("d_state", d_state, 16, 1024),
        ("width", width, 16, 1024),
        ("rank", rank, 1, 16),
        ("tile.rows", tile.rows, 16, width),
        ("tile.columns", tile.columns, 16, d_state),
    ):
        if size & (size - 1) or not least <= size <= most:
            raise ValueError(f"{name}={size} is not a power of two from {least} to {most}")
    if n_heads % tile.heads or {tile.update, tile.readout} - {"fma", "dot"}:
        raise ValueError(f"{tile} does not fit {n_heads=} or names an unknown way")
    whole = {"R": rank, "N": d_state}

    def spec(axes: str) -> pl.BlockSpec:
        sizes = {"B": None, "H": tile.heads, "P": tile.rows, **whole}
        index = lambda *at: tuple(dict(zip("PHB", at, strict=True)).get(axis, 0) for axis in axes)  # noqa: E731
        return pl.BlockSpec(tuple(sizes[axis] for axis in axes), index)

    def specs(tree):
        return map_axes(lambda axes, array: spec(axes), tree)

    out = Outputs(
        h_BHPN=jax.ShapeDtypeStruct(inputs.h_BHPN.shape, jnp.float32),
        o_BHP=jax.ShapeDtypeStruct(inputs.v_BHP.shape, inputs.v_BHP.dtype),
    )
    how = {"compiler_params": plt.CompilerParams(num_warps=tile.warps, num_stages=1)}
    (outputs,) = pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        grid=(width // tile.rows, n_heads // tile.heads, batch),
        in_specs=(specs(inputs),),
        out_specs=[specs(out)],
        out_shape=[out],
        input_output_aliases={0: 0},
        name="mamba3_decode",
        **({"interpret": True} if tile.interpret else how),
    )(inputs)
    return outputs


class Vectors(NamedTuple):
    """What a program knows of a head but its state, float32: numbers, and one vector a rank."""

    a: jax.Array
    before_x_P: list  # times their weight; empty: the token before has none
    x_P: list
    weighted_x_P: list  # times gamma


def _kernel(refs: Inputs, out: Outputs, *, tile: Tile):
    blocks = [pl.ds(start, tile.columns) for start in range(0, refs.h_BHPN.shape[-1], tile.columns)]
    keep = None if refs.start_B is None else refs.start_B[...] == 0

    def load(head: int):
        return [_kept(refs.h_BHPN, (head, slice(None), columns), keep) for columns in blocks]

    ahead = load(0)
    for head in range(tile.heads):
        h_PC = ahead
        if head + 1 < tile.heads:  # before this head's stores, which loads are not moved across
            ahead = load(head + 1)
        vectors = _vectors(refs, head, keep)
        readout = (_ReadoutDot if tile.readout == "dot" else _ReadoutFma)(refs, head, tile)
        x_PK = _stacked_x(refs, head, keep, tile) if tile.update == "dot" else None
        for columns, old_PC in zip(blocks, h_PC, strict=True):
            if tile.update == "dot":
                k_KC = _stacked_k(refs, head, columns, keep)
                new_PC = vectors.a * old_PC + product(x_PK, k_KC, NN, jnp.float32, tile)
            else:
                new_PC = _updated(refs, head, columns, old_PC, vectors, keep)
            out.h_BHPN[head, :, columns] = new_PC
            readout.add(new_PC, columns)
        _write(refs, out, head, readout.ranks(), vectors, tile)


def _kept(ref, at, keep):
    """What is there, zeros where all of the past is forgotten: not even read."""
    if keep is None:
        return ref[at].astype(jnp.float32)
    mask = jnp.broadcast_to(keep, _shape(ref, at))
    at = tuple(jnp.int32(index) if type(index) is int else index for index in at)  # or the interpreter fails
    return plt.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)


def _shape(ref, at):
    """Of ref[at]: numbers, whole axes and `pl.ds`."""
    sizes = zip(ref.shape, at, strict=True)
    return tuple(size if isinstance(index, slice) else index.size for size, index in sizes if type(index) is not int)


def _vectors(refs: Inputs, head: int, keep) -> Vectors:
    rank = refs.q_BHRN.shape[1]
    v_P = refs.v_BHP[head, :].astype(jnp.float32)
    before_v_P, gamma = [], refs.gamma_BH[head]
    if refs.beta_BH is not None:
        before_v_P = [refs.beta_BH[head] * _kept(refs.last_v_BHP, (head, slice(None)), keep)]
    if refs.weights.v_rank_HRP is None:
        return Vectors(refs.a_BH[head], before_v_P, [v_P], [gamma * v_P])
    v_ranks_P = [refs.weights.v_rank_HRP[head, r, :].astype(jnp.float32) for r in range(rank)]
    x_P = [v_rank_P * v_P for v_rank_P in v_ranks_P]
    before_x_P = [v_rank_P * x_P for v_rank_P in v_ranks_P for x_P in before_v_P]
    return Vectors(refs.a_BH[head], before_x_P, x_P, [gamma * x for x in x_P])


def _updated(refs: Inputs, head: int, columns, h_PC, vectors: Vectors, keep):
    """Not one sum over a stacked axis: that crosses threads."""
    h_PC = vectors.a * h_PC
    for r, x_P in enumerate(vectors.weighted_x_P):
        if vectors.before_x_P:
            before_k_C = _kept(refs.last_k_BRHN, (r, head, columns), keep)
            h_PC += vectors.before_x_P[r][:, None] * before_k_C[None, :]
        h_PC += x_P[:, None] * refs.k_BHRN[head, r, columns].astype(jnp.float32)[None, :]
    return h_PC


class _ReadoutFma:
    def __init__(self, refs: Inputs, head: int, tile: Tile):
        del tile
        self.refs, self.head = refs, head
        self.sums_PC = [0.0] * refs.q_BHRN.shape[1]

    def add(self, h_PC, columns):
        for r, sum_PC in enumerate(self.sums_PC):
            q_C = self.refs.q_BHRN[self.head, r, columns].astype(jnp.float32)
            self.sums_PC[r] = sum_PC + h_PC * q_C[None, :]

    def ranks(self):
        """y_r, one vector of P a rank."""
        return [jnp.sum(sum_PC, axis=1) for sum_PC in self.sums_PC]


def _gathered(ref, *at, mask):
    """ref[at], float32, zeros where `mask` is false: every index an array or a number, within the ref."""
    at = tuple(jnp.broadcast_to(jnp.asarray(index, jnp.int32), mask.shape) for index in at)
    return plt.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)


def _sources(rank: int):
    """Which rank a row of the 2 R stacked ones is, and whether of the token before, of this one, or padding."""
    s_K = iota(max(16, 2 * rank))  # fewer are silently wrong
    return s_K & (rank - 1), s_K < rank, (s_K >= rank) & (s_K < 2 * rank)


def _stacked_k(refs: Inputs, head: int, columns, keep):
    """Keys of the token before, then of this one, then zeros: (K, C)."""
    rank_K, before_K, now_K = _sources(refs.q_BHRN.shape[1])
    if keep is not None:
        before_K &= keep
    column_C = columns.start + iota(columns.size)
    wide = lambda mask_K: jnp.broadcast_to(mask_K[:, None], (mask_K.shape[0], columns.size))  # noqa: E731
    now_KC = _gathered(refs.k_BHRN, head, rank_K[:, None], column_C[None, :], mask=wide(now_K))
    if refs.last_k_BRHN is None:
        return now_KC
    return now_KC + _gathered(refs.last_k_BRHN, rank_K[:, None], head, column_C[None, :], mask=wide(before_K))


def _stacked_x(refs: Inputs, head: int, keep, tile: Tile):
    """w_s X_s, likewise: (P, K)."""
    rank_K, before_K, now_K = _sources(refs.q_BHRN.shape[1])
    v_P = refs.gamma_BH[head] * refs.v_BHP[head, :].astype(jnp.float32)
    x_PK = jnp.where(now_K[None, :], v_P[:, None], 0.0)
    if refs.beta_BH is not None:
        before_v_P = refs.beta_BH[head] * _kept(refs.last_v_BHP, (head, slice(None)), keep)
        x_PK = jnp.where(before_K[None, :], before_v_P[:, None], x_PK)
    if refs.weights.v_rank_HRP is None:
        return x_PK
    used_PK = jnp.broadcast_to((before_K | now_K)[None, :], x_PK.shape)
    return x_PK * _gathered(refs.weights.v_rank_HRP, head, rank_K[None, :], iota(tile.rows)[:, None], mask=used_PK)


class _ReadoutDot:
    def __init__(self, refs: Inputs, head: int, tile: Tile):
        self.refs, self.head, self.tile = refs, head, tile
        self.rank = refs.q_BHRN.shape[1]
        self.rank_I = iota(max(8, self.rank))
        self.sum_PI = None

    def add(self, h_PC, columns):
        column_1C = (columns.start + iota(columns.size))[None, :]
        rank_I1 = jnp.minimum(self.rank_I, self.rank - 1)[:, None]  # the last one's again after it
        mask_IC = jnp.broadcast_to((self.rank_I < self.rank)[:, None], (self.rank_I.shape[0], columns.size))
        q_IC = _gathered(self.refs.q_BHRN, self.head, rank_I1, column_1C, mask=mask_IC)
        y_PI = product(h_PC, q_IC, NT, jnp.float32, self.tile)
        self.sum_PI = y_PI if self.sum_PI is None else self.sum_PI + y_PI

    def ranks(self):
        return [jnp.sum(jnp.where((self.rank_I == r)[None, :], self.sum_PI, 0.0), axis=1) for r in range(self.rank)]


def _write(refs: Inputs, out: Outputs, head: int, y_P: list, vectors: Vectors, tile: Tile):
    finished = [_finished(refs, head, r, y, vectors.x_P[r], out.o_BHP.dtype, tile) for r, y in enumerate(y_P)]
    out.o_BHP[head, :] = sum(finished[1:], finished[0]).astype(out.o_BHP.dtype)


def _finished(refs: Inputs, head: int, r: int, y_P, x_P, dtype, tile: Tile):
    """What rank r adds to the output: SPEC section 7."""
    if refs.weights.skip_H is not None:
        y_P += refs.weights.skip_H[head].astype(jnp.float32) * x_P
    if refs.weights.norm_HP is not None:
        mean_square = jnp.sum(y_P * y_P) / (tile.width or tile.rows)
        y_P *= lax.rsqrt(mean_square + NORM_EPS) * refs.weights.norm_HP[head, :].astype(jnp.float32)
    if refs.gate_BHP is not None:
        gate_P = refs.gate_BHP[head, :].astype(jnp.float32)
        if refs.weights.gate_rank_HRP is not None:
            gate_P *= refs.weights.gate_rank_HRP[head, r, :].astype(jnp.float32)
        y_P *= gate_P * sigmoid(gate_P, dtype, tile)
    if refs.weights.out_rank_HRP is not None:
        y_P *= refs.weights.out_rank_HRP[head, r, :].astype(jnp.float32)
    return y_P
