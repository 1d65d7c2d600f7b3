"""Model configs of the Mamba-3 paper (arXiv 2603.15569), in the sizes of its released checkpoints."""

import dataclasses
import math

import flax.linen as nn
import jax

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import boxed_shapes


def paper(d_model: int, layers: int, d_ff: int, mimo_rank: int = 0) -> ModelConfig:
    """Return one of the paper's models: Mamba-3 and SwiGLU in every layer, Llama-3.1's vocabulary, a tied head."""
    return ModelConfig(
        vocab_size=128256,
        pad_vocab_to=16,
        d_model=d_model,
        pattern="M" * layers,
        d_ff=d_ff,
        mimo_rank=mimo_rank,
        compute_dtype="bfloat16",
    )


# d_ff is the real width: the official code rounds the configured width up to a multiple of 128. MIMO models have a
# narrower feed-forward, so that they have as many parameters as SISO models.
PRESETS = {
    "siso-180m": paper(768, 12, 1536),
    "mimo-180m": paper(768, 12, 1280, mimo_rank=4),
    "siso-440m": paper(1024, 24, 2048),
    "mimo-440m": paper(1024, 24, 1792, mimo_rank=4),
    "siso-880m": paper(1536, 24, 3072),
    "mimo-880m": paper(1536, 24, 2816, mimo_rank=4),
    "siso-1.5b": paper(2048, 24, 4096),
    "mimo-1.5b": paper(2048, 24, 3840, mimo_rank=4),
}
# Baselines, which have no released checkpoints: attention with RoPE, Mamba-2, or gated DeltaNet with keys of 128 and
# values of 256, in place of every Mamba-3 layer. The paper does not give the width of their feed-forward. These widths,
# again multiples of 128, make models with as many parameters.
PRESETS |= {
    "transformer-180m": dataclasses.replace(paper(768, 12, 2176), pattern="A" * 12, attn_rope_theta=10000.0),
    "mamba2-180m": dataclasses.replace(paper(768, 12, 1536), pattern="2" * 12),
    "gdn-180m": dataclasses.replace(paper(768, 12, 1152), pattern="G" * 12),
}
# The paper's hybrids, which it has at 1.5B alone, at the size of the other baselines: one layer of attention without
# positions after every five layers of Mamba-3. "norm" has the grouped norm before the gate: it is the one that
# retrieves past the trained length.
HYBRID = dataclasses.replace(paper(768, 12, 1664), pattern="MMMMMA" * 2)
PRESETS |= {"hybrid-180m": HYBRID, "hybrid-180m-norm": dataclasses.replace(HYBRID, out_norm=True)}


def parameter_count(config: ModelConfig) -> int:
    """Count the numbers in the parameter tree; a tied head counts once. Nothing is computed or allocated."""
    return sum(math.prod(shape.shape) for shape in jax.tree.leaves(nn.meta.unbox(boxed_shapes(config))))
