"""Keep the files of a corpus, all of them whole, with a record, or none; and one archive of them."""

import contextlib
import hashlib
import json
import shutil
import tarfile
import time
from pathlib import Path

from experiments.packages import DAMAGED
from mamba3_jax.data import token_cache
from mamba3_jax.files import read_json, sha256, write_json, written
from mamba3_jax.train.loop import say

TEXTS = ("train.jsonl", "valid.jsonl", "dna/train.txt", "dna/valid.txt")
FILES = (*TEXTS, "tokenizer.json", "tokenizer_config.json")
RECORD, PARTIAL = "corpus.json", ".partial"


@contextlib.contextmanager
def filling(folder: Path):
    """Yield a folder for the files of a corpus, which `publish` moves from there; it is always removed in the end."""
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # a killed run leaves one
    try:
        (partial / "dna").mkdir(parents=True)
        yield partial
    except OSError as error:
        raise OSError(f"{folder} cannot be filled: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def files_of(folder: Path) -> dict[str, dict]:
    """Return size and hash of every file of a corpus."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in FILES}


def publish(partial: Path, folder: Path, record: dict) -> None:
    """Move the files to their places, the record last: where it is, all files are."""
    (folder / RECORD).unlink(missing_ok=True)
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (partial / name).replace(folder / name)
    if (partial / token_cache.FOLDER).is_dir():  # made when the tokens were counted
        shutil.rmtree(folder / token_cache.FOLDER, ignore_errors=True)
        (partial / token_cache.FOLDER).replace(folder / token_cache.FOLDER)
    write_json(folder / RECORD, record)


def whole(folder: Path) -> dict | None:
    """Return the record of a folder if its files are as it says; else None, and say why unless there is no record."""
    if not (folder / RECORD).exists():
        return None
    try:
        record = read_json(folder / RECORD)
        if is_record(record) and record["files"] == files_of(folder):
            return record
        why = "is not of the files beside it"
    except (ValueError, OSError) as error:
        why = f"cannot be gone by: {error}"
    say(f"{folder / RECORD} {why}")
    return None


def is_record(record) -> bool:
    """Tell whether this JSON is what `build` records of a corpus."""
    parts = {"sources", "splits", "files", "made_by"}
    files = record["files"] if isinstance(record, dict) and record.keys() >= parts else None
    return isinstance(files, dict) and files.keys() == set(FILES)


def text_hash(record: dict) -> str:
    """Return the hash of the text alone, that is, of the lines that `sha256sum` prints for its files."""
    return hashlib.sha256(
        "".join(f"{record['files'][name]['sha256']}  {name}\n" for name in TEXTS).encode()
    ).hexdigest()


def pack(folder: Path, record: dict, path: Path) -> None:
    """Write the archive of a corpus, the record first; equal corpora have equal archives."""
    begin = time.perf_counter()
    say(f"packing {path}")
    with written(path) as partial, tarfile.open(partial, "w:xz", format=tarfile.USTAR_FORMAT) as archive:
        for name in (RECORD, *FILES):
            member = tarfile.TarInfo(name)  # without times and owners
            member.size = (folder / name).stat().st_size
            with (folder / name).open("rb") as stream:
                archive.addfile(member, stream)
    say(f"packed {path.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - begin:.0f} s")


def unpack(path: Path, folder: Path) -> dict:
    """Unpack the corpus of an archive into a folder, unless it is there, and return its record.

    Raises:
        ValueError: the archive is damaged or not one of `pack`, or the folder has another corpus.
    """
    try:
        with tarfile.open(path, "r|xz") as archive:
            record = _record_of(archive, path)
            if there := whole(folder):
                if there != record:
                    raise ValueError(f"{folder} has another corpus than {path}: name another --folder")
                return record
            with filling(folder) as partial:
                names = set()
                for member in archive:
                    if member.isfile() and member.name in FILES:  # so nothing is written outside of the folder
                        names.add(member.name)
                        with (partial / member.name).open("wb") as stream:
                            shutil.copyfileobj(archive.extractfile(member), stream)
                if names != set(FILES) or files_of(partial) != record["files"]:
                    raise ValueError(f"{path} is damaged: its files are not those that its {RECORD} says")
                publish(partial, folder, record)
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged, or no archive of --pack: {error}") from None
    return record


def _record_of(archive: tarfile.TarFile, path: Path) -> dict:
    first = archive.next()
    record = None
    if first is not None and first.isfile() and first.name == RECORD:
        with contextlib.suppress(ValueError):
            record = json.loads(archive.extractfile(first).read())
    if not is_record(record):
        raise ValueError(f"{path} is no archive of --pack: it does not begin with the {RECORD} of a corpus")
    return record
