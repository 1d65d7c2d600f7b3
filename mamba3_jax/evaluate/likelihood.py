"""Compute log-likelihoods of continuations of any length, in few shapes; a context that several share runs once."""

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

# Prefixes and tails of up to so many tokens (the key) run in pieces of so many (the value), longer ones in pieces of
# PIECE. The state is carried from piece to piece, so one program runs any number of them: compiling another one takes
# longer than running many pieces.
PIECES, PIECE = {0: 0, 16: 16, 256: 64, 2048: 512}, 2048
ROWS, TOKENS = 128, 2**14  # at most, in one call


class Request(NamedTuple):
    """Asks for log p(continuation | context), both token ids; a context has at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """How well the model predicts each token of a continuation."""

    nll_T: np.ndarray  # -log p(token | all tokens before), nats
    greedy_T: np.ndarray  # whether no token is likelier

    @property
    def total(self) -> float:
        """Return log p(continuation | context), summed in float64."""
        return -float(self.nll_T.sum(dtype=np.float64))


class Pieces(NamedTuple):
    """How many tokens of a row's prefix, and of its tail, one call runs."""

    prefix: int
    tail: int


class Group(NamedTuple):
    """A batch to run for some requests: each row is a prefix and a tail, both padded to whole pieces."""

    pieces: Pieces
    rows: int  # of the tail
    contexts: int  # rows of the prefix: different contexts, rounded up
    prefix: int  # tokens
    tail: int  # tokens
    numbers: list[int]  # of the requests

    @property
    def capacity(self) -> int:
        """Return the room for tokens in attention caches: a power of two, since every size is another program."""
        return power_of_two(self.prefix + self.tail)

    @property
    def work(self) -> int:
        """Return how many tokens are run, padding included."""
        return self.contexts * self.prefix + self.rows * self.tail


class Plan(NamedTuple):
    """Requests and the batches that they are run in."""

    requests: Sequence[Request]
    groups: list[Group]


