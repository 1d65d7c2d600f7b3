"""Horizon, the sum of bits: how far past its trained length does one layer follow a sum mod 2?

    python -m launch.sweep --config=experiments/tasks/horizon_z2.py --workdir=runs/horizon_z2

Words over all 2 elements, trained to 64 and scored to 512 tokens. Predicted before any run: rotations by data-dependent
angles are sums mod 2 pi, so one layer of Mamba-3 follows it, and fails where the errors of its angles have added up to
a quarter of a turn; gated DeltaNet's reflections do not drift, and without rotation nothing follows.

Cost: 10 minutes on 2 CPU cores.
"""

from experiments.tasks import horizon
from mamba3_jax.config import Config

VARIANTS = horizon.MODELS
SEEDS, LENGTHS, METRIC, SHOWN = horizon.SEEDS, horizon.LENGTHS, horizon.METRIC, horizon.SHOWN
EXPECT = {
    "mamba3": ("mean scaled_last@128", 0.9, 1.0),
    "quaternion": ("mean scaled_last@128", 0.9, 1.0),
    "no_rotation": ("mean scaled_last@128", -0.1, 0.3),
    "gated_deltanet": ("mean scaled_last@256", 0.9, 1.0),
}


def get_config() -> Config:
    return horizon.config("horizon_z2", "Z2", 2)
