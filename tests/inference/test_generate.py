"""Generation: the same tokens as running the whole text at every step would draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax import generate as module
from mamba3_jax.generate import Sampling, generate, holds_nan
from tests.inference.tiny import tiny

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [5, 6], [7]]
GREEDY = Sampling(temperature=0.0)
TOKENS = 12


@pytest.fixture(scope="module")
def greedy():
    """What the prompts continue with, prefilled in pieces of 4."""
    model, params = tiny()
    return generate(model, params, PROMPTS, tokens=TOKENS, sampling=GREEDY, prefill_length=4)


@pytest.fixture(scope="module")
def logits_of():
    """Next-token logits after every token of one text, in one call of the model; texts are padded to one length."""
    model, params = tiny()
    forward = jax.jit(lambda tokens_BL: model.apply({"params": params}, tokens_BL)[0])

    def run(ids):
        fixed = np.zeros((1, len(PROMPTS[0]) + TOKENS), np.int32)
        fixed[0, : len(ids)] = ids
        return np.asarray(forward(fixed))[0, : len(ids), : model.config.vocab_size]

    return run


@pytest.mark.full
def test_greedy_is_the_argmax_of_the_whole_text(greedy, logits_of):
    for prompt, row in zip(PROMPTS, greedy.ids, strict=True):
        logits_LV = logits_of(prompt + row)[len(prompt) - 1 : -1]
        assert np.argmax(logits_LV, axis=-1).tolist() == row
    # Not one token again and again, which any error would draw too.
    assert len(set(greedy.ids[0] + greedy.ids[1])) > 3


def test_another_text_before_gives_another_text(greedy, logits_of):
    row = greedy.ids[0]
    wrong = np.argmax(logits_of([3] * len(PROMPTS[0]) + row)[len(PROMPTS[0]) - 1 : -1], axis=-1)
    assert wrong.tolist() != row


def test_counts_and_speed(greedy):
    assert greedy.decode_tokens == len(PROMPTS) * TOKENS
    assert greedy.prefill_tokens == 10 + 1 + 0  # all but the last of each prompt
    assert min(greedy.prefill_seconds, greedy.decode_seconds, greedy.compile_seconds) > 0
    assert "tokens/s" in str(greedy)


@pytest.mark.parametrize(("longest", "piece", "length"), [(1, 0, 1), (2, 1, 2), (9, 8, 9), (10, 5, 11), (18, 6, 19)])
def test_pieces_are_equal_with_little_padding(longest, piece, length):
    tokens_BL, start_BL, got = module.padded([[7] * longest, [7]], 8)
    assert (got, tokens_BL.shape) == (piece, (2, length))
    assert tokens_BL.sum(axis=1).tolist() == [7 * longest, 7]
    assert start_BL.argmax(axis=1).tolist() == [length - longest, length - 1]
    tokens_BL, start_BL, got = module.padded([[7] * min(longest, 3), [7]], 8, longest)  # as long all the same
    assert (got, tokens_BL.shape, tokens_BL.sum()) == (piece, (2, length), 7 * (min(longest, 3) + 1))


@pytest.mark.full
def test_stop_id_ends_a_row_and_not_the_others(greedy):
    model, params = tiny()
    stop = greedy.ids[0][4]
    got = generate(model, params, PROMPTS, tokens=TOKENS, sampling=GREEDY, prefill_length=4, stop_ids=[stop])
    for row, whole in zip(got.ids, greedy.ids, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)


@pytest.mark.full
def test_stop_text_ends_early_and_is_cut_at_the_first_place(greedy, monkeypatch):
    model, params = tiny()
    monkeypatch.setattr(module, "BLOCK", 3)
    end = greedy.ids[2][1]
    got = generate(model, params, PROMPTS[2:], tokens=TOKENS, sampling=GREEDY, stop=lambda row: end in row)
    assert got.ids == [greedy.ids[2][: greedy.ids[2].index(end) + 1]]
    assert got.decode_tokens == 3


def test_stop_looks_at_each_beginning_of_the_last_block_only(monkeypatch):
    model, params = tiny()
    monkeypatch.setattr(module, "BLOCK", 3)
    seen = []
    stop = lambda row: seen.append(len(row)) or len(row) >= 8  # noqa: E731
    got = generate(model, params, PROMPTS[2:], tokens=TOKENS, sampling=GREEDY, stop=stop)
    assert len(got.ids[0]) == 8
    assert seen == [3, 6, 9, 7, 8]


@pytest.mark.full
def test_seeds():
    model, params = tiny("M")
    runs = [generate(model, params, [[1]], tokens=30, seed=seed).ids[0] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 30


@pytest.mark.full
def test_columns_that_pad_the_vocabulary_are_never_drawn():
    model, params = tiny("M")
    vocab, kernel_DV = model.config.vocab_size, params["head"]["kernel"]
    assert kernel_DV.shape[1] == vocab + 3
    # Two copies of token 5's column a hundredfold, of either sign: one of them is the largest of all logits.
    columns = jnp.stack([100 * kernel_DV[:, 5], -100 * kernel_DV[:, 5]], axis=1)
    padded = params | {"head": {"kernel": kernel_DV.at[:, vocab : vocab + 2].set(columns)}}
    logits_BLV, _ = model.apply({"params": padded}, jnp.array([[5]]))
    assert int(jnp.argmax(logits_BLV)) >= vocab
    got = generate(model, padded, [[1]], tokens=30)
    assert all(0 <= token < vocab for token in got.ids[0])
    assert got.ids == generate(model, params, [[1]], tokens=30).ids


def test_one_logit_that_is_not_a_number_is_seen_in_its_row_alone():
    logits_BV = jnp.zeros((4, 1001)).at[1, 500].set(jnp.nan).at[2, 7].set(-jnp.inf).at[3].set(-jnp.nan)
    assert jax.jit(holds_nan)(logits_BV).tolist() == [False, True, False, True]


def test_parameters_that_are_not_numbers_stop_it():
    model, params = tiny("M")
    broken = params | {"norm": {"scale": params["norm"]["scale"].at[0].set(jnp.nan)}}
    with pytest.raises(FloatingPointError, match="not numbers"):
        generate(model, broken, [[1]], tokens=30)


@pytest.mark.full
@pytest.mark.parametrize(
    "prompts",
    [
        np.array([[5, 6], [7, 8]]),
        jnp.array([[5, 6], [7, 8]], jnp.uint8),
        [np.array([5, 6]), jnp.array([7, 8])],
        ((5, np.int64(6)), range(7, 9)),
    ],
    ids=["numpy", "jax", "rows", "tuples"],
)
def test_prompts_are_any_rows_of_integers(prompts):
    model, params = tiny()
    want = generate(model, params, [[5, 6], [7, 8]], tokens=3, sampling=GREEDY, stop_ids=[12])
    got = generate(model, params, prompts, tokens=3, sampling=GREEDY, stop_ids=np.array([12]))
    assert got.ids == want.ids
    assert got.prefill_tokens == want.prefill_tokens == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": [[1, 13]]}, "token id 13 at place 1 is not in the vocabulary of 13"),
        ({"prompts": [[-1]]}, "token id -1"),
        ({"stop_ids": [99]}, "token id 99"),
        ({"prompts": [[1], []]}, "prompt is empty"),
        ({"prompts": []}, "prompt is empty"),
        ({"prompts": np.zeros((0, 3), int)}, "prompt is empty"),
        ({"prompts": np.zeros((2, 0), int)}, "prompt is empty"),
        ({"prompts": [1, 2]}, "prompt 0 is 1, wanted a list or array"),
        ({"prompts": np.array([1, 2])}, "prompt 0 is 1, wanted"),
        ({"prompts": "def"}, "prompts is 'def', wanted"),
        ({"prompts": ["def"]}, "prompt 0 is 'def', wanted"),
        ({"prompts": [b"def"]}, "prompt 0 is b'def', wanted"),
        ({"prompts": 5}, "prompts is 5, wanted"),
        ({"prompts": None}, "prompts is None, wanted"),
        ({"prompts": [[1], None]}, "prompt 1 is None, wanted"),
        ({"prompts": [[1, 1.5]]}, "prompt 0 holds 1.5 at place 1, wanted an integer"),
        ({"prompts": np.array([[1.0]])}, "prompt 0 holds 1.0 at place 0, wanted an integer"),
        ({"prompts": [[True]]}, "prompt 0 holds True at place 0, wanted an integer"),
        ({"prompts": jnp.array([[True]])}, "prompt 0 holds True at place 0, wanted an integer"),
        ({"prompts": [["1"]]}, "prompt 0 holds '1' at place 0, wanted an integer"),
        ({"prompts": [[[1, 2]]]}, r"prompt 0 holds \[1, 2\] at place 0, wanted an integer"),
        ({"prompts": np.ones((1, 2, 2), int)}, r"prompt 0 holds \[1, 1\] at place 0, wanted an integer"),
        ({"stop_ids": 3}, "stop_ids is 3, wanted a list or array"),
        ({"stop_ids": "3"}, "stop_ids is '3', wanted"),
        ({"stop_ids": [1.5]}, "stop_ids holds 1.5 at place 0, wanted an integer"),
        ({"stop_ids": [-1]}, "token id -1"),
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": 10**10}, "tokens=10000000000 is not in 1"),
        ({"prefill_length": 0}, "prefill_length=0"),
        ({"sampling": Sampling(top_p=2.0)}, "top_p=2.0"),
    ],
)
def test_mistakes_are_named_before_any_compile(change, named, monkeypatch):
    model, params = tiny()
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=named) as caught:
        generate(model, params, **({"prompts": [[1]], "tokens": 2} | change))
    assert "\n" not in str(caught.value)
