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
from mamba3_jax.data.pipeline import identities
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import comparison, language, tasks
from mamba3_jax.finite import or_null
from mamba3_jax.model import LanguageModel
from mamba3_jax.train.loop import Diverged, say, validate
from mamba3_jax.train.population import Member, Population, member_config, member_mesh, members

KEPT = ("commit", "date", "device", "parameters", "best", "resumed_after", "seconds", "asked")  # of a variant's result
# Of text, at each length, about. Two models whose losses differ by 0.005 nats differ by some 0.4 (rms) on a token, so
# that 2^17 tokens leave an error of 0.001 in their difference, nearly as large as what seeds do; 2^21 leave 0.0003.
# They cost a thirtieth of training on 25M.
SCORED_TOKENS = 2**21
SCORED_AT_ONCE = 2**17  # of all members together: logits over 8,192 ids take 4.3 GB
# What a file may say beside get_config(), and its types.
SAYS = {
    "VARIANTS": dict,
    "SEEDS": int,
    "LEARNING_RATES": (tuple, list),
    "LENGTHS": (tuple, list),
    "METRIC": str,
    "SHOWN": (tuple, list),
    "EXPECT": dict,
    "SIZES": dict,
    "EQUAL": (tuple, list),
}
# Names of metrics: of a run's training, and at a length.
OF_TRAINING = ("loss", "loss_last", "valid_loss", "valid_accuracy", "skipped")
OF_TASKS = ("accuracy", "last", "scaled_last", "exact")
OF_TEXT = ("loss", "perplexity", "bits_per_byte", "accuracy", "late_loss")


class Plan(NamedTuple):
    """What an experiment's file asks for."""

    variants: dict[str, Config]  # all of the file
    chosen: tuple[str, ...]  # those to train
    members: list[Member]
    lengths: tuple[int | str, ...]  # tokens, or "LENGTH:PAIRS"
    metric: str
    shown: tuple[str, ...]
    expect: dict[str, tuple[str, float, float]]
    sizes: dict[str, dict[str, float]]
    equal: tuple[tuple[str, str], ...]


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
        sizes=given.get("SIZES", {}),
        equal=tuple(given.get("EQUAL", ())),
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
        words = (*comparison.STATISTICS, comparison.DIFFERENCE)
        if word not in words:
            raise ValueError(f"EXPECT has {word + ' ' + metric!r}: wanted {', '.join(words)}, a blank, a metric")
        check_metric(plan, metric)
    for metric in (plan.metric, *plan.shown):
        check_metric(plan, metric)
    if unknown := sorted(set(plan.expect) - set(plan.variants)):
        raise ValueError(f"EXPECT has {unknown[0]!r}, which is none of VARIANTS")
    check_sizes(plan)


def check_sizes(plan: Plan) -> None:
    """Raise ValueError for a line of SIZES or a pair of EQUAL that names something else."""
    for line, sizes in plan.sizes.items():
        if unknown := sorted(set(sizes) - set(plan.variants)):
            raise ValueError(f"SIZES[{line!r}] has {unknown[0]!r}, which is none of VARIANTS")
    for pair in plan.equal:
        if len(pair) != 2 or pair[0] not in plan.sizes or pair[1] not in plan.variants:
            raise ValueError(f"EQUAL has {pair!r}: wanted pairs of a line of SIZES and one of VARIANTS")


def check_metric(plan: Plan, metric: str) -> None:
    """Raise ValueError for a metric that no row will have."""
    name, _, length = metric.partition("@")
    if length and length not in map(str, plan.lengths):
        raise ValueError(f"{metric}: length {length} is not scored, only {', '.join(map(str, plan.lengths))}")
    tasks_only = all(config.data.source in TASKS for config in plan.variants.values())
    names = (OF_TASKS if tasks_only else OF_TEXT) if length else OF_TRAINING
    if name not in names:
        raise ValueError(f"{metric}: there is no {name!r}{' at a length' if length else ''}, only {', '.join(names)}")


def scores(config: Config, group: list[Member], params, lengths: tuple[int | str, ...], report=say) -> list[list[dict]]:
    """Return, of every member, its scores at each length."""
    model, data = LanguageModel(config.model), config.data
    if data.source in TASKS:
        found = tasks.evaluate(model, params, data, lengths=lengths, members=len(group))
        pick = lambda value, m: value[m] if isinstance(value, list) else value  # noqa: E731
        return [[{name: pick(value, m) for name, value in score.items()} for score in found] for m in range(len(group))]
    rows = max(1, min(data.batch, SCORED_AT_ONCE // (len(group) * data.length)))
    how = {"lengths": lengths, "max_tokens": SCORED_TOKENS, "members": len(group), "say": report}
    # Parameters that stayed on the host would be copied to the device for every batch.
    return language.evaluate(model, jax.device_put(params), dataclasses.replace(data, batch=rows), **how)


def asked_of(plan: Plan, name: str) -> dict:
    """Return all that a variant's result depends on, as JSON has it; text is read and tokenised for it."""
    asked = {
        "config": to_dict(plan.variants[name]),
        "members": [member._asdict() for member in plan.members],
        "lengths": plan.lengths,
        "metric": plan.metric,
    }
    if data := identities(plan.variants[name].data):
        asked["data"] = data
    return json.loads(json.dumps(asked, allow_nan=False))


def renewed(asked: dict) -> dict:
    """Return what an earlier version asked, fields that came since at their defaults; {} for what no sweep asked."""
    try:
        config = to_dict(from_dict(asked["config"]))
    except ValueError:  # it has a field that is gone: another config
        return asked
    except (AttributeError, KeyError, TypeError):
        return {}
    return json.loads(json.dumps(asked | {"config": config}))


def other_data(before: dict, asked: dict) -> str:
    """Return what tells the data of two results apart; "" where it is the same."""
    had, have = (of.get("data", {}) for of in (before, asked))
    return "" if had == have else f"its data was {listed_data(had)}, and is {listed_data(have)}"


def listed_data(data: dict[str, str]) -> str:
    """Return the identities of splits in words."""
    return ", ".join(f"{split} {identity}" for split, identity in data.items()) or "not recorded"


def run_variant(plan: Plan, name: str, folder: Path, commit: str, report) -> dict:
    """Train and score the members of a variant; return and write its result. One that is done is returned as it is."""
    begin, origin = time.perf_counter(), provenance(commit)
    config, done = plan.variants[name], folder / "result.json"
    with common.user_errors():
        asked = asked_of(plan, name)
        if done.exists():
            result = json.loads(done.read_text())
            before = renewed(result.get("asked"))
            if before == asked:
                report(f"done before, in {folder}")
                return result
            if before and (other := other_data(before, asked)):
                raise ValueError(f"{folder} has a result of other data: {other}; use another workdir")
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
    found = scores(config, plan.members, params, plan.lengths, report)
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
        "expected": comparison.expected(rows, plan.expect, next(iter(plan.variants))),
        "variants": {result["variant"]: {key: result[key] for key in KEPT} for result in results},
        "rows": rows,
    }


def recorded(path: Path, plan: Plan) -> dict[str, dict]:
    """Return the results of the variants that a result file has just as the plan asks for them, of the same data.

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
    same = set()
    for name in plan.variants:
        before, asked = renewed(file["variants"].get(name, {}).get("asked")), asked_of(plan, name)
        if before == asked:
            same.add(name)
        elif before and (other := other_data(before, asked)):
            say(f"{name}: {path} has a result of other data, which does not count: {other}")
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
