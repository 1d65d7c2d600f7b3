"""What the horizons of three groups share: a model of parity's size with a feed-forward, trained to 64 tokens.

How far past the trained length a layer follows a product of group elements says what it tracks and how its state drifts
(the frame of arXiv:2605.07755: a recurrence that nothing corrects follows until its classes meet). `launch.inspect` and
`experiments.horizons` predict where a member fails from rows of the trained length, and by what.
"""

import dataclasses

from experiments.tasks import parity
from mamba3_jax.config import Config

MODELS = {
    "mamba3": {},
    "two_layers": {"model.pattern": "MM"},
    "quaternion": {"model.angles": "quaternion"},
    "no_rotation": {"model.angles": "none"},
    "gated_deltanet": {"model.pattern": "G", "model.delta_negative": True, "model.delta_head_dim": 16},
}
SEEDS = 3
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512)
METRIC = "scaled_last@64"
SHOWN = ("scaled_last@32", "scaled_last@64", "scaled_last@96", "scaled_last@128", "scaled_last@256", "scaled_last@512")


def config(name: str, group: str, order: int) -> Config:
    """Return the config of words over a group of so many elements."""
    small = parity.get_config()
    return dataclasses.replace(
        small,
        name=name,
        model=dataclasses.replace(small.model, vocab_size=order, d_ff=64),
        data=dataclasses.replace(
            small.data, source=group, task_lengths=(4, 8, 16, 32, 64), task_steps=(200, 300, 500, 1000, 2000)
        ),
        train=dataclasses.replace(small.train, steps=4000),
    )
