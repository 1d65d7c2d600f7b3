"""What the benchmarks share: timing, where and when a figure was taken, result files and tables."""

import contextlib
import dataclasses
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import flags

from launch import tpu
from launch.common import parse as parse  # for `app.run` of all
from launch.common import user_errors
from mamba3_jax.files import read_json, write_json

flags.disclaim_key_flags()  # flags that are defined here count as the calling program's, so its --help lists them
RESULTS = Path(__file__).parent / "results"
_ONE_THREAD = threading.RLock()


@contextlib.contextmanager
def tracing():
    """Let one thread at a time trace: around a `lower`, or as `@tracing()` on a function that only jax.jit calls.

    Flax changes dictionaries of its classes while it traces, so a second thread that traces may see one change under
    it and fail. XLA compiles outside of this, side by side.
    """
    with _ONE_THREAD:
        yield


def prepare_tpu() -> dict:
    """Make the TPU compiler ready and return what a result file says of it; exit with a line where there is none."""
    try:
        version = tpu.prepare()
    except ValueError as error:
        sys.exit(str(error))
    return {"platform": "tpu", "device": f"no TPU (libtpu {version})", "libtpu": version}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, over several batches of calls."""

    median: float
    best: float
    batches: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), len(seconds))


def seconds_a_call(function: Callable, calls: int) -> float:
    """Time one batch, `calls` asynchronous calls and one wait for the last result; return the seconds a call."""
    begin = time.perf_counter()
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls


def calls_for(seconds: float, batch_seconds: float) -> int:
    """Return how many calls of about `seconds` fill a batch of `batch_seconds`: from 1 to 1,000."""
    return max(1, min(1000, round(batch_seconds / max(seconds, 1e-7))))


def measure(function: Callable, *, batch_seconds: float = 0.2, batches: int = 5, warm_up: int = 2) -> Timing:
    """Time `function()`: warm up (this compiles), size a batch to about `batch_seconds`, time `batches` of them."""
    for _ in range(warm_up):
        jax.block_until_ready(function())
    calls = calls_for(seconds_a_call(function, 1), batch_seconds)
    return Timing.of([seconds_a_call(function, calls) for _ in range(batches)])


def interleave(clocks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Time several functions by turns, A B A B ..., so that noise of the machine falls on all alike.

    Args:
        clocks: by name, a function that runs one batch and returns its seconds a call.
        rounds: batches of each.
    """
    seconds = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            seconds[name].append(clock())
    return {name: Timing.of(taken) for name, taken in seconds.items()}


def rel_rms(got, want) -> float:
    """Return the RMS of the difference over the RMS of the reference, in float64; 0/0 is 0."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"the result has shape {got.shape}, the reference {want.shape}")
    difference = np.sqrt(np.mean(np.square(got - want)))
    return float(difference / np.sqrt(np.mean(np.square(want)))) if difference != 0 else 0.0


def require(errors: Mapping[str, float], tolerance: float, what: str) -> float:
    """Return the largest of `errors`; ValueError, naming the arrays, if any is over `tolerance` or is not a number.

    A benchmark calls this before it reports a time: a fast wrong answer is not a result.
    """
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        listed = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        raise ValueError(f"{what}: relative error over {tolerance:.0e} in {listed}; no time is reported")
    return max(errors.values(), default=0.0)


def compiled_all(compile: Callable, programs: Sequence, name: str = "") -> list:
    """Compile programs side by side, all before anything is timed, and say how long that took."""
    begin = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(compile, programs))
    what = f"{name}: " if name else ""
    print(f"{what}{len(programs)} programs compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    return found


def one_line(error: Exception) -> str:
    """Return an error's message in one line, its first 300 characters, for the row of a program that failed."""
    return " ".join(str(error).split())[:300]


def temp_mib(compiled) -> float:
    """Return the temporary memory of a compiled function, MiB."""
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def define_result(name: str | None = None, empty: str = "", commit: bool = False) -> None:
    """Define the flags of a result file: --out, its folder, and where asked for --name and --commit.

    Args:
        name: default of --name; None: the program names its file.
        empty: what an empty --name means, for --help.
        commit: define --commit, for machines that have the code without git.
    """
    flags.DEFINE_string("out", "", "directory of the result file; empty: experiments/benchmarks/results")
    if name is not None:
        flags.DEFINE_string("name", name, f"of the result file{empty and f'; empty: {empty}'}")
    if commit:
        flags.DEFINE_string("commit", "", "recorded where the code runs outside its git checkout")


def numbers(flag: str, least: int = 1) -> list[int]:
    """Return the whole numbers of a list flag; for anything else, or one below `least`, exit with a line."""
    given = flags.FLAGS[flag].value
    with user_errors():
        if wrong := [part for part in given if not part.isdecimal() or int(part) < least]:
            raise ValueError(f"--{flag}={','.join(given)}: {wrong[0]!r} is not a whole number from {least} up")
    return [int(part) for part in given]


def write(name: str, origin: dict, rows: Sequence[Mapping], directory: str | Path = "", **more) -> Path:
    """Write one result file, `NAME.json`: `origin` (see `provenance`), anything in `more`, and the rows.

    Returns its path. The file is replaced whole or not at all.
    """
    directory = Path(directory or RESULTS)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    write_json(path, {"benchmark": name, **origin, **more, "rows": list(rows)})
    return path


def read(name: str, directory: str | Path = "") -> dict | None:
    """Return the result file of that name, or None if it was never taken; ValueError for one that is damaged."""
    path = Path(directory or RESULTS) / f"{name}.json"
    if not path.exists():
        return None
    found = read_json(path)
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a result: it has no rows")
    return found


@contextlib.contextmanager
def drawing(what: str | Path):
    """Raise ValueError, one line that names a result file, where the file lacks what is drawn of it or is malformed."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be drawn: {type(error).__name__}: {error}") from None


def significant(value, digits: int = 3) -> str:
    """Format a value for a table: numbers with so many significant digits, None as a dash, text as it is."""
    if value is None:
        return "-"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{places}f}"


def show(row: Mapping, columns: Mapping[str, str]) -> None:
    """Print a row as a line of the table that it will be in."""
    print(table([row], columns).splitlines()[-1], flush=True)


def table(rows: Sequence[Mapping], columns: Mapping[str, str]) -> str:
    """Return rows as a markdown table; `columns` maps each heading to the key of a row that it shows."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(significant(row.get(key)) for key in columns.values()) + " |" for row in rows]
    return "\n".join(lines)
