"""The chunked scan in Pallas Triton, forward; `scan_bwd` has its gradients.

    y_t = sum_{s < t} e^(c_t - c_s) kappa_s (q_t . k_s) x_s  +  gamma_t (q_t . k_t) x_t  +  e^(c_t) h_0 q_t  +  D x_t
    h_T = sum_s e^(c_T - c_s) kappa_s x_s k_s^T  +  e^(c_T) h_0
    o_t = sum over ranks of out_rank norm(y_t) silu(gate gate_rank)

within a chunk, c the log of the decay from its first token; h is carried from chunk to chunk in registers. A row of a
chunk is one rank of one token, ranks fastest: s < t and s = t speak of the rows' tokens, so every rank of a query sees
every rank of a key.

One program computes a head of a batch entry, or a split of it: where heads and batch entries are too few to fill the
device, a first pass computes what every split adds to the state, `combine_splits` gives the state before each, and the
same kernel then runs all splits at once.

Letters: T = L R rows, of the length or of a chunk, Q tokens of a chunk, Z splits, A checkpoints of a split.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.ssm.contract import NORM_EPS, Weights
from pallas_kernels.ssm.operands import combine_splits
from pallas_kernels.ssm.triton.common import NN, NT, TN, call, exp, iota, product, silu
from pallas_kernels.ssm.triton.config import Tile


class ScanOperands(NamedTuple):
    """What is one number a token stands once for every rank. None: absent, or not read."""

    q_BHTN: jax.Array | None  # biased and rotated; these two may be of the groups of heads: (B, G, T, N)
    k_BHTN: jax.Array | None
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    log_decay_BHT: jax.Array  # float32, c: from the first token of the chunk, or of its document in the chunk
    decay_rest_BHT: jax.Array | None  # c is the sum of both; their differences are taken apart. float32 q, k, v only
    gamma_BHT: jax.Array | None  # float32: a token's weight in its own output
    kappa_BHT: jax.Array | None  # and in later ones; None: gamma
    document_BT: jax.Array | None  # int32, document starts in the chunk up to here: 0 sees what came before the chunk
    h_BHZPN: jax.Array | None  # float32, the state before every split
    weights: Weights  # without biases


class ScanOutputs(NamedTuple):
    """What the scan computes."""

    o_BLHP: jax.Array  # like v
    h_BHZPN: jax.Array  # float32, the state after every split
    y_BLHRP: jax.Array | None  # before norm and gate, for the backward pass


class SplitSums(NamedTuple):
    """What a split does to the state h before it: h -> decay h + added."""

    h_BHZPN: jax.Array  # added
    decay_BHZ: jax.Array | None


def forward(operands: ScanOperands, tile: Tile, *, residuals: bool):
    """Return `ScanOutputs`, the state before every split, and the decay of every split (None: the row is one).

    Args:
        operands: h of shape (B, H, 1, P, N), the state before the row.
        residuals: whether y is wanted.

    Raises:
        ValueError: see `check`.
    """
    check(operands, tile)
    grid, decay_BHZ = ScanGrid(operands, tile), None
    if tile.splits > 1 or tile.along is not None:
        sums = call(
            _split_sums_kernel,
            operands._replace(
                q_BHTN=None,
                gate_BLHP=None,
                gamma_BHT=operands.gamma_BHT if operands.kappa_BHT is None else None,
                h_BHZPN=None,
                weights=Weights(v_rank_HRP=operands.weights.v_rank_HRP),
            ),
            SplitSums(h_BHZPN=grid.array("BHZPN"), decay_BHZ=grid.array("BHZ")),
            name="mamba3_segments",
            grid=grid,
            tile=tile,
            launch=tile.split_sums,
        )
        decay_BHZ = sums.decay_BHZ
        h_BHZPN, _ = combine_splits(operands.h_BHZPN[:, :, 0], decay_BHZ, sums.h_BHZPN, tile.along)
        operands = operands._replace(h_BHZPN=h_BHZPN)
    dtype = operands.v_BLHP.dtype
    out = call(
        _forward_kernel,
        operands,
        ScanOutputs(
            o_BLHP=grid.array("BLHP", dtype),
            h_BHZPN=grid.array("BHZPN"),
            y_BLHRP=grid.array("BLHRP", dtype) if residuals else None,
        ),
        name="mamba3_scan",
        grid=grid,
        tile=tile,
        launch=tile.forward,
    )
    return out, operands.h_BHZPN, decay_BHZ


def check(operands: ScanOperands, tile: Tile) -> None:
    """Raise ValueError, naming it, for a size that the kernels cannot run: some would be silently wrong on the GPU."""
    batch, _, rows, d_state = operands.q_BHTN.shape
    length, n_heads, width = operands.v_BLHP.shape[1:]
    for name, size, most in (
        ("d_state", d_state, 256),
        ("width", width, 128),
        ("tile.rows", tile.rows, 128),
        ("tile.rank", tile.rank, 16),
    ):
        least = 1 if name == "tile.rank" else 16
        if size & (size - 1) or not least <= size <= most:
            raise ValueError(f"{name}={size} is not a power of two from {least} to {most}")
    if rows % (tile.rows * tile.splits) or rows != length * tile.rank:
        raise ValueError(f"{rows=} and {tile.rank=} do not fit {tile.splits=} of chunks of {tile.rows=}")
    if operands.q_BHTN.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q is {operands.q_BHTN.dtype}, wanted float32 or bfloat16")
    if batch * n_heads == 0 or rows == 0:
        raise ValueError(f"q has shape {operands.q_BHTN.shape}: nothing to scan")


class ScanGrid:
    """The `Grid` of a scan: batch, heads, splits."""

    def __init__(self, operands: ScanOperands, tile: Tile):
        batch, length, n_heads, width = operands.v_BLHP.shape
        rows = length * tile.rank
        split_rows = rows // tile.splits
        self.programs = (batch, n_heads, tile.splits)
        self.sizes = {
            "B": batch,
            "H": n_heads,
            "Z": tile.splits,
            "R": tile.rank,
            "P": width,
            "N": operands.q_BHTN.shape[-1],
            "T": rows,
            "L": length,
            "A": -(-(split_rows // tile.rows) // tile.checkpoint_chunks),
        }
        # A program sees one entry, or its split's part, of these axes and all of the others.
        self.blocks = self.sizes | {"B": None, "H": None, "Z": None, "T": split_rows, "L": split_rows // tile.rank}

    def array(self, axes: str, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        """Return the shape of an array whose axes are named."""
        return jax.ShapeDtypeStruct(tuple(self.sizes[axis] for axis in axes), dtype)

    def spec(self, axes: str, array) -> pl.BlockSpec:
        """Return what a program sees of an array; queries and keys may have the groups of heads for heads."""
        shared_by = self.sizes["H"] // array.shape[1] if axes == "BHTN" else 1

        def index(b, h, z):
            if shared_by > 1:
                h = lax.div(h, jnp.int32(shared_by))
            at = {"B": b, "H": h, "Z": z, "L": z, "T": z}
            return tuple(at.get(axis, 0) for axis in axes)

        return pl.BlockSpec(tuple(self.blocks[axis] for axis in axes), index)


def tokens_of(index, tile: Tile):
    """Return where the tokens of a chunk are."""
    return pl.ds(index * tile.tokens, tile.tokens)


def rows_of(index, tile: Tile):
    """Return where the rows of a chunk are."""
    return pl.ds(index * tile.rows, tile.rows)


class RowWeights(NamedTuple):
    """The weights of one head, float32; of ranks, a row for every row of a chunk. Kernels load them before the loop."""

    v_rank_TP: jax.Array | None
    gate_rank_TP: jax.Array | None
    out_rank_TP: jax.Array | None
    norm_P: jax.Array | None

    @classmethod
    def load(cls, weights: Weights, tile: Tile):
        """Read them from refs."""

        def rows(ref):
            if ref is None:
                return None
            return gathered(ref, lax.rem(iota(tile.rows), jnp.int32(tile.rank))).astype(jnp.float32)

        return cls(
            v_rank_TP=rows(weights.v_rank_HRP),
            gate_rank_TP=rows(weights.gate_rank_HRP),
            out_rank_TP=rows(weights.out_rank_HRP),
            norm_P=None if weights.norm_HP is None else weights.norm_HP[...].astype(jnp.float32),
        )


def gathered(ref, row_T):
    """Return rows of a ref (*, P)."""
    column_P = iota(ref.shape[-1])
    shape = (row_T.shape[0], column_P.shape[0])
    return plt.load(ref.at[jnp.broadcast_to(row_T[:, None], shape), jnp.broadcast_to(column_P[None, :], shape)])


def token_rows(ref, index, tile: Tile):
    """Return a chunk (T, P) of a ref of tokens (L, P), a token's entries once for each of its ranks."""
    if tile.rank == 1:
        return ref[rows_of(index, tile), :]
    return gathered(ref, index * tile.tokens + lax.div(iota(tile.rows), jnp.int32(tile.rank)))


