"""Read what experiment files ask and what their result files found: the report and the READMEs are drawn from it.

An experiment is a file under experiments/ with get_config(). `launch.sweep` says what else it may have; for the report:

    PAPER   {variant: number}: the source's value of METRIC, as tables show it (accuracies in percent); for a loss, its
            perplexity
    SIZES   {line: {variant: size}}: the figure has METRIC by size, a line for each group of variants; without SIZES it
            has the metric by length
    SIZE    what the sizes are, "d_state"
    DECODE  a result of experiments/benchmarks/decode.py: loss is drawn against its times and states
"""

import re
import runpy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.benchmarks import common
from launch.common import MODULE, of_config_file
from launch.plan import check_said, check_sizes
from launch.provenance import REPOSITORY
from mamba3_jax.config import Config, check
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import comparison

FOLDER = REPOSITORY / "experiments"
MISSING = "not run yet"


@dataclass(frozen=True)
class Experiment:
    """What a file asks, and its result in the form that `launch.sweep` writes (None: not run yet)."""

    name: str
    question: str
    command: str = ""
    cost: str = ""
    variants: dict[str, dict] = field(default_factory=dict)
    sweep: bool = True  # False: one run, by experiments/record.py
    expect: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, dict[str, float]] = field(default_factory=dict)
    size: str = "size"
    equal: tuple[tuple[str, str], ...] = ()
    metric: str = ""  # "": that of the result
    trained: int = 0  # the longest length trained at; 0: not known
    result: dict | None = None
    decoding: dict | None = None  # what `experiments/benchmarks/decode.py` recorded
    predicted: dict | None = None  # what `experiments/horizons.py` recorded

    @property
    def rows(self) -> list[dict]:
        return self.result["rows"] if self.result else []

    @property
    def missing(self) -> list[str]:
        """Return the variants of the file that have no row."""
        return [name for name in self.variants if name not in comparison.by_variant(self.rows)]

    @property
    def first(self) -> str:
        """Return the variant that others are compared with."""
        return next(iter(comparison.by_variant(self.rows) or self.variants), "")

    def origins(self, what: str) -> str:
        """Return the commits, dates or devices of the variants, each once."""
        return ", ".join(dict.fromkeys(variant[what] for variant in self.result["variants"].values()))

    @property
    def data(self) -> str:
        """Return the identities of the text that variants were trained and scored on, each once; "" for other data."""
        each = [
            variant.get("data") or variant.get("asked", {}).get("data") for variant in self.result["variants"].values()
        ]
        said = [", ".join(f"{split} {identity}" for split, identity in data.items()) for data in each if data]
        return "; ".join(dict.fromkeys(said))


def experiments(folder: Path = FOLDER) -> list[Experiment]:
    """Return every experiment of a folder: those of its files, then results of sweeps whose file is gone."""
    paths = sorted(path for path in folder.rglob("*.py") if "\ndef get_config(" in path.read_text())
    found, files = [read(path, folder / "results") for path in paths], {}
    for path, experiment in zip(paths, found, strict=True):
        if (other := files.setdefault(experiment.name, path)) is not path:
            raise ValueError(f"{other} and {path} are both called {experiment.name!r}: their results would be one file")
    for path in sorted((folder / "results").glob("*.json")):
        result = common.read(path.stem, path.parent)
        if is_sweep(result) and path.stem not in files:
            check_sweep(path, result)
            found.append(Experiment(path.stem, f"{path.stem}: its file is gone", result=result))
    return found


