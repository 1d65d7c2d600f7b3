"""The loss against float64 numpy, and what it leaves out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.data import Batch
from mamba3_jax.train.loss import bits_per_byte, means, objective, sums
from tests.helpers import rel_rms

Z = 0.01
B, L, V = 3, 7, 24
VOCAB = V - 3  # and 3 columns that pad it


def case(seed=0):
    rng = np.random.default_rng(seed)
    logits_BLV = 3 * rng.standard_normal((B, L, V))
    targets_BL = rng.integers(0, VOCAB, (B, L))
    weights_BL = rng.uniform(size=(B, L)) * (rng.uniform(size=(B, L)) < 0.6)
    batch = Batch(np.zeros((B, L), np.int32), targets_BL.astype(np.int32), weights_BL.astype(np.float32), None)
    return logits_BLV, batch


def reference(logits_BLV, batch):
    """Sums over tokens one by one; the padding columns take part in the normaliser."""
    nll = z = correct = 0.0
    for b, t in np.ndindex(B, L):
        row, weight = logits_BLV[b, t], float(batch.weights_BL[b, t])
        log_z = math.log(sum(math.exp(x) for x in row))
        nll += weight * (log_z - row[batch.targets_BL[b, t]])
        z += weight * log_z**2
        correct += weight * (np.argmax(row) == batch.targets_BL[b, t])
    return np.array([nll, z, correct, float(batch.weights_BL.astype(np.float64).sum())])


def test_sums_are_those_of_numpy():
    logits_BLV, batch = case()
    got = np.array(sums(jnp.float32(logits_BLV), batch, VOCAB))
    assert rel_rms(got, reference(logits_BLV, batch)) < 1e-6
    assert rel_rms(got, reference(logits_BLV * 1.001, batch)) > 1e-5
    assert rel_rms(got, reference(logits_BLV[..., :-1], batch)) > 1e-3, "the padded vocabulary takes part"


@pytest.mark.full
def test_gradient_is_softmax_minus_target():
    logits_BLV, batch = case()

    def total(logits_BLV):
        return objective(sums(logits_BLV, batch, VOCAB), Z)

    got = np.asarray(jax.grad(total)(jnp.float32(logits_BLV)), np.float64)
    p_BLV = np.exp(logits_BLV - np.log(np.exp(logits_BLV).sum(-1, keepdims=True)))
    log_z_BL = np.log(np.exp(logits_BLV).sum(-1))
    w_BL = batch.weights_BL.astype(np.float64)

    def want(z):
        return w_BL[..., None] * (p_BLV * (1 + 2 * z * log_z_BL[..., None]) - np.eye(V)[batch.targets_BL])

    assert rel_rms(got, want(Z)) < 1e-6
    assert rel_rms(got, want(Z * 1.1)) > 1e-4


def test_bfloat16_logits_are_summed_in_float32():
    logits_BLV, batch = case()
    rounded_BLV = jnp.bfloat16(logits_BLV)
    got = np.array(sums(rounded_BLV, batch, VOCAB))
    assert got.dtype == np.float32
    assert rel_rms(got, reference(np.asarray(rounded_BLV, np.float64), batch)) < 1e-6


def test_a_token_without_weight_does_not_count_whatever_its_logits():
    logits_BLV, batch = case()
    want = reference(logits_BLV, batch)
    logits_BLV[batch.weights_BL == 0] = np.nan
    assert rel_rms(np.array(sums(jnp.float32(logits_BLV), batch, VOCAB)), want) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("target", [-1, -100, -(2**31), VOCAB, V - 1, V, 2**31 - 1])
def test_a_target_outside_the_vocabulary_counts_as_nan_and_without_weight_not_at_all(target):
    logits_BLV, batch = case()
    scored_BL = batch.weights_BL > 0
    for where_BL, finite in ((~scored_BL, True), (scored_BL & (np.cumsum(scored_BL).reshape(B, L) == 1), False)):
        wrong = batch._replace(targets_BL=np.where(where_BL, target, batch.targets_BL).astype(np.int32))
        total = lambda logits_BLV: objective(sums(logits_BLV, wrong, VOCAB), Z)  # noqa: B023, E731
        loss, gradient = jax.value_and_grad(total)(jnp.float32(logits_BLV))
        assert np.isfinite(loss) == finite
        assert not finite or np.isfinite(gradient).all()
    clean, same = (
        sums(jnp.float32(logits_BLV), b, VOCAB)
        for b in (batch, batch._replace(targets_BL=np.where(scored_BL, batch.targets_BL, target).astype(np.int32)))
    )
    assert np.array(clean).tobytes() == np.array(same).tobytes()


def test_a_weight_that_is_not_a_number_is_not_left_out():
    logits_BLV, batch = case()
    batch.weights_BL[np.nonzero(batch.weights_BL)[0][0], np.nonzero(batch.weights_BL)[1][0]] = np.nan
    assert np.isnan(objective(sums(jnp.float32(logits_BLV), batch, VOCAB), Z))


def test_means():
    logits_BLV, batch = case()
    nll, _, correct, weight = reference(logits_BLV, batch)
    got = means(sums(jnp.float32(logits_BLV), batch, VOCAB))
    assert float(got["loss"]) == pytest.approx(nll / weight, rel=1e-6)
    assert float(got["accuracy"]) == pytest.approx(correct / weight, rel=1e-6)
    empty = batch._replace(weights_BL=np.zeros((B, L), np.float32))
    assert float(means(sums(jnp.float32(logits_BLV), empty, VOCAB))["loss"]) == 0


def test_bits_per_byte_where_tokens_are_bytes():
    assert bits_per_byte(math.log(256), DataConfig()) == pytest.approx(8)
    assert bits_per_byte(1.0, DataConfig(source="parity")) is None
    assert bits_per_byte(1.0, DataConfig(tokenizer="tokenizer.json")) is None
