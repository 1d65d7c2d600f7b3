"""What the documents of each training step of a generated task are drawn at."""

import functools
from typing import NamedTuple

import numpy as np

from mamba3_jax.config import DataConfig

LENGTHS_KEY = 2  # second word of the generator's key, as `synthetic.SPLIT_KEYS`


class Setting(NamedTuple):
    """What documents are drawn at, beside the task."""

    length: int  # tokens
    pairs: int = 0  # of keys and values, in tasks that have them; 0: as the task has it for this length


def document_setting(config: DataConfig, step: int) -> Setting:
    """Follow the curriculum: what the documents of a step are drawn at.

    Without `task_min_length`, stage i has `task_lengths[i]` and `task_pairs[i]` and lasts `task_steps[i]` steps; the
    last goes on. `task_mixed` draws the step's stage instead, as often as `task_steps` are to each other. With
    `task_min_length`, a length is drawn for the step between it and a longest one, which goes linearly from
    `task_lengths[i]` to the next over `task_steps[i]` steps.
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
    """List the settings of the curriculum."""
    pairs = config.task_pairs or (0,) * len(config.task_lengths)
    return [Setting(*stage) for stage in zip(config.task_lengths, pairs, strict=True)]
