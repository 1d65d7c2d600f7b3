"""Perplexity of documents and of windows over them: what a plain loop over them finds."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.evaluate import documents
from mamba3_jax.evaluate.documents import Document, Window
from mamba3_jax.evaluate.likelihood import Likelihood, Likelihoods
from tests.helpers import first
from tests.inference.tiny import tiny

EOS = 0


def held_out(sizes):
    rng = np.random.default_rng(0)
    return [Document(rng.integers(0, 13, size).astype(np.int32), size // 3 + 1, 2 * size) for size in sizes]


class Log:
    """Stands in for the scorer: keeps what is asked, and says that each token costs a nat for each in its context."""

    def __init__(self):
        self.asked = []

    def plan(self, requests):
        return requests

    def score(self, requests, *, say, what):
        self.asked.append((what, requests))
        nll = [np.arange(len(c), len(c) + len(t)).astype(np.float32) for c, t in requests]
        return [Likelihood(one, np.zeros(len(one), bool)) for one in nll]


@pytest.mark.parametrize("form", [Window(8, 8), Window(8, 3), Window(8, 1), Window(5, 4), Window(1, 1), Window()])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 11, 30])
def test_windows_score_each_token_once_with_its_context(form, size):
    """As `lm_eval.utils.get_rolling_token_windows` cuts, with max_seq_len W and context_len W - S + 1."""
    ids = list(range(100, 100 + size))
    text, scored = [EOS, *ids], []
    for context, continuation in documents.requests(np.array(ids), EOS, form):
        context, continuation = context.tolist(), continuation.tolist()
        place = len(scored)
        scored += continuation
        assert text[place + 1 - len(context) : place + 1] == context  # what stands just before
        inputs = len(context) + len(continuation) - 1
        if form.size is None:
            assert len(context) == 1
        else:
            assert inputs == min(form.size, place + len(continuation))
            assert len(context) >= min(form.size - form.stride + 1, place + 1)
    assert scored == ids


def test_totals_are_those_of_lm_eval():
    """word_perplexity = exp(-sum log p / sum words), and so on: its `weighted_perplexity` and `bits_per_byte`."""
    found, log = held_out([5, 12, 3]), Log()
    (result,) = documents.evaluate(log, found, documents.ask(log, found, EOS, [Window()]))
    nll = [sum(range(1, size + 1)) for size in (5, 12, 3)]
    assert result["log_likelihoods"] == [-n for n in nll]
    assert (result["documents"], result["tokens"], result["words"], result["bytes"]) == (3, 20, 2 + 5 + 2, 40)
    assert result["loss"] == pytest.approx(sum(nll) / 20)
    assert result["perplexity"] == pytest.approx(math.exp(sum(nll) / 20))
    assert result["word_perplexity"] == pytest.approx(math.exp(sum(nll) / 9))
    assert result["byte_perplexity"] == pytest.approx(math.exp(sum(nll) / 40))
    assert result["bits_per_byte"] == pytest.approx(sum(nll) / 40 / math.log(2))
    assert result["document_loss"] == pytest.approx((15 / 5 + 78 / 12 + 6 / 3) / 3)


@pytest.mark.full
@pytest.mark.parametrize("pattern", first(["MA", "M"]))
def test_scores_are_those_of_a_plain_loop(pattern):
    model, params = tiny(pattern)
    run = jax.jit(lambda tokens_BL: jax.nn.log_softmax(model.apply({"params": params}, tokens_BL)[0]))
    found, forms = held_out([40, 9, 23]), [Window(16, 8), Window()]
    scorer = Likelihoods(model, params)
    results = documents.evaluate(scorer, found, documents.ask(scorer, found, EOS, forms))
    for form, result in zip(forms, results, strict=True):
        totals, right = [], 0
        for ids_T, *_ in found:
            text, total = [EOS, *ids_T.tolist()], 0.0
            for place in range(1, len(text)):  # one call a token, of all that it may see
                start = 0
                if form.size and place > form.size:
                    end = min(len(ids_T), form.size + -(-(place - form.size) // form.stride) * form.stride)
                    start = end - form.size
                fixed_BL = jnp.zeros((1, 48), jnp.int32).at[0, : place - start].set(jnp.array(text[start:place]))
                log_p_V = np.asarray(run(fixed_BL))[0, place - start - 1]
                total += float(log_p_V[text[place]])
                right += log_p_V.argmax() == text[place]
            totals.append(total)
        assert result["log_likelihoods"] == pytest.approx(totals, rel=1e-5)
        assert result["accuracy"] == right / 72
    assert results[0]["loss"] != pytest.approx(results[1]["loss"], rel=1e-4)


def test_held_out_documents_are_whole_and_spread(tmp_path):
    texts = [f"document {number} of  some\nwords, ü" for number in range(40)] + [""]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(train_glob=__file__, valid_glob=str(tmp_path / "valid.jsonl"))
    found, eos = documents.held_out(data)
    assert eos == 0
    got = {bytes(document.ids_T.astype(np.uint8).tolist()).decode(): document for document in found}
    assert sorted(got) == sorted(texts[:-1])
    for text, document in got.items():
        assert (document.words, document.bytes) == (len(re.split(r"\s+", text)), len(text.encode()))
    some, _ = documents.held_out(data, 100)
    assert len(some) == 4  # 29 or 30 bytes each
    numbers = [int(bytes(document.ids_T.astype(np.uint8).tolist()).decode().split()[1]) for document in some]
    assert np.ptp(numbers) >= 20
    with pytest.raises(ValueError, match=r"data\.source='parity' has no documents of text"):
        documents.held_out(DataConfig(source="parity"))


@pytest.mark.parametrize("text", ["8", "8:9", "0:0", "8:0", "a:b", "8:-1", f"{10**10}:1", ""])
def test_a_window_that_is_none_is_named(text):
    with pytest.raises(ValueError, match=r"is not W:S, a window of W tokens and a stride of S in 1 \.\. W"):
        documents.window(text)
    assert documents.window("1024:512") == Window(1024, 512)


def test_lines_of_a_table():
    log, found = Log(), held_out([40])
    (result,) = documents.evaluate(log, found, documents.ask(log, found, EOS, [Window(16, 8)]))
    (line,) = documents.lines([result])
    assert line.split()[:3] == ["16:8", "40", f"{result['loss']:.4f}"]
    assert (
        f"1 documents, word perplexity {result['word_perplexity']:.5g}, mean loss {result['document_loss']:.4f}" in line
    )
