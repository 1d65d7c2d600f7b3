"""The loss against float64 numpy, what it leaves out, and that it never holds all logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.data import Batch
from mamba3_jax.ops import cross_entropy
from mamba3_jax.ops.cross_entropy import Sums, linear_cross_entropy, objective, scores, sums
from tests.helpers import first, rel_rms

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


@jax.jit
def of(logits_BLV, batch) -> Sums:
    return sums(logits_BLV, batch.targets_BL, batch.weights_BL, VOCAB)


@jax.jit
def gradient_of(logits_BLV, batch):
    """The objective and its gradient."""
    return jax.value_and_grad(lambda logits_BLV: objective(of(logits_BLV, batch), Z))(logits_BLV)


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


def logits_gradient(logits_BLV, batch, z_loss):
    """w (p (1 + 2 z log Z) - [target])."""
    p_BLV = np.exp(logits_BLV - np.log(np.exp(logits_BLV).sum(-1, keepdims=True)))
    log_z_BL = np.log(np.exp(logits_BLV).sum(-1))
    w_BL = batch.weights_BL.astype(np.float64)
    return w_BL[..., None] * (p_BLV * (1 + 2 * z_loss * log_z_BL[..., None]) - np.eye(V)[batch.targets_BL])


def test_sums_are_those_of_numpy():
    logits_BLV, batch = case()
    got = np.array(of(logits_BLV.astype(np.float32), batch))
    assert rel_rms(got, reference(logits_BLV, batch)) < 1e-6
    assert rel_rms(got, reference(logits_BLV * 1.001, batch)) > 1e-5
    assert rel_rms(got, reference(logits_BLV[..., :-1], batch)) > 1e-3, "the padded vocabulary takes part"


def test_gradient_is_softmax_minus_target():
    logits_BLV, batch = case()
    got = np.asarray(gradient_of(np.float32(logits_BLV), batch)[1], np.float64)
    assert rel_rms(got, logits_gradient(logits_BLV, batch, Z)) < 1e-6
    assert rel_rms(got, logits_gradient(logits_BLV, batch, 1.1 * Z)) > 1e-4


def test_bfloat16_logits_are_summed_in_float32():
    logits_BLV, batch = case()
    rounded_BLV = logits_BLV.astype(jnp.bfloat16)
    got = np.array(of(rounded_BLV, batch))
    assert got.dtype == np.float32
    assert rel_rms(got, reference(np.asarray(rounded_BLV, np.float64), batch)) < 1e-6


def test_of_equal_logits_the_first_is_the_likeliest():
    """As argmax has it: a model that knows nothing is right about id 0 alone. NaN is right about nothing."""
    targets_BL = np.arange(4)[None]
    for logit, correct in (
        (0.0, [True, False, False, False]),
        (np.nan, [False] * 4),
        (1e30, [True, False, False, False]),
    ):
        found = jax.jit(scores, static_argnums=2)(np.full((1, 4, 5), logit, np.float32), targets_BL, 5)
        np.testing.assert_array_equal(np.asarray(found.correct_BL)[0], correct)


def test_a_token_without_weight_does_not_count_whatever_its_logits():
    logits_BLV, batch = case()
    want = reference(logits_BLV, batch)
    logits_BLV[batch.weights_BL == 0] = np.nan
    assert rel_rms(np.array(of(logits_BLV.astype(np.float32), batch)), want) < 1e-6


@pytest.mark.parametrize("target", [-1, -100, -(2**31), VOCAB, V - 1, V, 2**31 - 1])
def test_a_target_outside_the_vocabulary_counts_as_nan_and_without_weight_not_at_all(target):
    logits_BLV, batch = case()
    scored_BL = batch.weights_BL > 0
    for where_BL, finite in ((~scored_BL, True), (scored_BL & (np.cumsum(scored_BL).reshape(B, L) == 1), False)):
        wrong = batch._replace(targets_BL=np.where(where_BL, target, batch.targets_BL).astype(np.int32))
        loss, gradient = gradient_of(np.float32(logits_BLV), wrong)
        assert np.isfinite(loss) == finite
        assert not finite or np.isfinite(gradient).all()
    clean, same = (
        of(logits_BLV.astype(np.float32), b)
        for b in (batch, batch._replace(targets_BL=np.where(scored_BL, batch.targets_BL, target).astype(np.int32)))
    )
    assert np.array(clean).tobytes() == np.array(same).tobytes()


def test_a_weight_that_is_not_a_number_is_not_left_out():
    logits_BLV, batch = case()
    batch.weights_BL[np.nonzero(batch.weights_BL)[0][0], np.nonzero(batch.weights_BL)[1][0]] = np.nan
    assert np.isnan(objective(of(logits_BLV.astype(np.float32), batch), Z))


D = 16
# Of the whole; float32 sums of 16 to 24 terms, and what bfloat16 rounds: features, head, dlogits, dx.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}


def linear_case(dtype, seed=0):
    """x and head as the op sees them, and the same numbers in float64 as the logits that they make."""
    rng = np.random.default_rng(seed)
    x_BLD = rng.standard_normal((B, L, D)).astype(jnp.dtype(dtype))
    head_DV = rng.standard_normal((D, V)).astype(np.float32)
    exact = [np.asarray(x, np.float64) for x in (x_BLD, head_DV.astype(dtype))]
    return x_BLD, head_DV, exact, case(seed)[1]


def linear_gradients(x_BLD, head_DV, batch, tiles, z_loss=Z, scale=1.0):
    gradients, (found, parts) = gradients_with(tiles, z_loss, cross_entropy.REACH)(x_BLD, head_DV, batch, scale)
    return found, parts, gradients


@functools.cache
def gradients_with(tiles, z_loss, reach):
    """One program for all tests, of every `REACH` that one sets."""
    del reach

    def loss(x_BLD, head_DV, batch, scale):
        found, parts = linear_cross_entropy(x_BLD, head_DV, batch.targets_BL, batch.weights_BL, VOCAB, z_loss, tiles)
        return scale * found, (found, parts)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def check_linear(got, exact, batch, tolerance, z_loss=Z):
    """Compare objective, sums and gradients with the equations in float64."""
    found, parts, (dx_BLD, dhead_DV) = got
    x_BLD, head_DV = exact
    logits_BLV = x_BLD @ head_DV
    want, dlogits_BLV = reference(logits_BLV, batch), logits_gradient(logits_BLV, batch, z_loss)
    assert rel_rms(np.array(parts), want) < 1e-6, "logits are float32 in either dtype"
    assert rel_rms(np.array(found), want[0] + z_loss * want[1]) < 1e-6
    for x, exactly in ((dx_BLD, dlogits_BLV @ head_DV.T), (dhead_DV, np.einsum("bld,blv->dv", x_BLD, dlogits_BLV))):
        error = rel_rms(np.asarray(x, np.float64), exactly)
        assert error < tolerance, f"{error:.2e} is not below {tolerance}"


@pytest.mark.parametrize("tiles", first([3, 1, 2, 7, 100]))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_cross_entropy_is_the_equations(dtype, tiles):
    """Values and gradients, whatever the tiles: of whole lengths, of lengths filled up, of a token."""
    x_BLD, head_DV, exact, batch = linear_case(dtype)
    got = linear_gradients(x_BLD, head_DV, batch, tiles)
    assert got[2][0].dtype == dtype
    assert got[2][1].dtype == jnp.float32
    check_linear(got, exact, batch, TOLERANCE[dtype])
    found, parts = linear_cross_entropy(x_BLD, head_DV, batch.targets_BL, batch.weights_BL, VOCAB, Z, tiles)
    assert rel_rms(np.array([found, *parts]), np.array([got[0], *got[1]])) < 1e-6, "without gradients the same"


def test_errors_planted_in_the_linear_one_are_caught():
    x_BLD, head_DV, exact, batch = linear_case("float32")
    got = linear_gradients(x_BLD, head_DV, batch, 3)
    for part in range(2):
        wrong = [gradient * (1.001 if i == part else 1) for i, gradient in enumerate(got[2])]
        with pytest.raises(AssertionError, match="is not below"):
            check_linear((*got[:2], wrong), exact, batch, TOLERANCE["float32"])
    with pytest.raises(AssertionError):
        check_linear(linear_gradients(x_BLD, head_DV, batch, 3, z_loss=1.01 * Z), exact, batch, 1e-6)
    with pytest.raises(AssertionError):
        check_linear(got, (exact[0] * 1.0001, exact[1]), batch, 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_target_out_of_reach_is_the_equations_too(dtype):
    """Less likely than e^-41, where exp(logit - logit[target]) is not added up: all is computed again."""
    x_BLD, head_DV, _, batch = linear_case(dtype)
    x_BLD *= 16
    exact = [np.asarray(x, np.float64) for x in (x_BLD, head_DV.astype(dtype))]
    logits_BLV = exact[0] @ exact[1]
    nll_BL = np.log(np.exp(logits_BLV).sum(-1)) - np.take_along_axis(logits_BLV, batch.targets_BL[..., None], 2)[..., 0]
    assert nll_BL.max() > 88, "beyond float32 even"
    rounding = 2**-24 * np.abs(logits_BLV).max()  # of a logit, which is that of its exponential
    check_linear(linear_gradients(x_BLD, head_DV, batch, 3), exact, batch, max(TOLERANCE[dtype], rounding))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_ways_to_the_gradients_agree(monkeypatch, dtype):
    x_BLD, head_DV, _, batch = linear_case(dtype)
    near = linear_gradients(x_BLD, head_DV, batch, 2)
    monkeypatch.setattr(cross_entropy, "REACH", 1e-9)
    far = linear_gradients(x_BLD, head_DV, batch, 2)
    for got, want in zip(jax.tree.leaves(near), jax.tree.leaves(far), strict=True):
        assert rel_rms(np.asarray(got, np.float64), np.asarray(want, np.float64)) < TOLERANCE[dtype]


def test_a_gradient_near_certainty_is_not_lost_in_rounding():
    """(p - 1) x in bfloat16 where p is 0.999 and more: not a difference of two rounded numbers."""
    x_BLD = np.ones((1, 4, 1), jnp.bfloat16)
    head_DV = np.float32([[7.0, 0.0, 0.0, -1.0]])
    batch = Batch(None, np.zeros((1, 4), np.int32), np.ones((1, 4), np.float32), None)
    loss = lambda head_DV: linear_cross_entropy(x_BLD, head_DV, batch.targets_BL, batch.weights_BL, 4)[0]  # noqa: E731
    p_V = np.exp(np.float64([7.0, 0.0, 0.0, -1.0]))
    want_V = 4 * (p_V / p_V.sum() - np.eye(4)[0])
    assert abs(want_V[0]) < 0.01
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(head_DV)[0], want_V, rtol=2**-8)


def test_a_scale_of_the_objective_scales_its_gradients():
    """A loss scale, or the mean's division."""
    x_BLD, head_DV, _, batch = linear_case("float32")
    once, thrice = (linear_gradients(x_BLD, head_DV, batch, 2, scale=scale)[2] for scale in (1.0, 3.0))
    for a, b in zip(once, thrice, strict=True):
        assert rel_rms(3 * np.asarray(a), np.asarray(b)) < 1e-6


