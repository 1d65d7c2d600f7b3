"""What a call of the model is given, checked: ids, where documents start, the state, and the room in it."""

import operator
import reprlib

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.mixers import MIXERS


def check_tokens(tokens_BL, vocab_size: int) -> None:
    """Raise ValueError for tokens that are not (B, L) integers, and for known ids that are not in the vocabulary."""
    dtype = getattr(tokens_BL, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens are {dtype or type(tokens_BL).__name__}, wanted an array of integers")
    if tokens_BL.ndim != 2 or 0 in tokens_BL.shape:
        raise ValueError(f"tokens have shape {tokens_BL.shape}, wanted (B, L), at least one row and one token")
    if is_known(tokens_BL):
        ids_BL = np.asarray(tokens_BL)
        for extreme in (ids_BL.min(initial=0), ids_BL.max(initial=0)):
            if not 0 <= extreme < vocab_size:
                raise ValueError(f"token id {extreme} is out of range: the vocabulary is {vocab_size}")


def check_start(start_BL, shape: tuple[int, int]) -> None:
    """Raise ValueError for what does not say of every token whether it starts a document: attention broadcasts it."""
    if start_BL is None:
        return
    dtype = getattr(start_BL, "dtype", None)
    if dtype != jnp.bool_:
        raise ValueError(f"start is {dtype or type(start_BL).__name__}, wanted an array of bool")
    if start_BL.shape != shape:
        raise ValueError(f"start has shape {start_BL.shape}, wanted {shape}")


def check_state(model, state, batch: int) -> None:
    """Raise ValueError for what is not a state of this model and this many rows, with any capacity."""
    if state is None:
        return
    smaller, larger = (jax.eval_shape(lambda room=room: model.empty_state(batch, room)) for room in (1, 2))
    if jax.tree.structure(state) != jax.tree.structure(smaller):
        raise ValueError(
            f"the state is {reprlib.repr(jax.tree.map(jnp.shape, state))}, wanted one of this model, as a call returns "
            f"it beside the logits: {jax.tree.map(jnp.shape, smaller)}"
        )
    wanted = zip(jax.tree.leaves(smaller), jax.tree.leaves(larger), strict=True)
    for (path, array), (least, more) in zip(jax.tree_util.tree_leaves_with_path(state), wanted, strict=True):
        sizes = zip(least.shape, more.shape, jnp.shape(array), strict=False)
        # An axis that grows with the capacity may have any size.
        if jnp.ndim(array) != least.ndim or any(size != want for want, grown, size in sizes if want == grown):
            raise ValueError(f"state{jax.tree_util.keystr(path)} has shape {jnp.shape(array)}, wanted {least.shape}")


def check_room(blocks: dict[tuple[str, str], str], state, length: int, capacity: int | None) -> None:
    """Raise ValueError where `length` more tokens do not fit: in `capacity`, or in a state whose values are known.

    `blocks` is that of the model's pattern (`model.blocks`).
    """
    if capacity is not None and state is not None:
        raise ValueError(f"{capacity=} is for a call without a state: the room of a given state does not change")
    if capacity is not None and capacity < length:
        raise ValueError(f"{capacity=} is less than the {length} tokens of this call")
    for (segment, block), mixer in blocks.items() if state is not None else ():
        room = MIXERS[mixer].room(state[segment][block])
        if room is None or not is_known(room[0]):
            continue
        held, most = int(np.asarray(room[0]).max()), room[1]
        if held + length > most:
            raise ValueError(
                f"{length} more tokens do not fit in the state of {mixer}, which holds {held} of {most}: make the "
                f"state with capacity={held + length} or more"
            )


def whole(name: str, value, least: int) -> int:
    """Return a whole number from `least` up as an int; ValueError for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} is {type(value).__name__}, wanted a whole number") from None
    if number < least:
        raise ValueError(f"{name}={number} is less than {least}")
    return number


def is_known(array) -> bool:
    """Tell whether the values of an array can be read here: it is not traced, and no other host has a part of it."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)
