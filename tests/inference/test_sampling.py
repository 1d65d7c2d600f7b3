"""Drawing a token: the distribution is exactly what temperature, top_k and top_p say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3_jax import sampling as sampler
from mamba3_jax.sampling import Sampling, best_of_likeliest
from tests.helpers import first

# Compiled, as they always are in use.
draw = jax.jit(sampler.draw, static_argnames="sampling")
largest = jax.jit(sampler.largest, static_argnames="count")

P = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
LOGITS = jnp.log(jnp.asarray(P, jnp.float32))[None]


def distribution(logits_BV, sampling):
    """The probability of each id of one row: the softmax over those that are drawn where they are given any lead."""
    logits_BV = (logits_BV - logits_BV.max()) / sampling.temperature
    ids_BV, vocab = jnp.arange(logits_BV.shape[1])[None], logits_BV.shape[1]
    if sampling.top_k:
        logits_BV, ids_BV = largest(logits_BV, min(sampling.top_k, vocab))
    places_V = jnp.arange(logits_BV.shape[1])
    favoured_VV = jnp.where(jnp.eye(len(places_V), dtype=bool), 1e38, logits_BV)
    found_V = best_of_likeliest(jnp.broadcast_to(logits_BV, favoured_VV.shape), favoured_VV, sampling.top_p)
    p_V = jax.nn.softmax(jnp.where(found_V == places_V, logits_BV[0], -jnp.inf))
    return np.asarray(jnp.zeros((1, vocab)).at[0, ids_BV[0]].add(p_V))


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(), P),
        (Sampling(temperature=0.5), P**2 / (P**2).sum()),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=9), P),
        (Sampling(top_p=0.39), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.41), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.71), [0, 0.4 / 0.85, 0.15 / 0.85, 0.3 / 0.85, 0]),
        (Sampling(top_p=1e-9), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_k=2, top_p=0.5), [0, 1, 0, 0, 0]),  # 4/7 of the two already holds half
        (Sampling(temperature=0.5, top_k=2), [0, 16 / 25, 0, 9 / 25, 0]),
        (Sampling(temperature=1e-30), [0, 1, 0, 0, 0]),
    ],
)
def test_small_distributions_are_exact(sampling, want):
    got = distribution(LOGITS, sampling)[0]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.abs(got - np.roll(want, 1)).max() > 0.1
    off = distribution(LOGITS, sampling._replace(temperature=sampling.temperature * 1.001))[0]
    assert np.abs(off - want).max() > 1e-6 or max(want) == 1


def definition(logits_V, temperature, k, p):
    """(whether each id may be drawn, how close the sum before one comes to p), sorted and in float64."""
    x_V = (logits_V.astype(np.float64) - logits_V.max()) / temperature
    order = np.argsort(-x_V, kind="stable")[: k or len(x_V)]
    weights = np.exp(x_V[order])
    before = (np.cumsum(weights) - weights) / weights.sum()
    keep_V = np.zeros(len(x_V), bool)
    keep_V[order[(before < p) | (np.arange(len(order)) == 0)]] = True
    return keep_V, np.abs(before[1:] - p).min(initial=1)


def rows(kind: str, random, vocab: int):
    """Logits of one row: float32 as a model gives them, or with many equals, or with ids that cannot be drawn."""
    logits_V = 3 * random.standard_normal(vocab)
    if kind == "ties":
        logits_V = np.round(logits_V)
    if kind == "excluded":
        logits_V[random.random(vocab) < 0.7] = -np.inf
        logits_V[random.integers(vocab)] = 0
    return logits_V.astype(np.float32)


@pytest.mark.parametrize("kind", first(["plain", "ties", "excluded", "flat"]))
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    p=st.sampled_from([1e-30, 1e-6, 0.01, 0.3, 0.9, 0.999, 1 - 2**-24]),
    temperature=st.sampled_from([1e-30, 0.01, 1, 30, 1e30]),
    k=st.sampled_from([0, 1, 5, 40]),
)
def test_the_draw_is_the_best_score_of_those_that_the_definition_keeps(kind, seed, p, temperature, k):
    random = np.random.default_rng(seed)
    vocab = 97
    logits_BV = np.stack([np.zeros(vocab, np.float32) if kind == "flat" else rows(kind, random, vocab)] * 3)
    scaled_BV = jnp.asarray((logits_BV - logits_BV.max(1, keepdims=True)) / np.float32(temperature))
    noise_BV = jax.random.gumbel(jax.random.key(seed), logits_BV.shape)
    ids_BV = jnp.broadcast_to(jnp.arange(vocab), logits_BV.shape)
    if k:
        scaled_BV, ids_BV = largest(scaled_BV, k)
        noise_BV = noise_BV[:, :k]
    place_B = best_of_likeliest(scaled_BV, scaled_BV + noise_BV, p)
    got_B = jnp.take_along_axis(ids_BV, place_B[:, None], axis=1)[:, 0]
    keep_V, edge = definition(np.asarray((logits_BV - logits_BV.max(1, keepdims=True))[0]), temperature, k, p)
    if edge < 1e-5 * min(p, 1 - p + 1e-2):
        return  # float32 may put the edge on either side
    scores_BV = np.full(logits_BV.shape, -np.inf)
    np.put_along_axis(scores_BV, np.asarray(ids_BV), np.asarray(scaled_BV + noise_BV), axis=1)
    assert got_B.tolist() == np.argmax(np.where(keep_V, scores_BV, -np.inf), axis=1).tolist()


@pytest.mark.parametrize(("vocab", "count"), [(4096, 1), (4096, 7), (5003, 50), (1000, 3), (97, 40), (64, 64)])
@pytest.mark.parametrize("kind", first(["plain", "ties", "excluded"]))
def test_the_largest_are_those_of_a_sort(kind, vocab, count):
    logits_BV = np.stack([rows(kind, np.random.default_rng(seed), vocab) for seed in range(4)])
    for got, want in zip(largest(logits_BV, count), jax.lax.top_k(logits_BV, count), strict=True):
        assert np.array_equal(got, want)


def test_large_vocabularies_are_not_sorted():
    logits_BV = jax.ShapeDtypeStruct((2, 128256), jnp.float32)
    for sampling in (Sampling(top_k=50, top_p=0.95), Sampling(top_p=0.95)):
        text = str(jax.make_jaxpr(lambda logits_BV: draw(jax.random.key(0), logits_BV, sampling))(logits_BV))  # noqa: B023
        for line in text.splitlines():
            assert "128256" not in line or not re.search(r"= (sort|top_k|cumsum)\[", line), line


def test_a_seed_draws_what_categorical_draws():
    logits_BV, key = jax.random.normal(jax.random.key(2), (8, 50)), jax.random.key(3)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(8))
    logits_BV -= logits_BV.max(axis=1, keepdims=True)
    assert draw(key, logits_BV, Sampling()).tolist() == jax.vmap(jax.random.categorical)(keys_B, logits_BV).tolist()


@pytest.mark.parametrize("sampling", first([Sampling(top_k=5, top_p=0.5), Sampling(), Sampling(top_p=0.5)]))
def test_what_is_not_a_number_ends(sampling):
    logits_BV = jnp.array([[jnp.nan] * 8, [jnp.inf] + [0.0] * 7, [-jnp.inf] * 8, [0.0] * 7 + [jnp.nan]])
    assert draw(jax.random.key(0), logits_BV, sampling).shape == (4,)


def test_ties_keep_exactly_k():
    assert np.count_nonzero(distribution(jnp.zeros((1, 6)), Sampling(top_k=4))[0]) == 4


@pytest.mark.parametrize("sampling", first([Sampling(top_p=0.8), Sampling(), Sampling(temperature=0.7, top_k=3)]))
def test_draws_follow_the_distribution(sampling):
    count = 20000
    ids = np.asarray(draw(jax.random.key(1), jnp.repeat(LOGITS, count, axis=0), sampling))
    want = distribution(LOGITS, sampling)[0]
    error = np.bincount(ids, minlength=5) / count - want
    assert np.all(np.abs(error) <= 5 * np.sqrt(want * (1 - want) / count))  # five standard deviations; 0 stays 0


def test_temperature_zero_is_the_argmax():
    logits_BV = jnp.array([[0.0, 3, 1], [2, 1, 0]])
    assert draw(jax.random.key(0), logits_BV, Sampling(0.0)).tolist() == [1, 0]


@pytest.mark.full
def test_a_row_draws_the_same_beside_any_others():
    logits_BV = jax.random.normal(jax.random.key(2), (8, 50))
    together = draw(jax.random.key(3), logits_BV, Sampling())
    assert draw(jax.random.key(3), logits_BV[:3], Sampling()).tolist() == together[:3].tolist()
    assert draw(jax.random.key(4), logits_BV, Sampling()).tolist() != together.tolist()


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (Sampling(temperature=-1.0), "temperature=-1.0"),
        (Sampling(temperature=float("nan")), "temperature=nan"),
        (Sampling(temperature=1e-60), "temperature=1e-60"),  # 0 in float32: the likeliest id got 0/0
        (Sampling(top_k=-2), "top_k=-2"),
        (Sampling(top_p=0.0), "top_p=0.0"),
        (Sampling(top_p=1.5), "top_p=1.5"),
    ],
)
def test_numbers_that_mean_nothing(sampling, named):
    with pytest.raises(ValueError, match=named):
        sampling.check()
