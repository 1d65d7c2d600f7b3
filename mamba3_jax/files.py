"""Files: read with errors of one line that name them, told apart by their contents, written whole or not at all."""

import contextlib
import hashlib
import json
import uuid
from pathlib import Path


def read_json(path: Path):
    """Return what a JSON file holds.

    Raises:
        ValueError: it holds something else; the message names the file.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8, and brackets nested too deep
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_object(path: Path) -> dict:
    """Return the object that a JSON file holds; see `read_json` for errors."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, wanted an object")
    return value


def sha256(path: Path) -> str:
    """Compute the hash of a file of any size."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value, indent: int = 1) -> None:
    """Write a JSON file whole or not at all; ValueError for NaN and infinity, which `finite.or_null` makes null."""
    replace(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def replace(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    with written(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written(path: Path):
    """Give a new path beside a file, to be written inside, and rename it to the file at the end.

    Whatever goes wrong, what was there stays whole. Several processes may write the file at once: the last one's stays.

    Raises:
        OSError: as `writing` has it.
    """
    partial = _beside(path)
    with writing(path):
        try:
            yield partial
            partial.replace(path)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def _beside(path: Path) -> Path:
    """Return a path in the same folder that nobody else writes."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def check_writable(path: Path) -> None:
    """Raise OSError, which names the file, where it and the folders above it cannot be written; leave nothing behind.

    Call it before long work whose result the file is to hold.
    """
    missing = [folder for folder in path.parents if not folder.exists()]  # the nearest first
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError("it is a folder")
            partial = _beside(path)
            partial.touch()
            partial.unlink()
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):  # it was never made, or another process writes into it
                    folder.rmdir()


@contextlib.contextmanager
def writing(path: Path):
    """Raise OSError, one line that names the path, for whatever goes wrong while it is written.

    Orbax raises errors of many types for a full disk, a quota or a directory that is read-only.
    """
    try:
        yield
    except Exception as error:
        raise OSError(f"{path} cannot be written: {why(error)}") from error


def why(error: Exception) -> str:
    """Say in one line what went wrong; of a long message keep the begin, what was done, and the end, the reason."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:100]} ... {text[-200:]}'}"
