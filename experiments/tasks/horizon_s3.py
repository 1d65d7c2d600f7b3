"""Horizon, permutations of three: how far past its trained length does one layer follow a product whose order matters?

    python -m launch.sweep --config=experiments/tasks/horizon_s3.py --workdir=runs/horizon_s3

Words over all 6 elements, trained to 64 and scored to 512 tokens (the frame of arXiv:2605.07755: a state that nothing
corrects drifts until the classes meet). Predicted before any run: rotations by angles commute, so one layer of Mamba-3
does not follow it past the trained length; two layers may (S3 is solvable), and quaternions, which do not commute, may
in one; one reflection a token does not reach S3 either.
"""

from experiments.tasks import tracking
from mamba3_jax.config import Config

VARIANTS = {
    "mamba3": {},
    "two_layers": {"model.pattern": "MM"},
    "quaternion": {"model.angles": "quaternion"},
    "no_rotation": {"model.angles": "none"},
    "gated_deltanet": {"model.pattern": "G", "model.delta_negative": True},
}
SEEDS = 3
LEARNING_RATES = (1e-3, 3e-3)
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512)
METRIC = "scaled_last@128"
SHOWN = ("scaled_last@64", "scaled_last@128", "scaled_last@256", "scaled_last@512")
EXPECT = {
    "mamba3": ("mean scaled_last@256", -0.1, 0.3),
    "no_rotation": ("mean scaled_last@256", -0.1, 0.3),
    "gated_deltanet": ("mean scaled_last@256", -0.1, 0.5),
}


def get_config() -> Config:
    return tracking.config("horizon_s3", "S3", vocab_size=6, layers=1, d_ff=128, steps=4000, longest=(20, 64))
