"""How fast a head forgets: the decay rate -A of its state, before the discretization."""

import jax
import jax.numpy as jnp

A_RANGE = (1.0, 16.0)  # -A of the heads before training where it is learned, uniform: Mamba-2's


def heavy_tail(u):
    """f(u) = 1 + u for u >= 0, 1 / (1 - u) below: positive, and slow to reach 0 or infinity."""
    # the branch not taken must stay finite, or its gradient is 0 * inf
    return jnp.where(u >= 0, 1 + u, 1 / (1 - jnp.minimum(u, 0)))


# -A of what the token says, and of what is learned, a number a head.
A_FORMS = {
    "heavy_tail": lambda a_BLH, a_log_H: heavy_tail(a_BLH),
    "softplus": lambda a_BLH, a_log_H: jax.nn.softplus(a_BLH),
    "learned": lambda a_BLH, a_log_H: jnp.broadcast_to(jnp.exp(a_log_H), a_BLH.shape),
}
