"""The benchmark of a layer and a training step, in small on any device: what it times agrees, or it is not timed."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.benchmarks import common, guard, train
from experiments.benchmarks.experiments import best_steps, step_speed, train_speed
from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from mamba3_jax.train import step

TINY = ModelConfig(vocab_size=16, d_model=16, pattern="M", d_state=8, head_dim=8, compute_dtype="bfloat16")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", TINY)
    monkeypatch.setitem(train.LAYERS, "layer tiny", TINY)
    monkeypatch.setattr(train, "LAYER_LENGTH", 16)
    quick = {"batch_seconds": 1e-3, "batches": 1, "warm_up": 1}
    monkeypatch.setattr(common, "measure", lambda function, **_: MEASURE(function, **quick))


MEASURE = common.measure


@pytest.mark.full
def test_a_layer_is_checked_before_it_is_timed(monkeypatch):
    def off(*args, **options):
        y_BLHP, state = IMPLEMENTATIONS["recurrent"](*args, **options)
        return y_BLHP * 1.05, state

    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", off)
    programs = train.programs_of("layer tiny", ["chunked", "recurrent", "wrong"], [2], 16)
    assert [program.what for program in programs] == ["forward"] * 3 + ["forward+backward"] * 3
    plain, other, wrong = programs[3:]
    row, want = train.row_of(plain, plain.compile(), None)
    assert row["y error"] == row["gradients error"] == 0
    row, _ = train.row_of(other, other.compile(), want)
    assert 0 < row["y error"] < 1e-2
    assert {"ms", "peak_mib", "sums error"} <= set(row)
    with pytest.raises(ValueError, match=r"layer tiny, forward.backward: relative error over 1e-02 in y"):
        train.row_of(wrong, wrong.compile(), want)


@pytest.mark.full
def test_a_step_is_the_trainers():
    (program,) = train.programs_of("tiny", ["default"], [2], 16)
    row, got = train.row_of(program, program.compile(), None)
    assert row["implementation"] == "default: plain XLA"
    assert 2 < row["loss"] == got["loss"] < 4  # log 16 is 2.8
    assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["ms"] * 1e3)
    with pytest.raises(ValueError, match="tiny, training step: relative error over 1e-03 in loss"):
        train.row_of(program, program.compile(), got | {"loss": got["loss"] * 1.002})


@pytest.mark.full
def test_variants_set_fields_and_change_no_result():
    programs = train.programs_of("tiny", ["default"], [2, 4], 16, ["", "model.unroll=1,model.remat=block"])
    assert [(program.batch, program.variant) for program in programs] == [
        *((2, variant) for variant in ("", "model.unroll=1,model.remat=block")),
        *((4, variant) for variant in ("", "model.unroll=1,model.remat=block")),
    ]
    assert [(program.config.unroll, program.config.remat) for program in programs[:2]] == [(0, ""), (1, "block")]
    _, want = train.row_of(programs[0], programs[0].compile(), None)
    row, _ = train.row_of(programs[1], programs[1].compile(), want)
    assert row["variant"] == "model.unroll=1,model.remat=block"


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("model.unrol=1", "no field 'unrol', did you mean unroll"),
        ("model.unroll=x", "unroll='x' is not of type int"),
        ("model.remat=all", "remat='all' is not one of"),
        ("optimizer.learning_rate=nan", "learning_rate='nan' is not of type float"),
    ],
)
def test_a_variant_that_is_none_is_refused(variant, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train.programs_of("tiny", ["default"], [2], 16, [variant])[0].shapes()


@pytest.mark.full
def test_threads_trace_one_after_another(crowd):
    programs = [train.programs_of(model, ["crowd"], [2], 16)[0] for model in ("tiny", "layer tiny")]
    with ThreadPoolExecutor() as pool:
        list(pool.map(train.Program.compile, programs))
    assert set(crowd) == {1}


@pytest.mark.full
def test_the_check_of_what_is_kept_is_timed_beside_a_step_without_it():
    config = Config(model=TINY)
    config.data.batch, config.data.length = 2, 16
    rows = guard.rows_of("tiny", config, rounds=2, batch_seconds=1e-3)
    assert [row["check"] for row in rows] == ["with", "without", "without, again"]
    assert rows[1]["over_without_percent"] == 0 != rows[0]["over_without_percent"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"])
    assert step.all_finite is guard.ALL_FINITE


def test_the_sentence():
    step, layer = {"what": "training step"}, {"what": "forward"}
    rows = [
        step | {"model": "a", "implementation": "chunked", "ms": 250.0, "tokens_per_second": 1.0},
        step | {"model": "a", "implementation": "default: kernels", "ms": 100.0, "tokens_per_second": 163840.0},
        layer | {"model": "b", "implementation": "default: kernels", "ms": 0.5},
    ]
    assert train_speed({"rows": rows}) == "a 163,840 tokens/s (2.50x)"
    row = {"model": "a", "batch": 8, "variant": "", "tokens_per_second": 163840.0, "mfu": 0.25, "peak_mib": 2048}
    rows = [row, row | {"variant": "model.unroll=1", "mfu": 0.5}]
    said = "a B8 163,840 tokens/s (25.0%, 2 GiB), a B8 model.unroll=1 163,840 tokens/s (50.0%, 2 GiB)"
    assert step_speed({"rows": rows}) == said
    assert best_steps({"rows": [*rows, row | {"model": "b"}]}) == "163,840 / 163,840 tokens/s (50 / 25%)"