def values(refs: ScanOperands, weights: RowWeights, index, tile: Tile):
    """Return x_TP, v for every rank."""
    v_TP = token_rows(refs.v_BLHP, index, tile)
    if weights.v_rank_TP is None:
        return v_TP
    return (v_TP.astype(jnp.float32) * weights.v_rank_TP).astype(v_TP.dtype)


class LogDecay(NamedTuple):
    """c of rows of a chunk, exact + rest, and the document starts in the chunk up to them."""

    exact: jax.Array
    rest: jax.Array | None
    document: jax.Array | None

    @property
    def from_start(self):
        """Return c as one number."""
        return self.exact if self.rest is None else self.exact + self.rest

    def gap(self, source: "LogDecay"):
        """Return c - c of the source."""
        gap = self.exact - source.exact
        return gap if self.rest is None else gap + (self.rest - source.rest)


class Decay(NamedTuple):
    """The decay in a chunk, and what a row weighs in its own output, and in later ones."""

    rows: LogDecay  # (T,)
    last: LogDecay  # of the last row: numbers
    gamma_T: jax.Array | None  # None: not read
    kappa_T: jax.Array | None  # None: gamma

    @classmethod
    def load(cls, refs: ScanOperands, index, tile: Tile):
        """Read it from refs."""
        log_decay, at = LogDecay(refs.log_decay_BHT, refs.decay_rest_BHT, refs.document_BT), rows_of(index, tile)
        rows = jax.tree.map(lambda ref: ref[at], log_decay)
        last = jax.tree.map(lambda ref: ref[index * tile.rows + tile.rows - 1], log_decay)
        gamma_T, kappa_T = (None if ref is None else ref[at] for ref in (refs.gamma_BHT, refs.kappa_BHT))
        return cls(rows=rows, last=last, gamma_T=gamma_T, kappa_T=kappa_T)

    def weight_TT(self, diagonal_TT, *, transposed: bool = False):
        """Return the weights of sources (across; down if transposed); on the diagonal, of a token in its output."""
        of_source = (lambda x_T: x_T[:, None]) if transposed else (lambda x_T: x_T[None, :])
        if self.kappa_T is None:
            return of_source(self.gamma_T)
        return jnp.where(diagonal_TT, of_source(self.gamma_T), of_source(self.kappa_T))

    def later_to_end_T(self, tile: Tile):
        """Return what each row weighs at the end of the chunk: `to_end_T` times its weight in later outputs."""
        return self.to_end_T(tile) * (self.gamma_T if self.kappa_T is None else self.kappa_T)

    def between(self, tile: Tile, *, transposed: bool = False):
        """Return e^(c_t - c_s) of targets t (down; across if transposed) that are not before the source s and in its
        document, else 0; and the diagonal, where t and s are one token."""
        token_T = lax.div(iota(tile.rows), jnp.int32(tile.rank))
        down, across = (lambda x_T: x_T[:, None]), (lambda x_T: x_T[None, :])
        target, source = (across, down) if transposed else (down, across)
        within_TT = target(token_T) >= source(token_T)
        if self.rows.document is not None:
            within_TT &= target(self.rows.document) == source(self.rows.document)
        log_decay = self.rows._replace(document=None)
        gap_TT = jax.tree.map(target, log_decay).gap(jax.tree.map(source, log_decay))
        # The mask comes before exp, since what lies after a token grows without bound.
        return exp(jnp.where(within_TT, gap_TT, -jnp.inf), tile), target(token_T) == source(token_T)

    def from_start_T(self, tile: Tile):
        """Return e^(c_t): the decay of the state before the chunk up to each row."""
        decay_T = exp(self.rows.from_start, tile)
        return decay_T if self.rows.document is None else jnp.where(self.rows.document == 0, decay_T, 0.0)

    def to_end_T(self, tile: Tile):
        """Return e^(c_T - c_s): the decay of each row up to the end of the chunk."""
        decay_T = exp(self.last.gap(self.rows), tile)
        document_T = self.rows.document
        return decay_T if document_T is None else jnp.where(document_T == self.last.document, decay_T, 0.0)

    def of_chunk(self, tile: Tile):
        """Return e^(c_T): the decay of the state from before the chunk to its end."""
        decay = exp(self.last.from_start, tile)
        return decay if self.last.document is None else jnp.where(self.last.document == 0, decay, 0.0)


