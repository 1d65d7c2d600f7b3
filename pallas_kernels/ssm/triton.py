"""The chunked scan in Pallas Triton, forward and backward, SISO and MIMO. NVIDIA GPUs from Ampere on.

    y_t = sum_{s < t} e^(c_t - c_s) kappa_s (q_t . k_s) x_s  +  gamma_t (q_t . k_t) x_t  +  e^(c_t) h_0 q_t
    h_T = sum_s e^(c_T - c_s) kappa_s x_s k_s^T  +  e^(c_T) h_0

within a chunk, c the log of the decay since its first token; h is carried from chunk to chunk in registers. A row is
one rank of one token, ranks fastest: s < t and s = t speak of the rows' tokens, so every rank of a query sees every
rank of a key.

One program computes a head of a batch entry, or a segment of it: where heads and batch entries are too few to fill the
device, a first pass leaves what every segment adds to the state, `combine` gives the state before each, and the same
kernels then run all segments at once. The backward pass does the same from the end.

Pallas Triton is deprecated upstream (jax 0.11): nothing but the `triton` implementation may import this file.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


@dataclass(frozen=True)
class Tile:
    """How the kernels are cut and run. Rows a chunk: a power of two, at least 16, a multiple of the rank."""

    rows: int = 64
    rank: int = 1
    segments: int = 1  # of equally many chunks, side by side
    num_warps: int = 4
    forward_stages: int = 2
    backward_stages: int = 1
    interpret: bool = False  # on the CPU, for tests

    def params(self, stages: int) -> dict:
        """Arguments of pallas_call."""
        if self.interpret:
            return {"interpret": True}
        return {"compiler_params": plt.CompilerParams(num_warps=self.num_warps, num_stages=stages)}


def check(q_BHTN, x_BHTP, tile: Tile) -> None:
    """Raise ValueError, naming it, for a size that the kernels cannot run: some would be silently wrong on the GPU."""
    batch, n_heads, rows, d_state = q_BHTN.shape
    width = x_BHTP.shape[-1]
    for name, size, most in (("d_state", d_state, 256), ("width", width, 128), ("tile.rows", tile.rows, 128)):
        if size & (size - 1) or not 16 <= size <= most:
            raise ValueError(f"{name}={size} is not a power of two from 16 to {most}")
    if tile.rows % tile.rank or rows % (tile.rows * tile.segments):
        raise ValueError(f"{rows=} and {tile.rank=} do not fit {tile.segments=} of chunks of {tile.rows=}")
    if q_BHTN.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"q is {q_BHTN.dtype}, wanted float32 or bfloat16")
    if batch * n_heads == 0 or rows == 0:
        raise ValueError(f"q has shape {q_BHTN.shape}: nothing to scan")


@functools.partial(jax.custom_vjp, nondiff_argnums=(9,))
def scan(q_BHTN, k_BHTN, x_BHTP, exact_BHT, rest_BHT, gamma_BHT, kappa_BHT, document_BT, h_BHPN, tile: Tile):
    """y_BHTP and the last h_BHPN, float32: see the top of this file.

    Args:
        q_BHTN, k_BHTN, x_BHTP: float32 (true float32 products) or bfloat16 (float32 sums), one dtype.
        exact_BHT, rest_BHT: float32, c_t = exact + rest from the first token of the chunk or of its document in the
            chunk. Differences are taken part by part, so what adds up exactly stays exact. All of the derivative is
            the rest's.
        gamma_BHT, kappa_BHT: float32, a token's weight in its own output and in later ones.
        document_BT: int32, the document starts in the chunk up to here: 0 sees what came before the chunk, and a token
            sees tokens of its own number only.
        h_BHPN: float32, the state before the first token.
        tile: sizes. Everything a row: scalars of a token are repeated for its ranks.

    Raises:
        ValueError: see `check`.
    """
    y_BHTP, h_BHPN, _ = _forward(
        q_BHTN, k_BHTN, x_BHTP, exact_BHT, rest_BHT, gamma_BHT, kappa_BHT, document_BT, h_BHPN, tile, keep=False
    )
    return y_BHTP, h_BHPN


def _product(tile: Tile, dtype):
    """a . b with float32 sums; operands are rounded to `dtype` first."""

    def product(a, b, dimensions):
        a, b = a.astype(dtype), b.astype(dtype)
        if tile.interpret:  # the CPU has no such product of bfloat16
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)

    return product


def _weights(exact_T, rest_T, gamma_T, kappa_T, document_T, rank: int):
    """decay and weight of every pair of rows (target, source), and which pairs are of one token."""
    token_T = lax.broadcasted_iota(jnp.int32, exact_T.shape, 0) // rank
    within_TT = (token_T[:, None] >= token_T[None, :]) & (document_T[:, None] == document_T[None, :])
    own_TT = token_T[:, None] == token_T[None, :]
    gap_TT = (exact_T[:, None] - exact_T[None, :]) + (rest_T[:, None] - rest_T[None, :])
    # Masked before exp as well: what lies after a token grows without bound.
    decay_TT = jnp.where(within_TT, jnp.exp(jnp.where(within_TT, gap_TT, 0.0)), 0.0)
    return decay_TT, decay_TT * jnp.where(own_TT, gamma_T[None, :], kappa_T[None, :]), own_TT


def _edges(exact_ref, rest_ref, document_ref, last, exact_T, rest_T, document_T):
    """What is left at each row of the state before the chunk, and at the chunk's end of each row and of that state."""
    since_T = jnp.where(document_T == 0, jnp.exp(exact_T + rest_T), 0.0)
    exact, rest, document = exact_ref[last], rest_ref[last], document_ref[last]
    until_T = jnp.where(document_T == document, jnp.exp((exact - exact_T) + (rest - rest_T)), 0.0)
    return since_T, until_T, jnp.where(document == 0, jnp.exp(exact + rest), 0.0)


