"""Next-token cross entropy as sums over tokens: from logits, or from features without ever holding all the logits."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

from mamba3_jax.ops.einsum import product
from mamba3_jax.ops.look_up import WHOLE, Split
from mamba3_jax.ops.sharded import axes_of, size_of, undivided

# The largest sum of exp(logit - logit[target]) that is used: that of a target less likely than e^-41 is larger.
REACH = 2.0**60
TILE = 2**29  # logits that exist at once on a device: 2 GiB in float32, 4,186 tokens of a vocabulary of 128,256


class Sums(NamedTuple):
    """Weighted sums over tokens, float32 scalars. Add those of several batches; divide by `weight` for means."""

    nll: jax.Array  # -log p(target), nats
    z: jax.Array  # (log sum exp of the logits)^2
    correct: jax.Array  # 1 where the likeliest id is the target
    weight: jax.Array


class Scores(NamedTuple):
    """How well the logits of each token predict its target."""

    log_z_BL: jax.Array  # log sum exp of the logits, float32
    nll_BL: jax.Array  # -log p(target), nats, float32; NaN for a target that is not in the vocabulary
    correct_BL: jax.Array  # bool: the first of the largest logits is the target's


def scores(logits_BLV, targets_BL, vocab_size: int) -> Scores:
    """Score every target: nll = log Z - logit[target],  log Z = log sum_v exp(logit[v]).

    v runs over the whole padded vocabulary, as in the official code: the padding columns are ids that never occur,
    which the model learns. NaN logits are never correct.

    Args:
        logits_BLV: of any float dtype; the scores are computed in float32.
        targets_BL: integers. The nll of one that is not in [0, vocab_size) is NaN.
        vocab_size: how many columns of the logits are ids; the others are padding.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    # Look up by comparison: one pass finds sum, target and place, and columns split over devices stay where they are.
    columns_V = jnp.arange(logits_BLV.shape[-1])
    largest_BL1 = jax.lax.stop_gradient(jnp.max(logits_BLV, axis=-1, keepdims=True))
    log_z_BL = jnp.log(jnp.sum(jnp.exp(logits_BLV - largest_BL1), axis=-1)) + largest_BL1[..., 0]
    target_BL = jnp.sum(jnp.where(columns_V == targets_BL[..., None], logits_BLV, 0), axis=-1)
    first_BL = jnp.min(jnp.where(logits_BLV == largest_BL1, columns_V, columns_V.size), axis=-1)
    return _scored(log_z_BL, log_z_BL - target_BL, first_BL == targets_BL, targets_BL, vocab_size)


def _scored(log_z_BL, nll_BL, first, targets_BL, vocab_size: int) -> Scores:
    """Return `Scores`, NaN for targets that are no ids. `first`: the target's is the first of the largest logits."""
    known_BL = (targets_BL >= 0) & (targets_BL < vocab_size)
    return Scores(log_z_BL, jnp.where(known_BL, nll_BL, jnp.nan), known_BL & first & ~jnp.isnan(log_z_BL))


class Relative(NamedTuple):
    """A token's logits relative to its target's, and what follows from them."""

    e_BLV: jax.Array  # exp(logit - logit[target]), float32; XLA computes it only where it is used
    sum_BL: jax.Array
    places_BL: jax.Array  # the target's column
    scores: Scores


def relative(logits_BLV, targets_BL, vocab_size: int) -> Relative:
    """Score as `scores` does, relative to the target's logit and not to the largest: nll = log sum exp(logit - target).

    The target's logit is known before any pass over the logits, so one pass is enough, and nll is exact where p(target)
    is near 1. The sum overflows where a target is less likely than e^-88 (see `REACH`).
    """
    columns_V = jnp.arange(logits_BLV.shape[-1])
    places_BL = jnp.clip(targets_BL, 0, columns_V.size - 1)
    target_BL1 = jnp.take_along_axis(logits_BLV, places_BL[..., None], axis=-1)
    above_BLV = logits_BLV - target_BL1
    e_BLV = jnp.exp(above_BLV)
    sum_BL = jnp.sum(e_BLV, axis=-1)
    before_BLV = columns_V < places_BL[..., None]
    beaten_BL = jnp.any((above_BLV > 0) | ((above_BLV == 0) & before_BLV), axis=-1)
    log_sum_BL = jnp.log(sum_BL)
    found = _scored(log_sum_BL + target_BL1[..., 0], log_sum_BL, ~beaten_BL, targets_BL, vocab_size)
    return Relative(e_BLV, sum_BL, places_BL, found)


