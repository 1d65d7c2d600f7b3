"""The data and the tokenizer of a checkpoint, as the flags of a command change them."""

import dataclasses

from launch.common import warn
from mamba3_jax.config import Config, DataConfig
from mamba3_jax.data import loader, tokenizer, tokenizer_copy


def data_with(data: DataConfig, tokenizer: str | None, eos: str | None) -> DataConfig:
    """Change the data of a checkpoint as the flags --tokenizer and --eos (None: not given) say.

    Another tokenizer than the checkpoint's own is used with a line of warning.
    """
    if tokenizer is not None:
        if other := tokenizer_copy.differ(tokenizer, data.tokenizer):
            warn(f"--tokenizer={tokenizer} is not the tokenizer of the checkpoint, {data.tokenizer}")
        data = dataclasses.replace(data, tokenizer=tokenizer, eos="" if other else data.eos)
    return data if eos is None else dataclasses.replace(data, eos=eos)


def held_out(config: Config, valid_glob: str | None, tokenizer: str | None, eos: str | None) -> DataConfig:
    """Return the held-out data of a checkpoint as the flags change it (None: not given), after reading a batch of it.

    Raises:
        ValueError, OSError: no batch of it can be made for this model.
    """
    data = config.data
    if valid_glob:
        data = dataclasses.replace(data, source="text", valid_glob=valid_glob)
    data = data_with(data, tokenizer, eos)
    if not data.tokenizer:
        raise ValueError("this checkpoint names no tokenizer: give --tokenizer=tokenizer.json")
    codec_of(data, config.model.vocab_size)
    next(loader(data, "valid", vocab_size=config.model.vocab_size))
    return data


def codec_of(data: DataConfig, vocab_size: int):
    """Return the tokenizer that the data names, or None; ValueError where it has ids outside of the vocabulary."""
    codec = tokenizer(data) if data.tokenizer else None
    if codec and codec.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {data.tokenizer} has ids up to {codec.vocab_size - 1}, "
            f"the model's vocabulary is {vocab_size}"
        )
    return codec
