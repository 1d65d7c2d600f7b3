"""Draw a metric by length, size or step, a line a variant, a dot a seed; and choose all pictures of an experiment.

Differences with intervals, and loss against the cost of decoding, stand in files of their own.
"""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator, ScalarFormatter

from experiments.figures import differences, tradeoff
from experiments.found import Experiment
from mamba3_jax.evaluate import comparison

MARKERS = "osv^DPX*"
STROKES = ("-", (0, (6, 2)), (0, (3, 2)), (0, (6, 2, 1, 2)), (0, (10, 3)))  # lines that coincide are still seen apart
FEW = 8  # up to so many places across are each named, on a logarithmic axis
FAR = 16  # of more places, the axis is logarithmic if the last is more than so many times as far out as the first


class Line(NamedTuple):
    """A variant at every length, or variants of several sizes."""

    label: str
    at: list[float]
    values: list[list[float]]  # at each of these, a number a seed


class Figure(NamedTuple):
    """Lines to draw, in the units of the axes."""

    lines: list[Line]
    across: str
    up: str
    trained: float = 0  # the longest length trained; 0: no lengths are drawn
    chance: float | None = None
    names: tuple[str, ...] = ()  # of places across that are not numbers
    curves: bool = False  # each seed is a thin line; False: dots


def figure_of(experiment: Experiment) -> Figure:
    """Return the metric by size where the file has sizes, by length where several are scored, else by variant."""
    metric = experiment.result["metric"]
    name, _, length = metric.partition("@")
    grouped = {
        variant: comparison.at_best_rate(rows, metric)
        for variant, rows in comparison.by_variant(experiment.rows).items()
    }
    unit, factor = (", %", 100) if comparison.sign(metric) > 0 else ("", 1)
    chance = 0.0 if name.startswith("scaled") else None
    values = lambda variant, what: [factor * comparison.value(row, what) for row in grouped[variant]]  # noqa: E731
    if experiment.sizes:
        lines = []
        for label, sizes in experiment.sizes.items():
            known = {variant: size for variant, size in sizes.items() if variant in grouped}
            lines.append(Line(label, list(known.values()), [values(variant, metric) for variant in known]))
        return Figure(lines, experiment.size, f"{metric}{unit}", chance=chance)
    _, _, pairs = length.partition(":")
    scores = [score for score in experiment.rows[0]["scores"] if str(score.get("pairs", "")) == pairs]
    lengths, places = [score["length"] for score in scores], [comparison.place(score) for score in scores]
    if not length or len(lengths) == 1:
        lines = [Line(variant, [at], [values(variant, metric)]) for at, variant in enumerate(grouped)]
        return Figure(lines, "", f"{metric}{unit}", chance=chance, names=tuple(grouped))
    lines = [Line(variant, lengths, [values(variant, f"{name}@{at}") for at in places]) for variant in grouped]
    across = f"length, tokens{f' with {pairs} pairs' if pairs else ''}"
    return Figure(lines, across, f"{name}{unit}", trained=experiment.trained, chance=chance)


def curves_of(experiment: Experiment) -> Figure | None:
    """Return the training curves of seeds at each variant's best rate, a task's accuracy or loss; None without any."""
    metric, lines = experiment.result["metric"], []
    is_task = comparison.sign(metric) > 0
    name, factor = ("accuracy", 100) if is_task else ("loss", 1)
    for variant, rows in comparison.by_variant(experiment.rows).items():
        curves = [row["curve"] for row in comparison.at_best_rate(rows, metric) if row.get("curve")]
        if curves:
            values = [[factor * (math.nan if x is None else x) for x in curve[name]] for curve in curves]
            lines.append(Line(variant, curves[0]["step"], [list(seeds) for seeds in zip(*values, strict=True)]))
    return Figure(lines, "step", f"{name} in training{', %' if is_task else ''}", curves=True) if lines else None


def pictures(experiment: Experiment) -> dict[str, "Drawn"]:
    """Return what is drawn of an experiment that has a result, by the name of the picture."""
    metric, apart = figure_of(experiment), differences.differences_of(experiment)
    drawn = {
        "": apart if apart and metric.names else metric,
        "_differences": None if metric.names else apart,
        "_tradeoff": tradeoff.tradeoff_of(experiment),
        "_curves": curves_of(experiment),
    }
    return {f"{experiment.name}{name}.png": figure for name, figure in drawn.items() if figure}


Drawn = Figure | differences.Differences | tradeoff.Tradeoff


