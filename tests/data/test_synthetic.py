"""The parity task against an independent implementation."""

import numpy as np
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.data import loader
from mamba3_jax.data.synthetic import document_length, parity_targets, synthetic_rows


def parity_by_hand(tokens, start):
    """XOR along each row with Python's own operator."""
    labels = []
    for row, starts in zip(tokens.tolist(), start.tolist(), strict=True):
        state = 0
        for bit, first in zip(row, starts, strict=True):
            state = bit if first else state ^ bit
            labels.append(state)
    return np.array(labels).reshape(tokens.shape)


def config(**fields):
    return DataConfig(**{"source": "parity", "length": 100, "batch": 6, "valid_rows": 9, **fields})


def test_labels_and_documents():
    data = config(task_lengths=(7, 50, 100), task_steps=(2, 1, 1))
    source = loader(data, "train", vocab_size=2)
    for want in (7, 7, 50, 100, 100, 100):
        tokens, targets, weights, start = next(source)
        assert (targets == parity_by_hand(tokens, start)).all()
        assert (start == (np.arange(100) % want == 0)).all()
        assert (weights == 1).all()
        assert 0.4 < tokens.mean() < 0.6


def test_a_planted_error_is_caught():
    start = np.zeros(1000, bool)
    start[[0, 300]] = True
    tokens = np.random.default_rng(0).integers(0, 2, 1000)
    want = parity_by_hand(tokens[None], start[None])[0]
    assert (parity_targets(tokens, start) == want).all()
    wrong = tokens.copy()
    wrong[999] ^= 1
    assert (parity_targets(wrong, start) != want).sum() == 1
    start[300] = False
    start[301] = True
    assert (parity_targets(tokens, start) != want).any()


def test_document_length_follows_the_curriculum():
    data = config(task_lengths=(40, 64, 96), task_steps=(3, 0, 2))
    assert [document_length(data, step) for step in range(7)] == [40, 40, 40, 96, 96, 96, 96]


def test_rows_are_drawn_from_seed_split_and_number_alone():
    gather = synthetic_rows(config(), "train").gather
    together = gather(np.arange(5)).tokens_BL
    apart = np.concatenate([gather(np.array([row])).tokens_BL for row in range(5)])
    assert (together == apart).all()
    others = [synthetic_rows(config(seed=1), "train"), synthetic_rows(config(), "valid")]
    drawn = [together, *(other.gather(np.arange(5)).tokens_BL for other in others)]
    assert len({row.tobytes() for tokens in drawn for row in tokens}) == 15


def test_validation_is_finite_and_of_the_last_length():
    batches = list(loader(config(task_lengths=(5, 25), task_steps=(1, 1)), "valid", vocab_size=2))
    assert [int(batch.weights_BL.sum()) for batch in batches] == [600, 300]
    assert (batches[0].start_BL == (np.arange(100) % 25 == 0)).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"data.task_lengths=\(4, 8\) and data.task_steps=\(1,\) want one"):
        synthetic_rows(config(task_lengths=(4, 8), task_steps=(1,)), "train")
    with pytest.raises(ValueError, match=r"data\.valid_rows=0 is not in 1"):
        loader(config(valid_rows=0), "valid", vocab_size=2)
