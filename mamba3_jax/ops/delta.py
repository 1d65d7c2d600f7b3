"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464): defined token by token, and computed in chunks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.ops import context as contexts
from mamba3_jax.ops.context import Context
from mamba3_jax.ops.einsum import einsum

CHUNK = 64  # tokens in a chunk, by default


class Tokens(NamedTuple):
    """One entry a token."""

    q_BLHN: jax.Array
    k_BLHN: jax.Array  # of length 1, or the state may grow without bound
    v_BLHP: jax.Array
    log_a_BLH: jax.Array  # float32, < 0: log of a step's decay
    b_BLH: jax.Array  # float32, in (0, 2): how far the state's value at k is moved towards v; 1: it becomes v
    start_BL: jax.Array | None  # true at the first token of a document


class Chunk(NamedTuple):
    """What a chunk does to the state h before it; see `chunked` for the symbols."""

    own_BHQP: jax.Array  # u if h is 0
    w_BHQN: jax.Array
    k_BHQN: jax.Array
    to_end_BHQ: jax.Array  # decay from each token to the chunk's last one; 0 if that is of another document
    decay_BH: jax.Array  # of the whole chunk, 0 where a document starts in it


class Run(NamedTuple):
    """What a run of tokens does to the state before it: h <- h decay + added."""

    decay_BHNN: jax.Array
    added_BHPN: jax.Array


def delta(tokens: Tokens, h_BHPN, chunk: int | None = None, context: Context | None = None):
    """h_t = a_t h_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,  y_t = h_t q_t.

    Running a sequence in two pieces with the state carried gives what running it whole gives; no value and no gradient
    crosses to another document. Products of float32 are true float32; products of bfloat16 are summed in float32. The
    state is float32.

    Args:
        tokens: one entry a token.
        h_BHPN: float32, the state after the tokens before.
        chunk: tokens in a chunk, rounded up to a power of two, at least 2. Performance only; None: `CHUNK`.
        context: how the tokens lie over the mesh; None: rows are whole. Each run passes on what it does to a state,
            which takes one more pass over the tokens, with N more rows in the state of each head.

    Returns:
        y_BLHP in v's dtype, and h after the last token.
    """
    if context is not None:
        function = functools.partial(_over_runs, context, chunk)
        return contexts.over(context, function, (tokens, h_BHPN), (True, False), (True, False))
    if tokens.v_BLHP.shape[1] == 1:
        return recurrent(tokens, h_BHPN)
    return chunked(tokens, h_BHPN, chunk or CHUNK)


def _over_runs(context: Context, chunk: int | None, tokens: Tokens, h_BHPN):
    """Compute `delta` of this device's tokens."""
    rows = contexts.fold(context, tokens)
    width, d_state = h_BHPN.shape[2:]
    # The rows of a state do not see each other. So N more rows, which begin as the identity and whose values are 0, end
    # as the matrix by which these tokens multiply any state.
    wider = [(0, 0)] * 3 + [(0, d_state)]
    start_HMN = jnp.concatenate([jnp.zeros((width, d_state), h_BHPN.dtype), jnp.eye(d_state, dtype=h_BHPN.dtype)])
    start_BHMN = jnp.broadcast_to(start_HMN, (rows.v_BLHP.shape[0], h_BHPN.shape[1], *start_HMN.shape))
    _, both_BHMN = delta(rows._replace(v_BLHP=jnp.pad(rows.v_BLHP, wider)), start_BHMN, chunk)
    runs = contexts.apart(context, Run(decay_BHNN=both_BHMN[:, :, width:], added_BHPN=both_BHMN[:, :, :width]))
    befores = contexts.carried(_join, runs, Run(jnp.zeros_like(runs[0].decay_BHNN), h_BHPN), context)
    y_BLHP, after_BHPN = delta(rows, jnp.concatenate([run.added_BHPN for run in befores]), chunk)
    last_BHPN = contexts.apart(context, after_BHPN)[-1]
    return contexts.unfold(context, y_BLHP), contexts.from_one(context.ends(), last_BHPN, context.axis)


def _join(left: Run, right: Run) -> Run:
    product = functools.partial(jnp.matmul, precision="highest")
    return Run(
        decay_BHNN=product(left.decay_BHNN, right.decay_BHNN),
        added_BHPN=product(left.added_BHPN, right.decay_BHNN) + right.added_BHPN,
    )


