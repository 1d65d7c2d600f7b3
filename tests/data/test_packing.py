"""Rows of a corpus against a definition written with lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3_jax.data.packing import concatenate, rows
from mamba3_jax.data.vocabulary import Bytes


def corpus(documents):
    return concatenate([(np.array(document), None) for document in documents], Bytes(), "the test")


def by_hand(documents, length):
    """(tokens, target, weight, start) of every position, document by document, then padding."""
    positions = []
    for document in documents:
        whole = [*document, Bytes.eos]
        for i, token in enumerate(whole):
            scored = i + 1 < len(whole)
            positions.append((token, whole[i + 1] if scored else 0, float(scored), i == 0))
    positions += [(0, 0, 0.0, True)] * (-len(positions) % length)
    tokens, targets, weights, start = (np.array(part).reshape(-1, length) for part in zip(*positions, strict=True))
    start[:, 0] = True
    return tokens, targets, weights, start


def differences(batch, want):
    return [name for name, got, expected in zip(batch._fields, batch, want, strict=True) if not (got == expected).all()]


documents_of_ids = st.lists(st.lists(st.integers(1, 255), min_size=1, max_size=9), min_size=1, max_size=9)


@given(documents_of_ids, st.integers(2, 12))
@settings(deadline=None, max_examples=60)
def test_rows_are_the_documents_cut(documents, length):
    packed = rows(corpus(documents), length)
    batch = packed.gather(np.arange(packed.count))
    assert differences(batch, by_hand(documents, length)) == []
    assert [array.dtype for array in batch] == [np.int32, np.int32, np.float32, np.bool_]


def test_every_token_appears_once_and_is_a_target_once():
    documents = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    packed = rows(corpus(documents), 4)
    tokens, targets, weights, _ = packed.gather(np.arange(packed.count))
    assert tokens.ravel()[: 3 + 9].tolist() == [1, 2, 3, 0, 4, 5, 6, 7, 8, 0, 9, 0]
    assert targets[weights > 0].tolist() == [2, 3, 0, 5, 6, 7, 8, 0, 0]


@pytest.mark.parametrize("field", range(4))
def test_a_planted_error_is_caught(field):
    documents = [list(range(1, 200)), list(range(50, 251))] * 2
    packed = rows(corpus(documents), 100)
    wrong = [array.copy() for array in packed.gather(np.arange(packed.count))]
    wrong[field][3, 17] = wrong[field][3, 17] == 0  # one position in eight hundred
    assert len(differences(type(packed.gather(np.arange(1)))(*wrong), by_hand(documents, 100))) == 1


def test_rows_past_the_end_are_padding():
    packed = rows(corpus([[1, 2, 3]]), 4)
    tokens, targets, weights, start = packed.gather(np.array([1, 10**6]))
    assert not tokens.any()
    assert not targets.any()
    assert not weights.any()
    assert start.all()


def test_bytes_of_the_targets():
    documents = [([5, 6, 7], [300, 2, 1]), ([], []), ([8], [9]), ([5, 5], [4, 0])]
    packed = concatenate([(np.array(ids), np.array(spelt)) for ids, spelt in documents], Bytes(), "the test")
    for length in (2, 4, 100):
        spelt = rows(packed, length).target_bytes(np.arange(-(-9 // length) + 1)).ravel()
        assert spelt[:9].tolist() == [2, 1, 1, 0, 1, 0, 0, 1, 0]  # not of a document's first token; 1 of its end
        assert not spelt[9:].any()
    assert rows(corpus([[5, 6, 7]]), 4).target_bytes(np.arange(2)).tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]


def test_identity_tells_corpora_apart():
    identities = {rows(corpus(d), 4).identity for d in ([[1, 2, 3]], [[1, 2, 4]], [[1, 2], [3]], [[1], [2, 3]])}
    assert len(identities) == 4


def test_nothing_to_concatenate():
    with pytest.raises(ValueError, match="the test: there is no text"):
        corpus([])
