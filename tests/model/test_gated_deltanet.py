"""Gated DeltaNet against its equations token by token in float64: values, gradients, pieces, documents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.gated_deltanet import GatedDeltaNet, unit
from mamba3_jax.model import validate
from mamba3_jax.ops import delta as deltas
from mamba3_jax.ops.delta import Tokens, chunked, delta, recurrent, unit_lower_inverse
from mamba3_jax.train.flops import flops_per_token
from tests.helpers import first, rel_rms
from tests.model.alone import BATCH, FORWARD, LENGTH, Alone, start_row

CONFIG = ModelConfig(
    vocab_size=8, d_model=16, pattern="G", delta_heads=3, delta_head_dim=8, delta_expand=1, delta_negative=True, chunk=4
)
ALONE = Alone(GatedDeltaNet, CONFIG)
GRADIENT = 2e-5


def drawn(packed: bool, length=LENGTH, seed=0):
    """Tokens of the op, and a state. Keys are alike, so that the solve matters."""
    random = np.random.default_rng(seed)
    normal = lambda *sizes: random.standard_normal((BATCH, length, 3, *sizes)).astype(np.float32)  # noqa: E731
    tokens = Tokens(
        q_BLHN=normal(8),
        k_BLHN=np.asarray(unit(jnp.asarray(normal(8) + 1))),
        v_BLHP=normal(6),
        log_a_BLH=-0.3 * np.abs(normal()),
        b_BLH=2 / (1 + np.exp(-normal())),
        start_BL=start_row() if packed else None,
    )
    return tokens, random.standard_normal((BATCH, 3, 6, 8)).astype(np.float32)


def equations(tokens: Tokens, h_BHPN):
    """h_t = a_t h_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, y_t = h_t q_t, as it stands."""
    h_BHPN, outputs = h_BHPN.astype(np.float64), []
    for t in range(tokens.v_BLHP.shape[1]):
        q_BHN, k_BHN, v_BHP = (np.asarray(x[:, t], np.float64) for x in (tokens.q_BLHN, tokens.k_BLHN, tokens.v_BLHP))
        a_BH, b_BH = np.exp(np.float64(tokens.log_a_BLH[:, t])), np.float64(tokens.b_BLH[:, t])
        if tokens.start_BL is not None:
            h_BHPN = np.where(tokens.start_BL[:, t, None, None, None], 0, h_BHPN)
        step_BHNN = np.eye(k_BHN.shape[-1]) - b_BH[..., None, None] * k_BHN[..., :, None] * k_BHN[..., None, :]
        h_BHPN = a_BH[..., None, None] * h_BHPN @ step_BHNN
        h_BHPN = h_BHPN + b_BH[..., None, None] * v_BHP[..., :, None] * k_BHN[..., None, :]
        outputs.append(np.einsum("bhpn,bhn->bhp", h_BHPN, q_BHN))
    return np.stack(outputs, axis=1), h_BHPN


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_chunks_are_the_equations(chunk, packed):
    tokens, h_BHPN = drawn(packed)
    want = equations(tokens, h_BHPN)
    for got, wanted in zip(jax.jit(chunked, static_argnums=2)(tokens, h_BHPN, chunk), want, strict=True):
        assert rel_rms(got, wanted) < FORWARD
        assert rel_rms(got * (1 + 1e-3), wanted) > 10 * FORWARD  # a planted error
    for name in Tokens._fields[:5]:  # what each does is seen
        wrong = tokens._replace(**{name: getattr(tokens, name) * np.float32(1.001)})
        assert rel_rms(equations(wrong, h_BHPN)[0], want[0]) > 10 * FORWARD, name


@pytest.mark.parametrize("packed", first([True, False]))
def test_gradients_are_the_definitions(packed):
    """Of everything, the incoming state and through the outgoing one too; float64 differences hold the definition."""
    tokens, h_BHPN = drawn(packed)
    random = np.random.default_rng(1)
    start_BL, arrays = tokens.start_BL, (*tokens[:5], h_BHPN)
    dy, dh = random.standard_normal(tokens.v_BLHP.shape), random.standard_normal(h_BHPN.shape)

    def loss(op, *arrays):
        y_BLHP, after_BHPN = op(Tokens(**dict(zip(Tokens._fields, (*arrays[:5], start_BL), strict=True))), arrays[5])
        return (y_BLHP * dy).sum() + (after_BHPN * dh).sum()

    gradient = lambda op: jax.jit(jax.grad(functools.partial(loss, op), argnums=range(6)))(*arrays)  # noqa: E731
    want = gradient(recurrent)
    for chunk in (4, 16):
        for got, wanted in zip(gradient(functools.partial(chunked, chunk=chunk)), want, strict=True):
            assert rel_rms(got, wanted) < GRADIENT
    assert rel_rms(want[1] * (1 + 1e-3), want[1]) > 10 * GRADIENT
    for place, array in enumerate(arrays):
        way = random.standard_normal(array.shape)
        at = lambda step: loss(equations, *arrays[:place], array + step * way, *arrays[place + 1 :])  # noqa: B023, E731
        assert rel_rms((want[place] * way).sum(), (at(1e-5) - at(-1e-5)) / 2e-5) < 1e-4


@pytest.mark.parametrize("op", [recurrent, functools.partial(chunked, chunk=8)], ids=["recurrent", "chunked"])
def test_no_gradient_crosses_a_boundary(op):
    """Exactly zero, of tokens and of the incoming state; in the second row, one document, there are some."""
    tokens, h_BHPN = drawn(False)
    last_BLHP = np.zeros_like(tokens.v_BLHP)
    last_BLHP[:, 9:] = 1
    run = lambda tokens, h_BHPN: op(tokens._replace(start_BL=start_row()), h_BHPN)[0]  # noqa: E731
    gradients = jax.jit(lambda *inputs: jax.vjp(run, *inputs)[1](last_BLHP))(tokens, h_BHPN)
    of_tokens, of_h_BHPN = jax.tree.map(np.asarray, gradients)
    for name, array in of_tokens._asdict().items():
        if name != "start_BL":
            assert not np.any(array[0, :9]), name
            assert np.any(array[1, :9]) == (name != "q_BLHN")
    assert not np.any(of_h_BHPN[0])
    assert np.any(of_h_BHPN[1])


@pytest.mark.full
def test_what_decays_to_nothing_in_a_token_has_finite_gradients():
    """Sums of log_a of hundreds, in documents of one chunk: the exponential of another document's decay is inf."""
    tokens, h_BHPN = drawn(True)
    tokens = tokens._replace(log_a_BLH=1000 * tokens.log_a_BLH)
    arrays = {name: array for name, array in tokens._asdict().items() if name != "start_BL"}

    @jax.jit
    def run(arrays, h_BHPN):
        op = lambda arrays, h_BHPN: chunked(tokens._replace(**arrays), h_BHPN, 16)  # noqa: E731
        got, pull = jax.vjp(op, arrays, h_BHPN)
        return got, pull(got)

    got, gradients = run(arrays, h_BHPN)
    assert all(rel_rms(a, b) < FORWARD for a, b in zip(got, equations(tokens, h_BHPN), strict=True))
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(gradients))