def recurrent(tokens: Tokens, h_BHPN):
    """Compute `delta` as it is defined, one token after another."""
    dtype = h_BHPN.dtype
    product = lambda equation, a, b: jnp.einsum(equation, a, b, precision="highest")  # noqa: E731

    def step(h_BHPN, token: Tokens):
        q_BHN, k_BHN, v_BHP = (x.astype(dtype) for x in (token.q_BLHN, token.k_BLHN, token.v_BLHP))
        if token.start_BL is not None:
            h_BHPN = jnp.where(token.start_BL[:, None, None, None], 0, h_BHPN)
        h_BHPN = jnp.exp(token.log_a_BLH)[..., None, None] * h_BHPN
        u_BHP = token.b_BLH[..., None] * (v_BHP - product("bhpn,bhn->bhp", h_BHPN, k_BHN))
        h_BHPN += u_BHP[..., None] * k_BHN[..., None, :]
        return h_BHPN, product("bhpn,bhn->bhp", h_BHPN, q_BHN)

    h_BHPN, y_LBHP = jax.lax.scan(step, h_BHPN, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens))
    return jnp.swapaxes(y_LBHP, 0, 1).astype(tokens.v_BLHP.dtype), h_BHPN


def chunked(tokens: Tokens, h_BHPN, chunk: int):
    """Compute `delta` by products of matrices, a chunk of Q tokens at a time (the paper's section 3.3).

    With c_t the sum of log_a up to token t, of its chunk and document, and h the state before the chunk:

        h_t = exp(c_t) h + sum_{s<=t} exp(c_t - c_s) u_s k_s^T,   u_t = b_t (v_t - a_t h_{t-1} k_t)

    Substituting h in u gives (I + T) u = diag(b) (v - diag(exp(c)) k h^T), T_ts = b_t exp(c_t - c_s) k_t k_s for s < t.
    So u = (I + T)^-1 diag(b) v - w h^T, w = (I + T)^-1 diag(b exp(c)) k. All but h is computed for all chunks at once;
    a scan over chunks then takes two products a step. Where a document starts, the sums begin again, and entries of T
    between documents are 0.
    """
    length, dtype = tokens.v_BLHP.shape[1], tokens.v_BLHP.dtype
    chunk = 1 << max(min(chunk, length) - 1, 1).bit_length()
    parts: Tokens = jax.tree.map(lambda x: _split(x, chunk), tokens)
    q_CBHQN, k_CBHQN, b_CBHQ = parts.q_BLHN, parts.k_BLHN, parts.b_BLH
    start_CBQ = jnp.zeros((1, 1, chunk), bool) if parts.start_BL is None else parts.start_BL
    document_CBQ = jnp.cumsum(start_CBQ, axis=-1, dtype=jnp.int32)
    within_CBQQ = document_CBQ[..., :, None] == document_CBQ[..., None, :]
    within_CBQQ &= jnp.tril(jnp.ones((chunk, chunk), bool))
    carried_CBHQ, last_CBHQ = ((document_CBQ == x)[:, :, None] for x in (0, document_CBQ[..., -1:]))

    # Sum over the token's own document alone: with a sum over all tokens before it, the gradients that reach another
    # document would cancel, but not to exactly 0.
    c_CBHQ = jnp.einsum("cbqs,cbhs->cbhq", within_CBQQ.astype(jnp.float32), parts.log_a_BLH, precision="highest")
    decay_CBHQQ = jnp.exp(jnp.where(within_CBQQ[:, :, None], c_CBHQ[..., :, None] - c_CBHQ[..., None, :], -jnp.inf))
    from_start_CBHQ = jnp.where(carried_CBHQ, jnp.exp(c_CBHQ), 0)
    to_end_CBHQ = jnp.exp(jnp.where(last_CBHQ, c_CBHQ[..., -1:] - c_CBHQ, -jnp.inf))

    kk_CBHQQ = einsum("cbhqn,cbhsn->cbhqs", k_CBHQN, k_CBHQN, dtype=dtype, out=jnp.float32)
    inverse_CBHQQ = unit_lower_inverse(jnp.tril(b_CBHQ[..., None] * decay_CBHQQ * kk_CBHQQ, -1))
    of_b_CBHQQ = inverse_CBHQQ * b_CBHQ[..., None, :]
    own_CBHQP = einsum("cbhqs,cbhsp->cbhqp", of_b_CBHQQ, parts.v_BLHP, dtype=dtype, out=jnp.float32)
    of_h_CBHQQ = of_b_CBHQQ * from_start_CBHQ[..., None, :]
    w_CBHQN = einsum("cbhqs,cbhsn->cbhqn", of_h_CBHQQ, k_CBHQN, dtype=dtype)

    def step(h_BHPN, part: Chunk):
        of_h_BHQP = einsum("bhqn,bhpn->bhqp", part.w_BHQN, h_BHPN, dtype=dtype, out=jnp.float32)
        u_BHQP = part.own_BHQP - of_h_BHQP
        u_to_end_BHQP = u_BHQP * part.to_end_BHQ[..., None]
        added_BHPN = einsum("bhqp,bhqn->bhpn", u_to_end_BHQP, part.k_BHQN, dtype=dtype, out=jnp.float32)
        after_BHPN = part.decay_BH[..., None, None] * h_BHPN + added_BHPN
        return after_BHPN, (h_BHPN.astype(dtype), u_BHQP.astype(dtype))

    chunks = Chunk(
        own_BHQP=own_CBHQP,
        w_BHQN=w_CBHQN,
        k_BHQN=k_CBHQN,
        to_end_BHQ=to_end_CBHQ,
        decay_BH=from_start_CBHQ[..., -1],
    )
    h_BHPN, (h_CBHPN, u_CBHQP) = jax.lax.scan(step, h_BHPN, chunks)

    qk_CBHQQ = einsum("cbhqn,cbhsn->cbhqs", q_CBHQN, k_CBHQN, dtype=dtype, out=jnp.float32)
    y_CBHQP = einsum("cbhqs,cbhsp->cbhqp", decay_CBHQQ * qk_CBHQQ, u_CBHQP, dtype=dtype, out=jnp.float32)
    of_h_CBHQP = einsum("cbhqn,cbhpn->cbhqp", q_CBHQN, h_CBHPN, dtype=dtype, out=jnp.float32)
    y_CBHQP = (y_CBHQP + from_start_CBHQ[..., None] * of_h_CBHQP).astype(dtype)
    y_BLHP = jnp.moveaxis(y_CBHQP, (0, 2), (1, 3)).reshape(y_CBHQP.shape[1], -1, *h_BHPN.shape[1:3])
    return y_BLHP[:, :length], h_BHPN


