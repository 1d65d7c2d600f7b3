"""Compare what a sweep found: members' numbers, a variant's best learning rate, differences with intervals, a table.

A row is one member: variant, seed, learning_rate, numbers of its training (loss, skipped, ...), and `scores`, what
`evaluate` returned at each length. A metric is a name in a row ("loss") or NAME@LENGTH in its scores
("scaled_last@256", "loss@1024"), NAME@LENGTH:PAIRS where a number of pairs was asked for ("accuracy@64:4").
"""

import math
import statistics
from collections.abc import Sequence

LESS_IS_BETTER = ("loss", "valid_loss", "loss_last", "late_loss", "perplexity", "bits_per_byte", "skipped")
STATISTICS = {"worst": min, "mean": statistics.mean, "best": max}  # over numbers that are the greater, the better
DIFFERENCE = "difference"  # the word for the mean difference to the first variant, seed by seed
MANY = 4  # with so many seeds or more the table has the mean of losses and their standard deviation
# Student's t, 0.975, by degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def value(row: dict, metric: str) -> float:
    """Return the number that a metric names in a row; NaN where the row has null, as of a run that diverged.

    Raises:
        ValueError: a length that was not scored, or a name that the row does not have.
    """
    name, _, length = metric.partition("@")
    found = row
    if length:
        scores = {place(score): score for score in row["scores"]}
        if length not in scores:
            raise ValueError(f"{metric}: length {length} was not scored, only {', '.join(scores)}")
        found = scores[length]
    if name not in found:
        raise ValueError(f"{metric}: there is no {name}, only {', '.join(found)}")
    number = found[name]
    return math.nan if number is None else number


def place(score: dict) -> str:
    """Name the setting that a score was taken at, as metrics do."""
    return f"{score['length']}:{score['pairs']}" if "pairs" in score else str(score["length"])


def sign(metric: str) -> int:
    """Return 1 where more is better, -1 where less is."""
    return -1 if metric.partition("@")[0] in LESS_IS_BETTER else 1


def is_loss(metric: str) -> bool:
    """Tell whether a metric is in nats a token, so that its exponential is a perplexity."""
    return metric.partition("@")[0] in ("loss", "valid_loss", "loss_last", "late_loss")


def worth(row: dict, metric: str) -> float:
    """Return a number that is the greater, the better the row; -inf where the metric is NaN."""
    number = sign(metric) * value(row, metric)
    return -math.inf if math.isnan(number) else number


def at_best_rate(rows: Sequence[dict], metric: str) -> list[dict]:
    """Return the rows of the learning rate that is the best in the mean over seeds, sorted by seed."""
    rates = {}
    for row in rows:
        rates.setdefault(row["learning_rate"], []).append(row)
    best = max(rates.values(), key=lambda own: statistics.mean(worth(row, metric) for row in own))
    return sorted(best, key=lambda row: row["seed"])


def best(rows: Sequence[dict], metric: str) -> int:
    """Return the index of the best row."""
    return max(range(len(rows)), key=lambda index: worth(rows[index], metric))


def statistic(rows: Sequence[dict], wanted: str) -> float:
    """Return "worst METRIC", "mean METRIC" or "best METRIC" over the seeds of the best learning rate.

    Raises:
        ValueError: another word, or a metric that the rows do not have.
    """
    word, _, metric = wanted.partition(" ")
    if word not in STATISTICS or not metric:
        raise ValueError(f"{wanted!r} is not one of {', '.join(STATISTICS)}, a blank and a metric")
    return sign(metric) * STATISTICS[word](worth(row, metric) for row in at_best_rate(rows, metric))


def difference(rows: Sequence[dict], others: Sequence[dict], metric: str) -> tuple[float, float]:
    """Return (mean, half-width of its 95% interval) of the difference in a metric, each variant at its best rate.

    The mean is that of d_s = rows_s - others_s over the S seeds that both have; the half-width is t sd(d) / sqrt(S)
    with Student's t at S - 1 degrees of freedom, NaN for one seed.
    """
    d = list(paired(rows, others, metric).values())
    if len(d) < 2:
        return (d[0] if d else math.nan), math.nan
    return statistics.mean(d), student(len(d)) * deviation(d) / math.sqrt(len(d))


