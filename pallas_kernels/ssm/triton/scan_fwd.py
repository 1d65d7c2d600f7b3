"""The chunked scan in Pallas Triton, forward; `scan_back` has its gradients.

    y_t = sum_{s < t} e^(c_t - c_s) kappa_s (q_t . k_s) x_s  +  gamma_t (q_t . k_t) x_t  +  e^(c_t) h_0 q_t  +  D x_t
    h_T = sum_s e^(c_T - c_s) kappa_s x_s k_s^T  +  e^(c_T) h_0
    o_t = sum over ranks of out_rank norm(y_t) silu(gate gate_rank)

within a chunk, c the log of the decay since its first token; h is carried from chunk to chunk in registers. A row is
one rank of one token, ranks fastest: s < t and s = t speak of the rows' tokens, so every rank of a query sees every
rank of a key.

One program computes a head of a batch entry, or a segment of it: where heads and batch entries are too few to fill the
device, a first pass leaves what every segment adds to the state, `combine_splits` gives the state before each, and the
same kernel then runs all segments at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.ssm.contract import NORM_EPS
from pallas_kernels.ssm.gradients import combine_splits
from pallas_kernels.ssm.triton.common import NN, NT, TN, Tile, call, exp, index_map, iota, product, silu


class Inputs(NamedTuple):
    """L tokens, T = L R rows: what is one number a token stands once for every rank. None: absent."""

    q_BHTN: jax.Array  # biased and rotated; these two may be of the groups of heads: (B, G, T, N)
    k_BHTN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    log_decay_BHT: jax.Array  # float32, c: from the first token of the chunk, or of its document in the chunk
    decay_rest_BHT: jax.Array | None  # c is the sum of both; their differences are taken apart. float32 q, k, v only
    gamma_BHT: jax.Array  # float32: a token's weight in its own output
    kappa_BHT: jax.Array | None  # and in later ones; None: gamma
    document_BT: jax.Array | None  # int32, document starts in the chunk up to here: 0 sees what came before the chunk
    h_BHSPN: jax.Array  # float32, the state before every segment
    skip_H: jax.Array | None
    v_rank_HRP: jax.Array | None
    gate_rank_HRP: jax.Array | None
    out_rank_HRP: jax.Array | None
    norm_HP: jax.Array | None


class Outputs(NamedTuple):
    o_BLHP: jax.Array  # like v
    h_BHSPN: jax.Array  # float32, the state after every segment
    y_BLHRP: jax.Array | None  # before norm and gate: what the backward pass keeps


class Added(NamedTuple):
    h_BHSPN: jax.Array  # what a segment adds to the state
    left_BHS: jax.Array  # and what it leaves of the state before it


def check(inputs: Inputs, tile: Tile) -> None:
    """Raise ValueError, naming it, for a size that the kernels cannot run: some would be silently wrong on the GPU."""
    batch, _, rows, d_state = inputs.q_BHTN.shape
    n_heads = inputs.v_BLHP.shape[2]
    for name, size, most in (
        ("d_state", d_state, 256),
        ("width", inputs.v_BLHP.shape[-1], 128),
        ("tile.rows", tile.rows, 128),
        ("tile.rank", tile.rank, 16),
    ):
        least = 1 if name == "tile.rank" else 16
        if size & (size - 1) or not least <= size <= most:
            raise ValueError(f"{name}={size} is not a power of two from {least} to {most}")
    if rows % (tile.rows * tile.segments) or rows != inputs.v_BLHP.shape[1] * tile.rank:
        raise ValueError(f"{rows=} and {tile.rank=} do not fit {tile.segments=} of chunks of {tile.rows=}")
    if inputs.q_BHTN.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q is {inputs.q_BHTN.dtype}, wanted float32 or bfloat16")
    if batch * n_heads == 0 or rows == 0:
        raise ValueError(f"q has shape {inputs.q_BHTN.shape}: nothing to scan")


class Grid:
    """Programs are batch, heads, segments; `spec` says what one of them sees of an array, by its axes."""

    def __init__(self, inputs: Inputs, tile: Tile):
        self.batch, _, rows, self.d_state = inputs.q_BHTN.shape
        self.heads = inputs.v_BLHP.shape[2]
        self.width, self.tile = inputs.v_BLHP.shape[-1], tile
        self.rows, self.tokens = rows // tile.segments, rows // tile.segments // tile.rank
        self.chunks = self.rows // tile.rows
        self.shape = (self.batch, self.heads, tile.segments)
        self.sizes = {
            "B": self.batch,
            "H": self.heads,
            "S": tile.segments,
            "R": tile.rank,
            "P": self.width,
            "N": self.d_state,
            "T": rows,
            "L": rows // tile.rank,
            "A": -(-self.chunks // tile.anchor_chunks),
        }

    def of_groups(self, array_BGTN) -> pl.BlockSpec:
        """Queries or keys, of every head or of its group."""
        of_head, shared_by = self.spec("BHTN"), self.heads // array_BGTN.shape[1]
        if shared_by == 1:
            return of_head
        return pl.BlockSpec(
            of_head.block_shape, lambda b, h, s: of_head.index_map(b, lax.div(h, jnp.int32(shared_by)), s)
        )

    def spec(self, axes: str) -> pl.BlockSpec:
        """`axes` as in a name: B, H and S are the program's, L and T are cut into segments, the rest is whole."""
        block = {"B": None, "H": None, "S": None, "L": self.tokens, "T": self.rows}
        blocks = [block[axis] if axis in block else self.sizes[axis] for axis in axes]
        names = "".join({"B": "b", "H": "h", "S": "s", "L": "s", "T": "s"}.get(axis, ".") for axis in axes)
        return pl.BlockSpec(tuple(blocks), index_map("bhs", names))

    def specs(self, inputs):
        """Of a NamedTuple whose fields end in their axes; None where the field is."""

        def spec(name: str, array):
            if array is None:
                return None
            return self.of_groups(array) if name in ("q_BHTN", "k_BHTN") else self.spec(name.split("_")[-1])

        return type(inputs)(**{name: spec(name, array) for name, array in inputs._asdict().items()})

    def out(self, axes: str, dtype=jnp.float32):
        return tuple(self.sizes[axis] for axis in axes), dtype, self.spec(axes)

    def __call__(self, kernel, name: str, launch, inputs, out):
        return call(kernel, name, self.tile, launch, self.shape, inputs, self.specs(inputs), out)