def _forward_kernel(
    q_ref, k_ref, x_ref, exact_ref, rest_ref, gamma_ref, kappa_ref, document_ref, h_ref, y_ref, last_ref, *states_ref,
    chunks: int, tile: Tile,
):  # fmt: skip
    product = _product(tile, q_ref.dtype)

    def chunk(index, h_PN):
        for ref in states_ref:
            ref[index] = h_PN
        rows, last = pl.ds(index * tile.rows, tile.rows), index * tile.rows + tile.rows - 1
        q_TN, k_TN, x_TP = q_ref[rows, :], k_ref[rows, :], x_ref[rows, :]
        exact_T, rest_T, document_T = exact_ref[rows], rest_ref[rows], document_ref[rows]
        gamma_T, kappa_T = gamma_ref[rows], kappa_ref[rows]
        _, weight_TT, _ = _weights(exact_T, rest_T, gamma_T, kappa_T, document_T, tile.rank)
        since_T, until_T, all_ = _edges(exact_ref, rest_ref, document_ref, last, exact_T, rest_T, document_T)

        y_TP = product(product(q_TN, k_TN, NT) * weight_TT, x_TP, NN)
        y_ref[rows, :] = y_TP + since_T[:, None] * product(q_TN, h_PN, NT)
        x_TP = x_TP.astype(jnp.float32) * (until_T * kappa_T)[:, None]
        return all_ * h_PN + product(x_TP, k_TN, TN)

    last_ref[...] = lax.fori_loop(0, chunks, chunk, h_ref[...])


