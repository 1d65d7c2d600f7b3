"""What the result of a variant depends on, as it is written beside the result, and what tells two of these apart."""

import json

from launch.plan import Plan
from mamba3_jax.config import Config, from_dict, to_dict
from mamba3_jax.data.pipeline import identities
from mamba3_jax.train import resume

# Fields that no number of a result depends on. Of the section `train`, the others decide how far and by what loss it is
# trained, or over what its losses are means.
HOW = resume.MAY_CHANGE - {"optimizer", "train"} | {
    f"train.{name}" for name in ("save_every", "keep", "keep_best", "mesh", "peak_tflops")
}


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
        return json.loads(json.dumps(asked | {"config": config}, allow_nan=False))
    except ValueError:  # it has a field that is gone, or NaN: another config
        return asked
    except (AttributeError, KeyError, TypeError):
        return {}


def other_data(before: dict, asked: dict) -> str:
    """Return what tells the data of two results apart; "" where it is the same."""
    had, have = (of.get("data", {}) for of in (before, asked))
    return "" if had == have else f"its data was {listed_data(had)}, and is {listed_data(have)}"


def other_training(before: dict, asked: dict) -> str:
    """Return what tells the training of two results apart; "" where only scores, or how it is run, are others."""
    if before.get("members") != asked["members"]:
        return "it has other seeds or learning rates"
    try:
        return other_config(from_dict(before["config"]), from_dict(asked["config"]))
    except ValueError as error:  # of another version
        return f"its {error}"


def other_config(before: Config, config: Config) -> str:
    """Return what tells two trainings apart by their configs; "" where only how they are run is another."""
    found = resume.changes(before, config)
    return ", ".join(
        f"its config.{field} was {old!r}, and is {new!r}" for field, (old, new) in found.items() if field not in HOW
    )


def listed_data(data: dict[str, str]) -> str:
    """Return the identities of splits in words."""
    return ", ".join(f"{split} {identity}" for split, identity in data.items()) or "not recorded"
