"""Many runs in one step: each is the run that the trainer makes alone, whatever becomes of the others."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.ops import attention
from mamba3_jax.sharding import using
from mamba3_jax.train import metrics
from mamba3_jax.train import population as module
from mamba3_jax.train.loop import Diverged, Trainer
from mamba3_jax.train.population import Member, Population, SeedsLoader, member_config, member_mesh, members, together
from tests.helpers import rel_rms, without_times
from tests.train.tiny import get_config

# After the last one's first update no loss is finite.
GROUP = [Member(0, 3e-3), Member(1, 3e-3), Member(0, 1e-3), Member(0, 3e38)]
STEPS = 12
# Of float32 sums in another order, through so many updates.
TOLERANCE = 1e-5


def config() -> Config:
    got = get_config()
    got.train = dataclasses.replace(got.train, steps=STEPS, eval_every=6, save_every=6, max_bad_steps=STEPS)
    return got


@pytest.fixture(scope="module", autouse=True)
def side_by_side():
    """As on accelerators, but where a test says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "together", lambda model: True)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, side_by_side):
    """The population, its summaries and where it wrote."""
    workdir = tmp_path_factory.mktemp("population")
    with Population(config(), GROUP, workdir, report=lambda _: None) as population:
        summaries = population.run()
        return population, summaries, workdir


@pytest.mark.parametrize("index", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_member_is_the_run_of_the_trainer(index, trained, tmp_path):
    population, summaries, workdir = trained
    with Trainer(member_config(config(), GROUP[index]), tmp_path, report=lambda _: None) as trainer:
        summary = trainer.run()
    alone = jax.device_get(trainer.state.params)
    errors = [
        jax.tree.map(lambda all_M, one: rel_rms(all_M[m], one), population.params(), alone)  # noqa: B023
        for m in range(len(GROUP))
    ]
    worst = [max(jax.tree.leaves(of_member)) for of_member in errors]
    assert worst[index] < TOLERANCE
    assert min(worst[:index] + worst[index + 1 :]) > 100 * TOLERANCE  # another seed or rate is seen
    ours, lines = (metrics.read(f / metrics.FILE) for f in (workdir / "members" / GROUP[index].name, tmp_path))
    assert [line["step"] for line in ours] == [line["step"] for line in lines]
    assert [line.keys() for line in ours] == [line.keys() for line in lines]
    shared = [] if GROUP[index].seed else ["valid_loss"]  # all are held to the rows of the config's own seed
    for name in ("loss", "grad_norm", "learning_rate", *shared):
        got, want = ([line[name] for line in of if name in line] for of in (ours, lines))
        assert rel_rms(got, want) < 10 * TOLERANCE, name
    assert summaries[index]["loss"] == pytest.approx(summary["loss"], rel=10 * TOLERANCE)


def test_one_after_another_members_are_the_runs_of_the_trainer_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "together", lambda model: False)
    with Population(config(), GROUP[:2], tmp_path / "population", report=lambda _: None) as population:
        population.run()
    with Trainer(member_config(config(), GROUP[1]), tmp_path / "alone", report=lambda _: None) as trainer:
        trainer.run()
    errors = jax.tree.map(lambda all_M, one: rel_rms(all_M[1], one), population.state.params, trainer.state.params)
    assert max(jax.tree.leaves(errors)) < TOLERANCE


BY_CUDNN = {"pattern": "A", "compute_dtype": "bfloat16", "d_model": 16, "attn_head_dim": 8}