def _added_kernel(
    k_ref, x_ref, exact_ref, rest_ref, kappa_ref, document_ref, added_ref, left_ref, *, chunks: int, tile: Tile
):  # fmt: skip
    """What a segment adds to the state, and what it leaves of the state before it."""
    product = _product(tile, k_ref.dtype)

    def chunk(index, carry):
        h_PN, left = carry
        rows, last = pl.ds(index * tile.rows, tile.rows), index * tile.rows + tile.rows - 1
        exact_T, rest_T, document_T = exact_ref[rows], rest_ref[rows], document_ref[rows]
        _, until_T, all_ = _edges(exact_ref, rest_ref, document_ref, last, exact_T, rest_T, document_T)
        x_TP = x_ref[rows, :].astype(jnp.float32) * (until_T * kappa_ref[rows])[:, None]
        return all_ * h_PN + product(x_TP, k_ref[rows, :], TN), all_ * left

    added_ref[...], left_ref[...] = lax.fori_loop(0, chunks, chunk, (jnp.zeros(added_ref.shape, jnp.float32), 1.0))


def _demanded_kernel(
    q_ref, exact_ref, rest_ref, document_ref, dy_ref, demanded_ref, *, chunks: int, tile: Tile
):  # fmt: skip
    """The gradient of the state before a segment from the outputs of the segment."""
    product = _product(tile, q_ref.dtype)

    def chunk(step, dh_PN):
        index = chunks - 1 - step
        rows, last = pl.ds(index * tile.rows, tile.rows), index * tile.rows + tile.rows - 1
        exact_T, rest_T, document_T = exact_ref[rows], rest_ref[rows], document_ref[rows]
        since_T, _, all_ = _edges(exact_ref, rest_ref, document_ref, last, exact_T, rest_T, document_T)
        return all_ * dh_PN + product(dy_ref[rows, :] * since_T[:, None], q_ref[rows, :], TN)

    demanded_ref[...] = lax.fori_loop(0, chunks, chunk, jnp.zeros(demanded_ref.shape, jnp.float32))


def _backward_kernel(
    q_ref, k_ref, x_ref, exact_ref, rest_ref, gamma_ref, kappa_ref, document_ref, states_ref, dy_ref, dlast_ref,
    dq_ref, dk_ref, dx_ref, drest_ref, dgamma_ref, dkappa_ref, dh_ref,
    *, chunks: int, tile: Tile,
):  # fmt: skip
    product = _product(tile, q_ref.dtype)

    def chunk(step, dh_PN):
        index = chunks - 1 - step
        rows, last = pl.ds(index * tile.rows, tile.rows), index * tile.rows + tile.rows - 1
        q_TN, k_TN, x_TP, dy_TP = q_ref[rows, :], k_ref[rows, :], x_ref[rows, :], dy_ref[rows, :]
        exact_T, rest_T, document_T = exact_ref[rows], rest_ref[rows], document_ref[rows]
        gamma_T, kappa_T = gamma_ref[rows], kappa_ref[rows]
        h_PN = states_ref[index]
        decay_TT, weight_TT, own_TT = _weights(exact_T, rest_T, gamma_T, kappa_T, document_T, tile.rank)
        since_T, until_T, all_ = _edges(exact_ref, rest_ref, document_ref, last, exact_T, rest_T, document_T)
        arriving_T = until_T * kappa_T

        score_TT = product(q_TN, k_TN, NT)
        outer_TT = product(dy_TP, x_TP, NT)  # dy_t . x_s
        dscore_TT = outer_TT * weight_TT
        from_state_TN = product(dy_TP, h_PN, NN)
        to_state_TN = product(x_TP, dh_PN, NN)
        dq_ref[rows, :] = (product(dscore_TT, k_TN, NN) + since_T[:, None] * from_state_TN).astype(dq_ref.dtype)
        dk_ref[rows, :] = (product(dscore_TT, q_TN, TN) + arriving_T[:, None] * to_state_TN).astype(dk_ref.dtype)
        dx_TP = product(score_TT * weight_TT, dy_TP, TN) + arriving_T[:, None] * product(k_TN, dh_PN, NT)
        dx_ref[rows, :] = dx_TP.astype(dx_ref.dtype)

        dweight_TT = outer_TT * score_TT * decay_TT
        later_TT = jnp.where(own_TT, 0.0, dweight_TT)
        dgamma_ref[rows] = jnp.sum(jnp.where(own_TT, dweight_TT, 0.0), axis=0)
        at_end_T = jnp.sum(k_TN.astype(jnp.float32) * to_state_TN, axis=1) * until_T
        dkappa_ref[rows] = jnp.sum(later_TT, axis=0) + at_end_T

        # A pair's log weight is c_t - c_s, the state's share of a target is c_t, a source's of the end c_last - c_s.
        pair_TT = later_TT * kappa_T[None, :]
        end_T = at_end_T * kappa_T
        drest_T = jnp.sum(pair_TT, axis=1) - jnp.sum(pair_TT, axis=0) - end_T
        drest_T += since_T * jnp.sum(q_TN.astype(jnp.float32) * from_state_TN, axis=1)
        whole = jnp.sum(end_T) + all_ * jnp.sum(dh_PN * h_PN)
        is_last_T = lax.broadcasted_iota(jnp.int32, drest_T.shape, 0) == tile.rows - 1
        drest_ref[rows] = drest_T + jnp.where(is_last_T, whole, 0.0)

        return all_ * dh_PN + product(dy_TP * since_T[:, None], q_TN, TN)

    dh_ref[...] = lax.fori_loop(0, chunks, chunk, dlast_ref[...])


