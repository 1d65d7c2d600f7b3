"""Make tasks from random numbers: no files, rows without end; a row's number is the random generator's counter."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mamba3_jax.config import DataConfig
from mamba3_jax.data import arithmetic, flip_flop, recall
from mamba3_jax.data.batch import Batch, Documents
from mamba3_jax.data.curriculum import Setting, document_setting, stages
from mamba3_jax.data.packing import Rows
from mamba3_jax.data.words import Group, alternating, cyclic, symmetric, words

# The second word of the generator's key: each begins another stream. 2 is the curriculum's.
SPLIT_KEYS = {"train": 0, "valid": 1}

LABELS = ("every", "answer")
CHOICES = (
    "labels",
    "task_min_length",
    "task_packed",
    "task_mixed",
    "task_pairs",
)  # what rows are, beside source, lengths and steps


class Task(NamedTuple):
    """A generated task, which makes documents of any length that it can have."""

    # numbers_BL, uniform in [0, 1) -> B documents of L tokens; of a task that has pairs also their number
    documents: Callable[..., Documents]
    chance: float  # accuracy of a uniform guess; arithmetic has more than 1/5 of 0, but its source scales by 1/5 too
    symbols: str | tuple[str, ...]  # the name of each id, and so the vocabulary
    least: int = 1  # tokens in the shortest document
    pad: int = 0  # the id of tokens after the documents of a row
    labels: tuple[str, ...] = LABELS  # which `data.labels` it has
    most_pairs: Callable[[int], int] | None = None  # tokens of a document -> the most pairs it holds; None: no pairs
    pairs: int = 0  # of a document whose setting names none; 0: as many as it holds
    depth: Callable[[np.ndarray], np.ndarray] | None = None  # tokens_BL -> how deep in it the answer lies (B,), 0 to 1


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
        least=5,  # the source makes documents of 3 and 4 tokens longer, to 5
        pad=arithmetic.NESTED.index("_"),
        labels=("answer",),
    )


def flip_flop_task(frequencies: dict[str, float]) -> Task:
    """Make the task of a bit that is stored and read, see `flip_flop.flip_flop`."""
    symbols = flip_flop.SYMBOLS[: 6 if "u" in frequencies else 5]
    documents = functools.partial(flip_flop.flip_flop, frequencies=frequencies)
    return Task(documents=documents, chance=0.5, symbols=symbols, least=4, pad=symbols.index("i"))


def mqar_task(vocab_size: int, noise: bool = True) -> Task:
    """Make the recall of values by many keys, see `recall.mqar`; chance guesses one of the values there are."""
    return Task(
        documents=functools.partial(recall.mqar, vocab_size=vocab_size, noise=noise),
        chance=2 / vocab_size,
        symbols=recall.mqar_symbols(vocab_size),
        least=4,
        labels=("every",),  # the last query may stand anywhere, so no one place has the answer
        most_pairs=lambda length: min(length // 4, vocab_size // 2 - 1),
    )


def needle_task(alike: bool) -> Task:
    """Make the recall of one value of several tokens, see `recall.needle`."""
    return Task(
        documents=functools.partial(recall.needle, alike=alike),
        chance=1 / recall.WORDS,
        symbols=recall.NEEDLE_SYMBOLS,
        least=recall.NEEDLE + recall.QUESTION,
        labels=("answer",),
        most_pairs=lambda length: min((length - recall.QUESTION) // recall.NEEDLE, recall.KEYS),
        pairs=1,
        depth=recall.needle_depth,
    )


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
    "mqar": mqar_task(8192),
    "mqar_blank": mqar_task(8192, noise=False),
    "mqar_64": mqar_task(64),
    "needle": needle_task(alike=False),
    "needle_alike": needle_task(alike=True),
}


def check_setting(source: str, setting: Setting) -> None:
    """Raise ValueError for a length or pairs that the documents of a task cannot have."""
    task = TASKS[source]
    if setting.length < task.least:
        raise ValueError(f"length {setting.length} is less than {task.least}, the shortest of {source}")
    if setting.pairs and not task.most_pairs:
        raise ValueError(f"{setting.pairs} pairs: {source} has none")
    if task.most_pairs and setting.pairs > (most := task.most_pairs(setting.length)):
        raise ValueError(f"{setting.pairs} pairs: {setting.length} tokens of {source} hold {most}")


def _check(config: DataConfig) -> None:
    task, lengths, steps, least = TASKS[config.source], config.task_lengths, config.task_steps, config.task_min_length
    if len(lengths) != len(steps) or not lengths:
        raise ValueError(
            f"data.task_lengths={tuple(lengths)} and data.task_steps={tuple(steps)} want one length and "
            "one number of steps a stage"
        )
    if config.task_pairs and len(config.task_pairs) != len(lengths):
        raise ValueError(f"data.task_pairs={tuple(config.task_pairs)} wants one number of pairs for each of {lengths}")
    if least and (config.task_mixed or config.task_pairs):
        field = "task_mixed" if config.task_mixed else "task_pairs"
        raise ValueError(f"data.{field} is of stages, and data.task_min_length={least} draws lengths between them")
    if config.task_mixed and not sum(steps):
        raise ValueError(f"data.task_steps={tuple(steps)} gives data.task_mixed no stage to draw")
    if config.labels not in LABELS:
        raise ValueError(f"data.labels={config.labels!r} is not one of {', '.join(LABELS)}")
    if config.labels not in task.labels:
        raise ValueError(f"data.labels={config.labels!r} is not defined for {config.source}: {_why(task)}")
    if min(lengths) < task.least:
        raise ValueError(
            f"data.task_lengths={tuple(lengths)} has a length under {task.least}, the shortest of {config.source}"
        )
    for stage in stages(config):
        try:
            check_setting(config.source, stage)
        except ValueError as error:
            raise ValueError(f"data.task_pairs={tuple(config.task_pairs)}: {error}") from None
    if min(lengths) < least:
        raise ValueError(f"data.task_min_length={least} is over a length of data.task_lengths={tuple(lengths)}")
    if max(lengths) > config.length and (config.labels == "answer" or not config.task_packed):
        raise ValueError(
            f"data.length={config.length} has no room for a whole document of data.task_lengths={tuple(lengths)}"
        )


def _why(task: Task) -> str:
    """Say why a task does not have all labels, and which it has."""
    reason = "a prefix has no value" if "answer" in task.labels else "its last target has no place of its own"
    return f"{reason}: it has {', '.join(task.labels)}"


def synthetic_rows(config: DataConfig, split: str) -> Rows:
    """Return rows of the task named `config.source`. Row r depends on (seed, split, r) and `config` alone.

    Training rows never end and follow the curriculum: row r belongs to step r // batch. Validation has
    `config.valid_rows` rows of the last stage.

    Raises:
        ValueError: the fields of `config` do not go together.
    """
    _check(config)
    task = TASKS[config.source]
    count = None if split == "train" else config.valid_rows

    def settings(row_B: np.ndarray) -> tuple[list[Setting], np.ndarray]:
        """Return the different settings of rows, and which of them each row has."""
        if split != "train":
            return [stages(config)[-1]], np.zeros(len(row_B), int)
        steps, step_B = np.unique(row_B // config.batch, return_inverse=True)
        each = [document_setting(config, int(step)) for step in steps]
        each = [setting._replace(length=max(task.least, setting.length)) for setting in each]
        different = sorted(set(each))
        return different, np.array([different.index(setting) for setting in each])[step_B]

    def gather(row_B: np.ndarray) -> Batch:
        row_B = np.asarray(row_B)
        different, setting_B = settings(row_B)
        # A document that the row's end cuts needs all of its numbers too, as pairs and queries are drawn from them.
        whole = max(-(-config.length // setting.length) * setting.length for setting in different)
        numbers_BL = uniform(config.seed, split, row_B, whole if task.most_pairs else config.length)
        real_B = np.ones(len(row_B), bool) if count is None else row_B < count
        parts = [np.flatnonzero(setting_B == index) for index in range(len(different))]
        filled = [
            fill(task, config, numbers_BL[at], real_B[at], setting)
            for at, setting in zip(parts, different, strict=True)
        ]
        if len(filled) == 1:  # the rows of one step
            return filled[0]
        order_B = np.argsort(np.concatenate(parts))
        return Batch._make(np.concatenate(arrays)[order_B] for arrays in zip(*filled, strict=True))

    said = [f"{name}={getattr(config, name)}" for name in CHOICES if getattr(config, name) != getattr(DataConfig, name)]
    identity = " ".join([f"{config.source} {tuple(config.task_lengths)} {tuple(config.task_steps)}", *said])
    return Rows(gather, count, identity)


def uniform(seed: int, split: str, row_B: np.ndarray, length: int) -> np.ndarray:
    """Draw `length` numbers in [0, 1) for each row, multiples of 2^-32: the Philox stream whose counter is the row.

    One generator is made, and its counter set for each row, which takes 4 microseconds; making one would take 25.
    """
    generator = np.random.Philox(key=[seed, SPLIT_KEYS[split]])
    state = generator.state
    bits_BW = np.empty((len(row_B), -(-length // 2)), "<u8")
    for bits_W, row in zip(bits_BW, row_B.tolist(), strict=True):
        state["state"]["counter"][-1] = row
        generator.state = state
        bits_W[:] = generator.random_raw(len(bits_W))
    return bits_BW.view("<u4")[:, :length] * 2.0**-32


def fill(task: Task, config: DataConfig, numbers_BL: np.ndarray, real_B: np.ndarray, setting: Setting) -> Batch:
    """Fill rows with documents of one setting; rows that are not `real` are not scored.

    Packed documents follow each other, and the last one is cut where the row ends; else a row has one document, and
    padding after it.
    """
    rows, width, length = len(numbers_BL), config.length, setting.length
    count = -(-width // length) if config.task_packed else 1
    total = count * length
    how = {"pairs": setting.pairs or task.pairs or task.most_pairs(length)} if task.most_pairs else {}
    documents = task.documents(_to_width(numbers_BL, total, 0).reshape(rows * count, length), **how)
    scored_BL = documents.scored_BL
    if config.labels == "answer":
        scored_BL = scored_BL & (np.arange(length) >= documents.answer)
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
