"""Run the plan of an experiment: train its variants, score and compare them. Nothing here reads a flag."""

import contextlib
import dataclasses
import functools
import math
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import jax

from launch import common
from launch.asked import KEPT, asked_of, done_before, read_result, recorded
from launch.plan import Plan
from launch.provenance import provenance
from mamba3_jax.checkpoint import all_steps, keep_parameters, load_config, load_model, save_model
from mamba3_jax.config import Config
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import comparison, language, tasks
from mamba3_jax.files import write_json, writing
from mamba3_jax.finite import or_null
from mamba3_jax.model import LanguageModel
from mamba3_jax.train import resume
from mamba3_jax.train.loop import Diverged, say
from mamba3_jax.train.population import Member, Population, member_config

# Tokens of text that are scored at each length, about. Two models whose losses differ by 0.005 nats differ by some 0.4
# (rms) on a token. So 2^17 tokens leave an error of 0.001 in their difference, nearly as large as what seeds do, and
# 2^21 leave 0.0003. Scoring them costs a thirtieth of training on 25M.
SCORED_TOKENS = 2**21
SCORED_AT_ONCE = 2**17  # tokens of all members together: their logits over 8,192 ids take 4.3 GB


def scores(config: Config, group: list[Member], params, lengths: tuple[int | str, ...], report=say) -> list[list[dict]]:
    """Return every member's scores, a dict a length."""
    model, data = LanguageModel(config.model), config.data
    if data.source in TASKS:
        found = tasks.evaluate(model, params, data, lengths=lengths, members=len(group))
        pick = lambda value, m: value[m] if isinstance(value, list) else value  # noqa: E731
        return [[{name: pick(value, m) for name, value in score.items()} for score in found] for m in range(len(group))]
    rows = max(1, min(data.batch, SCORED_AT_ONCE // (len(group) * data.length)))
    how = {"lengths": lengths, "max_tokens": SCORED_TOKENS, "members": len(group), "say": report}
    # Parameters that stayed on the host would be copied to the device for every batch.
    return language.evaluate(model, jax.device_put(params), dataclasses.replace(data, batch=rows), **how)


class Trained(NamedTuple):
    """The members of a variant as training left them, to be scored."""

    first: int  # the step after which training last resumed
    seconds: float
    summaries: list[dict]  # of the members
    params: dict  # the leading axis is the members


def trained_before(plan: Plan, name: str, folder: Path) -> Trained | None:
    """Return the trained members that a variant's folder holds, which only have to be scored anew; None: train them.

    Raises:
        ValueError: its result or its checkpoint cannot be read.
    """
    path = folder / "result.json"
    if not path.exists() or not is_whole(folder, plan.variants[name]):
        return None
    result = read_result(path, {"seconds", "rows", "resumed_after"})
    others = ("variant", "scores", *Member._fields)
    summaries = [{key: value for key, value in row.items() if key not in others} for row in result["rows"]]
    try:
        seconds = float(result["seconds"]["train"])
    except (LookupError, TypeError, ValueError):
        seconds = math.nan
    if len(summaries) != len(plan.members) or math.isnan(seconds):
        raise ValueError(f"{path} is damaged: move it away")
    return Trained(result["resumed_after"], seconds, summaries, load_model(folder)[1])


def is_whole(folder: Path, config: Config) -> bool:
    """Tell whether the newest checkpoint is of the last step; where all members diverge, training ends before."""
    return all_steps(folder)[-1:] == [config.train.steps]


def train(population: Population, begin: float, report) -> Trained:
    """Train the members of a variant to the last step, or until all have diverged, which is a result too."""
    with population:
        first = population.step
        try:
            summaries = population.run()
        except Diverged as error:
            report(str(error))
            summaries = population.summaries()
        params = population.params()
    return Trained(first, round(time.perf_counter() - begin, 1), summaries, params)


def run_variant(plan: Plan, name: str, folder: Path, commit: str, report) -> dict:
    """Return the result of a variant, which is trained and scored unless it is done; no other process may do so too."""
    config = plan.variants[name]
    with contextlib.ExitStack() as stack:
        with common.user_errors():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(resume.alone(folder, "sweep.lock"))
            result = done_before(plan, name, folder)
            # A process that was killed may have left no best member, or another one than the result names.
            if result and is_whole(folder, config) and not has_best(plan, name, folder, result["best"]):
                result = None
        if result:
            report(f"done before, in {folder}")
        else:
            result = found_of(plan, name, folder, commit, report)
        if is_whole(folder, config):
            with common.user_errors():
                keep_parameters(folder)
    return result


def found_of(plan: Plan, name: str, folder: Path, commit: str, report) -> dict:
    """Train the members of a variant unless they are trained, score them, write the result and return it."""
    begin, origin, config = time.perf_counter(), provenance(commit), plan.variants[name]
    with common.user_errors():
        asked = asked_of(plan, name)
        trained = trained_before(plan, name, folder)
        population = None if trained else Population(config, plan.members, folder, report)
    if trained:
        report(f"trained before, in {folder}: scored anew")
    else:
        trained = train(population, begin, report)
        drop_best(folder)
    result = {**origin, "variant": name, "asked": asked, **scored(plan, name, folder, trained, report)}
    write_json(folder / "result.json", result)
    return result


def has_best(plan: Plan, name: str, folder: Path, best: str) -> bool:
    """Tell whether folder/best holds the member of this name."""
    try:
        found = load_config(folder / "best")
    except (FileNotFoundError, ValueError):
        return False
    wanted = [member_config(plan.variants[name], member) for member in plan.members if member.name == best]
    return any(
        (found.seed, found.optimizer.learning_rate) == (config.seed, config.optimizer.learning_rate)
        for config in wanted
    )


def drop_best(folder: Path) -> None:
    """Delete folder/best; OSError where that fails."""
    with writing(folder / "best"), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / "best")


def scored(plan: Plan, name: str, folder: Path, trained: Trained, report) -> dict:
    """Score the members of a variant, save the best one in folder/best, and return what a result has of them."""
    begin, config = time.perf_counter(), plan.variants[name]
    found = scores(config, plan.members, trained.params, plan.lengths, report)
    rows = [
        {"variant": name, **member._asdict(), **or_null(summary), "scores": or_null(own)}
        for member, summary, own in zip(plan.members, trained.summaries, found, strict=True)
    ]
    best = comparison.best(rows, plan.metric)
    own = jax.tree.map(lambda array: array[best], trained.params)
    if not has_best(plan, name, folder, plan.members[best].name):
        drop_best(folder)
        save_model(folder / "best", member_config(config, plan.members[best]), own, config.train.steps)
    return {
        "parameters": sum(array.size for array in jax.tree.leaves(own)),
        "best": plan.members[best].name,
        "resumed_after": trained.first,
        "seconds": {"train": trained.seconds, "score": round(time.perf_counter() - begin, 1)},
        "rows": rows,
    }


def summary(name: str, plan: Plan, results: list[dict], origin: dict) -> dict:
    """Return the content of the experiment's result file: every variant's origin and cost, every member's row."""
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


def so_far(plan: Plan, workdir: Path, kept: Path | None, own: dict[str, dict]) -> list[dict]:
    """Return the results of all variants that are done just as asked, in the plan's order: of this process, its own.

    The others are those of the workdir and of the file `kept`, where other processes may be at other variants.
    """
    found = {}
    for name in plan.variants:
        with contextlib.suppress(ValueError, OSError):  # what is no result of this plan is not in its table
            found[name] = done_before(plan, name, workdir / name)
    found |= (recorded(kept, plan, report=None) if kept else {}) | own
    return [found[name] for name in plan.variants if found.get(name)]


def write(found: dict, workdir: Path, kept: Path | None) -> None:
    """Write what was found; into `kept` once that has every variant that the file had, so that a kill loses none."""
    paths = [workdir / "results.json"]
    if kept and (not kept.exists() or read_result(kept, {"variants"})["variants"].keys() <= found["variants"].keys()):
        paths.append(kept)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)


def sweep(plan: Plan, name: str, workdir: Path, kept: Path | None, known: dict[str, dict], commit: str) -> dict:
    """Run the chosen variants one after another, and write and return the content of the result file.

    Args:
        plan: the experiment's.
        name: of the experiment.
        workdir: gets a folder a variant, and results.json after each of them.
        kept: another file that gets the same, once it would lose nothing.
        known: results that `kept` has already, by variant; they are not run again.
        commit: recorded where there is no git to ask.
    """
    own, origin = {}, provenance(commit)
    for index, variant in enumerate(plan.variants, 1):
        report = functools.partial(say, f"{variant} ({index}/{len(plan.variants)})")
        if variant in known:
            report(f"done before, in {kept}")
            own[variant] = known[variant]
        elif variant in plan.chosen:
            own[variant] = run_variant(plan, variant, workdir / variant, commit, report)
        else:
            continue
        with common.user_errors():
            found = summary(name, plan, so_far(plan, workdir, kept, own), origin)
            write(found, workdir, kept)
    return found