def combine(h_BHPN, added_BHSPN, left_BHS):
    """h_s = left_s h_{s-1} + added_s: the states before every segment, and the one after the last."""
    left_BHS = jnp.concatenate([jnp.ones_like(left_BHS[:, :, :1]), left_BHS], axis=2)
    states_BHSPN = jnp.concatenate([h_BHPN[:, :, None], added_BHSPN], axis=2)

    def compose(first, second):
        return first[0] * second[0], second[0][..., None, None] * first[1] + second[1]

    _, states_BHSPN = lax.associative_scan(compose, (left_BHS, states_BHSPN), axis=2)
    return states_BHSPN[:, :, :-1], states_BHSPN[:, :, -1]


class _Call:
    """A kernel over batch, heads and segments; `of_*` describe what one program sees of an array, by its last axes."""

    def __init__(self, q_BHTN, x_BHTP, tile: Tile):
        check(q_BHTN, x_BHTP, tile)
        self.tile, (self.batch, self.heads, rows, d_state) = tile, q_BHTN.shape
        self.rows, width = rows // tile.segments, x_BHTP.shape[-1]
        self.chunks = self.rows // tile.rows
        self.of_N, self.of_P, self.of_row = (self.rows, d_state), (self.rows, width), (self.rows,)
        self.of_state, self.of_states, self.of_left = (width, d_state), (self.chunks, width, d_state), ()

    def split(self, *arrays_BHT):
        """(B, H, T, ...) -> (B, H, S, T / S, ...)."""
        return [x.reshape(self.batch, self.heads, self.tile.segments, self.rows, *x.shape[3:]) for x in arrays_BHT]

    def documents(self, document_BT):
        """(B, T) -> (B, 1, S, T / S)."""
        return document_BT.reshape(self.batch, 1, self.tile.segments, self.rows)

    def whole(self, array_BHS):
        """`split` undone."""
        return array_BHS.reshape(self.batch, self.heads, -1, *array_BHS.shape[4:])

    def __call__(self, kernel, name: str, stages: int, inputs, out):
        """`out`: the (axes, dtype) of every output."""

        def spec(array_BHS):
            shared = array_BHS.shape[1] == 1 < self.heads
            sizes = array_BHS.shape[3:]
            return pl.BlockSpec(
                (None, None, None, *sizes), lambda b, h, s: (b, 0 if shared else h, s, *[0] * len(sizes))
            )

        grid = (self.batch, self.heads, self.tile.segments)
        shapes = [jax.ShapeDtypeStruct((*grid, *axes), dtype) for axes, dtype in out]
        return pl.pallas_call(
            functools.partial(kernel, chunks=self.chunks, tile=self.tile),
            grid=grid,
            in_specs=[spec(array) for array in inputs],
            out_specs=[spec(shape) for shape in shapes],
            out_shape=shapes,
            name=name,
            **self.tile.params(stages),
        )(*inputs)