@pytest.mark.parametrize("alike", first([1.0, 0.0]))
def test_the_inverse_is_one(alike):
    """Also where all keys are the same and b is 1: rows of ones, whose powers are binomials."""
    lower = np.tril(np.random.default_rng(0).uniform(-1, 1, (3, 64, 64)) * (1 - alike) / 4 + alike, -1)
    want = np.linalg.inv(np.eye(64) + lower)
    got = jax.jit(unit_lower_inverse)(jnp.float32(lower))
    assert rel_rms(got, want) < 1e-5
    d = np.random.default_rng(1).standard_normal(lower.shape)
    (pulled,) = jax.jit(lambda lower, d: jax.vjp(unit_lower_inverse, lower)[1](d))(np.float32(lower), np.float32(d))
    turned = np.swapaxes(want, 1, 2)
    assert rel_rms(pulled, np.tril(-turned @ d @ turned, -1)) < 1e-5
    assert not np.any(np.triu(pulled))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer(params, x_BLD, start_BL=None, config=CONFIG):
    """The layer by its equations: convolutions token by token, the recurrence, norm and gate."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    x_BLD, taps = x_BLD.astype(np.float64), config.d_conv
    qk, zv = np.einsum("bld,dchn->cblhn", x_BLD, p["in_qk"]), np.einsum("bld,dchn->cblhn", x_BLD, p["in_zv"])
    ab = np.einsum("bld,dch->cblh", x_BLD, p["in_ab"])
    start_BL = np.zeros(x_BLD.shape[:2], bool) if start_BL is None else start_BL
    first_BL = np.maximum.accumulate(np.where(start_BL, np.arange(x_BLD.shape[1]), 0), axis=1)

    def convolved(x, weights):
        out = np.zeros_like(x)
        for row, t in np.ndindex(x.shape[:2]):
            for s in range(max(first_BL[row, t], t - taps + 1), t + 1):
                out[row, t] += x[row, s] * weights[..., taps - 1 - (t - s)]
        return out * sigmoid(out)

    length_one = lambda x: x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)  # noqa: E731
    tokens = Tokens(
        q_BLHN=length_one(convolved(qk[0], p["conv_q"])),
        k_BLHN=length_one(convolved(qk[1], p["conv_k"])),
        v_BLHP=convolved(zv[1], p["conv_v"]),
        log_a_BLH=-np.exp(p["a_log"]) * np.log1p(np.exp(ab[0] + p["dt_bias"])),
        b_BLH=sigmoid(ab[1]) * (2 if config.delta_negative else 1),
        start_BL=start_BL,
    )
    y_BLHP, _ = equations(tokens, np.zeros((len(x_BLD), *p["out"].shape[:2], qk.shape[-1])))
    y_BLHP = y_BLHP / np.sqrt((y_BLHP**2).mean(axis=-1, keepdims=True) + 1e-5) * p["norm"]
    return np.einsum("blhp,hpd->bld", y_BLHP * zv[0] * sigmoid(zv[0]), p["out"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("negative", [False, True])
def test_the_layer_is_its_equations(negative, packed):
    params, x_BLD, start_BL = ALONE.params(), ALONE.inputs(), start_row() if packed else None
    config = dataclasses.replace(CONFIG, delta_negative=negative)
    y_BLD, _ = ALONE.compiled(delta_negative=negative)(params, x_BLD, None, start_BL)
    want_BLD = layer(params, x_BLD, start_BL, config)
    assert rel_rms(y_BLD, want_BLD) < FORWARD
    for name, array in params.items():  # every parameter counts, and one off by a part in a hundred is seen
        wrong = params | {name: array * np.float32(1.01)}
        if name in ("conv_q", "conv_k"):  # whose scale a norm takes away again
            wrong[name] = array + np.float32([0, 0, 0, 0.01])
        assert rel_rms(layer(wrong, x_BLD, start_BL, config), want_BLD) > FORWARD, name


def test_pieces_with_the_state_carried_are_the_whole():
    ALONE.check_pieces()


@pytest.mark.full
def test_initial_values():
    """Decays of A uniform in (0, 16) and dt log-uniform in [0.001, 0.1]."""
    config = dataclasses.replace(CONFIG, delta_heads=4096, delta_head_dim=1)
    like = jnp.zeros((1, 1, config.d_model))
    params = jax.tree.map(
        lambda box: np.asarray(box.value, np.float64),
        jax.jit(GatedDeltaNet(config).init)(jax.random.key(0), like)["params"],
        is_leaf=lambda x: hasattr(x, "value"),
    )
    a_H = np.exp(params["a_log"])
    assert abs(np.quantile(a_H, [0, 0.25, 0.5, 0.75, 1]) / 16 - np.linspace(0, 1, 5)).max() < 0.02
    log_dt_H = np.log10(np.log1p(np.exp(params["dt_bias"])))
    assert abs(np.quantile(log_dt_H, [0, 0.5, 1]) - [-3, -2, -1]).max() < 0.05
    assert (params["norm"] == 1).all()
    for name, inputs in {"in_qk": 16, "in_zv": 16, "in_ab": 16, "conv_q": 4, "conv_v": 4, "out": 4096}.items():
        bound = inputs**-0.5
        assert 0.97 * bound < np.abs(params[name]).max() <= bound * (1 + 1e-6), name


@pytest.mark.parametrize("start", [None, np.array([[True], [False]])], ids=["goes_on", "start"])
def test_a_token_is_a_step_and_more_are_chunks(start, monkeypatch):
    tokens, h_BHPN = drawn(False, length=2)
    first = jax.tree.map(lambda x: x[:, :1], tokens)._replace(start_BL=start)
    want = equations(first, h_BHPN)
    monkeypatch.setattr(deltas, "chunked", lambda tokens, h_BHPN, chunk: ("chunks of", chunk))
    assert all(rel_rms(got, wanted) < FORWARD for got, wanted in zip(delta(first, h_BHPN), want, strict=True))
    assert delta(tokens, h_BHPN) == ("chunks of", 64)
    assert delta(tokens, h_BHPN, 8) == ("chunks of", 8)


@pytest.mark.full
def test_long_rows_of_keys_alike_stay_exact():
    """1,000 tokens, chunks of 64: errors do not add up, and at b = 1 a state forgets what it had at k."""
    tokens, h_BHPN = drawn(False, length=1000)
    alike = np.broadcast_to(tokens.k_BLHN[:, :1], tokens.k_BLHN.shape)
    tokens = tokens._replace(k_BLHN=alike, b_BLH=np.ones_like(tokens.b_BLH))
    y_BLHP, after_BHPN = jax.jit(delta)(tokens, h_BHPN)
    want_BLHP, want_BHPN = equations(tokens, h_BHPN)
    assert rel_rms(y_BLHP, want_BLHP) < FORWARD
    assert rel_rms(after_BHPN, want_BHPN) < FORWARD


def test_bfloat16_is_close_and_keeps_its_dtypes():
    ALONE.check_bfloat16(layer(ALONE.params(), ALONE.inputs()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta_heads": 0, "delta_head_dim": 24}, r"config.delta_head_dim=24 is wider than config.d_model=16"),
        ({"dt_min": 0.2}, r"config.dt_min=0.2, config.dt_max=0.1: wanted dt_min <= dt_max"),
        ({"delta_expand": 0}, r"config.model.delta_expand=0 is not in 1 .. 256"),
        ({"d_conv": 1}, r"config.model.d_conv=1 is not in 2 .. 16"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(CONFIG, **changes))


def test_flops():
    config = dataclasses.replace(CONFIG, delta_expand=2)
    matrices = 16 * 3 * (2 * 8 + 2 * 16 + 2) + 3 * 16 * 16 + 8 * 16
    state = 3 * (6 * 8 * 16 + 2 * 4 * (8 + 8 + 16))
    assert flops_per_token(config, 64) == 3 * (2 * matrices + state)
