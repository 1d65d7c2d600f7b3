"""Log-likelihoods of continuations given contexts, of any lengths: few shapes, and a shared context runs once."""

import functools
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mamba3_jax import memory
from mamba3_jax.data import Batch
from mamba3_jax.evaluate.score import score_piece
from mamba3_jax.generate import prefill
from mamba3_jax.model import LanguageModel, padded_vocab
from mamba3_jax.ops.cross_entropy import TILE

LEAST, PIECE = 16, 2048  # tokens of a row in a call: a power of two from LEAST to PIECE; what is longer runs in pieces
ROWS, TOKENS = 128, 2**14  # of a call, at most


class Request(NamedTuple):
    """Asks for log p(continuation | context), both token ids; a context has at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """What the model makes of each token of a continuation."""

    nll_T: np.ndarray  # -log p(token | all before), nats
    greedy_T: np.ndarray  # whether no token is likelier

    @property
    def total(self) -> float:
        """Sum log p(continuation | context) in float64."""
        return -float(self.nll_T.sum(dtype=np.float64))


class Shape(NamedTuple):
    """Tokens of a row of a batch: those of the prefix, then those of the tail."""

    prefix: int
    tail: int


class Group(NamedTuple):
    """A batch to run: so many rows of a shape for these requests, by their numbers."""

    shape: Shape
    rows: int
    numbers: list[int]


class Likelihoods:
    """Scores any number of requests, and compiles once for each shape.

        log p(c | x) = sum_i log p(c_i | x, c_1, ..., c_(i-1))

    The prefix is a context without its last token. It runs first, padded on the left as in `generate`, and the state
    that it leaves is copied for each of its continuations in the batch. The tail is the context's last token and the
    continuation, padded on the right. No context is cut: a recurrent state has no length, and the caches of attention
    get room for what comes.
    """

    def __init__(self, model: LanguageModel, params):
        self.model, self.params = model, params
        self._prefill = jax.jit(functools.partial(prefill, model), donate_argnums=3)
        self._score = jax.jit(functools.partial(score_piece, model), donate_argnums=2)
        # Every array of a state has repeats, then rows.
        self._copies = jax.jit(lambda state, from_B: jax.tree.map(lambda x: x[:, from_B], state))

    def score(
        self, requests: Sequence[Request], *, say: Callable[[str], None] | None = None, what: str = "continuations"
    ) -> list[Likelihood]:
        """Return a result a request, in their order; `say` gets a line now and then, in which they are `what`.

        Raises:
            ValueError: a context without a token, or a row that does not fit into memory; before any runs.
            FloatingPointError: the model's logits are not numbers.
        """
        groups = self.plan(requests)
        found = [Likelihood(np.zeros(0, np.float32), np.zeros(0, bool))] * len(requests)
        work = sum(group.rows * sum(group.shape) for group in groups)
        begin = said = time.perf_counter()
        spent = done = 0
        for group in groups:
            results = self._run(group, [requests[number] for number in group.numbers])
            for number, result in zip(group.numbers, results, strict=True):
                found[number] = result
            spent, done, now = spent + group.rows * sum(group.shape), done + len(group.numbers), time.perf_counter()
            if say and now - said > 3:
                said, speed = now, spent / (now - begin)
                say(f"{what}: {done} of {len(requests)}, {(work - spent) / speed:.0f} s left, {speed:,.0f} tokens/s")
        return found

    def plan(self, requests: Sequence[Request]) -> list[Group]:
        """Cut requests into batches, the longest first, so that a shared context is in one; see `score` for errors."""
        shapes: dict[bytes | int, Shape] = {}
        keys = [key_of(number, request) for number, request in enumerate(requests)]
        for key, request in zip(keys, requests, strict=True):
            tail = max(padded_size(len(request.continuation)), shapes[key].tail if key in shapes else 0)
            shapes[key] = Shape(padded_size(len(request.context) - 1), tail)
        # Sorting is stable by shape, and by where the context came first: its requests stand together.
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        order = [number for number, request in enumerate(requests) if len(request.continuation)]
        order.sort(key=lambda number: (-sum(shapes[keys[number]]), shapes[keys[number]], first[keys[number]]))
        groups = []
        for shape, run in itertools.groupby(order, key=lambda number: shapes[keys[number]]):
            numbers = list(run)
            rows = self._rows(shape, len(numbers))
            groups += [Group(shape, rows, numbers[at : at + rows]) for at in range(0, len(numbers), rows)]
        return groups

    def _rows(self, shape: Shape, wanted: int) -> int:
        """Choose a power of two of rows: as many as are wanted, where they are not too many for a call and fit."""
        logits = min(shape.tail, PIECE) * padded_vocab(self.model.config)
        most = min(ROWS, TOKENS // min(max(shape), PIECE), TILE // logits, power_of_two(wanted))
        rows = power_of_two(max(1, most) + 1) // 2  # rounded down
        free = memory.free_on_device()
        while rows > 1 and free is not None and sum(self._needed(shape, rows).values()) > free:
            rows //= 2
        memory.fit_device(self._needed(shape, rows))
        return rows

    def _needed(self, shape: Shape, rows: int) -> dict[str, int]:
        return memory.carrying(self.model, rows, sum(shape), min(shape.tail, PIECE))

    def _run(self, group: Group, requests: list[Request]) -> list[Likelihood]:
        """Score one batch; rows that no request fills repeat the first."""
        (prefix, tail), rows = group.shape, group.rows
        contexts = [np.asarray(request.context, np.int32) for request in requests]
        start_BL = np.zeros((rows, tail), bool)
        if prefix:
            state = self._prefixes(contexts, group)
        else:
            state, start_BL[:, 0] = self.model.empty_state(rows, tail), True
        tokens_BL, targets_BL = np.zeros((2, rows, tail), np.int32)
        for row, (context_T, request) in enumerate(zip(contexts, requests, strict=True)):
            size = len(request.continuation)
            targets_BL[row, :size] = request.continuation
            tokens_BL[row, :size] = [context_T[-1], *targets_BL[row, : size - 1]]
        batch = Batch(tokens_BL, targets_BL, np.ones((rows, tail), np.float32), start_BL)
        parts = []
        for part in pieces(tail):
            *scores, state = self._score(self.params, jax.tree.map(lambda x_BL: x_BL[:, part], batch), state)  # noqa: B023
            parts.append(scores)
        nll_BL, correct_BL = (np.concatenate(part, axis=1) for part in zip(*jax.device_get(parts), strict=True))
        sizes = [len(request.continuation) for request in requests]
        results = [Likelihood(nll_BL[row, :size], correct_BL[row, :size]) for row, size in enumerate(sizes)]
        if any(np.isnan(result.nll_T).any() for result in results):
            raise FloatingPointError("the model's logits are not numbers")
        return results

    def _prefixes(self, contexts: list[np.ndarray], group: Group):
        """Run each context without its last token once; return a state a row of the batch."""
        (prefix, tail), places = group.shape, {}
        from_B = np.zeros(group.rows, np.int32)
        for row, context_T in enumerate(contexts):
            from_B[row] = places.setdefault(context_T.tobytes(), len(places))
        tokens_BL = np.zeros((power_of_two(len(places)), prefix), np.int32)
        start_BL = np.zeros(tokens_BL.shape, bool)
        for place, context_T in zip(from_B, contexts, strict=False):
            first = prefix - (len(context_T) - 1)
            tokens_BL[place, first:], start_BL[place, first] = context_T[:-1], True
        state = self.model.empty_state(len(tokens_BL), prefix + tail)
        for part in pieces(prefix):
            state = self._prefill(self.params, tokens_BL[:, part], start_BL[:, part], state)
        return self._copies(state, from_B)


def key_of(number: int, request: Request) -> bytes | int:
    """Return what tells contexts apart: a digest, or the request's number where nothing comes before the last token."""
    if not len(request.context):
        raise ValueError(f"the context of request {number} is empty, wanted at least one token")
    if len(request.context) == 1:
        return number
    return hashlib.blake2b(np.asarray(request.context, np.int32).tobytes(), digest_size=16).digest()


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is no less."""
    return 1 << (least - 1).bit_length()


def padded_size(length: int) -> int:
    """Round a length up: to a power of two from LEAST to PIECE, past that to whole pieces; 0 stays 0."""
    if length > PIECE:
        return -(-length // PIECE) * PIECE
    return max(LEAST, power_of_two(length)) if length else 0


def pieces(length: int) -> list[slice]:
    """Cut a padded length into what one call runs of it."""
    return [slice(first, first + min(length, PIECE)) for first in range(0, length, PIECE)]
