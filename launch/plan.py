"""What an experiment's file asks for, checked. `launch/sweep.py` says what stands in it. Nothing here reads a flag."""

import dataclasses
import re
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from mamba3_jax.config import Config, DataConfig, check, shown, with_fields
from mamba3_jax.data.pipeline import TEXTS, loader
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import comparison, language, tasks
from mamba3_jax.train.fit import validate
from mamba3_jax.train.population import Member, check_members, member_config, member_mesh, members

MEMBERS = 2**12  # at most, of a variant: each has parameters and moments of its own


def is_number(value) -> bool:
    """Tell whether a value is a finite number (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_list_of(value, kind) -> bool:
    """Tell whether a value is a list or tuple whose entries are of a type."""
    return isinstance(value, (tuple, list)) and all(isinstance(part, kind) for part in value)


def is_table_of(value, fits: Callable[[object], bool]) -> bool:
    """Tell whether a value is a dict from names to values that fit."""
    return isinstance(value, dict) and all(isinstance(key, str) and fits(part) for key, part in value.items())


def is_expectation(value) -> bool:
    """Tell whether a value is ("STATISTIC METRIC", least, most)."""
    if not is_list_of(value, object) or len(value) != 3:
        return False
    wanted, least, most = value
    return isinstance(wanted, str) and is_number(least) and is_number(most) and least <= most


def is_line(value) -> bool:
    """Tell whether a value is {variant: size} with positive sizes that rise: an axis shows their logarithms."""
    sizes = list(value.values()) if is_table_of(value, is_number) else []
    return bool(sizes) and sizes[0] > 0 and sizes == sorted(set(sizes))


def is_text(value) -> bool:
    """Tell whether a value is a string."""
    return isinstance(value, str)


# What an experiment's file may define beside get_config(), for `launch.sweep` and the report: a test of its form, and
# the form in words.
SAYS = {
    "VARIANTS": (
        lambda value: value and is_table_of(value, lambda fields: is_table_of(fields, lambda _: True)),
        "{name: {field: value}}, at least one name",
    ),
    "SEEDS": (lambda value: type(value) is int and 1 <= value <= MEMBERS, f"a whole number in 1 .. {MEMBERS}"),
    "LEARNING_RATES": (lambda value: is_list_of(value, object) and all(map(is_number, value)), "a list of numbers"),
    "LENGTHS": (lambda value: is_list_of(value, object), 'a list of LENGTH or "LENGTH:PAIRS"'),
    "METRIC": (is_text, "the name of a metric"),
    "SHOWN": (lambda value: is_list_of(value, str), "a list of metrics"),
    "EXPECT": (
        lambda value: is_table_of(value, is_expectation),
        '{variant: ("STATISTIC METRIC", least, most)}, two finite numbers, the lesser one first',
    ),
    "SIZES": (lambda value: is_table_of(value, is_line), "{line: {variant: size}}, sizes over 0 and rising"),
    "EQUAL": (
        lambda value: is_list_of(value, (tuple, list)) and all(is_list_of(pair, str) for pair in value),
        "a list of pairs, (line of SIZES, variant)",
    ),
    "PAPER": (lambda value: is_table_of(value, is_number), "{variant: number}, finite"),
    "SIZE": (is_text, "a name"),
    "DECODE": (is_text, "a name"),
}


def check_said(path, given: dict) -> None:
    """Raise ValueError for the first thing that a file defines in another form than `SAYS` has."""
    for name, (fits, wish) in SAYS.items():
        value = given.get(name)
        if name in given and not fits(value):
            if isinstance(value, dict):  # show only its first wrong entry
                value = next(({key: part} for key, part in value.items() if not fits({key: part})), value)
            raise ValueError(f"{path}: {name}={shown(value)} is not {wish}")


# Names of metrics: of a run's training, and those at a length, of tasks and of text.
OF_TRAINING = ("loss", "loss_last", "valid_loss", "valid_accuracy", "skipped")
OF_TASKS = ("accuracy", "last", "scaled_last", "exact")
OF_TEXT = ("loss", "perplexity", "bits_per_byte", "accuracy", "late_loss")


class Plan(NamedTuple):
    """What an experiment's file asks for."""

    variants: dict[str, Config]  # all that the file has
    chosen: tuple[str, ...]  # the variants to train
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
    """Return the plan of a file, every variant checked.

    Args:
        path: the file.
        config: what its get_config() returns, perhaps changed by flags.
        only: the variants to train; (): all.
        seeds: how many, in place of the file's; 0: the file's.
        rates: learning rates in place of the file's; (): the file's.

    Raises:
        ValueError: a variant, field, length, rate or metric is not possible; the message names it.
    """
    given = runpy.run_path(path)
    check_said(path, given)
    variants = given.get("VARIANTS", {config.name: {}})
    if unknown := [name for name in only if name not in variants]:
        raise ValueError(f"there is no variant {unknown[0]!r}, only {', '.join(variants)}")
    rates = tuple(rates or given.get("LEARNING_RATES", ())) or (config.optimizer.learning_rate,)
    seeds = seeds or given.get("SEEDS", 1)
    if seeds * len(rates) > MEMBERS:
        raise ValueError(f"{seeds} seeds x {len(rates)} learning rates are more than {MEMBERS} members")
    lengths = lengths_of(config.data, given.get("LENGTHS", ()))
    trained = f"scaled_last@{config.data.task_lengths[-1]}" if config.data.source in TASKS else f"loss@{lengths[0]}"
    metric = given.get("METRIC", trained)
    plan = Plan(
        variants={name: variant(config, name, fields) for name, fields in variants.items()},
        chosen=tuple(name for name in variants if not only or name in only),
        members=members(seeds, rates),
        lengths=lengths,
        metric=metric,
        shown=tuple(given.get("SHOWN", (metric,))),
        expect=given.get("EXPECT", {}),
        sizes=given.get("SIZES", {}),
        equal=tuple(given.get("EQUAL", ())),
    )
    check_plan(plan)
    return plan