def _split(x_BL, chunk: int):
    """Cut (B, L, H, ...) into (C, B, H, Q, ...), padded by zeros: b = 0 and log_a = 0 leave the state as it is."""
    padding = -x_BL.shape[1] % chunk
    x_BL = jnp.pad(x_BL, [(0, padding if axis == 1 else 0) for axis in range(x_BL.ndim)])
    x_BCQ = x_BL.reshape(x_BL.shape[0], -1, chunk, *x_BL.shape[2:])
    return jnp.swapaxes(x_BCQ, 0, 1) if x_BL.ndim == 2 else jnp.moveaxis(x_BCQ, (1, 3), (0, 2))


@jax.custom_vjp
def unit_lower_inverse(lower_QQ):
    """Return (I + lower)^-1 of strictly lower triangular matrices (..., Q, Q), Q a power of two, in float32 products.

    The inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]]; blocks of size 1 are merged into ever larger
    ones. This is as accurate as forward substitution, which takes Q steps. Powers of `lower` would take fewer products,
    but lose all digits where keys are alike.
    """
    size, half = lower_QQ.shape[-1], 1
    blocks = jnp.ones((*lower_QQ.shape[:-2], size, 1, 1), lower_QQ.dtype)
    product = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
    while half < size:
        pairs = size // (2 * half)
        cut = lower_QQ.reshape(*lower_QQ.shape[:-2], pairs, 2 * half, pairs, 2 * half)
        corner = jnp.moveaxis(jnp.diagonal(cut[..., half:, :, :half], axis1=-4, axis2=-2), -1, -3)
        above, below = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        corner = -product(below, product(corner, above))
        top = jnp.concatenate([above, jnp.zeros_like(above)], axis=-1)
        blocks = jnp.concatenate([top, jnp.concatenate([corner, below], axis=-1)], axis=-2)
        half *= 2
    return blocks[..., 0, :, :]


def _inverse_fwd(lower_QQ):
    inverse_QQ = unit_lower_inverse(lower_QQ)
    return inverse_QQ, inverse_QQ


def _inverse_bwd(inverse_QQ, d_QQ):
    """Return d lower = -X^T dX X^T, below the diagonal, where X is the inverse."""
    turned_QQ = jnp.swapaxes(inverse_QQ, -1, -2)
    product = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
    return (jnp.tril(-product(product(turned_QQ, d_QQ), turned_QQ), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)
