"""What an experiment's file asks for, checked, and what tells whether a result is of just that.

`launch/sweep.py` says what stands in such a file. Nothing here reads a flag.
"""

import dataclasses
import json
import re
import runpy
from collections.abc import Sequence
from typing import NamedTuple

from mamba3_jax.config import Config, check, from_dict, to_dict, with_fields
from mamba3_jax.data.pipeline import identities
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import comparison, language, tasks
from mamba3_jax.train.loop import validate
from mamba3_jax.train.population import Member, member_config, member_mesh, members

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
