"""Loading a model and its parameters from a workdir of this project or from an official PyTorch directory."""

import dataclasses
import os
from pathlib import Path

from mamba3_jax.config import Config

# The fields of `ModelConfig` that `load` can change: none of them changes a parameter.
HOW = ("compute_dtype", "implementation", "chunk", "attn_implementation", "remat", "unroll")


def load(path, *, step: int | None = None, **how):
    """Return (model, params) of a workdir, or of a directory with config.json and the official PyTorch weights.

        model, params = mamba3_jax.load("runs/text")
        logits_BLV, state = model.apply({"params": params}, tokens_BL)

    Official weights are model.safetensors or pytorch_model.bin. They may be sharded, or wrapped as training loops save
    them (mamba3_jax/convert/peel.py).

    Args:
        path: the directory.
        step: which checkpoint of a workdir; None is the newest.
        how: fields of `ModelConfig` that run the model differently from how it was trained: compute_dtype,
            implementation, chunk, attn_implementation, remat, unroll.

    Returns:
        A `LanguageModel` (its `config` is the `ModelConfig`) and its parameters as float32 device arrays.

    Raises:
        FileNotFoundError: there is nothing to load; the message says what was looked for and what is there.
        ValueError: path is no path, or step no whole number; or a checkpoint is damaged, holds NaN or infinity, or does
            not fit its config; the message names the tensors that do not fit.
    """
    config, params = load_run(path, step=step)
    return build(config, **how), params


def load_run(path, *, step: int | None = None) -> tuple[Config, dict]:
    """Return (config, params): the parameters as `load` returns them, and the `Config` of the whole run, with its data.

    Arguments and errors are those of `load`.
    """
    # These import jax and orbax, which takes seconds that `import mamba3_jax` need not take.
    import flax
    import jax
    import jax.numpy as jnp

    from mamba3_jax import checkpoint, convert, memory
    from mamba3_jax.convert.names import check, flatten
    from mamba3_jax.convert.shards import contents
    from mamba3_jax.inputs import whole
    from mamba3_jax.model import boxed_shapes

    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path is {type(path).__name__}, wanted a directory")
    step = None if step is None else whole("step", step, 0)
    path = Path(path).expanduser()
    if (path / "checkpoints").is_dir():
        if (path / "members").is_dir():
            raise ValueError(f"{path} has all members of a sweep's variant in one: its best one is {path / 'best'}")
        memory.fit_device(memory.parameters(checkpoint.load_config(path, step).model))
        config, params = checkpoint.load_model(path, step)
        wanted = flatten(flax.linen.meta.unbox(boxed_shapes(config.model)))
        check(str(path), flatten(params), {name: leaf.shape for name, leaf in wanted.items()})
        return config, jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), params)
    if not convert.is_official(path):
        raise FileNotFoundError(
            f"{path}: nothing to load. Looked for checkpoints/ (a workdir) and for config.json with model.safetensors "
            f"or pytorch_model.bin (official); there is {contents(path)}"
        )
    if step is not None:
        raise ValueError(f"{path} is an official directory, which has no steps, and {step=} was asked for")
    model, params, _origin = convert.read(path)
    return run_config(path, model), jax.tree.map(jnp.asarray, params)


def run_config(path: Path, model) -> Config:
    """Return a `Config` around an official directory's model, with its tokenizer.json if it has one."""
    tokenizer = path / "tokenizer.json"
    config = Config(name=path.resolve().name, model=model)
    config.data.tokenizer = str(tokenizer.resolve()) if tokenizer.exists() else ""
    return config


def build(config: Config, **how):
    """Return the `LanguageModel` of a config, whose fields `how` replaces; see `load`."""
    from mamba3_jax.model import LanguageModel, validate

    unknown = sorted(set(how) - set(HOW))
    if unknown:
        raise ValueError(f"{unknown} cannot be chosen when a model is loaded; only {list(HOW)} can")
    model = dataclasses.replace(config.model, **how)
    validate(model)
    return LanguageModel(model)