@pytest.mark.parametrize(
    ("fields", "beside"),
    [({}, True), (BY_CUDNN, False), ({"pattern": "MA"}, True), (BY_CUDNN | {"attn_implementation": "plain"}, True)],
)
def test_members_whose_attention_is_cudnns_go_one_after_another(fields, beside, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert together(ModelConfig(**fields)) == beside


def test_the_step_of_members_whose_attention_is_cudnns_lowers_for_cuda(tmp_path, monkeypatch):
    """Of two heads, which share the mask of documents."""
    monkeypatch.setattr(module, "together", lambda model: False)
    monkeypatch.setattr(attention, "unavailable", lambda: None)
    monkeypatch.setattr(attention, "SHORT", 16)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # jax asks for the installed
    own = config()
    own.model = ModelConfig(vocab_size=2, **BY_CUDNN)
    with Population(own, GROUP[:2], tmp_path, report=lambda _: None) as population, using(population.mesh):
        step = jax.jit(population._update(own)).trace(population.shapes, population.batch)
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert "fmhaScaleBiasSoftmaxBackward" in text


def test_a_member_that_diverges_stops_and_changes_no_other(trained):
    population, summaries, _ = trained
    *others, last = summaries
    assert [summary["skipped"] for summary in others] == [0, 0, 0]
    assert last["skipped"] >= STEPS - 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(population.params()))
    assert all(math.isfinite(summary["loss"]) for summary in others)


@pytest.mark.full
def test_the_run_ends_when_all_members_have_diverged(tmp_path):
    wild = config()
    wild.train.max_bad_steps = 3
    group = [Member(seed, 3e38) for seed in range(2)]
    with Population(wild, group, tmp_path, report=lambda _: None) as population, pytest.raises(Diverged, match="3 st"):
        population.run()


@pytest.mark.full
def test_a_run_in_two_parts_is_the_run_in_one(trained, tmp_path, monkeypatch):
    """Bit for bit: parameters, moments, counters, positions of the data and the lines of every member's metrics."""
    with Population(config(), GROUP, tmp_path, report=lambda _: None) as population:
        advance = population._advance
        monkeypatch.setattr(population, "_advance", lambda: advance() if population.step < 9 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            population.run()
    with Population(config(), GROUP, tmp_path, report=lambda _: None) as population:
        assert population.step == 6
        population.run()
    whole, _, workdir = trained
    for got, want in zip(jax.tree.leaves(population.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(got, want)
    for member in GROUP:
        ours, theirs = (metrics.read(f / "members" / member.name / metrics.FILE) for f in (tmp_path, workdir))
        assert list(map(without_times, ours)) == list(map(without_times, theirs))


def test_seeds_see_the_rows_of_their_seed_at_every_rate():
    group = members(2, (1e-3, 3e-3))
    assert [member.seed for member in group] == [0, 1, 0, 1]
    source = SeedsLoader(config(), [0, 1], vocab_size=2)
    batch = next(source)
    for seed in (0, 1):
        own = member_config(config(), Member(seed, 1.0)).data
        alone = SeedsLoader(dataclasses.replace(config(), data=own), [0], vocab_size=2)
        np.testing.assert_array_equal(batch.tokens_BL[seed], next(alone).tokens_BL[0])
    position, after = source.get_state(), next(source)
    source.set_state(position)
    np.testing.assert_array_equal(next(source).tokens_BL, after.tokens_BL)
    with pytest.raises(ValueError, match="had 2 seeds, this run has 1"):
        SeedsLoader(config(), [0], vocab_size=2).set_state(position)


def test_devices_get_equal_numbers_of_members():
    devices = jax.devices() * 8  # stand-ins
    assert [member_mesh(count, devices[:8]).devices.size for count in (1, 6, 8, 12, 7)] == [1, 6, 8, 6, 7]


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ([], "steps", 5, "are none"),
        ([Member(0, 1e-3)] * 2, "steps", 5, "two are the same"),
        ([Member(2**32 - 1, 1e-3)], "steps", 5, "seed 4294967296 of the last member is over"),
        ([Member(0, 1e-3)], "mesh", "data:1", "train.mesh='data:1'"),
    ],
)
def test_what_cannot_be_a_population_is_refused(group, field, value, message, tmp_path):
    wrong = config()
    wrong.seed = 1
    setattr(wrong.train, field, value)
    with pytest.raises(ValueError, match=message):
        Population(wrong, group, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_other_members_do_not_resume(trained):
    _, _, workdir = trained
    with pytest.raises(ValueError, match=r"has other members: seed_0_lr_0.001, .*use another workdir"):
        Population(config(), GROUP[:2], workdir)
