"""The loop of the parallel implementations: it takes a row chunk by chunk and computes all tokens of a chunk at once.

For each chunk it prepares queries, keys and values (bias, rotation, ranks), hands them to a core (that of `chunked` or
`associative`), which turns the state before the chunk into outputs and the state after it, and applies the epilogue to
the outputs. Work and memory for each token do not depend on the length. The backward pass keeps the inputs and the
states between chunks and computes everything else again.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.ops import angle as angles
from mamba3_jax.ops.discretize import later_weight
from mamba3_jax.ops.output import epilogue
from mamba3_jax.ops.rotary import from_planes, partner, sin_cos, to_planes
from mamba3_jax.ops.state import incoming, last_state, ranked
from mamba3_jax.ops.types import Heads, State, Tokens, accumulator, empty_state, product_dtype


class Chunk(NamedTuple):
    """What a core reads of Q tokens. q, k and x have the dtype of the products, other numbers the accumulator's."""

    q_BHQRN: jax.Array | None  # biased and rotated; None: only the state is wanted
    k_BHQRN: jax.Array
    x_BHQRP: jax.Array  # v_rank * v
    log_a_BHQ: jax.Array
    gamma_BHQ: jax.Array  # weight of a token in its own output
    kappa_BHQ: jax.Array | None  # weight in every later output, see discretize.later_weight; None: gamma
    within_BQQ: jax.Array  # bool: token s (last axis) is not after t and is in t's document; the B axis may be 1
    carried_BQ: jax.Array | None  # bool: no document start of the chunk at or before t; None: everywhere

    @property
    def later_BHQ(self):
        """Return the weight of a token in every output after its own."""
        return self.gamma_BHQ if self.kappa_BHQ is None else self.kappa_BHQ


# (chunk, h_BHPN) -> y_BHQRP (None without queries), h_BHPN
Core = Callable[[Chunk, jax.Array], tuple[jax.Array | None, jax.Array]]


class PerToken(NamedTuple):
    """The arrays that are cut into chunks: `tokens`, with queries and keys in plane order, and kappa."""

    tokens: Tokens
    kappa_BLH: jax.Array | None


