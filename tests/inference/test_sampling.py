"""Drawing a token: the distribution is exactly what temperature, top_k and top_p say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba3_jax.generate import Sampling, candidates, draw

P = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
LOGITS = jnp.log(jnp.asarray(P, jnp.float32))[None]


def distribution(logits_BV, sampling):
    """The probability of each id, from the candidates."""
    logits_BK, ids_BK = candidates(logits_BV, sampling)
    p_BK = jax.nn.softmax(logits_BK)
    return np.asarray(jnp.zeros(logits_BV.shape).at[jnp.arange(len(p_BK))[:, None], ids_BK].add(p_BK))


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


@pytest.mark.full
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(0, 9), p=st.floats(0.05, 1), temperature=st.floats(0.1, 3))
def test_any_distribution_is_that_of_the_definition(seed, k, p, temperature):
    logits = np.random.default_rng(seed).standard_normal(7)
    weights = np.exp(logits / temperature)
    order = np.argsort(-weights)[: k or 7]
    ordered = weights[order] / weights[order].sum()
    before = np.cumsum(ordered) - ordered
    if np.abs(before - p).min() < 1e-5:
        return  # float32 may put the edge on either side
    want = np.zeros(7)
    want[order] = ordered * (before < p)
    got = distribution(jnp.asarray(logits, jnp.float32)[None], Sampling(temperature, k, p))[0]
    np.testing.assert_allclose(got, want / want.sum(), atol=1e-5)


def test_ties_keep_exactly_k():
    assert np.count_nonzero(distribution(jnp.zeros((1, 6)), Sampling(top_k=4))[0]) == 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=3), Sampling(top_p=0.8)])
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
