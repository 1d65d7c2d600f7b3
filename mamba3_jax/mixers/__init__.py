"""Mixers, interchangeable in a pattern. A new one is a file with a `Mixer` (see `mixer.py`) and a line in `MIXERS`."""

from mamba3_jax.mixers.attention import Attention
from mamba3_jax.mixers.gated_deltanet import GatedDeltaNet
from mamba3_jax.mixers.mamba1 import Mamba1
from mamba3_jax.mixers.mamba2 import Mamba2
from mamba3_jax.mixers.mamba3 import Mamba3
from mamba3_jax.mixers.mixer import Mixer

MIXERS: dict[str, type[Mixer]] = {
    "mamba3": Mamba3,
    "mamba2": Mamba2,
    "mamba1": Mamba1,
    "gated_deltanet": GatedDeltaNet,
    "attention": Attention,
}


def letters() -> dict[str, str]:
    """Return the name in `MIXERS` for every letter that a pattern may have."""
    return {mixer.letter: name for name, mixer in MIXERS.items()}
