"""RMSNorm and LayerNorm over the last axis, with float32 statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mamba3_jax.ops.norm import EPS, rms_norm

__all__ = ["NORMS", "LayerNorm", "RMSNorm", "named", "rms_norm"]


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale, returned in `dtype`."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD):
        scale_D = self.param("scale", named(nn.initializers.ones), x_BLD.shape[-1:])
        return rms_norm(x_BLD, scale_D).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * scale + bias, computed in float32 and returned in `dtype`."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD):
        scale_D = self.param("scale", named(nn.initializers.ones), x_BLD.shape[-1:])
        bias_D = self.param("bias", named(nn.initializers.zeros), x_BLD.shape[-1:])
        x_BLD = x_BLD.astype(jnp.float32)
        x_BLD = x_BLD - jnp.mean(x_BLD, axis=-1, keepdims=True)
        variance_BL1 = jnp.mean(jnp.square(x_BLD), axis=-1, keepdims=True)
        return (x_BLD * jax.lax.rsqrt(variance_BL1 + EPS) * scale_D + bias_D).astype(self.dtype)


def named(initializer):
    """Return the initializer of a vector as wide as the model, with the name of its logical axis."""
    return nn.with_logical_partitioning(initializer, ("embed",))


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
