"""Does rotation by a data-dependent angle help language, where no state has to be tracked?

    python -m launch.sweep --config=experiments/ablations/rotation.py --workdir=runs/rotation

Cost: 11 minutes on one H200, estimated: 5 variants of 8 seeds, 98 s each, and what is compiled. All have 16.3M
parameters. The paper compares rotations on state tracking alone; nobody has published what they do for language. Expect
little: none at most 0.04 nats worse, fixed angles no better than angles of the data, half or all of the state alike.
"""

from experiments.ablations import language
from mamba3_jax.config import Config

VARIANTS = {
    "data_half": {},
    "data_all": {"model.rope_fraction": 1.0, "model.d_ff": 1016},
    "rope_half": {"model.angles": "rope"},
    "rope_all": {"model.angles": "rope", "model.rope_fraction": 1.0, "model.d_ff": 1016},
    "none": {"model.angles": "none"},
}
SEEDS, METRIC, SHOWN = language.SEEDS, language.METRIC, language.SHOWN
EXPECT = {
    "data_all": ("difference loss@1024", -0.008, 0.008),
    "rope_half": ("difference loss@1024", -0.003, 0.030),
    "rope_all": ("difference loss@1024", -0.003, 0.040),
    "none": ("difference loss@1024", 0.0, 0.040),
}


def get_config() -> Config:
    return language.config("rotation")
