"""Evaluation: sums over pieces are those of the whole, by position and by length."""

import dataclasses
import functools
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mamba3_jax.config import DataConfig
from mamba3_jax.data import Batch, loader, recall, tokenizer
from mamba3_jax.data.batch import Documents
from mamba3_jax.data.curriculum import Setting
from mamba3_jax.data.synthetic import TASKS, Task
from mamba3_jax.evaluate import comparison, language, tasks
from mamba3_jax.evaluate.score import Scored, Scorer, positions
from tests.data.by_hand import ANSWER, BY_HAND
from tests.helpers import rel_rms
from tests.inference.tiny import tiny

LENGTH, PIECE = 40, 16


@functools.cache
def batch():
    """Two rows of documents, the second of which starts in the middle of a piece."""
    rng = np.random.default_rng(0)
    start_BL = np.zeros((2, LENGTH), bool)
    start_BL[:, 0] = start_BL[0, 21] = True
    tokens, targets = rng.integers(0, 13, (2, 2, LENGTH)).astype(np.int32)
    weights_BL = (rng.random((2, LENGTH)) > 0.2).astype(np.float32)
    return Batch(tokens, targets, weights_BL, start_BL)


@functools.cache
def scorer():
    return Scorer(*tiny(), PIECE)


@functools.cache
def scored():
    return scorer().batch(batch())


@functools.cache
def whole():
    """-log p of the targets from one call for all of a row."""
    model, params = tiny()
    logits_BLV = jax.jit(lambda *a: model.apply({"params": params}, a[0], None, a[1])[0])(
        batch().tokens_BL, batch().start_BL
    )
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), batch().targets_BL[..., None], axis=-1)[..., 0]


@pytest.mark.full
def test_pieces_are_the_whole():
    assert rel_rms(scored().nll_BL, whole()) < 1e-5
    assert rel_rms(scored().nll_BL * 1.001, whole()) > 1e-5
    reset = batch()._replace(start_BL=batch().start_BL | (np.arange(LENGTH) % PIECE == 0))
    lost = scorer().batch(reset).nll_BL
    assert rel_rms(lost, whole()) > 1e-3


@pytest.mark.full
def test_ids_outside_the_vocabulary_score_as_nan():
    """Targets at their own place; tokens from there on. 13 ids in an embedding of 16 rows."""
    for wrong in (-1, -100, 13, 15, 16):
        targets_BL, tokens_BL = batch().targets_BL.copy(), batch().tokens_BL.copy()
        targets_BL[0, 5] = tokens_BL[1, 30] = wrong
        got = scorer().batch(batch()._replace(targets_BL=targets_BL, tokens_BL=tokens_BL))
        assert np.flatnonzero(np.isnan(got.nll_BL[0])).tolist() == [5]
        assert not got.correct_BL[0, 5]
        assert np.isnan(got.nll_BL[1, 30:]).all()


@pytest.mark.full
def test_sums_by_position():
    total = language.Totals(LENGTH)
    total.add(scored()._replace(bytes_BL=np.full((2, LENGTH), 3)))
    got, weights_BL = total.result(), batch().weights_BL
    assert rel_rms(got["loss"], np.sum(whole() * weights_BL) / weights_BL.sum()) < 1e-5
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))
    assert got["bits_per_byte"] == pytest.approx(got["loss"] / math.log(2) / 3)
    assert [(b["from"], b["to"]) for b in got["positions"]] == [(0, 16), (16, 32), (32, 40)]
    place_BL = np.array([[*range(21), *range(19)], range(40)])
    for bucket in got["positions"]:
        inside_BL = (place_BL >= bucket["from"]) & (place_BL < bucket["to"]) & (weights_BL > 0)
        assert bucket["tokens"] == inside_BL.sum()
        assert rel_rms(bucket["loss"], np.asarray(whole())[inside_BL].mean()) < 1e-5
    assert sum(b["tokens"] for b in got["positions"]) == got["tokens"]


def test_a_perplexity_past_what_a_double_holds_is_infinite():
    assert language.perplexity(2.0) == math.exp(2.0)
    assert math.isfinite(language.perplexity(709.0))
    assert language.perplexity(710.0) == language.perplexity(math.inf) == math.inf
    assert math.isnan(language.perplexity(math.nan))


