"""Draw what layers do: eigenvalues on the unit disc, quantities by layer, the state by position, horizons.

Every picture is a PNG in which each checkpoint has a colour.
"""

import io
import math

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mamba3_jax.analysis.observe import number

MOST = 12  # at most so many layers get a panel each, evenly chosen
BY_LAYER = {  # panels: which quantity of a head, and its label
    "horizon": "decay horizon, tokens",
    "dt": "dt",
    "lambda": "lambda",
    "rotation": "|rotation|, radians a token",
    "delta": "delta rule's strength",
    "norm": "norm of the state",
    "rank": "effective rank of the state",
}
STROKES = {"measured": "-", "forgetting": "--", "angles": ":", "both": "-."}


def png(figure) -> bytes:
    """Return a figure as a file and close it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    return drawn.getvalue()


def names_of(figure, names: list[str]) -> None:
    """Name the checkpoints and their colours below the figure, if there are several."""
    if len(names) > 1:
        marks = [Line2D([], [], color=f"C{index}", marker="o", linestyle="") for index in range(len(names))]
        figure.legend(marks, names, loc="outside lower center", frameon=False)


def eigenvalues(checkpoints: dict[str, list[np.ndarray]]) -> bytes:
    """Draw eigenvalues on the unit disc, a panel for each layer; every checkpoint gives an array for each layer."""
    deepest = max(len(layers) for layers in checkpoints.values())
    shown = np.unique(np.linspace(0, deepest - 1, min(MOST, deepest)).astype(int)).tolist()
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(3 * across, 3.2 * down + 0.8), layout="constrained", squeeze=False
    )
    turn = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
    for panel in axes.flat[len(shown) :]:
        panel.axis("off")
    for panel, layer in zip(axes.flat, shown, strict=False):
        panel.plot(turn.real, turn.imag, color="0.7", linewidth=0.8)
        for index, layers in enumerate(checkpoints.values()):
            points = layers[layer] if layer < len(layers) else np.zeros(0)
            panel.plot(points.real, points.imag, ".", color=f"C{index}", markersize=2, alpha=0.5)
            if not points.size:
                panel.text(0, -0.3 * index, "none", color=f"C{index}", ha="center")
        panel.set(aspect="equal", title=f"layer {layer}", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    names_of(figure, list(checkpoints))
    return png(figure)


def by_layer(checkpoints: dict[str, list[dict]]) -> bytes:
    """Draw each layer's quantities from the summaries: a dot at the median of heads, a bar from least to greatest."""
    panels = {
        name: label
        for name, label in BY_LAYER.items()
        if any(
            math.isfinite(number(head, name)) for layers in checkpoints.values() for x in layers for head in x["heads"]
        )
    }
    across = min(4, len(panels) + 1)
    down = -(-(len(panels) + 1) // across)
    size = {"figsize": (3.4 * across, 2.6 * down + 0.5), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(down, across, **size)
    for panel in axes.flat[len(panels) + 1 :]:
        panel.axis("off")
    for index, layers in enumerate(checkpoints.values()):
        gap, colour = 0.15 * index, f"C{index}"
        axes.flat[0].plot([x["layer"] for x in layers], [x["gradient_norm"] for x in layers], ".-", color=colour)
        for panel, name in zip(axes.flat[1:], panels, strict=False):
            for layer in layers:
                values = np.array([number(head, name) for head in layer["heads"]])
                if (values := values[np.isfinite(values)]).size:
                    at = layer["layer"] + gap
                    panel.vlines(at, values.min(), values.max(), color=colour, alpha=0.5)
                    panel.plot(at, np.median(values), "o", color=colour, markersize=3)
    axes.flat[0].set(yscale="log", ylabel="norm of the gradient", xlabel="layer")
    for panel, (name, label) in zip(axes.flat[1:], panels.items(), strict=False):
        panel.set(ylabel=label, xlabel="layer", yscale="log" if name in ("horizon", "norm") else "linear")
    for panel in axes.flat[: len(panels) + 1]:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    names_of(figure, list(checkpoints))
    return png(figure)


def state_by_position(checkpoints: dict[str, list[dict]]) -> bytes:
    """Draw the norm of each layer's state over the document's tokens so far, deeper layers darker."""
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for index, layers in enumerate(checkpoints.values()):
        for layer in layers:
            if buckets := layer["norm_by_position"]:
                depth = (layer["layer"] + 1) / len(layers)
                norms = [float(np.mean(bucket["norm"])) for bucket in buckets]
                axes.plot(
                    [bucket["to"] for bucket in buckets], norms, "o-", color=f"C{index}", alpha=0.2 + 0.8 * depth, ms=3
                )
    axes.set(
        xscale="log", yscale="log", xlabel="tokens of the document so far", ylabel="norm of the state, mean of heads"
    )
    names_of(figure, list(checkpoints))
    return png(figure)


def horizons(checkpoints: dict[str, dict]) -> bytes:
    """Draw scaled accuracy by length, measured and predicted from the trained length."""
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    last = 1
    for index, found in enumerate(checkpoints.values()):
        points = [(score["length"], score["scaled_last"]) for score in found["measured"]]
        last = max(last, points[-1][0])
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{index}", ms=4)
        for cause, style in list(STROKES.items())[1:]:
            if points := found["predicted"][cause].get("points"):
                axes.plot(*zip(*points, strict=True), style, color=f"C{index}", linewidth=1)
        axes.axvline(found["trained"], color="0.8", linewidth=0.8)
    for cause, style in STROKES.items():
        label = cause if cause == "measured" else f"predicted: {cause}"
        axes.plot([], [], style, color="0.3", label=label)
    axes.axhline(0, color="0.4", linestyle=":", linewidth=0.8)
    axes.set(xscale="log", xlabel="length, tokens", ylabel="last answer, of the way from chance", xlim=(None, last))
    axes.legend(frameon=False)
    names_of(figure, list(checkpoints))
    return png(figure)
