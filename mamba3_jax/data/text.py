"""Read files of text, JSON lines or Parquet, by glob; without one, the Python standard library's own source."""

import contextlib
import functools
import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from mamba3_jax.config import DataConfig, listed, what_builds
from mamba3_jax.data.packing import Corpus, Rows, concatenate, rows
from mamba3_jax.data.token_cache import cached, is_kept
from mamba3_jax.data.vocabulary import tokenizer

VALID_IN = 20  # one file in so many is for validation
# Tests and applications inside the standard library, which are more text, but less worth learning.
STDLIB_SKIP = frozenset(
    "site-packages __pycache__ test tests idlelib lib2to3 turtledemo pydoc_data ensurepip".split()  # noqa: SIM905
)
# A .json file is one document as it stands. But nobody compresses a single one: large sets name JSON lines .json.gz.
JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")

FIELDS = ("tokenizer", "eos", "train_glob", "valid_glob", "separator", "key")  # decide what a split holds


def in_valid(name: str) -> bool:
    """Tell whether a file is held out, one in twenty, by its name relative to the root; so all machines agree."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALID_IN == 0


def standard_library() -> dict[str, Path]:
    """Return the source files of the running Python: relative name -> path, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIP]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def matches(pattern: str, field: str) -> dict[str, Path]:
    """Return the files that a glob matches: name relative to the folder before the first wildcard -> path, sorted."""
    pattern = str(Path(pattern).expanduser())
    found = map(Path, glob.glob(pattern, recursive=True))
    paths = [path for path in found if path.is_file() and not is_kept(path)]
    if not paths:
        raise FileNotFoundError(f"data.{field}={pattern!r} matches no file{_hint(pattern)}")
    root = Path(pattern.replace("[[]", "\0"))  # [[] is not a wildcard, but how a glob writes [
    while glob.has_magic(str(root)) or Path(str(root).replace("\0", "[")).is_file():
        root = root.parent
    root = Path(str(root).replace("\0", "["))
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def _hint(pattern: str) -> str:
    """Say, for a glob that matches no file, what may have been meant."""
    literal = pattern.replace("[", "[[]")
    if literal != pattern and glob.glob(literal, recursive=True):
        return f": [ ] in a glob stand for one of the characters between them; for the name itself write {literal!r}"
    if folders := [path for path in glob.glob(pattern, recursive=True) if Path(path).is_dir()]:
        inside = f"{pattern.removesuffix('**').rstrip('/')}/**/*"
        return f": {folders[0]} is a directory; for the files in it write {inside!r}"
    return what_builds(pattern)


def files(config: DataConfig, split: str) -> dict[str, Path]:
    """Return the files of a split ("train" or "valid"): relative name -> path, sorted. No file is in both splits."""
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


def read(paths: dict[str, Path], separator: str = "", key: str = "text") -> Iterator[str]:
    """Yield the documents of each file that are not empty; the end of a file's name says how it is read.

    In JSON_LINES a document is the field `key` of each line's object, in .parquet each row of the column `key`. Other
    files are UTF-8 text, line ends as they are: one document, or the parts between `separator`s that have more than
    white space. .gz is unpacked.

    Raises:
        ValueError: a file cannot be read like this; the message names file and line.
    """
    for path in paths.values():
        if path.name.endswith(JSON_LINES):
            documents = _json_lines(path, key)
        elif path.suffix == ".parquet":
            documents = _parquet(path, key)
        else:
            documents = _text(path, separator)
        yield from filter(None, documents)


@contextlib.contextmanager
def _opened(path: Path):
    """Open a file for reading bytes, unpacked; ValueError where a .gz is damaged."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _text(path: Path, separator: str) -> Iterator[str]:
    with _opened(path) as stream:
        try:
            text = stream.read().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    yield from filter(str.strip, text.split(separator)) if separator else [text]


def _json_lines(path: Path, key: str) -> Iterator[str]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _field(line, key, f"{path}, line {number}")


def _field(line: bytes, key: str, where: str) -> str:
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(example, dict):
        raise ValueError(f"{where} is not an object with the field data.key={key!r}, but {type(example).__name__}")
    if key not in example:
        raise ValueError(f"{where} has no field data.key={key!r}; it has {listed(example) or 'none'}")
    text = example[key]
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field data.key={key!r} is not a string, but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair
        raise ValueError(f"{where}: the field data.key={key!r} is not text: {error.reason}") from None
    return text


def _parquet(path: Path, key: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading {path} takes the package pyarrow: pip install 'mamba3_jax[parquet]'") from None
    try:
        with pa.parquet.ParquetFile(path) as table:
            columns = {field.name: field.type for field in table.schema_arrow}
            if key not in columns:
                raise ValueError(f"{path} has no column data.key={key!r}; it has {listed(columns) or 'none'}")
            if not (pa.types.is_string(columns[key]) or pa.types.is_large_string(columns[key])):
                raise ValueError(f"{path}: the column data.key={key!r} is not of strings, but {columns[key]}")
            number = 0
            for batch in table.iter_batches(1024, columns=[key]):
                for text in batch.column(key).to_pylist():
                    number += 1
                    if text is None:
                        raise ValueError(f"{path}, row {number}: the column data.key={key!r} is not a string, but null")
                    yield text
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file that can be read: {error}") from None


def texts(config: DataConfig, split: str) -> Iterator[str]:
    """Yield the documents of a split; see `read`."""
    return read(files(config, split), config.separator, config.key)


@functools.lru_cache(maxsize=4)
def _corpus(split: str, **fields: str) -> Corpus:
    config = DataConfig(**fields)
    paths, codec = files(config, split), tokenizer(config)

    def tokenise() -> Corpus:
        documents = read(paths, config.separator, config.key)
        return concatenate(codec.encode_all(documents), codec, f"the {len(paths)} files of the {split} split")

    if not config.train_glob:  # the tokens would be kept beside Python's own source, which is no place to write
        return tokenise()
    return cached(paths.values(), codec, {"separator": config.separator, "key": config.key}, tokenise)


def corpus(config: DataConfig, split: str) -> Corpus:
    """Return the tokens of a split's documents (`read`). They are kept in memory, and in a file beside the text."""
    return _corpus(split, **{name: getattr(config, name) for name in FIELDS})


def text_rows(config: DataConfig, split: str) -> Rows:
    """Return the rows of a split of text files."""
    return rows(corpus(config, split), config.length)
