"""State tracking, arithmetic mod 5 without brackets, three layers (table 5b of arXiv:2603.15569).

    python -m launch.sweep --config=experiments/tasks/tracking_arithmetic.py --workdir=runs/tracking_arithmetic

Every prefix that ends in a digit has its value as label, and "=" that of the whole. Expect, in percent at length 256:
Mamba-3 98.5 (paper 98.51), gated DeltaNet [-1, 1] 99 (99.25), Mamba-2 half (47.81), fixed angles a fifth (20.70),
none without rotation (1.49).
"""

from experiments.tasks import tracking
from mamba3_jax.config import Config
from mamba3_jax.data.arithmetic import FLAT

VARIANTS = tracking.variants(layers=3)
LEARNING_RATES, METRIC, SHOWN = tracking.RATES, tracking.METRIC, tracking.SHOWN
LENGTHS = tracking.LENGTHS
EXPECT = {
    "mamba3": ("best scaled_last@256", 0.985, 1.0),
    "softplus": ("best scaled_last@256", 0.985, 1.0),
    "rope": ("best scaled_last@256", -0.1, 0.4),
    "no_rotation": ("best scaled_last@256", -0.1, 0.2),
    "mamba2": ("best scaled_last@256", 0.2, 0.7),
    "gated_deltanet": ("best scaled_last@256", 0.95, 1.0),
}
PAPER = {
    "mamba3": 98.51,
    "softplus": 98.51,
    "rope": 20.70,
    "no_rotation": 1.49,
    "mamba2": 47.81,
    "gated_deltanet": 99.25,
}


def get_config() -> Config:
    return tracking.config("tracking_arithmetic", "arithmetic", vocab_size=len(FLAT), layers=3, d_ff=128, steps=4000)
