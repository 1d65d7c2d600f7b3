"""Files: read or named in one line, told apart by their contents, and written whole or not at all."""

import contextlib
import hashlib
import json
from pathlib import Path


def read_json(path: Path):
    """Return what a JSON file holds.

    Raises:
        ValueError: it holds something else; the message names the file.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8 either; or brackets without end
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
    """Write a JSON file whole or not at all; ValueError for NaN and infinity, which `finite.or_null` takes out."""
    replace(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def replace(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    with written(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written(path: Path, mark: str = ""):
    """Give a path beside a file, to be written inside, and rename it: whatever goes wrong, what was there stays whole.

    Args:
        path: of the file.
        mark: in the other's name, where several processes may write the file at once.

    Raises:
        OSError: as `writing` has it.
    """
    partial = path.with_name(f"{path.name}{mark}.partial")
    with writing(path):
        try:
            yield partial
            partial.replace(path)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def check_writable(path: Path) -> None:
    """Raise OSError, which names it, where a file and the folders above it could not be written; leave nothing behind.

    Long work asks first.
    """
    missing = [folder for folder in path.parents if not folder.exists()]  # the nearest first
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError("it is a folder")
            partial = path.with_name(f"{path.name}.partial")
            partial.touch()
            partial.unlink()
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):  # it was never made, or another process writes into it
                    folder.rmdir()


@contextlib.contextmanager
def writing(path: Path):
    """Raise OSError, one line that names the path, for whatever goes wrong while it is written.

    A full disk, a quota or a directory that is read-only reach Orbax's callers as errors of many types.
    """
    try:
        yield
    except Exception as error:
        raise OSError(f"{path} cannot be written: {why(error)}") from error


def why(error: Exception) -> str:
    """Say in one line what went wrong; a long message begins with the deed and ends with the reason."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else f'{text[:100]} ... {text[-200:]}'}"