class Likelihoods:
    """Scores any number of requests, and compiles once for each of few shapes.

        log p(c | x) = sum_i log p(c_i | x, c_1, ..., c_(i-1))

    The prefix is a context without its last token. It runs first, padded on the left as in `generate`, and the state
    that it leaves is copied for each of its continuations in the batch. The tail is the context's last token and the
    continuation without its last, padded on the right. No context is cut: a recurrent state has no length, and
    attention caches get room for all tokens.
    """

    def __init__(self, model: LanguageModel, params):
        self.model, self.params = model, params
        self._prefill = jax.jit(functools.partial(prefill, model), donate_argnums=3)
        self._score = jax.jit(functools.partial(score_piece, model), donate_argnums=2)
        # The axes of every array in a state are repeats, rows, ...
        self._copies = jax.jit(lambda state, from_B: jax.tree.map(lambda x: x[:, from_B], state))

    def score(
        self, plan: Plan, *, say: Callable[[str], None] | None = None, what: str = "continuations"
    ) -> list[Likelihood]:
        """Return a result for each request, in order; `say` gets a line now and then, which calls the requests `what`.

        Raises:
            FloatingPointError: the model's logits are not numbers.
        """
        requests, groups = plan
        found = [Likelihood(np.zeros(0, np.float32), np.zeros(0, bool))] * len(requests)
        work = sum(group.work for group in groups)
        begin = said = time.perf_counter()
        spent = done = 0
        for group in groups:
            results = self._run(group, [requests[number] for number in group.numbers])
            for number, result in zip(group.numbers, results, strict=True):
                found[number] = result
            spent, done, now = spent + group.work, done + len(group.numbers), time.perf_counter()
            if say and now - said > 3:
                said, speed = now, spent / (now - begin)
                say(f"{what}: {done} of {len(requests)}, {(work - spent) / speed:.0f} s left, {speed:,.0f} tokens/s")
        return found

    def plan(self, requests: Sequence[Request]) -> Plan:
        """Cut requests into batches, the longest first; those of one context stand together.

        Raises:
            ValueError: a context without a token, or a row that does not fit into memory.
        """
        keys = [key_of(number, request) for number, request in enumerate(requests)]
        first, tails = {}, {}
        for number, (key, request) in enumerate(zip(keys, requests, strict=True)):
            first.setdefault(key, number)
            tails[key] = max(tails.get(key, 0), len(request.continuation))
        sizes = [(len(request.context) - 1, tails[key]) for key, request in zip(keys, requests, strict=True)]
        alike = [Pieces(*map(piece_of, size)) for size in sizes]
        order = [number for number, request in enumerate(requests) if len(request.continuation)]
        order.sort(key=lambda number: (*alike[number], *sizes[number], first[keys[number]]), reverse=True)
        groups = []
        for pieces, run in itertools.groupby(order, key=alike.__getitem__):
            numbers = list(run)
            of = functools.partial(group_of, pieces, sizes, keys)
            rows = self._rows(of(len(numbers), numbers))
            groups += [of(rows, numbers[at : at + rows]) for at in range(0, len(numbers), rows)]
        return Plan(requests, groups)

    def _rows(self, group: Group) -> int:
        """Return how many rows a batch has, a power of two: enough for all requests, or as many as a call can run."""
        logits = group.pieces.tail * padded_vocab(self.model.config)
        most = min(ROWS, TOKENS // max(group.pieces), TILE // logits, power_of_two(len(group.numbers)))
        rows = power_of_two(max(1, most) + 1) // 2  # rounded down
        needed = functools.partial(memory.carrying, self.model, length=group.capacity, piece=group.pieces.tail)
        return memory.fitting_rows(rows, needed)

    def _run(self, group: Group, requests: list[Request]) -> list[Likelihood]:
        """Score one batch; what the rows without a request compute is dropped."""
        rows, tail = group.rows, group.tail
        contexts = [np.asarray(request.context, np.int32) for request in requests]
        start_BL = np.zeros((rows, tail), bool)
        if group.prefix:
            state = self._prefixes(contexts, group)
        else:
            state, start_BL[:, 0] = self.model.empty_state(rows, group.capacity), True
        tokens_BL, targets_BL = np.zeros((2, rows, tail), np.int32)
        for row, (context_T, request) in enumerate(zip(contexts, requests, strict=True)):
            size = len(request.continuation)
            targets_BL[row, :size] = request.continuation
            tokens_BL[row, :size] = [context_T[-1], *targets_BL[row, : size - 1]]
        batch = Batch(tokens_BL, targets_BL, np.ones((rows, tail), np.float32), start_BL)
        parts = []
        for part in cut(tail, group.pieces.tail):
            *scores, state = self._score(self.params, jax.tree.map(lambda x_BL: x_BL[:, part], batch), state)  # noqa: B023
            parts.append(scores)
        nll_BL, correct_BL = (np.concatenate(part, axis=1) for part in zip(*jax.device_get(parts), strict=True))
        sizes = [len(request.continuation) for request in requests]
        results = [Likelihood(nll_BL[row, :size], correct_BL[row, :size]) for row, size in enumerate(sizes)]
        if any(np.isnan(result.nll_T).any() for result in results):
            raise FloatingPointError("the model's logits are not numbers")
        return results

    def _prefixes(self, contexts: list[np.ndarray], group: Group):
        """Run each context without its last token once; return the state of every row of the batch."""
        prefix, places, from_B = group.prefix, {}, np.zeros(group.rows, np.int32)
        for row, context_T in enumerate(contexts):
            from_B[row] = places.setdefault(context_T.tobytes(), len(places))
        tokens_BL = np.zeros((group.contexts, prefix), np.int32)
        start_BL = np.zeros(tokens_BL.shape, bool)
        for place, context_T in zip(from_B, contexts, strict=False):
            first = prefix - (len(context_T) - 1)
            tokens_BL[place, first:], start_BL[place, first] = context_T[:-1], True
        state = self.model.empty_state(len(tokens_BL), group.capacity)
        for part in cut(prefix, group.pieces.prefix):
            state = self._prefill(self.params, tokens_BL[:, part], start_BL[:, part], state)
        return self._copies(state, from_B)


def key_of(number: int, request: Request) -> bytes | int:
    """Return a context's digest, by which equal ones share a run; the request's number if the context is one token."""
    if not len(request.context):
        raise ValueError(f"the context of request {number} is empty, wanted at least one token")
    if len(request.context) == 1:
        return number
    return hashlib.blake2b(np.asarray(request.context, np.int32).tobytes(), digest_size=16).digest()


def group_of(pieces: Pieces, sizes: Sequence[tuple[int, int]], keys: Sequence, rows: int, numbers: list[int]) -> Group:
    """Return the batch of the requests `numbers`, given the (prefix, tail) and the context's key of every request."""
    return Group(
        pieces=pieces,
        rows=rows,
        contexts=power_of_two(len({keys[number] for number in numbers})),
        prefix=max(padded(sizes[number][0]) for number in numbers),
        tail=max(padded(sizes[number][1]) for number in numbers),
        numbers=numbers,
    )


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is not less than `least`."""
    return 1 << (least - 1).bit_length()


def piece_of(length: int) -> int:
    """Return how many tokens of a row of this length one call runs; 0 for an empty row."""
    return next((piece for most, piece in PIECES.items() if length <= most), PIECE)


def padded(length: int) -> int:
    """Round a length up to whole pieces of its `piece_of`."""
    return -(-length // max(1, piece_of(length))) * piece_of(length)


def cut(length: int, piece: int) -> list[slice]:
    """Return the slices of the pieces in a length that is a whole number of them."""
    return [slice(first, first + piece) for first in range(0, length, piece)]
