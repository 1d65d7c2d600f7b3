"""Keep a copy of a run's tokenizer in its workdir, so that what the ids mean travels with the parameters.

workdir/tokenizer/tokenizer.json   and the files beside it that may name the end of a document
                 /SHA256SUMS       of each, for `sha256sum -c`
"""

import shutil
from pathlib import Path

from mamba3_jax.data.vocabulary import EOS_FILES
from mamba3_jax.files import sha256

FOLDER, FILE, SUMS = "tokenizer", "tokenizer.json", "SHA256SUMS"


def is_file(tokenizer: str) -> bool:
    """Tell whether a `data.tokenizer` is the path of a file that exists."""
    return tokenizer != "bytes" and Path(tokenizer).is_file()


def find(workdir) -> Path | None:
    """Return the tokenizer.json of a workdir, None if it has none; ValueError if it is no longer what was copied."""
    folder = Path(workdir).expanduser() / FOLDER
    if not folder.is_dir():
        return None
    try:
        lines = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
        changed = [name for sum, name in lines if sha256(folder / name) != sum]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a whole copy of a tokenizer: {error}") from None
    if changed:
        raise ValueError(f"{folder / changed[0]} has changed since it was copied ({SUMS} beside it): restore it")
    return (folder / FILE).resolve()


def keep(workdir, tokenizer: str) -> None:
    """Copy `data.tokenizer`, if it is a file, and those beside it into the workdir; whole or not at all."""
    source, folder = Path(tokenizer), Path(workdir).expanduser() / FOLDER
    if not is_file(tokenizer) or source.resolve() == (folder / FILE).resolve():
        return
    partial = folder.with_name(f".{FOLDER}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial, source)
    sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(partial.iterdir())]
    (partial / SUMS).write_text("".join(sums))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write(directory: Path, tokenizer: Path) -> None:
    """Write a tokenizer.json, and those beside it that may name the end of a document, into a directory."""
    shutil.copyfile(tokenizer, directory / FILE)
    for name in EOS_FILES:
        if (beside := tokenizer.with_name(name)).is_file():
            shutil.copyfile(beside, directory / name)


def differ(one: str, other: str) -> bool:
    """Tell whether two values of `data.tokenizer` are surely different tokenizers; a file that is gone may be any."""
    if "bytes" in (one, other):
        return one != other
    return is_file(one) and is_file(other) and sha256(Path(one)) != sha256(Path(other))


def to_resume(workdir, tokenizer: str) -> str | None:
    """Return the workdir's own copy, for a run to resume with; None if there is none or the run's tokens are bytes.

    Raises:
        ValueError: the run names another file, while the parameters belong to the copy.
    """
    copy = find(workdir)
    if copy is None or tokenizer == "bytes":
        return None
    if is_file(tokenizer) and (given := sha256(Path(tokenizer))) != (had := sha256(copy)):
        raise ValueError(
            f"data.tokenizer={tokenizer!r} (sha256 {given[:12]}) is not, or no longer, what the checkpoints have, "
            f"{copy} (sha256 {had[:12]}): a run resumes with the tokenizer it began with; use another workdir"
        )
    return str(copy)
