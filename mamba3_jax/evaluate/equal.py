"""Find the size at which variants of one kind reach the number of another variant, with its interval over seeds.

Rows and metrics are those of `comparison`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mamba3_jax.evaluate import comparison


class Crossing(NamedTuple):
    """The size at which a line has another's number, with its 95% interval."""

    at: float  # NaN where no seed has a finite number in all of the variants
    low: float
    high: float
    side: str = ""  # "below" or "above" where it is outside of the line's sizes, and `at` the nearest of them
    near: bool = False  # where it is outside, whether the difference at the nearest size is within its interval


def equal_at(line: Mapping[float, Sequence[dict]], target: Sequence[dict], metric: str) -> Crossing:
    """Return the size at which a line, rows by size, has the mean of the target's rows.

    Means over seeds are interpolated linearly in log2 of the size, on the first stretch that contains the number. The
    interval is that of the jackknife over seeds (each is left out of line and target alike), in log2 of the size, with
    Student's t at S - 1 degrees of freedom. It is (0, inf) where, without one of the seeds, the size is outside of the
    line's sizes.
    """
    sizes = sorted(line)
    numbers = {
        size: {row["seed"]: comparison.value(row, metric) for row in comparison.at_best_rate(rows, metric)}
        for size, rows in line.items()
    }
    wanted = {row["seed"]: comparison.value(row, metric) for row in comparison.at_best_rate(target, metric)}
    every = [wanted, *numbers.values()]
    seeds = sorted(seed for seed in wanted if all(math.isfinite(own.get(seed, math.nan)) for own in every))

    def without(left: int | None) -> float | str:
        kept = [seed for seed in seeds if seed != left]
        means = [statistics.mean(numbers[size][seed] for seed in kept) for size in sizes]
        return crossing([math.log2(size) for size in sizes], means, statistics.mean(wanted[seed] for seed in kept))

    if not seeds:
        return Crossing(math.nan, low=0.0, high=math.inf)
    found = without(None)
    if isinstance(found, str):
        nearest = sizes[0] if found == "below" else sizes[-1]
        mean, half = comparison.difference(line[nearest], target, metric)
        return Crossing(nearest, low=0.0, high=math.inf, side=found, near=abs(mean) <= half)
    parts = [without(seed) for seed in seeds] if len(seeds) > 1 else []
    if not parts or any(isinstance(part, str) for part in parts):
        return Crossing(2**found, low=0.0, high=math.inf)
    mean, count = statistics.mean(parts), len(parts)
    half = comparison.student(count) * math.sqrt((count - 1) / count * sum((part - mean) ** 2 for part in parts))
    return Crossing(2**found, low=2 ** (found - half), high=2 ** (found + half))


def crossing(places: Sequence[float], numbers: Sequence[float], wanted: float) -> float | str:
    """Return the first place at which the broken line through numbers is `wanted`, or on which side of all it lies.

    "below": by the direction from the first number to the last, the line has passed `wanted` before the first place;
    "above": it has not reached it at the last.
    """
    for left, right, before, after in zip(places, places[1:], numbers, numbers[1:], strict=False):
        if min(before, after) <= wanted <= max(before, after):
            return left if before == after else left + (right - left) * (wanted - before) / (after - before)
    falls = numbers[-1] < numbers[0]
    return "below" if (wanted > max(numbers)) == falls else "above"


def equals(rows: Sequence[dict], sizes: dict, equal, metric: str) -> dict[tuple[str, str], Crossing]:
    """Return, for each pair in `equal` of a line of `sizes` and a variant, at which size the line has its number.

    Pairs that want a variant without rows are left out.
    """
    grouped, found = comparison.by_variant(rows), {}
    for line, variant in equal:
        if {variant, *sizes[line]} <= grouped.keys():
            by_size = {size: grouped[name] for name, size in sizes[line].items()}
            found[line, variant] = equal_at(by_size, grouped[variant], metric)
    return found


def said(line: str, size: str, variant: str, metric: str, found: Crossing) -> str:
    """Write in a sentence where a line has the number of a variant."""
    begin = f"{line} has the {metric} of {variant} at {size}"
    if found.near:
        return f"{begin} {found.at:g} or {found.side}, which seeds do not tell apart"
    if found.side:
        return f"{begin} {found.side} {found.at:g}, outside of what was run"
    if math.isinf(found.high):
        return f"{begin} {found.at:.3g}, without an interval: seeds are too few, or one alone decides"
    return f"{begin} {found.at:.3g} ({found.low:.3g} .. {found.high:.3g})"
