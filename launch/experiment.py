"""What an experiment's file asks for, and what came out: its variants, trained, scored and compared.

`launch/sweep.py` says what stands in such a file. Nothing here reads a flag.
"""

import dataclasses
import functools
import json
import re
import runpy
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from launch import common
from launch.provenance import provenance
from mamba3_jax.checkpoint import replace, save_model
from mamba3_jax.config import Config, check, from_dict, to_dict, with_fields
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import comparison, language, tasks
from mamba3_jax.evaluate.score import Scorer
from mamba3_jax.finite import or_null
from mamba3_jax.model import LanguageModel
from mamba3_jax.train.loop import Diverged, say, validate
from mamba3_jax.train.population import Member, Population, member_config, member_mesh, members

KEPT = ("commit", "date", "device", "parameters", "best", "resumed_after", "seconds", "asked")  # of a variant's result
SCORED_TOKENS = 131072  # of text, about, at each length
# What a file may say beside get_config(), and its types.
SAYS = {
    "VARIANTS": dict,
    "SEEDS": int,
    "LEARNING_RATES": (tuple, list),
    "LENGTHS": (tuple, list),
    "METRIC": str,
    "SHOWN": (tuple, list),
    "EXPECT": dict,
}
# Names of metrics: of a run's training, and at a length.
OF_TRAINING = ("loss", "loss_last", "valid_loss", "valid_accuracy", "skipped")
OF_TASKS = ("accuracy", "last", "scaled_last", "exact")
OF_TEXT = ("loss", "perplexity", "bits_per_byte", "accuracy")


class Plan(NamedTuple):
    """What an experiment's file asks for."""

    variants: dict[str, Config]  # all of the file
    chosen: tuple[str, ...]  # those to train
    members: list[Member]
    lengths: tuple[int | str, ...]  # tokens, or "LENGTH:PAIRS"
    metric: str
    shown: tuple[str, ...]
    expect: dict[str, tuple[str, float, float]]


def read_plan(
    path: str, config: Config, *, only: Sequence[str] = (), seeds: int = 0, rates: Sequence[float] = ()
) -> Plan:
    """Return the plan of the file, every variant checked.

    Args:
        path: the file.
        config: what its get_config() gives, perhaps changed by flags.
        only: which variants to train; () is all.
        seeds, rates: in place of the file's; 0 and () are those.

    Raises:
        ValueError: a variant, field, length, rate or metric that cannot be; it names which.
    """
    given = runpy.run_path(path)
    for name, kind in SAYS.items():
        if not isinstance(given.get(name, kind() if isinstance(kind, type) else ()), kind):
            raise ValueError(f"{path}: {name}={given[name]!r} is not what launch.sweep wants: see its --help")
    if given.get("SEEDS", 1) < 1:
        raise ValueError(f"{path}: SEEDS={given['SEEDS']} is less than 1")
    variants = given.get("VARIANTS", {config.name: {}})
    if unknown := [name for name in only if name not in variants]:
        raise ValueError(f"there is no variant {unknown[0]!r}, only {', '.join(variants)}")
    rates = tuple(rates or given.get("LEARNING_RATES", ())) or (config.optimizer.learning_rate,)
    lengths = tuple(given.get("LENGTHS", ()))
    if config.data.source in TASKS:
        lengths = tuple(map(tasks.written, tasks.settings_of(config.data, lengths)))
        metric = given.get("METRIC", f"scaled_last@{config.data.task_lengths[-1]}")
    else:
        lengths = tuple(language.check_lengths(lengths or (config.data.length,)))
        metric = given.get("METRIC", f"loss@{lengths[0]}")
    plan = Plan(
        variants={name: variant(config, name, fields) for name, fields in variants.items()},
        chosen=tuple(name for name in variants if not only or name in only),
        members=members(seeds or given.get("SEEDS", 1), rates),
        lengths=lengths,
        metric=metric,
        shown=tuple(given.get("SHOWN", (metric,))),
        expect=given.get("EXPECT", {}),
    )
    check_plan(plan)
    return plan


