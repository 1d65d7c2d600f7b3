"""Tasks made of random numbers: no files, rows without end, every row its own counter of the random generator."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mamba3_jax.config import DataConfig
from mamba3_jax.data.batch import Batch
from mamba3_jax.data.packing import Rows

SPLIT_KEYS = {"train": 0, "valid": 1}


class Task(NamedTuple):
    """What a task is; it fills a row with documents of one length, the last one cut where the row ends."""

    tokens: Callable  # (generator, start_L) -> tokens_L
    targets: Callable  # (tokens_L, start_L) -> targets_L, every one scored
    chance: float  # accuracy of a guess
    symbols: str  # the character of each id, and so the vocabulary


def parity_tokens(generator: np.random.Generator, start_L: np.ndarray) -> np.ndarray:
    """Uniform bits."""
    return generator.integers(0, 2, len(start_L), dtype=np.int32)


def parity_targets(tokens_L: np.ndarray, start_L: np.ndarray) -> np.ndarray:
    """y_t = x_s + .. + x_t mod 2, with s the first token of t's document."""
    ones_L = np.cumsum(tokens_L, dtype=np.int32)
    before_L = np.where(start_L, ones_L - tokens_L, 0)
    return (ones_L - np.maximum.accumulate(before_L)) % 2


TASKS = {"parity": Task(tokens=parity_tokens, targets=parity_targets, chance=0.5, symbols="01")}


def document_length(config: DataConfig, step: int) -> int:
    """Follow the curriculum: `task_steps[i]` steps of documents of `task_lengths[i]` tokens; the last goes on."""
    ends = np.cumsum(config.task_steps)
    stage = int(np.searchsorted(ends, step, side="right"))
    return config.task_lengths[min(stage, len(config.task_lengths) - 1)]


def _check(config: DataConfig) -> None:
    lengths, steps = config.task_lengths, config.task_steps
    if len(lengths) != len(steps) or not lengths:
        raise ValueError(
            f"data.task_lengths={tuple(lengths)} and data.task_steps={tuple(steps)} want one length and "
            "one number of steps a stage"
        )


def synthetic_rows(config: DataConfig, split: str) -> Rows:
    """Rows of the task named `config.source`. Row r is drawn from (seed, split, r) alone, whoever asks for it.

    Training rows never end and follow the curriculum: row r belongs to step r // batch. Validation has
    `config.valid_rows` rows of the last length.
    """
    _check(config)
    task = TASKS[config.source]
    count = None if split == "train" else config.valid_rows

    def gather(row_B: np.ndarray) -> Batch:
        rows = [_row(config, task, split, int(row)) for row in row_B]
        real_B1 = np.array([[count is None or row < count] for row in row_B])
        tokens_BL, targets_BL, start_BL = (np.stack(parts) for parts in zip(*rows, strict=True))
        weights_BL = np.broadcast_to(real_B1, tokens_BL.shape).astype(np.float32)
        return Batch(tokens_BL, np.where(real_B1, targets_BL, 0), weights_BL, start_BL)

    return Rows(gather, count, f"{config.source} {tuple(config.task_lengths)} {tuple(config.task_steps)}")


def _row(config: DataConfig, task: Task, split: str, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    step = row // config.batch
    width = document_length(config, step) if split == "train" else config.task_lengths[-1]
    generator = np.random.Generator(np.random.Philox(key=[config.seed, SPLIT_KEYS[split]], counter=[0, 0, 0, row]))
    start_L = np.arange(config.length) % width == 0
    tokens_L = task.tokens(generator, start_L)
    return tokens_L, task.targets(tokens_L, start_L), start_L