@pytest.mark.full
def test_a_population_is_vmapped():
    x_BLD, head_DV, _, batch = linear_case("float32")
    run = lambda x_BLD, head_DV: linear_gradients(x_BLD, head_DV, batch, 2)  # noqa: E731
    many = jax.vmap(run)(jnp.stack([x_BLD, 2 * x_BLD]), jnp.stack([head_DV, head_DV]))
    for member, scale in enumerate((1, 2)):
        for got, want in zip(jax.tree.leaves(many), jax.tree.leaves(run(scale * x_BLD, head_DV)), strict=True):
            assert rel_rms(np.asarray(got[member]), np.asarray(want)) < 1e-5


@pytest.mark.parametrize("heads", first([0, None]), ids=lambda axis: "a head a member" if axis == 0 else "one head")
@pytest.mark.parametrize("scales", first([(1, 2, 16), (16, 16), (1, 0.5, np.nan)]))
def test_a_member_gets_what_it_gets_alone(scales, heads):
    """Members near their targets, out of `REACH` of them, and lost."""
    x_BLD, head_DV, _, batch = linear_case("float32")
    run = lambda x_BLD, head_DV: linear_gradients(x_BLD, head_DV, batch, 2)  # noqa: E731
    xs = [np.float32(scale) * x_BLD for scale in scales]
    many = jax.vmap(run, in_axes=(0, heads))(
        jnp.stack(xs), head_DV if heads is None else jnp.stack([head_DV] * len(xs))
    )
    for member, x_BLD in enumerate(xs):
        for got, want in zip(jax.tree.leaves(many), jax.tree.leaves(run(x_BLD, head_DV)), strict=True):
            np.testing.assert_allclose(got[member], want, rtol=1e-5, atol=1e-6 * np.abs(np.nan_to_num(want)).max())


