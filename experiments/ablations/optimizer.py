"""What is Muon worth over AdamW, each at the best of its learning rates?

    python -m launch.sweep --config=experiments/ablations/optimizer.py --workdir=runs/optimizer

Cost: 6 minutes on one H200, estimated: 2 variants of 3 seeds at 4 rates, 12 members of 1.5 times the cost of 8, Muon a
tenth more, and what is compiled. Muon's updates are as large as AdamW's, so both have the same rates. The field reports
that Muon needs half of AdamW's tokens (arXiv:2502.16982), nobody for Mamba-3. Expect Muon 0.02 to 0.2 nats better.
"""

from experiments.ablations import language
from mamba3_jax.config import Config

VARIANTS = {"adamw": {}, "muon": {"optimizer.name": "muon"}}
SEEDS, LEARNING_RATES = 3, (1e-3, 2e-3, 4e-3, 8e-3)
METRIC, SHOWN = language.METRIC, language.SHOWN
EXPECT = {"muon": ("difference loss@1024", -0.20, -0.02)}


def get_config() -> Config:
    return language.config("optimizer")
