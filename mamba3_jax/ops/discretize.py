"""From the continuous equation h' = a h + u, u = X k^T, to the weights of one step of the op.

    h_t = exp(log_a_t) (h_{t-1} + beta_t u_{t-1}) + gamma_t u_t

A rule is a function (dt, a, logit) -> (log_a, gamma, beta) and a line in `DISCRETIZATIONS`; the op knows none of them.
dt > 0 is the step, a < 0 the rate during it, and logit a number that the model computes for rules with a parameter. If
beta is None, the previous token's input has no weight.

Each rule states the order of its error at a fixed time as the steps get shorter. Where a varies, dt a stands for its
integral over the step. A rule has order 2 only if dt a is that integral to third order, as it is with a at the middle
of the step; with a at the end of the step every rule has order 1.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def exponential_trapezoidal(dt, a, logit):
    """lambda = sigmoid(logit), log_a = dt a, gamma = lambda dt, beta = (1 - lambda) dt (paper eqs. 5 and 6).

    Weighs the integrand at both ends of the step. Order 1; order 2 where lambda = 1/2 + O(dt), which is learned.
    """
    trap = jax.nn.sigmoid(logit)
    return dt * a, trap * dt, (1 - trap) * dt


def midpoint(dt, a, logit):
    """log_a = dt a, gamma = beta = dt / 2.

    Is `exponential_trapezoidal` with lambda = 1/2, the trapezoidal rule itself. Order 2.
    """
    del logit
    return dt * a, dt / 2, dt / 2


def exponential_euler(dt, a, logit):
    """log_a = dt a, gamma = dt: Mamba-2's rule, `exponential_trapezoidal` with lambda = 1. Order 1."""
    del logit
    return dt * a, dt, None


def zero_order_hold(dt, a, logit):
    """log_a = dt a, gamma = expm1(dt a) / a: exact for an input that holds its new value over the step. Order 1."""
    del logit
    log_a = dt * a
    # Near 0 the derivative by a, (dt e^x - expm1(x) / a) / a, would lose all digits. A series in x = dt a takes its
    # place there, whose missing terms are below 1e-18.
    near = jnp.abs(log_a) < 0.25
    x, far = jnp.where(near, log_a, 0), jnp.where(near, -1, a)
    series = jnp.zeros_like(x)
    for power in range(13, -1, -1):
        series = series * x + 1 / math.factorial(power + 1)
    return log_a, jnp.where(near, dt * series, jnp.expm1(dt * far) / far), None


def backward_euler(dt, a, logit):
    """log_a = -log1p(-dt a), gamma = dt / (1 - dt a): h_t = h_{t-1} + dt (a h_t + u_t). Order 1."""
    del logit
    return -jnp.log1p(-dt * a), dt / (1 - dt * a), None


DISCRETIZATIONS = {
    "exponential_trapezoidal": exponential_trapezoidal,
    "midpoint": midpoint,
    "exponential_euler": exponential_euler,
    "zero_order_hold": zero_order_hold,
    "backward_euler": backward_euler,
}


def uses_previous(name: str) -> bool:
    """Tell whether a rule of the table weighs the previous token's input: its beta is not None."""
    number = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.eval_shape(DISCRETIZATIONS[name], number, number, number)[2] is not None


def later_weight(
    gamma_BLH: Float[Array, "B L H"], beta_BLH: Float[Array, "B L H"] | None, start_BL: Bool[Array, "B L"] | None = None
) -> tuple[Float[Array, "B L H"] | None, Float[Array, "B H"] | None]:
    """kappa_t = gamma_t + beta_{t+1}, the weight of a token in every output after its own.

    Token t+1 adds a_{t+1} beta_{t+1} X_t k_t^T, which decays exactly as token t's own input does. So beta_{t+1} is part
    of token t's weight kappa_t for every later output, and only the output at t itself uses gamma_t.

    Returns:
        kappa_BLH, which is gamma at the last token of the row and of every document, and first_BH, the weight that
        token 0 adds to the token before the row, zero where token 0 starts a document. Both are None without beta:
        kappa is then gamma.
    """
    if beta_BLH is None:
        return None, None
    if start_BL is not None:
        beta_BLH = jnp.where(start_BL[..., None], 0, beta_BLH)
    next_BLH = jnp.pad(beta_BLH[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return gamma_BLH + next_BLH, beta_BLH[:, 0]
