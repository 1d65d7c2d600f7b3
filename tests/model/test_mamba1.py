"""Mamba-1 against its equations token by token in float64: values, gradients, pieces, documents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mamba1 import Mamba1
from mamba3_jax.model import validate
from mamba3_jax.ops.selective import Tokens, selective
from mamba3_jax.train.flops import flops_per_token
from tests.helpers import first, rel_rms
from tests.model.alone import BATCH, FORWARD, LENGTH, Alone, start_row

CONFIG = ModelConfig(vocab_size=8, d_model=20, pattern="1", mamba1_state=5, chunk=4)  # dt of rank 2
ALONE = Alone(Mamba1, CONFIG)
CHANNELS, STATE = 6, 5
GRADIENT = 2e-5


def drawn(length=LENGTH, seed=0):
    """Tokens of the op without starts, decays and a state."""
    random = np.random.default_rng(seed)
    normal = lambda *sizes: random.standard_normal(sizes).astype(np.float32)  # noqa: E731
    tokens = Tokens(
        x_BLI=normal(BATCH, length, CHANNELS),
        dt_BLI=np.log1p(np.exp(normal(BATCH, length, CHANNELS))),
        k_BLN=normal(BATCH, length, STATE),
        q_BLN=normal(BATCH, length, STATE),
        start_BL=None,
    )
    return tokens, -np.exp(0.5 * normal(CHANNELS, STATE)), normal(BATCH, CHANNELS, STATE)


def equations(tokens: Tokens, a_IN, h_BIN):
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t k_t^T, y_t = h_t q_t, by tokens."""
    h_BIN, outputs, wide = np.float64(h_BIN), [], lambda x: np.asarray(x, np.float64)
    for t in range(tokens.x_BLI.shape[1]):
        if tokens.start_BL is not None:
            h_BIN = np.where(tokens.start_BL[:, t, None, None], 0, h_BIN)
        dt_BI = wide(tokens.dt_BLI[:, t])
        h_BIN = np.exp(dt_BI[..., None] * wide(a_IN)) * h_BIN
        h_BIN = h_BIN + (dt_BI * wide(tokens.x_BLI[:, t]))[..., None] * wide(tokens.k_BLN[:, t])[:, None]
        outputs.append(np.einsum("bin,bn->bi", h_BIN, wide(tokens.q_BLN[:, t])))
    return np.stack(outputs, axis=1), h_BIN


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_chunks_are_the_equations(chunk, packed):
    tokens, a_IN, h_BIN = drawn()
    tokens = tokens._replace(start_BL=start_row() if packed else None)
    want = equations(tokens, a_IN, h_BIN)
    for got, wanted in zip(jax.jit(selective, static_argnums=3)(tokens, a_IN, h_BIN, chunk), want, strict=True):
        assert rel_rms(got, wanted) < FORWARD
        assert rel_rms(got * (1 + 1e-3), wanted) > 10 * FORWARD  # a planted error
    assert rel_rms(equations(tokens, a_IN * np.float32(1.001), h_BIN)[0], want[0]) > 10 * FORWARD


@pytest.mark.parametrize("packed", first([True, False]))
def test_gradients_are_those_of_the_equations(packed):
    """Of everything, the incoming state and through the outgoing one too: float64 differences along a random way."""
    (tokens, a_IN, h_BIN), random = drawn(), np.random.default_rng(1)
    arrays, start_BL = (*tokens[:4], a_IN, h_BIN), start_row() if packed else None
    dy, dh = random.standard_normal(tokens.x_BLI.shape), random.standard_normal(h_BIN.shape)

    def loss(op, x_BLI, dt_BLI, k_BLN, q_BLN, a_IN, h_BIN):
        tokens = Tokens(x_BLI=x_BLI, dt_BLI=dt_BLI, k_BLN=k_BLN, q_BLN=q_BLN, start_BL=start_BL)
        y_BLI, after_BIN = op(tokens, a_IN, h_BIN)
        return (y_BLI * dy).sum() + (after_BIN * dh).sum()

    for chunk in (4, 16):
        op = functools.partial(selective, chunk=chunk)
        for place, got in enumerate(jax.jit(jax.grad(functools.partial(loss, op), argnums=range(6)))(*arrays)):
            way = random.standard_normal(got.shape)
            at = lambda e: loss(equations, *arrays[:place], arrays[place] + e * way, *arrays[place + 1 :])  # noqa: B023, E731
            want, found = (at(1e-5) - at(-1e-5)) / 2e-5, np.sum(np.float64(got) * way)
            scale = np.sqrt(np.sum(np.square(np.float64(got) * way)))  # of what is summed
            assert abs(found - want) < GRADIENT * scale
            assert abs(found * (1 + 1e-3) - want) > GRADIENT * scale or abs(want) < scale / 10  # a planted error


def test_no_gradient_crosses_a_boundary():
    """Exactly zero, of tokens and of the incoming state; in the second row, one document, there are some."""
    tokens, a_IN, h_BIN = drawn()
    last_BLI = np.zeros_like(tokens.x_BLI)
    last_BLI[:, 9:] = 1
    run = lambda tokens, h_BIN: selective(tokens._replace(start_BL=start_row()), a_IN, h_BIN, 8)[0]  # noqa: E731
    of_tokens, of_h_BIN = jax.vjp(run, tokens, h_BIN)[1](jnp.asarray(last_BLI))
    for name, array in of_tokens._asdict().items():
        if name != "start_BL":
            assert not np.any(array[0, :9]), name
            assert np.any(array[1, :9]) == (name != "q_BLN")
    assert not np.any(of_h_BIN[0])
    assert np.any(of_h_BIN[1])