def test_late_tokens_have_half_a_row_before_them():
    """Of a row of 40: from place 20 on, but for those of a document that began at 21."""
    nll_BL = np.random.default_rng(0).random((2, LENGTH)).astype(np.float32)
    total = language.Totals(LENGTH)
    total.add(Scored(batch(), nll_BL, nll_BL > 0.5, positions(batch().start_BL)))
    late_BL = np.arange(LENGTH) >= 20 + np.array([[LENGTH], [0]])
    late_BL[0, 20] = True  # the last of the document before
    late_BL &= batch().weights_BL > 0
    assert total.result()["late_loss"] == pytest.approx(nll_BL[late_BL].mean(), rel=1e-6)
    short = language.Totals(LENGTH)
    every_BL = np.ones((2, LENGTH), bool)
    short.add(Scored(batch()._replace(start_BL=every_BL), nll_BL, nll_BL > 0.5, positions(every_BL)))
    assert short.result()["late_loss"] is None


def test_positions_begin_again_with_each_document():
    start_BL = np.array([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]], bool)
    assert positions(start_BL).tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]


@pytest.mark.parametrize("length", [2, 16, 17, 64, 100])
def test_buckets_double(length):
    edges = language.edges(length)
    assert edges[0] == 0
    assert edges[-1] == length
    assert edges[1:-1] == [16 * 2**i for i in range(len(edges) - 2)]


TEXTS = ["Grüße, 世界!  \n", "a <|endoftext|> is text here", "naïve 🙂🙂 naïve naïve"] * 5


