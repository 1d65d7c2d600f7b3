"""What a run writes about itself: metrics.jsonl, TensorBoard, progress lines, the curve, the final table."""

import contextlib
import io
import json
import math
import statistics
import time
from pathlib import Path

from tensorboardX import summary as tensorboard
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from mamba3_jax.config import Config
from mamba3_jax.files import replace, writing
from mamba3_jax.finite import or_null
from mamba3_jax.train.loss import bits_per_byte

FILE = "metrics.jsonl"  # of a run, in its folder


def read(path: Path, report=lambda _: None) -> list[dict]:
    """Read the lines of a metrics.jsonl that are whole. `report` gets a word about damaged ones, which are left out.

    The last line may have been cut short by a kill: that is not worth a word.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    parsed = {number: _parse(line) for number, line in enumerate(lines, 1)}
    if bad := [number for number, values in parsed.items() if values is None]:
        report(f"{path}: {len(bad)} damaged lines are left out, the first one line {bad[0]}")
    return [values for values in parsed.values() if values is not None]


def _parse(line: bytes) -> dict | None:
    """Return the values of one line; None unless it is a JSON object of a step and numbers."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(values, dict) and isinstance(values.get("step"), int) and all(map(_is_number, values.values()))
    return or_null(values) if good else None


def _is_number(value) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


class Mean:
    """The mean of each metric over the steps since the last logged one, or since the run began or resumed."""

    nothing = dict.fromkeys(("loss", "accuracy", "grad_norm"), (0.0, 0))  # sum and count

    def __init__(self):
        self._sums = dict(self.nothing)

    def add(self, values: dict) -> None:
        """Take in one step; what of it is not finite counts in no mean."""
        for name, (total, count) in self._sums.items():
            if math.isfinite(values[name]):
                self._sums[name] = (total + values[name], count + 1)

    def take(self, values: dict) -> dict:
        """Return these values of the last step with the means in place of its own, its loss as loss_last; begins anew.

        A mean over no step is NaN.
        """
        means = {name: total / count if count else math.nan for name, (total, count) in self._sums.items()}
        self._sums = dict(self.nothing)
        return values | means | {"loss_last": values["loss"]}


class Spent:
    """Where a run's seconds go; what is spent on nothing else goes into training."""

    kinds = ("training", "starting", "compiling", "data", "evaluating", "saving")  # data: waiting for it

    def __init__(self):
        self._seconds, self._since = dict.fromkeys(self.kinds, 0.0), time.perf_counter()

    @contextlib.contextmanager
    def on(self, kind: str):
        """Count what is done inside as this."""
        self.count("training")
        try:
            yield
        finally:
            self.count(kind)

    def count(self, kind: str) -> None:
        """Count the time since the last count as this."""
        now = time.perf_counter()
        self._seconds[kind] += now - self._since
        self._since = now

    def take(self) -> dict:
        """Return the seconds since the last time, as metrics, and begin anew."""
        self.count("training")
        taken = {f"seconds_{kind}": round(seconds, 6) for kind, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self.kinds, 0.0)
        return taken


def goodput(lines: list[dict]) -> dict:
    """Return the seconds of all lines together, and the part of them that was training: of what no kill undid."""
    names = [f"seconds_{kind}" for kind in Spent.kinds]
    total = {name: sum(line.get(name) or 0.0 for line in lines) for name in names}
    everything = sum(total.values())
    return {"goodput": total["seconds_training"] / everything} | total if everything else {}


class Log:
    """Appends lines to metrics.jsonl and scalars to TensorBoard. A run resumed after `step` drops what came later.

    `report` gets a word where damaged lines are dropped too.
    """

    def __init__(self, workdir: Path, step: int, report=lambda _: None):
        self.path = workdir / FILE
        kept = [line for line in read(self.path, report) if line["step"] <= step]
        replace(self.path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept))
        self._file = self.path.open("a")
        self._board = Board(workdir / "tensorboard", step)

    def write(self, step: int, values: dict) -> None:
        """Write one line, which is with the system when this returns; a number that is not finite becomes null."""
        finite = or_null(values)
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        self._board.write(step, {name: value for name, value in finite.items() if value is not None})

    def flush(self) -> None:
        """All that was written is with the system when this returns: a kill does not lose it."""
        self._board.flush()

    def close(self) -> None:
        try:
            with writing(self.path):
                self._file.close()
        finally:
            self._board.close()


class Board:
    """Scalars for TensorBoard, in a new file of `folder`; readers drop what older ones have after `step`.

    Writes in this thread: the thread of `tensorboardX.SummaryWriter` dies of a full disk, and its callers then hang.
    """

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"))
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._events.write_event(event_pb2.Event(step=step + 1, wall_time=time.time(), session_log=start))

    def write(self, step: int, values: dict) -> None:
        """Add a scalar a value."""
        with writing(self.folder):
            for name, value in values.items():
                event = event_pb2.Event(step=step, wall_time=time.time(), summary=tensorboard.scalar(name, value))
                self._events.write_event(event)

    def flush(self) -> None:
        """Hands all that was written to the system."""
        with writing(self.folder):
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        with writing(self.folder):
            self._events.close()


def progress(step: int, steps: int, values: dict, seconds_a_step: float) -> str:
    """Return a line for people: step, mean loss since the last line, learning rate, |g|, tokens/s, MFU, time to go."""
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


def progress_of_many(step: int, steps: int, each: list[dict], seconds_a_step: float) -> str:
    """Write one line for people, of many runs: step, spread of loss and accuracy, tokens/s of all, time to go."""
    parts = [
        f"step {step:{len(str(steps))}}/{steps}",
        f"loss {spread([values['loss'] for values in each])}",
        f"accuracy {spread([values['accuracy'] for values in each])}",
        f"{sum(values['tokens_per_second'] for values in each):,.0f} tok/s of {len(each)} runs",
        f"ETA {clock((steps - step) * seconds_a_step)}",
    ]
    if skipped := sum(values["skipped"] > 0 for values in each):
        parts.append(f"{skipped} have skipped updates")
    return "  ".join(parts)


def spread(values: list[float]) -> str:
    """Write the median, the least and the greatest of what is finite."""
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return "nan"
    return f"{statistics.median(finite):.4f} ({finite[0]:.4f} .. {finite[-1]:.4f})"


def clock(seconds: float) -> str:
    """3725 -> 1:02:05; 65 -> 1:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def summary(lines: list[dict], config: Config) -> dict:
    """Return what the final table says: of the last lines, and of the best validation."""
    last = {name: value for line in lines for name, value in line.items()}
    rows = {"steps": last.get("step", 0), "tokens": last.get("step", 0) * config.data.batch * config.data.length}
    rows |= {name: last[name] for name in ("loss", "loss_last", "skipped", "tokens_per_second", "mfu") if name in last}
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
    """Draws training (means) and validation loss against the step, as PNG; in bits a byte where a token is a byte."""
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
    drawn = io.BytesIO()
    figure.savefig(drawn)
    plt.close(figure)
    replace(path, drawn.getvalue())
