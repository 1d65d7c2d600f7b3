"""The error of each discretization falls with the order that it states; weights near no step at all keep their digits.

A smooth scalar equation h' = a(t) h + u(t) is integrated by `recurrent` in float64, with steps halved.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.discretize import DISCRETIZATIONS, later_weight, uses_previous
from mamba3_jax.ops.recurrent import recurrent
from mamba3_jax.ops.types import Heads, State, Tokens

END, STEPS = 3.0, (80, 160, 320)


def rate(t):
    return -1 - 0.5 * np.sin(2 * t)


def drive(t):
    return np.cos(3 * t) + 0.3 * t


def exact(t=END) -> float:
    """h(t) from h(0) = 1 by Runge and Kutta's fourth order, many times finer than what it is compared to."""
    slope = lambda t, h: rate(t) * h + drive(t)  # noqa: E731
    step, h = t / 20_000, 1.0
    for t in np.arange(20_000) * step:
        first = slope(t, h)
        second = slope(t + step / 2, h + step / 2 * first)
        third = slope(t + step / 2, h + step / 2 * second)
        h += step / 6 * (first + 2 * second + 2 * third + slope(t + step, h + step * third))
    return h


def integrated(rule: str, steps: int, *, logit=lambda dt: 0.0, rate_at: float = 0.5) -> float:
    """h(END), the rate of a step taken at this part of it."""
    dt = END / steps
    t_L = dt * np.arange(1, steps + 1)
    scalar = lambda x_L: np.broadcast_to(x_L, t_L.shape)[None, :, None]  # noqa: E731
    numbers = scalar(dt), scalar(rate(t_L - (1 - rate_at) * dt)), scalar(logit(dt))
    log_a_BLH, gamma_BLH, beta_BLH = jax.jit(DISCRETIZATIONS[rule])(*numbers)
    ones_BLRGN = np.ones((1, steps, 1, 1, 2))
    tokens = Tokens(ones_BLRGN, ones_BLRGN, scalar(drive(t_L))[..., None], None, log_a_BLH, gamma_BLH, beta_BLH)
    state = State(None, np.ones((1, 1, 1, 2)))
    if beta_BLH is not None:
        state = state._replace(k_BRHN=np.ones((1, 1, 1, 2)), v_BHP=np.full((1, 1, 1), drive(0.0)))
    _, after = jax.jit(recurrent, static_argnames="rotation")(tokens, Heads(), state, rotation="adjacent")
    return float(np.asarray(after.ssm_BHPN)[0, 0, 0, 0])


def order(rule: str, **how) -> list[float]:
    """log2 of what halving the step divides the error by."""
    with jax.enable_x64(True):
        want = exact()
        errors = [abs(integrated(rule, steps, **how) - want) for steps in STEPS]
    return [float(np.log2(errors[i] / errors[i + 1])) for i in range(len(errors) - 1)]


@pytest.mark.parametrize("rule", DISCRETIZATIONS)
def test_the_error_falls_with_the_stated_order(rule):
    """The best that its docstring states; lambda = 1/2 + O(dt), for who has one."""
    orders = re.findall(r"[Oo]rder (\d)", DISCRETIZATIONS[rule].__doc__ or "")
    assert orders, f"the docstring of {rule} does not say 'Order N'"
    stated = max(map(int, orders))
    np.testing.assert_allclose(order(rule, logit=lambda dt: 3 * dt), stated, atol=0.1)


@pytest.mark.parametrize("how", [{"logit": lambda dt: 1.0}, {"rate_at": 1.0}], ids=["lambda", "rate"])
def test_what_second_order_needs(how):
    """lambda = 1/2 + O(dt), and a rate that is the step's mean to second order: else the order is 1."""
    np.testing.assert_allclose(order("exponential_trapezoidal", **how), 1, atol=0.1)


@pytest.mark.parametrize("rule", DISCRETIZATIONS)
def test_weights_and_their_gradients_in_float32(rule):
    """As in float64, at any step: gamma of a short one is not a difference of numbers that are nearly equal."""
    sizes = np.meshgrid([1e-12, 1e-6, 1e-3, 0.2, 0.3, 1.0, 5.0], [-1e-4, -1.0, -16.0], indexing="ij")

    @jax.jit
    def values_and_slopes(*sizes):
        weights = lambda dt, a: [x for x in DISCRETIZATIONS[rule](dt, a, 0.5) if x is not None]  # noqa: E731
        basis = [jnp.ones_like(sizes[0]), jnp.zeros_like(sizes[0])]
        slopes = [jax.jvp(weights, sizes, tuple(along))[1] for along in (basis, basis[::-1])]
        return {"value": weights(*sizes), "by dt": slopes[0], "by a": slopes[1]}

    with jax.enable_x64(True):
        narrow = [np.float32(x) for x in sizes]
        got, want = values_and_slopes(*narrow), values_and_slopes(*map(np.float64, narrow))
    for name in got:
        least = 2**-23 if name == "by dt" else 1e-30  # that is exp(dt a), from 1 down, which jax has as expm1 + 1
        for x, exact_x in zip(got[name], want[name], strict=True):
            assert (x.dtype, exact_x.dtype) == (np.float32, np.float64)
            np.testing.assert_allclose(x, exact_x, rtol=1e-5, atol=least)


def test_zero_order_hold_at_no_rate_and_no_step():
    """Where expm1(dt a) / a would be 0 / 0."""
    rule = DISCRETIZATIONS["zero_order_hold"]
    weights, gradients = jax.jit(rule), jax.jit(jax.grad(lambda dt, a: rule(dt, a, 0.0)[1], argnums=(0, 1)))
    for dt, a in ((0.1, 0.0), (0.0, -1.0), (0.0, 0.0)):
        log_a, gamma, beta = weights(dt, a, 0.0)
        assert (float(log_a), float(gamma), beta) == (0, np.float32(dt), None)
        slopes = gradients(dt, a)
        np.testing.assert_allclose(slopes, (1, dt**2 / 2), rtol=1e-6)


def test_who_looks_back():
    for name, rule in DISCRETIZATIONS.items():
        assert uses_previous(name) == (rule(0.1, -1.0, 0.0)[2] is not None)
    assert uses_previous("midpoint")
    assert not uses_previous("exponential_euler")


def test_later_weight():
    gamma, beta = np.float32([[[1], [2], [4]]]), np.float32([[[10], [20], [40]]])
    start = np.array([[False, False, True]])
    for starts, want in (([], [21, 42, 4]), ([start], [21, 2, 4])):
        kappa, first = map(np.asarray, jax.jit(later_weight)(gamma, beta, *starts))
        assert (kappa.ravel().tolist(), first.tolist()) == (want, [[10]])
    assert later_weight(gamma, None, start) == (None, None)
