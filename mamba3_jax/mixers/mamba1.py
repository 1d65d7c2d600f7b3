"""The Mamba-1 mixer (Gu and Dao 2023, arXiv 2312.00752): a short convolution and the selective scan."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mixer import KEPT, Mixer, both, check_dt
from mamba3_jax.nn.initial import inverse_softplus_dt, linear
from mamba3_jax.nn.precision import DTYPES
from mamba3_jax.ops.convolve import convolve
from mamba3_jax.ops.einsum import einsum
from mamba3_jax.ops.selective import Tokens, selective


class Carried(NamedTuple):
    """What a sequence leaves behind: the state, and what the convolution of the next tokens sees."""

    h_BIN: jax.Array  # float32
    # The convolution's inputs of the last W = d_conv - 1 tokens, 0 where a token belongs to an earlier document.
    x_BWI: jax.Array


class Mamba1(Mixer):
    """y, state = Mamba-1(x, state, start): in-projection, convolution, dt, B and C of its output, `ops.selective`, out.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t,   out = W (y silu(z))
        dt_t = softplus(W_dt (W_r x_t) + dt_bias)

    Each of the I = expand D channels has a dt and a row of A of its own; B and C are shared by all. Values are in the
    compute dtype; steps, decays and the scan are float32. It runs in plain XLA on every device:
    `config.implementation` is for other layers.
    """

    letter = "1"
    matrices = ("in_zx", "in_rkq", "in_dt", "out")
    splits_rows = True

    def setup(self):
        config, size = self.config, sizes(self.config)
        ones, taps = nn.initializers.ones, linear(config.d_conv)
        out = linear(size.channels, len(config.pattern) ** -0.5)
        dt = inverse_softplus_dt(config.dt_min, config.dt_max, config.dt_init_floor)
        wide = {"ff": size.channels}  # tensor parallelism splits channels as it splits a feed-forward

        self.in_zx = self.named("in_zx", linear(config.d_model), embed=config.d_model, pair=2, **wide)
        self.conv_x = self.named("conv_x", taps, **wide, taps=config.d_conv)
        self.conv_x_bias = self.named("conv_x_bias", taps, **wide)
        self.in_rkq = self.named("in_rkq", linear(size.channels), **wide, shared=size.rank + 2 * size.d_state)
        self.in_dt = self.named("in_dt", linear(size.rank), rank=size.rank, **wide)
        self.dt_bias = self.named("dt_bias", dt, **wide)
        self.a_log = self.named("a_log", log_counted, **wide, state=size.d_state)
        self.skip = self.named("skip", ones, **wide)
        self.out = self.named("out", out, **wide, embed=config.d_model)

    def __call__(self, x_BLD, state: Carried | None = None, start_BL=None):
        config, size, dtype = self.config, sizes(self.config), DTYPES[self.config.compute_dtype]
        before = self.empty_state(config, x_BLD.shape[0], 0) if state is None else state
        context = self.context(x_BLD, state)

        z_BLI, x_BLI = both(x_BLD, self.in_zx, dtype)
        x_BLI, x_BWI = convolve(x_BLI, self.conv_x, self.conv_x_bias, before.x_BWI, start_BL, context)
        rkq = einsum("bli,ie->ble", x_BLI, self.in_rkq, dtype=dtype, out=jnp.float32)
        r_BLR, k_BLN, q_BLN = jnp.split(rkq, np.cumsum([size.rank, size.d_state]), axis=-1)
        dt_BLI = einsum("blr,ri->bli", r_BLR, self.in_dt, dtype=dtype, out=jnp.float32)
        tokens = Tokens(
            x_BLI=x_BLI,
            dt_BLI=jax.nn.softplus(dt_BLI + self.dt_bias),
            k_BLN=k_BLN,
            q_BLN=q_BLN,
            start_BL=start_BL,
        )
        a_IN = -jnp.exp(self.a_log)
        self.observe(dt=tokens.dt_BLI, a=a_IN)
        op = functools.partial(selective, chunk=config.chunk or None, context=context)
        op = jax.checkpoint(op) if config.remat in KEPT else op
        y_BLI, h_BIN = op(tokens, a_IN, before.h_BIN)
        y_BLI = y_BLI.astype(jnp.float32) + self.skip * x_BLI.astype(jnp.float32)
        y_BLI = (y_BLI * jax.nn.silu(z_BLI.astype(jnp.float32))).astype(dtype)
        return einsum("bli,id->bld", y_BLI, self.out, dtype=dtype), Carried(h_BIN=h_BIN, x_BWI=x_BWI)

    @staticmethod
    def empty_state(config: ModelConfig, batch: int, capacity: int) -> Carried:
        """Return zeros; `capacity` has no meaning for a state of fixed size."""
        size, dtype = sizes(config), DTYPES[config.compute_dtype]
        return Carried(
            h_BIN=jnp.zeros((batch, size.channels, size.d_state), jnp.float32),
            x_BWI=jnp.zeros((batch, config.d_conv - 1, size.channels), dtype),
        )

    @staticmethod
    def memory(state: Carried):
        """Return h, in which each channel is a row."""
        return state.h_BIN

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raise ValueError for sizes or choices that no Mamba-1 layer can have."""
        check_dt(config)

    @staticmethod
    def state_flops(config: ModelConfig, length: int) -> float:
        """Count 2 I N FLOPs to write the state and as many to read it, and 2 K for each channel convolved."""
        size = sizes(config)
        return size.channels * (4 * size.d_state + 2 * config.d_conv)


class Sizes(NamedTuple):
    """What a config implies for one layer."""

    channels: int
    d_state: int
    rank: int  # of dt's projection


def sizes(config: ModelConfig) -> Sizes:
    """Return the sizes of a config's layer: I = expand D; without mamba1_rank, the rank of dt is D / 16, rounded up."""
    return Sizes(
        channels=config.expand * config.d_model,
        d_state=config.mamba1_state,
        rank=config.mamba1_rank or -(-config.d_model // 16),
    )


def log_counted(key, shape, dtype=jnp.float32):
    """Return log n for n = 1..N in every channel: S4D-real."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)
