"""Read and write the official layout: a folder of `config.json` and `model.safetensors`, `pytorch_model.bin` or both.

Reading also takes these files in shards, and as people's training loops save them (see shards.py and peel.py). Writing
makes the plain official files only.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from mamba3_jax import memory
from mamba3_jax.config import ModelConfig, listed
from mamba3_jax.convert import torch_zip
from mamba3_jax.convert.config import from_official, to_official
from mamba3_jax.convert.names import official_shapes, to_params, to_state_dict
from mamba3_jax.convert.peel import peel
from mamba3_jax.convert.shards import contents, is_there, read_file, read_json
from mamba3_jax.finite import check_finite

DTYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
# The dtypes of weights by safetensors' names, then others that buffers may have.
SAFETENSORS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "BOOL": np.bool_}
SAFETENSORS |= {f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)}
SAFETENSORS |= {f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)}
RECORD = "official.json"  # in a workdir: the file of an `Origin`


class Origin(NamedTuple):
    """What an official directory says beyond our config and float32 parameters: enough to write it back as it was."""

    config: dict  # its config.json
    dtypes: dict[str, str]  # of every tensor, by name
    files: list[str]  # which of FORMATS it had, whole or in shards
    peeled: list[str]  # lines that say what `read` changed around the tensors; `write` does not undo it

    def save(self, workdir: Path) -> None:
        """Write `official.json`."""
        (workdir / RECORD).write_text(json.dumps(self._asdict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, workdir: Path) -> "Origin | None":
        """Read `official.json`; None where there is none, ValueError where it is damaged."""
        path = workdir / RECORD
        if not path.exists():
            return None
        held = {"peeled": []} | read_json(path)  # records of earlier versions have no "peeled"
        kinds = {"config": dict, "dtypes": dict, "files": list, "peeled": list}
        fits = {name: type(value) for name, value in held.items()} == kinds
        if not fits or not all(isinstance(line, str) for line in held["peeled"]):
            raise ValueError(f"{path} is damaged: wanted the objects config and dtypes, and the lists files and peeled")
        origin = cls(**held)
        odd = [name for name in origin.files if name not in list(FORMATS)]
        odd += [dtype for dtype in origin.dtypes.values() if dtype not in list(DTYPES)]
        if odd:
            raise ValueError(f"{path} is damaged: {odd[0]!r} is not one of {[*FORMATS, *DTYPES]}")
        return origin


def read_safetensors(path: Path, _say: Callable[[str], None] | None = None) -> dict[str, np.ndarray]:
    """Return the tensors by name, as views of the file, mapped into memory: it must not change while they are used.

    Raises:
        ValueError: it is not a safetensors file, or has a dtype that is not in `SAFETENSORS`.
    """
    try:
        with safetensors.safe_open(path, "numpy"):  # checks the header, the shapes and where the tensors lie
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {error}") from error
    content = np.memmap(path, np.uint8, "r").view(np.ndarray)
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    if odd := [f"{name} {held['dtype']}" for name, held in header.items() if held["dtype"] not in SAFETENSORS]:
        raise ValueError(f"{path} has {len(odd)} tensors of a dtype that is not read: {listed(odd)}")
    tensors = {}
    for name, held in header.items():
        first, last = held["data_offsets"]
        tensors[name] = content[start + first : start + last].view(SAFETENSORS[held["dtype"]]).reshape(held["shape"])
    return tensors


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one copy for each name, as the official files have it: a tied head is written twice."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})


class Format(NamedTuple):
    """How one kind of file is read and written."""

    read: Callable[..., dict[str, np.ndarray]]  # takes a path, and a function that gets a line for all that is peeled
    write: Callable[[Path, dict[str, np.ndarray]], None]


FORMATS = {
    "model.safetensors": Format(read_safetensors, write_safetensors),
    "pytorch_model.bin": Format(torch_zip.read, torch_zip.write),
}


def is_official(path: Path) -> bool:
    """Tell whether a directory looks like the official layout."""
    return any(is_there(path / name) for name in FORMATS)


def without_infinity(config: dict, say: Callable[[str], None]) -> dict:
    """Return a config.json without `dt_limit`, whose one supported value has an Infinity, which JSON does not have."""
    ssm = config.get("ssm_cfg", {})
    if "dt_limit" not in ssm:
        return config
    say("left ssm_cfg.dt_limit, which says the default, out of config.json")
    return config | {"ssm_cfg": {key: value for key, value in ssm.items() if key != "dt_limit"}}


def read(directory: str | os.PathLike) -> tuple[ModelConfig, dict, Origin]:
    """Return the config, the float32 parameters and the rest of an official directory.

    Where there are both files, the tensors are those of model.safetensors. `Origin.peeled` says what was joined,
    unwrapped, renamed, ignored, left out or taken from another tensor.

    Raises:
        FileNotFoundError: no config.json or no tensors; the message says what there is.
        ValueError: unsupported keys, a file that is not what its name says, or tensors that are missing, extra,
            misshapen, not finite, or of a dtype that is not float32, float16 or bfloat16.
    """
    directory = Path(directory)
    found = [name for name in FORMATS if is_there(directory / name)]
    if not found or not os.path.lexists(directory / "config.json"):
        raise FileNotFoundError(
            f"{directory}: wanted config.json and one of {list(FORMATS)}; there is {contents(directory)}"
        )
    config = read_json(directory / "config.json")
    model, path, peeled = from_official(config), directory / found[0], []
    config = without_infinity(config, peeled.append)
    memory.fit(memory.parameters(model), "this machine", memory.free_on_host())
    tensors = read_file(path, FORMATS[found[0]].read, peeled.append)
    try:
        tensors = peel(tensors, official_shapes(model), model.tie_embeddings, peeled.append)
        dtypes = {name: str(array.dtype) for name, array in tensors.items()}
        # Other dtypes would have to be rounded, and nothing is rounded in silence.
        if odd := [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]:
            raise ValueError(f"{len(odd)} tensors are not one of {list(DTYPES)}: {listed(odd)}")
        params = to_params(tensors, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_finite(str(path), tensors)
    return model, params, Origin(config, dtypes, found, peeled)


def write(
    directory: str | os.PathLike,
    model: ModelConfig,
    params: dict,
    origin: Origin | None = None,
    dtype: str = "",
    files: list[str] | None = None,
) -> None:
    """Fill an existing directory with the official layout of a model.

    Args:
        directory: where to write.
        model: our config; if that of `origin` means the same, its config.json is written as it was.
        params: our parameters, float32.
        origin: of parameters that were read from an official directory.
        dtype: of every tensor; "": as in `origin`, or float32 without one.
        files: names in `FORMATS`; None: as in `origin`, or pytorch_model.bin, which the official code loads.

    Raises:
        ValueError: a config without an official counterpart; parameters that do not fit it; values that the dtypes of
            `origin` cannot hold, as they were trained since (give `dtype` to round them); or parameters that are not
            finite, or not finite in `dtype`.
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
    """Return each tensor in its dtype; names that share an array still share one."""
    done = {}
    for name, array in tensors.items():
        key = (id(array), dtypes[name])
        if key not in done:
            with np.errstate(over="ignore"):  # `write` raises for what becomes infinite
                done[key] = array.astype(DTYPES[dtypes[name]], copy=False)
    return {name: done[id(array), dtypes[name]] for name, array in tensors.items()}


def as_before(tensors: dict[str, np.ndarray], dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """Return what `cast` does; ValueError where that would round."""
    after = cast(tensors, dtypes)
    rounded = [k for k, v in after.items() if not np.array_equal(v.astype(np.float32), tensors[k], equal_nan=True)]
    if rounded:
        raise ValueError(
            f"{len(rounded)} tensors no longer fit the dtypes they came in ({rounded[0]} was {dtypes[rounded[0]]}): "
            f"choose a dtype, one of {list(DTYPES)}"
        )
    return after
