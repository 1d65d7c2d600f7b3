"""The selective scan of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752): every channel has a diagonal state of its own."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.ops import context as contexts
from mamba3_jax.ops.context import Context

CHUNK = 32  # tokens in a chunk, by default; the states of all of them exist at once


class Tokens(NamedTuple):
    """One entry a token, I channels; all arrays but x and the starts are float32."""

    x_BLI: jax.Array
    dt_BLI: jax.Array  # > 0
    k_BLN: jax.Array  # the paper's B
    q_BLN: jax.Array  # the paper's C
    start_BL: jax.Array | None  # true at the first token of a document


class Run(NamedTuple):
    """What a run of tokens does to the state before it: h <- decay h + added."""

    decay_BIN: jax.Array
    added_BIN: jax.Array


def selective(tokens: Tokens, a_IN, h_BIN, chunk: int | None = None, context: Context | None = None):
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t k_t^T,  y_t = h_t q_t; exp(dt_t a) is (I, N), elementwise.

    Running a sequence in two pieces with the state carried gives what running it whole gives; no value and no gradient
    crosses to another document. Chunks run one after another, each by `jax.lax.associative_scan`. The backward pass
    keeps the states between chunks and computes everything else again, so the memory for a token does not grow with N.
    All is computed in float32.

    Args:
        tokens: one entry a token.
        a_IN: float32, < 0.
        h_BIN: float32, the state after the tokens before.
        chunk: tokens in a chunk. Performance only; None: `CHUNK`.
        context: how the tokens lie over the mesh; None: rows are whole. Each run passes on what it does to a state,
            which takes a scan of its own.

    Returns:
        y_BLI in x's dtype, and h after the last token.
    """
    if context is not None:
        function = functools.partial(_over_runs, context, chunk)
        return contexts.over(context, function, (tokens, a_IN, h_BIN), (True, False, False), (True, False))
    length = tokens.x_BLI.shape[1]
    if length == 1:
        y_BLI, h_BIN = _chunk(a_IN, h_BIN, tokens)
        return y_BLI.astype(tokens.x_BLI.dtype), h_BIN
    chunk = max(min(chunk or CHUNK, length), 2)  # never one, for the reason in ops.scan_chunks

    def split(x_BL):  # (B, L, ...) -> (C, B, Q, ...), padded by zeros: dt = 0 leaves the state as it is
        x_BL = jnp.pad(x_BL, [(0, -length % chunk if axis == 1 else 0) for axis in range(x_BL.ndim)])
        return jnp.swapaxes(x_BL.reshape(x_BL.shape[0], -1, chunk, *x_BL.shape[2:]), 0, 1)

    step = jax.checkpoint(functools.partial(_chunk, a_IN), prevent_cse=False)  # in a loop XLA cannot merge it

    def body(h_BIN, part: Tokens):
        y_BQI, h_BIN = step(h_BIN, part)
        return h_BIN, y_BQI.astype(part.x_BLI.dtype)

    h_BIN, y_CBQI = jax.lax.scan(body, h_BIN, jax.tree.map(split, tokens))
    y_BCQI = jnp.swapaxes(y_CBQI, 0, 1)
    return y_BCQI.reshape(y_BCQI.shape[0], -1, y_BCQI.shape[3])[:, :length], h_BIN


def _over_runs(context: Context, chunk: int | None, tokens: Tokens, a_IN, h_BIN):
    """Compute `selective` of this device's tokens."""
    rows = contexts.fold(context, tokens)
    _, added_BIN = selective(rows, a_IN, jnp.zeros((rows.x_BLI.shape[0], *a_IN.shape), h_BIN.dtype), chunk)
    decay_BIN = jnp.exp(jnp.sum(rows.dt_BLI, axis=1)[..., None] * a_IN)
    if rows.start_BL is not None:
        decay_BIN = jnp.where(jnp.any(rows.start_BL, axis=1)[:, None, None], 0, decay_BIN)
    runs = contexts.apart(context, Run(decay_BIN, added_BIN))
    befores = contexts.carried(_join, runs, Run(jnp.zeros_like(h_BIN), h_BIN), context)
    y_BLI, after_BIN = selective(rows, a_IN, jnp.concatenate([run.added_BIN for run in befores]), chunk)
    last_BIN = contexts.apart(context, after_BIN)[-1]
    return contexts.unfold(context, y_BLI), contexts.from_one(context.ends(), last_BIN, context.axis)


def _join(left: Run, right: Run) -> Run:
    return Run(left.decay_BIN * right.decay_BIN, right.decay_BIN * left.added_BIN + right.added_BIN)


def _chunk(a_IN, h_BIN, part: Tokens):
    """Compute `selective` of one chunk; the states of all its tokens exist at once."""
    decay_BQIN = jnp.exp(part.dt_BLI[..., None] * a_IN)
    if part.start_BL is not None:
        decay_BQIN = jnp.where(part.start_BL[..., None, None], 0, decay_BQIN)
    added_BQIN = (part.dt_BLI * part.x_BLI.astype(jnp.float32))[..., None] * part.k_BLN[:, :, None]

    def after(first, second):
        (decay_1, added_1), (decay_2, added_2) = first, second
        return decay_1 * decay_2, decay_2 * added_1 + added_2

    decay_BQIN, added_BQIN = jax.lax.associative_scan(after, (decay_BQIN, added_BQIN), axis=1)
    h_BQIN = decay_BQIN * h_BIN[:, None] + added_BQIN
    return jnp.einsum("bqin,bqn->bqi", h_BQIN, part.q_BLN, precision="highest"), h_BQIN[:, -1]
