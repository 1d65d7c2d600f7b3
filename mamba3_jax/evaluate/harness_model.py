"""Answer lm-eval's requests, which are texts, by a model of ours. lm-eval itself comes in by `harness.wrapped`."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator

from mamba3_jax import memory
from mamba3_jax.data.vocabulary import continuation
from mamba3_jax.evaluate.likelihood import PIECE, Likelihoods, Request, padded, power_of_two
from mamba3_jax.generate import Sampling, generate

ROWS = 64  # at most, of the prompts that are continued together
TOKENS = 256  # of an answer whose length the task does not say, as in lm-eval's own models
# What tasks may say of an answer: its length, by the first of these names that is there, and how it is drawn.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DRAWN = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}


class HarnessModel:
    """Answers lm-eval's four kinds of request; its `TemplateLM` is the other base of the class that `wrapped` makes.

    `TemplateLM._encode_pair` says where a continuation's tokens begin: spaces at the end of the context go to the
    continuation, whose tokens are those of the whole text after as many as the context alone has. An empty context is
    the token that ends a document. No context is cut.
    """

    def __init__(self, model, params, codec, say: Callable[[str], None] | None = None):
        super().__init__()
        self.model, self.params, self.codec, self.say = model, params, codec, say
        self.scorer = Likelihoods(model, params)
        self.running = False  # true in a call of the model, and after one that failed: the task is not at fault then

    @property
    def eot_token_id(self) -> int:
        """Return the id that ends a document."""
        return self.codec.eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Encode a text; no special tokens are added."""
        return self.codec.encode(string)

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Do as the base class does, without its progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Return (log p(continuation | context), whether all of its tokens are the likeliest) for each request."""
        asked = [Request(context or [self.eot_token_id], answer) for _, context, answer in requests]
        return [(found.total, bool(found.greedy_T.all())) for found in self._score(asked, "continuations")]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text after the token that ends a document."""
        asked = [Request([self.eot_token_id], self.tok_encode(request.args[0])) for request in requests]
        return [found.total for found in self._score(asked, "texts")]

    def _score(self, asked: list[Request], what: str):
        plan = self.scorer.plan(asked)  # raises for what does not fit before anything runs
        with self._running():
            return self.scorer.score(plan, say=self.say, what=what)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return what follows each prompt, up to one of the task's `until`, the document's end or the most tokens."""
        prompts = [self.tok_encode(request.args[0]) or [self.eot_token_id] for request in requests]
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, allow_nan=False), []).append(number)
        batches = [
            batch for how, numbers in alike.items() for batch in self._batches(json.loads(how), numbers, prompts)
        ]
        answers, done, begin = [""] * len(requests), 0, time.perf_counter()
        for (tokens, until, sampling), rows, numbers in batches:
            with self._running():
                texts = self._answers([prompts[number] for number in numbers], rows, tokens, until, sampling, seed=done)
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
            done += len(numbers)
            if self.say:
                left = (time.perf_counter() - begin) * (len(requests) / done - 1)
                self.say(f"answers: {done} of {len(requests)}, {left:.0f} s left")
        return answers

    def _batches(self, kwargs: dict, numbers: list[int], prompts) -> list[tuple]:
        """Cut prompts with equal `wishes` into batches (wishes, rows, numbers), longest first.

        Raises:
            ValueError: a row does not fit into memory.
        """
        how = wishes(kwargs)
        numbers = sorted(numbers, key=lambda number: -len(prompts[number]))
        length = 1 + few_sizes(len(prompts[numbers[0]]) - 1) + how[0]
        needed = functools.partial(memory.carrying, self.model, length=length)
        rows = memory.fitting_rows(min(ROWS, power_of_two(len(numbers))), needed)
        return [(how, rows, numbers[at : at + rows]) for at in range(0, len(numbers), rows)]

    def _answers(self, prompts, rows: int, tokens: int, until: list[str], sampling, seed: int) -> list[str]:
        """Continue one batch; copies of its first prompt, the longest, fill the rows that are left."""
        spell = lambda prompt, row: continuation(self.codec, prompt[-1:], row)  # noqa: E731
        before = prompts[0]  # rows are spelled after some token: a decoder may drop a space where the ids begin
        stop = (lambda row: any(text in spell(before, row) for text in until)) if until else None
        found = generate(
            self.model,
            self.params,
            prompts + [before] * (rows - len(prompts)),
            tokens=tokens,
            sampling=sampling,
            seed=seed,
            stop_ids=[self.eot_token_id],
            stop=stop,
            prefill_length=PIECE,
            padded_to=1 + few_sizes(len(before) - 1),
        )
        texts = [spell(prompt, row) for prompt, row in zip(prompts, found.ids, strict=False)]
        return [
            text[: min([at for stop in until if (at := text.find(stop)) >= 0], default=len(text))] for text in texts
        ]

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self.running = True
        yield
        self.running = False


def few_sizes(length: int) -> int:
    """Round a prompt's length up to a power of two, past PIECE to whole pieces, however many: they share a program."""
    return padded(length) if length > PIECE else power_of_two(max(1, length))


def wishes(kwargs: dict) -> tuple[int, list[str], Sampling]:
    """Read a task's `generation_kwargs`: (tokens at most, texts that end an answer, how it is drawn)."""
    tokens = int(next((kwargs[name] for name in LENGTHS if kwargs.get(name) is not None), TOKENS))
    until = kwargs.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    drawn = {name: kwargs.get(name, default) for name, default in DRAWN.items()}
    sampling = Sampling(**drawn) if kwargs.get("do_sample", True) else Sampling(temperature=0.0)
    sampling.check()
    return tokens, [text for text in until if text], sampling
