"""Accuracy of a state-tracking task by length, the lengths past the trained one among them."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mamba3_jax.config import DataConfig
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate.language import check_lengths, past
from mamba3_jax.evaluate.score import Scorer


def evaluate(
    model,
    params,
    data: DataConfig,
    *,
    lengths: Sequence[int] = (),
    max_tokens: int = 0,
    say: Callable[[str], None] | None = None,
) -> list[dict]:
    """Return a result a length: sequences of that length, one a row, drawn as validation rows of task `data.source`.

    Args:
        model: a `LanguageModel`.
        params: its parameters.
        data: the task; the last of its lengths is taken to be the one trained at.
        lengths: in tokens; () is 1/4, 1/2, 1, 2 and 4 times the trained one.
        max_tokens: about how many for each length; 0 is `data.valid_rows` sequences.
        say: called with a line of progress now and then.

    Returns:
        Dicts of length, sequences, accuracy (of all positions), last (accuracy of the last position) and scaled_last:
        last with chance at 0 and always right at 1.

    Raises:
        ValueError: data that is not a task, or a length below 2.
    """
    if data.source not in TASKS:
        raise ValueError(f"data.source={data.source!r} is not one of the tasks {sorted(TASKS)}")
    trained = data.task_lengths[-1]
    lengths = check_lengths(lengths or [max(2, trained // 4), max(2, trained // 2), trained, 2 * trained, 4 * trained])
    scorer, chance = Scorer(model, params, max(64, min(lengths))), TASKS[data.source].chance
    results = []
    for length in lengths:
        batch = min(data.batch, data.valid_rows)
        rows = dataclasses.replace(data, task_lengths=(length,), task_steps=(0,), length=length, batch=batch)
        right = []
        for scored in scorer.score(rows, max_tokens=max_tokens, say=say):
            right.append(scored.correct_BL[scored.batch.weights_BL[:, -1] > 0])
        right_BL = np.concatenate(right)
        last = float(right_BL[:, -1].mean())
        results.append(
            {
                "length": length,
                "sequences": len(right_BL),
                "accuracy": float(right_BL.mean()),
                "last": last,
                "scaled_last": (last - chance) / (1 - chance),
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