def tokens_of(index, tile: Tile):
    return pl.ds(index * tile.tokens, tile.tokens)


def rows_of(index, tile: Tile):
    return pl.ds(index * tile.rows, tile.rows)


class Weights(NamedTuple):
    """Those of one head, float32; of ranks, a row for every row of a chunk. Loaded before the loop."""

    v_rank_TP: jax.Array | None
    gate_rank_TP: jax.Array | None
    out_rank_TP: jax.Array | None
    norm_P: jax.Array | None

    @classmethod
    def load(cls, refs: Inputs, tile: Tile):
        def whole(ref):
            return None if ref is None else ref[...].astype(jnp.float32)

        def rows(ref):
            if ref is None:
                return None
            return gathered(ref, lax.rem(iota(tile.rows), jnp.int32(tile.rank))).astype(jnp.float32)

        ranked = (getattr(refs, name, None) for name in ("v_rank_HRP", "gate_rank_HRP", "out_rank_HRP"))
        return cls(*(rows(ref) for ref in ranked), whole(refs.norm_HP))


def gathered(ref, row_T):
    """Rows of a ref (*, P)."""
    column_P = iota(ref.shape[-1])
    shape = (row_T.shape[0], column_P.shape[0])
    return plt.load(ref.at[jnp.broadcast_to(row_T[:, None], shape), jnp.broadcast_to(column_P[None, :], shape)])


def token_rows(ref, index, tile: Tile):
    """A chunk of a ref of tokens (L, P), a token's entries repeated for its ranks: (T, P)."""
    if tile.rank == 1:
        return ref[rows_of(index, tile), :]
    return gathered(ref, index * tile.tokens + lax.div(iota(tile.rows), jnp.int32(tile.rank)))


def values(refs: Inputs, weights: Weights, index, tile: Tile):
    """x_TP: v for every rank."""
    v_TP = token_rows(refs.v_BLHP, index, tile)
    if weights.v_rank_TP is None:
        return v_TP
    return (v_TP.astype(jnp.float32) * weights.v_rank_TP).astype(v_TP.dtype)


