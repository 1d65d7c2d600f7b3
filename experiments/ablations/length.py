"""What does each model lose past the length it was trained at, up to 16 times (figure 4 of the paper)?

    python -m launch.sweep --config=experiments/ablations/length.py --workdir=runs/length

Cost: 15 minutes on one H200, estimated: 5 variants of 8 seeds, 90 s each and about a minute to score, and what is
compiled. Twelve layers, 14.9M parameters each, by d_ff. late_loss@L is the loss of tokens that have L/2 to L tokens of
their own document before them, all of which the state holds; long documents alone have such tokens, so that two models
can be compared at a length, but one model's numbers at two lengths are of other tokens. Expect by the paper's figure
(no numbers there) that Mamba-3 goes on, Mamba-2 falters, and a Transformer with RoPE fails; of hybrids that the norm
before the gate helps.
"""

from experiments.ablations import language
from mamba3_jax.config import Config

HYBRID = {"model.pattern": "MMMMMA" * 2, "model.d_ff": 816}
VARIANTS = {
    "mamba3": {},
    "mamba2": {"model.pattern": "2" * 12, "model.d_ff": 784},
    "transformer": {"model.pattern": "A" * 12, "model.attn_rope_theta": 10000.0, "model.d_ff": 1048},
    "hybrid": HYBRID,
    "hybrid_norm": HYBRID | {"model.out_norm": True},
}
SEEDS, LENGTHS, METRIC = language.SEEDS, (1024, 2048, 4096, 8192, 16384), "late_loss@16384"
SHOWN = ("late_loss@1024", "late_loss@2048", "late_loss@4096", "late_loss@16384")
EXPECT = {
    "mamba2": ("difference late_loss@16384", 0.0, 0.5),
    "transformer": ("difference late_loss@16384", 0.5, 10.0),
    "hybrid": ("difference late_loss@16384", -0.1, 3.0),
    "hybrid_norm": ("difference late_loss@16384", -0.1, 1.0),
}


def get_config() -> Config:
    return language.config("length", **language.DEEP)