def source(experiment: Experiment, drawn: Drawn) -> str:
    """Return what a picture is drawn from, which is written into it: commit, date and a digest of what is drawn."""
    digest = hashlib.sha256(repr(drawn).encode()).hexdigest()[:12]
    return f"commit {experiment.origins('commit')}, {experiment.origins('date')}, {digest}"


def alt(drawn: Drawn) -> str:
    """Return what a picture shows, for readers who cannot see it."""
    match drawn:
        case differences.Differences():
            return f"{drawn.metric}: differences to {drawn.first}"
        case tradeoff.Tradeoff():
            return f"{drawn.metric} by time and state of decoding"
    return f"{drawn.up} by {drawn.across or 'variant'}"


def draw(experiment: Experiment, drawn: Drawn, path: Path) -> None:
    """Write a picture of an experiment that has a result, as PNG."""
    match drawn:
        case differences.Differences():
            figure = differences.plot(experiment.name, drawn)
        case tradeoff.Tradeoff():
            figure = tradeoff.plot(experiment.name, drawn)
        case _:
            figure = plot(experiment, drawn)
    # The file has no version of matplotlib, so that it changes only with what is drawn.
    figure.savefig(path, dpi=110, metadata={"Description": source(experiment, drawn), "Software": None})
    plt.close(figure)


def plot(experiment: Experiment, drawn: Figure):
    """Draw the figure."""
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for index, line in enumerate(drawn.lines):
        style = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}
        means = [sum(seeds) / len(seeds) for seeds in line.values]
        stroke = {"linestyle": STROKES[index % len(STROKES)]}
        axes.plot(line.at, means, color=style["color"], **stroke, zorder=2)
        for seed in range(max(map(len, line.values), default=0)):
            dots = [(at, seeds[seed]) for at, seeds in zip(line.at, line.values, strict=True) if seed < len(seeds)]
            if drawn.curves:
                axes.plot(*zip(*dots, strict=True), color=style["color"], linewidth=0.8, alpha=0.5, zorder=1)
            else:
                axes.plot(*zip(*dots, strict=True), **style, linestyle="", markersize=4, alpha=0.6, zorder=3)
        axes.plot([], [], **style, **stroke, markersize=4, label=line.label)
    mark(axes, drawn)
    axes.set(xlabel=drawn.across, ylabel=drawn.up)
    seeds = max((len(own) for line in drawn.lines for own in line.values), default=0)
    each = "a thin line" if drawn.curves else "a dot"
    axes.set_title(f"{experiment.name}: mean of {seeds} seeds, {each} a seed" if seeds > 1 else experiment.name)
    longest = max(len(line.label) for line in drawn.lines)
    columns = max(1, min(4, len(drawn.lines), 76 // (longest + 5)))  # as many as fit into the width
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def cut(axes, drawn: Figure) -> None:
    """Leave out what is far above the lowest loss, as the loss of a model that fails past its trained length."""
    means = [sum(seeds) / len(seeds) for line in drawn.lines for seeds in line.values]
    lowest = min(filter(math.isfinite, means), default=math.nan)
    if max(means) > lowest + differences.FAR:
        axes.set_ylim(lowest - 0.1 * differences.FAR, lowest + differences.FAR)
        place = axes.transAxes
        axes.text(0.99, 0.98, f"cut off {differences.FAR:g} above the lowest", transform=place, ha="right", va="top")


def mark(axes, drawn: Figure) -> None:
    """Mark chance, and the lengths past the trained one; scale the axis across and name its places."""
    if drawn.chance is not None:
        axes.axhline(drawn.chance, color="0.4", linestyle=":", zorder=1)
        place = axes.get_yaxis_transform()
        axes.text(1.01, drawn.chance, "chance", transform=place, va="center", color="0.4", fontsize=9)
    axes.margins(y=0.1)
    if drawn.trained and comparison.sign(drawn.up) < 0:
        cut(axes, drawn)
    places = sorted({at for line in drawn.lines for at in line.at})
    if drawn.names:
        axes.set_xticks(range(len(drawn.names)), drawn.names)
        axes.margins(x=0.2)
    elif not drawn.curves and places and places[0] > 0 and len(places) <= FEW:
        axes.set_xscale("log", base=2)
        axes.set_xticks(places)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    elif not drawn.curves and places and places[-1] > FAR * places[0] > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if drawn.trained and places[-1] > drawn.trained:
        right = axes.get_xlim()[1]
        axes.axvspan(drawn.trained, right, color="0.93", zorder=0)
        axes.set_xlim(right=right)
        place = axes.get_xaxis_transform()
        axes.text(drawn.trained, 0.98, " longer than trained", transform=place, va="top", color="0.4", fontsize=9)