class Scales(NamedTuple):
    """What a row weighs in its own output, and in later ones."""

    gamma_T: jax.Array | None  # None: not asked for
    kappa_T: jax.Array | None  # None: the same

    @classmethod
    def load(cls, refs, rows):
        """From refs with gamma and kappa."""
        return cls(*(None if ref is None else ref[rows] for ref in (refs.gamma_BHT, refs.kappa_BHT)))

    @property
    def later_T(self):
        return self.gamma_T if self.kappa_T is None else self.kappa_T

    def weight_TT(self, own_TT, *, transposed: bool = False):
        """Of sources across (down if transposed)."""
        of_source = (lambda x_T: x_T[:, None]) if transposed else (lambda x_T: x_T[None, :])
        if self.kappa_T is None:
            return of_source(self.gamma_T)
        return jnp.where(own_TT, of_source(self.gamma_T), of_source(self.kappa_T))


class Decay(NamedTuple):
    """c of a chunk's rows, and of its last."""

    exact_T: jax.Array
    rest_T: jax.Array | None
    document_T: jax.Array | None
    exact: jax.Array
    rest: jax.Array | None
    document: jax.Array | None

    @classmethod
    def load(cls, refs, index, tile: Tile):
        found = (refs.log_decay_BHT, refs.decay_rest_BHT, refs.document_BT)
        rows = [None if ref is None else ref[rows_of(index, tile)] for ref in found]
        last = [None if ref is None else ref[index * tile.rows + tile.rows - 1] for ref in found]
        return cls(*rows, *last)

    def between(self, tile: Tile, *, transposed: bool = False):
        """e^(c_t - c_s) for targets t (down; across if transposed) not before sources s, in a document; and t = s."""
        token_T = lax.div(iota(tile.rows), jnp.int32(tile.rank))
        down, across = (lambda x_T: x_T[:, None]), (lambda x_T: x_T[None, :])
        target, source = (across, down) if transposed else (down, across)
        within_TT = target(token_T) >= source(token_T)
        if self.document_T is not None:
            within_TT &= target(self.document_T) == source(self.document_T)
        gap_TT = target(self.exact_T) - source(self.exact_T)
        if self.rest_T is not None:
            gap_TT += target(self.rest_T) - source(self.rest_T)
        # Masked before exp: what lies after a token grows without bound.
        return exp(jnp.where(within_TT, gap_TT, -jnp.inf), tile), target(token_T) == source(token_T)

    def since_T(self, tile: Tile):
        """What is left at each row of the state before the chunk."""
        since_T = exp(self.exact_T if self.rest_T is None else self.exact_T + self.rest_T, tile)
        return since_T if self.document_T is None else jnp.where(self.document_T == 0, since_T, 0.0)

    def until_T(self, tile: Tile):
        """What is left of each row at the end of the chunk."""
        gap_T = self.exact - self.exact_T
        if self.rest_T is not None:
            gap_T += self.rest - self.rest_T
        until_T = exp(gap_T, tile)
        return until_T if self.document_T is None else jnp.where(self.document_T == self.document, until_T, 0.0)

    def whole(self, tile: Tile):
        """What is left at the end of the chunk of the state before it."""
        whole = exp(self.exact if self.rest is None else self.exact + self.rest, tile)
        return whole if self.document is None else jnp.where(self.document == 0, whole, 0.0)


def _forward_kernel(refs: Inputs, out: Outputs, *, tile: Tile):
    dtype = refs.q_BHTN.dtype
    weights = Weights.load(refs, tile)

    def chunk(index, h_PN):
        rows = rows_of(index, tile)
        q_TN, k_TN, x_TP = refs.q_BHTN[rows, :], refs.k_BHTN[rows, :], values(refs, weights, index, tile)
        decay = Decay.load(refs, index, tile)
        scales = Scales.load(refs, rows)
        decay_TT, own_TT = decay.between(tile)

        mixed_TT = product(q_TN, k_TN, NT, dtype, tile)
        mixed_TT *= decay_TT * scales.weight_TT(own_TT)
        if refs.skip_H is not None:
            row_T = iota(tile.rows)
            mixed_TT += jnp.where(row_T[:, None] == row_T[None, :], refs.skip_H[...].astype(jnp.float32), 0.0)
        y_TP = decay.since_T(tile)[:, None] * product(q_TN, h_PN, NT, dtype, tile)
        y_TP += product(mixed_TT, x_TP, NN, dtype, tile)
        if out.y_BLHRP is not None:
            kept = y_TP.reshape(tile.tokens, tile.rank, y_TP.shape[-1]).astype(out.y_BLHRP.dtype)
            out.y_BLHRP[tokens_of(index, tile), :, :] = kept
        out.o_BLHP[tokens_of(index, tile), :] = _finished(y_TP, refs, weights, index, tile).astype(out.o_BLHP.dtype)

        x_TP = x_TP.astype(jnp.float32) * (decay.until_T(tile) * scales.later_T)[:, None]
        return decay.whole(tile) * h_PN + product(x_TP, k_TN, TN, dtype, tile)

    chunks = refs.q_BHTN.shape[0] // tile.rows
    out.h_BHSPN[...] = lax.fori_loop(0, chunks, chunk, refs.h_BHSPN[...])