def _forward(q, k, x, exact, rest, gamma, kappa, document, h_BHPN, tile: Tile, *, keep: bool):
    """y, the last state and, if `keep`, what the backward pass needs of the segments and chunks."""
    call = _Call(q, x, tile)
    q, k, x, exact, rest, gamma, kappa = call.split(q, k, x, exact, rest, gamma, kappa)
    document = call.documents(document)
    start_BHSPN, left_BHS = h_BHPN[:, :, None], None
    if tile.segments > 1:
        out = [(call.of_state, jnp.float32), (call.of_left, jnp.float32)]
        parts = call(_added_kernel, "mamba3_segments", tile.forward_stages, (k, x, exact, rest, kappa, document), out)
        start_BHSPN, _ = combine(h_BHPN, *parts)
        left_BHS = parts[1]
    inputs = (q, k, x, exact, rest, gamma, kappa, document, start_BHSPN)
    out = [call.of_P, call.of_state, *[call.of_states] * keep]
    y, last_BHSPN, *states = call(
        _forward_kernel, "mamba3_scan", tile.forward_stages, inputs, [(axes, jnp.float32) for axes in out]
    )
    return call.whole(y), last_BHSPN[:, :, -1], (left_BHS, *states)


def _scan_fwd(q, k, x, exact, rest, gamma, kappa, document, h_BHPN, tile: Tile):
    y, last, kept = _forward(q, k, x, exact, rest, gamma, kappa, document, h_BHPN, tile, keep=True)
    return (y, last), (q, k, x, exact, rest, gamma, kappa, document, *kept)


def _scan_bwd(tile: Tile, residuals, cotangents):
    q, k, x, exact, rest, gamma, kappa, document, left_BHS, states = residuals
    dy, dlast_BHPN = cotangents
    call = _Call(q, x, tile)
    q, k, x, exact, rest, gamma, kappa, dy = call.split(q, k, x, exact, rest, gamma, kappa, dy)
    document = call.documents(document)
    dlast_BHSPN = dlast_BHPN[:, :, None]
    if tile.segments > 1:
        (demanded_BHSPN,) = call(
            _demanded_kernel,
            "mamba3_segments_backward",
            tile.backward_stages,
            (q, exact, rest, document, dy),
            [(call.of_state, jnp.float32)],
        )
        # From the end: what a segment's last state is asked for is what the next one asks of its first.
        backwards = (jnp.flip(array, axis=2) for array in (demanded_BHSPN, left_BHS))
        dlast_BHSPN = jnp.flip(combine(dlast_BHPN, *backwards)[0], axis=2)
    rows = [(call.of_row, jnp.float32)] * 3
    of_inputs = [(call.of_N, q.dtype), (call.of_N, k.dtype), (call.of_P, x.dtype)]
    dq, dk, dx, drest, dgamma, dkappa, dstart_BHSPN = call(
        _backward_kernel,
        "mamba3_scan_backward",
        tile.backward_stages,
        (q, k, x, exact, rest, gamma, kappa, document, states, dy, dlast_BHSPN),
        [*of_inputs, *rows, (call.of_state, jnp.float32)],
    )
    gradients = [call.whole(array) for array in (dq, dk, dx, jnp.zeros_like(exact), drest, dgamma, dkappa)]
    return *gradients, None, dstart_BHSPN[:, :, 0]


scan.defvjp(_scan_fwd, _scan_bwd)