def given_by(path: Path) -> tuple[dict, Config]:
    """Run a file; return its names and its config; ValueError if it fails, or has a wrong value in one of the names."""
    try:
        given = runpy.run_path(str(path), run_name=MODULE)
        config = given["get_config"]()
    except (Exception, SystemExit) as error:
        why = of_config_file(error) or f"{type(error).__name__}: {error}"
        raise ValueError(why if str(path) in why else f"{path}: {why}") from None
    if not isinstance(config, Config):
        raise ValueError(f"{path}: get_config() does not return a mamba3_jax.config.Config")
    check_said(path, given)
    try:
        check(config)
        check_sizes(given.get("VARIANTS", {config.name}), given.get("SIZES", {}), given.get("EQUAL", ()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return given, config


def read(path: Path, results: Path) -> Experiment:
    """Return the experiment of a file.

    Raises:
        ValueError: EXPECT or PAPER names something that is none of the variants, or the file or a result cannot be
            read.
    """
    given, config = given_by(path)
    if not (text := given["__doc__"]):
        raise ValueError(f"{path}: wanted a docstring, whose first line is the question")
    variants = given.get("VARIANTS", {config.name: {}})
    for table in ("EXPECT", "PAPER"):
        if unknown := sorted(set(given.get(table, {})) - set(variants)):
            raise ValueError(f"{path}: {table} has {unknown[0]!r}, which is none of its variants")
    for name, number in given.get("PAPER", {}).items():
        if number <= 0 and comparison.is_loss(given.get("METRIC", "")):
            raise ValueError(f"{path}: PAPER={{{name!r}: {number}}} is not a perplexity, and METRIC is a loss")
    command, cost = (
        re.search(r"^ +(python -m .*)$", text, re.M),
        re.search(r"^Cost: (.+?)(?:[.;,] |[.;]$| \(|$)", text, re.M),
    )
    return Experiment(
        name=config.name,
        question=text.split("\n")[0],
        command=command[1] if command else "",
        cost=cost[1] if cost else "",
        variants=variants,
        sweep="VARIANTS" in given,
        expect=given.get("EXPECT", {}),
        paper=given.get("PAPER", {}),
        sizes=given.get("SIZES", {}),
        size=given.get("SIZE", "size"),
        equal=tuple(given.get("EQUAL", ())),
        metric=given.get("METRIC", ""),
        trained=config.data.task_lengths[-1]
        if config.data.task_lengths and config.data.source in TASKS
        else config.data.length,
        result=result_of(results / f"{config.name}.json", config),
        decoding=common.read(given.get("DECODE", ""), results.parent / "benchmarks" / "results"),
        predicted=common.read(f"{config.name}_predicted", results),
    )


def of_each(function: Callable, experiments: Iterable[Experiment]) -> list:
    """Return what a function draws of each experiment; ValueError, naming the result, where it cannot be drawn."""
    drawn = []
    for experiment in experiments:
        with common.drawing(f"{experiment.name}.json, or what goes with it,"):
            drawn.append(function(experiment))
    return drawn


def is_sweep(result: dict) -> bool:
    """Tell whether a result is a sweep's."""
    return {"metric", "shown", "variants", "rows"} <= set(result)


def check_sweep(path: Path, result: dict) -> None:
    """Raise ValueError for a sweep's result that lacks something that is drawn."""
    try:
        comparison.table(result["rows"], (result["metric"], *result["shown"]), result["metric"])
        origins = [variant[what] for variant in result["variants"].values() for what in ("device", "commit", "date")]
        all_of = [result["jax"], result["command"], f"{result['seconds']:.0f}", *origins]
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not all(isinstance(part, str) for part in all_of):
        raise ValueError(f"{path} is damaged: where it comes from is not text")


def result_of(path: Path, config: Config) -> dict | None:
    """Return a result in a sweep's form; None if there is none, or it is another program's."""
    result = common.read(path.stem, path.parent) or {}
    if is_sweep(result):
        check_sweep(path, result)
        return result
    if not {"rows", "step"} <= set(result):
        return None
    with common.drawing(path):
        shown = [f"bits_per_byte@{score['length']}" for score in result["rows"]]
        seconds = sum(result["seconds"].values())
        rate = config.optimizer.learning_rate
        row = {"variant": config.name, "seed": 0, "learning_rate": rate, "scores": result["rows"]}
        made = {"rows": [row], "metric": shown[0], "shown": shown, "seconds": seconds}
        return result | made | {"variants": {config.name: result}}
