"""Draw loss against what decoding costs: the time of a token, and the bytes of a sequence's state."""

import statistics
from typing import NamedTuple

import matplotlib.pyplot as plt

from experiments.found import Experiment
from mamba3_jax.evaluate import comparison


class Point(NamedTuple):
    """A variant's loss and cost of decoding; where the cost depends on the context, at one length of it."""

    loss: float  # mean over seeds
    ms: float  # a token of all rows of the batch
    state_kib: float  # of one sequence
    note: str  # its size, or the context


class Tradeoff(NamedTuple):
    """The points to draw."""

    lines: dict[str, list[Point]]  # by the name of a line, smaller states first
    metric: str
    batch: int
    device: str


def tradeoff_of(experiment: Experiment) -> Tradeoff | None:
    """Return every variant's loss with its cost of decoding at the largest batch; None if that was not measured."""
    grouped, metric = comparison.by_variant(experiment.rows), experiment.result["metric"]
    rows = [row for row in (experiment.decoding or {"rows": []})["rows"] if row["model"] in grouped]
    rows = [row for row in rows if row["what"] == "decode" and row["path"] != "former"]
    if not rows:
        return None
    batch, fastest = max(row["batch"] for row in rows), {}
    for row in sorted(rows, key=lambda row: -row["ms"]):
        if row["batch"] == batch:
            fastest[row["model"], row.get("context") or 0] = row
    named = {name: (line, f"{size:g}") for line, sizes in experiment.sizes.items() for name, size in sizes.items()}
    lines = {line: [] for line in experiment.sizes}
    for (name, context), row in sorted(fastest.items(), key=lambda item: item[1]["state_bytes"]):
        line, note = named.get(name, (name, f"{context:,}" if context else ""))
        seeds = comparison.at_best_rate(grouped[name], metric)
        loss = statistics.mean(comparison.value(row, metric) for row in seeds)
        lines.setdefault(line, []).append(Point(loss, row["ms"], row["state_bytes"] / 1024, note))
    lines = {line: points for line, points in lines.items() if points}
    return Tradeoff(lines, metric, batch, experiment.decoding["device"])


def plot(name: str, drawn: Tradeoff):
    """Draw the figure: loss by time on the left, by state on the right."""
    figure, panels = plt.subplots(ncols=2, sharey=True, figsize=(9, 4.4), layout="constrained")
    across = {"ms": f"ms a token, batch {drawn.batch}, {drawn.device}", "state_kib": "state of a sequence, KiB"}
    figure.suptitle(f"{name}: loss against the cost of decoding; numbers are sizes, or tokens of context")
    for axes, (cost, label) in zip(panels, across.items(), strict=True):
        for index, (line, points) in enumerate(drawn.lines.items()):
            places = [getattr(point, cost) for point in points]
            losses = [point.loss for point in points]
            axes.plot(places, losses, marker="osv^DPX*"[index % 8], color=f"C{index % 10}", markersize=5, label=line)
            for point, place in zip(points, places, strict=True):
                axes.annotate(
                    point.note, (place, point.loss), (4, 4), textcoords="offset points", fontsize=8, color="0.35"
                )
        axes.set(xscale="log", xlabel=label)
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
        axes.margins(0.12)
    panels[0].set_ylabel(f"{drawn.metric}, less is better")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(drawn.lines)),
        frameon=False,
    )
    return figure
