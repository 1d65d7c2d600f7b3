"""Horizon, sums mod 6: how far past its trained length does one layer follow a sum mod 6?

    python -m launch.sweep --config=experiments/tasks/horizon_z6.py --workdir=runs/horizon_z6

Words over all 6 elements, trained to 64 and scored to 512 tokens. Predicted before any run: one layer of Mamba-3
follows it as it follows parity, but fails a third as far out, where its angles' errors are a twelfth of a turn; one
reflection a token has no eigenvalue of order 6, so gated DeltaNet fails.

Looked into (experiments/results/horizon_z6_predicted.json, by `experiments.horizons`): what rotations miss is not what
fails first. The memory of the row's beginning decays, and the readout was never trained on so little of it. Letting it
decay on, in rows of 64 tokens, says 90, 108 and 70 for one layer, two layers and quaternions, which fail at 92, 116 and
75. Angles alone would fail at 117 and 207, and their rule of half a step says 52 and 36. Scaled back to its size at 64,
the memory is read again past the failing length.

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
    "gated_deltanet": ("mean scaled_last@128", -0.1, 0.5),
}


def get_config() -> Config:
    return horizon.config("horizon_z6", "Z6", 6)