def sums(logits_BLV, targets_BL, weights_BL, vocab_size: int) -> Sums:
    """Sum `scores` over tokens by weight. A token of weight 0 does not count, whatever its logits and target are."""
    return added(scores(logits_BLV, targets_BL, vocab_size), weights_BL)


def added(scores: Scores, weights_BL) -> Sums:
    """Sum scores over tokens by weight; a weight of 0 times NaN is 0."""

    def total(x_BL):
        return jnp.sum(jnp.where(weights_BL == 0, 0.0, weights_BL * x_BL))

    return Sums(total(scores.nll_BL), total(scores.log_z_BL**2), total(scores.correct_BL), jnp.sum(weights_BL))


def objective(parts: Sums, z_loss: float):
    """Return nll + z_loss * z: the loss that is minimised, times the weight. The second term keeps log Z near 0."""
    return parts.nll + z_loss * parts.z


@functools.partial(jax.custom_vjp, nondiff_argnames=("vocab_size", "z_loss", "tiles", "split"))
def linear_cross_entropy(
    x_BLD,
    head_DV,
    targets_BL,
    weights_BL,
    vocab_size: int,
    z_loss: float = 0.0,
    tiles: int | None = None,
    split: Split = WHOLE,
) -> tuple[jax.Array, Sums]:
    """Return (objective, sums) of logits = x head, which are computed for one tile of the length at a time.

    The gradient of the objective is formed in the forward pass, while a tile's logits exist:

        dlogit[v] = w (p[v] (1 + 2 z_loss log Z) - [v = target]),  dx = dlogit head^T,  dhead = sum_t x_t^T dlogit_t

    So logits are computed once, and the backward pass multiplies the gradients by a number. Products run in x's dtype
    with float32 sums; products of float32 are true float32. A factor of dlogit that all v share is applied to dx and to
    the features, not to dlogit; dlogit and these features are rounded to x's dtype. Beside the gradients, the logits of
    one tile are held in memory. (The idea is Liger's and jax-linear-attention's.)

    Columns that are split over a mesh axis stay split: dx and a few numbers for each token cross that axis. Each device
    takes its own rows. It gathers the head once, in x's dtype, and the head's gradient is summed over devices once, in
    float32, not for every tile.

    Args:
        x_BLD: features, float32 or bfloat16.
        head_DV: float32, one column an id; its gradient is float32 and is summed over tiles in it.
        targets_BL: as in `scores`.
        weights_BL: float32; neither the weights nor the sums have a gradient.
        vocab_size: how many columns are ids.
        z_loss: see `objective`.
        tiles: how many parts the length is cut into; None: as few as keep a device's logits within `TILE`.
        split: how rows, length and the head's D and V lie on the mesh in context (`jax.set_mesh`).

    Returns:
        The objective, a float32 scalar, and the `Sums`.
    """

    def score(x_BLD, head_DV, targets_BL, weights_BL, total):
        def tile(x_BLD, targets_BL, weights_BL):
            return sums(_logits(x_BLD, head_DV), targets_BL, weights_BL, vocab_size), ()

        return total(_over_tiles(tile, tiles, head_DV, (x_BLD, targets_BL, weights_BL))[0]), None, None

    parts, _, _ = _by_rows(score, split, x_BLD, head_DV.astype(x_BLD.dtype), targets_BL, weights_BL)
    return objective(parts, z_loss), parts


