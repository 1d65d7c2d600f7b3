"""Mamba-3 with its switches: each is the layer's equations in float64, values and gradients, pieces and documents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mamba3 import Mamba3
from mamba3_jax.model import LanguageModel, init_params, validate
from mamba3_jax.ops import kernels
from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from mamba3_jax.train.flops import flops_per_token
from tests.helpers import rel_rms
from tests.model.alone import BATCH, FORWARD, LENGTH, Alone, start_row
from tests.model.switched import equations

SIZES = {"vocab_size": 8, "d_model": 16, "pattern": "M", "d_state": 8, "head_dim": 8, "n_groups": 2, "chunk": 4}
# Every value of every switch is in one of them.
VARIANTS = {
    "conv": {"conv": 4, "bc_norm": False, "bc_bias": "b", "a_form": "softplus", "pairing": "half"},
    "mimo": {"conv": 2, "mimo_rank": 2, "bc_bias": "c", "a_form": "learned", "pairing": "adjacent", "out_norm": True},
    "quaternion": {"angles": "quaternion", "bc_bias": "b", "conv": 4},
    "siso": {"bc_bias": "none", "angles": "rope", "rope_fraction": 1.0},
    "quaternion_mimo": {"angles": "quaternion", "d_state": 10, "rope_fraction": 1.0, "mimo_rank": 2, "n_groups": 1},
    "plain": {"angles": "none", "bc_norm": False, "a_form": "learned"},
}
GRADIENT = 1e-5
QUICK = ("conv", "quaternion")
every_variant = pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in VARIANTS if name not in QUICK)]
)
ONE_GROUP = Alone(Mamba3, ModelConfig(**SIZES, angles="quaternion"))


@functools.cache
def alone(name: str) -> Alone:
    return Alone(Mamba3, ModelConfig(**SIZES | VARIANTS[name]))


def wanted(name: str, params, x_BLD, start_BL, run=equations):
    """The equations in float64."""
    with jax.enable_x64(True):
        start_BL = np.zeros(x_BLD.shape[:2], bool) if start_BL is None else start_BL
        params, x_BLD = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, x_BLD))
        return jax.tree.map(np.asarray, run(tuple((SIZES | VARIANTS[name]).items()), params, x_BLD, start_BL))


@every_variant
@pytest.mark.parametrize("packed", [False, True])
def test_is_the_equations(name, packed):
    layer = alone(name)
    params, x_BLD, start_BL = layer.params(), layer.inputs(), start_row() if packed else None
    y_BLD, _ = layer.compiled()(params, x_BLD, None, start_BL)
    want_BLD = wanted(name, params, x_BLD, start_BL)
    assert rel_rms(y_BLD, want_BLD) < FORWARD
    signs = np.random.default_rng(3)
    for parameter, array in params.items():  # every parameter counts, and entries off by a part in a thousand are seen
        wrong = array * (1 + np.float32(1e-3) * signs.choice([-1, 1], array.shape))  # not a scale, which norms undo
        wrong_BLD = wanted(name, params | {parameter: wrong}, x_BLD, start_BL)
        assert rel_rms(wrong_BLD, want_BLD) > FORWARD, parameter


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["recurrent", "associative", "triton", "mosaic_tpu"])
@pytest.mark.parametrize("name", ["conv", "mimo", "quaternion_mimo"])
def test_switches_are_those_of_every_implementation(name, implementation, monkeypatch):
    """Kernels in an interpreter."""
    if implementation in kernels.BACKENDS and jax.default_backend() == "cpu":
        run = functools.partial(kernels.IMPLEMENTATIONS[implementation], interpret=True)
        monkeypatch.setitem(IMPLEMENTATIONS, implementation, run)
    layer, start_BL = alone(name), start_row()
    params, x_BLD = layer.params(), layer.inputs()
    y_BLD, _ = layer.compiled(implementation=implementation)(params, x_BLD, None, start_BL)
    assert rel_rms(y_BLD, wanted(name, params, x_BLD, start_BL)) < FORWARD


def gradients_of(fields, params, x_BLD, start_BL):
    """Of a fixed functional of the outputs, by parameters and inputs."""
    dy_BLD = np.random.default_rng(2).standard_normal(x_BLD.shape)
    loss = lambda params, x_BLD: jnp.sum(equations(fields, params, x_BLD, start_BL) * dy_BLD)  # noqa: E731
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x_BLD)


@every_variant
def test_gradients_are_those_of_the_equations(name):
    """Packed; also of the parameters that a variant does not use, which are exactly 0 in both."""
    layer, start_BL = alone(name), start_row()
    params, x_BLD = layer.params(), layer.inputs()
    dy_BLD = np.random.default_rng(2).standard_normal(x_BLD.shape)
    loss = lambda params, x_BLD: jnp.sum(layer.compiled()(params, x_BLD, None, start_BL)[0] * dy_BLD)  # noqa: E731
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x_BLD)
    want = wanted(name, params, x_BLD, start_BL, gradients_of)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert rel_rms(g, w) < GRADIENT, path
        assert not np.any(w) or rel_rms(g * 1.001, w) > GRADIENT, path


@every_variant
def test_pieces_with_the_state_carried_are_the_whole(name):
    alone(name).check_pieces()


@every_variant
def test_nothing_of_another_document_is_seen(name):
    """Bit for bit, an incoming state's too; and gradients are exactly 0."""
    layer, last = alone(name), max(np.flatnonzero(start_row()[0]))
    params, x_BLD, start_BL, run = layer.params(), layer.inputs(), start_row(), layer.compiled()
    state = layer.mixer.empty_state(layer.config, BATCH, 0)
    draw = lambda x: jax.random.normal(jax.random.key(x.size), x.shape).astype(x.dtype)  # noqa: E731
    others, other = np.where(np.arange(LENGTH)[:, None] < last, 1 - x_BLD, x_BLD), jax.tree.map(draw, state)
    got = [run(params, x, before, start_BL) for x, before in ((x_BLD, state), (others, other))]
    (y_BLD, after), (y_of_others_BLD, after_others) = got
    np.testing.assert_array_equal(y_BLD[0, last:], y_of_others_BLD[0, last:])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), after, after_others)
    assert np.any(y_BLD[1, last:] != y_of_others_BLD[1, last:])

    counted = lambda x_BLD, state: jnp.sum(run(params, x_BLD, state, start_BL)[0][:, last:])  # noqa: E731
    of_x_BLD, of_state = jax.jit(jax.grad(counted, argnums=(0, 1)))(x_BLD, other)
    assert not np.any(of_x_BLD[0, :last])
    assert np.any(of_x_BLD[1, :last])
    assert not any(np.any(x[0]) for x in jax.tree.leaves(of_state))
    assert all(np.any(x[1]) for x in jax.tree.leaves(of_state))


