"""Compute perplexity over whole documents and over windows that slide over them, the forms that papers report."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mamba3_jax.config import LENGTH, DataConfig
from mamba3_jax.data import documents, tokenizer
from mamba3_jax.evaluate.language import perplexity
from mamba3_jax.evaluate.likelihood import Likelihoods, Plan, Request


class Document(NamedTuple):
    """A held-out document, all of whose tokens are scored."""

    ids_T: np.ndarray  # without a separator
    words: int
    bytes: int


class Window(NamedTuple):
    """Contexts of at most `size` tokens; each one after the first scores `stride` more. None: the whole document."""

    size: int | None = None
    stride: int | None = None

    @property
    def name(self) -> str:
        """Return the name that a line of the table has for it."""
        return "document" if self.size is None else f"{self.size}:{self.stride}"

    @property
    def what(self) -> str:
        """Return the name that a line of progress has for what is scored."""
        return "documents" if self.size is None else f"windows {self.name}"


class Asked(NamedTuple):
    """All documents in one form, planned to be scored."""

    form: Window
    plan: Plan
    counts: list[int]  # of the requests of each document


def window(text: str) -> Window:
    """Read "W:S" as a window; ValueError for other text."""
    size, _, stride = text.partition(":")
    if not (size.isdecimal() and stride.isdecimal()) or not 1 <= int(stride) <= int(size) <= LENGTH:
        raise ValueError(f"{text!r} is not W:S, a window of W tokens and a stride of S in 1 .. W, W at most {LENGTH}")
    return Window(int(size), int(stride))


def held_out(data: DataConfig, max_tokens: int = 0) -> tuple[list[Document], int]:
    """Return held-out documents, whole, until they have `max_tokens` tokens (0: all), and the id that ends one.

    Raises:
        ValueError: data without text.
    """
    texts, codec, found, tokens = documents(data), tokenizer(data), [], 0
    for text, (ids_T, _) in zip(texts, codec.encode_all(texts), strict=True):
        if len(ids_T):
            # Words are counted as lm-eval does.
            found.append(Document(ids_T.astype(np.int32), len(re.split(r"\s+", text)), len(text.encode())))
            tokens += len(ids_T)
        if max_tokens and tokens >= max_tokens:
            break
    if not found:
        raise ValueError("there is no held-out document with a token")
    return found, codec.eos


def requests(ids_T: np.ndarray, eos: int, form: Window) -> list[Request]:
    """Cut a document into requests that score each token once, in order; `eos` stands before the first, as in lm-eval.

    The first window scores all of its W tokens. Each later one scores the next S tokens, the last one perhaps fewer.
    Its inputs are the W tokens that end just before the last that it scores, so the first that it scores has at least
    W - S + 1 tokens before it.
    """
    size = form.size or len(ids_T)
    input_T, requests, done = np.concatenate([[eos], ids_T]).astype(np.int32), [], 0
    while done < len(ids_T):
        end = min(len(ids_T), done + (form.stride if done else size))
        requests.append(Request(input_T[max(0, end - size) : done + 1], ids_T[done:end]))
        done = end
    return requests


def ask(scorer: Likelihoods, found: Sequence[Document], eos: int, forms: Sequence[Window]) -> list[Asked]:
    """Plan the scoring of documents in each form; ValueError for a row that does not fit into memory."""
    asked = []
    for form in forms:
        of_each = [requests(document.ids_T, eos, form) for document in found]
        plan = scorer.plan(list(itertools.chain.from_iterable(of_each)))
        asked.append(Asked(form, plan, list(map(len, of_each))))
    return asked


def evaluate(
    scorer: Likelihoods,
    found: Sequence[Document],
    asked: Sequence[Asked],
    *,
    say: Callable[[str], None] | None = None,
) -> list[dict]:
    """Return a result for each form: how well the model predicts all tokens of the documents, from an empty state each.

    Returns:
        Dicts of window and stride (None: documents are whole), documents, tokens, words, bytes; loss (nats a token),
        perplexity (of a token), accuracy, word_perplexity, byte_perplexity and bits_per_byte, defined as in lm-eval,
        over all documents together; document_loss, the mean over documents of their loss; and log_likelihoods, a
        number for each document.
    """
    results = []
    for form, plan, counts in asked:
        scored = iter(scorer.score(plan, say=say, what=form.what))
        parts = [list(itertools.islice(scored, count)) for count in counts]
        nll = np.array([-sum(part.total for part in of) for of in parts])
        greedy = sum(int(part.greedy_T.sum()) for of in parts for part in of)
        summed = totals(found, nll)
        accuracy = greedy / summed["tokens"]
        results.append({"window": form.size, "stride": form.stride, **summed, "accuracy": accuracy})
    return results


def totals(found: Sequence[Document], nll: np.ndarray) -> dict:
    """Aggregate the nats of each document over all of them; see `evaluate`."""
    tokens = np.array([len(document.ids_T) for document in found])
    words, size = sum(document.words for document in found), sum(document.bytes for document in found)
    a_byte = float(nll.sum() / size)
    return {
        "documents": len(found),
        "tokens": int(tokens.sum()),
        "words": words,
        "bytes": size,
        "loss": float(nll.sum() / tokens.sum()),
        "perplexity": perplexity(float(nll.sum() / tokens.sum())),
        "word_perplexity": perplexity(float(nll.sum() / words)),
        "byte_perplexity": perplexity(a_byte),
        "bits_per_byte": a_byte / math.log(2),
        "document_loss": float((nll / tokens).mean()),
        "log_likelihoods": (-nll).tolist(),
    }


def lines(results: Sequence[dict]) -> list[str]:
    """Return a line for each form, to stand in the table of `language`."""
    found = []
    for r in results:
        name = f"{Window(r['window'], r['stride']).name:>8}"
        scores = f"{r['loss']:7.4f} {r['perplexity']:11.3f}  {r['bits_per_byte']:9.4f}  {r['accuracy']:8.4f}"
        remark = f"{r['documents']} documents, word perplexity {r['word_perplexity']:.5g}"
        found.append(f"{name}{r['tokens']:{17 - len(name)}d} {scores}  ({remark}, mean loss {r['document_loss']:.4f})")
    return found
