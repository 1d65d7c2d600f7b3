"""State tracking, parity: y_t = x_1 + .. + x_t mod 2, one layer (table 5b of arXiv:2603.15569).

    python -m launch.sweep --config=experiments/tasks/tracking_parity.py --workdir=runs/tracking_parity

Expect, in percent at length 256: Mamba-3 100 (paper 100.00), gated DeltaNet [-1, 1] 100 (100.00), and near chance
without rotation (2.27), with fixed angles (1.56), Mamba-2 (0.90); the paper has no Transformer here.
"""

from experiments.tasks import tracking
from mamba3_jax.config import Config

VARIANTS = tracking.variants(layers=1)
LEARNING_RATES, LENGTHS, METRIC, SHOWN = tracking.RATES, tracking.LENGTHS, tracking.METRIC, tracking.SHOWN
EXPECT = {
    "mamba3": ("best scaled_last@256", 0.99, 1.0),
    "softplus": ("best scaled_last@256", 0.99, 1.0),
    "rope": ("best scaled_last@256", -0.1, 0.1),
    "no_rotation": ("best scaled_last@256", -0.1, 0.1),
    "mamba2": ("best scaled_last@256", -0.1, 0.1),
    "gated_deltanet": ("best scaled_last@256", 0.99, 1.0),
    "transformer": ("best scaled_last@256", -0.1, 0.1),
}
PAPER = {"mamba3": 100.0, "softplus": 100.0, "rope": 1.56, "no_rotation": 2.27, "mamba2": 0.9, "gated_deltanet": 100.0}


def get_config() -> Config:
    return tracking.config("tracking_parity", "parity", vocab_size=2, layers=1, d_ff=0, steps=4000)
