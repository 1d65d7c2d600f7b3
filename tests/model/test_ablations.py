"""Each ablation of the Mamba-3 mixer is what its name says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.config import ModelConfig, from_dict
from mamba3_jax.mixers.choices import ANGLES
from mamba3_jax.mixers.mamba3 import Mamba3
from mamba3_jax.mixers.rates import heavy_tail
from mamba3_jax.model import LanguageModel
from mamba3_jax.ops.discretize import DISCRETIZATIONS
from tests.helpers import rel_rms

SMALL = {"d_model": 16, "d_state": 8, "head_dim": 8, "chunk": 4, "implementation": "recurrent"}
X_BLD = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)


def outputs(params=None, **options):
    layer = Mamba3(ModelConfig(**SMALL, **options))
    if params is None:
        boxed = jax.jit(layer.init)(jax.random.key(0), X_BLD)["params"]
        params = jax.tree.map(lambda p: p.unbox(), boxed, is_leaf=lambda p: hasattr(p, "unbox"))
    return params, *jax.jit(layer.apply)({"params": params}, X_BLD)


@pytest.mark.full
def test_discretizations_are_what_the_table_says():
    params, full_BLD, _ = outputs()
    saturated = params | {"in_dt_a_trap": params["in_dt_a_trap"].at[:, 2].set(0)}  # logit 0: lambda = 1/2
    _, half_BLD, _ = outputs(saturated)
    _, midpoint_BLD, _ = outputs(params, discretization="midpoint")
    assert rel_rms(midpoint_BLD, half_BLD) < 1e-6
    for name in ("exponential_euler", "zero_order_hold", "backward_euler"):
        _, other_BLD, state = outputs(params, discretization=name)
        assert rel_rms(other_BLD, full_BLD) > 1e-3
        assert state.k_BRHN is state.v_BHP is None  # what its rule does not look back at is not carried


@pytest.mark.full
def test_fixed_angles_turn_by_a_constant_a_token_whatever_the_data():
    params, _, state = outputs(angles="rope")
    planes = state.angle_BHS.shape[-1]
    frequency_S = 10000.0 ** (-np.arange(planes) / planes)
    wanted = np.broadcast_to((X_BLD.shape[1] * frequency_S) % (2 * np.pi), state.angle_BHS.shape)
    np.testing.assert_allclose(state.angle_BHS, wanted, atol=1e-5)

    gradient = gradient_of(params, angles="rope")["in_kq_angle"]
    assert np.abs(gradient[:, -planes:]).max() == 0
    assert np.abs(gradient[:, :-planes]).max() > 0


def gradient_of(params, **options):
    """The gradient of the sum of the outputs, as NumPy's arrays."""
    layer = Mamba3(ModelConfig(**SMALL, **options))
    total = lambda params: jnp.sum(layer.apply({"params": params}, X_BLD)[0])  # noqa: E731
    return jax.tree.map(np.asarray, jax.jit(jax.grad(total))(params))


@pytest.mark.full
def test_no_angles_is_no_rotation():
    params, still_BLD, state = outputs(angles="none")
    assert state.angle_BHS is None
    planes = outputs(params)[2].angle_BHS.shape[-1]
    flat = params | {"in_kq_angle": params["in_kq_angle"].at[:, -planes:].set(0)}  # theta 0
    _, zero_BLD, _ = outputs(flat)
    assert rel_rms(still_BLD, zero_BLD) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize(("bc_bias", "left"), [("none", ()), ("b", ("k_bias",)), ("c", ("q_bias",))])
def test_without_bc_bias_is_a_bias_of_zero(bc_bias, left):
    params, _, _ = outputs()
    gone = {"k_bias", "q_bias"} - {*left}
    zero = params | {name: jnp.zeros_like(params[name]) for name in gone}
    without = {name: array for name, array in params.items() if name not in gone}
    _, wanted_BLD, _ = outputs(zero)
    _, got_BLD, _ = outputs(without, bc_bias=bc_bias)
    assert rel_rms(got_BLD, wanted_BLD) < 1e-6


def test_a_frozen_bias_has_a_gradient_of_zero_and_says_the_same():
    params, wanted_BLD, _ = outputs()
    gradient = gradient_of(params, bc_bias_frozen=True)
    for name in ("k_bias", "q_bias"):
        assert not np.any(gradient[name])
    assert np.any(gradient["k_norm"])
    np.testing.assert_array_equal(outputs(params, bc_bias_frozen=True)[1], wanted_BLD)


@pytest.mark.full
@pytest.mark.parametrize("option", [{"angles": "none"}, {"discretization": "exponential_euler"}, {"bc_bias": "none"}])
def test_what_an_ablation_does_not_use_gets_a_zero_gradient_and_no_state(option):
    params, _, state = outputs(**option)
    empty = Mamba3.empty_state(ModelConfig(**SMALL, **option), batch=2, capacity=1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), empty) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    gradient = gradient_of(params, **option)
    unused = {
        "angles": ("in_kq_angle", np.s_[:, -2:]),
        "discretization": ("in_dt_a_trap", np.s_[:, 2]),
    }
    for name, (parameter, place) in unused.items():
        assert (np.abs(gradient[parameter][place]).max() == 0) == (name in option)


@pytest.mark.full
def test_a_model_of_what_is_left_out_carries_a_smaller_state():
    """Pieces of a row with the state carried are the row, from `empty_state` or from none, over scanned layers."""
    config = ModelConfig(
        **SMALL, vocab_size=8, pattern="MM", angles="none", discretization="zero_order_hold", bc_bias="none"
    )
    model, tokens_BL = LanguageModel(config), np.arange(18, dtype=np.int32).reshape(2, 9) % 8
    params = jax.jit(model.init)(jax.random.key(0), tokens_BL)
    apply = jax.jit(model.apply)
    whole_BLV, after = apply(params, tokens_BL)
    first_BLV, state = apply(params, tokens_BL[:, :5], model.empty_state(2, 9))
    second_BLV, state = apply(params, tokens_BL[:, 5:], state)
    assert rel_rms(np.concatenate([first_BLV, second_BLV], axis=1), whole_BLV) < 1e-5
    assert {path[-1].name for path, _ in jax.tree_util.tree_leaves_with_path((state, after))} == {"ssm_BHPN"}


def test_tables_name_what_the_config_says():
    assert ModelConfig().discretization in DISCRETIZATIONS
    assert set(ANGLES) == {"data", "rope", "none", "quaternion"}


def test_names_of_earlier_versions_are_read():
    for old, new in {
        "trapezoid": "exponential_trapezoidal",
        "euler": "exponential_euler",
        "midpoint": "midpoint",
    }.items():
        assert from_dict({"model": {"discretization": old}}).model.discretization == new
    for old, new in {True: "both", False: "none", "b": "b"}.items():
        assert from_dict({"model": {"bc_bias": old}}).model.bc_bias == new


@pytest.mark.parametrize("u", [-1e4, -3.0, 0.0, 1.0, 50.0])
def test_heavy_tail_and_its_gradient(u):
    value, slope = jax.value_and_grad(heavy_tail)(u)
    np.testing.assert_allclose(value, 1 + u if u >= 0 else 1 / (1 - u), rtol=1e-6)
    np.testing.assert_allclose(slope, 1 if u >= 0 else 1 / (1 - u) ** 2, rtol=1e-6)
