"""What do the discretization, the biases and a short convolution each do for the loss (tables 5a and 8 of the paper)?

    python -m launch.sweep --config=experiments/ablations/discretization.py --workdir=runs/discretization

Cost: 18 minutes on one H200, estimated: 8 variants of 8 seeds, 98 s each, and what is compiled. Expect, beside `full`,
in nats a token: without biases 0.048 more (paper), and without the trapezoid too 0.059; a convolution 0.008 more. Of
lambda 1/2 (0.0025 in the paper) and 1 (0.0057) eight seeds can only bound the difference; nobody has published the two
classical rules. Agreement is what EXPECT says, written before any run.
"""

from experiments.ablations import language
from mamba3_jax.config import Config

VARIANTS = {
    "full": {},
    "no_bias": {"model.bc_bias": "none"},
    "no_bias_no_trapezoid": {"model.bc_bias": "none", "model.discretization": "exponential_euler"},
    "convolution": {"model.conv": 4},
    "midpoint": {"model.discretization": "midpoint"},
    "exponential_euler": {"model.discretization": "exponential_euler"},
    "zero_order_hold": {"model.discretization": "zero_order_hold"},
    "backward_euler": {"model.discretization": "backward_euler"},
}
SEEDS, METRIC, SHOWN = language.SEEDS, language.METRIC, language.SHOWN
EXPECT = {
    "no_bias": ("difference loss@1024", 0.016, 0.144),
    "no_bias_no_trapezoid": ("difference loss@1024", 0.020, 0.177),
    "convolution": ("difference loss@1024", 0.0, 0.025),
    "midpoint": ("difference loss@1024", -0.004, 0.008),
    "exponential_euler": ("difference loss@1024", -0.004, 0.017),
    "zero_order_hold": ("difference loss@1024", -0.004, 0.020),
    "backward_euler": ("difference loss@1024", -0.004, 0.020),
}
PAPER = {
    "full": 15.72,
    "no_bias": 16.49,
    "no_bias_no_trapezoid": 16.68,
    "convolution": 15.85,
    "midpoint": 15.76,
    "exponential_euler": 15.81,
}


def get_config() -> Config:
    return language.config("discretization")
