"""What layers show of themselves: closed forms, every mixer, and nothing paid where nobody looks."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.analysis import observe, pictures
from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.data import Batch
from mamba3_jax.finite import or_null
from mamba3_jax.mixers import MIXERS
from mamba3_jax.mixers.mixer import Mixer
from mamba3_jax.model import LanguageModel, init_params
from tests.helpers import first, rel_rms

PATTERN = "M2M1GA"  # every mixer, and a segment of several layers
SMALL = ModelConfig(
    vocab_size=13,
    d_model=16,
    pattern=PATTERN,
    d_state=8,
    head_dim=8,
    attn_head_dim=8,
    delta_head_dim=8,
    mamba1_state=4,
)
# What each mixer has, of what is looked for: the rest must be named as absent.
HAS = {
    "mamba3": {"dt", "log_a", "gamma", "beta", "lambda", "rotation", "norm", "rank"},
    "mamba2": {"dt", "log_a", "gamma", "norm", "rank"},
    "mamba1": {"dt", "log_a", "norm", "rank"},
    "gated_deltanet": {"log_a", "delta", "norm", "rank"},
    "attention": set(),
}


def rows(length: int = 64) -> Batch:
    """Two rows, a document of the second beginning in the middle of a piece."""
    tokens_BL = np.random.default_rng(0).integers(0, 13, (2, length)).astype(np.int32)
    start_BL = np.zeros((2, length), bool)
    start_BL[:, 0] = start_BL[1, 21] = True
    return Batch(tokens_BL, np.roll(tokens_BL, -1, axis=1), np.ones((2, length), np.float32), start_BL)


@functools.cache
def observed() -> list[observe.Layer]:
    return observe.observe(Config(model=SMALL), LanguageModel(SMALL), init_params(SMALL, jax.random.key(0)), rows())


@pytest.mark.parametrize("change", first([{}, {"angles": "quaternion"}, {"remat": "block"}]))
def test_a_pass_that_asks_for_nothing_is_the_same_program(change, monkeypatch):
    """As text, with and without what mixers show; one that asks is another."""
    model, batch = LanguageModel(dataclasses.replace(SMALL, **change)), rows(32)
    params = jax.eval_shape(model.init, jax.random.key(0), batch.tokens_BL)

    def text(**asked):
        return jax.jit(lambda params: model.apply(params, batch.tokens_BL, **asked)).lower(params).as_text()

    plain = text()
    assert text(mutable=["intermediates"]) != plain
    monkeypatch.setattr(Mixer, "observe", lambda self, **arrays: None)
    assert text() == plain


@pytest.mark.parametrize("layer", range(len(PATTERN)))
def test_every_mixer_says_what_it_has(layer):
    (found,) = observe.summary(observed()[layer : layer + 1], rows().start_BL)
    names = {*observe.QUANTITIES, *observe.OF_STATE}
    assert names - set(found["absent"]) == HAS[found["mixer"]]
    assert found["gradient_norm"] > 0
    assert bool(found["heads"]) == bool(HAS[found["mixer"]])
    for head in found["heads"]:
        assert HAS[found["mixer"]] <= set(head)
        assert 0 < head["eigenvalue"]["modulus"]["p5"] <= head["eigenvalue"]["modulus"]["p95"] <= 1
        assert 0 < head["rank"] <= 8


def test_every_mixer_is_looked_at():
    assert {layer.mixer for layer in observed()} == set(MIXERS) == set(HAS)
    report = or_null(observe.summary(observed(), rows().start_BL))
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_pictures_of_every_mixer():
    found = {"a": observe.summary(observed(), rows().start_BL), "b": observe.summary(observed()[:2], rows().start_BL)}
    eigenvalues = {"a": [observe.some_eigenvalues(layer, 50) for layer in observed()], "b": [np.zeros(0, complex)]}
    for image in (pictures.eigenvalues(eigenvalues), pictures.by_layer(found), pictures.state_by_position(found)):
        assert image.startswith(b"\x89PNG")


def test_a_layer_set_by_hand():
    """Without weights on the token: dt 1/2 and 1/10, A -1 (Mamba-3) and -4 (Mamba-2), lambda 1/2, no rotation."""
    config = dataclasses.replace(SMALL, pattern="M2", head_dim=16)
    params = init_params(config, jax.random.key(0))
    dt_bias = jnp.log(jnp.expm1(jnp.array([[0.5, 0.1]])))
    mamba3, mamba2 = (params["segment_0"][f"block_{j}"]["mixer"] for j in range(2))
    zero = jnp.zeros_like
    mamba3 |= {name: zero(mamba3[name]) for name in ("in_dt_a_trap", "in_kq_angle")} | {"dt_bias": dt_bias}
    mamba2 |= {"in_dt": zero(mamba2["in_dt"]), "dt_bias": dt_bias, "a_log": jnp.full((1, 2), math.log(4.0))}
    layers = observe.observe(Config(model=config), LanguageModel(config), params, rows())
    third, second = observe.summary(layers, rows().start_BL)
    for head, dt in enumerate((0.5, 0.1)):
        for found, rate in ((third, 1.0), (second, 4.0)):
            got = found["heads"][head]
            assert got["horizon"] == pytest.approx(1 / (rate * dt), rel=1e-5)
            assert got["dt"]["p50"] == pytest.approx(dt, rel=1e-5)
            for part in ("p5", "p95"):
                assert got["eigenvalue"]["modulus"][part] == pytest.approx(math.exp(-rate * dt), rel=1e-5)
                assert got["eigenvalue"]["phase"][part] == 0
        assert third["heads"][head]["lambda"]["p50"] == pytest.approx(0.5)
        assert third["heads"][head]["rotation"]["p95"] == 0
    assert third["heads"][0]["horizon"] != pytest.approx(1 / 0.5005, rel=1e-5)


def test_eigenvalues_are_decay_and_rotation():
    """Half a radian a unit dt, of 2, with decay 0.9: 0.9 exp(+-i); entries that do not rotate 0.9; the delta rule's."""
    one = np.ones((1, 1, 1))
    shown = {"dt": 2 * one, "log_a": math.log(0.9) * one, "gamma": one, "beta": 3 * one, "angle": one[..., None] / 2}
    found = {name: np.asarray(array) for name, array in observe.quantities(shown).items()}
    assert found["lambda"] == 0.25
    turned = 0.9 * np.exp(np.array([1j, -1j]))
    np.testing.assert_allclose(observe.eigenvalues(found, 2)[0, 0, 0], turned, rtol=1e-6)
    np.testing.assert_allclose(observe.eigenvalues(found, 4)[0, 0, 0], [*turned, 0.9], rtol=1e-6)
    delta = observe.eigenvalues({"log_a": math.log(0.9) * one, "delta": 2 * one}, 4)
    np.testing.assert_allclose(delta[0, 0, 0], [0.9, -0.9], rtol=1e-6)


