"""Every task against an independent definition, and what rows and curriculum promise."""

import dataclasses
import itertools

import numpy as np
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.data import Batch, loader, tokenizer
from mamba3_jax.data import synthetic as module
from mamba3_jax.data.curriculum import document_setting
from mamba3_jax.data.flip_flop import top_writes
from mamba3_jax.data.synthetic import GROUPS, TASKS, synthetic_rows
from mamba3_jax.data.words import products
from tests.data.by_hand import ANSWER, BY_HAND, flip_flop_by_hand, left_to_right, parity_by_hand, word_by_hand


def config(source="parity", **fields):
    fields = {"length": 100, "batch": 6, "valid_rows": 9, **fields}
    return DataConfig(source=source, **{"labels": TASKS[source].labels[0], **fields})


def batch_of(source, length, rows=64, **fields):
    """Rows of one whole document each, and the name of every token and target."""
    data = config(source, length=length, batch=rows, task_lengths=(length,), task_steps=(0,), **fields)
    batch = next(loader(data, "train", vocab_size=len(TASKS[source].symbols)))
    named = lambda array: [[TASKS[source].symbols[i] for i in row] for row in array.tolist()]  # noqa: E731
    return batch, named(batch.tokens_BL), named(batch.targets_BL)


def wrong(batch, names, by_hand, symbols):
    """Count the tokens whose target, or whose being scored, is not as the definition has it."""
    count = 0
    for row, targets, weights in zip(names, batch.targets_BL.tolist(), batch.weights_BL.tolist(), strict=True):
        wanted = by_hand(row)
        for place, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            count += (symbols[target], weight) != (wanted[place], 1) if place in wanted else (target, weight) != (0, 0)
    return count


def possible(source, length):
    """A length near this one that the task has, and at which tokens alone say which of them are queries."""
    least = TASKS[source].least
    return 8 if source.startswith("mqar") and length == 6 else max(least, length)


@pytest.mark.parametrize("source", TASKS)
@pytest.mark.parametrize("length", [5, 6, 40, 61])
def test_targets_are_the_definition(source, length):
    symbols, by_hand, length = TASKS[source].symbols, BY_HAND[source], possible(source, length)
    batch, names, _ = batch_of(source, length)
    assert not wrong(batch, names, by_hand, symbols)
    scored = batch.weights_BL > 0
    planted = batch.targets_BL.copy()
    row, place = np.argwhere(scored)[-1]
    planted[row, place] = (planted[row, place] + 1) % len(symbols)
    assert wrong(batch._replace(targets_BL=planted), names, by_hand, symbols) == 1

    if "answer" not in TASKS[source].labels:
        return
    answers, names, _ = batch_of(source, length, labels="answer")
    last = [sorted(by_hand(row))[-ANSWER.get(source, 1) :] for row in names]
    assert [np.flatnonzero(weights).tolist() for weights in answers.weights_BL] == last
    at = answers.weights_BL > 0
    assert (answers.tokens_BL == batch.tokens_BL).all()
    assert (answers.targets_BL[at] == batch.targets_BL[at]).all()
    assert not answers.targets_BL[~at].any()


