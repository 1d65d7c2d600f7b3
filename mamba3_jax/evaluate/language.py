"""Measure how well a model predicts held-out text: loss, perplexity, bits per byte, loss by position in a document."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from mamba3_jax.config import LENGTH, DataConfig
from mamba3_jax.evaluate.score import Scored, Scorer


def evaluate(
    model,
    params,
    data: DataConfig,
    *,
    lengths: Sequence[int] = (),
    max_tokens: int = 0,
    members: int = 0,
    say: Callable[[str], None] | None = None,
) -> list:
    """Return a result for each row length: how well the model predicts the "valid" split cut into rows of that length.

    Args:
        model: a `LanguageModel`.
        params: its parameters.
        data: where the text comes from; its length is taken as the trained one.
        lengths: of the rows, in tokens; () is 1, 2 and 4 times `data.length`.
        max_tokens: about how many to score for each length, in whole rows; 0 is all.
        members: how many models are scored at once, along the leading axis of `params`; 0: one, without that axis.
        say: called with a line of progress now and then.

    Returns:
        Dicts of length, tokens (scored), loss (nats a token), perplexity, accuracy, bits_per_byte (of the source text's
        bytes, exactly, a document's end counting as one more), late_loss (the loss of tokens with half a row or more of
        their document before them; None where there are none), and positions: loss and tokens in doubling buckets
        (from, to) of how many tokens of the document come before. With members, a list of these for each.

    Raises:
        ValueError: a length below 2, or data without a scored token.
    """
    lengths = check_lengths(lengths or [data.length, 2 * data.length, 4 * data.length])
    scorer = Scorer(model, params, data.length, members)
    results = []
    for length in lengths:
        totals = [Totals(length) for _ in range(members or 1)]
        for scored in scorer.score(dataclasses.replace(data, length=length), max_tokens=max_tokens, say=say):
            for member, total in enumerate(totals):
                total.add(scored.of(member) if members else scored)
        results.append([total.result() for total in totals])
    each = [list(own) for own in zip(*results, strict=True)]
    return each if members else each[0]


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """Return lengths sorted, each once; ValueError for one that is no whole number, too short or too long."""
    for length in lengths:
        if not isinstance(length, int) or isinstance(length, bool):
            raise ValueError(f"length {length!r} is not a whole number of tokens")
    if min(lengths) < 2:
        raise ValueError(f"length {min(lengths)} is less than 2: a row needs a token and a target")
    if max(lengths) > LENGTH:
        raise ValueError(f"length {max(lengths)} is more than {LENGTH}")
    return sorted(set(lengths))


def edges(length: int) -> list[int]:
    """Return 0, 16, 32, 64, ... and `length`: where the buckets of positions begin, and the end of the last one."""
    return [0, *(2**power for power in range(4, 64) if 2**power < length), length]


class Totals:
    """Sums in float64 over any number of batches."""

    def __init__(self, length: int):
        self.length, self.edges = length, edges(length)
        self.nll, self.count = np.zeros(len(self.edges) - 1), np.zeros(len(self.edges) - 1, np.int64)
        self.late_nll, self.late_count = 0.0, 0
        self.correct, self.bytes = 0, 0

    def add(self, scored: Scored) -> None:
        """Add one more batch."""
        counts_BL = scored.batch.weights_BL > 0
        position, nll = scored.position_BL[counts_BL], scored.nll_BL[counts_BL].astype(np.float64)
        bucket, late = np.searchsorted(self.edges, position, side="right") - 1, position >= self.length / 2
        size = len(self.count)
        self.nll += np.bincount(bucket, nll, size)
        self.count += np.bincount(bucket, minlength=size)
        self.late_nll, self.late_count = self.late_nll + nll[late].sum(), self.late_count + int(late.sum())
        self.correct += int(scored.correct_BL[counts_BL].sum())
        if scored.bytes_BL is not None:
            self.bytes += int(scored.bytes_BL[counts_BL].sum())

    def result(self) -> dict:
        """Return the result of `evaluate` for one length."""
        tokens = int(self.count.sum())
        if not tokens:
            raise ValueError(f"no token of the held-out data is scored in rows of {self.length}")
        loss = float(self.nll.sum() / tokens)
        buckets = zip(self.edges, self.edges[1:], self.nll, self.count, strict=False)
        return {
            "length": self.length,
            "tokens": tokens,
            "loss": loss,
            "perplexity": perplexity(loss),
            "accuracy": self.correct / tokens,
            "bits_per_byte": loss * tokens / math.log(2) / self.bytes if self.bytes else None,
            "late_loss": float(self.late_nll / self.late_count) if self.late_count else None,
            "positions": [
                {"from": first, "to": end, "tokens": int(count), "loss": float(nll / count)}
                for first, end, nll, count in buckets
                if count
            ],
        }


def perplexity(nats: float) -> float:
    """Return e^nats; infinity past the largest double, near e^709. NaN stays NaN."""
    return math.inf if nats > 709 else math.exp(nats)


def past(length: int, trained: int) -> str:
    """Return the remark on a table's line for a length past the trained one."""
    return f"  ({length / trained:g}x the trained length)" if length > trained else ""


def table(results: Sequence[dict], trained: int, more: Sequence[str] = ()) -> str:
    """Return the results as text: a line a length, the lines `more`, then loss by position, a column a length."""
    lines = ["  length   tokens    loss  perplexity  bits/byte  accuracy"]
    for r in results:
        bits = "        -" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:9.4f}"
        scores = f"{r['loss']:7.4f} {r['perplexity']:11.3f}  {bits}  {r['accuracy']:8.4f}"
        lines.append(f"{r['length']:8d} {r['tokens']:8d} {scores}{past(r['length'], trained)}")
    lines += [
        *more,
        "",
        "loss by the tokens of the document before, in rows of",
        "".join([" " * 16, *(f"{r['length']:>9}" for r in results)]),
    ]
    found = sorted({bucket["from"] for r in results for bucket in r["positions"]})
    for first in found:
        cells = [{b["from"]: f"{b['loss']:9.4f}" for b in r["positions"]}.get(first, " " * 9) for r in results]
        lines.append(f"{first:>8} and on {''.join(cells)}")
    return "\n".join(lines)
