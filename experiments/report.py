"""Draws what the experiments found: one page with tables and pictures, from experiments/results/*.json.

    python -m experiments.report            rewrite experiments/report/index.html and the pictures that changed
    python -m experiments.report --check    change nothing; fail if the page or a picture is out of date

Every experiment file is on it; what has no result is "not run yet". The page depends on nothing but files and results.
"""

import sys
from html import escape
from pathlib import Path

from absl import app, flags

from experiments import found, summary
from experiments.figures import metric
from experiments.found import MISSING, Experiment
from launch.common import parse, user_errors
from launch.provenance import REPOSITORY
from mamba3_jax.evaluate import comparison

FOLDER = found.FOLDER / "report"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
code { background: #f4f4f4; padding: .1em .3em; border-radius: 3px; font-size: .9em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td { white-space: nowrap; } td small { color: #666; white-space: normal; display: block; }
th { font-weight: 600; } img { max-width: 100%; } figure { margin: 1rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dt { color: #666; } dd { margin: 0; }
.no { color: #b00020; font-weight: 600; } .yes { color: #1b7a36; } .missing { color: #777; font-style: italic; }
"""
CAUSES = {"forgetting": "forgetting", "angles": "angles", "both": "both", "half_step": "half a step"}
INTRODUCTION = """
<p>Drawn by <code>python -m experiments.report</code> from <code>experiments/results/*.json</code>, which the programs
that measured wrote. A variant is shown at its best learning rate, with a number for every seed; the last column of a
table with several seeds is the mean difference to the first variant, seed by seed, with its 95% interval. Of four
seeds or more, losses are a mean and a standard deviation. The paper's difference of a loss is the logarithm of the
ratio of its perplexities. What was expected was written down before the run.
<code>NAME@LENGTH</code> is a metric at that length. Accuracies are in percent; <code>scaled_last</code> is that of the
last answer, with chance at 0 and always right at 100. Of <code>bits_per_byte</code> and losses less is better.</p>
"""


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Return a table; the cells are HTML."""
    row = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"  # noqa: E731
    rows = "\n".join(row("td", line) for line in lines)
    return f'<div class="wide"><table>\n{row("th", heads)}\n{rows}\n</table></div>'


def cell(text: str) -> str:
    """Return a cell's text, what is missing told apart."""
    return f'<span class="missing">{MISSING}</span>' if text == MISSING else escape(text)


def variant_cell(experiment: Experiment, name: str) -> str:
    """Return a variant's name above its size and the fields that it sets."""
    notes = [f"{path.partition('.')[2] or path}={value}" for path, value in experiment.variants.get(name, {}).items()]
    size = experiment.result and experiment.result["variants"].get(name, {}).get("parameters")
    notes += [f"{size:,} parameters"] if size else []
    return escape(name) + (f"<small>{escape(', '.join(notes))}</small>" if notes else "")


def comparison_table(experiment: Experiment) -> str:
    """Return the comparison, a line a variant."""
    heads, *lines = summary.cells(experiment)
    rows = [[variant_cell(experiment, line[0]), *map(cell, line[1:])] for line in lines]
    return table([escape(head).replace("@", "<wbr>@") for head in heads], rows)


def facts(experiment: Experiment) -> str:
    """Return the command, what it cost, where and when, and the identity of its text."""
    result = experiment.result
    known = {"command": f"<code>{escape(result['command'] if result else experiment.command)}</code>"}
    if experiment.cost:
        known["cost"] = escape(experiment.cost)
    if result:
        known["took"] = f"{result['seconds']:,.0f} s on {escape(experiment.origins('device'))}"
        known["commit"] = escape(f"{experiment.origins('commit')}, {experiment.origins('date')}, jax {result['jax']}")
        if experiment.data:
            known["data"] = escape(experiment.data)
    else:
        known["result"] = cell(MISSING)
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in known.items()) + "</dl>"


def predictions(experiment: Experiment) -> str:
    """Return where the best members fail beside where that was predicted; "-" is what cannot be predicted of one."""
    if not experiment.predicted:
        return ""
    lines = []
    for row in experiment.predicted["rows"]:
        parts = [row, *(row["predicted"][cause] for cause in CAUSES)]
        cells = ["-" if "absent" in part else shown_length(part["fails"], row["trained"]) for part in parts]
        lines.append([escape(row["variant"]), *cells, *map(restored_cell, row["restored"])])
    origin = experiment.predicted
    said = (
        "<p>The length at which the last answer of the best member is halfway to chance, and the same predicted from "
        "rows of the trained length alone: by the decay of the memory of the row's beginning, by what its rotations "
        "miss a token, by both, and by the rule of half a step between two products. Last: scaled accuracy at 1.5 and "
        "2 times the trained length, as it is, and with the memory of the beginning as large as at the trained length "
        f"(<code>{escape(origin['command'])}</code>, {escape(origin['commit'])}, {escape(origin['date'])}):</p>"
    )
    return said + table(["variant", "measured", *CAUSES.values(), "restored at 1.5", "restored at 2"], lines)


def restored_cell(part: dict) -> str:
    """Write scaled accuracies of one length, in percent: as it is, and with the memory as large as before."""
    return "-" if "absent" in part else f"{100 * part['as_it_is']:.1f}, {100 * part['scaled_back']:.1f}"


def shown_length(fails: float | None, trained: int) -> str:
    """Write a length at which a model fails."""
    if fails is None:
        return "at none asked"
    return f"{trained} or before" if fails == trained else f"{fails:.0f}"


def expectations(experiment: Experiment) -> str:
    """Return the expectations of the file with what was found."""
    looks = {True: "yes", False: "no", None: "missing"}
    said = [f'<li class="{looks[holds]}">{escape(text)}</li>' for holds, text in summary.expectations(experiment)]
    return "<p>Expected:</p>\n<ul>\n" + "\n".join(said) + "\n</ul>" if said else ""


def listed(said: str, items: list[str]) -> str:
    """Return sentences under what they are."""
    lines = "\n".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<p>{escape(said)}</p>\n<ul>\n{lines}\n</ul>" if items else ""


def section(experiment: Experiment) -> str:
    """Return all of one experiment."""
    drawn = metric.pictures(experiment) if experiment.result else {}
    pictures = [
        f'<figure><img src="{escape(name)}" alt="{escape(metric.alt(figure))}"></figure>'
        for name, figure in drawn.items()
    ]
    parts = [
        f'<h2 id="{escape(experiment.name)}">{escape(experiment.name)}</h2>',
        f"<p>{escape(experiment.question)}</p>",
        facts(experiment),
        *pictures,
        comparison_table(experiment),
        listed(
            "Not told apart from the first variant; what is known is a bound (95%):", summary.unresolved(experiment)
        ),
        listed("Equal loss, by interpolation in log2 of the size (95%):", summary.equals(experiment)),
        predictions(experiment),
        expectations(experiment),
    ]
    return "\n".join(part for part in parts if part)


def first_line(experiment: Experiment) -> list[str]:
    """Return an experiment's line of the first table."""
    holds, run = [holds for holds, _ in summary.expectations(experiment)], len(comparison.by_variant(experiment.rows))
    kept = f"{holds.count(True)} of {len(holds)}" if holds else "-"
    if not run:
        kept = "-"
    elif None in holds:
        kept += f", {holds.count(None)} {MISSING}"
    if False in holds:
        kept = f'<span class="no">{kept}</span>'
    name = escape(experiment.name)
    result = experiment.result
    took, date = (f"{result['seconds']:,.0f} s", experiment.origins("date")) if result else ("-", "-")
    variants = f"{run} of {run + len(experiment.missing)}" if run else cell(MISSING)
    name = f'<a href="#{name}">{name}</a><small>{escape(experiment.question)}</small>'
    return [name, variants, kept, took, date]


def page(experiments: list[Experiment]) -> str:
    """Return the page, those that have run first."""
    experiments = sorted(experiments, key=lambda experiment: experiment.result is None)
    heads = ["experiment", "variants run", "as expected", "took", "date"]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>mamba3_jax: experiments</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>What the experiments found</h1>{INTRODUCTION}",
        table(heads, found.of_each(first_line, experiments)),
        *found.of_each(section, experiments),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def pictures(experiments: list[Experiment]) -> dict[str, tuple[Experiment, metric.Drawn]]:
    """Return what is drawn, by the name of the file."""
    run = [experiment for experiment in experiments if experiment.result]
    drawn = zip(run, found.of_each(metric.pictures, run), strict=True)
    return {name: (experiment, picture) for experiment, own in drawn for name, picture in own.items()}


def outdated(experiments: list[Experiment], folder: Path = FOLDER) -> list[str]:
    """Return the names of files in the folder that are not what the results say, or that nothing is drawn in."""
    run = pictures(experiments)
    index = folder / "index.html"
    names = [] if index.exists() and index.read_text() == page(experiments) else [index.name]
    for name, (experiment, drawn) in run.items():
        path = folder / name
        if not path.exists() or metric.source(experiment, drawn).encode() not in path.read_bytes():
            names.append(name)
    return names + sorted({path.name for path in folder.glob("*.png")} - set(run))


def write(experiments: list[Experiment], folder: Path = FOLDER) -> list[str]:
    """Bring the folder up to date; return what was written or removed."""
    changed, known = outdated(experiments, folder), pictures(experiments)
    folder.mkdir(parents=True, exist_ok=True)
    for name in changed:
        if name == "index.html":
            (folder / name).write_text(page(experiments))
        elif name in known:
            metric.draw(*known[name], folder / name)
        else:
            (folder / name).unlink()
    return changed


def main(_):
    with user_errors():  # a file or a result that cannot be read or drawn
        experiments = found.experiments()
        changed = outdated(experiments) if flags.FLAGS.check else write(experiments)
    if flags.FLAGS.check and changed:
        names = ", ".join(changed)
        sys.exit(f"Out of date in {FOLDER.relative_to(REPOSITORY)}: {names}: run python -m experiments.report")
    for name in changed:
        print(f"rewrote {FOLDER.relative_to(REPOSITORY) / name}")


if __name__ == "__main__":
    flags.DEFINE_bool("check", False, "change nothing, fail if the page or a picture is out of date")
    app.run(main, flags_parser=parse)
