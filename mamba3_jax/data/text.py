"""Text files, by glob; without one, the Python standard library's own source, which every machine has."""

import functools
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mamba3_jax.config import DataConfig
from mamba3_jax.data.packing import Corpus, Rows, concatenate, rows
from mamba3_jax.data.vocabulary import tokenizer

VALID_IN = 20  # one file in this many is for validation
# Tests and applications inside the standard library: more text, less of it worth learning.
STDLIB_SKIP = frozenset(
    "site-packages __pycache__ test tests idlelib lib2to3 turtledemo pydoc_data ensurepip".split()  # noqa: SIM905
)


def in_valid(name: str) -> bool:
    """Whether the file of this name, relative to its root, is one of the twentieth held out. The machine has no say."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALID_IN == 0


def standard_library() -> dict[str, Path]:
    """Relative name -> path, sorted, of the source files of the running Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIP]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def matches(pattern: str, field: str) -> dict[str, Path]:
    """Name relative to the folder before the first wildcard -> path, sorted, of the files that a glob matches."""
    pattern = str(Path(pattern).expanduser())
    paths = [Path(path) for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
    if not paths:
        raise FileNotFoundError(f"data.{field}={pattern!r} matches no file")
    root = Path(pattern)
    while glob.has_magic(str(root)) or root.is_file():
        root = root.parent
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def files(config: DataConfig, split: str) -> dict[str, Path]:
    """Relative name -> path, sorted, of the files of a split ("train" or "valid"). No file is in both."""
    train = matches(config.train_glob, "train_glob") if config.train_glob else standard_library()
    if not config.valid_glob:
        chosen = {name: path for name, path in train.items() if in_valid(name) == (split == "valid")}
        if not chosen:
            raise ValueError(
                f"of the {len(train)} files of data.train_glob={config.train_glob!r}, none falls to the {split} split, "
                f"one in {VALID_IN} by a hash of the name being for validation: name data.valid_glob"
            )
        return chosen
    valid = matches(config.valid_glob, "valid_glob")
    seen = {path.resolve() for path in train.values()}
    if both := [name for name, path in valid.items() if path.resolve() in seen]:
        raise ValueError(f"{len(both)} files are in both data.train_glob and data.valid_glob, {both[0]} for one")
    return valid if split == "valid" else train


def read(paths: dict[str, Path]) -> Iterator[str]:
    """The text of each file, line ends as they are. Empty files are no documents and are left out."""
    for path in paths.values():
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        if text:
            yield text


@functools.lru_cache(maxsize=4)
def _corpus(tokenizer_name: str, train_glob: str, valid_glob: str, split: str) -> Corpus:
    config = DataConfig(tokenizer=tokenizer_name, train_glob=train_glob, valid_glob=valid_glob)
    paths, codec = files(config, split), tokenizer(config)
    return concatenate(codec.encode_all(read(paths)), codec, f"the {len(paths)} files of the {split} split")


def text_rows(config: DataConfig, split: str) -> Rows:
    """The rows of a split, a file a document. Tokenised once a process, then kept in memory."""
    return rows(_corpus(config.tokenizer, config.train_glob, config.valid_glob, split), config.length)
