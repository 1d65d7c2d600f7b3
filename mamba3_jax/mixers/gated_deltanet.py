"""The Gated DeltaNet mixer (Yang et al. 2024, arXiv 2412.06464): short convolutions and the gated delta rule."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mixer import KEPT, Mixer, both, check_dt
from mamba3_jax.nn.initial import inverse_softplus_dt, linear, log_uniform
from mamba3_jax.nn.norm import rms_norm
from mamba3_jax.nn.precision import DTYPES
from mamba3_jax.ops.convolve import convolve
from mamba3_jax.ops.delta import Tokens, delta
from mamba3_jax.ops.einsum import einsum

A_RANGE = (1e-4, 16.0)  # exp(a_log) is initially uniform in it; the official range begins at 0, which has no logarithm
EPS = 1e-6  # added to the squared length of a query or key


class Carried(NamedTuple):
    """What a sequence leaves behind: the state, and what the convolutions of the next tokens see."""

    h_BHPN: jax.Array  # float32
    # The convolutions' inputs of the last W = d_conv - 1 tokens, 0 where a token belongs to an earlier document.
    q_BWHN: jax.Array
    k_BWHN: jax.Array
    v_BWHP: jax.Array


class GatedDeltaNet(Mixer):
    """y, state = Gated DeltaNet(x, state, start): projections, short convolutions, `ops.delta`, gated norm, out.

        h_t = a_t h_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,   out = W (RMSNorm(h_t q_t) silu(z_t))
        a_t = exp(-exp(a_log) softplus(W_a x_t + dt_bias)),   b_t = sigmoid(W_b x_t), doubled with delta_negative

    q, k and v are convolved and pass a SiLU; in each head q and k are then divided by their length. The norm is over
    the channels of a head, with one weight for all heads. The official layer divides q by sqrt(N), which the norm
    undoes up to its epsilon. Values are in the compute dtype; decays, sums and the triangular solve are float32. It
    runs in plain XLA on every device: `config.implementation` is for other layers.
    """

    letter = "G"
    matrices = ("in_qk", "in_zv", "in_ab", "out")
    splits_rows = True

    def setup(self):
        config, size = self.config, sizes(self.config)
        axes = {"heads": size.heads, "state": size.d_state}
        values = {"heads": size.heads, "head_dim": size.head_dim}
        into, taps = linear(config.d_model), linear(config.d_conv)
        out = linear(size.heads * size.head_dim, len(config.pattern) ** -0.5)
        dt = inverse_softplus_dt(config.dt_min, config.dt_max, config.dt_init_floor)

        self.in_qk = self.named("in_qk", into, embed=config.d_model, pair=2, **axes)
        self.in_zv = self.named("in_zv", into, embed=config.d_model, pair=2, **values)
        self.in_ab = self.named("in_ab", into, embed=config.d_model, pair=2, heads=size.heads)
        self.conv_q = self.named("conv_q", taps, **axes, taps=config.d_conv)
        self.conv_k = self.named("conv_k", taps, **axes, taps=config.d_conv)
        self.conv_v = self.named("conv_v", taps, **values, taps=config.d_conv)
        self.dt_bias = self.named("dt_bias", dt, heads=size.heads)
        self.a_log = self.named("a_log", log_uniform(*A_RANGE), heads=size.heads)
        self.norm = self.named("norm", nn.initializers.ones, head_dim=size.head_dim)
        self.out = self.named("out", out, **values, embed=config.d_model)

    def __call__(self, x_BLD, state: Carried | None = None, start_BL=None):
        config, dtype = self.config, DTYPES[self.config.compute_dtype]
        before = self.empty_state(config, x_BLD.shape[0], 0) if state is None else state
        context = self.context(x_BLD, state)

        q_BLHN, k_BLHN = both(x_BLD, self.in_qk, dtype)
        z_BLHP, v_BLHP = both(x_BLD, self.in_zv, dtype)
        ab = einsum("bld,dch->blch", x_BLD, self.in_ab, dtype=dtype, out=jnp.float32)
        q_BLHN, q_BWHN = convolve(q_BLHN, self.conv_q, 0, before.q_BWHN, start_BL, context)
        k_BLHN, k_BWHN = convolve(k_BLHN, self.conv_k, 0, before.k_BWHN, start_BL, context)
        v_BLHP, v_BWHP = convolve(v_BLHP, self.conv_v, 0, before.v_BWHP, start_BL, context)
        tokens = Tokens(
            q_BLHN=unit(q_BLHN),
            k_BLHN=unit(k_BLHN),
            v_BLHP=v_BLHP,
            log_a_BLH=-jnp.exp(self.a_log) * jax.nn.softplus(ab[:, :, 0] + self.dt_bias),
            b_BLH=jax.nn.sigmoid(ab[:, :, 1]) * (2 if config.delta_negative else 1),
            start_BL=start_BL,
        )
        self.observe(log_a=tokens.log_a_BLH, b=tokens.b_BLH)
        op = functools.partial(delta, chunk=config.chunk or None, context=context)
        op = jax.checkpoint(op) if config.remat in KEPT else op
        y_BLHP, h_BHPN = op(tokens, before.h_BHPN)
        y_BLHP = rms_norm(y_BLHP, self.norm) * jax.nn.silu(z_BLHP.astype(jnp.float32))
        y_BLD = einsum("blhp,hpd->bld", y_BLHP.astype(dtype), self.out, dtype=dtype)
        return y_BLD, Carried(h_BHPN=h_BHPN, q_BWHN=q_BWHN, k_BWHN=k_BWHN, v_BWHP=v_BWHP)

    @staticmethod
    def empty_state(config: ModelConfig, batch: int, capacity: int) -> Carried:
        """Return zeros; `capacity` has no meaning for a state of fixed size."""
        (heads, width, d_state), dtype = sizes(config), DTYPES[config.compute_dtype]
        keys = jnp.zeros((batch, config.d_conv - 1, heads, d_state), dtype)
        return Carried(
            h_BHPN=jnp.zeros((batch, heads, width, d_state), jnp.float32),
            q_BWHN=keys,
            k_BWHN=keys,
            v_BWHP=jnp.zeros((batch, config.d_conv - 1, heads, width), dtype),
        )

    @staticmethod
    def memory(state: Carried):
        """Return h."""
        return state.h_BHPN

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raise ValueError for sizes or choices that no gated DeltaNet layer can have."""
        check_dt(config)
        if not sizes(config).heads:
            raise ValueError(f"{config.delta_head_dim=} is wider than {config.d_model=}: wanted delta_heads or less")

    @staticmethod
    def state_flops(config: ModelConfig, length: int) -> float:
        """Count 2 H P N FLOPs each to read the state at k, to read it at q and to write it, and the convolutions'."""
        size = sizes(config)
        return size.heads * (6 * size.head_dim * size.d_state + 2 * config.d_conv * (2 * size.d_state + size.head_dim))


class Sizes(NamedTuple):
    """What a config implies for one layer."""

    heads: int
    head_dim: int  # of values
    d_state: int  # of queries and keys


def sizes(config: ModelConfig) -> Sizes:
    """Return the sizes of a config's layer: P = delta_expand N; without delta_heads, H = d_model // N."""
    heads = config.delta_heads or config.d_model // config.delta_head_dim
    return Sizes(heads=heads, head_dim=config.delta_expand * config.delta_head_dim, d_state=config.delta_head_dim)


def unit(x_BLHN):
    """Return x / |x|, computed in float32, in x's dtype."""
    wide = x_BLHN.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + EPS)).astype(x_BLHN.dtype)
