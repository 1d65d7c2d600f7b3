"""What a mixer is. All that the rest asks of one stands in its own file; `MIXERS` in `__init__.py` has it in a line."""

from typing import ClassVar

import flax.linen as nn

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.official import Row


class Mixer(nn.Module):
    """y_BLD, state = mixer(x_BLD, state, start_BL), for any L: training, prefill and decoding are this one call.

    `state` None is the empty state; `start_BL` is true at the first token of a document, or None, and no value or
    gradient crosses it. Every array of the state begins with the batch. Axes of parameters have logical names
    (`sharding.RULES`); parameters called skip, scale or ..bias, ..norm do not decay (`train/optimizer.py`).
    """

    config: ModelConfig

    letter: ClassVar[str]  # of a layer in `config.pattern`
    matrices: ClassVar[tuple[str, ...]]  # parameters that every token is multiplied by: 2 FLOPs an entry
    # What fields must be for the official layer to compute the same; None: there is no official layer.
    official: ClassVar[dict | None] = None

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Raise ValueError, naming the value and the wish, for sizes or choices that this mixer cannot have."""

    @staticmethod
    def empty_state(config: ModelConfig, batch: int, capacity: int):
        """Make the state before any token, with room for `capacity` of them where it grows with their number."""
        raise NotImplementedError

    @staticmethod
    def state_flops(config: ModelConfig, length: int) -> float:
        """Count the forward FLOPs a token, in rows of `length`, beside those of `matrices`."""
        raise NotImplementedError

    @staticmethod
    def room(state) -> tuple | None:
        """Return (tokens held, an array; tokens that fit in all) of a state, None where any number fits."""
        return None

    @staticmethod
    def official_rows(config: ModelConfig) -> dict[str, Row]:
        """List the official tensors of a layer in their order: name under `mixer.` -> where it lies in our parameters.

        Needed where `official` is not None.
        """
        raise NotImplementedError
