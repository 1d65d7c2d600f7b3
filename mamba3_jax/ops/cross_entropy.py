"""Next-token cross entropy as sums over tokens, from logits or, without ever holding them all, from features."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.ops.einsum import product

TILE = 2**29  # logits that exist at a time on a device: 2 GiB in float32, 4,186 tokens of a vocabulary of 128,256


class Sums(NamedTuple):
    """Weighted sums over tokens, float32 scalars: batches of unequal weight add up. Divide by `weight` for means."""

    nll: jax.Array  # -log p(target), nats
    z: jax.Array  # (log sum exp of the logits)^2
    correct: jax.Array  # the likeliest id is the target
    weight: jax.Array


class Scores(NamedTuple):
    """What a token's logits say of its target, float32."""

    log_z_BL: jax.Array  # log sum exp of the logits
    nll_BL: jax.Array  # -log p(target), nats; NaN for a target that is not in the vocabulary
    correct_BL: jax.Array  # the first of the largest logits is the target's


def scores(logits_BLV, targets_BL, vocab_size: int) -> Scores:
    """Score every target: nll = log Z - logit[target],  log Z = log sum_v exp(logit[v]).

    v runs over the whole padded vocabulary, as in the official code: the padding columns are ids that never occur, and
    the model learns so. NaN logits are right about nothing.

    Args:
        logits_BLV: of any float dtype; what is computed of them is float32.
        targets_BL: integers. One that is not in [0, vocab_size) has NaN for nll, whatever the look-up would find there.
        vocab_size: columns of the logits that are ids.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    # Look-ups by comparison: one pass finds sum, target and place, and columns split over devices stay where they are.
    columns_V = jnp.arange(logits_BLV.shape[-1])
    largest_BL1 = jax.lax.stop_gradient(jnp.max(logits_BLV, axis=-1, keepdims=True))
    log_z_BL = jnp.log(jnp.sum(jnp.exp(logits_BLV - largest_BL1), axis=-1)) + largest_BL1[..., 0]
    target_BL = jnp.sum(jnp.where(columns_V == targets_BL[..., None], logits_BLV, 0), axis=-1)
    first_BL = jnp.min(jnp.where(logits_BLV == largest_BL1, columns_V, columns_V.size), axis=-1)
    return _scored(log_z_BL, target_BL, first_BL, targets_BL, vocab_size)


def scores_in_one_pass(logits_BLV, targets_BL, vocab_size: int) -> Scores:
    """Score as `scores` does, without a gradient, in one reduction that carries all that is looked for.

    The sum of exponentials is kept relative to the largest logit so far: (m, s), (n, t) -> with m >= n, (m, s + t
    exp(n - m)). (Milakov and Gimelshein, 2018.) On an H200 a pass over a step's logits takes 4 ms, and `scores` is
    three of them: what its sum and its place are relative to has to be known first.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    columns_BLV = jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, logits_BLV.ndim - 1)
    at_target_BLV = jnp.where(columns_BLV == targets_BL[..., None], logits_BLV, 0)
    operands = (logits_BLV, jnp.ones_like(logits_BLV), columns_BLV, at_target_BLV)
    nothing = (jnp.float32(-jnp.inf), jnp.float32(0), jnp.int32(columns_BLV.shape[-1]), jnp.float32(0))

    def combine(left, right):
        (m, s, first, target), (n, t, later, other) = left, right
        here = ~(n > m)  # a NaN too: it goes on as the largest and as the sum
        less = jnp.exp(jnp.where(m == n, 0, -jnp.abs(m - n)))  # of two infinities no NaN
        total = jnp.where(here, s + t * less, s * less + t)
        first = jnp.where(m == n, jnp.minimum(first, later), jnp.where(here, first, later))
        return jnp.maximum(m, n), total, first, target + other

    reduced = jax.lax.reduce(operands, nothing, combine, (logits_BLV.ndim - 1,))
    largest_BL, sum_BL, first_BL, target_BL = reduced
    return _scored(jnp.log(sum_BL) + largest_BL, target_BL, first_BL, targets_BL, vocab_size)


def _scored(log_z_BL, target_BL, first_BL, targets_BL, vocab_size: int) -> Scores:
    """Return the scores of targets whose logit and whose row's first largest column are known."""
    known_BL = (targets_BL >= 0) & (targets_BL < vocab_size)
    correct_BL = known_BL & (first_BL == targets_BL) & ~jnp.isnan(log_z_BL)
    return Scores(log_z_BL, jnp.where(known_BL, log_z_BL - target_BL, jnp.nan), correct_BL)


def sums(logits_BLV, targets_BL, weights_BL, vocab_size: int) -> Sums:
    """Sum `scores` over tokens by weight; a token of weight 0 does not count whatever its logits and target."""
    return added(scores(logits_BLV, targets_BL, vocab_size), weights_BL)


def added(scores: Scores, weights_BL) -> Sums:
    """Sum over tokens; where the weight is 0, 0 times NaN is 0."""

    def total(x_BL):
        return jnp.sum(jnp.where(weights_BL == 0, 0.0, weights_BL * x_BL))

    return Sums(total(scores.nll_BL), total(scores.log_z_BL**2), total(scores.correct_BL), jnp.sum(weights_BL))


def objective(parts: Sums, z_loss: float):
    """Return what is minimised, times the weight: nll + z_loss * z. The second term keeps log Z near 0."""
    return parts.nll + z_loss * parts.z