def test_planted_errors_in_the_making_are_caught():
    """A product in the wrong order, precedence forgotten, an undo that does nothing: each fails the test above."""
    table = GROUPS["S3"].table_VV
    word = np.random.default_rng(0).integers(0, 6, (8, 20))
    named = [[GROUPS["S3"].names[i] for i in row] for row in word]
    batch = Batch(word, products(table, word), np.ones(word.shape), None)
    assert not wrong(batch, named, word_by_hand, GROUPS["S3"].names)
    assert wrong(batch._replace(targets_BL=products(table.T, word)), named, word_by_hand, GROUPS["S3"].names) > 50
    batch, names, _ = batch_of("arithmetic", 41)
    assert wrong(batch, names, left_to_right, TASKS["arithmetic"].symbols) > 100
    batch, names, _ = batch_of("flip_flop_undo", 40)
    ignored = [["i" if name == "u" else name for name in row] for row in names]
    assert wrong(batch, ignored, flip_flop_by_hand, TASKS["flip_flop_undo"].symbols) > 20


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_groups(name):
    table, order = GROUPS[name].table_VV, len(GROUPS[name].names)
    assert order == {"Z2": 2, "Z6": 6, "S3": 6, "S4": 24, "A5": 60, "S5": 120}[name] == len(set(GROUPS[name].names))
    assert (table[0] == np.arange(order)).all()
    assert (table[:, 0] == np.arange(order)).all()
    assert (np.sort(table, axis=0) == np.arange(order)[:, None]).all()
    assert (np.sort(table, axis=1) == np.arange(order)).all()
    a, b, c = np.random.default_rng(0).integers(0, order, (3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (table == table.T).all() == (name in ("Z2", "Z6"))
    reached = {0}
    for _ in range(order):
        reached |= {int(table[a, g]) for a in reached for g in GROUPS[name].generators}
    assert len(reached) == order  # its generators generate it


def root_operator(names):
    """Find where the operator of the outermost brackets stands."""
    depth = 0
    for place, name in enumerate(names):
        depth += (name == "(") - (name == ")")
        if name in "+-" and depth == 1 and names[place - 1] != "(":
            return place


def near(share, wanted, count):
    """A share of `count` draws is within five deviations of what is wanted."""
    return abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / count)


def test_draws_have_the_frequencies_of_the_source():
    for source in ("parity", "Z6", "S5", "A5_generators"):
        tokens = batch_of(source, 64, rows=256)[0].tokens_BL
        kinds, counts = np.unique(tokens, return_counts=True)
        drawn = len(TASKS[source].symbols) if "gen" not in source else 4
        assert len(kinds) == drawn
        assert all(near(count / tokens.size, 1 / drawn, tokens.size) for count in counts)
    for source, wanted in {
        "arithmetic": {"+": 1 / 3, "*": 1 / 3, "0": 1 / 5},
        "flip_flop": {"w": 0.1, "r": 0.1, "i": 0.8},
    }.items():
        _, names, _ = batch_of(source, 65, rows=256)
        inner = [name for row in names for name in row[2:60]]
        pool = [name for name in inner if name in ("+-*" if source == "arithmetic" else "wri")]
        digits = [name for name in inner if name.isdigit()]
        for name, share in wanted.items():
            of = digits if name.isdigit() else pool
            assert near(of.count(name) / len(of), share, len(of)), name
    # The root of an expression of 9 tokens has its operator at place 2 .. 6, the left part being 1 .. 5 tokens long.
    _, names, _ = batch_of("arithmetic_brackets", 12, rows=2000)
    root = [root_operator(row) for row in names]
    assert all(near(root.count(place) / 2000, 1 / 5, 2000) for place in range(2, 7))
    assert not any("*" in row for row in names)
    assert any("*" in row for row in batch_of("arithmetic_brackets_times", 12)[1])


def test_layouts_are_those_of_the_source():
    texts = {length: ["".join(row) for row in batch_of("arithmetic", length, rows=8)[1]] for length in (3, 4, 7, 8)}
    assert all(text[0].isdigit() and text[1:] == "=_" for text in texts[3])
    assert all(text[0].isdigit() and text[1:] == "=__" for text in texts[4])
    assert all(text[5:] == "=_" and text[1] in "+-*" for text in texts[7])
    for length, form in {5: "-d", 6: "(d)", 7: "(-d)"}.items():
        for row in batch_of("arithmetic_brackets", length, rows=8)[1]:
            text = "".join(row)
            assert "".join("d" if c.isdigit() else c for c in text) == f"{form}=__"
    assert TASKS["arithmetic"].symbols == "_+-*=01234"
    assert TASKS["arithmetic_brackets"].symbols == "01234+-*()=_"


def test_an_undo_goes_back_through_every_write():
    instructions = "wwwuuuuwiu"
    write, undo = (np.array([[name == kind for name in instructions]]) for kind in "wu")
    assert top_writes(write, undo).tolist() == [[0, 1, 2, 1, 0, 0, 0, 7, 7, 0]]


def test_documents_follow_each_other_and_the_last_is_cut():
    data = config(task_lengths=(7, 50, 100), task_steps=(2, 1, 1))
    source = loader(data, "train", vocab_size=2)
    for want in (7, 7, 50, 100, 100, 100):
        batch = next(source)
        assert (batch.start_BL == (np.arange(100) % want == 0)).all()
        assert (batch.weights_BL == 1).all()
        assert 0.4 < batch.tokens_BL.mean() < 0.6
        for tokens, targets in zip(batch.tokens_BL, batch.targets_BL, strict=True):
            for first in range(0, 100, want):
                wanted = parity_by_hand(map(str, tokens[first : first + want].tolist()))
                assert "".join(map(str, targets[first : first + want])) == "".join(wanted.values())


@pytest.mark.parametrize("source", TASKS)
def test_a_document_does_not_depend_on_where_it_is(source):
    """Three documents of 12 in a row of 40 are scored as documents of their own; what is left of one has no answer."""
    task, by_hand = TASKS[source], BY_HAND[source]
    for labels in task.labels:
        data = config(source, length=40, labels=labels, task_lengths=(12,), task_steps=(0,))
        batch = next(loader(data, "train", vocab_size=len(task.symbols)))
        for first in (0, 12, 24):
            part = Batch(*(array[:, first : first + 12] for array in batch))
            names = [[task.symbols[i] for i in row] for row in part.tokens_BL.tolist()]
            tokens = ANSWER.get(source, 1) if labels == "answer" else len(part.tokens_BL[0])
            last = lambda row: dict(sorted(by_hand(row).items())[-tokens:])  # noqa: E731, B023
            assert not wrong(part, names, last, task.symbols)
        if labels == "answer":
            assert not batch.weights_BL[:, 36:].any()
        assert (batch.start_BL == (np.arange(40) % 12 == 0)).all()


@pytest.mark.parametrize("packed", [False, True])
def test_the_longest_length_rises_linearly(packed):
    fields = {"task_min_length": 3, "task_lengths": (10, 40), "task_steps": (300, 0), "task_packed": packed}
    data = config("S3", length=48, **fields)
    drawn = np.array([document_setting(data, step).length for step in range(600)])
    most = np.minimum(40, 10 + 30 * np.arange(600) / 300)
    assert (drawn >= 3).all()
    assert (drawn <= most).all()
    assert {3, 40} <= set(drawn[300:])
    assert max(drawn[:60]) <= 16  # 10 + 59 / 10
    share = (drawn - 3 + 0.5) / (np.floor(most) - 3 + 1)
    assert abs(share.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 600)
    other = dataclasses.replace(data, seed=1)
    assert (drawn != [document_setting(other, step).length for step in range(600)]).mean() > 0.8

    source = loader(data, "train", vocab_size=6)
    for length, batch in zip(drawn[:20].tolist(), source, strict=False):
        scored = 48 if packed else length
        assert batch.tokens_BL.shape == (6, 48)
        assert (batch.weights_BL == (np.arange(48) < scored)).all()
        assert not (batch.tokens_BL * (1 - batch.weights_BL)).any()
        assert (np.flatnonzero(batch.start_BL[0]) == (np.arange(0, 48, length) if packed else [0])).all()


def test_short_lengths_become_the_shortest_of_the_task():
    """Of 3 and 4 tokens the source makes 5 (with brackets)."""
    fields = {"task_min_length": 3, "task_lengths": (5,), "task_steps": (0,), "task_packed": False}
    batches = itertools.islice(loader(config("arithmetic_brackets", **fields), "train", vocab_size=12), 12)
    equals = TASKS["arithmetic_brackets"].symbols.index("=")
    assert all((batch.tokens_BL[:, 2] == equals).all() for batch in batches)


def test_document_setting_follows_the_curriculum():
    data = config(task_lengths=(40, 64, 96), task_steps=(3, 0, 2))
    assert [document_setting(data, step).length for step in range(7)] == [40, 40, 40, 96, 96, 96, 96]


@pytest.mark.parametrize("source", TASKS)
def test_rows_are_drawn_from_seed_split_and_number_alone(source):
    fields = {"task_min_length": 5, "task_lengths": (30, 100), "task_steps": (2, 0)}
    gather = synthetic_rows(config(source, **fields), "train").gather
    numbers = np.array([3, 14, 0, 7, 1])  # of three steps, and so lengths
    together = gather(numbers)
    apart = [np.concatenate(arrays) for arrays in zip(*(gather(np.array([n])) for n in numbers), strict=True)]
    assert all((one == other).all() for one, other in zip(together, apart, strict=True))
    full = {"task_lengths": (100,), "task_steps": (0,)}
    others = [(0, "train"), (1, "train"), (0, "valid")]
    drawn = [synthetic_rows(config(source, seed=s, **full), split).gather(np.arange(5)) for s, split in others]
    assert len({row.tobytes() for batch in drawn for row in batch.tokens_BL}) == 15


def test_parity_is_drawn_as_it_always_was():
    """Recorded runs and checkpoints count on it."""
    tokens = synthetic_rows(config(seed=3), "train").gather(np.array([2**40 + 5, 8])).tokens_BL
    for row, number in zip(tokens, (2**40 + 5, 8), strict=True):
        philox = np.random.Philox(key=[3, 0], counter=[0, 0, 0, number])
        assert (row == np.random.Generator(philox).integers(0, 2, 100, dtype=np.int32)).all()
    assert synthetic_rows(config(), "train").identity == "parity (40, 160) (400, 500)"


@pytest.mark.parametrize("source", ["arithmetic_brackets", "flip_flop_undo", "S5_generators"])
def test_a_resumed_stream_is_the_uninterrupted_one(source):
    data = config(source, task_min_length=5, task_lengths=(10, 100), task_steps=(6, 0), task_packed=False)
    load = lambda **host: loader(data, "train", vocab_size=120, **host)  # noqa: E731
    whole = list(itertools.islice(load(), 8))
    before, after = load(), load()
    for _ in range(3):
        next(before)
    after.set_state(before.get_state())
    for want, batch in zip(whole[3:], after, strict=False):
        assert all((one == other).all() for one, other in zip(want, batch, strict=True))
    halves = zip(load(host=(0, 2)), load(host=(1, 2)), strict=False)
    for want, (even, odd) in zip(whole, halves, strict=False):
        assert (want.tokens_BL[::2] == even.tokens_BL).all()
        assert (want.targets_BL[1::2] == odd.targets_BL).all()
    for field, value in {"labels": "answer", "task_min_length": 6, "task_packed": True}.items():
        other = dataclasses.replace(data, **{field: value})
        if other != data:
            with pytest.raises(ValueError, match="cannot resume: the data had content"):
                loader(other, "train", vocab_size=120).set_state(before.get_state())


def test_validation_is_finite_and_of_the_last_length():
    batches = list(loader(config(task_lengths=(5, 25), task_steps=(1, 1)), "valid", vocab_size=2))
    assert [int(batch.weights_BL.sum()) for batch in batches] == [600, 300]
    assert (batches[0].start_BL == (np.arange(100) % 25 == 0)).all()
    assert not batches[1].targets_BL[3:].any()


@pytest.mark.parametrize("source", TASKS)
def test_every_id_has_a_name(source):
    codec, (_, names, _) = tokenizer(config(source)), batch_of(source, 40, rows=4)
    assert codec.vocab_size == len(set(TASKS[source].symbols))
    text = ("" if isinstance(TASKS[source].symbols, str) else " ").join(names[0])
    assert codec.decode(codec.encode(text)) == text
    with pytest.raises(ValueError, match=f"the text of a {source} model is made of .*, got '%'"):
        codec.encode(text + " %" if " " in text else text + "%")


MISTAKES = {
    r"data.task_lengths=\(4, 8\) and data.task_steps=\(1,\) want one": {"task_lengths": (4, 8), "task_steps": (1,)},
    r"data.labels='all' is not one of every, answer": {"labels": "all"},
    r"data.labels='every' is not defined for arithmetic_brackets": {
        "source": "arithmetic_brackets",
        "labels": "every",
    },
    r"data.task_lengths=\(40, 4\) has a length under 5, the shortest of arithmetic_brackets": {
        "source": "arithmetic_brackets",
        "task_lengths": (40, 4),
    },
    r"data.task_min_length=41 is over a length of data.task_lengths=\(40, 160\)": {"task_min_length": 41},
    r"data.length=100 has no room for a whole document of data.task_lengths=\(40, 160\)": {"labels": "answer"},
    r"data.length=100 has no room": {"task_packed": False},
    r"data.task_pairs=\(4,\) wants one number of pairs for each of \(40, 160\)": {"source": "mqar", "task_pairs": (4,)},
    r"data.task_pairs=\(4, 41\): 41 pairs: 160 tokens of mqar hold 40": {"source": "mqar", "task_pairs": (4, 41)},
    r"data.task_pairs=\(0, 17\): 17 pairs: 100 tokens of needle hold 15": {
        "source": "needle",
        "task_lengths": (40, 100),
        "task_pairs": (0, 17),
    },
    r"data.task_pairs=\(4, 4\): 4 pairs: parity has none": {"task_pairs": (4, 4)},
    r"data.task_pairs is of stages, and data.task_min_length=4": {
        "source": "mqar",
        "task_pairs": (4, 4),
        "task_min_length": 4,
    },
    r"data.task_mixed is of stages, and data.task_min_length=4": {"task_mixed": True, "task_min_length": 4},
    r"data.task_steps=\(0, 0\) gives data.task_mixed no stage": {"task_mixed": True, "task_steps": (0, 0)},
    r"data.labels='answer' is not defined for mqar: its last target has no place of its own: it has every": {
        "source": "mqar",
        "labels": "answer",
    },
    r"config.data.valid_rows=0 is not in 1": {"valid_rows": 0},
    r"config.data.task_min_length=-1 is not in 0": {"task_min_length": -1},
    r"config.data.task_min_length=nan is not of type int": {"task_min_length": float("nan")},
    r"config.data.task_lengths=\(40, inf\) is not of type": {"task_lengths": (40, float("inf"))},
    r"config.data.task_packed=1 is not of type bool": {"task_packed": 1},
    r"config.data.labels=None is not of type str": {"labels": None},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message, monkeypatch):
    monkeypatch.setattr(module, "uniform", None)  # nothing is drawn before
    with pytest.raises(ValueError, match=message) as error:
        loader(config(**MISTAKES[message]), "valid", vocab_size=12)
    assert "\n" not in str(error.value)
