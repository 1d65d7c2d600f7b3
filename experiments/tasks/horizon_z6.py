"""Horizon, sums mod 6: how far past its trained length does one layer follow a sum mod 6?

    python -m launch.sweep --config=experiments/tasks/horizon_z6.py --workdir=runs/horizon_z6

Words over all 6 elements, trained to 64 and scored to 512 tokens (the frame of arXiv:2605.07755: a state that nothing
corrects drifts until the classes meet). Predicted before any run: one layer of Mamba-3 follows it as it follows parity,
but fails a third as far out, where its angles' errors are a twelfth of a turn; one reflection a token has no eigenvalue
of order 6, so gated DeltaNet fails.
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
    "mamba3": ("mean scaled_last@128", 0.9, 1.0),
    "quaternion": ("mean scaled_last@128", 0.9, 1.0),
    "no_rotation": ("mean scaled_last@128", -0.1, 0.3),
    "gated_deltanet": ("mean scaled_last@128", -0.1, 0.5),
}


def get_config() -> Config:
    return tracking.config("horizon_z6", "Z6", vocab_size=6, layers=1, d_ff=128, steps=4000, longest=(20, 64))
