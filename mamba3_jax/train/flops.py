"""Model FLOPs: what the mathematics needs, whatever the implementation does, and what devices could do."""

import math

import flax.linen as nn
import jax

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mamba3 import sizes
from mamba3_jax.model import boxed_shapes, mixer_names

# Dense bfloat16 peak of one device in TFLOP/s, by jax's device_kind (makers' data sheets).
PEAK_TFLOPS = {
    "TPU v3": 61.5,  # a core, which is a device there
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
}
MATRICES = ("in_zx", "in_dt_a_trap", "in_kq_angle", "q", "k", "v", "out", "value", "gate", "kernel")


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Forward and backward, 3 times the forward: 6 a matrix parameter, and the mixers' state.

    Mamba-3: 2 H P N R to write the state and as much to read it. Attention: 4 Hq E a token attended, length / 2 on
    average. Norms, gates, decay and the embedding's look-up are left out; recomputation (remat) is no model FLOP.
    """
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed_shapes(config)))
    named = [(path[-1].key, math.prod(leaf.shape)) for path, leaf in leaves]
    head = ("embedding",) if config.tie_embeddings else ()
    matrices = sum(size for name, size in named if name in MATRICES + head)
    size = sizes(config)
    heads = config.attn_heads or config.d_model // config.attn_head_dim
    state = {
        "mamba3": 4 * size.heads * size.head_dim * size.d_state * size.rank,
        "attention": 4 * heads * config.attn_head_dim * length / 2,
    }
    return 3 * (2 * matrices + sum(state[name] for name in mixer_names(config.pattern)))


def peak_flops(peak_tflops: float) -> float | None:
    """FLOP/s of all devices together; `peak_tflops` of one, 0: from the table. None where it is not known."""
    kind = jax.devices()[0].device_kind
    peak = peak_tflops or PEAK_TFLOPS.get(kind)
    return peak * 1e12 * jax.device_count() if peak else None
