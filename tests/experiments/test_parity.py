"""The parity experiment in small: what it trains, that seeds do not mix, that it learns, and that it resumes."""

import json

import jax
import numpy as np
import pytest

from experiments import parity
from experiments.figures.parity import NAMES, draw
from mamba3_jax.checkpoint import load_model
from mamba3_jax.data import Batch
from mamba3_jax.model import boxed_shapes


def small():
    """Strings of 4 bits, 4 to a row: learned in 150 steps."""
    config = parity.get_config()
    config.model.chunk = 16
    config.data.length, config.data.batch = 16, 8
    config.data.task_lengths, config.data.task_steps = (4,), (150,)
    config.optimizer.learning_rate = 1e-2
    config.train.steps, config.train.log_every = 150, 50
    return config


@pytest.fixture(scope="module")
def block():
    """Compiled once: two seeds of `small()`."""
    return parity.make_block(small())


def test_the_recipe():
    config = parity.get_config()
    assert sum(np.prod(array.shape) for array in jax.tree.leaves(boxed_shapes(config.model))) == 7908
    assert sum(config.data.task_steps) == config.train.steps == 3000
    assert config.data.length * config.data.batch == 1280
    assert all(end % config.train.log_every == 0 for end in np.cumsum(config.data.task_steps))
    assert set(NAMES) == set(parity.VARIANTS)


@pytest.mark.parametrize("variant", parity.VARIANTS)
def test_variants_differ_in_the_named_field_only(variant):
    config, plain = parity.variant_config(parity.get_config(), variant), parity.get_config()
    for field, value in parity.VARIANTS[variant].items():
        assert getattr(config.model, field) == value != getattr(plain.model, field)
        setattr(config.model, field, getattr(plain.model, field))
    assert config.model == plain.model
    assert config.data == plain.data


def test_blocks_follow_the_curriculum_and_every_seed_has_its_own_strings():
    config = parity.get_config()
    config.data.task_lengths, config.data.task_steps = (40, 96), (50, 100)
    config.train.steps = 150
    given = list(parity.blocks(config, seeds=2))
    assert [np.flatnonzero(batch.start_BL[0, 0, 0])[1] for batch in given] == [40, 96, 96]
    rows = given[0].tokens_BL.reshape(-1, 256)
    assert len(np.unique(rows, axis=0)) == len(rows) == 50 * 2 * 5


@pytest.mark.full
def test_a_seed_does_not_see_another(block):
    """Bitwise: with other strings for seed 1, seed 0 ends where it did and seed 1 does not."""
    config = small()
    batches = next(parity.blocks(config, seeds=2))
    flipped = Batch(*(array.copy() for array in batches))
    flipped.tokens_BL[:, 1] ^= 1
    ends = [block(parity.initial(config, 2), data)[0][0] for data in (batches, flipped)]
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
    assert any((one[1] != other[1]).any() for one, other in zip(*map(jax.tree.leaves, ends), strict=True))


@pytest.mark.full
def test_a_variant_learns_saves_and_is_not_run_twice(block, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "make_block", lambda config: block)
    config = parity.variant_config(small(), "mamba3")
    row = parity.run_variant(config, 2, tmp_path)
    assert min(row["loss"]) < 0.01  # a seed may stick in so short a run: one that learns shows that training works
    assert row["parameters"] == 7908
    assert list(row["accuracy"]) == [str(length) for length in parity.LENGTHS]
    metrics = (tmp_path / "mamba3" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [50, 100, 150]

    saved, params = load_model(tmp_path / "mamba3")
    assert saved == config
    again = parity.score(config, jax.tree.map(lambda array: np.asarray(array)[None], params))
    assert again.mean() == pytest.approx(row["accuracy_to_384"][0], abs=2e-3)

    assert "step" in capsys.readouterr().out
    assert parity.run_variant(config, 2, tmp_path) == json.loads(json.dumps(row))
    assert "done before" in capsys.readouterr().out


@pytest.mark.full
def test_two_variants_at_a_time_trace_one_after_another(tmp_path, monkeypatch, crowd):
    config = small()
    config.model.implementation = "crowd"
    config.train.steps = config.train.log_every = 2
    monkeypatch.setattr(parity, "get_config", lambda: config)
    monkeypatch.setattr(parity, "LENGTHS", (16,))
    monkeypatch.setattr(parity, "VARIANTS", {name: parity.VARIANTS[name] for name in ("mamba3", "euler")})
    results = parity.run(tmp_path, seeds=1, results_path="")
    assert [row["variant"] for row in results["rows"]] == ["mamba3", "euler"]
    assert set(crowd) == {1}


def test_table_and_figure(tmp_path):
    accuracy = {str(length): [1.0, 0.5] for length in parity.LENGTHS}
    rows = [{"variant": variant, "accuracy": accuracy} for variant in parity.VARIANTS]
    results = {"rows": rows, "trained_lengths": (40, 256), "seeds": 2, "commit": "0123abc", "date": "2026-11-29"}
    lines = parity.table(results).splitlines()
    assert lines[0] == "| variant | 40 | 160 | 256 | 320 (untrained) | 384 (untrained) |"
    assert lines[2] == "| mamba3 | 100 0 | 100 0 | 100 0 | 100 0 | 100 0 |"
    draw(results, tmp_path / "parity.png")
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