@pytest.mark.full
def test_memory_is_that_of_a_chunk():
    """Of gradients too: states of all tokens would be N times the inputs."""
    state, length = 64, 2048
    shapes = (
        Tokens(
            x_BLI=jax.ShapeDtypeStruct((1, length, 32), jnp.float32),
            dt_BLI=jax.ShapeDtypeStruct((1, length, 32), jnp.float32),
            k_BLN=jax.ShapeDtypeStruct((1, length, state), jnp.float32),
            q_BLN=jax.ShapeDtypeStruct((1, length, state), jnp.float32),
            start_BL=jax.ShapeDtypeStruct((1, length), bool),
        ),
        jax.ShapeDtypeStruct((32, state), jnp.float32),
        jax.ShapeDtypeStruct((1, 32, state), jnp.float32),
    )
    gradient = jax.grad(lambda *args: jnp.sum(selective(*args)[0]), argnums=(1, 2))
    held = jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert held < length * 32 * state * 4 / 2


def silu(x):
    return x / (1 + np.exp(-x))


def layer(params, x_BLD, start_BL=None, config=CONFIG):
    """The layer by its equations: convolution token by token, the recurrence, skip and gate."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    zx, taps = np.einsum("bld,dci->cbli", x_BLD.astype(np.float64), p["in_zx"]), config.d_conv
    start_BL = np.zeros(x_BLD.shape[:2], bool) if start_BL is None else start_BL
    first_BL = np.maximum.accumulate(np.where(start_BL, np.arange(x_BLD.shape[1]), 0), axis=1)
    x_BLI = np.broadcast_to(p["conv_x_bias"], zx[1].shape).copy()
    for row, t in np.ndindex(x_BLD.shape[:2]):
        for s in range(max(first_BL[row, t], t - taps + 1), t + 1):
            x_BLI[row, t] += zx[1][row, s] * p["conv_x"][:, taps - 1 - (t - s)]
    x_BLI = silu(x_BLI)
    rkq, rank, state = x_BLI @ p["in_rkq"], p["in_dt"].shape[0], config.mamba1_state
    tokens = Tokens(
        x_BLI=x_BLI,
        dt_BLI=np.log1p(np.exp(rkq[..., :rank] @ p["in_dt"] + p["dt_bias"])),
        k_BLN=rkq[..., rank : rank + state],
        q_BLN=rkq[..., rank + state :],
        start_BL=start_BL,
    )
    y_BLI, _ = equations(tokens, -np.exp(p["a_log"]), np.zeros((len(x_BLD), *p["a_log"].shape)))
    return (y_BLI + p["skip"] * x_BLI) * silu(zx[0]) @ p["out"]


@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_is_its_equations(packed):
    params, x_BLD, start_BL = ALONE.params(), ALONE.inputs(), start_row() if packed else None
    y_BLD, _ = ALONE.compiled()(params, x_BLD, None, start_BL)
    want_BLD = layer(params, x_BLD, start_BL)
    assert rel_rms(y_BLD, want_BLD) < FORWARD
    for name, array in params.items():  # every parameter counts, and one off by a part in a hundred is seen
        wrong = params | {name: array * np.float32(1.01)}
        assert rel_rms(layer(wrong, x_BLD, start_BL), want_BLD) > FORWARD, name


def test_pieces_with_the_state_carried_are_the_whole():
    ALONE.check_pieces()


def test_bfloat16_is_close_and_keeps_its_dtypes():
    ALONE.check_bfloat16(layer(ALONE.params(), ALONE.inputs()))


@pytest.mark.full
def test_initial_values():
    """A = -1..-N in every channel, dt log-uniform in [0.001, 0.1]."""
    config = dataclasses.replace(CONFIG, expand=200)
    boxed = jax.jit(Mamba1(config).init)(jax.random.key(0), jnp.zeros((1, 1, config.d_model)))["params"]
    params = jax.tree.map(lambda box: np.asarray(box.value), boxed, is_leaf=lambda x: hasattr(x, "value"))
    np.testing.assert_allclose(np.exp(params["a_log"]), np.broadcast_to(np.arange(1, 6), (4000, 5)), rtol=1e-6)
    log_dt_I = np.log10(np.log1p(np.exp(np.float64(params["dt_bias"]))))
    assert abs(np.quantile(log_dt_I, [0, 0.5, 1]) - [-3, -2, -1]).max() < 0.05
    assert (params["skip"] == 1).all()
    inputs_of = {"in_zx": 20, "conv_x": 4, "conv_x_bias": 4, "in_rkq": 4000, "in_dt": 2, "out": 4000}
    for name, count in inputs_of.items():
        assert 0.97 * count**-0.5 < np.abs(params[name]).max() <= count**-0.5 * (1 + 1e-6), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dt_min": 0.2}, r"config.dt_min=0.2, config.dt_max=0.1: wanted dt_min <= dt_max"),
        ({"mamba1_state": 0}, r"config.model.mamba1_state=0 is not in 1 .. 65536"),
        ({"d_conv": 1}, r"config.model.d_conv=1 is not in 2 .. 16"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(CONFIG, **changes))


def test_flops():
    matrices = 20 * 2 * 40 + 40 * (2 + 2 * 5) + 2 * 40 + 40 * 20 + 8 * 20
    state = 40 * (4 * 5 + 2 * 4)
    assert flops_per_token(CONFIG, 64) == 3 * (2 * matrices + state)
