"""The smallest sweep, for the tests' processes.

python -m launch.sweep --config=tests/launch/tiny_sweep.py --workdir=DIR
"""

from tests.train import tiny

VARIANTS = {"mamba3": {}, "still": {"model.angles": "none"}}
SEEDS = 2
LEARNING_RATES = (1e-3, 1e-2)
LENGTHS = (16, 32)
EXPECT = {"mamba3": ("best scaled_last@32", -1.0, 1.0)}


def get_config():
    config = tiny.get_config()
    config.name = "tiny_sweep"
    config.data.valid_rows = 32
    config.train.steps, config.train.save_every, config.train.eval_every = 20, 5, 10
    return config
