"""Horizon, permutations of three: how far past its trained length does one layer follow a product whose order matters?

    python -m launch.sweep --config=experiments/tasks/horizon_s3.py --workdir=runs/horizon_s3

Words over all 6 elements, trained to 64 and scored to 512 tokens. Predicted before any run: rotations by angles
commute, so one layer of Mamba-3 does not follow it past the trained length; two layers may (S3 is solvable), and
quaternions, which do not commute, may in one; one reflection a token does not reach S3 either.

Looked into (experiments/results/horizon_s3_predicted.json, by `experiments.horizons`): forgetting, which explains sums
mod 6, does not explain this. Two layers, right to 0.57 of the way at 64, fall under half at 70 where forgetting says
87, and their memory scaled back to its size at 64 is not read again.

Cost: 10 minutes on 2 CPU cores.
"""

from experiments.tasks import horizon
from mamba3_jax.config import Config

VARIANTS = horizon.MODELS
SEEDS, LENGTHS, METRIC, SHOWN = horizon.SEEDS, horizon.LENGTHS, horizon.METRIC, horizon.SHOWN
EXPECT = {
    "mamba3": ("mean scaled_last@256", -0.1, 0.3),
    "no_rotation": ("mean scaled_last@256", -0.1, 0.3),
    "gated_deltanet": ("mean scaled_last@256", -0.1, 0.5),
}


def get_config() -> Config:
    return horizon.config("horizon_s3", "S3", 6)
