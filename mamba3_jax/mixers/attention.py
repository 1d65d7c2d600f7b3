"""Causal self-attention with grouped heads, whose state is a cache of keys and values."""

import functools
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mixer import Mixer
from mamba3_jax.mixers.official import Piece, Row, same, weight
from mamba3_jax.nn.initial import linear
from mamba3_jax.nn.precision import DTYPES
from mamba3_jax.ops import context as contexts
from mamba3_jax.ops.attention import IMPLEMENTATIONS, attend, rows
from mamba3_jax.ops.einsum import einsum


class Cache(NamedTuple):
    """Keys and values of the tokens so far; T is the capacity."""

    k_BTKE: jax.Array  # rotated where the layer has positions
    v_BTKE: jax.Array
    position_B: jax.Array  # int32, tokens held
    first_B: jax.Array  # int32, place of the first token of the current document: those before it are not seen


def rope(x, position_BL, theta: float):
    """Rotate plane (i, i + E/2) of x (B, L, ..., E) by position * theta^(-2i/E) radians."""
    half = x.shape[-1] // 2
    frequency_E = theta ** (-np.arange(half, dtype=np.float32) / half)
    angle = position_BL[..., None].astype(jnp.float32) * frequency_E
    angle = angle.reshape(*angle.shape[:2], *[1] * (x.ndim - 3), half)
    u, v = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (u * jnp.cos(angle) - v * jnp.sin(angle), u * jnp.sin(angle) + v * jnp.cos(angle))
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def write(cache_BTKE, new_BLKE, position_B):
    """Write `new` to the places position, position + 1, ... of each row of the cache; what does not fit is dropped."""
    rows_B1 = jnp.arange(new_BLKE.shape[0])[:, None]
    places_BL = position_B[:, None] + jnp.arange(new_BLKE.shape[1])
    return cache_BTKE.at[rows_B1, places_BL].set(new_BLKE, mode="drop")


def head_counts(config: ModelConfig) -> tuple[int, int]:
    """Return the number of query heads and of key-value heads."""
    heads = config.attn_heads or config.d_model // config.attn_head_dim
    return heads, config.attn_kv_heads or heads


