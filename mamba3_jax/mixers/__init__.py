"""Mixers: Flax modules `y_BLD, state = mixer(x_BLD, state, start_BL)` for any L, interchangeable in a pattern.

A mixer also has two static methods: `check(config)` raises ValueError for sizes it cannot have, and
`empty_state(config, batch, capacity)` is the state before any token.
"""

from mamba3_jax.mixers.attention import Attention
from mamba3_jax.mixers.mamba3 import Mamba3

MIXERS = {"mamba3": Mamba3, "attention": Attention}
LETTERS = {"M": "mamba3", "A": "attention"}
