"""The Mamba-2 mixer (arXiv:2405.21060): a short convolution, and the op without rotation, biases and beta."""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mixer import Mixer, both, check_op, head_count
from mamba3_jax.mixers.official import Piece, Row, same, weight
from mamba3_jax.mixers.rates import A_RANGE
from mamba3_jax.mixers.short_convolution import Window, channels, convolution_flops, convolved, empty_window, taps_of
from mamba3_jax.nn.initial import inverse_softplus_dt, linear, log_uniform
from mamba3_jax.nn.norm import rms_norm
from mamba3_jax.nn.precision import DTYPES
from mamba3_jax.ops.discretize import exponential_euler
from mamba3_jax.ops.einsum import einsum
from mamba3_jax.ops.ssm import Heads, State, Tokens


class Carried(NamedTuple):
    """What a sequence leaves behind: the op's state, and what the convolution of the next tokens sees."""

    ssm: State
    window: Window


class Mamba2(Mixer):
    """y, state = Mamba-2(x, state, start): in-projection, convolution of x, B and C, `ops.ssm`, gated norm, out.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t,  out = W RMSNorm(y silu(z))

    A is learned, one number for each head. The norm comes after the gate and is over the channels of each group, as in
    the official layer. Sizes come from the same fields as Mamba-3's; `d_conv` is its own. Values are in the compute
    dtype; steps, decays and sums are float32.
    """

    letter = "2"
    matrices = ("in_zx", "in_kq", "in_dt", "out")
    splits_rows = True
    official: ClassVar = {}  # every choice that a config has here, the official layer has too

    def setup(self):
        config = self.config
        d_model, heads, width = config.d_model, head_count(config), config.head_dim
        ones, into = nn.initializers.ones, linear(d_model)
        out = linear(heads * width, len(config.pattern) ** -0.5)
        dt = inverse_softplus_dt(config.dt_min, config.dt_max, config.dt_init_floor)

        self.in_zx = self.named("in_zx", into, embed=d_model, pair=2, heads=heads, head_dim=width)
        self.in_kq = self.named("in_kq", into, embed=d_model, shared=channels(config)["shared"])
        self.in_dt = self.named("in_dt", into, embed=d_model, heads=heads)
        self.taps = taps_of(self, config.d_conv, **channels(config))
        self.dt_bias = self.named("dt_bias", dt, heads=heads)
        self.a_log = self.named("a_log", log_uniform(*A_RANGE), heads=heads)
        self.skip = self.named("skip", ones, heads=heads)
        self.norm = self.named("norm", ones, heads=heads, head_dim=width)
        self.out = self.named("out", out, heads=heads, head_dim=width, embed=d_model)

    def __call__(self, x_BLD, state: Carried | None = None, start_BL=None):
        config, dtype = self.config, DTYPES[self.config.compute_dtype]
        batch, length, groups = *x_BLD.shape[:2], config.n_groups
        before, window = (None, None) if state is None else (state.ssm, state.window)
        context = self.context(x_BLD, state)

        kq_BLE = einsum("bld,de->ble", x_BLD, self.in_kq, dtype=dtype)  # first, as in `Mamba3.tokens`
        z_BLHP, x_BLHP = both(x_BLD, self.in_zx, dtype)
        dt_BLH = einsum("bld,dh->blh", x_BLD, self.in_dt, dtype=dtype, out=jnp.float32)
        x_BLHP, kq_BLE, window = convolved(self.taps, x_BLHP, kq_BLE, window, start_BL, context)
        kq = kq_BLE.reshape(batch, length, 2, 1, groups, config.d_state)

        dt_BLH = jax.nn.softplus(dt_BLH + self.dt_bias)
        log_a_BLH, gamma_BLH, _ = exponential_euler(dt_BLH, -jnp.exp(self.a_log), None)
        self.observe(dt=dt_BLH, log_a=log_a_BLH, gamma=gamma_BLH)
        tokens = Tokens(
            q_BLRGN=kq[:, :, 1],
            k_BLRGN=kq[:, :, 0],
            v_BLHP=x_BLHP,
            dt_BLH=None,
            log_a_BLH=log_a_BLH,
            gamma_BLH=gamma_BLH,
            start_BL=start_BL,
        )
        y_BLHP, ssm = self.op("adjacent", context)(tokens, Heads(skip_H=self.skip), before)
        y_BLHP = y_BLHP.astype(jnp.float32) * jax.nn.silu(z_BLHP.astype(jnp.float32))
        by_group = rms_norm(y_BLHP.reshape(batch, length, groups, -1), self.norm.reshape(groups, -1))
        y_BLHP = by_group.reshape(y_BLHP.shape).astype(dtype)
        return einsum("blhp,hpd->bld", y_BLHP, self.out, dtype=dtype), Carried(ssm, window)

    @staticmethod
    def empty_state(config: ModelConfig, batch: int, capacity: int) -> Carried:
        """Return zeros; `capacity` has no meaning for a state of fixed size."""
        ssm_BHPN = jnp.zeros((batch, head_count(config), config.head_dim, config.d_state), jnp.float32)
        return Carried(
            ssm=State(angle_BHS=None, ssm_BHPN=ssm_BHPN),
            window=empty_window(config.d_conv, batch, DTYPES[config.compute_dtype], **channels(config)),
        )

    @staticmethod
    def memory(state: Carried):
        """Return h."""
        return state.ssm.ssm_BHPN

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raise ValueError for sizes or choices that no Mamba-2 layer can have."""
        check_op(config)

    @staticmethod
    def state_flops(config: ModelConfig, length: int) -> float:
        """Count 2 H P N FLOPs to write the state and as many to read it, and 2 K for each channel convolved."""
        inner = head_count(config) * config.head_dim
        return 4 * inner * config.d_state + convolution_flops(config.d_conv, **channels(config))

    @staticmethod
    def fused(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Return the widths of B and C."""
        return {"in_kq": (config.n_groups * config.d_state,) * 2}

    @staticmethod
    def official_rows(config: ModelConfig) -> dict[str, Row]:
        """Return where official tensors of Mamba-2 lie; in_proj is z | x | B | C | dt, conv1d is over x | B | C."""
        width, heads, head_dim, taps = config.d_model, head_count(config), config.head_dim, config.d_conv
        inner, shared = heads * head_dim, channels(config)["shared"]
        inputs = [
            Piece("in_zx", (width, 2, heads, head_dim)),
            Piece("in_kq", (width, shared)),
            Piece("in_dt", (width, heads)),
        ]
        weights = (Piece("conv_x", (heads, head_dim, taps)), Piece("conv_kq", (shared, taps)))
        biases = (Piece("conv_x_bias", (heads, head_dim)), Piece("conv_kq_bias", (shared,)))
        return {
            "dt_bias": same("dt_bias", (heads,)),
            "A_log": same("a_log", (heads,)),
            "D": same("skip", (heads,)),
            "in_proj.weight": weight(width, 2 * inner + shared + heads, *inputs),
            "conv1d.weight": Row((inner + shared, 1, taps), 0, weights),
            "conv1d.bias": Row((inner + shared,), 0, biases),
            "norm.weight": same("norm", (heads, head_dim), (inner,)),
            "out_proj.weight": weight(inner, width, Piece("out", (heads, head_dim, width))),
        }
