"""Exponential-trapezoidal discretization (paper eqs. 5 and 6): a token's weight now and one step later."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def trapezoid(
    dt_BLH: Float[Array, "B L H"], trap_BLH: Float[Array, "B L H"], start_BL: Bool[Array, "B L"] | None = None
) -> tuple[Float[Array, "B L H"], Float[Array, "B L H"], Float[Array, "B H"]]:
    """gamma_t = lambda_t dt_t,  kappa_t = gamma_t + (1 - lambda_{t+1}) dt_{t+1}.

    h_t = a_t h_{t-1} + (1 - lambda_t) dt_t a_t v_{t-1} k_{t-1}^T + gamma_t v_t k_t^T: token t+1 adds
    (1 - lambda_{t+1}) dt_{t+1} a_{t+1} v_t k_t^T, which decays exactly as token t's own input does. So it is part of
    token t's weight kappa_t for every later output, and only the output at t itself uses gamma_t.

    Returns gamma_BLH, kappa_BLH (kappa = gamma at the last token of the row and of every document) and first_BH, what
    token 0 adds for the token before the row (zero where token 0 starts a document).
    """
    gamma_BLH = trap_BLH * dt_BLH
    previous_BLH = (1 - trap_BLH) * dt_BLH
    if start_BL is not None:
        previous_BLH = jnp.where(start_BL[..., None], 0, previous_BLH)
    next_BLH = jnp.pad(previous_BLH[:, 1:], ((0, 0), (0, 1), (0, 0)))
    return gamma_BLH, gamma_BLH + next_BLH, previous_BLH[:, 0]
