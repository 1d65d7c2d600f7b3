"""Horizon, the sum of bits: how far past its trained length does one layer follow a sum mod 2?

    python -m launch.sweep --config=experiments/tasks/horizon_z2.py --workdir=runs/horizon_z2

Words over all 2 elements, trained to 64 and scored to 512 tokens (the frame of arXiv:2605.07755: a state that nothing
corrects drifts until the classes meet). Predicted before any run: rotations by data-dependent angles are sums mod 2 pi,
so one layer of Mamba-3 follows it, and fails where the errors of its angles have added up to a quarter of a turn; gated
DeltaNet's reflections do not drift, and without rotation nothing follows.
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
    "gated_deltanet": ("mean scaled_last@512", 0.9, 1.0),
}


def get_config() -> Config:
    return tracking.config("horizon_z2", "Z2", vocab_size=2, layers=1, d_ff=128, steps=4000, longest=(20, 64))
