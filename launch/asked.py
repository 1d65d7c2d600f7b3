"""What a variant's result depends on, which stands beside it; what tells two results apart; which are there already."""

import json
from collections.abc import Collection
from pathlib import Path

from launch.plan import Plan, is_list_of, is_table_of, is_text
from mamba3_jax.checkpoint import all_steps, load_config, parameters_alone
from mamba3_jax.config import Config, from_dict, to_dict
from mamba3_jax.data.pipeline import identities
from mamba3_jax.evaluate import comparison
from mamba3_jax.files import read_json
from mamba3_jax.train import resume
from mamba3_jax.train.loop import say

# Fields of a config that no number of a result depends on. The fields of `train` that are not here decide for how long
# and by what loss a model is trained, or over what its losses are averaged.
HOW = resume.MAY_CHANGE - {"optimizer", "train"} | {
    f"train.{name}" for name in ("save_every", "keep", "keep_best", "mesh", "peak_tflops")
}
# What the experiment's result file has of a variant, beside its rows.
KEPT = ("commit", "date", "device", "parameters", "best", "resumed_after", "seconds", "asked")


def asked_of(plan: Plan, name: str) -> dict:
    """Return all that a variant's result depends on, as JSON; this reads and tokenises its text."""
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
    """Return what an earlier version asked with new fields of the config at their defaults; {} if no sweep asked it."""
    try:
        if not is_table_of(asked.get("data", {}), is_text):
            return {}
        config = to_dict(from_dict(asked["config"]))
        return json.loads(json.dumps(asked | {"config": config}, allow_nan=False))
    except ValueError:  # a field is gone, or NaN: it will differ from whatever is asked now
        return asked
    except (AttributeError, KeyError, TypeError):
        return {}


def other_data(before: dict, asked: dict) -> str:
    """Say in what the data of two results differs; "" where it is the same."""
    had, have = (of.get("data", {}) for of in (before, asked))
    return "" if had == have else f"its data was {listed_data(had)}, and is {listed_data(have)}"


def other_training(before: dict, asked: dict) -> str:
    """Say in what the training of two results differs; "" where only the scores differ, or how it is run."""
    if before.get("members") != asked["members"]:
        return "it has other seeds or learning rates"
    try:
        return other_config(from_dict(before["config"]), from_dict(asked["config"]))
    except ValueError as error:  # of another version
        return f"its {error}"


def other_config(before: Config, config: Config) -> str:
    """Say in what the configs of two trainings differ; "" where only how they are run does."""
    found = resume.changes(before, config)
    return ", ".join(
        f"its config.{field} was {old!r}, and is {new!r}" for field, (old, new) in found.items() if field not in HOW
    )


def listed_data(data: dict[str, str]) -> str:
    """Return the identities of splits in words."""
    return ", ".join(f"{split} {identity}" for split, identity in data.items()) or "not recorded"


def read_result(path: Path, keys: Collection[str]) -> dict:
    """Read a result file of `launch.sweep` that has the keys; ValueError for a damaged one, or another program's."""
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}: move it away") from None
    rows = found.get("rows") if isinstance(found, dict) and keys <= found.keys() else None
    if not is_list_of(rows, dict) or not all(isinstance(row.get("variant"), str) for row in rows):
        raise ValueError(f"{path} is not a result of launch.sweep, and would be overwritten: move it away")
    return found


def check_result(path: Path, result: dict, rows: list, plan: Plan) -> None:
    """Raise ValueError unless the result of a variant has all of `KEPT` and its rows can be compared."""
    metrics = (plan.metric, *plan.shown, *(wanted.partition(" ")[2] for wanted, *_ in plan.expect.values()))
    try:
        sum({key: result[key] for key in KEPT}["seconds"].values())
        comparison.table(rows, metrics, plan.metric)
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be compared with other results ({why}): move it away") from None


def done_before(plan: Plan, name: str, folder: Path) -> dict | None:
    """Return the result in a variant's folder if it is what the plan asks for; None where there is more to do.

    Raises:
        ValueError: the result is damaged, or the result or the checkpoints are of other data or another training.
        OSError: they cannot be read.
    """
    path = folder / "result.json"
    if not path.exists():
        check_resume(plan.variants[name], folder)
        return None
    result = read_result(path, {"variant", "asked", "rows"})
    before, asked = renewed(result["asked"]), asked_of(plan, name)
    if before == asked:
        check_result(path, result, result["rows"], plan)
        return result
    if not before:
        raise ValueError(f"{path} does not say what was asked for, and would be overwritten: move {folder} away")
    if other := other_data(before, asked):
        raise ValueError(f"{folder} has a result of other data: {other}; use another workdir")
    if other := other_training(before, asked):
        raise ValueError(f"{folder} has a result of another training: {other}; use another workdir")
    return None


def check_resume(config: Config, folder: Path) -> None:
    """Raise ValueError for checkpoints without a result that this training cannot resume from."""
    if not all_steps(folder):
        return
    if parameters_alone(folder):
        raise ValueError(
            f"{folder} is of a training that is done, and its result.json is gone: put it back, or move {folder} away"
        )
    if other := other_config(load_config(folder), resume.with_own_tokenizer(config, folder)):
        raise ValueError(f"{folder} has checkpoints of another training: {other}; use another workdir")


def recorded(path: Path, plan: Plan, report=say) -> dict[str, dict]:
    """Return, by variant, those results of a result file that are what the plan asks for, of the same data.

    Args:
        path: of the file.
        plan: what is asked for.
        report: is told of results of other data, which do not count; None: nobody is.

    Raises:
        ValueError: the file is not a sweep's, or has results that this run would drop and not make again.
    """
    if not path.exists():
        return {}
    file, same = read_result(path, {"variants", "rows"}), set()
    if not is_table_of(file["variants"], lambda result: isinstance(result, dict)):
        raise ValueError(f"{path} is not a result of launch.sweep, and would be overwritten: move it away")
    rows = comparison.by_variant(file["rows"])
    for name in plan.variants:
        result = file["variants"].get(name, {})
        before, asked = renewed(result.get("asked")), asked_of(plan, name)
        if before == asked:
            check_result(path, result, rows.get(name, []), plan)
            same.add(name)
        elif report and before and (other := other_data(before, asked)):
            report(f"{name}: {path} has a result of other data, which does not count: {other}")
    if lost := [name for name in file["variants"] if name not in same and name not in plan.chosen]:
        raise ValueError(f"{path} has {', '.join(lost)} of another plan, which would be lost: move the file away")
    return {
        name: {"variant": name, **file["variants"][name], "rows": rows[name]} for name in plan.variants if name in same
    }
