"""The paper's claims about language: variants of a file are of one size, each can be made, and small ones are swept."""

import json
import runpy
from pathlib import Path

import pytest

from experiments import found, summary
from experiments.ablations import language
from launch import experiment
from launch.plan import read_plan
from mamba3_jax.config import Config, with_fields
from mamba3_jax.presets import parameter_count

FILES = sorted(path for path in (found.FOLDER / "ablations").glob("*.py") if "\nVARIANTS = " in path.read_text())
SMALL = {
    "model.d_model": 32,
    "model.d_state": 8,
    "model.head_dim": 16,
    "model.attn_head_dim": 16,
    "model.vocab_size": 256,
    "model.compute_dtype": "float32",
    "data.tokenizer": "bytes",
    "data.length": 32,
    "data.batch": 2,
    "train.steps": 2,
    "train.save_every": 2,
}


def variants(path: Path) -> dict[str, Config]:
    """The config of every variant of a file, whose tokenizer need not be there."""
    config = with_fields(runpy.run_path(str(path))["get_config"](), {"data.tokenizer": "bytes"})
    return read_plan(str(path), config).variants


@pytest.mark.full
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_variants_have_as_many_parameters(path):
    """Within half a percent, counted from an abstract init; those of a rank of a few heads are what is left."""
    counts = {name: parameter_count(config.model) for name, config in variants(path).items()}
    first = next(iter(counts.values()))
    assert {name: count for name, count in counts.items() if abs(count / first - 1) > 0.005} == {}
    assert 5e6 < first < 25e6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_variants_share_rows_steps_and_length(path):
    configs = list(variants(path).values())
    assert all((config.data, config.train) == (configs[0].data, configs[0].train) for config in configs)
    assert runpy.run_path(str(path))["SEEDS"] in (3, language.SEEDS)


def test_expectations_have_the_papers_sign_and_size():
    """What is expected of a variant includes the paper's difference, where the paper has one."""
    for path in FILES:
        read = found.read(path, path.parent)
        for name, (wanted, least, most) in read.expect.items():
            theirs = summary.paper_difference(read, name, read.first)
            if theirs is not None and wanted.startswith("difference"):
                assert least < theirs < most, (path.stem, name)


@pytest.fixture
def small(tmp_path) -> tuple[Path, Config]:
    """A file of three small variants, and its config."""
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {number} " for number in range(300)))
    path = tmp_path / "small.py"
    path.write_text(
        """VARIANTS = {"mamba3": {}, "no_bias": {"model.bc_bias": "none"}, "hybrid": {"model.pattern": "MA"}}
SEEDS, LENGTHS, METRIC, SHOWN = 2, (32, 64), "loss@32", ("loss@32", "late_loss@64")
EXPECT = {"no_bias": ("difference loss@32", -9.0, 9.0)}
SIZES, EQUAL = {"line": {"no_bias": 1, "hybrid": 2}}, [("line", "mamba3")]
"""
    )
    files = {f"data.{name}_glob": str(tmp_path / f"{name}.txt") for name in ("train", "valid")}
    return path, with_fields(language.config("small", pattern="MM", d_ff=16), SMALL | files)


@pytest.mark.full
def test_a_small_one_is_trained_scored_and_compared(small, tmp_path):
    path, config = small
    plan = read_plan(str(path), config)
    kept = tmp_path / "results" / "small.json"
    result = experiment.sweep(plan, "small", tmp_path / "runs", kept, {}, "0123abc")
    assert json.loads(kept.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert [(row["variant"], row["seed"]) for row in result["rows"]] == [(v, s) for v in plan.variants for s in (0, 1)]
    for row in result["rows"]:
        assert [score["length"] for score in row["scores"]] == [32, 64]
        assert all(5 < score["loss"] < 6.5 and 5 < score["late_loss"] < 6.5 for score in row["scores"])
    losses = [row["scores"][0]["loss"] for row in result["rows"]]
    assert len(set(losses)) == len(losses), "members are scored by their own parameters"
    assert result["expected"][0]["holds"]
