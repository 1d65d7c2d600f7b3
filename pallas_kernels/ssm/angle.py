"""Angles as fractions of a turn, whose sums are exact: the functions that the kernels of several backends share.

A turn is 2 pi. As 32-bit integers, fractions of a turn add up exactly, in any order and in any number, and overflow is
the modulo. The increments angle dt are sums of products of 12-bit pieces, which are exact in float32 whether or not a
compiler fuses them with a sum.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

INVERSE_TURN = 1 / (2 * math.pi)


def head(x):
    """Return the leading 12 bits of a float32's significand; x - head(x) is exact and has the other 12."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF, jnp.float32)


def _pieces(value: float) -> tuple[float, float, float]:
    """Split value = a + b + c, where a and b have 12 bits each."""
    scale = 2.0 ** (12 - math.frexp(value)[1])
    first = math.floor(value * scale) / scale
    second = math.floor((value - first) * scale * 4096) / (scale * 4096)
    return first, second, value - first - second


INVERSE_TURN_PIECES = _pieces(INVERSE_TURN)


def turns_in_pieces(angle):
    """Return angle / (2 pi) as its leading 12 bits, the next 12, and the rest, together good to 2^-47 of it."""
    first, second, third = INVERSE_TURN_PIECES
    angle_head = head(angle)
    angle_tail = angle - angle_head
    exact = [angle_head * first, angle_tail * first, angle_head * second]
    leading = head(exact[0])
    middle = [exact[0] - leading, exact[1], exact[2]]
    heads = [head(x) for x in middle]
    sum_ = (heads[0] + heads[1]) + heads[2]  # exact: they are small multiples of a common step
    middle_head = head(sum_)
    rest = sum(x - y for x, y in zip(middle, heads, strict=True))
    small = angle_tail * second + angle * third
    return leading, middle_head, (sum_ - middle_head) + (rest + small)


def rounded(x, step: float, interpret: bool):
    """Round to a multiple of a power of two, |x| < 2^22 steps, by two sums: Mosaic has no floor, Triton a slow one."""
    if interpret:  # XLA would make one sum of the two
        return jnp.round(x / step) * step
    shift = 1.5 * 2.0**23 * step
    return (x + shift) - shift


def to_fraction(angle):
    """Return an angle in radians as a 32-bit fraction of a turn, with the 24 bits of float32."""
    turns = angle * INVERSE_TURN
    return ((turns - jnp.floor(turns + 0.5)) * 2.0**31).astype(jnp.int32) * 2


def to_turns(fraction):
    """Return the leading 24 bits of a 32-bit fraction of a turn in float32, in [0, 1)."""
    return lax.shift_right_logical(fraction, jnp.int32(8)).astype(jnp.float32) * 2.0**-24


