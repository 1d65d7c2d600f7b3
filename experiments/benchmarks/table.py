"""Puts measured numbers into the README files: everything between two markers is drawn from the result files.

    python -m experiments.benchmarks.table            rewrite README.md and experiments/README.md
    python -m experiments.benchmarks.table --check    change nothing; fail if a table is out of date

A table stands between `<!-- table:NAME -->` and `<!-- end -->`; NAME is in TABLES. Nobody writes there by hand.
"""

import functools
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags

from experiments import found, summary
from experiments.benchmarks import (
    common,
    decode,
    depth,
    layer,
    meshes,
    pods,
    population,
    restore,
    scaling,
    ssm,
    tpu_aot,
    train,
)
from experiments.benchmarks.experiments import EXPERIMENTS, HEADLINES
from launch.common import user_errors
from launch.provenance import REPOSITORY
from mamba3_jax.evaluate import language

FILES = (REPOSITORY / "README.md", REPOSITORY / "experiments" / "README.md")
PLACE = re.compile(r"<!-- table:(\S+) -->\n.*?<!-- end -->", re.DOTALL)
MISSING = "Not measured yet."

FLAGS = flags.FLAGS


def results(kind: str) -> dict[Path, dict]:
    """Return every result of one kind by its file, one a platform: layer_cpu.json, ssm_gpu.json, ..."""
    return {path: common.read(path.stem) for path in sorted(common.RESULTS.glob(f"{kind}_*.json"))}


def origin(result: dict) -> str:
    """Say where a result comes from, in one line."""
    return (
        f"{result['device']}, jax {result['jax']}, commit {result['commit']}, {result['date']}: `{result['command']}`"
    )


def table_of(kind: str, columns: dict[str, str]) -> Callable[[], str]:
    """Return what draws one table a result file of that kind, each above its origin."""

    def draw() -> str:
        drawn = []
        for path, result in results(kind).items():
            with common.drawing(path):
                drawn.append(f"{common.table(result['rows'], used(result['rows'], columns))}\n\n{origin(result)}")
        return "\n\n".join(drawn) or MISSING

    return draw


def used(rows: list[dict], columns: dict[str, str]) -> dict[str, str]:
    """Return the columns that some row has a value in."""
    return {head: key for head, key in columns.items() if any(row.get(key) is not None for row in rows)}


def experiments_table() -> str:
    """Draw one row an experiment: question, command, cost, expected, got."""
    rows = found.of_each(summary.overview, sweeps())
    for experiment in EXPERIMENTS:
        path = REPOSITORY / "experiments" / experiment.result
        result = common.read(path.stem, path.parent)
        with common.drawing(path):
            got = "not run yet" if result is None else experiment.got(result)
            where = "" if result is None else f" ({result['commit']}, {result['device']})"
        row = {"question": experiment.question, "command": f"`{experiment.command}`", "cost": experiment.cost}
        rows.append(row | {"expected": experiment.expected, "got": got + where})
    return common.table(rows, {name: name for name in ("question", "command", "cost", "expected", "got")})


def results_table() -> str:
    """Draws the short table of the main README: a number, the device, and the command that measures it."""
    rows = []
    for headline in HEADLINES:
        path = REPOSITORY / "experiments" / headline.result
        result = common.read(path.stem, path.parent)
        with common.drawing(path):
            number, device = ("not run yet", None) if result is None else (headline.number(result), result["device"])
        rows.append({"what": headline.what, "number": number, "on": device, "command": f"`{headline.command}`"})
    return common.table(rows, {name: name for name in ("what", "number", "on", "command")})


def evaluation_table() -> str:
    """Draws what `launch.evaluate` printed of the recorded run of text, a line a length."""
    path = REPOSITORY / "experiments" / "results" / "text.json"
    result = common.read(path.stem, path.parent)
    if result is None:
        return MISSING
    with common.drawing(path):
        scores = language.table(result["rows"], result["rows"][0]["length"]).split("\n\n")[0]
    return "\n" + textwrap.indent(scores, "    ") + "\n"


def pods_table(name: str = "pods") -> str:
    """Draws the steps compiled for pods."""
    result = common.read(name)
    if result is None:
        return MISSING
    with common.drawing(common.RESULTS / f"{name}.json"):
        rows = pods.drawn(result["rows"])
        return f"{common.table(rows, used(rows, pods.COLUMNS))}\n\n{origin(result)}"


def scaling_table() -> str:
    """Draws what limits steps on more chips, under what it is computed from."""
    result = common.read("pods")
    if result is None:
        return MISSING
    with common.drawing(common.RESULTS / "pods.json"):
        given = common.table(scaling.read_table(result["rows"]), scaling.READ)
        return f"{given}\n\n{common.table(scaling.table(result['rows']), scaling.COLUMNS)}"


def sweeps_table() -> str:
    """Draws the comparison of every sweep that has run, under its question."""
    run = [sweep for sweep in sweeps() if sweep.result]
    return "\n\n".join(found.of_each(lambda sweep: f"{sweep.question}\n\n{summary.markdown(sweep)}", run)) or MISSING


def sweeps() -> list[found.Experiment]:
    """Return the experiments that are sweeps."""
    return [experiment for experiment in found.experiments() if experiment.sweep]


TABLES = {
    "sweeps": sweeps_table,
    "layer": table_of("layer", layer.COLUMNS),
    "ssm": table_of("ssm", ssm.COLUMNS),
    "train": table_of("train", train.COLUMNS),
    "decode": table_of("decode", decode.COLUMNS),
    "growth": table_of("growth", ssm.GROWTH_COLUMNS),
    "depth": table_of("depth", depth.COLUMNS),
    "population": table_of("population", population.COLUMNS),
    "tpu_aot": table_of("tpu", tpu_aot.COLUMNS),
    "pods": pods_table,
    "pods_before": functools.partial(pods_table, "pods_before"),
    "scaling": scaling_table,
    "meshes": table_of("meshes", meshes.COLUMNS),
    "restore": table_of("restore", restore.COLUMNS),
    "experiments": experiments_table,
    "results": results_table,
    "evaluation": evaluation_table,
}


def render(text: str) -> str:
    """Return the text with every marked table drawn anew.

    Raises:
        ValueError: a marker that names no table.
    """

    def draw(match: re.Match) -> str:
        name = match.group(1)
        if name not in TABLES:
            raise ValueError(f"<!-- table:{name} -->: there is no such table, only {sorted(TABLES)}")
        return f"<!-- table:{name} -->\n{TABLES[name]()}\n<!-- end -->"

    return PLACE.sub(draw, text)


def outdated(paths: tuple[Path, ...]) -> dict[Path, str]:
    """Return the files whose tables differ from the results, and what they should say."""
    texts = {path: path.read_text() for path in paths if path.exists()}
    return {path: render(text) for path, text in texts.items() if render(text) != text}


def main(argv):
    del argv
    jax.config.update("jax_platforms", "cpu")  # shapes alone are asked for
    with user_errors():  # a file or a result that cannot be read or drawn
        changes = outdated(FILES)
    if FLAGS.check and changes:
        names = ", ".join(str(path.relative_to(REPOSITORY)) for path in changes)
        sys.exit(f"Tables are out of date in {names}: run python -m experiments.benchmarks.table")
    for path, text in changes.items():
        path.write_text(text)
        print(f"rewrote {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    flags.DEFINE_bool("check", False, "change nothing, fail if a table is out of date")
    app.run(main, flags_parser=common.parse)