def test_a_population_computes_its_gradients_once():
    """The second way to them is a branch of the compiled program, as it is for one run, and not a `select` of both."""
    x_BLD, head_DV, _, batch = linear_case("float32")
    run = lambda x_BLD, head_DV: linear_gradients(x_BLD, head_DV, batch, 2)  # noqa: E731
    many = jnp.stack([x_BLD] * 3), jnp.stack([head_DV] * 3)
    assert str(jax.make_jaxpr(jax.vmap(run))(*many)).count("cond[") == 1


def test_weight_zero_keeps_a_bad_target_out_of_the_gradients():
    x_BLD, head_DV, exact, batch = linear_case("float32")
    targets_BL = np.where(batch.weights_BL == 0, -100, batch.targets_BL).astype(np.int32)
    check_linear(linear_gradients(x_BLD, head_DV, batch._replace(targets_BL=targets_BL), 2), exact, batch, 1e-6)
    targets_BL = np.full_like(targets_BL, VOCAB)
    assert np.isnan(linear_gradients(x_BLD, head_DV, batch._replace(targets_BL=targets_BL), 2)[0])


def temporaries(length: int, batch: int = 2, vocab: int = 4096, dtype="bfloat16") -> tuple[int, str]:
    """Bytes beside arguments and results, as compiled, and the program."""
    shapes = (
        jax.ShapeDtypeStruct((batch, length, D), dtype),
        jax.ShapeDtypeStruct((D, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )

    def loss(*arrays):
        return linear_cross_entropy(*arrays, vocab)

    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setattr(cross_entropy, "TILE", 2 * 64 * 4096)
    short, long = (temporaries(length)[0] for length in (256, 4096))
    logits = 2 * 64 * 4096 * 4
    assert short > logits / 2, "a tile's logits are there"
    assert long - short < 16 * 2 * (4096 - 256) * D * 4, "features and targets alone grow"
    monkeypatch.setattr(cross_entropy, "TILE", 2**40)
    assert temporaries(4096)[0] > 2 * 4096 * 4096 * 4, "one tile holds all logits, and the count sees them"
