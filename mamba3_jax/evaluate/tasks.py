"""Measure a task's accuracy by length, or by length and pairs, past the trained length too."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mamba3_jax.config import LENGTH, DataConfig
from mamba3_jax.data.curriculum import Setting
from mamba3_jax.data.synthetic import TASKS, check_setting
from mamba3_jax.evaluate.language import check_lengths, past
from mamba3_jax.evaluate.score import Scored, Scorer

PAPER_LENGTH = 256  # at which the paper evaluates models trained up to 160 (arXiv:2603.15569, table 5b)
DEPTHS = 10  # equal parts of a document by which the depth of its answer is counted


def default_lengths(data: DataConfig) -> list[int]:
    """Return 1/4, 1/2, 1, 2, 4 and 8 times the trained length, and the paper's 256; none too short for the task."""
    trained, least = data.task_lengths[-1], max(2, TASKS[data.source].least)
    parts = (trained // 4, trained // 2, trained, 2 * trained, 4 * trained, 8 * trained, PAPER_LENGTH)
    return sorted({min(LENGTH, max(least, length)) for length in parts})


def read_setting(text: int | str) -> Setting:
    """Read "64", which is 64 tokens with as many pairs as the task has at that length, or "64:4", with four pairs.

    Raises:
        ValueError: text that is neither.
    """
    length, colon, pairs = str(text).partition(":")
    if not (length.isdecimal() and pairs.isdecimal() == bool(colon)) or (colon and not int(pairs)):
        raise ValueError(f"{text!r} is neither a length nor LENGTH:PAIRS")
    return Setting(int(length), int(pairs or 0))


def written(setting: Setting) -> int | str:
    """Invert `read_setting`; a setting without pairs is a number."""
    return f"{setting.length}:{setting.pairs}" if setting.pairs else setting.length


def settings_of(data: DataConfig, lengths: Sequence[int | str]) -> list[Setting]:
    """Return the settings of lengths, sorted; () is `default_lengths`. ValueError for one that the task cannot have."""
    settings = sorted(set(map(read_setting, lengths or default_lengths(data))))
    check_lengths([setting.length for setting in settings])
    for setting in settings:
        check_setting(data.source, setting)
    return settings


def of_setting(data: DataConfig, length: int, pairs: int = 0) -> DataConfig:
    """Return the data of a task with one document a row, of this length and this number of pairs."""
    whole = {"task_lengths": (length,), "task_steps": (0,), "task_min_length": 0, "length": length}
    whole |= {"task_pairs": (pairs,) if pairs else (), "task_mixed": False}
    return dataclasses.replace(data, **whole, batch=min(data.batch, data.valid_rows))


class Counts:
    """Counts of right answers at one setting, of one model or, with a leading axis M, of several."""

    def __init__(self, depth: Callable[[np.ndarray], np.ndarray] | None):
        self.depth = depth
        self.sequences = self.scored = self.right = self.last = self.whole = 0
        self.at_depth, self.whole_at_depth = np.zeros(DEPTHS, int), 0

    def add(self, found: Scored) -> None:
        """Count one more batch."""
        counts_BL = found.batch.weights_BL > 0
        real_B = counts_BL.any(axis=1)
        counts_BL, correct_BL = counts_BL[real_B], found.correct_BL[..., real_B, :]
        last_B = counts_BL.shape[1] - 1 - counts_BL[:, ::-1].argmax(axis=1)
        whole_B = (correct_BL | ~counts_BL).all(axis=-1)
        self.sequences += len(counts_BL)
        self.scored += int(counts_BL.sum())
        self.right += (correct_BL & counts_BL).sum(axis=(-2, -1))
        self.last += correct_BL[..., np.arange(len(last_B)), last_B].sum(axis=-1)
        self.whole += whole_B.sum(axis=-1)
        if self.depth:
            depth_B = np.minimum(DEPTHS - 1, self.depth(found.batch.tokens_BL[real_B]) * DEPTHS).astype(int)
            one_BX = depth_B[:, None] == np.arange(DEPTHS)
            self.at_depth += one_BX.sum(axis=0)
            self.whole_at_depth += whole_B @ one_BX.astype(int)

    def result(self, setting: Setting, chance: float) -> dict:
        """Return the result of `evaluate` for a setting."""
        last = self.last / self.sequences
        result = {"length": setting.length} | ({"pairs": setting.pairs} if setting.pairs else {})
        result |= {
            "sequences": self.sequences,
            "accuracy": (self.right / self.scored).tolist(),
            "last": last.tolist(),
            "scaled_last": ((last - chance) / (1 - chance)).tolist(),
            "exact": (self.whole / self.sequences).tolist(),
        }
        if self.depth:
            result["exact_by_depth"] = (self.whole_at_depth / np.maximum(1, self.at_depth)).tolist()
        return result


def evaluate(
    model,
    params,
    data: DataConfig,
    *,
    lengths: Sequence[int | str] = (),
    max_tokens: int = 0,
    members: int = 0,
    say: Callable[[str], None] | None = None,
) -> list[dict]:
    """Return a result for each length, over validation documents of the task `data.source`, one a row.

    Args:
        model: a `LanguageModel`.
        params: its parameters.
        data: the task; the last of its `task_lengths` is taken as the trained one.
        lengths: in tokens, or "LENGTH:PAIRS" of a task that has pairs; () is `default_lengths`.
        max_tokens: about how many for each length; 0 is `data.valid_rows` sequences.
        members: how many models are scored at once, along the leading axis of `params`; 0: one, without that axis.
        say: called with a line of progress now and then.

    Returns:
        Dicts of length, pairs (where they were asked for), sequences, accuracy (over all scored positions), last
        (accuracy at the last scored position of each sequence), scaled_last (last, with chance at 0 and always right at
        1), and exact (the share of sequences in which all scored positions are right); where the task has a depth, also
        exact_by_depth, in ten equal parts of it. With members, all entries after sequences are lists.

    Raises:
        ValueError: data that is not a task, or a length or pairs that it cannot have.
    """
    if data.source not in TASKS:
        raise ValueError(f"data.source={data.source!r} is not one of the tasks {sorted(TASKS)}")
    settings, task = settings_of(data, lengths), TASKS[data.source]
    scorer = Scorer(model, params, max(64, min(setting.length for setting in settings)), members)
    results = []
    for setting in settings:
        counts = Counts(task.depth)
        for found in scorer.score(of_setting(data, *setting), max_tokens=max_tokens, say=say):
            counts.add(found)
        results.append(counts.result(setting, task.chance))
    return results


def table(results: Sequence[dict], trained: int) -> str:
    """Return the results as text, a line a length."""
    lines = ["  length  sequences  accuracy  last position  scaled  all right"]
    for r in results:
        place = written(Setting(r["length"], r.get("pairs", 0)))
        scores = f"{r['accuracy']:9.4f} {r['last']:14.4f} {r['scaled_last']:7.4f} {r['exact']:10.4f}"
        lines.append(f"{place:>8} {r['sequences']:10d} {scores}{past(r['length'], trained)}")
    return "\n".join(lines)