@pytest.mark.parametrize("length", [4, 7, 32, 10_000])
def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path, length):
    """Of all but each document's first token, and its end as one, however the rows cut the documents."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, vocab_size=290)
    made.train_from_iterator(TEXTS, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = DataConfig(
        tokenizer=str(tmp_path / "tokenizer.json"),
        length=length,
        batch=2,
        train_glob=__file__,
        valid_glob=str(tmp_path / "valid.jsonl"),
    )
    total, source = language.Totals(length), loader(data, "valid", vocab_size=300)
    for batch in source:
        zeros_BL = np.zeros(batch.tokens_BL.shape)
        total.add(Scored(batch, zeros_BL, zeros_BL, positions(batch.start_BL), source.target_bytes()))
    first = sum(len(made.decode(made.encode(text).ids[:1])) for text in TEXTS)
    assert total.bytes == sum(len(text.encode()) + 1 for text in TEXTS) - first
    assert total.count.sum() == sum(len(ids) for ids, _ in tokenizer(data).encode_all(TEXTS))


@pytest.mark.full
def test_text_past_the_trained_length(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}bcdefghij" * 30)
    data = DataConfig(
        length=32,
        batch=2,
        train_glob=str(tmp_path / "a.txt"),
        valid_glob=str(tmp_path / "b.txt"),
    )
    lines = []
    results = language.evaluate(*tiny("M", 256), data, lengths=[64, 32], say=lines.append)
    assert [r["length"] for r in results] == [32, 64]
    assert [r["tokens"] for r in results] == [300, 300]  # all but the separator's own target; the separator is one
    assert results[1]["positions"][-1]["from"] == 32
    assert results[0]["bits_per_byte"] == pytest.approx(results[0]["loss"] / math.log(2))
    text = language.table(results, 32)
    assert "2x the trained length" in text
    assert text.count("\n") == 8
    assert language.evaluate(*tiny("M", 256), data, lengths=[32], max_tokens=64)[0]["tokens"] <= 64
    assert language.evaluate(*tiny("M", 256), data, lengths=[32], max_tokens=32)[0]["tokens"] <= 32  # half a batch


@pytest.mark.full
def test_members_scored_at_once_are_as_if_alone(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}bcdefghij" * 30)
    files = {"train_glob": str(tmp_path / "a.txt"), "valid_glob": str(tmp_path / "b.txt")}
    data = DataConfig(length=32, batch=2, **files)
    model, params = tiny("M", 256)
    other = jax.tree.map(lambda array: 1.5 * array, params)
    both = jax.tree.map(lambda *arrays: jnp.stack(arrays), params, other)
    first, second = language.evaluate(model, both, data, lengths=[32, 64], members=2)
    for got, alone in ((first, params), (second, other)):
        want = language.evaluate(model, alone, data, lengths=[32, 64])
        assert [(r["length"], r["tokens"]) for r in got] == [(r["length"], r["tokens"]) for r in want]
        for name in ("loss", "late_loss", "bits_per_byte"):
            assert rel_rms([r[name] for r in got], [r[name] for r in want]) < 1e-5
    assert abs(first[0]["loss"] - second[0]["loss"]) > 1e-3


class Counter:
    """Answers parity rightly, but forgets everything after every `memory` tokens."""

    config = SimpleNamespace(vocab_size=2)

    def __init__(self, memory):
        self.memory = memory

    def empty_state(self, batch, capacity):
        return {"sum": jnp.zeros(batch, jnp.int32), "place": jnp.zeros(batch, jnp.int32)}

    def apply(self, _, tokens_BL, state, start_BL):
        def step(carry, inputs):
            token_B, start_B = inputs
            place_B = jnp.where(start_B, 0, carry["place"])
            total_B = jnp.where(start_B | (place_B % self.memory == 0), 0, carry["sum"]) + token_B
            return {"sum": total_B, "place": place_B + 1}, total_B % 2

        state, parity_LB = jax.lax.scan(step, state, (tokens_BL.T, start_BL.T))
        return jax.nn.one_hot(parity_LB.T, 2), state


@pytest.mark.full
def test_parity_by_length():
    data = DataConfig(source="parity", length=64, batch=32, valid_rows=256, task_lengths=(40,), task_steps=(9,))
    always = tasks.evaluate(Counter(10**6), {}, data)
    assert [r["length"] for r in always] == [10, 20, 40, 80, 160, 256, 320]
    assert all(r["accuracy"] == r["last"] == r["scaled_last"] == 1 for r in always)
    assert all(r["sequences"] == 256 for r in always)
    forgets = {r["length"]: r for r in tasks.evaluate(Counter(40), {}, data)}
    assert forgets[40]["last"] == 1
    assert abs(forgets[160]["scaled_last"]) < 5 / math.sqrt(256)  # chance is 0 with deviation 1/sqrt(sequences)
    assert forgets[160]["accuracy"] == pytest.approx(1 / 4 + 3 / 4 / 2, abs=0.02)
    assert "4x the trained length" in tasks.table(list(forgets.values()), 40)


class Echo(Counter):
    """Answers each of three symbols with itself."""

    config = SimpleNamespace(vocab_size=3)

    def apply(self, _, tokens_BL, state, start_BL):
        return jax.nn.one_hot(tokens_BL, 3), state


def test_a_new_task_is_one_entry(monkeypatch):
    def documents(numbers_BL, add):
        tokens_BL = (numbers_BL * 3).astype(np.int32)
        return Documents(
            tokens_BL=tokens_BL,
            targets_BL=(tokens_BL + add) % 3,
            scored_BL=np.ones(tokens_BL.shape, bool),
            answer=tokens_BL.shape[1] - 1,
        )

    for name, add in {"same": 0, "next": 1}.items():
        task = Task(documents=functools.partial(documents, add=add), chance=1 / 3, symbols="abc")
        monkeypatch.setitem(TASKS, name, task)
    same = DataConfig(source="same", length=16, batch=8, valid_rows=16, task_lengths=(16,), task_steps=(1,))
    assert tokenizer(same).encode("cab") == [2, 0, 1]
    (right,), (wrong,) = (
        tasks.evaluate(Echo(1), {}, dataclasses.replace(same, source=name), lengths=[16]) for name in ("same", "next")
    )
    assert (right["accuracy"], right["scaled_last"]) == (1, 1)
    assert (wrong["accuracy"], wrong["scaled_last"]) == (0, pytest.approx(-1 / 2))
    batch = next(loader(same, "train", vocab_size=3))
    assert (batch.targets_BL == batch.tokens_BL).all()


class Oracle(Counter):
    """Works out a document of a task by its definition; wrong about the answer of every other row."""

    def __init__(self, source):
        self.source, self.symbols = source, TASKS[source].symbols
        self.config = SimpleNamespace(vocab_size=len(self.symbols))

    def empty_state(self, rows, length):
        return jnp.zeros(())

    def apply(self, _, tokens_BL, state, start_BL):
        def say(tokens_BL):
            said_BL = np.zeros_like(tokens_BL)
            for row, tokens_L in enumerate(tokens_BL.tolist()):
                wanted = BY_HAND[self.source]([self.symbols[token] for token in tokens_L])
                for place, name in wanted.items():
                    said_BL[row, place] = self.symbols.index(name)
                said_BL[row, max(wanted)] += row % 2
            return said_BL

        said_BL = jax.pure_callback(say, jax.ShapeDtypeStruct(tokens_BL.shape, jnp.int32), tokens_BL)
        return jax.nn.one_hot(said_BL % len(self.symbols), len(self.symbols)), state


@pytest.mark.parametrize("source", TASKS)
def test_every_task_is_scored_by_length(source):
    for labels in TASKS[source].labels:
        fields = {"length": 40, "batch": 16, "valid_rows": 32, "labels": labels}
        data = DataConfig(source=source, task_lengths=(40,), task_steps=(0,), task_min_length=3, **fields)
        (result,) = tasks.evaluate(Oracle(source), {}, data, lengths=[37])
        assert (result["length"], result["sequences"], result["last"], result["exact"]) == (37, 32, 0.5, 0.5)
        chance = TASKS[source].chance
        assert result["scaled_last"] == pytest.approx((0.5 - chance) / (1 - chance))
        one = labels == "answer" and source not in ANSWER
        assert result["accuracy"] == 0.5 if one else 0.5 < result["accuracy"] < 1
        if TASKS[source].depth:
            assert np.mean(result["exact_by_depth"]) == pytest.approx(0.5, abs=0.3)


def mqar_data(**fields):
    return DataConfig(
        source="mqar_64", length=32, batch=16, valid_rows=32, task_lengths=(32,), task_steps=(0,), **fields
    )


def test_settings_have_names():
    """A length alone has as many pairs as it holds; with pairs it has a name of its own, which metrics ask by."""
    for text, setting in {64: (64, 0), "64": (64, 0), "64:4": (64, 4)}.items():
        assert tasks.read_setting(text) == setting
        assert str(tasks.written(Setting(*setting))) == str(text)
    for text in ("64:", ":4", "64:0", "64:4:2", "-64", "6.4", "x", ""):
        with pytest.raises(ValueError, match=f"^{re.escape(repr(text))} is neither a length nor LENGTH:PAIRS$"):
            tasks.read_setting(text)
    for data, text, message in (
        (mqar_data(), "64:17", "17 pairs: 64 tokens of mqar_64 hold 16"),
        (DataConfig(source="parity"), "64:4", "4 pairs: parity has none"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            tasks.evaluate(None, {}, data, lengths=[text])

    found = tasks.evaluate(
        Oracle("mqar_64"), {}, mqar_data(task_pairs=(4,), task_mixed=False), lengths=["8:2", 8, "16"]
    )
    assert [comparison.place(score) for score in found] == ["8", "8:2", "16"]
    assert found[0] == {name: value for name, value in found[1].items() if name != "pairs"}  # 8 tokens hold 2 pairs
    row = {"scores": found}
    assert comparison.value(row, "exact@8:2") == 0.5
    assert comparison.value(row, "accuracy@16") == 1 - 1 / 8  # one of four, in every other row
    with pytest.raises(ValueError, match="length 16:2 was not scored, only 8, 8:2, 16"):
        comparison.value(row, "accuracy@16:2")
    lines = tasks.table(found, 8).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["8", "8:2", "16"]


class NearSighted(Oracle):
    """Answers what stands in the later half of the haystack, and one token of four of the rest."""

    def apply(self, _, tokens_BL, state, start_BL):
        def say(tokens_BL):
            said_BL = np.zeros_like(tokens_BL)
            deep_B = recall.needle_depth(tokens_BL) >= 0.5
            for row, tokens_L in enumerate(tokens_BL.tolist()):
                for place, name in BY_HAND[self.source]([self.symbols[token] for token in tokens_L]).items():
                    if deep_B[row] or place == tokens_BL.shape[1] - 1:
                        said_BL[row, place] = self.symbols.index(name)
            return said_BL

        said_BL = jax.pure_callback(say, jax.ShapeDtypeStruct(tokens_BL.shape, jnp.int32), tokens_BL)
        return jax.nn.one_hot(said_BL, len(self.symbols)), state


def test_a_value_is_right_as_a_whole_and_by_depth():
    fields = {"length": 64, "batch": 64, "valid_rows": 256, "labels": "answer", "task_steps": (0,)}
    data = DataConfig(source="needle", task_lengths=(64,), **fields)
    (found,) = tasks.evaluate(NearSighted("needle"), {}, data, lengths=[64])
    assert found["last"] == 1
    assert found["exact_by_depth"] == [0] * 5 + [1] * 5
    assert found["exact"] == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(256))
    assert found["accuracy"] == pytest.approx(found["exact"] + (1 - found["exact"]) / 4)


def test_lengths_of_tasks():
    data = DataConfig(source="arithmetic_brackets", labels="answer", task_lengths=(160,), task_steps=(0,), length=160)
    assert list(map(tasks.written, tasks.settings_of(data, []))) == [40, 80, 160, 256, 320, 640, 1280]
    short = dataclasses.replace(data, task_lengths=(8,))
    assert list(map(tasks.written, tasks.settings_of(short, []))) == [5, 8, 16, 32, 64, 256]
    with pytest.raises(ValueError, match=r"^length 4 is less than 5, the shortest of arithmetic_brackets$"):
        tasks.evaluate(None, {}, data, lengths=[4, 40])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="not one of the tasks"):
        tasks.evaluate(Counter(1), {}, DataConfig())
    with pytest.raises(ValueError, match="length 1 is less than 2"):
        language.evaluate(None, {}, DataConfig(), lengths=[4, 1])
    with pytest.raises(ValueError, match="length 10000000000 is more than 134217728"):
        language.evaluate(None, {}, DataConfig(), lengths=[10**10])
