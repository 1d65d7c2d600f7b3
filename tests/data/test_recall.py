"""Recall by keys: what zoology's definition and that of the needle promise, beside the tests of every task."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.data import loader, recall
from mamba3_jax.data.curriculum import Setting, document_setting
from mamba3_jax.data.synthetic import TASKS, synthetic_rows


def data_of(source, length, pairs=0, **fields):
    shape = {"task_lengths": (length,), "task_steps": (1,), "task_pairs": (pairs,), "batch": 64}
    return DataConfig(source=source, **{"length": length, "labels": TASKS[source].labels[0], **shape, **fields})


def batch_of(*arguments, **fields):
    data = data_of(*arguments, **fields)
    return next(loader(data, "train", vocab_size=len(TASKS[data.source].symbols)))


def mistakes(batch, pairs, vocab_size):
    """Count the documents that break zoology's definition of multi-query recall."""
    count, half = 0, vocab_size // 2
    for tokens, targets, weights in zip(batch.tokens_BL, batch.targets_BL, batch.weights_BL, strict=True):
        keys, values = tokens[: 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist()
        queries = np.flatnonzero(weights)
        asked = dict(zip(tokens[queries].tolist(), targets[queries].tolist(), strict=True))
        held = len(queries) == len(set(keys)) == len(set(values)) == pairs and asked == dict(
            zip(keys, values, strict=True)
        )
        held = held and all(1 <= key < half for key in keys) and all(half <= value < vocab_size for value in values)
        held = held and bool((queries >= 2 * pairs).all() and (queries % 2 == 0).all())
        count += not (held and not targets[weights == 0].any())
    return count


@pytest.mark.parametrize(("source", "vocab_size"), [("mqar", 8192), ("mqar_blank", 8192), ("mqar_64", 64)])
@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (33, 3), (256, 16)])
def test_each_query_is_answered_by_the_value_beside_its_key(source, vocab_size, length, pairs):
    batch = batch_of(source, length, pairs)
    assert mistakes(batch, pairs, vocab_size) == 0
    row, place = np.argwhere(batch.weights_BL > 0)[-1]
    for planted in (batch.targets_BL, batch.tokens_BL, batch.weights_BL):  # another value, another key, one not asked
        planted[row, place] -= 1
        assert mistakes(batch, pairs, vocab_size) == 1
        planted[row, place] += 1
    batch.tokens_BL[0, 2] = batch.tokens_BL[0, 0]  # one key twice
    assert mistakes(batch, pairs, vocab_size) == 1
    others = batch.tokens_BL[:, 2 * pairs :][batch.weights_BL[:, 2 * pairs :] == 0]
    assert (len(np.unique(others)) > 20) == (source != "mqar_blank") == bool(others.any())


def shares(slots, pairs):
    """How often each slot holds the first query, and how often any of two, by zoology's way of drawing them."""
    weight = np.arange(1, slots + 1) ** (recall.POWER - 1.0)
    first = weight / weight.sum()
    second = first * ((first / (1 - first)).sum() - first / (1 - first)) if pairs == 2 else 0
    return first, first + second


def test_gaps_follow_the_power_law():
    """The first pair's query, and any, stand in each slot as often as two draws without replacement say."""
    count, pairs, slots = 4000, 2, 14
    batch = batch_of("mqar", 32, pairs, batch=count)
    context = 2 * pairs
    asked = batch.weights_BL[:, context::2] > 0
    first = asked & (batch.tokens_BL[:, context::2] == batch.tokens_BL[:, :1])
    for found, wanted in zip((first.mean(axis=0), asked.mean(axis=0)), shares(slots, pairs), strict=True):
        assert found.sum() == pytest.approx(wanted.sum())
        assert (abs(found - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / count)).all()
        even = np.full(slots, wanted.sum() / slots)
        assert (abs(found - even) > 5 * np.sqrt(even * (1 - even) / count)).sum() > 5  # an even law is told apart


def test_keys_and_values_are_drawn_evenly():
    drawn = recall.distinct(np.random.default_rng(0).random((6000, 2)), 4)
    pairs, counts = np.unique(drawn @ [4, 1], return_counts=True)
    assert len(pairs) == 12  # every order of every two
    assert (abs(counts - 500) < 5 * math.sqrt(500)).all()
    assert (np.sort(recall.distinct(np.random.default_rng(0).random((9, 7)), 7)) == np.arange(7)).all()


def test_a_mixture_has_its_shares_and_a_batch_one_setting():
    lengths, pairs, weights = (64, 128, 256, 256, 256), (4, 8, 16, 32, 64), (50, 20, 40, 40, 40)
    fields = {"length": 256, "batch": 2, "task_mixed": True}
    data = DataConfig(source="mqar", task_lengths=lengths, task_pairs=pairs, task_steps=weights, **fields)
    drawn = [document_setting(data, step) for step in range(2000)]
    for setting, weight in zip(map(Setting, lengths, pairs), weights, strict=True):
        wanted = weight / sum(weights)
        assert abs(drawn.count(setting) / 2000 - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 2000)
    for setting, batch in zip(drawn[:12], loader(data, "train", vocab_size=8192), strict=False):
        assert (np.flatnonzero(batch.start_BL[0]) == np.arange(0, 256, setting.length)).all()
        assert batch.weights_BL.sum() == 2 * 256 // setting.length * setting.pairs
    assert drawn != [document_setting(dataclasses.replace(data, seed=1), step) for step in range(2000)]
    together = synthetic_rows(data, "train").gather(np.array([7, 0, 23, 4]))  # of four steps
    apart = [synthetic_rows(data, "train").gather(np.array([row])) for row in (7, 0, 23, 4)]
    for field, array in together._asdict().items():
        assert (array == np.concatenate([getattr(one, field) for one in apart])).all()


