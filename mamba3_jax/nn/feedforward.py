"""The feed-forward between mixers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mamba3_jax.nn.initial import linear
from mamba3_jax.ops.einsum import einsum


class SwiGLU(nn.Module):
    """y = out(value(x) silu(gate(x))), without biases; `out_scale` scales the initial values of `out`."""

    width: int
    dtype: jnp.dtype
    out_scale: float

    @nn.compact
    def __call__(self, x_BLD):
        d_model = x_BLD.shape[-1]
        into = nn.with_logical_partitioning(linear(d_model), ("embed", "ff"))
        back = nn.with_logical_partitioning(linear(self.width, self.out_scale), ("ff", "embed"))
        value_DF = self.param("value", into, (d_model, self.width))
        gate_DF = self.param("gate", into, (d_model, self.width))
        out_FD = self.param("out", back, (self.width, d_model))

        value_BLF = einsum("bld,df->blf", x_BLD, value_DF, dtype=self.dtype)
        gate_BLF = einsum("bld,df->blf", x_BLD, gate_DF, dtype=self.dtype)
        return einsum("blf,fd->bld", value_BLF * jax.nn.silu(gate_BLF), out_FD, dtype=self.dtype)
