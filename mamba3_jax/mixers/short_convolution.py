"""The short convolution over values, keys and queries before the op (Mamba-2's), with its parameters and its window."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mixer import Mixer, head_count
from mamba3_jax.nn.initial import linear
from mamba3_jax.ops.context import Context
from mamba3_jax.ops.convolve import convolve


class Taps(NamedTuple):
    """Each channel's weights of K tokens, of which the current one is last, and its bias."""

    x_HPK: jax.Array
    x_bias_HP: jax.Array
    kq_EK: jax.Array
    kq_bias_E: jax.Array


class Window(NamedTuple):
    """The convolution's inputs of the last W = K - 1 tokens; 0 where a token belongs to an earlier document."""

    x_BWHP: jax.Array
    kq_BWE: jax.Array


def channels(config: ModelConfig, rank: int = 1) -> dict[str, int]:
    """Return the sizes of its channels: values of each head, and the keys and queries that all heads share."""
    shared = 2 * rank * config.n_groups * config.d_state
    return {"heads": head_count(config), "head_dim": config.head_dim, "shared": shared}


def taps_of(mixer: Mixer, taps: int, *, heads: int, head_dim: int, shared: int) -> Taps:
    """Return the convolution's parameters, which belong to `mixer`; sizes are those of `channels`."""
    draw, values = linear(taps), {"heads": heads, "head_dim": head_dim}
    return Taps(
        x_HPK=mixer.named("conv_x", draw, **values, taps=taps),
        x_bias_HP=mixer.named("conv_x_bias", draw, **values),
        kq_EK=mixer.named("conv_kq", draw, shared=shared, taps=taps),
        kq_bias_E=mixer.named("conv_kq_bias", draw, shared=shared),
    )


def empty_window(taps: int, batch: int, dtype, *, heads: int, head_dim: int, shared: int) -> Window:
    """Return the window before any token."""
    return Window(
        x_BWHP=jnp.zeros((batch, taps - 1, heads, head_dim), dtype),
        kq_BWE=jnp.zeros((batch, taps - 1, shared), dtype),
    )


def convolved(taps: Taps, x_BLHP, kq_BLE, window: Window | None, start_BL, context: Context | None):
    """Return values, keys and queries after the convolution and SiLU, and the next window. A None `window` is empty."""
    if window is None:
        heads, head_dim, width = taps.x_HPK.shape
        sizes = {"heads": heads, "head_dim": head_dim, "shared": kq_BLE.shape[-1]}
        window = empty_window(width, x_BLHP.shape[0], x_BLHP.dtype, **sizes)
    x_BLHP, x_BWHP = convolve(x_BLHP, taps.x_HPK, taps.x_bias_HP, window.x_BWHP, start_BL, context)
    kq_BLE, kq_BWE = convolve(kq_BLE, taps.kq_EK, taps.kq_bias_E, window.kq_BWE, start_BL, context)
    return x_BLHP, kq_BLE, Window(x_BWHP, kq_BWE)


def convolution_flops(taps: int, *, heads: int, head_dim: int, shared: int) -> float:
    """Count the FLOPs of a token: 2 K for each channel."""
    return 2 * taps * (heads * head_dim + shared)
