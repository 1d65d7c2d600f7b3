"""Pack documents end to end into one array, and cut it into rows."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mamba3_jax.data.batch import Batch


@dataclass(frozen=True)
class Rows:
    """Random access to the rows of a source, which is all that the pipeline needs to know of it."""

    gather: Callable[[np.ndarray], Batch]  # row numbers (B,), any from 0 up -> those rows, as one batch
    count: int | None  # rows in an epoch; past it gather gives rows of padding. None: rows without end
    identity: str  # of the content: two sources with equal identities give equal rows
    # Row numbers (B,) -> how many bytes of text each target spells (B, L), 0 without a target. None: it is no text
    target_bytes: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Corpus:
    """A split: every document followed by the separator."""

    ids_T: np.ndarray  # uint16 or uint32
    first_T: np.ndarray  # bool: true at the first token of a document
    bytes_T: np.ndarray | None  # how many bytes of text each token spells, 1 for a separator; None: each spells one


def concatenate(documents: Iterable[tuple[np.ndarray, np.ndarray | None]], codec, what: str) -> Corpus:
    """Join documents, each its ids and how many bytes they spell (None: one each); leave out those without ids.

    Raises:
        ValueError: there is no document; the message names the source by `what`.
    """
    dtype = np.uint16 if codec.vocab_size <= 2**16 else np.uint32
    end = np.array([codec.eos], dtype)
    pieces, lengths, spelt = [], [], []
    for ids_T, bytes_T in documents:
        if len(ids_T):
            pieces += [ids_T.astype(dtype), end]
            lengths.append(len(ids_T) + 1)
            spelt += [] if bytes_T is None else [bytes_T, np.ones(1, np.uint8)]
    if not lengths:
        raise ValueError(f"{what}: there is no text")
    first_T = np.zeros(sum(lengths), bool)
    first_T[np.cumsum([0, *lengths[:-1]])] = True
    ids_T = np.concatenate(pieces)
    pieces.clear()  # they may be hundreds of megabytes
    return Corpus(ids_T, first_T, np.concatenate(spelt) if spelt else None)


def rows(corpus: Corpus, length: int) -> Rows:
    """Return rows of the corpus: row r has its tokens r*length .. (r+1)*length - 1; the last row is padded.

    The target of a token is the next one of its document, which for a row's last token is the next row's first. A
    document's last token, its separator, has no target (weight 0), and neither has padding; the separator itself is a
    target. A document that a row's end cuts goes on in the next row from an empty state: `start` is true there too.
    """
    ids_T, first_T, bytes_T = corpus.ids_T, corpus.first_T, corpus.bytes_T
    total = len(ids_T)

    def cut(array_T: np.ndarray, row_B: np.ndarray, past, dtype) -> np.ndarray:
        """Copy the tokens of rows and the one after each row, or `past` where the corpus has ended.

        Copying slices is faster than indexing: a row lies in one piece, and an index for every token would be read too.
        """
        cut_BM = np.full((len(row_B), length + 1), past, dtype)
        for cut_M, row in zip(cut_BM, np.asarray(row_B).tolist(), strict=True):
            piece = array_T[row * length : (row + 1) * length + 1]
            cut_M[: len(piece)] = piece
        return cut_BM

    def gather(row_B: np.ndarray) -> Batch:
        ids_BM, first_BM = cut(ids_T, row_B, 0, np.int32), cut(first_T, row_B, True, bool)
        scored_BL = ~first_BM[:, 1:]
        start_BL = first_BM[:, :-1].copy()
        start_BL[:, 0] = True
        return Batch(ids_BM[:, :-1], ids_BM[:, 1:] * scored_BL, scored_BL.astype(np.float32), start_BL)

    def target_bytes(row_B: np.ndarray) -> np.ndarray:
        scored_BL = ~cut(first_T, row_B, True, bool)[:, 1:]
        return scored_BL * (np.int64(1) if bytes_T is None else cut(bytes_T, row_B, 0, bytes_T.dtype)[:, 1:])

    checksum = zlib.crc32(first_T.tobytes(), zlib.crc32(ids_T.tobytes()))
    return Rows(gather, -(-total // length), f"{total} tokens {checksum:08x}", target_bytes)