@functools.partial(jax.custom_vjp, nondiff_argnames=("vocab_size", "z_loss", "tiles"))
def linear_cross_entropy(
    x_BLD, head_DV, targets_BL, weights_BL, vocab_size: int, z_loss: float = 0.0, tiles: int | None = None
) -> tuple[jax.Array, Sums]:
    """(objective, sums) of logits = x head, of which only those of a tile of every row exist at a time.

    The gradient of the objective is formed in the forward pass, while a tile's logits are there:

        dlogit[v] = w (p[v] (1 + 2 z_loss log Z) - [v = target]),  dx = dlogit head^T,  dhead = sum_t x_t^T dlogit_t

    so logits are computed once and the backward pass multiplies by a number. Products run in x's dtype with float32
    sums (float32: true float32 products); dlogit is rounded to x's dtype before its two. Beside the gradients, memory
    is a tile's logits. Columns split over a mesh axis stay split: a few numbers a token cross it, and dx.
    (The idea is Liger's and jax-linear-attention's.)

    Args:
        x_BLD: features, float32 or bfloat16.
        head_DV: float32, one column an id; its gradient is float32 and is summed over tiles in it.
        targets_BL: as in `scores`.
        weights_BL: float32; neither it nor the sums have a gradient.
        vocab_size: columns that are ids.
        z_loss: see `objective`.
        tiles: how many parts the length is cut into; None: as few as keep a device's logits within `TILE`.

    Returns:
        The objective, a float32 scalar, and the `Sums`.
    """
    head_DV = head_DV.astype(x_BLD.dtype)

    def tile(x_BLD, targets_BL, weights_BL):
        return added(_scores(_logits(x_BLD, head_DV), targets_BL, vocab_size), weights_BL), ()

    parts, _ = _over_tiles(tile, tiles, head_DV, x_BLD, targets_BL, weights_BL)
    return objective(parts, z_loss), parts


def _forward(x_BLD, head_DV, targets_BL, weights_BL, vocab_size, z_loss, tiles):
    dtype = x_BLD.dtype
    narrow_DV = head_DV.astype(dtype)

    def tile(x_BLD, targets_BL, weights_BL):
        logits_BLV = _logits(x_BLD, narrow_DV)
        found = _scores(logits_BLV, targets_BL, vocab_size)
        weight_BL1, log_z_BL1 = weights_BL[..., None], found.log_z_BL[..., None]
        p_BLV = jnp.exp(logits_BLV - log_z_BL1) * (1 + 2 * z_loss * log_z_BL1)
        hit_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
        # A token without weight has none of its logits' NaN.
        dlogits_BLV = jnp.where(weight_BL1 == 0, 0.0, weight_BL1 * (p_BLV - hit_BLV)).astype(dtype)
        dx_BLD = product("blv,dv->bld", dlogits_BLV, narrow_DV, dtype)
        dhead_DV = product("bld,blv->dv", x_BLD, dlogits_BLV, head_DV.dtype)
        return (added(found, weights_BL), dhead_DV), dx_BLD

    (parts, dhead_DV), dx_BLD = _over_tiles(tile, tiles, head_DV, x_BLD, targets_BL, weights_BL)
    # XLA for CPU (jax 0.10.2) dies of a transposed bfloat16 product that is summed into float32.
    return (objective(parts, z_loss), parts), (dx_BLD, jax.lax.optimization_barrier(dhead_DV))


def _backward(vocab_size, z_loss, tiles, gradients, cotangent):
    d_objective, _ = cotangent
    dx_BLD, dhead_DV = ((d_objective * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)
    return dx_BLD, dhead_DV, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def _over_tiles(tile, tiles: int | None, head_DV, *arrays):
    """Sum `tile(*arrays)[0]` over tiles of the length, and put its other results (B, L, ...) together again."""
    (batch, length), vocab = arrays[0].shape[:2], head_DV.shape[-1]
    if tiles is None:
        mesh = jax.sharding.get_abstract_mesh()
        tiles = -(-batch * length * vocab // (TILE * max(mesh.size, 1)))
    each = -(-length // max(1, min(tiles, length)))
    tiles = -(-length // each)
    if tiles == 1:
        return tile(*arrays)

    def cut(array):
        # Filled up by tokens of weight 0. Rows stay whole, so that each stays on its device.
        padded = jnp.pad(array, [(0, 0), (0, tiles * each - length), *[(0, 0)] * (array.ndim - 2)])
        return jnp.moveaxis(padded.reshape(batch, tiles, each, *array.shape[2:]), 1, 0)

    def whole(array):
        return jnp.moveaxis(array, 0, 1).reshape(batch, tiles * each, *array.shape[3:])[:, :length]

    def add(total, arrays):
        part, rest = tile(*arrays)
        return jax.tree.map(jnp.add, total, part), rest

    arrays = tuple(map(cut, arrays))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tile, *(x[0] for x in arrays))[0])
    total, rest = jax.lax.scan(add, zeros, arrays)
    return total, jax.tree.map(whole, rest)


def _scores(logits_BLV, targets_BL, vocab_size: int) -> Scores:
    """Score by what is fastest on the platform: XLA for CPU makes loops of one number at a time of the one pass."""
    by = {"cuda": scores_in_one_pass, "default": scores}
    by = {name: functools.partial(function, vocab_size=vocab_size) for name, function in by.items()}
    return jax.lax.platform_dependent(logits_BLV, targets_BL, **by)


def _logits(x_BLD, head_DV):
    return product("bld,dv->blv", x_BLD, head_DV, jnp.float32)
