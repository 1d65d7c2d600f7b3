"""Tasks made of random numbers: no files, rows without end, every row its own counter of the random generator."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mamba3_jax.config import DataConfig
from mamba3_jax.data import arithmetic, flip_flop
from mamba3_jax.data.batch import Batch, Documents
from mamba3_jax.data.packing import Rows
from mamba3_jax.data.words import Group, alternating, cyclic, symmetric, words

# Second words of the generator's key: each begins another stream.
SPLIT_KEYS = {"train": 0, "valid": 1}
LENGTHS_KEY = 2

LABELS = ("every", "answer")
CHOICES = ("labels", "task_min_length", "task_packed")  # what rows are, beside source, lengths and steps


class Task(NamedTuple):
    """What a task is: documents of any one length."""

    documents: Callable[[np.ndarray], Documents]  # numbers_BL, uniform in [0, 1) -> B documents of L tokens
    chance: float  # accuracy of a uniform guess; of arithmetic, which has more 0 than 1/5, as its source scales it
    symbols: str | tuple[str, ...]  # the name of each id, and so the vocabulary
    least: int = 1  # tokens in the shortest document
    pad: int = 0  # the id of tokens after the documents of a row
    labels: tuple[str, ...] = LABELS  # which `data.labels` it has


def word_task(group: Group, over_generators: bool) -> Task:
    """Make the task of words over a group, see `words`."""
    documents = functools.partial(words, group=group, over_generators=over_generators)
    characters = max(map(len, group.names)) == 1
    symbols = "".join(group.names) if characters else group.names
    return Task(documents=documents, chance=1 / len(symbols), symbols=symbols)


def flat_task() -> Task:
    """Make arithmetic without brackets, see `arithmetic.flat`."""
    return Task(documents=arithmetic.flat, chance=1 / arithmetic.MODULUS, symbols=arithmetic.FLAT, least=3)


def nested_task(operators: int) -> Task:
    """Make arithmetic with brackets, see `arithmetic.nested`."""
    return Task(
        documents=functools.partial(arithmetic.nested, operators=operators),
        chance=1 / arithmetic.MODULUS,
        symbols=arithmetic.NESTED,
        least=5,  # of 3 and 4 tokens the source makes 5
        pad=arithmetic.NESTED.index("_"),
        labels=("answer",),
    )


def flip_flop_task(frequencies: dict[str, float]) -> Task:
    """Make the task of a bit that is stored and read, see `flip_flop.flip_flop`."""
    symbols = flip_flop.SYMBOLS[: 6 if "u" in frequencies else 5]
    documents = functools.partial(flip_flop.flip_flop, frequencies=frequencies)
    return Task(documents=documents, chance=0.5, symbols=symbols, least=4, pad=symbols.index("i"))


GROUPS = {
    "Z2": cyclic(2),
    "Z6": cyclic(6),
    "S3": symmetric(3),
    "S4": symmetric(4),
    "A5": alternating(5),
    "S5": symmetric(5),
}
TASKS = {
    "parity": word_task(GROUPS["Z2"], over_generators=False),
    "arithmetic": flat_task(),
    "arithmetic_brackets": nested_task(operators=2),
    "arithmetic_brackets_times": nested_task(operators=3),
    **{name: word_task(group, over_generators=False) for name, group in GROUPS.items()},
    **{  # but for Z2, all of which generates it
        f"{name}_generators": word_task(group, over_generators=True) for name, group in GROUPS.items() if name != "Z2"
    },
    "flip_flop": flip_flop_task(flip_flop.PLAIN),
    "flip_flop_undo": flip_flop_task(flip_flop.UNDO),
}


def document_length(config: DataConfig, step: int) -> int:
    """Follow the curriculum: how many tokens the documents of a step have.

    Without `task_min_length`, `task_lengths[i]` for `task_steps[i]` steps; the last goes on. With it, a length drawn
    for the step between it and a longest one, which goes linearly from `task_lengths[i]` to the next over
    `task_steps[i]` steps.
    """
    if not config.task_min_length:
        stage = int(np.searchsorted(np.cumsum(config.task_steps), step, side="right"))
        return config.task_lengths[min(stage, len(config.task_lengths) - 1)]
    longest = int(np.interp(step, np.cumsum([0, *config.task_steps[:-1]]), config.task_lengths))
    generator = np.random.Generator(np.random.Philox(key=[config.seed, LENGTHS_KEY], counter=[0, 0, 0, step]))
    return int(generator.integers(config.task_min_length, longest, endpoint=True))


def _check(config: DataConfig) -> None:
    task, lengths, steps, least = TASKS[config.source], config.task_lengths, config.task_steps, config.task_min_length
    if len(lengths) != len(steps) or not lengths:
        raise ValueError(
            f"data.task_lengths={tuple(lengths)} and data.task_steps={tuple(steps)} want one length and "
            "one number of steps a stage"
        )
    if config.labels not in LABELS:
        raise ValueError(f"data.labels={config.labels!r} is not one of {', '.join(LABELS)}")
    if config.labels not in task.labels:
        raise ValueError(
            f"data.labels={config.labels!r} is not defined for {config.source}, as a prefix has no value: "
            f"it has {', '.join(task.labels)}"
        )
    if min(lengths) < task.least:
        raise ValueError(
            f"data.task_lengths={tuple(lengths)} has a length under {task.least}, the shortest of {config.source}"
        )
    if min(lengths) < least:
        raise ValueError(f"data.task_min_length={least} is over a length of data.task_lengths={tuple(lengths)}")
    if max(lengths) > config.length and (config.labels == "answer" or not config.task_packed):
        raise ValueError(
            f"data.length={config.length} has no room for a whole document of data.task_lengths={tuple(lengths)}"
        )


def synthetic_rows(config: DataConfig, split: str) -> Rows:
    """Rows of the task named `config.source`. Row r is drawn from (seed, split, r) alone, whoever asks for it.

    Training rows never end and follow the curriculum: row r belongs to step r // batch. Validation has
    `config.valid_rows` rows of the last length.

    Raises:
        ValueError: the fields of `config` do not go together.
    """
    _check(config)
    task = TASKS[config.source]
    count = None if split == "train" else config.valid_rows

    def lengths(row_B: np.ndarray) -> np.ndarray:
        """Find the length of each row's documents."""
        if split != "train":
            return np.full(len(row_B), config.task_lengths[-1])
        steps, step_B = np.unique(row_B // config.batch, return_inverse=True)
        return np.array([max(task.least, document_length(config, int(step))) for step in steps])[step_B]

    def gather(row_B: np.ndarray) -> Batch:
        row_B = np.asarray(row_B)
        numbers_BL, length_B = uniform(config.seed, split, row_B, config.length), lengths(row_B)
        real_B = np.ones(len(row_B), bool) if count is None else row_B < count
        parts = {length: np.flatnonzero(length_B == length) for length in np.unique(length_B).tolist()}
        filled = [fill(task, config, numbers_BL[at], real_B[at], length) for length, at in parts.items()]
        if len(filled) == 1:  # the rows of one step
            return filled[0]
        order_B = np.argsort(np.concatenate([*parts.values()]))
        return Batch._make(np.concatenate(arrays)[order_B] for arrays in zip(*filled, strict=True))

    said = [f"{name}={getattr(config, name)}" for name in CHOICES if getattr(config, name) != getattr(DataConfig, name)]
    identity = " ".join([f"{config.source} {tuple(config.task_lengths)} {tuple(config.task_steps)}", *said])
    return Rows(gather, count, identity)


def uniform(seed: int, split: str, row_B: np.ndarray, length: int) -> np.ndarray:
    """Draw `length` numbers in [0, 1) for each row, multiples of 2^-32: the Philox stream whose counter is the row.

    A generator is made once and its counter set for each row, in 4 microseconds: making one takes 25.
    """
    generator = np.random.Philox(key=[seed, SPLIT_KEYS[split]])
    state = generator.state
    bits_BW = np.empty((len(row_B), -(-length // 2)), "<u8")
    for bits_W, row in zip(bits_BW, row_B.tolist(), strict=True):
        state["state"]["counter"][-1] = row
        generator.state = state
        bits_W[:] = generator.random_raw(len(bits_W))
    return bits_BW.view("<u4")[:, :length] * 2.0**-32


def fill(task: Task, config: DataConfig, numbers_BL: np.ndarray, real_B: np.ndarray, length: int) -> Batch:
    """Fill rows with documents of `length` tokens, scored where the row is `real`.

    Packed, documents follow each other, the last one cut where the row ends; else there is one, and padding after it.
    """
    rows, width = numbers_BL.shape
    count = -(-width // length) if config.task_packed else 1
    total = count * length
    documents = task.documents(_to_width(numbers_BL, total, 0).reshape(rows * count, length))
    scored_BL = documents.scored_BL
    if config.labels == "answer":
        scored_BL = scored_BL & (np.arange(length) == documents.answer)
    scored_BL = _to_width(scored_BL.reshape(rows, total), width, False) & real_B[:, None]
    start_L = (np.arange(width) % length == 0) & (np.arange(width) < total)
    return Batch(
        tokens_BL=_to_width(documents.tokens_BL.reshape(rows, total), width, task.pad),
        targets_BL=_to_width(documents.targets_BL.reshape(rows, total), width, 0) * scored_BL,
        weights_BL=scored_BL.astype(np.float32),
        start_BL=np.broadcast_to(start_L, (rows, width)),
    )


def _to_width(array_BL: np.ndarray, width: int, padding) -> np.ndarray:
    """Cut rows, or fill them up, to a width."""
    missing = width - array_BL.shape[1]
    if missing <= 0:
        return array_BL[:, :width]
    return np.pad(array_BL, ((0, 0), (0, missing)), constant_values=padding)
