"""What backends compute in plain XLA around their kernels: documents, log decays, states before splits, operands."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ssm.angle import Along, before_device
from pallas_kernels.ssm.contract import (
    Carry,
    Row,
    Scanned,
    Weights,
    cast,
    cut,
    empty_carry,
    heads_first,
    ordered,
    pad,
    sizes_of,
)
from pallas_kernels.ssm.order import Order

STEEPEST = -104.0  # exp(-104) is 0 in float32, so steeper steps decay no more than this


def documents(start_BL, tokens: int | None = None):
    """Count the document starts up to each token, int32, in its row or in its chunk of `tokens`; None stays None."""
    if start_BL is None:
        return None
    starts_BCQ = start_BL.astype(jnp.int32).reshape(start_BL.shape[0], -1, tokens or start_BL.shape[1])
    return jnp.cumsum(starts_BCQ, axis=2).reshape(start_BL.shape)


def documents_in_chunks(document_BL, tokens: int):
    """Count the document starts in each token's chunk up to the token, from the counts in its row; None stays None."""
    if document_BL is None:
        return None
    document_BCQ = document_BL.reshape(document_BL.shape[0], -1, tokens)
    before_BC = jnp.pad(document_BCQ[:, :-1, -1], ((0, 0), (1, 0)))
    return (document_BCQ - before_BC[..., None]).reshape(document_BL.shape)


def log_decay(log_a_BHL, start_BL, tokens: int):
    """Return c_t = sum_{s <= t} log_a_s from the first token of a chunk, or of its document in it, as exact + rest.

    Differences of plain float32 sums would lose the digits of a gentle decay after steep ones; multiples of a grid add
    up exactly. A sum that began earlier would let the gradient of one document reach another's log_a.

    Args:
        log_a_BHL: the log decay of each step.
        start_BL: bool, true at the first token of a document; None: one document.
        tokens: in a chunk; L is a multiple of it.
    """
    batch, n_heads, length = log_a_BHL.shape
    within_EQQ = jnp.tril(jnp.ones((tokens, tokens), bool))[None]
    if start_BL is not None:
        document_EQ = documents(start_BL, tokens).reshape(-1, tokens)
        within_EQQ = within_EQQ & (document_EQ[:, :, None] == document_EQ[:, None, :])
    log_a_BCHQ = jnp.swapaxes(log_a_BHL.reshape(batch, n_heads, -1, tokens), 1, 2)
    log_a_EHQ = jnp.maximum(log_a_BCHQ.reshape(-1, n_heads, tokens), STEEPEST)
    step = 2.0 ** (math.ceil(math.log2(-STEEPEST * tokens)) - 24)
    exact_EHQ = lax.stop_gradient(jnp.round(log_a_EHQ / step) * step)

    def summed(part_EHQ):
        sum_EHQ = jnp.einsum("ets,ehs->eht", within_EQQ.astype(jnp.float32), part_EHQ, precision="highest")
        return jnp.swapaxes(sum_EHQ.reshape(log_a_BCHQ.shape), 1, 2).reshape(batch, n_heads, length)

    return summed(exact_EHQ), summed(log_a_EHQ - exact_EHQ)


def combine_splits(first_BHPN, decay_BHZ, added_BHZPN, along: Along | None = None, backwards: bool = False):
    """Solve h_z = decay_z h_{z-1} + added_z; return the states before every split, and the one after the last.

    Args:
        first_BHPN: the state before the first split. With `along`, the state that the run before ends with is added to
            it; the first run has none before it.
        decay_BHZ: of the splits on this device.
        added_BHZPN: of the splits on this device.
        along: how rows go on over devices; None: they do not.
        backwards: runs follow one another from the last to the first.
    """
    if along is not None:
        _, end_BHPN = combine_splits(first_BHPN, decay_BHZ, added_BHZPN)
        first_BHPN = first_BHPN + before_device(jnp.prod(decay_BHZ, axis=2), end_BHPN, along, backwards)
    decay_BHZ = jnp.pad(decay_BHZ, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)
    states_BHZPN = jnp.concatenate([first_BHPN[:, :, None], added_BHZPN], axis=2)

    def compose(first, second):
        return first[0] * second[0], second[0][..., None, None] * first[1] + second[1]

    _, states_BHZPN = lax.associative_scan(compose, (decay_BHZ, states_BHZPN), axis=2)
    return states_BHZPN[:, :, :-1], states_BHZPN[:, :, -1]


class TokenArrays(NamedTuple):
    """The arrays that kernels read in the op's own layout, in the dtype of products; None: absent, or not read."""

    q_BLRGN: jax.Array | None
    k_BLRGN: jax.Array | None
    v_BLHP: jax.Array | None
    gate_BLHP: jax.Array | None


class Operands(NamedTuple):
    """A row as the GPU kernels want it, or its gradients: L is whole chunks, and P, N and S are padded.

    All floating-point arrays but those of `tokens` are float32.
    """

    tokens: TokenArrays
    angle_BLHS: jax.Array | None  # radians per unit dt, H may be 1; None, as dt and the angle before: nothing rotates
    dt_BHL: jax.Array | None
    log_decay_BHL: jax.Array  # c, since the first token of the chunk, or of its document in the chunk
    # If q, k and v are float32, c is the sum of log decay and this rest, whose differences are taken apart; else None.
    decay_rest_BHL: jax.Array | None
    gamma_BHL: jax.Array
    kappa_BHL: jax.Array | None  # None: gamma
    document_BL: jax.Array | None  # int32, document starts in the row up to each token; None: one document
    before: Carry
    weights: Weights

    @property
    def n_heads(self) -> int:
        """Return H."""
        return self.tokens.v_BLHP.shape[2]


def operands_of(row: Row, order: Order, *, dtype, sizes: dict[str, int], tokens: int) -> Operands:
    """Return the operands of a row.

    Args:
        row: as a backend is given it.
        order: of the kernels' N.
        dtype: of products.
        sizes: the sizes to pad to, by letter.
        tokens: in a chunk.
    """
    given = {name: cast(getattr(row, name), dtype) for name in TokenArrays._fields}
    row = ordered(pad(row._replace(before=row.before or empty_carry(row), **given), **sizes), order.to)
    exact_BHL, rest_BHL = log_decay(heads_first(row.log_a_BLH), row.start_BL, tokens)
    if dtype != jnp.float32:  # products then have fewer digits than the two parts
        exact_BHL, rest_BHL = exact_BHL + rest_BHL, None
    return Operands(
        tokens=TokenArrays(**{name: getattr(row, name) for name in TokenArrays._fields}),
        angle_BLHS=row.angle_BLHS,
        dt_BHL=heads_first(row.dt_BLH),
        log_decay_BHL=exact_BHL,
        decay_rest_BHL=rest_BHL,
        gamma_BHL=heads_first(row.gamma_BLH),
        kappa_BHL=heads_first(row.kappa_BLH),
        document_BL=documents(row.start_BL),
        before=row.before,
        weights=row.weights,
    )


def scanned(row: Row, order: Order, o_BLHP, after: Carry) -> Scanned:
    """Return `Scanned` from the kernels' output and state, which are padded and in the kernels' order of N."""
    size = sizes_of(row)
    o_BLHP = o_BLHP[:, : size["L"], :, : size["P"]].astype(row.v_BLHP.dtype)
    after = cut(ordered(after, order.back), P=size["P"], S=size["S"])
    return Scanned(o_BLHP=o_BLHP, after=after, k_BRGN=row.k_BLRGN[:, -1], v_BHP=row.v_BLHP[:, -1])
