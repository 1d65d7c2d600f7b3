"""Prompts to continue: check them, and lay them into rows that end together."""

import reprlib
from collections.abc import Iterable, Sequence

import numpy as np

from mamba3_jax import decoding, memory
from mamba3_jax.config import COUNT
from mamba3_jax.sampling import Sampling


def padded(prompts, prefill_length: int, least: int = 1):
    """Lay prompts into right-aligned rows whose length less one is a whole number of pieces, the last token's own step.

    Args:
        prompts: lists of ids.
        prefill_length: the most tokens of a piece.
        least: the least length of a row.

    Returns:
        (tokens_BL, start_BL, piece), the latter the tokens of a piece.
    """
    longest = max(least, *map(len, prompts)) - 1
    pieces = -(-longest // prefill_length)
    piece = -(-longest // max(pieces, 1))
    length = 1 + pieces * piece
    tokens_BL, start_BL = np.zeros((len(prompts), length), np.int32), np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, length - len(prompt) :] = prompt
        start_BL[row, length - len(prompt)] = True
    return tokens_BL, start_BL, piece


def check(model, prompts, tokens: int, sampling: Sampling, stop_ids=(), prefill_length: int | None = None, params=None):
    """Return prompts and stop ids as lists of ints; ValueError for what `generate` cannot do."""
    sampling.check()
    if not 1 <= tokens <= COUNT or (prefill_length is not None and prefill_length < 1):
        raise ValueError(f"{tokens=} is not in 1 .. {COUNT}, or {prefill_length=} is less than 1")
    rows = [integers(f"prompt {i}", row) for i, row in enumerate(entries("prompts", prompts))]
    if not rows or not all(rows):
        raise ValueError("a prompt is empty: a model continues at least one token, such as the end of a document")
    stop_ids = integers("stop_ids", stop_ids)
    check_ids(model.config.vocab_size, [*rows, stop_ids])
    needed = memory.carrying(model, len(rows), max(map(len, rows)) + tokens)
    if params is not None:
        needed["parameters as decoding reads them"] = decoding.copied(model.config, params)
    memory.fit_device(needed)
    return rows, stop_ids


def entries(name: str, values) -> list:
    """List the entries of a sequence or an array; ValueError for anything else, text included."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {reprlib.repr(values)}, wanted a list or array")
    return list(values)


def integers(name: str, ids) -> list[int]:
    """List ids as ints; ValueError for anything that is not a sequence or a 1-D array of integers."""
    found = [token.tolist() if hasattr(token, "tolist") else token for token in entries(name, ids)]
    for place, token in enumerate(found):
        if type(token) is not int:  # bool is a subclass
            raise ValueError(f"{name} holds {reprlib.repr(token)} at place {place}, wanted an integer")
    return found


def check_ids(vocab_size: int, rows: Sequence[Sequence[int]]) -> None:
    """Raise ValueError for the first id that is not in the vocabulary."""
    for row in rows:
        for index, token in enumerate(row):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} at place {index} is not in the vocabulary of {vocab_size}")