def variant(config: Config, name: str, fields: dict) -> Config:
    """Return the config of a variant."""
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"variant {name!r} is not a name of letters, digits, '_', '.', '+' and '-'")
    try:
        return with_fields(dataclasses.replace(config, name=name), fields)
    except ValueError as error:
        raise ValueError(f"variant {name}: {error}") from None


def check_plan(plan: Plan) -> None:
    """Raise ValueError for a member that cannot be trained, and for a metric that its scores will not have."""
    mesh = member_mesh(len(plan.members))
    for name, config in plan.variants.items():
        try:
            check(config)
            for member in plan.members:
                check(member_config(config, member))
            validate(config, mesh)  # which may read a tokenizer: members differ in numbers alone
        except ValueError as error:
            raise ValueError(f"variant {name}: {error}") from None
    for word, _, metric in (wanted.partition(" ") for wanted, *_ in plan.expect.values()):
        if word not in comparison.STATISTICS:
            raise ValueError(
                f"EXPECT has {word + ' ' + metric!r}: wanted {', '.join(comparison.STATISTICS)}, a blank, a metric"
            )
        check_metric(plan, metric)
    for metric in (plan.metric, *plan.shown):
        check_metric(plan, metric)
    if unknown := sorted(set(plan.expect) - set(plan.variants)):
        raise ValueError(f"EXPECT has {unknown[0]!r}, which is none of VARIANTS")


def check_metric(plan: Plan, metric: str) -> None:
    """Raise ValueError for a metric that no row will have."""
    name, _, length = metric.partition("@")
    if length and length not in map(str, plan.lengths):
        raise ValueError(f"{metric}: length {length} is not scored, only {', '.join(map(str, plan.lengths))}")
    tasks_only = all(config.data.source in TASKS for config in plan.variants.values())
    names = (OF_TASKS if tasks_only else OF_TEXT) if length else OF_TRAINING
    if name not in names:
        raise ValueError(f"{metric}: there is no {name!r}{' at a length' if length else ''}, only {', '.join(names)}")


def scores(config: Config, group: list[Member], params, lengths: tuple[int | str, ...]) -> list[list[dict]]:
    """Return, of every member, its scores at each length."""
    model, data = LanguageModel(config.model), config.data
    if data.source in TASKS:
        found = tasks.evaluate(model, params, data, lengths=lengths, members=len(group))
        pick = lambda value, m: value[m] if isinstance(value, list) else value  # noqa: E731
        return [[{name: pick(value, m) for name, value in score.items()} for score in found] for m in range(len(group))]
    scorer = Scorer(model, params, data.length)
    how = {"lengths": lengths, "max_tokens": SCORED_TOKENS, "scorer": scorer}
    return [
        language.evaluate(model, jax.tree.map(lambda array: array[m], params), data, **how)  # noqa: B023
        for m in range(len(group))
    ]


def asked_of(plan: Plan, name: str) -> dict:
    """Return all that a variant's result depends on, as JSON has it."""
    asked = {
        "config": to_dict(plan.variants[name]),
        "members": [member._asdict() for member in plan.members],
        "lengths": plan.lengths,
        "metric": plan.metric,
    }
    return json.loads(json.dumps(asked, allow_nan=False))


def is_asked(asked: dict, result: dict) -> bool:
    """Tell whether a result is of what is asked. A field that there was not yet when it was made had its default."""
    made = result.get("asked")
    try:
        made = json.loads(json.dumps(made | {"config": to_dict(from_dict(made["config"]))}))
    except (AttributeError, KeyError, TypeError, ValueError):
        return False  # of no sweep, or of fields that there are no more
    return made == asked