def over_chunks(core: Core, tokens: Tokens, heads: Heads, state: State | None, *, rotation: str, chunk: int):
    """Run `core` over the chunks of a row; arguments and results are those of every implementation of `ssm`.

    Without queries (see `ssm.transition`) there is no y, and the core computes the state alone.
    """
    state = empty_state(tokens) if state is None else state
    length, n_heads, width = tokens.v_BLHP.shape[1:]
    dtype, operand_dtype = accumulator(tokens), product_dtype(tokens)
    # Chunks have at least two tokens: XLA for GPU (jax 0.11.2) fuses a loop over chunks of one into wrong states, as
    # seen on an H200. States are right without its fusion passes, and with two tokens.
    n_chunks = -(-length // max(chunk, 2))
    chunk = -(-length // n_chunks)  # chunks of similar size: 65 tokens are 33 + 32, not 64 + 1
    step, planes = angles.grid(chunk), 0 if tokens.angle_BLHS is None else tokens.angle_BLHS.shape[-1]
    ordered = lambda x_N: None if x_N is None else to_planes(x_N, planes, rotation)  # noqa: E731

    kappa_BLH, first_BH = later_weight(tokens.gamma_BLH, tokens.beta_BLH, tokens.start_BL)
    in_planes = tokens._replace(q_BLRGN=ordered(tokens.q_BLRGN), k_BLRGN=ordered(tokens.k_BLRGN), beta_BLH=None)
    per_chunk = jax.tree.map(lambda array: _split(array, n_chunks, chunk), PerToken(in_planes, kappa_BLH))
    each_token = jax.tree.map(lambda array: array[:, None], heads)  # an axis for Q between H and R
    q_bias_HQRN, k_bias_HQRN = ordered(each_token.q_bias_HRN), ordered(each_token.k_bias_HRN)
    heads_first = lambda array_BQH: None if array_BQH is None else jnp.swapaxes(array_BQH, 1, 2)  # noqa: E731

    def body(carry, per_token: PerToken):
        turns, h_BHPN = carry
        part = per_token.tokens
        within_BQQ, document_BQ = documents(part.start_BL, chunk)
        carried_BQ = None if document_BQ is None else document_BQ == 0
        sincos_BHQN = None
        if turns is not None:
            dt_BHQ, angle_BHQS = heads_first(part.dt_BLH), heads_first(part.angle_BLHS)
            phi, turns = angles.advance(turns, angle_BHQS, dt_BHQ, within_BQQ, carried_BQ, step)
            # The barrier keeps XLA from computing sines again for each entry, key and rank that uses them.
            sincos_BHQN = sin_cos(*jax.lax.optimization_barrier(angles.sincos(phi)), part.k_BLRGN.shape[-1])

        def seen_by_heads(x_BQRGN, bias_HQRN):
            if x_BQRGN is None:
                return None
            # Cast before the copies to heads: the gradient is then summed over heads in the accumulator's dtype.
            return rotated(x_BQRGN.astype(dtype), bias_HQRN, n_heads, sincos_BHQN, planes).astype(operand_dtype)

        x_BHQRP = ranked(heads_first(part.v_BLHP).astype(dtype), each_token)
        seen = Chunk(
            q_BHQRN=seen_by_heads(part.q_BLRGN, q_bias_HQRN),
            k_BHQRN=seen_by_heads(part.k_BLRGN, k_bias_HQRN),
            x_BHQRP=x_BHQRP.astype(operand_dtype),
            log_a_BHQ=heads_first(part.log_a_BLH),
            gamma_BHQ=heads_first(part.gamma_BLH),
            kappa_BHQ=heads_first(per_token.kappa_BLH),
            within_BQQ=within_BQQ,
            carried_BQ=carried_BQ,
        )
        y_BHQRP, h_BHPN = core(seen, h_BHPN)
        y_BQHP = None
        if y_BHQRP is not None:
            y_BHQP = epilogue(y_BHQRP, x_BHQRP, heads_first(part.gate_BLHP), each_token)
            y_BQHP = jnp.swapaxes(y_BHQP, 1, 2).astype(tokens.v_BLHP.dtype)
        return (finite(turns), h_BHPN), y_BQHP

    turns, h_BHPN = None, incoming(state, first_BH, heads)
    if tokens.angle_BLHS is not None:
        turns = finite(angles.from_radians(state.angle_BHS, step))
        h_BHPN = jnp.where(jnp.isfinite(state.angle_BHS).all(axis=-1)[..., None, None], h_BHPN, jnp.nan)
    carry = (turns, ordered(h_BHPN))
    body = jax.checkpoint(body, prevent_cse=False)
    (turns, h_BHPN), y_CBQHP = jax.lax.scan(body, carry, per_chunk)

    y_BLHP = None
    if y_CBQHP is not None:
        y_BLHP = jnp.swapaxes(y_CBQHP, 0, 1).reshape(-1, n_chunks * chunk, n_heads, width)[:, :length]
    angle_BHS = None if turns is None else angles.to_radians(turns)
    return y_BLHP, last_state(tokens, heads, angle_BHS, from_planes(h_BHPN, planes, rotation), rotation)


def finite(turns):
    """Replace angles that are not finite by 0 between chunks.

    The state between chunks is NaN where they are, until a document starts. NaN in the keys of the next chunk would
    reach its other documents too.
    """
    return jax.tree.map(lambda turns_BHS: jnp.where(jnp.isfinite(turns_BHS), turns_BHS, 0), turns)


def rotated(x_BQRGN, bias_HQRN, n_heads: int, sincos_BHQN, planes: int):
    """Return, for each head, the queries or keys of its group, biased and rotated: (B, H, Q, R, N), in plane order.

    Args:
        x_BQRGN: in plane order.
        bias_HQRN: in plane order; its Q axis has size 1. None: no bias.
        n_heads: H.
        sincos_BHQN: sines and cosines, from `rotary.sin_cos`; None: no rotation.
        planes: S.
    """

    def biased(of=lambda x_N: x_N):
        x_BGQRN = of(x_BQRGN).transpose(0, 3, 1, 2, 4)
        x_BHQRN = jnp.repeat(x_BGQRN, n_heads // x_BGQRN.shape[1], axis=1)
        return x_BHQRN if bias_HQRN is None else x_BHQRN + of(bias_HQRN)

    if sincos_BHQN is None:
        return biased()
    sin_BHQN, cos_BHQN = (x_BHQN[:, :, :, None] for x_BHQN in sincos_BHQN)
    return biased() * cos_BHQN + biased(functools.partial(partner, planes=planes)) * sin_BHQN


def _split(array_BL, n_chunks: int, chunk: int):
    """Cut (B, L, ...) into (C, B, Q, ...), padded by zeros: gamma = 0 and log_a = 0 leave the state as it is."""
    padding = n_chunks * chunk - array_BL.shape[1]
    array_BL = jnp.pad(array_BL, [(0, padding if axis == 1 else 0) for axis in range(array_BL.ndim)])
    return jnp.swapaxes(array_BL.reshape(-1, n_chunks, chunk, *array_BL.shape[2:]), 0, 1)


def documents(start_BQ, chunk: int):
    """Return `Chunk.within_BQQ`, and the number of document starts in the chunk up to each token (None: no starts)."""
    causal_QQ = jnp.tril(jnp.ones((chunk, chunk), bool))
    if start_BQ is None:
        return causal_QQ[None], None
    document_BQ = jnp.cumsum(start_BQ.astype(jnp.int32), axis=-1)
    return causal_QQ & (document_BQ[:, :, None] == document_BQ[:, None, :]), document_BQ