class Attention(Mixer):
    """y, cache = attention(x, cache, start): a token sees itself and those before it in its own document.

    Without a cache the returned one has capacity L; `empty_state` makes room for more. Tokens that do not fit into a
    cache get NaN, not wrong numbers (and `LanguageModel` raises where it can see that). A NaN anywhere in a row may
    reach all of it: a weight of 0 times NaN is NaN. Calls without a cache, as in training, run
    `ops.attention.rows`, which may use cuDNN; calls with one run `ops.attention.attend`, in plain XLA.
    """

    letter = "A"
    matrices = ("q", "k", "v", "out")
    splits_rows = True
    official: ClassVar = {"attn_rope_theta": 0.0}

    @nn.compact
    def __call__(self, x_BLD, state: Cache | None = None, start_BL=None):
        config = self.config
        heads, kv_heads = head_counts(config)
        q_BLHE = self.project("q", x_BLD, heads)
        k_BLKE = self.project("k", x_BLD, kv_heads)
        v_BLKE = self.project("v", x_BLD, kv_heads)

        batch, length = x_BLD.shape[:2]
        if state is not None and length > state.k_BTKE.shape[1]:
            raise ValueError(f"{length=} tokens do not fit in a cache of capacity {state.k_BTKE.shape[1]}")
        zero_B = jnp.zeros(batch, jnp.int32)
        position_B, first_B = (state.position_B, state.first_B) if state is not None else (zero_B, zero_B)
        # A cache holds whole rows in their order: only calls without one have their rows split.
        context = self.context(x_BLD, state) if state is None else None
        if context is not None and start_BL is not None:
            start_BL = contexts.whole(context, start_BL)
        place_BL = position_B[:, None] + jnp.arange(length)
        first_BL = jnp.broadcast_to(first_B[:, None], place_BL.shape)
        if start_BL is not None:
            first_BL = jax.lax.cummax(jnp.where(start_BL, place_BL, first_BL), axis=1)
        first_B = first_BL[:, -1]
        if context is not None:
            place_BL, first_BL = (contexts.laid(context, x_BL) for x_BL in (place_BL, first_BL))
        if config.attn_rope_theta:
            q_BLHE = rope(q_BLHE, place_BL - first_BL, config.attn_rope_theta)
            k_BLKE = rope(k_BLKE, place_BL - first_BL, config.attn_rope_theta)
        if state is not None:
            k_BLKE = write(state.k_BTKE, k_BLKE, position_B)
            v_BLKE = write(state.v_BTKE, v_BLKE, position_B)

        if state is None:
            attention = functools.partial(
                rows,
                implementation=config.attn_implementation,
                split=tuple(nn.logical_to_mesh_axes(("batch", "heads"))),
                context=context,
            )
            seen = (None if start_BL is None else first_BL,)
        else:  # a piece of a row: the cache has more keys than there are queries
            attention, seen = attend, (first_BL, place_BL)
        attention = jax.checkpoint(attention) if config.remat == "op" else attention
        y_BLHE = attention(q_BLHE, k_BLKE, v_BLKE, *seen)
        if state is not None:
            y_BLHE = jnp.where((place_BL < k_BLKE.shape[1])[..., None, None], y_BLHE, jnp.nan)
        y_BLD = self.output(y_BLHE)
        if context is not None:
            k_BLKE, v_BLKE = (contexts.whole(context, x_BLKE) for x_BLKE in (k_BLKE, v_BLKE))
        return y_BLD, Cache(k_BLKE, v_BLKE, position_B + length, first_B)

    def project(self, name, x_BLD, heads: int):
        """Compute x W (+ b), (B, L, heads, E), in the compute dtype."""
        config, dtype, d_model, width = self.config, self.dtype, x_BLD.shape[-1], self.config.attn_head_dim
        axis = "heads" if name == "q" else "kv_heads"
        kernel = nn.with_logical_partitioning(linear(d_model), ("embed", axis, "head_dim"))
        y_BLHE = einsum("bld,dhe->blhe", x_BLD, self.param(name, kernel, (d_model, heads, width)), dtype=dtype)
        if config.attn_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (axis, "head_dim"))
            y_BLHE += self.param(f"{name}_bias", zeros, (heads, width)).astype(dtype)
        return y_BLHE

    def output(self, y_BLHE):
        """Project the heads back to the model's width."""
        config, dtype, (heads, width) = self.config, self.dtype, y_BLHE.shape[2:]
        scaled = linear(heads * width, len(config.pattern) ** -0.5)
        kernel = nn.with_logical_partitioning(scaled, ("heads", "head_dim", "embed"))
        out_HED = self.param("out", kernel, (heads, width, config.d_model))
        y_BLD = einsum("blhe,hed->bld", y_BLHE, out_HED, dtype=dtype)
        if config.attn_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
            y_BLD += self.param("out_bias", zeros, (config.d_model,)).astype(dtype)
        return y_BLD

    @property
    def dtype(self):
        return DTYPES[self.config.compute_dtype]

    @staticmethod
    def empty_state(config: ModelConfig, batch: int, capacity: int) -> Cache:
        """Return an empty cache with room for `capacity` tokens."""
        _, kv_heads = head_counts(config)
        zeros = jnp.zeros((batch, capacity, kv_heads, config.attn_head_dim), DTYPES[config.compute_dtype])
        return Cache(zeros, zeros, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raise ValueError for sizes that no attention layer can have."""
        heads, kv_heads = head_counts(config)
        if heads < 1 or heads % kv_heads:
            raise ValueError(f"attention {heads=} is not a positive multiple of {kv_heads=}")
        if config.attn_implementation and config.attn_implementation not in IMPLEMENTATIONS:
            raise ValueError(f"{config.attn_implementation=} is not '' or one of {list(IMPLEMENTATIONS)}")
        if 0 < config.attn_rope_theta < 1:
            raise ValueError(f"{config.attn_rope_theta=}: wanted a base from 1 up, or 0 for no positions")
        if config.attn_rope_theta and config.attn_head_dim % 2:
            raise ValueError(f"{config.attn_head_dim=} is odd and cannot rotate ({config.attn_rope_theta=})")

    @staticmethod
    def state_flops(config: ModelConfig, length: int) -> float:
        """Count 4 H E FLOPs for each token that is attended to, length / 2 on average."""
        heads, _ = head_counts(config)
        return 4 * heads * config.attn_head_dim * length / 2

    @staticmethod
    def room(state: Cache) -> tuple:
        """Return the number of tokens held (..., B) and the capacity of a cache, or of several that are stacked."""
        return state.position_B, state.k_BTKE.shape[-3]

    @staticmethod
    def official_rows(config: ModelConfig) -> dict[str, Row]:
        """Return where the official tensors of an attention layer lie; in_proj is q | k | v."""
        width, head_dim = config.d_model, config.attn_head_dim
        heads, kv_heads = head_counts(config)
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        packed = sum(counts.values()) * head_dim
        inputs = [Piece(name, (width, count, head_dim)) for name, count in counts.items()]
        biases = [Piece(f"{name}_bias", (count, head_dim)) for name, count in counts.items()]
        rows = {"in_proj.weight": weight(width, packed, *inputs)}
        if config.attn_bias:
            rows["in_proj.bias"] = Row((packed,), 0, tuple(biases))
        rows["out_proj.weight"] = weight(heads * head_dim, width, Piece("out", (heads, head_dim, width)))
        if config.attn_bias:
            rows["out_proj.bias"] = same("out_bias", (width,))
        return rows
