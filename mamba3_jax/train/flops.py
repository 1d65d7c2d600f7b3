"""Model FLOPs: what the mathematics needs, whatever the implementation does, and what devices could do."""

import math

import flax.linen as nn
import jax

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers import MIXERS
from mamba3_jax.model import blocks, boxed_shapes, mixer_names

# Dense bfloat16 peak of one device in TFLOP/s, by jax's device_kind (makers' data sheets).
PEAK_TFLOPS = {
    "TPU v3": 61.5,  # a core, which is a device there
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU7x": 2307 / 2,  # a core, which is a device there
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
}
MATRICES = ("value", "gate", "out", "kernel")  # of the feed-forwards and the head; a mixer names its own


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Forward and backward, 3 times the forward: 6 a matrix parameter, and what each mixer says of its state.

    Norms, gates, decay and the embedding's look-up are left out; recomputation (remat) is no model FLOP.
    """
    mixers, matrices = blocks(config.pattern), 0
    outside = MATRICES + (("embedding",) if config.tie_embeddings else ())
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed_shapes(config))):
        segment, block, *rest = (part.key for part in path)
        named = MIXERS[mixers[segment, block]].matrices if "mixer" in rest[:1] else outside
        matrices += math.prod(leaf.shape) * (path[-1].key in named)
    state = sum(MIXERS[name].state_flops(config, length) for name in mixer_names(config.pattern))
    return 3 * (2 * matrices + state)


def peak_flops(peak_tflops: float) -> float | None:
    """Return the peak FLOP/s of all devices together, None where it is not known.

    Args:
        peak_tflops: of one device; 0: as the table has it.
    """
    kind = jax.devices()[0].device_kind
    peak = peak_tflops or PEAK_TFLOPS.get(kind)
    return peak * 1e12 * jax.device_count() if peak else None