def _finished(y_TP, refs: Inputs, weights: Weights, index, tile: Tile):
    """`finish` of one chunk: (Q, P)."""
    gate_TP = None
    if refs.gate_BLHP is not None:
        gate_TP = token_rows(refs.gate_BLHP, index, tile).astype(jnp.float32)
    act = lambda gate_TP: silu(gate_TP, refs.v_BLHP.dtype, tile)  # noqa: E731
    o_TP = finish(y_TP, gate_TP, weights.gate_rank_TP, weights.out_rank_TP, weights.norm_P, act, tile)
    return o_TP if tile.rank == 1 else jnp.sum(o_TP.reshape(tile.tokens, tile.rank, -1), axis=1)


def finish(y_P, gate_P, gate_rank_P, out_rank_P, norm_P, silu, tile: Tile):
    """out_rank norm(y) silu(gate gate_rank): any leading axes, float32."""
    if norm_P is not None:
        mean_square = jnp.sum(jnp.square(y_P), axis=-1, keepdims=True) / (tile.width or y_P.shape[-1])
        y_P = y_P * lax.rsqrt(mean_square + NORM_EPS) * norm_P
    if gate_P is not None:
        gate_P = gate_P if gate_rank_P is None else gate_P * gate_rank_P
        y_P = y_P * silu(gate_P)
    return y_P if out_rank_P is None else y_P * out_rank_P


def _added_kernel(refs: Inputs, out: Added, *, tile: Tile):
    dtype = refs.k_BHTN.dtype
    weights = Weights.load(refs, tile)

    def chunk(index, carry):
        h_PN, left = carry
        decay = Decay.load(refs, index, tile)
        weight_T = decay.until_T(tile) * Scales.load(refs, rows_of(index, tile)).later_T
        x_TP = values(refs, weights, index, tile).astype(jnp.float32) * weight_T[:, None]
        whole = decay.whole(tile)
        return whole * h_PN + product(x_TP, refs.k_BHTN[rows_of(index, tile), :], TN, dtype, tile), whole * left

    chunks = refs.k_BHTN.shape[0] // tile.rows
    h_PN, left = lax.fori_loop(0, chunks, chunk, (jnp.zeros(out.h_BHSPN.shape, jnp.float32), 1.0))
    out.h_BHSPN[...], out.left_BHS[...] = h_PN, left


def forward(inputs: Inputs, tile: Tile, *, keep: bool):
    """Outputs, the state before every segment, and what every segment leaves of it (None for one segment).

    Args:
        inputs: h of shape (B, H, 1, P, N), the state before the row.
        keep: y too.

    Raises:
        ValueError: see `check`.
    """
    check(inputs, tile)
    grid = Grid(inputs, tile)
    left_BHS = None
    if tile.segments > 1:
        needed = inputs._replace(q_BHTN=None, gate_BLHP=None, h_BHSPN=None)
        needed = needed if inputs.kappa_BHT is None else needed._replace(gamma_BHT=None)
        needed = needed._replace(skip_H=None, gate_rank_HRP=None, out_rank_HRP=None, norm_HP=None)
        out = Added(grid.out("BHSPN"), grid.out("BHS"))
        added = grid(_added_kernel, "mamba3_segments", tile.added, needed, out)
        left_BHS = added.left_BHS
        inputs = inputs._replace(h_BHSPN=combine_splits(inputs.h_BHSPN[:, :, 0], left_BHS, added.h_BHSPN)[0])
    dtype = inputs.v_BLHP.dtype
    out = Outputs(grid.out("BLHP", dtype), grid.out("BHSPN"), grid.out("BLHRP", dtype) if keep else None)
    return grid(_forward_kernel, "mamba3_scan", tile.forward, inputs, out), inputs.h_BHSPN, left_BHS