@every_variant
def test_bfloat16_is_close_and_keeps_its_dtypes(name):
    layer = alone(name)
    layer.check_bfloat16(wanted(name, layer.params(), layer.inputs(), None))


@pytest.mark.full
def test_a_model_carries_what_its_switches_need():
    """From `empty_state` or from none, over scanned layers."""
    model = LanguageModel(ModelConfig(**SIZES | VARIANTS["quaternion"] | {"pattern": "MM"}))
    tokens_BL = np.random.default_rng(0).integers(0, 8, (2, 9))
    params, run = {"params": init_params(model.config, jax.random.key(0))}, jax.jit(model.apply)
    whole_BLV, _ = run(params, tokens_BL)
    first_BLV, state = run(params, tokens_BL[:, :4], model.empty_state(2, 9))
    rest_BLV, state = run(params, tokens_BL[:, 4:], state)
    assert rel_rms(np.concatenate([first_BLV, rest_BLV], axis=1), whole_BLV) < FORWARD
    shapes = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert shapes(state) == shapes(model.empty_state(2, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv": 1}, r"config.conv=1 sees its own token alone: wanted 0 .none., or 2 or more"),
        ({"conv": 17}, r"config.model.conv=17 is not in 0 .. 16"),
        ({"a_form": "exp"}, r"config.a_form='exp' is not one of .'heavy_tail', 'learned', 'softplus'."),
        ({"pairing": "thirds"}, r"config.pairing='thirds' is not '' or one of .'adjacent', 'half'."),
        ({"angles": "quaternion", "pairing": "half"}, r"config.pairing='half' has no quaternions"),
        ({"angles": "quaternion", "d_state": 6}, r"config.d_state=6 is too small to rotate config.rope_fraction=0.5"),
        ({"bc_norm": "rms"}, r"config.model.bc_norm='rms' is not of type bool"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(ModelConfig(**SIZES), **changes))


def test_quaternions_of_one_axis_are_adjacent_pairs():
    """All multiples of i: theta of a group is that of both its planes."""
    layer = ONE_GROUP
    params, x_BLD = layer.params(), layer.inputs()
    wide, theta = np.split(params["in_kq_angle"], [-3], axis=1)
    still = params | {"in_kq_angle": np.concatenate([wide, theta * [[1, 0, 0]]], axis=1, dtype=np.float32)}
    pairs = params | {"in_kq_angle": np.concatenate([wide, theta[:, [0, 0]]], axis=1)}
    for start_BL in (None, start_row()):
        got_BLD, _ = layer.compiled()(still, x_BLD, None, start_BL)
        want_BLD, _ = layer.compiled(angles="data", pairing="adjacent")(pairs, x_BLD, None, start_BL)
        assert rel_rms(got_BLD, want_BLD) < FORWARD
        other_BLD, _ = layer.compiled()(params, x_BLD, None, start_BL)
        assert rel_rms(other_BLD, want_BLD) > 1e-2


def test_no_rotation_is_where_theta_is_zero_and_its_gradient_is_a_number():
    layer, still = ONE_GROUP, ONE_GROUP.compiled(angles="none")
    params, x_BLD = layer.params(), layer.inputs()
    params["in_kq_angle"][:, -3:] = 0
    loss = lambda params: jnp.sum(jnp.sin(layer.compiled()(params, x_BLD, None, None)[0]))  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(gradient))
    assert (np.abs(gradient["in_kq_angle"][:, -3:]).max(axis=0) > 1e-3).all()
    got_BLD, _ = layer.compiled()(params, x_BLD, None, None)
    without = params | {"in_kq_angle": params["in_kq_angle"][:, :-1]}  # a column fewer: two planes
    want_BLD, _ = still(without, x_BLD, None, None)
    assert rel_rms(got_BLD, want_BLD) < FORWARD


def test_flops_of_the_convolution():
    with_conv = ModelConfig(**SIZES | VARIANTS["mimo"])
    without = dataclasses.replace(with_conv, conv=0)
    assert flops_per_token(with_conv, 64) - flops_per_token(without, 64) == 3 * 2 * 2 * (32 + 2 * 2 * 2 * 8)
