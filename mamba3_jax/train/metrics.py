"""What a run writes about itself: metrics.jsonl, TensorBoard, progress lines, the curve, the final table."""

import json
import math
import os
from pathlib import Path

from tensorboardX import SummaryWriter

from mamba3_jax.config import Config
from mamba3_jax.train.loss import bits_per_byte


def read(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; one that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Log:
    """Appends lines to metrics.jsonl and scalars to TensorBoard. A run resumed after `step` drops what came later."""

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / "metrics.jsonl"
        kept = [line for line in read(self.path) if line["step"] <= step]
        whole = self.path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(whole, self.path)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict) -> None:
        """One line, handed to the system when this returns. JSON has no NaN: a number that is not finite is null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """All that was written is with the system when this returns: a kill does not lose it."""
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


def progress(step: int, steps: int, values: dict, seconds_a_step: float) -> str:
    """One line for people: step, loss, learning rate, gradient norm, tokens/s, MFU where known, time to go."""
    parts = [
        f"step {step:{len(str(steps))}}/{steps}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"|g| {values['grad_norm']:.3f}",
        f"{values['tokens_per_second']:,.0f} tok/s",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    parts.append(f"ETA {clock((steps - step) * seconds_a_step)}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """3725 -> 1:02:05; 65 -> 1:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def summary(lines: list[dict], config: Config) -> dict:
    """What the final table says: of the last lines, and of the best validation."""
    last = {name: value for line in lines for name, value in line.items()}
    rows = {"steps": last.get("step", 0), "tokens": last.get("step", 0) * config.data.batch * config.data.length}
    rows |= {name: last[name] for name in ("loss", "skipped", "tokens_per_second", "mfu") if name in last}
    rows |= {name: value for name, value in last.items() if name.startswith("valid_")}
    losses = {line["step"]: line["valid_loss"] for line in lines if line.get("valid_loss") is not None}
    if losses:
        rows["best_valid_loss"] = min(losses.values())
        rows["best_step"] = min(losses, key=losses.get)
    return rows


def table(rows: dict) -> str:
    """Two columns."""
    width = max(map(len, rows))
    shown = {name: f"{value:,.4f}" if isinstance(value, float) else f"{value}" for name, value in rows.items()}
    return "\n".join(f"  {name:{width}}  {value}" for name, value in shown.items())


def draw_curve(path: Path, lines: list[dict], config: Config) -> None:
    """Training and validation loss against the step, as PNG; in bits a byte where a token is a byte."""
    import matplotlib  # slow to import, and needed once

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scale = bits_per_byte(1.0, config.data)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150)
    styles = {"loss": ("training", {"alpha": 0.6, "lw": 0.8}), "valid_loss": ("validation", {"marker": "o", "ms": 3})}
    for name, (label, style) in styles.items():
        points = [(line["step"], line[name] * (scale or 1)) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="bits per byte" if scale else "loss, nats per token", title=config.name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
