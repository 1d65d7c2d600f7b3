"""Find a directory's files and check that each is of its kind, before its tensors are read; join shards by their index.

A sharded `model.safetensors` is `model-00001-of-00002.safetensors`, ... and `model.safetensors.index.json`, whose
`weight_map` says in which file each tensor is.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mamba3_jax.config import listed
from mamba3_jax.files import read_object

LFS = b"version https://git-lfs.github.com/spec/"


def contents(path: Path) -> str:
    """Return, for an error, what is at a path where a directory was wanted."""
    if path.is_dir():
        return f"[{listed(repr(entry.name) for entry in sorted(path.iterdir()))}]"
    return "a file, not a directory" if path.exists() else "no such directory"


def check_file(path: Path) -> None:
    """Raise ValueError where a path is a directory, a broken link, an empty file or a Git LFS pointer."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory, wanted a file")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {path.readlink()}, which is not there")
    with path.open("rb") as file:
        first = file.read(len(LFS))
    if not first:
        raise ValueError(f"{path} is empty (0 bytes)")
    if first == LFS:
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull where it was cloned")


def read_json(path: Path) -> dict:
    """Read a JSON object; ValueError, naming the file, if it holds none."""
    check_file(path)
    return read_object(path)


def index_of(path: Path) -> Path:
    """Return the path of a sharded file's index."""
    return path.with_name(f"{path.name}.index.json")


def shards_of(path: Path) -> list[Path]:
    """Return the shards that lie where an unsharded file would."""
    return sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))


def is_there(path: Path) -> bool:
    """Tell whether a file, its index or a shard of it is there, damaged or not."""
    return os.path.lexists(path) or os.path.lexists(index_of(path)) or bool(shards_of(path))


def read_file(path: Path, read: Callable, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Return the tensors by name of a file that `is_there`, in one piece or in shards."""
    if os.path.lexists(path):
        check_file(path)
        if index_of(path).exists():
            say(f"did not read {index_of(path).name}, since {path.name} is there whole")
        return read(path, say)
    if not os.path.lexists(index_of(path)):
        shards = listed(shard.name for shard in shards_of(path))
        raise ValueError(f"{path.parent} has shards ({shards}), but not {index_of(path).name}")
    return join(index_of(path), read, say)


def join(index: Path, read: Callable, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Return the tensors of all shards, in the order of the index.

    Raises:
        ValueError: the index is damaged or names files outside of its directory; a shard is missing, or the index
            leaves it out; a tensor is in no shard, in two, in another than the index says, or not in the index.
    """
    file_of = weight_map(index)
    files = sorted(set(file_of.values()))
    missing = [file for file in files if not (index.parent / file).exists()]
    if missing:
        raise ValueError(f"{index} names {len(files)} shards, and {len(missing)} are not there: {listed(missing)}")
    one = index.with_name(index.name.removesuffix(".index.json"))
    if left_out := [path.name for path in shards_of(one) if path.name not in files]:
        raise ValueError(f"{index} does not name {len(left_out)} shards that are there: {listed(left_out)}")
    tensors, places = {}, {name: [] for name in file_of}
    for file in files:
        check_file(index.parent / file)
        shard = read(index.parent / file, say)
        tensors |= shard
        for name in shard:
            places.setdefault(name, []).append(file)
    lines = [
        disagreement(name, file_of.get(name), held) for name, held in places.items() if held != [file_of.get(name)]
    ]
    if lines:
        raise ValueError(f"{index} and its shards disagree in {len(lines)} tensors: {listed(lines, between='; ')}")
    say(f"joined {len(files)} shards of {one.name}")
    return {name: tensors[name] for name in file_of}


def disagreement(name: str, said: str | None, held: list[str]) -> str:
    """Say what is wrong with a tensor that is in the files `held`, and in `said` (None: in no file) by the index."""
    if len(held) > 1:
        return f"{name} is in {' and in '.join(held)}"
    if not held:
        return f"{name} is in no shard, the index says {said}"
    return f"{name} is in {held[0]}, " + (f"the index says {said}" if said else "but not in the index")


def weight_map(index: Path) -> dict[str, str]:
    """Return the `weight_map` of an index: tensor name -> name of a file beside it."""
    held = read_json(index).get("weight_map")
    if not isinstance(held, dict) or not held or not all(isinstance(file, str) for file in held.values()):
        raise ValueError(f"{index} has no weight_map, an object of tensor names and file names")
    odd = ("", "..")  # Path.name of these is the same, so the next line would take them
    outside = sorted({file for file in held.values() if Path(file).name != file or file in odd or "\0" in file})
    if outside:
        raise ValueError(f"{index} names files that are not in its directory: {listed(map(repr, outside))}")
    return held