def paired(rows: Sequence[dict], others: Sequence[dict], metric: str) -> dict[int, float]:
    """Return d_s = rows_s - others_s by seed, for the seeds that both have, each variant at its best rate."""
    ours, theirs = ({row["seed"]: value(row, metric) for row in at_best_rate(r, metric)} for r in (rows, others))
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def deviation(numbers: Sequence[float]) -> float:
    """Return the standard deviation of two numbers or more; NaN where one is not finite (Python 3.11 would raise)."""
    return statistics.stdev(numbers) if all(map(math.isfinite, numbers)) else math.nan


def student(count: int) -> float:
    """Return the 0.975 quantile of Student's t for the mean of `count` numbers, two or more."""
    return T[count - 2] if count - 2 < len(T) else 1.96 + 2.5 / (count - 1)


def by_variant(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Group rows by variant, in their order."""
    grouped = {}
    for row in rows:
        grouped.setdefault(row["variant"], []).append(row)
    return grouped


def expected(rows: Sequence[dict], expect: dict[str, tuple[str, float, float]], first: str = "") -> list[dict]:
    """Check what was found against `expect`, variant -> (statistic, least, most), for every variant that has rows.

    The statistic "difference METRIC" is the mean difference to the variant `first`, seed by seed; without rows of
    `first` it is left out.
    """
    found, grouped = [], by_variant(rows)
    for variant, (wanted, least, most) in expect.items():
        word, _, metric = wanted.partition(" ")
        own, base = grouped.get(variant), grouped.get(first)
        if own and (base or word != DIFFERENCE):
            number = difference(own, base, metric)[0] if word == DIFFERENCE else statistic(own, wanted)
            found.append(
                {
                    "variant": variant,
                    "what": wanted,
                    "least": least,
                    "most": most,
                    "found": number if math.isfinite(number) else None,
                    "holds": least <= number <= most,
                }
            )
    return found


def shown(number: float, metric: str) -> str:
    """Write a number: accuracies in percent, losses with four places."""
    if not math.isfinite(number):
        return "-"
    return f"{number:.4f}" if sign(metric) < 0 else f"{100 * number:.1f}"


def of_seeds(rows: Sequence[dict], metric: str) -> str:
    """Write the number of every seed; the losses of many seeds differ little: write their mean and deviation."""
    numbers = [value(row, metric) for row in rows]
    if sign(metric) > 0 or len(numbers) < MANY:
        return " ".join(shown(number, metric) for number in numbers)
    return f"{shown(statistics.mean(numbers), metric)} (sd {shown(deviation(numbers), metric)})"


def table(rows: Sequence[dict], metrics: Sequence[str], best_by: str) -> str:
    """Return a Markdown table, a line a variant: its learning rate, every seed's numbers, its distance from the first.

    Args:
        rows: of all members.
        metrics: a column each; accuracies are in percent.
        best_by: the metric that chooses each variant's learning rate and that the last column compares, by the mean
            difference to the first variant, seed by seed, with its 95% interval.
    """
    grouped = by_variant(rows)
    first = next(iter(grouped))
    many = len({row["seed"] for row in rows}) > 1
    heads = ["variant", "learning rate", *metrics, *([f"{best_by} over {first}"] if many and len(grouped) > 1 else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for variant, own in grouped.items():
        chosen = at_best_rate(own, best_by)
        cells = [variant, f"{chosen[0]['learning_rate']:.3g}"]
        cells += [of_seeds(chosen, metric) for metric in metrics]
        if len(heads) > len(cells):
            mean, half = difference(own, grouped[first], best_by)
            cells.append("" if variant == first else f"{shown(mean, best_by)} ± {shown(half, best_by)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def said(expectation: dict) -> str:
    """Return an expectation and what was found in one line."""
    metric = expectation["what"].partition(" ")[2]
    numbers = (expectation[name] for name in ("least", "most", "found"))
    least, most, found = (shown(math.nan if number is None else number, metric) for number in numbers)
    holds = "as expected" if expectation["holds"] else "NOT as expected"
    return f"{expectation['variant']}: {expectation['what']} {found}, {holds}: {least} .. {most}"
