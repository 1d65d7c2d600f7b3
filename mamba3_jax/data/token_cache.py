"""Keep the tokens of a text beside it, so that a corpus is tokenised once and not at every start of a command.

    FOLDER/.tokens/KEY.npz    the arrays of a `Corpus`; FOLDER is the deepest one that holds all files of the text

KEY is a hash of all that decides the tokens: the files' contents, the tokenizer, what ends and separates documents, and
the code that reads and tokenises. No glob of text matches these files. The folder may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import tokenizers
from absl import logging

from mamba3_jax.data.packing import Corpus
from mamba3_jax.data.vocabulary import HuggingFace
from mamba3_jax.files import sha256, why, written

FOLDER = ".tokens"
WORTH = 2**22  # bytes of text, about a second of work: the tokens of less are not kept
KEPT = 8  # files of a folder; the least recently used are deleted
ABANDONED = 3600.0  # seconds after which a file that is still not whole belongs to a process that was killed
# Of what is written here, also while `written` has not renamed it; all other files of the folder are someone else's.
NAME = re.compile(r"[0-9a-f]{32}\.npz(\.[0-9a-f]{32}\.partial)?")
CODE = [Path(__file__).with_name(name) for name in ("text.py", "tfds_text.py", "packing.py", "vocabulary.py")]


def cached(paths: Collection[Path], codec, how: dict[str, str], make: Callable[[], Corpus]) -> Corpus:
    """Return the tokens that are kept beside the files, or else make and keep them.

    A kept file that is damaged, or of something else, is made anew with a line of warning. Nothing is kept where the
    folder cannot be written, or where the text changes meanwhile, is small, is tokenised as fast as it is read, or has
    no folder in common but the root of the disk.

    Args:
        paths: of the text, in their order.
        codec: its tokenizer.
        how: by name, what else decides where documents begin and end.
        make: reads and tokenises them.
    """
    if not isinstance(codec, HuggingFace) or sum(path.stat().st_size for path in paths) < WORTH:
        return make()
    # A link's own folder, not where it leads to: that may be another's, or the root of the disk for two of them.
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    if folder == Path(folder.anchor):
        return make()
    key = key_of(paths, codec, how)
    path = folder / FOLDER / f"{key}.npz"
    if (corpus := _load(path, key)) is None:
        corpus = make()
        try:
            if key_of(paths, codec, how) != key:
                raise OSError("it changed while it was tokenised")
            _save(path, key, corpus)
        except OSError as error:
            logging.warning("tokens are not kept beside their text, and made anew at every start: %s", error)
    return corpus


def is_kept(path: Path) -> bool:
    """Tell whether a file holds kept tokens and so is no text: a glob that asks for hidden folders matches it too."""
    return path.parent.name == FOLDER and NAME.fullmatch(path.name) is not None


def key_of(paths: Collection[Path], codec: HuggingFace, how: dict[str, str]) -> str:
    """Return a hash of all that decides the tokens of files, their names too: a name decides how a file is read."""
    decides = {
        "files": [(path.name, sha256(path)) for path in paths],
        "tokenizer": sha256(Path(codec.path)),
        "eos": codec.eos,
        "how": how,
        "code": [tokenizers.__version__, *map(sha256, CODE)],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]


def _load(path: Path, key: str) -> Corpus | None:
    """Return the tokens of a kept file; None where there is no file, or it is damaged or of another key."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # reading an array checks its CRC
            if str(arrays["key"]) != key:
                raise ValueError("it is of other text")
            corpus = Corpus(arrays["ids_T"], arrays["first_T"], arrays["bytes_T"])
        forms = [(array.dtype.kind, array.shape) for array in vars(corpus).values()]
        if not corpus.ids_T.size or forms != [(kind, (corpus.ids_T.size,)) for kind in "ubu"]:
            raise ValueError("its arrays are not those of a text")
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it, it is made anew
        logging.warning("%s cannot be read, and is made anew: %s", path, why(error))
        return None
    with contextlib.suppress(OSError):  # only its owner may
        os.utime(path)
    return corpus


def _save(path: Path, key: str, corpus: Corpus) -> None:
    """Keep tokens in a file, whole or not at all; OSError where it cannot be written."""
    with written(path) as partial:
        path.parent.mkdir(exist_ok=True)
        with partial.open("wb") as stream:
            np.savez(stream, key=key, **vars(corpus))
    _drop_old(path.parent)


def _drop_old(folder: Path) -> None:
    """Delete the least recently used tokens, and files that a killed process left half written."""
    used = {}
    for file in filter(lambda file: NAME.fullmatch(file.name), folder.iterdir()):
        with contextlib.suppress(OSError):  # another process drops them too
            used[file] = file.stat().st_mtime
    old = sorted((file for file in used if file.suffix == ".npz"), key=used.get)[:-KEPT]
    old += [file for file in used if file.suffix != ".npz" and time.time() - used[file] > ABANDONED]
    for file in old:
        with contextlib.suppress(OSError):
            file.unlink()
