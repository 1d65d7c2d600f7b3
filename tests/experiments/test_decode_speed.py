"""The benchmark of generation, in small on any device: what it times agrees, or it is not timed."""

import dataclasses
import itertools
import re

import jax
import pytest

from experiments.benchmarks import common, decode
from experiments.benchmarks.experiments import decode_speed
from mamba3_jax import decoding

MEASURE = common.measure


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(decode, "PIECE", 4)
    monkeypatch.setitem(decode.MODELS, "tiny", dataclasses.replace(decode.TINY, pattern="M", d_ff=0))
    quick = {"batch_seconds": 1e-3, "batches": 1, "warm_up": 1}
    monkeypatch.setattr(common, "measure", lambda function, **_: MEASURE(function, **quick))
    yield
    decode.params_of.cache_clear()
    decode.prepared_of.cache_clear()


@pytest.mark.full
def test_every_row_is_checked_and_timed():
    programs = decode.programs_of("tiny", [2], ["plain", "top_p"], tokens=3, prompt=16, copy_gb_s=1.0)
    assert tuple(programs) == decode.WHAT
    rows = list(decode.rows_of("tiny", list(itertools.chain(*programs.values()))))
    named = [(row["what"], row["path"], row.get("sampling")) for row in rows]
    assert named == [
        ("decode", "loop", "plain"),
        ("decode", "loop", "top_p"),
        ("decode", "former", "plain"),
        ("draw", "search", "plain"),
        ("draw", "search", "top_p"),
        ("draw", "sort", "top_p"),
        ("prefill", "pieces of 8", None),
        ("prefill", "pieces of 4", None),
    ]
    for row in rows:
        tokens = 2 * 8 if row["what"] == "prefill" else 2
        assert row["tokens_per_second"] == pytest.approx(tokens / row["ms"] * 1e3)
        assert row["compile_s"] > 0
    assert rows[0]["error"] < 1e-2
    assert rows[0]["over_floor"] == rows[0]["ms"] / rows[0]["floor_ms"]
    assert rows[-2]["error"] == 0 < rows[-1]["error"] < 0.1


def test_variants_of_an_experiment_are_models(tmp_path):
    """A state that grows with the context is timed at each, and all of it is read; others once."""
    path = tmp_path / "file.py"
    path.write_text(
        """from experiments.benchmarks.decode import TINY
from mamba3_jax.config import Config
VARIANTS = {"ssm": {}, "attention": {"model.pattern": "A", "model.attn_head_dim": 16}}
def get_config(): return Config(model=TINY)
"""
    )
    ssm, attention = (models := decode.variants_of(str(path))).values()
    assert list(models) == ["ssm", "attention"]
    assert (decode.contexts_of(ssm, [8, 64]), decode.contexts_of(attention, [8, 64])) == ([0], [8, 64])
    cache = 2 * 2 * 16 * 2  # keys and values of two heads of 16 numbers of two bytes, a token
    assert decode.state_bytes(attention, 64) - decode.state_bytes(attention, 8) == 56 * cache
    assert decode.floor_bytes(attention, 3, 64) - decode.floor_bytes(attention, 3, 8) == 3 * 56 * cache
    assert decode.floor_bytes(ssm, 3, 64) == decode.floor_bytes(ssm, 3)
    assert decode.variants_of("") == {}
    path.write_text(path.read_text().replace("16}", "64}"))
    with pytest.raises(ValueError, match=r"variant attention: .*heads"):
        decode.variants_of(str(path))
    whole = path.read_text()
    for wrong in (
        "\0",
        "def (",
        "",
        "nothing",
        "raise SystemExit(3)",
        f"{whole}VARIANTS = 5",
        f"{whole}get_config = int",
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            decode.variants_of(str(path))


def test_the_floor_counts_weights_once_and_the_state_twice():
    config = dataclasses.replace(decode.TINY, pattern="M", d_ff=0)
    one, two = decode.floor_bytes(config, 1), decode.floor_bytes(config, 2)
    heads, width, d_state, planes, d_model = 4, 16, 16, 4, 32
    # ssm and angle in float32, the last key and value in bfloat16, each read and written; a row of the table.
    state = 4 * heads * (width * d_state + planes) + 2 * heads * (d_state + width)
    assert two - one == 2 * state + 4 * d_model
    matrices = (
        d_model * (2 * heads * width + 3 * heads + 2 * d_state + planes) + heads * width * d_model + 256 * d_model
    )
    vectors = (
        2 * d_model + 2 * heads + 2 * heads * d_state + 2 * d_state
    )  # norms, dt_bias and skip, biases, q and k norm
    assert 2 * one - two == 2 * matrices + 4 * vectors


@pytest.mark.full
def test_other_logits_are_not_timed(monkeypatch):
    step = decoding.step

    def off(*arguments):
        logits_BV, state = step(*arguments)
        return logits_BV * 1.05, state

    assert decode.check_logits("tiny", 2, "loop") < 1e-2
    monkeypatch.setattr(decoding, "step", off)
    jax.clear_caches()
    with pytest.raises(ValueError, match="tiny, batch 2, loop: relative error over 2e-02 in logits"):
        decode.check_logits("tiny", 2, "loop")


def test_the_sentence():
    row = {"what": "decode", "model": "a", "batch": 8, "sampling": "plain"}
    rows = [row | {"path": "loop", "ms": 0.5, "over_floor": 2.5}, row | {"path": "former", "ms": 1.0}]
    assert decode_speed({"rows": rows}) == "a B8 0.500 ms a token, 2.50x the floor, 2.00x as fast as before"
