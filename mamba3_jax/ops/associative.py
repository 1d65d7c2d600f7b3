"""The recurrence as a parallel prefix: `jax.lax.associative_scan` over the tokens of a chunk."""

import jax
import jax.numpy as jnp

from mamba3_jax.ops.scan_chunks import Chunk, over_chunks
from mamba3_jax.ops.types import Heads, State, Tokens

CHUNK = 32  # the states of all tokens of a chunk exist at once: Q x P x N for each head


def associative(tokens: Tokens, heads: Heads, state: State | None, *, rotation: str, chunk: int | None = None):
    """(a_2, b_2) o (a_1, b_1) = (a_2 a_1, a_2 b_1 + b_2) composes steps g_t = a_t g_{t-1} + kappa_t x_t k_t^T.

    g_t is the state with all that token t adds to it, now and at the next step (`discretize.later_weight`). So
    h_t = a_t g_{t-1} + gamma_t x_t k_t^T and y_t = h_t q_t.
    """
    return over_chunks(_core, tokens, heads, state, rotation=rotation, chunk=chunk or CHUNK)


def _core(part: Chunk, h_BHPN):
    dtype = h_BHPN.dtype
    k_BHQRN, x_BHQRP = part.k_BHQRN.astype(dtype), part.x_BHQRP.astype(dtype)
    a_BHQ = jnp.exp(part.log_a_BHQ)
    if part.carried_BQ is not None:  # a document's first token sees nothing before it
        first_BQ = ~jnp.pad(jnp.diagonal(part.within_BQQ, -1, 1, 2), ((0, 0), (1, 0)), constant_values=True)
        first_BQ = first_BQ.at[:, 0].set(~part.carried_BQ[:, 0])
        a_BHQ = jnp.where(first_BQ[:, None], 0, a_BHQ)

    outer_BHQPN = jnp.einsum("bhqrp,bhqrn->bhqpn", x_BHQRP, k_BHQRN, precision="highest")
    added_BHQPN = part.later_BHQ[..., None, None] * outer_BHQPN
    added_BHQPN = added_BHQPN.at[:, :, 0].add(a_BHQ[:, :, 0, None, None] * h_BHPN)

    def compose(first, second):
        return first[0] * second[0], second[0][..., None, None] * first[1] + second[1]

    _, g_BHQPN = jax.lax.associative_scan(compose, (a_BHQ, added_BHQPN), axis=2)
    if part.q_BHQRN is None:
        return None, g_BHQPN[:, :, -1]
    before_BHQPN = jnp.concatenate([h_BHPN[:, :, None], g_BHQPN[:, :, :-1]], axis=2)
    h_BHQPN = a_BHQ[..., None, None] * before_BHQPN + part.gamma_BHQ[..., None, None] * outer_BHQPN
    q_BHQRN = part.q_BHQRN.astype(dtype)
    return jnp.einsum("bhqpn,bhqrn->bhqrp", h_BHQPN, q_BHQRN, precision="highest"), g_BHQPN[:, :, -1]
