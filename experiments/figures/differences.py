"""Draw how far every variant is from the first: a dot a seed, the mean with its 95% interval, the paper's number."""

import math
import statistics
from typing import NamedTuple

import matplotlib.pyplot as plt

from experiments import summary
from experiments.found import Experiment
from mamba3_jax.evaluate import comparison

FAR = 1.0  # nats: a variant that is further off, as one that fails past its trained length, would hide all others
EACH = {"color": "C0", "marker": "o", "linestyle": "", "markersize": 4, "alpha": 0.4}
MEAN = {"color": "C0", "fmt": "s", "markersize": 5, "capsize": 4}
PAPER = {"color": "C3", "marker": "D", "linestyle": "", "markersize": 5}


class Row(NamedTuple):
    """A variant's differences, in the unit of the metric."""

    label: str
    seeds: list[float]
    mean: float
    half: float  # of the 95% interval
    paper: float | None


class Differences(NamedTuple):
    """The differences of all variants to the first."""

    first: str
    metric: str
    rows: list[Row]


def differences_of(experiment: Experiment) -> Differences | None:
    """Return the differences of a loss, seed by seed; None for other metrics, one variant, or one seed."""
    metric, grouped = experiment.result["metric"], comparison.by_variant(experiment.rows)
    first, *others = grouped
    if comparison.sign(metric) > 0 or not others or len({row["seed"] for row in experiment.rows}) < 2:
        return None
    rows = []
    for name in others:
        seeds = list(comparison.paired(grouped[name], grouped[first], metric).values())
        mean, half = comparison.difference(grouped[name], grouped[first], metric)
        theirs = summary.paper_difference(experiment, name, first)
        rows.append(Row(label=name, seeds=seeds, mean=mean, half=half, paper=theirs))
    return Differences(first, metric, rows)


def plot(name: str, drawn: Differences):
    """Draw the figure."""
    figure, axes = plt.subplots(figsize=(7, 1.6 + 0.42 * len(drawn.rows)), layout="constrained")
    near = [row for row in drawn.rows if abs(row.mean) <= FAR]
    axes.axvline(0, color="0.4", linestyle=":", zorder=1)
    for place, row in enumerate(drawn.rows):
        if near and row not in near:
            axes.text(0.98, place, f"{row.mean:+.2f}, outside", transform=axes.get_yaxis_transform(), ha="right")
            continue
        axes.plot(row.seeds, [place - 0.2] * len(row.seeds), **EACH, zorder=2)
        half = row.half if math.isfinite(row.half) else None
        axes.errorbar(row.mean, place, xerr=half, **MEAN)
        if row.paper is not None:
            axes.plot(row.paper, place + 0.2, **PAPER, zorder=4)
    seeds = round(statistics.mean(len(row.seeds) for row in drawn.rows))
    axes.plot([], [], **EACH, label=f"each of {seeds} seeds")
    axes.errorbar([], [], xerr=[], **MEAN, label="mean, 95% interval")
    if any(row.paper is not None for row in drawn.rows):
        axes.plot([], [], **PAPER, label="the paper")
    axes.set_yticks(range(len(drawn.rows)), [row.label for row in drawn.rows])
    axes.set_ylim(len(drawn.rows) - 0.5, -0.5)
    axes.set(xlabel=f"{drawn.metric} over {drawn.first}, less is better", title=f"{name}: differences, seed by seed")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
