"""What does a higher MIMO rank do for the loss, at equal parameters?

    python -m launch.sweep --config=experiments/ablations/rank.py --workdir=runs/rank

Cost: 18 minutes on one H200, estimated: 5 variants of 8 seeds, 98 s for rank 1 to 190 s for rank 4 and, by the Triton
kernels, 380 s for rank 8. All have 16.3M parameters, by d_ff. The paper has rank 4 alone, 0.0145 nats better than SISO
at d_state 128, and no study of the rank. Expect that 1 is SISO with other pairs of planes, and the others better.
"""

from experiments.ablations import language
from mamba3_jax.config import Config

VARIANTS = {
    "siso": {},
    "rank_1": {"model.mimo_rank": 1, "model.d_ff": 1024},
    "rank_2": {"model.mimo_rank": 2, "model.d_ff": 936},
    "rank_4": {"model.mimo_rank": 4, "model.d_ff": 752},
    "rank_8": {"model.mimo_rank": 8, "model.d_ff": 392},
}
SEEDS, METRIC, SHOWN = language.SEEDS, language.METRIC, language.SHOWN
EXPECT = {
    "rank_1": ("difference loss@1024", -0.006, 0.006),
    "rank_2": ("difference loss@1024", -0.030, 0.0),
    "rank_4": ("difference loss@1024", -0.044, -0.005),
    "rank_8": ("difference loss@1024", -0.060, 0.015),
}
PAPER = {"siso": 14.59, "rank_4": 14.38}


def get_config() -> Config:
    return language.config("rank")
