"""Accuracy by length of the parity experiment, from its result file.

python -m experiments.figures.parity --target=experiments/figures/parity.png    the README's picture
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from absl import app, flags

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "mamba3": ("Mamba-3", "C0", "o"),
    "euler": ("Euler (rotation kept)", "C1", "s"),
    "rope": ("fixed RoPE angles", "C2", "^"),
    "no_rotation": ("no rotation", "C3", "v"),
}


def source(results: dict) -> str:
    """Says which results a picture was drawn from, as the picture itself does."""
    return f"commit {results['commit']}, {results['date']}"


def draw(results: dict, path) -> None:
    """One line a variant, the mean of its seeds; one dot a seed. PNG."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in results["rows"]:
        label, color, marker = NAMES[row["variant"]]
        lengths = [int(length) for length in row["accuracy"]]
        percent = 100 * np.array(list(row["accuracy"].values()))
        axes.plot(lengths, percent.mean(axis=1), color=color, label=label)
        axes.plot(lengths, percent, color=color, marker=marker, linestyle="", markersize=4, alpha=0.6)
    trained = max(results["trained_lengths"])
    axes.axvspan(trained, max(lengths), color="0.92", zorder=0)
    axes.text(trained, 0.03, " longer than trained", transform=axes.get_xaxis_transform())
    axes.axhline(50, color="0.5", linestyle=":")
    axes.set(xlabel="string length, bits", ylabel="accuracy at the last bit, %", ylim=(35, 103))
    axes.set_title(f"Parity, {results['seeds']} seeds a variant (50% is chance)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.25))
    figure.savefig(path, dpi=110, metadata={"Description": source(results)})
    plt.close(figure)


def main(_):
    draw(json.loads(Path(flags.FLAGS.source).read_text()), flags.FLAGS.target)


if __name__ == "__main__":
    flags.DEFINE_string("source", "experiments/results/parity.json", "The result file.")
    flags.DEFINE_string("target", "parity.png", "The picture to write.")
    app.run(main)