def test_a_row_that_ends_early_is_the_beginning_of_a_longer_one():
    """What the queries of a cut document are drawn from is drawn for all of it."""
    fields = {"task_lengths": (64,), "task_steps": (1,), "task_pairs": (4,)}
    cut, whole = (
        synthetic_rows(DataConfig(source="mqar", length=length, **fields), "train").gather(np.arange(64))
        for length in (100, 128)
    )
    assert all((one == other[:, :100]).all() for one, other in zip(cut, whole, strict=True))


def test_a_resumed_mixture_is_the_uninterrupted_one():
    fields = {"length": 64, "batch": 4, "task_mixed": True, "task_pairs": (2, 8)}
    data = DataConfig(source="mqar", task_lengths=(32, 64), task_steps=(1, 1), **fields)
    whole = list(itertools.islice(loader(data, "train", vocab_size=8192), 8))
    before, after = (loader(data, "train", vocab_size=8192) for _ in range(2))
    for _ in range(3):
        next(before)
    after.set_state(before.get_state())
    for want, batch in zip(whole[3:], after, strict=False):
        assert all((one == other).all() for one, other in zip(want, batch, strict=True))
    for field, value in {"task_mixed": False, "task_pairs": (2, 7)}.items():
        other = loader(dataclasses.replace(data, **{field: value}), "train", vocab_size=8192)
        with pytest.raises(ValueError, match="cannot resume: the data had content"):
            other.set_state(before.get_state())


def needles(names):
    """Where the needles of a document begin, and their keys and values."""
    begins = [place for place, name in enumerate(names) if name == "!"]
    return begins, [names[place + 1] for place in begins], [names[place + 2 : place + 6] for place in begins]


@pytest.mark.parametrize("source", ["needle", "needle_alike"])
@pytest.mark.parametrize(("length", "pairs"), [(11, 1), (64, 1), (64, 4), (120, 19)])
def test_needles_are_whole_and_one_is_asked_for(source, length, pairs):
    batch, task = batch_of(source, length, pairs), TASKS[source]
    asked = []
    for tokens, targets in zip(batch.tokens_BL, batch.targets_BL, strict=True):
        names = [task.symbols[token] for token in tokens]
        begins, keys, values = needles(names[: length - 5])
        assert len(set(keys)) == len(begins) == pairs
        assert {key[0] for key in keys} == {"k"}
        assert {word[0] for value in values for word in value} == {"w"}
        assert (np.diff(begins) >= 6).all()
        inside = {place + i for place in begins for i in range(6)}
        hay = [names[place] for place in range(length - 5) if place not in inside]
        assert {name[0] for name in hay} <= (set("kw") if source == "needle_alike" else {"h"})
        assert names[length - 5] == "?"
        index = keys.index(names[length - 4])
        asked.append(index)
        assert names[length - 3 :] == values[index][:3]
        assert [task.symbols[target] for target in targets[length - 4 :]] == values[index]
    assert (batch.weights_BL == (np.arange(length) >= length - 4)).all()
    assert len(set(asked)) == pairs if pairs < 5 else len(set(asked)) > 5


def test_needles_lie_at_every_depth():
    count = 4000
    batch = batch_of("needle", 30, 1, batch=count)
    begin = (batch.tokens_BL == 0).argmax(axis=1)
    places, counts = np.unique(begin, return_counts=True)
    assert (places == np.arange(20)).all()  # 25 tokens of hay, 6 of a needle
    assert (abs(counts - count / 20) < 5 * math.sqrt(count / 20)).all()
    assert (recall.needle_depth(batch.tokens_BL) == begin / 19).all()
    two = batch_of("needle", 22, 2, batch=count)  # 5 tokens are left of the hay: 7 * 6 / 2 ways
    ways, counts = np.unique([np.flatnonzero(row == 0) for row in two.tokens_BL], axis=0, return_counts=True)
    assert len(ways) == 21
    assert (abs(counts - count / 21) < 5 * math.sqrt(count / 21)).all()


def test_guesses_are_right_by_chance():
    rng = np.random.default_rng(0)
    for source, first, many in (("mqar_64", 32, 32), ("needle", 66, 64)):
        batch = batch_of(source, 64, batch=512)
        scored = batch.weights_BL > 0
        guess = first + rng.integers(0, many, scored.shape)
        share, chance = (guess == batch.targets_BL)[scored].mean(), TASKS[source].chance
        assert chance == 1 / many
        assert abs(share - chance) < 5 * math.sqrt(chance / scored.sum())
        assert set(np.unique(batch.targets_BL[scored])) == set(range(first, first + many))
