"""The experiments on tasks: each can be swept as it stands, and parity is the recipe that its texts tell of."""

import dataclasses
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import found
from experiments.tasks import mqar_small, parity
from launch.plan import read_plan
from mamba3_jax.config import with_fields
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import tasks
from mamba3_jax.model import LanguageModel, boxed_shapes
from mamba3_jax.train.population import Population, members

FILES = [path for path in found.FOLDER.rglob("*.py") if "\nVARIANTS = " in path.read_text()]


def different(left, right, path: str = "") -> dict:
    """Fields, by path, in which two configs are not the same, with the left one's values."""
    if not dataclasses.is_dataclass(left):
        return {} if left == right else {path: left}
    each = [field.name for field in dataclasses.fields(left)]
    nested = [different(getattr(left, name), getattr(right, name), f"{path}.{name}".strip(".")) for name in each]
    return {name: value for part in nested for name, value in part.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_can_be_swept(path: Path):
    """Its plan is made, which checks every member; its metrics are of lengths that are scored."""
    config = runpy.run_path(str(path))["get_config"]()
    assert path.stem == config.name, "a result is found by the config's name"
    if config.data.source not in TASKS:  # whose files stand where the experiment is run
        config = with_fields(config, {"data.tokenizer": "bytes"})
    plan = read_plan(str(path), config)
    assert list(plan.variants) == list(found.read(path, path.parent).variants)


def test_the_recipe_of_parity():
    config = parity.get_config()
    assert sum(np.prod(array.shape) for array in jax.tree.leaves(boxed_shapes(config.model))) == 7908
    assert sum(config.data.task_steps) == config.train.steps == 3000
    assert config.data.length * config.data.batch == 1280
    assert str(config.data.task_lengths[-1]) == parity.METRIC.partition("@")[2]


@pytest.mark.parametrize("variant", parity.VARIANTS)
def test_variants_of_parity_differ_in_the_named_field_only(variant):
    fields = parity.VARIANTS[variant]
    assert different(with_fields(parity.get_config(), fields), parity.get_config()) == fields
    assert len(fields) == (variant != "mamba3")


@pytest.mark.full
def test_the_recipe_learns_short_strings(tmp_path):
    """Strings of 4 bits, 4 to a row, in 150 steps: a seed may stick in so short a run, one that learns is enough."""
    config = parity.get_config()
    config.model.chunk = 16
    config.data.length, config.data.batch, config.data.valid_rows = 16, 8, 64
    config.data.task_lengths, config.data.task_steps = (4,), (150,)
    config.train.steps, config.train.log_every = 150, 50
    with Population(config, members(2, (1e-2,)), tmp_path, report=lambda _: None) as population:
        summaries, params = population.run(), population.params()
    assert min(summary["loss"] for summary in summaries) < 0.01
    (score,) = tasks.evaluate(LanguageModel(config.model), params, config.data, lengths=(4,), members=2)
    assert max(score["scaled_last"]) == 1


@pytest.mark.full
def test_a_small_model_learns_to_recall(tmp_path):
    """Four pairs of 64 symbols: with a convolution 300 steps are enough, and for twice the length too."""
    config = with_fields(mqar_small.get_config(), mqar_small.VARIANTS["mamba3_conv"])
    # The experiment's first 300 steps, nearly: with its schedule shortened to them it stayed at guessing among values.
    config.train.steps, config.optimizer.warmup, config.optimizer.schedule = 300, 0.3, "constant"
    with Population(config, members(1, (6e-3,)), tmp_path, report=lambda _: None) as population:
        population.run()
        params = population.params()
    found = tasks.evaluate(LanguageModel(config.model), params, config.data, lengths=("32:4", "64:4"), members=1)
    assert min(score["accuracy"][0] for score in found) > 0.9
