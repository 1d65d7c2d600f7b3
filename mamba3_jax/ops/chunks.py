"""The frame of the parallel implementations: the length in chunks, one after another, each computed at once.

A chunk prepares its queries, keys and values (bias, rotation, ranks), hands them to a core (`chunked`, `associative`)
that turns the state before the chunk into outputs and the state after it, and finishes the outputs. Work and memory
a token do not depend on the length; the backward pass keeps the inputs and the states between chunks and
recomputes the rest.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.ops import angle as angles
from mamba3_jax.ops.discretize import trapezoid
from mamba3_jax.ops.output import finish
from mamba3_jax.ops.recurrent import outer, per_head, ranked
from mamba3_jax.ops.rotary import from_planes, partner, rotate, to_planes, turn
from mamba3_jax.ops.types import Heads, State, Tokens, accumulator, empty_state, product_dtype


class Chunk(NamedTuple):
    """What a core sees of Q tokens. q, k and x in the dtype of the products, the rest in the accumulator's."""

    q_BHQRN: jax.Array  # biased and rotated
    k_BHQRN: jax.Array
    x_BHQRP: jax.Array  # v_rank * v
    log_a_BHQ: jax.Array
    gamma_BHQ: jax.Array  # weight of a token in its own output
    kappa_BHQ: jax.Array  # and in every later one, see discretize.trapezoid
    within_BQQ: jax.Array  # bool: token s (last axis) is not after t and in its document; the B axis may be 1
    carried_BQ: jax.Array | None  # bool: no document start of the chunk at or before t; None: everywhere


Core = Callable[[Chunk, jax.Array], tuple[jax.Array, jax.Array]]  # (chunk, h_BHPN) -> y_BHQRP, h_BHPN