def _forward_kernel(refs: ScanOperands, out: ScanOutputs, *, tile: Tile):
    dtype = refs.q_BHTN.dtype
    dot = functools.partial(product, dtype=dtype, tile=tile)
    weights = RowWeights.load(refs.weights, tile)

    def chunk(index, h_PN):
        rows = rows_of(index, tile)
        q_TN, k_TN, x_TP = refs.q_BHTN[rows, :], refs.k_BHTN[rows, :], values(refs, weights, index, tile)
        decay = Decay.load(refs, index, tile)
        decay_TT, diagonal_TT = decay.between(tile)

        mixed_TT = dot(q_TN, k_TN, NT)
        mixed_TT *= decay_TT * decay.weight_TT(diagonal_TT)
        if refs.weights.skip_H is not None:
            row_T = iota(tile.rows)
            same_row_TT = row_T[:, None] == row_T[None, :]
            mixed_TT += jnp.where(same_row_TT, refs.weights.skip_H[...].astype(jnp.float32), 0.0)
        y_TP = decay.from_start_T(tile)[:, None] * dot(q_TN, h_PN, NT)
        y_TP += dot(mixed_TT, x_TP, NN)
        tokens = tokens_of(index, tile)
        if out.y_BLHRP is not None:
            y_QRP = y_TP.reshape(tile.tokens, tile.rank, y_TP.shape[-1])
            out.y_BLHRP[tokens, :, :] = y_QRP.astype(out.y_BLHRP.dtype)
        gate_TP = None
        if refs.gate_BLHP is not None:
            gate_TP = token_rows(refs.gate_BLHP, index, tile).astype(jnp.float32)
        o_TP = epilogue(y_TP, gate_TP, weights, dtype=refs.v_BLHP.dtype, tile=tile)
        o_QP = o_TP if tile.rank == 1 else jnp.sum(o_TP.reshape(tile.tokens, tile.rank, -1), axis=1)
        out.o_BLHP[tokens, :] = o_QP.astype(out.o_BLHP.dtype)

        x_TP = x_TP.astype(jnp.float32) * decay.later_to_end_T(tile)[:, None]
        return decay.of_chunk(tile) * h_PN + dot(x_TP, k_TN, TN)

    chunks = refs.q_BHTN.shape[0] // tile.rows
    out.h_BHZPN[...] = lax.fori_loop(0, chunks, chunk, refs.h_BHZPN[...])