def test_the_state_is_the_models():
    """Its norm after the last piece, and the eigenvalues' and norms' order of layers."""
    model, batch = LanguageModel(SMALL), rows()
    params = init_params(SMALL, jax.random.key(0))
    run = jax.jit(lambda *given: model.apply({"params": params}, given[0], None, given[1])[1])
    states = observe.memories(SMALL, jax.device_get(run(batch.tokens_BL, batch.start_BL)))
    for layer, h_BHPN in zip(observed(), states, strict=True):
        if h_BHPN is not None:
            norm_BH = np.sqrt(np.square(h_BHPN).sum(axis=(-2, -1)))
            assert rel_rms(layer.norm_BCH[:, -1], norm_BH) < 1e-5
            assert rel_rms(layer.norm_BCH[:, -2], norm_BH) > 1e-3


def test_norms_by_position_begin_again_with_a_document():
    """Of 64 tokens in 32 pieces; the second row's document of token 21 has 43 tokens."""
    norm_BCH = np.broadcast_to(np.arange(32.0)[None, :, None], (2, 32, 1)).copy()
    found = observe.norms_by_position(norm_BCH, rows().start_BL)
    assert [(bucket["from"], bucket["to"]) for bucket in found] == [(0, 16), (16, 32), (32, 64)]
    ends = np.arange(1, 64, 2)
    place_BC = np.stack([ends, np.where(ends >= 21, ends - 21, ends)])
    inside_BC = (place_BC >= 32) & (place_BC < 64)
    assert found[2]["norm"] == [norm_BCH[inside_BC].mean()]


@pytest.mark.parametrize(("h_PN", "rank"), [(np.eye(3, 5), 3), (np.ones((4, 2)), 1), (np.zeros((2, 2)), 0)])
def test_effective_rank(h_PN, rank):
    assert observe.effective_rank(h_PN) == pytest.approx(rank)


def test_effective_rank_of_unequal_parts():
    """Shares 3/4 and 1/4: exp of their entropy, 4 / 3^(3/4)."""
    assert observe.effective_rank(np.diag([3.0, 1.0])) == pytest.approx(4 / 3**0.75)


def test_of_many_tokens_some_are_kept(monkeypatch):
    """Of 128 tokens in pieces of 2 the first of each where 64 are to be kept; states are looked at as before."""
    monkeypatch.setattr(observe, "TOKENS", 64)
    config = dataclasses.replace(SMALL, pattern="M")
    params = init_params(config, jax.random.key(0))
    (some,) = observe.observe(Config(model=config), LanguageModel(config), params, rows())
    monkeypatch.setattr(observe, "TOKENS", 128)
    (every,) = observe.observe(Config(model=config), LanguageModel(config), params, rows())
    assert rel_rms(some.tokens["rotation"], every.tokens["rotation"][:, ::2]) < 1e-6
    assert rel_rms(some.norm_BCH, every.norm_BCH) < 1e-6
