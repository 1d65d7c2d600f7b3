"""Write the tables and sentences about an experiment: its numbers beside the paper's, and what was expected of them."""

import math

from experiments.found import MISSING, Experiment
from mamba3_jax.evaluate import comparison, equal


def expectations(experiment: Experiment) -> list[tuple[bool | None, str]]:
    """Return, for every expectation of the file, whether it holds (None: not run yet), and a sentence about it.

    Raises:
        ValueError: an expectation is about a length that the recorded sweep did not score.
    """
    found = {
        each["variant"]: each
        for each in comparison.expected(experiment.rows, experiment.expect, next(iter(experiment.variants), ""))
    }
    return [
        (found[variant]["holds"], comparison.said(found[variant]))
        if variant in found
        else (None, f"{variant}: {wanted} {MISSING}: {span(wanted, least, most)}")
        for variant, (wanted, least, most) in experiment.expect.items()
    ]


def span(wanted: str, least: float, most: float) -> str:
    """Write the bounds of an expectation."""
    return " .. ".join(comparison.shown(number, wanted.partition(" ")[2]) for number in (least, most))


def cells(experiment: Experiment) -> list[list[str]]:
    """Return the comparison as cells: heads, then a line a variant, missing ones too; the paper's columns are last."""
    result, lines = experiment.result, []
    if result:
        drawn = comparison.table(result["rows"], result["shown"], result["metric"]).splitlines()
        lines = [line.strip("|").split("|") for line in (drawn[0], *drawn[2:])]
        lines = [[cell.strip() for cell in line] for line in lines]
    heads, *lines = lines or [["variant", "learning rate"]]
    lines += [[name, MISSING, *[""] * (len(heads) - 2)] for name in experiment.missing]
    metric = result["metric"] if result else experiment.metric
    if experiment.paper and comparison.is_loss(metric):
        heads = [*heads, "paper, perplexity", f"paper over {experiment.first}"]
        lines = [[*line, paper(experiment, line[0]), paper_over(experiment, line[0])] for line in lines]
    elif experiment.paper:
        heads = [*heads, f"best {metric}".strip(), "paper"]
        lines = [[*line, best(experiment, line[0]), paper(experiment, line[0])] for line in lines]
    return [heads, *lines]


def paper_difference(experiment: Experiment, variant: str, first: str) -> float | None:
    """Return the paper's difference in nats, ln(perplexity / perplexity of the first); None where one is missing."""
    both = [experiment.paper.get(name) for name in (variant, first)]
    metric = experiment.result["metric"] if experiment.result else experiment.metric
    known = None not in both and comparison.is_loss(metric)
    return math.log(both[0] / both[1]) if known else None


def paper_over(experiment: Experiment, variant: str) -> str:
    """Write the paper's difference to the first variant, a dash where it has none."""
    number = paper_difference(experiment, variant, experiment.first)
    if variant == experiment.first:
        return ""
    return "-" if number is None else f"{number:.4f}"


def unresolved(experiment: Experiment) -> list[str]:
    """Return a sentence for every variant that is not told apart from the first, with the bounds of its difference."""
    if not experiment.result:
        return []
    metric, grouped, said = experiment.result["metric"], comparison.by_variant(experiment.rows), []
    for variant, rows in grouped.items():
        mean, half = comparison.difference(rows, grouped[experiment.first], metric)
        if variant != experiment.first and abs(mean) <= half:
            low, high = (comparison.shown(number, metric) for number in (mean - half, mean + half))
            number = paper_difference(experiment, variant, experiment.first)
            inside = "inside" if number is not None and abs(number - mean) <= half else "outside"
            theirs = "" if number is None else f"; the paper's {number:.4f} is {inside}"
            said.append(f"{variant} over {experiment.first}, {metric}: between {low} and {high}{theirs}")
    return said


def equals(experiment: Experiment) -> list[str]:
    """Return a sentence for every pair of EQUAL: the size at which a line has the number of a variant."""
    if not experiment.result:
        return []
    metric, said = experiment.result["metric"], []
    found = equal.equals(experiment.rows, experiment.sizes, experiment.equal, metric)
    for (line, variant), crossing in found.items():
        theirs = paper_equal(experiment, line, variant)
        sentence = equal.said(line, experiment.size, variant, metric, crossing)
        said.append(sentence + (f"; the paper's is {theirs}" if theirs else ""))
    return said


def paper_equal(experiment: Experiment, line: str, variant: str) -> str:
    """Write at which size a line has a variant's number, by the paper's numbers; "" where it lacks one of them."""
    names = experiment.sizes[line]
    if not {variant, *names} <= experiment.paper.keys():
        return ""
    sizes = {size: name for name, size in sorted(names.items(), key=lambda item: item[1])}
    numbers = [math.log(experiment.paper[name]) for name in sizes.values()]
    at = equal.crossing([math.log2(size) for size in sizes], numbers, math.log(experiment.paper[variant]))
    ends = {"below": min(sizes), "above": max(sizes)}
    return f"{at} {ends[at]:g}" if isinstance(at, str) else f"{2**at:.3g}"


def best(experiment: Experiment, variant: str) -> str:
    """Write the best seed's number at the best learning rate, to stand beside a paper's."""
    rows, metric = (
        comparison.by_variant(experiment.rows).get(variant),
        experiment.result and experiment.result["metric"],
    )
    return comparison.shown(comparison.statistic(rows, f"best {metric}"), metric) if rows else ""


def paper(experiment: Experiment, variant: str) -> str:
    """Write the paper's number, a dash where it has none."""
    number = experiment.paper.get(variant)
    return "-" if number is None else f"{number:g}"


def markdown(experiment: Experiment) -> str:
    """Return the table in Markdown, with a line that says where it comes from."""
    heads, *lines = cells(experiment)
    drawn = ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines)]
    return "\n".join([*drawn, "", origin(experiment)])


def origin(experiment: Experiment) -> str:
    """Return a line that says where a result, that is, all of its variants, comes from."""
    if not experiment.result:
        return f"`{experiment.command}`: {MISSING}."
    device, commit, date = (experiment.origins(what) for what in ("device", "commit", "date"))
    result = experiment.result
    return f"{device}, jax {result['jax']}, commit {commit}, {date}, {result['seconds']:.0f} s: `{result['command']}`"


def overview(experiment: Experiment) -> dict[str, str]:
    """Return the row of a sweep in the table of all experiments."""
    got, result = MISSING, experiment.result
    if result:
        metric, each = result["metric"], []
        grouped = comparison.by_variant(result["rows"])
        for name, own in grouped.items():
            mean, half = comparison.difference(own, grouped[experiment.first], metric)
            if name != experiment.first and comparison.is_loss(metric) and math.isfinite(half):
                theirs = paper_difference(experiment, name, experiment.first)
                beside = "" if theirs is None else f" (paper {theirs:+.4f})"
                each.append(f"{name} {mean:+.4f} ± {half:.4f}{beside}")
            else:
                each.append(f"{name} {comparison.of_seeds(comparison.at_best_rate(own, metric), metric)}")
        each += [*(f"{name} {MISSING}" for name in experiment.missing), *equals(experiment)]
        got = f"{metric}: {', '.join(each)} ({experiment.origins('commit')}, {experiment.origins('device')})"
    expected = [f"{name}: {what} {span(what, *bounds)}" for name, (what, *bounds) in experiment.expect.items()]
    return {
        "question": experiment.question,
        "command": f"`{experiment.command or result['command']}`",
        "cost": experiment.cost or "-",
        "expected": ", ".join(expected) or "-",
        "got": got,
    }
