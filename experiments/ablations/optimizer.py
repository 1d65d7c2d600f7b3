"""What is Muon worth over AdamW, each at the best of its learning rates?

    python -m launch.sweep --config=experiments/ablations/optimizer.py --workdir=runs/optimizer

Cost: 12 minutes on one H200, estimated: 4 variants of 3 seeds at 4 rates, 12 members of 1.5 times the cost of 8, Muon a
tenth more, less where memory asks for remat. Muon's updates are as large as AdamW's, so both have the same rates. The
field reports Muon to need half to two thirds of AdamW's tokens (arXiv:2502.16982), nobody for Mamba-3. Expect Muon
0.02 to 0.2 nats better for both models.
"""

from experiments.ablations import language
from mamba3_jax.config import Config

MUON = {"optimizer.name": "muon"}
TRANSFORMER = {"model.pattern": "A" * 6, "model.attn_rope_theta": 10000.0, "model.d_ff": 1392}
VARIANTS = {"adamw": {}, "muon": MUON, "transformer_adamw": TRANSFORMER, "transformer_muon": TRANSFORMER | MUON}
SEEDS, LEARNING_RATES = 3, (1e-3, 2e-3, 4e-3, 8e-3)
METRIC, SHOWN = language.METRIC, language.SHOWN
EXPECT = {
    "muon": ("difference loss@1024", -0.20, -0.02),
    "transformer_adamw": ("difference loss@1024", -0.05, 0.15),
    "transformer_muon": ("difference loss@1024", -0.25, 0.10),
}


def get_config() -> Config:
    return language.config("optimizer")