def over_chunks(core: Core, tokens: Tokens, heads: Heads, state: State | None, *, rotation: str, chunk: int):
    """Run `core` over the chunks of a row; same arguments and results as every implementation of `ssm`."""
    state = empty_state(tokens) if state is None else state
    length, n_heads, width = tokens.v_BLHP.shape[1:]
    dtype = accumulator(tokens)
    planes = tokens.angle_BLHS.shape[-1]
    d_state = tokens.k_BLRGN.shape[-1]
    # Never chunks of one token: XLA for GPU (jax 0.11.2) fuses a loop over them into wrong states. Seen on an H200;
    # right with its fusion passes disabled, right with two tokens.
    n_chunks = -(-length // max(chunk, 2))
    chunk = -(-length // n_chunks)  # even out: 65 tokens are 33 + 32, not 64 + 1
    step = angles.grid(chunk)

    gamma_BLH, kappa_BLH, first_BH = trapezoid(tokens.dt_BLH, tokens.trap_BLH, tokens.start_BL)
    weights = tokens._replace(q_BLRGN=None, k_BLRGN=None)
    q_BLRGN, k_BLRGN = (to_planes(x, planes, rotation) for x in (tokens.q_BLRGN, tokens.k_BLRGN))
    per_token = (q_BLRGN, k_BLRGN, weights, gamma_BLH, kappa_BLH)
    per_chunk = jax.tree.map(lambda array: _split(array, n_chunks, chunk), per_token)
    each_token = jax.tree.map(lambda array: array[:, None], heads)  # an axis for Q between H and R
    q_bias_HQRN, k_bias_HQRN = (to_planes(x, planes, rotation) for x in (each_token.q_bias_HRN, each_token.k_bias_HRN))
    narrow = product_dtype(tokens)

    def body(carry, part):
        turns, h_BHPN = carry
        q_BQRGN, k_BQRGN, part, gamma_BQH, kappa_BQH = part
        within_BQQ, document_BQ = documents(part.start_BL, chunk)
        carried_BQ = None if document_BQ is None else document_BQ == 0
        dt_BHQ, angle_BHQS = jnp.swapaxes(part.dt_BLH, 1, 2), jnp.swapaxes(part.angle_BLHS, 1, 2)
        phi, turns = angles.advance(turns, angle_BHQS, dt_BHQ, within_BQQ, carried_BQ, step)
        # The barrier keeps XLA from computing sines again for each of the entries, keys and ranks that use them.
        sin_BHQN, cos_BHQN = turn(*jax.lax.optimization_barrier(angles.sincos(phi)), d_state)

        x_BHQRP = ranked(jnp.swapaxes(part.v_BLHP, 1, 2).astype(dtype), each_token)
        seen = Chunk(
            q_BHQRN=turned(q_BQRGN, q_bias_HQRN, sin_BHQN, cos_BHQN, planes).astype(narrow),
            k_BHQRN=turned(k_BQRGN, k_bias_HQRN, sin_BHQN, cos_BHQN, planes).astype(narrow),
            x_BHQRP=x_BHQRP.astype(narrow),
            log_a_BHQ=jnp.swapaxes(part.log_a_BLH, 1, 2),
            gamma_BHQ=jnp.swapaxes(gamma_BQH, 1, 2),
            kappa_BHQ=jnp.swapaxes(kappa_BQH, 1, 2),
            within_BQQ=within_BQQ,
            carried_BQ=carried_BQ,
        )
        y_BHQRP, h_BHPN = core(seen, h_BHPN)
        gate_BHQP = None if part.gate_BLHP is None else jnp.swapaxes(part.gate_BLHP, 1, 2)
        y_BHQP = finish(y_BHQRP, x_BHQRP, gate_BHQP, each_token)
        return (finite(turns), h_BHPN), jnp.swapaxes(y_BHQP, 1, 2).astype(tokens.v_BLHP.dtype)

    h_BHPN = incoming(state, first_BH, heads)
    h_BHPN = jnp.where(jnp.isfinite(state.angle_BHS).all(axis=-1)[..., None, None], h_BHPN, jnp.nan)
    carry = (finite(angles.from_radians(state.angle_BHS, step)), to_planes(h_BHPN, planes, rotation))
    body = jax.checkpoint(body, prevent_cse=False)
    (turns, h_BHPN), y_CBQHP = jax.lax.scan(body, carry, per_chunk)

    y_BLHP = jnp.swapaxes(y_CBQHP, 0, 1).reshape(-1, n_chunks * chunk, n_heads, width)[:, :length]
    h_BHPN = from_planes(h_BHPN, planes, rotation)
    return y_BLHP, last_state(tokens, heads, angles.to_radians(turns), h_BHPN, rotation)


def finite(turns):
    """Replaces angles that are not finite by 0 between chunks.

    The state between chunks is NaN with them and ends where a document starts; NaN in the next chunk's keys would not.
    """
    return jax.tree.map(lambda turns_BHS: jnp.where(jnp.isfinite(turns_BHS), turns_BHS, 0), turns)


def incoming(state: State, first_BH, heads: Heads):
    """The state before the row, natural order, with what token 0 adds for the token before it (see `trapezoid`)."""
    before_BHRN = jnp.swapaxes(state.k_BRHN, 1, 2).astype(first_BH.dtype)
    x_BHRP = ranked(state.v_BHP.astype(first_BH.dtype), heads)
    return state.ssm_BHPN + first_BH[..., None, None] * outer(x_BHRP, before_BHRN)


def last_state(tokens: Tokens, heads: Heads, angle_BHS, h_BHPN, rotation: str) -> State:
    """What the row leaves, from the last angle (radians) and `h_BHPN`."""
    n_heads = tokens.v_BLHP.shape[2]
    k_BHRN = per_head(tokens.k_BLRGN[:, -1], n_heads).astype(h_BHPN.dtype) + heads.k_bias_HRN
    k_BHRN = rotate(k_BHRN, angle_BHS[:, :, None], rotation).astype(tokens.k_BLRGN.dtype)
    return State(angle_BHS, h_BHPN, jnp.swapaxes(k_BHRN, 1, 2), tokens.v_BLHP[:, -1])


def turned(x_BQRGN, bias_HQRN, sin_BHQN, cos_BHQN, planes: int):
    """Queries or keys of a group as each of its heads sees them, biased and rotated: (B, H, Q, R, N), in plane order.

    Args:
        x_BQRGN: in plane order.
        bias_HQRN: in plane order; its Q axis has size 1.
        sin_BHQN, cos_BHQN: from `rotary.turn`.
        planes: S.
    """

    def biased(x_BQRGN, bias_HQRN):
        # Cast before the copies: the gradient sums over a group's heads in the accumulator's dtype.
        x_BGQRN = x_BQRGN.transpose(0, 3, 1, 2, 4).astype(sin_BHQN.dtype)
        return jnp.repeat(x_BGQRN, bias_HQRN.shape[0] // x_BGQRN.shape[1], axis=1) + bias_HQRN

    turned_BHQRN = biased(x_BQRGN, bias_HQRN) * cos_BHQN[:, :, :, None]
    other_BHQRN = biased(partner(x_BQRGN, planes), partner(bias_HQRN, planes))
    return turned_BHQRN + other_BHQRN * sin_BHQN[:, :, :, None]


def _split(array_BL, n_chunks: int, chunk: int):
    """(B, L, ...) -> (C, B, Q, ...), zeros after the end: dt = 0 and log_a = 0 leave the state as it is."""
    padding = n_chunks * chunk - array_BL.shape[1]
    array_BL = jnp.pad(array_BL, [(0, padding if axis == 1 else 0) for axis in range(array_BL.ndim)])
    return jnp.swapaxes(array_BL.reshape(-1, n_chunks, chunk, *array_BL.shape[2:]), 0, 1)


def documents(start_BQ, chunk: int):
    """`Chunk.within_BQQ`, and the document starts in the chunk up to each token (None: no starts in any row)."""
    causal_QQ = jnp.tril(jnp.ones((chunk, chunk), bool))
    if start_BQ is None:
        return causal_QQ[None], None
    document_BQ = jnp.cumsum(start_BQ.astype(jnp.int32), axis=-1)
    return causal_QQ & (document_BQ[:, :, None] == document_BQ[:, None, :]), document_BQ