def run_variant(plan: Plan, name: str, folder: Path, commit: str, report) -> dict:
    """Train and score the members of a variant; return and write its result. One that is done is returned as it is."""
    config, done, asked = plan.variants[name], folder / "result.json", asked_of(plan, name)
    if done.exists() and is_asked(asked, result := json.loads(done.read_text())):
        report(f"done before, in {folder}")
        return result
    begin, origin = time.perf_counter(), provenance(commit)
    with common.user_errors():
        population = Population(config, plan.members, folder, report)
    with population:
        first = population.step
        try:
            summaries = population.run()
        except Diverged as error:  # of every member: a finding too
            report(str(error))
            summaries = population.summaries()
        params = population.params()
    trained = time.perf_counter()
    found = scores(config, plan.members, params, plan.lengths)
    rows = [
        {"variant": name, **member._asdict(), **or_null(summary), "scores": or_null(own)}
        for member, summary, own in zip(plan.members, summaries, found, strict=True)
    ]
    best = comparison.best(rows, plan.metric)
    shutil.rmtree(folder / "best", ignore_errors=True)
    own = jax.tree.map(lambda array: array[best], params)
    save_model(folder / "best", member_config(config, plan.members[best]), own, config.train.steps)
    result = {
        **origin,
        "variant": name,
        "parameters": sum(array.size for array in jax.tree.leaves(own)),
        "best": plan.members[best].name,
        "resumed_after": first,
        "seconds": {"train": round(trained - begin, 1), "score": round(time.perf_counter() - trained, 1)},
        "asked": asked,
        "rows": rows,
    }
    replace(done, json.dumps(result, allow_nan=False, indent=1) + "\n")
    return result


def summary(name: str, plan: Plan, results: list[dict], origin: dict) -> dict:
    """Return the content of the result file: every variant's origin and cost, every member's row."""
    rows = [row for result in results for row in result["rows"]]
    return {
        "experiment": name,
        **origin,
        "seconds": round(sum(sum(result["seconds"].values()) for result in results), 1),
        "metric": plan.metric,
        "shown": plan.shown,
        "expected": comparison.expected(rows, plan.expect),
        "variants": {result["variant"]: {key: result[key] for key in KEPT} for result in results},
        "rows": rows,
    }


def recorded(path: Path, plan: Plan) -> dict[str, dict]:
    """Return the results of the variants that a result file has just as the plan asks for them.

    Raises:
        ValueError: a file that is not a sweep's, or has other results that this run would not replace.
    """
    if not path.exists():
        return {}
    try:
        file = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(file, dict) or not {"variants", "rows"} <= file.keys():
        raise ValueError(f"{path} is not a result of launch.sweep: it would be overwritten")
    same = {name for name in plan.variants if is_asked(asked_of(plan, name), file["variants"].get(name, {}))}
    if lost := [name for name in file["variants"] if name not in same and name not in plan.chosen]:
        raise ValueError(f"{path} has {', '.join(lost)} of another plan, which would be lost: move the file away")
    return {
        name: {"variant": name, **file["variants"][name], "rows": [r for r in file["rows"] if r["variant"] == name]}
        for name in plan.variants
        if name in same
    }


def sweep(plan: Plan, name: str, workdir: Path, kept: Path | None, known: dict[str, dict], commit: str) -> dict:
    """Run the variants one after another, but the known ones, which the file `kept` has; write all after each."""
    results, origin = [], provenance(commit)
    for index, of in enumerate(plan.variants, 1):
        report = functools.partial(say, f"{of} ({index}/{len(plan.variants)})")
        if of in known:
            report(f"done before, in {kept}")
            results.append(known[of])
        elif of in plan.chosen:
            results.append(run_variant(plan, of, workdir / of, commit, report))
        else:
            continue
        found = summary(name, plan, results, origin)
        for path in (workdir / "results.json", *([kept] if kept else [])):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, json.dumps(found, allow_nan=False, indent=1) + "\n")
    return found
