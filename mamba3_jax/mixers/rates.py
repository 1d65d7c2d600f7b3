"""How fast a head forgets: the decay rate -A of its state, before the discretization."""

import jax
import jax.numpy as jnp

A_RANGE = (1.0, 16.0)  # a learned -A is initially uniform in it, as in Mamba-2


def heavy_tail(u):
    """Return 1 + u for u >= 0, and 1 / (1 - u) below: positive, and slow to reach 0 or infinity."""
    # the branch not taken must stay finite, or its gradient is 0 * inf
    return jnp.where(u >= 0, 1 + u, 1 / (1 - jnp.minimum(u, 0)))


# -A from the token's own number and from the learned one, for each head.
A_FORMS = {
    "heavy_tail": lambda a_BLH, a_log_H: heavy_tail(a_BLH),
    "softplus": lambda a_BLH, a_log_H: jax.nn.softplus(a_BLH),
    "learned": lambda a_BLH, a_log_H: jnp.broadcast_to(jnp.exp(a_log_H), a_BLH.shape),
}
