"""How far every variant is from the first: a dot a seed, the mean with its 95% interval, and what the paper has."""

import statistics
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from experiments import found
from experiments.found import Experiment
from mamba3_jax.evaluate import comparison


class Row(NamedTuple):
    """A variant's differences, in the unit of the metric."""

    label: str
    seeds: list[float]
    mean: float
    half: float  # of the 95% interval
    paper: float | None


class Differences(NamedTuple):
    """What is drawn."""

    first: str
    metric: str
    rows: list[Row]


def differences_of(experiment: Experiment) -> Differences | None:
    """Return the differences of a loss, seed by seed; None of other metrics, one variant, or one seed."""
    metric, grouped = experiment.result["metric"], comparison.by_variant(experiment.rows)
    first, *others = grouped
    if comparison.sign(metric) > 0 or not others or len({row["seed"] for row in experiment.rows}) < 2:
        return None
    rows = []
    for name in others:
        seeds = list(comparison.paired(grouped[name], grouped[first], metric).values())
        mean, half = comparison.difference(grouped[name], grouped[first], metric)
        rows.append(Row(name, seeds, mean, half, found.paper_difference(experiment, name, first)))
    return Differences(first, metric, rows)


def plot(drawn: Differences):
    """Return the figure."""
    figure, axes = plt.subplots(figsize=(7, 1.6 + 0.42 * len(drawn.rows)), layout="constrained")
    axes.axvline(0, color="0.4", linestyle=":", zorder=1)
    for place, row in enumerate(drawn.rows):
        # Seeds lie side by side, so that equal ones are seen to be several.
        beside = place + np.linspace(-0.16, 0.16, len(row.seeds)) if len(row.seeds) > 1 else [place]
        axes.plot(row.seeds, beside, "o", color="C0", markersize=3.5, alpha=0.45, zorder=2)
        known = np.isfinite(row.half)
        axes.errorbar(row.mean, place, xerr=row.half if known else None, color="C0", fmt="s", markersize=5, capsize=4)
        if row.paper is not None:
            axes.plot(row.paper, place, "D", color="C3", markersize=7, markerfacecolor="none", zorder=4)
    seeds = round(statistics.mean(len(row.seeds) for row in drawn.rows))
    axes.errorbar([], [], xerr=[], color="C0", fmt="s", markersize=5, capsize=4, label="mean, 95% interval")
    axes.plot([], [], "o", color="C0", markersize=3.5, alpha=0.45, label=f"each of {seeds} seeds")
    if any(row.paper is not None for row in drawn.rows):
        axes.plot([], [], "D", color="C3", markersize=7, markerfacecolor="none", label="the paper")
    axes.set_yticks(range(len(drawn.rows)), [row.label for row in drawn.rows])
    axes.set_ylim(len(drawn.rows) - 0.5, -0.5)
    axes.set_xlabel(f"{drawn.metric}: difference to {drawn.first}, less is better")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