def to_radians(fraction):
    """Return a 32-bit fraction of a turn as radians in [0, 2 pi)."""
    return to_turns(fraction) * (2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Along:
    """How rows go on over the Z devices of a mesh axis, inside `jax.shard_map`. Each run of a row is a row here."""

    axis: str
    # False: device z has run z of Z. True: of 2 Z runs device z has run z, in the first half of the batch, and run
    # 2 Z - 1 - z, in the second half.
    zigzag: bool = False


def before_device(decay, added, along: Along, backwards: bool = False):
    """Solve x_r = decay_r x_{r-1} + added_r over the runs of all devices; return x_{r-1}, which is 0 for the first run.

    Args:
        decay: of this device's runs; its axes are the first ones of `added`, in the same dtype.
        added: of this device's runs.
        along: where the runs lie.
        backwards: solve from the last run to the first.
    """
    if not along.zigzag:
        return _before(decay, added, along.axis, backwards)
    (decay, after_decay), (added, after_added) = (jnp.split(x, 2) for x in (decay, added))
    if backwards:
        decay, added, after_decay, after_added = after_decay, after_added, decay, added
    # Runs of the first half of the batch go up the devices, those of the second half down. Backwards, the halves swap.
    before = _before(decay, added, along.axis, False)
    turns = lax.axis_index(along.axis) == lax.axis_size(along.axis) - 1  # the last device has two runs in succession
    through = jnp.where(turns, _times(decay, before) + added, 0)
    after = through + _before(after_decay, after_added + _times(after_decay, through), along.axis, True)
    return jnp.concatenate([after, before] if backwards else [before, after])


def of_next_run(x_B, along: Along):
    """Return, for each of this device's runs, the entry of x that belongs to the next run; zeros for the last run."""
    size = lax.axis_size(along.axis)
    up = lambda x: lax.ppermute(x, along.axis, [(z, z + 1) for z in range(size - 1)])  # noqa: E731
    down = lambda x: lax.ppermute(x, along.axis, [(z + 1, z) for z in range(size - 1)])  # noqa: E731
    if not along.zigzag:
        return down(x_B)
    early_B, late_B = jnp.split(x_B, 2)
    return jnp.concatenate([jnp.where(lax.axis_index(along.axis) == size - 1, late_B, down(early_B)), up(late_B)])


def _times(decay, x):
    return decay.reshape(*decay.shape, *[1] * (x.ndim - decay.ndim)) * x


def _before(decay, added, axis: str, backwards: bool):
    """Compute `before_device` for one run on each device, in ceil(log2 Z) rounds of one message each."""
    size, distance = lax.axis_size(axis), 1
    decay_before, before = jnp.ones_like(decay), jnp.zeros_like(added)
    while distance < size:  # a device without one at this distance before it receives zeros
        pairs = [(z + distance, z) if backwards else (z, z + distance) for z in range(size - distance)]
        sent = lax.ppermute(jnp.concatenate([decay.ravel(), added.ravel()]), axis, pairs)
        decay_left, left = sent[: decay.size].reshape(decay.shape), sent[decay.size :].reshape(added.shape)
        decay_before, before = decay_before * decay_left, _times(decay_before, left) + before
        decay, added = decay * decay_left, _times(decay, left) + added
        distance *= 2
    return before


def before_chunks(sum_BHCS, first_BHS, document_BL, along: Along | None = None):
    """Return the angle before every chunk and the one after the row, 32-bit, from the sums of the chunks.

    Args:
        sum_BHCS: the 32-bit sum of a chunk's increments, from the last document start in the chunk on, if there is one.
        first_BHS: the angle before the row, 32-bit.
        document_BL: the number of document starts in a token's chunk up to the token; None: one document.
        along: how rows go on over devices; `first_BHS` is then 0 but for the first run of a row. None: rows are whole.
    """
    if along is not None:
        _, last_BHS = before_chunks(sum_BHCS, first_BHS, document_BL)
        carried_B = jnp.ones(sum_BHCS.shape[0], jnp.int32)
        if document_BL is not None:
            carried_B = jnp.all(document_BL == 0, axis=1).astype(jnp.int32)
        first_BHS = first_BHS + before_device(carried_B, last_BHS, along)
    up_to_BHCS = jnp.cumsum(sum_BHCS, axis=2)
    before_BHCS = up_to_BHCS - sum_BHCS
    if document_BL is None:
        return first_BHS[:, :, None] + before_BHCS, first_BHS + up_to_BHCS[:, :, -1]
    # After a chunk with a document start, sum from that chunk on: its own sum begins at its last start.
    batch, _, chunks, _ = sum_BHCS.shape
    begins_BC = document_BL.reshape(batch, chunks, -1)[:, :, -1] > 0
    latest_BC = lax.cummax(jnp.where(begins_BC, jnp.arange(chunks, dtype=jnp.int32), -1), axis=1)

    def since(sum_BHCS, latest_BC):
        latest_BHCS = latest_BC[:, None, :, None]
        forgotten_BHCS = jnp.take_along_axis(before_BHCS, jnp.maximum(latest_BHCS, 0), axis=2)
        return sum_BHCS + jnp.where(latest_BHCS < 0, first_BHS[:, :, None], -forgotten_BHCS)

    before_BC = jnp.pad(latest_BC[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return since(before_BHCS, before_BC), since(up_to_BHCS[:, :, -1:], latest_BC[:, -1:])[:, :, 0]
