"""Documents end to end in one array, cut into rows."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mamba3_jax.data.batch import Batch


@dataclass(frozen=True)
class Rows:
    """Random access to the rows of a source: all that the pipeline needs to know of it."""

    gather: Callable[[np.ndarray], Batch]  # row numbers (B,), any from 0 up -> those rows, as one batch
    count: int | None  # rows in an epoch; past it gather gives rows of padding. None: rows without end
    identity: str  # of the content: two sources with equal identities give equal rows
    # Row numbers (B,) -> how many bytes of text each target spells (B, L), 0 where there is none. None: it is no text
    target_bytes: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Corpus:
    """A split: every document followed by the separator."""

    ids_T: np.ndarray  # uint16 or uint32
    first_T: np.ndarray  # bool: the first token of a document
    bytes_T: np.ndarray | None  # of its text that a token spells, 1 for a separator; None: each spells one


def concatenate(documents: Iterable[tuple[np.ndarray, np.ndarray | None]], codec, what: str) -> Corpus:
    """Join documents, each its ids and the bytes that they spell (None: one each), without those that have no id.

    Raises:
        ValueError: there is no document; `what` says where.
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
    return Corpus(np.concatenate(pieces), first_T, np.concatenate(spelt) if spelt else None)


def rows(corpus: Corpus, length: int) -> Rows:
    """Row r is tokens r*length .. (r+1)*length - 1 of the corpus, the last one padded.

    The target of a token is the next one of its document, which for a row's last token is the next row's first. A
    document's last token, its separator, has no target (weight 0), nor has padding; the separator itself is a target.
    A document that a row's edge cuts goes on in the next row from an empty state: `start` is true there too.
    """
    ids_T, first_T, bytes_T = corpus.ids_T, corpus.first_T, corpus.bytes_T
    total = len(ids_T)

    def places(row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Says where in the corpus the tokens of rows, and the one after each row, lie, and whether that is in it."""
        at_BM = np.asarray(row_B, np.int64)[:, None] * length + np.arange(length + 1)
        return np.minimum(at_BM, total - 1), at_BM < total

    def gather(row_B: np.ndarray) -> Batch:
        at_BM, inside_BM = places(row_B)
        ids_BM = np.where(inside_BM, ids_T[at_BM], 0).astype(np.int32)
        first_BM = first_T[at_BM] | ~inside_BM
        scored_BL = inside_BM[:, :-1] & ~first_BM[:, 1:]
        start_BL = first_BM[:, :-1].copy()
        start_BL[:, 0] = True
        return Batch(ids_BM[:, :-1], np.where(scored_BL, ids_BM[:, 1:], 0), scored_BL.astype(np.float32), start_BL)

    def target_bytes(row_B: np.ndarray) -> np.ndarray:
        at_BM, inside_BM = places(row_B)
        scored_BM = inside_BM & ~first_T[at_BM]
        return np.where(scored_BM, 1 if bytes_T is None else bytes_T[at_BM], 0)[:, 1:]

    checksum = zlib.crc32(first_T.tobytes(), zlib.crc32(ids_T.tobytes()))
    return Rows(gather, -(-total // length), f"{total} tokens {checksum:08x}", target_bytes)
