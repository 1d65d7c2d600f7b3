"""Directories in the official layout: `config.json` with `model.safetensors` or `pytorch_model.bin` or both."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from mamba3_jax.config import ModelConfig
from mamba3_jax.convert import torch_zip
from mamba3_jax.convert.config import from_official, to_official
from mamba3_jax.convert.names import to_params, to_state_dict
from mamba3_jax.finite import check_finite

DTYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
RECORD = "official.json"  # in a workdir: what `Origin` holds


class Origin(NamedTuple):
    """What an official directory says beyond our config and float32 parameters: enough to write it back as it was."""

    config: dict  # its config.json
    dtypes: dict[str, str]  # of every tensor
    files: list[str]  # which of FORMATS it had

    def save(self, workdir: Path) -> None:
        """Writes `official.json`."""
        (workdir / RECORD).write_text(json.dumps(self._asdict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, workdir: Path) -> "Origin | None":
        """Reads `official.json`; None where there is none, ValueError where it is damaged."""
        path = workdir / RECORD
        if not path.exists():
            return None
        held = read_json(path)
        if {name: type(value) for name, value in held.items()} != {"config": dict, "dtypes": dict, "files": list}:
            raise ValueError(f"{path} is damaged: wanted the objects config and dtypes, and the list files")
        origin = cls(**held)
        odd = [name for name in origin.files if name not in list(FORMATS)]
        odd += [dtype for dtype in origin.dtypes.values() if dtype not in list(DTYPES)]
        if odd:
            raise ValueError(f"{path} is damaged: {odd[0]!r} is not one of {[*FORMATS, *DTYPES]}")
        return origin


def read_json(path: Path) -> dict:
    """A JSON object; ValueError names the file that is none."""
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, wanted an object")
    return value


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors by name; ValueError where the file is not one or has a dtype of its own."""
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {error}") from error
    odd = {name: str(array.dtype) for name, array in tensors.items() if str(array.dtype) not in DTYPES}
    if odd:
        raise ValueError(f"{path} has tensors that are not one of {list(DTYPES)}: {odd}")
    return tensors


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One copy a name, as the official files have it: a tied head is written twice."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})


class Format(NamedTuple):
    """How one kind of file is read and written."""

    read: Callable[[Path], dict[str, np.ndarray]]
    write: Callable[[Path, dict[str, np.ndarray]], None]


FORMATS = {
    "model.safetensors": Format(read_safetensors, write_safetensors),
    "pytorch_model.bin": Format(torch_zip.read, torch_zip.write),
}


def is_official(path: Path) -> bool:
    """Whether a directory looks like the official layout."""
    return any((path / name).exists() for name in FORMATS)


def read(directory: str | os.PathLike) -> tuple[ModelConfig, dict, Origin]:
    """The config, the float32 parameters and the rest of an official directory; safetensors first where both files are.

    Raises:
        FileNotFoundError: no config.json or no tensors, saying what there is.
        ValueError: unsupported keys, or tensors that are missing, extra, misshapen or not finite.
    """
    directory = Path(directory)
    found = [name for name in FORMATS if (directory / name).exists()]
    if not found or not (directory / "config.json").exists():
        there = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else "no such directory"
        raise FileNotFoundError(f"{directory}: wanted config.json and one of {list(FORMATS)}; there is {there}")
    config = read_json(directory / "config.json")
    model = from_official(config)
    tensors = FORMATS[found[0]].read(directory / found[0])
    params = to_params(tensors, model)
    check_finite(str(directory / found[0]), tensors)
    return model, params, Origin(config, {name: str(array.dtype) for name, array in tensors.items()}, found)


def write(
    directory: str | os.PathLike,
    model: ModelConfig,
    params: dict,
    origin: Origin | None = None,
    dtype: str = "",
    files: list[str] | None = None,
) -> None:
    """Fills an existing directory with the official layout of a model.

    Args:
        directory: where to.
        model: our config; an `origin` whose config means the same keeps its own words.
        params: our parameters, float32.
        origin: of parameters that were read from an official directory.
        dtype: of every tensor; "": as in `origin`, or float32 without one.
        files: names in `FORMATS`; None: as in `origin`, or pytorch_model.bin, which the official code loads.

    Raises:
        ValueError: a config with no official counterpart, parameters that do not fit it, or values that the dtypes of
            `origin` cannot hold (the parameters were trained since): say which dtype to round to. Parameters that are
            not finite, or are not in `dtype`.
    """
    directory, config = Path(directory), to_official(model)
    if dtype and dtype not in DTYPES:
        raise ValueError(f"{dtype=} is not one of {list(DTYPES)}")
    tensors = to_state_dict(params, model)
    if origin is not None and to_official(from_official(origin.config)) == config:
        config = origin.config
        if lacking := sorted(set(tensors) - set(origin.dtypes)):
            raise ValueError(f"{RECORD} is damaged: no dtype of {lacking[0]}")
        tensors = as_before(tensors, origin.dtypes) if not dtype else tensors
        files = origin.files if files is None else files
    if dtype or origin is None:
        tensors = cast(tensors, dict.fromkeys(tensors, dtype or "float32"))
    check_finite(f"not written to {directory}", tensors)  # float16 ends at 65,504
    (directory / "config.json").write_text(json.dumps(config, indent=4, allow_nan=False))
    for name in files or ["pytorch_model.bin"]:
        FORMATS[name].write(directory / name, tensors)


def cast(tensors: dict[str, np.ndarray], dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """Each tensor in its dtype; names that share an array still share one."""
    done = {}
    for name, array in tensors.items():
        key = (id(array), dtypes[name])
        if key not in done:
            with np.errstate(over="ignore"):  # what becomes infinite is named by whoever writes it
                done[key] = array.astype(DTYPES[dtypes[name]])
    return {name: done[id(array), dtypes[name]] for name, array in tensors.items()}


def as_before(tensors: dict[str, np.ndarray], dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """`cast`, or ValueError where that would round."""
    after = cast(tensors, dtypes)
    rounded = [k for k, v in after.items() if not np.array_equal(v.astype(np.float32), tensors[k], equal_nan=True)]
    if rounded:
        raise ValueError(
            f"{len(rounded)} tensors no longer fit the dtypes they came in ({rounded[0]} was {dtypes[rounded[0]]}): "
            f"choose a dtype, one of {list(DTYPES)}"
        )
    return after
