"""Mamba-2 against its equations token by token in float64, and what its convolution carries; see also test_model.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mamba2 import Mamba2
from mamba3_jax.model import validate
from mamba3_jax.ops.convolve import convolve
from mamba3_jax.train.flops import flops_per_token
from tests.helpers import rel_rms
from tests.model.alone import Alone, start_row

CONFIG = ModelConfig(vocab_size=8, d_model=16, pattern="2", d_state=8, head_dim=8, n_groups=2, expand=2, chunk=4)
ALONE = Alone(Mamba2, CONFIG)


def silu(x):
    return x / (1 + np.exp(-x))


def equations(params, x_BLD, config=CONFIG, start_BL=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t,  out = W RMSNorm(y silu(z)), by tokens."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    heads, width = p["skip"].shape[0], config.head_dim
    groups, d_state, taps = config.n_groups, config.d_state, config.d_conv
    out_BLD = np.zeros(x_BLD.shape)
    for row in range(len(x_BLD)):
        u_LD = x_BLD[row].astype(np.float64)
        zx, kq = np.einsum("ld,dchp->lchp", u_LD, p["in_zx"]), u_LD @ p["in_kq"]
        dt_LH = np.log1p(np.exp(u_LD @ p["in_dt"] + p["dt_bias"]))
        h_HPN, first = np.zeros((heads, width, d_state)), 0
        for t in range(len(u_LD)):
            if start_BL is not None and start_BL[row, t]:
                h_HPN, first = np.zeros_like(h_HPN), t
            seen = range(max(first, t - taps + 1), t + 1)
            x_HP = silu(p["conv_x_bias"] + sum(zx[s, 1] * p["conv_x"][..., taps - 1 - (t - s)] for s in seen))
            kq_E = silu(p["conv_kq_bias"] + sum(kq[s] * p["conv_kq"][..., taps - 1 - (t - s)] for s in seen))
            k_GN, q_GN = kq_E.reshape(2, groups, d_state)
            y_HP = np.zeros((heads, width))
            for head in range(heads):
                group = head // (heads // groups)
                h_HPN[head] *= np.exp(-dt_LH[t, head] * np.exp(p["a_log"][head]))
                h_HPN[head] += dt_LH[t, head] * np.outer(x_HP[head], k_GN[group])
                y_HP[head] = h_HPN[head] @ q_GN[group] + p["skip"][head] * x_HP[head]
            y = (y_HP * silu(zx[t, 0])).reshape(groups, -1)
            y = y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + 1e-5) * p["norm"].reshape(groups, -1)
            out_BLD[row, t] = np.einsum("hp,hpd->d", y.reshape(heads, width), p["out"])
    return out_BLD


@pytest.mark.parametrize("packed", [False, True])
def test_is_the_equations(packed):
    params, x_BLD, start_BL = ALONE.params(), ALONE.inputs(), start_row() if packed else None
    y_BLD, _ = ALONE.compiled()(params, x_BLD, None, start_BL)
    want_BLD = equations(params, x_BLD, start_BL=start_BL)
    assert rel_rms(y_BLD, want_BLD) < 1e-5
    for name, array in params.items():  # every parameter counts, and one off by a part in a hundred is seen
        wrong = params | {name: array * np.float32(1.01)}
        assert rel_rms(equations(wrong, x_BLD, start_BL=start_BL), want_BLD) > 1e-5, name


def test_pieces_with_the_state_carried_are_the_whole():
    ALONE.check_pieces()


def test_bfloat16_is_close_and_keeps_its_dtypes():
    ALONE.check_bfloat16(equations(ALONE.params(), ALONE.inputs()))


def test_no_value_and_no_gradient_of_another_document_reaches_a_convolution():
    """Bit for bit, NaN too; and what is handed on is of the last document alone."""
    random = np.random.default_rng(0)
    x_BLE, before_BWE = random.standard_normal((1, 6, 3)), random.standard_normal((1, 3, 3))
    weights, bias = random.standard_normal((3, 4)), random.standard_normal(3)
    start_BL = np.array([[0, 0, 1, 0, 1, 0]], bool)
    run = jax.jit(convolve)
    y_BLE, last_BWE = run(x_BLE, weights, bias, before_BWE, start_BL)
    spoilt = x_BLE.copy()
    spoilt[:, :4] = np.nan
    again_BLE, again_BWE = run(spoilt, weights, bias, np.full_like(before_BWE, np.nan), start_BL)
    np.testing.assert_array_equal(again_BLE[:, 4:], y_BLE[:, 4:])
    np.testing.assert_array_equal(again_BWE, last_BWE)
    np.testing.assert_array_equal(last_BWE[0, 0], 0)
    np.testing.assert_array_equal(last_BWE[0, 1:], np.float32(x_BLE[0, 4:]))
    pull = jax.vjp(lambda x_BLE, before: run(x_BLE, weights, bias, before, start_BL)[0], x_BLE, before_BWE)[1]
    of_x, of_before = pull(jnp.zeros_like(y_BLE).at[:, 4:].set(1.0))
    assert not np.any(of_x[:, :4])
    assert not np.any(of_before)
    assert np.all(np.any(of_x[:, 4:], axis=(0, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24}, r"d_inner=32 .* is not a positive multiple of config.head_dim=24"),
        ({"n_groups": 3}, r"heads=4 is not a multiple of config.n_groups=3"),
        ({"d_conv": 1}, r"config.model.d_conv=1 is not in 2 .. 16"),
        ({"implementation": "cuda"}, r"config.implementation='cuda' is not '' or one of"),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(CONFIG, **changes))


def test_flops():
    matrices = 16 * (2 * 32 + 2 * 2 * 8 + 4) + 32 * 16 + 8 * 16
    state = 4 * 32 * 8 + 2 * 4 * (32 + 2 * 2 * 8)
    assert flops_per_token(CONFIG, 64) == 3 * (2 * matrices + state)