def lengths_of(data: DataConfig, lengths: Sequence[int | str]) -> tuple[int | str, ...]:
    """Return the lengths that are scored, sorted; for () the default ones.

    Raises:
        ValueError: the data is not possible, or not at these lengths.
    """
    if data.source in TEXTS:
        return tuple(language.check_lengths(lengths or (data.length,)))
    loader(data, "train", vocab_size=1)  # checks that its fields go together; nothing is read from it
    return tuple(map(tasks.written, tasks.settings_of(data, lengths)))


def check_name(what: str, name: str) -> None:
    """Raise ValueError for a name that no file or folder is called by, or one elsewhere."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{what} {name!r} is not a name of letters, digits, '_', and after the first '.', '+', '-'")


def variant(config: Config, name: str, fields: dict) -> Config:
    """Return the config of a variant."""
    check_name("variant", name)
    if name == "results.json":  # a variant names a folder, beside that file
        raise ValueError(f"variant {name!r} is the name of the sweep's own file")
    try:
        found = with_fields(dataclasses.replace(config, name=name), fields)
    except ValueError as error:
        raise ValueError(f"variant {name}: {error}") from None
    if (rate := found.optimizer.learning_rate) != config.optimizer.learning_rate:
        raise ValueError(
            f"variant {name}: optimizer.learning_rate={rate!r} would not be its own: LEARNING_RATES has those that "
            "every variant is trained at, and each is shown at its best"
        )
    return found


def check_plan(plan: Plan) -> None:
    """Raise ValueError for a member that cannot be trained, and for a metric that no member will have."""
    if again := [name for name, count in Counter(member.name for member in plan.members).items() if count > 1]:
        raise ValueError(f"two members are {again[0]}: learning rates are to differ in six digits")
    mesh = member_mesh(len(plan.members))
    for name, config in plan.variants.items():
        try:
            check(config)
            for member in plan.members:
                check(member_config(config, member))
            check_members(config, plan.members)
            lengths_of(config.data, plan.lengths)
            validate(config, mesh)  # once for all members, which differ in numbers alone: it may read a tokenizer
        except ValueError as error:
            raise ValueError(f"variant {name}: {error}") from None
    for word, _, metric in (wanted.partition(" ") for wanted, *_ in plan.expect.values()):
        words = (*comparison.STATISTICS, comparison.DIFFERENCE)
        if word not in words or not metric:
            raise ValueError(f"EXPECT has {word + ' ' + metric!r}: wanted {', '.join(words)}, a blank, a metric")
        check_metric(plan, metric)
    for metric in (plan.metric, *plan.shown):
        check_metric(plan, metric)
    if unknown := sorted(set(plan.expect) - set(plan.variants)):
        raise ValueError(f"EXPECT has {unknown[0]!r}, which is none of VARIANTS")
    check_sizes(plan.variants, plan.sizes, plan.equal)


def check_sizes(variants: Collection[str], sizes: dict[str, dict[str, float]], equal: Sequence[tuple]) -> None:
    """Raise ValueError for a line of SIZES or a pair of EQUAL that names no variant or no line."""
    for line, names in sizes.items():
        if unknown := sorted(set(names) - set(variants)):
            raise ValueError(f"SIZES[{line!r}] has {unknown[0]!r}, which is none of VARIANTS")
    for pair in equal:
        if len(pair) != 2 or pair[0] not in sizes or pair[1] not in variants:
            raise ValueError(f"EQUAL has {pair!r}: wanted pairs of a line of SIZES and one of VARIANTS")


def check_metric(plan: Plan, metric: str) -> None:
    """Raise ValueError for a metric that no row will have."""
    name, _, length = metric.partition("@")
    if length and length not in map(str, plan.lengths):
        raise ValueError(f"{metric}: length {length} is not scored, only {', '.join(map(str, plan.lengths))}")
    kinds = {OF_TASKS if config.data.source in TASKS else OF_TEXT for config in plan.variants.values()}
    names = [each for each in min(kinds) if all(each in kind for kind in kinds)] if length else OF_TRAINING
    if name not in names:
        raise ValueError(f"{metric!r}: there is no {name!r}{' at a length' if length else ''}, only {', '.join(names)}")
