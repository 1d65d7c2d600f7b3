"""Accuracy of a task by length, the lengths past the trained one among them."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mamba3_jax.config import LENGTH, DataConfig
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate.language import check_lengths, past
from mamba3_jax.evaluate.score import Scorer

PAPER_LENGTH = 256  # which the paper trains up to 160 for (arXiv:2603.15569, table 5b)


def default_lengths(data: DataConfig) -> list[int]:
    """1/4, 1/2, 1, 2, 4 and 8 times the trained length, and the paper's 256; none too short for the task."""
    trained, least = data.task_lengths[-1], max(2, TASKS[data.source].least)
    parts = (trained // 4, trained // 2, trained, 2 * trained, 4 * trained, 8 * trained, PAPER_LENGTH)
    return sorted({min(LENGTH, max(least, length)) for length in parts})


def lengths_of(data: DataConfig, lengths: Sequence[int]) -> list[int]:
    """Sorted lengths to evaluate at, `default_lengths` for none; ValueError for one that the task cannot have."""
    lengths, least = check_lengths(lengths or default_lengths(data)), TASKS[data.source].least
    if lengths[0] < least:
        raise ValueError(f"length {lengths[0]} is less than {least}, the shortest of {data.source}")
    return lengths


def of_length(data: DataConfig, length: int) -> DataConfig:
    """Return the data of a task with one document of this length a row."""
    whole = {"task_lengths": (length,), "task_steps": (0,), "task_min_length": 0, "length": length}
    return dataclasses.replace(data, **whole, batch=min(data.batch, data.valid_rows))


def evaluate(
    model,
    params,
    data: DataConfig,
    *,
    lengths: Sequence[int] = (),
    max_tokens: int = 0,
    members: int = 0,
    say: Callable[[str], None] | None = None,
) -> list[dict]:
    """Return a result a length: sequences of that length, one a row, drawn as validation rows of task `data.source`.

    Args:
        model: a `LanguageModel`.
        params: its parameters.
        data: the task; the last of its lengths is taken to be the one trained at.
        lengths: in tokens; () is `default_lengths`.
        max_tokens: about how many for each length; 0 is `data.valid_rows` sequences.
        members: of several models scored at once, which the leading axis of `params` counts; 0: it is one.
        say: called with a line of progress now and then.

    Returns:
        Dicts of length, sequences, accuracy (of all scored positions), last (accuracy of the last of these, which is
        the answer) and scaled_last: last with chance at 0 and always right at 1. Of several members the last three are
        lists.

    Raises:
        ValueError: data that is not a task, or a length below 2 or the task's least.
    """
    if data.source not in TASKS:
        raise ValueError(f"data.source={data.source!r} is not one of the tasks {sorted(TASKS)}")
    lengths = lengths_of(data, lengths)
    scorer, chance = Scorer(model, params, max(64, min(lengths)), members), TASKS[data.source].chance
    results = []
    for length in lengths:
        rows = of_length(data, length)
        sequences, scored, right, right_last = 0, 0, 0, 0
        for found in scorer.score(rows, max_tokens=max_tokens, say=say):
            counts_BL = found.batch.weights_BL > 0
            real_B = counts_BL.any(axis=1)
            counts_BL, correct_BL = counts_BL[real_B], found.correct_BL[..., real_B, :]
            answer = np.flatnonzero(counts_BL.any(axis=0))[-1]  # at one place in all documents of a length
            sequences += len(counts_BL)
            scored += int(counts_BL.sum())
            right += (correct_BL & counts_BL).sum(axis=(-2, -1))
            right_last += correct_BL[..., answer].sum(axis=-1)
        last = right_last / sequences
        results.append(
            {
                "length": length,
                "sequences": sequences,
                "accuracy": (right / scored).tolist(),
                "last": last.tolist(),
                "scaled_last": ((last - chance) / (1 - chance)).tolist(),
            }
        )
    return results


def table(results: Sequence[dict], trained: int) -> str:
    """Return the results as text, a line a length."""
    lines = ["  length  sequences  accuracy  last position  scaled"]
    for r in results:
        scores = f"{r['accuracy']:9.4f} {r['last']:14.4f} {r['scaled_last']:7.4f}"
        lines.append(f"{r['length']:8d} {r['sequences']:10d} {scores}{past(r['length'], trained)}")
    return "\n".join(lines)
