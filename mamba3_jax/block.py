"""One layer: a norm and a mixer, then, where d_ff > 0, a norm and a feed-forward, each added to the residual stream."""

import flax.linen as nn

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers import MIXERS
from mamba3_jax.nn.feedforward import SwiGLU
from mamba3_jax.nn.norm import NORMS
from mamba3_jax.nn.precision import DTYPES


class Block(nn.Module):
    """r <- r + mixer(norm1(r));  r <- r + mlp(norm2(r)).  r keeps its dtype, whatever dtype the mixer computes in."""

    config: ModelConfig
    mixer: str

    @nn.compact
    def __call__(self, residual_BLD, state, start_BL):
        config, dtype = self.config, DTYPES[self.config.compute_dtype]
        norm = NORMS[config.norm]
        mixer = MIXERS[self.mixer](config, name="mixer")
        y_BLD, state = mixer(norm(dtype, name="norm1")(residual_BLD), state, start_BL)
        residual_BLD += y_BLD.astype(residual_BLD.dtype)
        if config.d_ff:
            mlp = SwiGLU(config.d_ff, dtype, out_scale=len(config.pattern) ** -0.5, name="mlp")
            y_BLD = mlp(norm(dtype, name="norm2")(residual_BLD))
            residual_BLD += y_BLD.astype(residual_BLD.dtype)
        residual_BLD = nn.with_logical_constraint(residual_BLD, ("batch", "length", None))
        return residual_BLD, state
