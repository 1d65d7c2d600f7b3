"""Initial values (SPEC section 10) of linear maps, as torch has them, of dt_bias and of a learned decay."""

import math

import jax
import jax.numpy as jnp


def linear(fan_in: int, scale: float = 1.0):
    """Draw from U(-b, b), b = scale / sqrt(fan_in): torch's default for a Linear, whatever axes the inputs lie on."""

    def draw(key, shape, dtype=jnp.float32):
        bound = scale / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw


def inverse_softplus_dt(dt_min: float, dt_max: float, floor: float):
    """Draw softplus^-1(dt) = dt + log(1 - exp(-dt)), dt log-uniform in [dt_min, dt_max] and at least `floor`."""

    def draw(key, shape, dtype=jnp.float32):
        log_dt = jax.random.uniform(key, shape, dtype, math.log(dt_min), math.log(dt_max))
        dt = jnp.maximum(jnp.exp(log_dt), floor)
        return dt + jnp.log(-jnp.expm1(-dt))

    return draw


def log_uniform(low: float, high: float):
    """Draw log u, u uniform in [low, high)."""

    def draw(key, shape, dtype=jnp.float32):
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return draw
