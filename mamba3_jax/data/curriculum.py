"""Choose the length, and the number of pairs, of the documents in each training step of a generated task."""

import functools
from typing import NamedTuple

import numpy as np

from mamba3_jax.config import DataConfig

LENGTHS_KEY = 2  # second word of the generator's key, beside those of `synthetic.SPLIT_KEYS`


class Setting(NamedTuple):
    """What a task's documents are drawn with."""

    length: int  # tokens
    pairs: int = 0  # of keys and values, in tasks that have them; 0: the task's own number at this length


def document_setting(config: DataConfig, step: int) -> Setting:
    """Return what the documents of a step are drawn with, by the curriculum.

    Without `task_min_length`, stage i has `task_lengths[i]` and `task_pairs[i]` and lasts `task_steps[i]` steps; the
    last stage goes on. With `task_mixed`, each step's stage is drawn instead, with probabilities in proportion to
    `task_steps`. With `task_min_length`, each step's length is drawn between it and a longest one, which goes linearly
    from `task_lengths[i]` to the next over `task_steps[i]` steps.
    """
    ends, generator = np.cumsum(config.task_steps), functools.partial(_of_step, config.seed, step)
    if config.task_min_length:
        longest = int(np.interp(step, [0, *ends[:-1]], config.task_lengths))
        return Setting(int(generator().integers(config.task_min_length, longest, endpoint=True)))
    place = generator().random() * ends[-1] if config.task_mixed else step
    stage = min(int(np.searchsorted(ends, place, side="right")), len(ends) - 1)
    return stages(config)[stage]


def _of_step(seed: int, step: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, LENGTHS_KEY], counter=[0, 0, 0, step]))


def stages(config: DataConfig) -> list[Setting]:
    """Return the settings of the curriculum's stages."""
    pairs = config.task_pairs or (0,) * len(config.task_lengths)
    return [Setting(*stage) for stage in zip(config.task_lengths, pairs, strict=True)]
