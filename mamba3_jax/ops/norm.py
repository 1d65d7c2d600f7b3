"""RMSNorm over the last axis."""

import jax
import jax.numpy as jnp

EPS = 1e-5


def rms_norm(x, scale):
    """Return x / sqrt(mean(x^2) + 1e-5) * scale, computed and returned in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS) * scale
