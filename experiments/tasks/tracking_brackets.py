"""State tracking, arithmetic mod 5 with brackets, three layers (table 5b of arXiv:2603.15569).

    python -m launch.sweep --config=experiments/tasks/tracking_brackets.py --workdir=runs/tracking_brackets

Operators are + and -, the default of the source of the task; only the answer has a label. Expect, in percent at length
256: Mamba-3 87.8 (paper 87.75), gated DeltaNet [-1, 1] 93 (93.50), and near chance without rotation (0.72), with fixed
angles (2.62), Mamba-2 (0.88).
"""

from experiments.tasks import tracking
from mamba3_jax.config import Config
from mamba3_jax.data.arithmetic import NESTED

VARIANTS = tracking.variants(layers=3)
LEARNING_RATES, METRIC, SHOWN = tracking.RATES, tracking.METRIC, tracking.SHOWN
LENGTHS = tracking.LENGTHS
EXPECT = {
    "mamba3": ("best scaled_last@256", 0.878, 1.0),
    "softplus": ("best scaled_last@256", 0.878, 1.0),
    "rope": ("best scaled_last@256", -0.1, 0.15),
    "no_rotation": ("best scaled_last@256", -0.1, 0.15),
    "mamba2": ("best scaled_last@256", -0.1, 0.15),
    "gated_deltanet": ("best scaled_last@256", 0.85, 1.0),
}
PAPER = {"mamba3": 87.75, "softplus": 87.75, "rope": 2.62, "no_rotation": 0.72, "mamba2": 0.88, "gated_deltanet": 93.50}


def get_config() -> Config:
    return tracking.config(
        "tracking_brackets", "arithmetic_brackets", len(NESTED), layers=3, d_ff=128, steps=4000, labels="answer"
    )