def epilogue(y_TP, gate_TP, weights: RowWeights, *, dtype, tile: Tile):
    """Return out_rank norm(y) silu(gate gate_rank), float32, to be rounded to `dtype`."""
    if weights.norm_P is not None:
        mean_square = jnp.sum(jnp.square(y_TP), axis=-1, keepdims=True) / (tile.width or y_TP.shape[-1])
        y_TP = y_TP * lax.rsqrt(mean_square + NORM_EPS) * weights.norm_P
    if gate_TP is not None:
        gate_TP = gate_TP if weights.gate_rank_TP is None else gate_TP * weights.gate_rank_TP
        y_TP = y_TP * silu(gate_TP, dtype, tile)
    return y_TP if weights.out_rank_TP is None else y_TP * weights.out_rank_TP


def _split_sums_kernel(refs: ScanOperands, out: SplitSums, *, tile: Tile):
    weights = RowWeights.load(refs.weights, tile)

    def chunk(index, carry):
        h_PN, split_decay = carry
        rows = rows_of(index, tile)
        decay = Decay.load(refs, index, tile)
        weight_T = decay.later_to_end_T(tile)
        x_TP = values(refs, weights, index, tile).astype(jnp.float32) * weight_T[:, None]
        chunk_decay = decay.of_chunk(tile)
        added_PN = product(x_TP, refs.k_BHTN[rows, :], TN, dtype=refs.k_BHTN.dtype, tile=tile)
        return chunk_decay * h_PN + added_PN, chunk_decay * split_decay

    chunks = refs.k_BHTN.shape[0] // tile.rows
    zeros_PN = jnp.zeros(out.h_BHZPN.shape, jnp.float32)
    out.h_BHZPN[...], out.decay_BHZ[...] = lax.fori_loop(0, chunks, chunk, (zeros_PN, 1.0))