def _forward(x_BLD, head_DV, targets_BL, weights_BL, vocab_size, z_loss, tiles, split):
    own = functools.partial(_own_rows, vocab_size=vocab_size, z_loss=z_loss, tiles=tiles, out=head_DV.dtype)
    found = _by_rows(own, split, x_BLD, head_DV.astype(x_BLD.dtype), targets_BL, weights_BL)
    parts, dhead_DV, dx_BLD = found
    # XLA for CPU (jax 0.10.2) aborts in a transposed bfloat16 product that is summed into float32.
    return (objective(parts, z_loss), parts), (dx_BLD, jax.lax.optimization_barrier(dhead_DV))


def _by_rows(run, split: Split, x_BLD, head_DV, targets_BL, weights_BL):
    """Run `run` on each device's rows with the whole of D; XLA divides the vocabulary.

    `run` takes the arrays and `total`, a function that sums over the rows of all devices. It returns sums, dhead_DV or
    None, and dx_BLD or None.
    """
    rows = (*axes_of(split.batch), *axes_of(split.length))
    if undivided(*rows) or x_BLD.shape[0] % size_of(split.batch) or x_BLD.shape[1] % size_of(split.length):
        return run(x_BLD, head_DV, targets_BL, weights_BL, total=lambda parts: parts)

    def by_columns(move, array_DV):
        """Apply `move` to each device's own columns: XLA would first gather the columns that it divides."""
        spec = Spec(None, split.vocab)
        run = functools.partial(jax.shard_map, in_specs=spec, out_specs=spec, axis_names={split.vocab}, check_vma=False)
        return run(move)(array_DV) if split.vocab else move(array_DV)

    def gathered(head_DV):
        return jax.lax.all_gather(head_DV, split.width, axis=0, tiled=True) if split.width else head_DV

    def own(x_BLD, head_DV, targets_BL, weights_BL):
        head_DV = by_columns(gathered, head_DV)
        total = lambda parts: jax.lax.psum(parts, rows)  # noqa: E731
        parts, dhead_DV, dx_BLD = run(x_BLD, head_DV, targets_BL, weights_BL, total=total)
        return parts, jax.tree.map(functools.partial(by_columns, over_rows), dhead_DV), dx_BLD

    def over_rows(dhead_DV):
        if split.width:
            dhead_DV = jax.lax.psum_scatter(dhead_DV, split.width, scatter_dimension=0, tiled=True)
        others = tuple(axis for axis in rows if axis != split.width)
        return jax.lax.psum(dhead_DV, others) if others else dhead_DV

    by_token, of_head = Spec(split.batch, split.length), Spec(split.width)
    specs = {"in_specs": (by_token, of_head, by_token, by_token), "out_specs": (Spec(), of_head, by_token)}
    over = jax.shard_map(own, **specs, axis_names={*rows}, check_vma=False)
    return over(x_BLD, head_DV, targets_BL, weights_BL)


