"""Log-likelihoods of continuations: however requests are batched, padded and cut, those of one plain call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.evaluate import likelihood
from mamba3_jax.evaluate.likelihood import Likelihoods, Request
from tests.helpers import first, rel_rms
from tests.inference.tiny import tiny

WHOLE = 64


def forward(pattern):
    """Log-probabilities after every token of a text in one plain call, padded to one length."""
    model, params = tiny(pattern)
    run = jax.jit(lambda tokens_BL: jax.nn.log_softmax(model.apply({"params": params}, tokens_BL)[0]))

    def of(ids):
        fixed_BL = np.zeros((1, WHOLE), np.int32)
        fixed_BL[0, : len(ids)] = ids
        return np.asarray(run(fixed_BL))[0, : len(ids)]

    return of


def plain(of, request):
    """(log p of each token of the continuation, whether it is the likeliest)."""
    ids, size = [*request.context, *request.continuation], len(request.continuation)
    log_p_TV = of(ids)[len(request.context) - 1 : -1]
    at = np.arange(size), list(request.continuation)
    return log_p_TV[at], log_p_TV.argmax(axis=-1) == at[1]


def requests(of):
    """Contexts of 1 to 33 tokens, each shared by several continuations; one continuation is greedy, one empty."""
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(0, 13, size).tolist()  # noqa: E731
    contexts = [draw(size) for size in (1, 2, 17, 33)]
    made = [Request(context, draw(size)) for context in contexts for size in (1, 4, 9)]
    greedy = []
    for _ in range(2):
        greedy.append(int(of(contexts[2] + greedy)[-1, :13].argmax()))
    made += [Request(contexts[2], greedy), Request(contexts[2], []), Request(contexts[0], draw(20))]
    return [made[i] for i in rng.permutation(len(made))]


@pytest.mark.parametrize("pattern", first(["MA", "M", "21"]))
def test_a_request_scores_as_in_one_plain_call(pattern, monkeypatch):
    monkeypatch.setattr(likelihood, "PIECES", {0: 0, 4: 4})
    monkeypatch.setattr(likelihood, "PIECE", 8)  # most are cut
    monkeypatch.setattr(likelihood, "ROWS", 4)
    of = forward(pattern)
    asked = requests(of)
    scorer = Likelihoods(*tiny(pattern))
    got = scorer.score(scorer.plan(asked))
    want = [plain(of, request) for request in asked]
    nll, log_p = np.concatenate([one.nll_T for one in got]), np.concatenate([one for one, _ in want])
    assert rel_rms(-nll, log_p) < 1e-5
    assert rel_rms(-nll * 1.001, log_p) > 1e-5
    greedy = np.concatenate([one.greedy_T for one in got])
    assert greedy.tolist() == np.concatenate([one for _, one in want]).tolist()
    assert 0 < greedy.mean() < 1
    for one, (log_p_T, _) in zip(got, want, strict=True):
        assert one.total == pytest.approx(log_p_T.sum(dtype=np.float64), rel=1e-5)
    # What a context that is cut would give is another number.
    cut = [request._replace(context=request.context[-8:]) for request in asked]
    assert rel_rms(np.concatenate([plain(of, one)[0] for one in cut]), log_p) > 1e-3


class Planner(Likelihoods):
    """Plans for a model of which only the sizes matter."""

    def __init__(self):
        self.model, _ = tiny("M")


def test_batches_have_few_shapes_and_contexts_stay_together():
    rng = np.random.default_rng(1)
    contexts = [[*rng.integers(0, 13, 20 + 2 * i)] for i in range(200)]
    asked = [Request(context, [1] * (1 + rng.integers(60))) for context in contexts for _ in range(4)]
    _, groups = Planner().plan(asked)
    assert sorted(number for group in groups for number in group.numbers) == list(range(800))
    assert len({(group.pieces, group.rows) for group in groups}) <= 4
    for group in groups:
        assert len(group.numbers) <= group.rows
        assert group.rows * max(group.pieces) <= likelihood.TOKENS
        assert max(len(asked[number].context) - 1 for number in group.numbers) <= group.prefix <= group.capacity
        assert max(len(asked[number].continuation) for number in group.numbers) <= group.tail <= group.capacity
        assert (group.prefix % group.pieces.prefix, group.tail % group.pieces.tail) == (0, 0)
    together = [{number // 4 for number in group.numbers} for group in groups]
    assert sum(map(len, together)) <= 200 + len(groups)  # a batch's end may part one context's continuations
    tokens = sum(len(context) for context in contexts) + sum(len(one.continuation) for one in asked)
    assert tokens < sum(group.work for group in groups) < 2 * tokens


def test_a_context_runs_once(monkeypatch):
    scorer, seen = Likelihoods(*tiny("M")), []
    run = scorer._prefill

    def counted(params, tokens_BL, *rest):
        seen.append(tokens_BL.shape)
        return run(params, tokens_BL, *rest)

    monkeypatch.setattr(scorer, "_prefill", counted)
    scorer.score(scorer.plan([Request([1, 2, 3], [number]) for number in range(8)]))
    assert seen == [(1, 16)]


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match="the context of request 1 is empty"):
        Planner().plan([Request([1], [2]), Request([], [2])])
    model, params = tiny("M")
    broken = params | {"norm": jax.tree.map(lambda x: x * jnp.nan, params["norm"])}
    scorer = Likelihoods(model, broken)
    with pytest.raises(FloatingPointError, match="not numbers"):
        scorer.score(scorer.plan([Request([1], [2])]))
