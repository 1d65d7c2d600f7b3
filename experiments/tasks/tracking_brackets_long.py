"""State tracking, arithmetic mod 5 with brackets, on as many tokens as the paper's (table 5b of arXiv:2603.15569).

    python -m launch.sweep --config=experiments/tasks/tracking_brackets_long.py --workdir=runs/tracking_brackets_long

After a sixth of the tokens (`tracking_brackets`) Mamba-3 solved the length that the curriculum begins with, 92.9 and
97.9 percent at 40, and was lost at 256, and gated DeltaNet [-1, 1] had not begun to learn. Expect, if tokens are what
was missing, in percent at length 256: Mamba-3 87.8 (paper 87.75), gated DeltaNet 85 (93.50).
"""

from experiments.tasks import tracking
from mamba3_jax.config import Config
from mamba3_jax.data.arithmetic import NESTED

VARIANTS = {name: tracking.variants(layers=3)[name] for name in ("softplus", "gated_deltanet", "mamba3")}
LEARNING_RATES = tracking.RATES[2:6]  # 3.7e-4 .. 2.7e-3: where each was best
METRIC, SHOWN, LENGTHS = tracking.METRIC, tracking.SHOWN, tracking.LENGTHS
EXPECT = {
    "softplus": ("best scaled_last@256", 0.878, 1.0),
    "gated_deltanet": ("best scaled_last@256", 0.85, 1.0),
    "mamba3": ("best scaled_last@256", 0.878, 1.0),
}
PAPER = {"softplus": 87.75, "gated_deltanet": 93.50, "mamba3": 87.75}


def get_config() -> Config:
    how = {"layers": 3, "d_ff": 128, "labels": "answer"}
    return tracking.config("tracking_brackets_long", "arithmetic_brackets", len(NESTED), **how, **tracking.LONG)