def _own_rows(x_BLD, narrow_DV, targets_BL, weights_BL, *, vocab_size, z_loss, tiles, out, total):
    """Return (sums, dhead_DV in `out`, dx_BLD) of a device's rows; `total` sums over the rows of all devices."""
    dtype = x_BLD.dtype
    arrays = (x_BLD, targets_BL, weights_BL)

    def near(x_BLD, targets_BL, weights_BL):
        """Form dlogit = w z / sum (exp(logit - logit[target]) - [v = target] sum / z),  z = 1 + 2 z_loss log Z.

        The factor w z / sum, the same for all v, is left to the two products. So the exponentials can be written in the
        pass that sums them.
        """
        found = relative(_logits(x_BLD, narrow_DV), targets_BL, vocab_size)
        by_z_BL = 1 + 2 * z_loss * found.scores.log_z_BL
        rows_BL, length_BL = jnp.indices(targets_BL.shape)
        e_BLV = found.e_BLV.astype(dtype)
        at_target_BL = (1 - found.sum_BL / by_z_BL).astype(dtype)
        e_BLV = e_BLV.at[rows_BL, length_BL, found.places_BL].set(at_target_BL, unique_indices=True)
        scale_BL1 = (weights_BL * by_z_BL / found.sum_BL)[..., None]
        dx_BLD = (scale_BL1 * product("blv,dv->bld", e_BLV, narrow_DV, jnp.float32)).astype(dtype)
        scaled_BLD = (scale_BL1 * x_BLD.astype(jnp.float32)).astype(dtype)
        dhead_DV = product("bld,blv->dv", scaled_BLD, e_BLV, out)
        fit = jnp.all((found.sum_BL < REACH) & (by_z_BL > 1 / REACH))
        return (added(found.scores, weights_BL), dhead_DV, (~fit).astype(jnp.int32)), dx_BLD

    def far(narrow_DV, x_BLD, targets_BL, weights_BL):
        """Form dlogit as `linear_cross_entropy` defines it, from any logits; it is 0 where a token's weight is 0."""
        logits_BLV = _logits(x_BLD, narrow_DV)
        found = scores(logits_BLV, targets_BL, vocab_size)
        weight_BL1, log_z_BL1 = weights_BL[..., None], found.log_z_BL[..., None]
        p_BLV = jnp.exp(logits_BLV - log_z_BL1) * (1 + 2 * z_loss * log_z_BL1)
        hit_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
        dlogits_BLV = jnp.where(weight_BL1 == 0, 0.0, weight_BL1 * (p_BLV - hit_BLV)).astype(dtype)
        dx_BLD = product("blv,dv->bld", dlogits_BLV, narrow_DV, dtype)
        dhead_DV = product("bld,blv->dv", x_BLD, dlogits_BLV, out)
        return (added(found, weights_BL), dhead_DV), dx_BLD

    def anew(narrow_DV, *arrays):
        return _over_tiles(functools.partial(far, narrow_DV), tiles, narrow_DV, arrays)

    (*found, beyond), dx_BLD = _over_tiles(near, tiles, narrow_DV, arrays)
    near_enough = total(beyond) == 0  # over all rows, so that every device takes the same branch
    (parts, dhead_DV), dx_BLD = _unless(near_enough, (tuple(found), dx_BLD), anew, narrow_DV, *arrays)
    return total(parts), dhead_DV, dx_BLD


def _unless(holds, found, anew, *arguments):
    """Return `found` where `holds`, else `anew(*arguments)`.

    Under `vmap` a `cond` whose predicate differs by member computes both branches for every member, always. Here all
    members have one `cond`, and what `anew` computes is computed only if one of them wants it.
    """

    @jax.custom_batching.custom_vmap
    def choose(holds, found, arguments):
        return jax.lax.cond(holds, lambda: found, lambda: anew(*arguments))

    @choose.def_vmap
    def choose_by_member(members, are_batched, *given):
        def by_member(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (members, *x.shape))

        def own(holds, found, arguments):
            return jax.tree.map(functools.partial(jnp.where, holds), found, anew(*arguments))

        holds, found, arguments = jax.tree.map(by_member, given, tuple(are_batched))
        chosen = jax.lax.cond(jnp.all(holds), lambda: found, lambda: jax.vmap(own)(holds, found, arguments))
        return chosen, jax.tree.map(lambda _: True, chosen)

    return choose(holds, found, arguments)


def _backward(vocab_size, z_loss, tiles, split, gradients, cotangent):
    d_objective, _ = cotangent
    dx_BLD, dhead_DV = ((d_objective * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)
    return dx_BLD, dhead_DV, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def _over_tiles(tile, tiles: int | None, head_DV, arrays):
    """Sum `tile(*arrays)[0]` over tiles of the length, and concatenate its other results, (B, L, ...)."""
    (batch, length), vocab = arrays[0].shape[:2], head_DV.shape[-1]
    if tiles is None:
        mesh = jax.sharding.get_abstract_mesh()
        left = [size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes]  # axes that XLA divides
        tiles = -(-batch * length * vocab // (TILE * math.prod(left)))
    each = -(-length // max(1, min(tiles, length)))
    tiles = -(-length // each)
    if tiles == 1:
        return tile(*arrays)

    def cut(array):
        # Tokens of weight 0 fill the last tile. A tile has a part of every row, so that rows stay on their devices.
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


def _logits(x_BLD, head_DV):
    return product("bld,dv->blv", x_BLD, head_DV, jnp.float32)
