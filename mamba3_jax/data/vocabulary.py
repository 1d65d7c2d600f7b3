"""Turn text into token ids and back: by bytes, the symbols of a task, or a Hugging Face `tokenizer.json`."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders

from mamba3_jax.config import DataConfig, listed, what_builds
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.files import read_object

# A tokenizer.json does not say which token ends a document. These files beside it may; the first that does counts.
EOS_FILES = {
    "tokenizer_config.json": "eos_token",
    "generation_config.json": "eos_token_id",
    "special_tokens_map.json": "eos_token",
}
# Where none does, it is the first of these tokens that exists.
EOS_NAMES = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|im_end|>"),
    *("<｜end▁of▁sentence｜>", "<|end_of_sentence|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>"),
    *("<|eod|>", "<EOD>", "<eod>", "<|eos_token|>", "<|EOS_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "[SEP]"),
)
# Byte-level vocabularies write bytes that can be printed as they are, and the others as the letters from 256 on.
PRINTED = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
BYTE_LETTERS = {chr(byte): byte for byte in PRINTED} | {
    chr(256 + number): byte for number, byte in enumerate(byte for byte in range(256) if byte not in PRINTED)
}
NO_TEXT = b"\xff"  # a byte that UTF-8 never has


class Bytes:
    """UTF-8 bytes: ids 0..255; byte 0, which text does not hold, separates documents."""

    vocab_size = 256
    eos = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def special(self, text: str) -> None:
        """Return None: no byte is a special token."""

    def decode(self, ids: Iterable[int]) -> str:
        """Spell ids; bytes that are not UTF-8 (a character cut in two, say) come out as U+FFFD."""
        return bytes(int(i) for i in ids).decode(errors="replace")

    def encode_all(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, None]]:
        """Yield the ids of each text, without separators, and None: a token spells one byte."""
        for text in texts:
            yield np.frombuffer(text.encode(), np.uint8), None


class Symbols:
    """The symbols of a generated task, one for each id; there is no separator.

    `symbols` is a string of characters, or a tuple of names, which stand apart by spaces in a text.
    """

    eos = None

    def __init__(self, task: str, symbols: str | tuple[str, ...]):
        self.task, self.symbols, self.vocab_size = task, symbols, len(symbols)
        self._ids = {symbol: number for number, symbol in enumerate(symbols)}
        self._between = "" if isinstance(symbols, str) else " "

    def encode(self, text: str) -> list[int]:
        parts = text.split() if self._between else text
        if stray := set(parts) - set(self._ids):
            wanted = f"{listed(self.symbols[:-1])} and {self.symbols[-1]}"
            raise ValueError(f"the text of a {self.task} model is made of {wanted}, got {sorted(stray)[0]!r}")
        return [self._ids[part] for part in parts]

    def special(self, text: str) -> None:
        """Return None: no symbol is a special token."""

    def decode(self, ids: Iterable[int]) -> str:
        """Spell ids; those past the symbols, which a model of more ids may draw, come out as U+FFFD."""
        return self._between.join(self.symbols[int(i)] if int(i) < self.vocab_size else "\ufffd" for i in ids)


class HuggingFace:
    """A `tokenizer.json` of the package `tokenizers`. No special tokens are added around a text.

    `eos` names the token that ends a document, or its id; "": the files beside tokenizer.json say it, or EOS_NAMES.
    """

    def __init__(self, path: str, eos: str = ""):
        if not Path(path).is_file():
            inside = f"; it is a directory: write {path.rstrip('/')}/tokenizer.json"
            hint = inside if Path(path).is_dir() else what_builds(path)
            raise FileNotFoundError(f"data.tokenizer={path!r} is neither 'bytes' nor a file{hint}")
        try:
            self._tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        self.path = path
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have gaps, so the size is that of the largest id, not the number of entries.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise ValueError(f"{path} has an empty vocabulary")
        self.eos = self._id_of(eos, f"data.eos={eos!r}") if eos else self._find_eos(Path(path))
        self._reserved = self._find_reserved(Path(path))
        self._words = self._find_words() if isinstance(self._tokenizer.decoder, decoders.ByteLevel) else []
        self._word_sizes = np.array([len(word) for word in self._words])

    def _id_of(self, name: str | int, what: str) -> int:
        """Return the id of a token given by its text or its id; ValueError, which begins with `what`, for neither."""
        token = int(name) if isinstance(name, int) or name.isdecimal() else self._tokenizer.token_to_id(name)
        if token not in range(self.vocab_size) or self._tokenizer.id_to_token(token) is None:
            raise ValueError(f"{what} is not a token of {self.path}, nor the id of one")
        return token

    def _find_eos(self, path: Path) -> int:
        for file, field in EOS_FILES.items():
            if (name := eos_in(path.with_name(file), field)) is not None:
                return self._id_of(name, f"{path.with_name(file)}: {field}={name!r}")
        for name in EOS_NAMES:
            if (token := self._tokenizer.token_to_id(name)) is not None:
                return token
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        raise ValueError(
            f"{path} has no end of text token that is known; its special tokens are [{listed(map(repr, special))}]: "
            f"name one, or its id, by data.eos or in {next(iter(EOS_FILES))} beside it"
        )

    def _find_reserved(self, path: Path) -> list[int]:
        """Return the ids that no text spells: special tokens and the separator, without the token of unknown text."""
        added = self._tokenizer.get_added_tokens_decoder()
        model = json.loads(path.read_bytes())["model"]
        unknown = self._tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
        return sorted({self.eos, *(token for token, what in added.items() if what.special)} - {unknown})

    def _find_words(self) -> list[bytes]:
        """Return the bytes that each id of a byte-level vocabulary spells."""
        words = [NO_TEXT] * self.vocab_size
        for word, token in self._tokenizer.get_vocab(with_added_tokens=False).items():
            words[token] = (
                bytes(BYTE_LETTERS[letter] for letter in word) if BYTE_LETTERS.keys() >= set(word) else NO_TEXT
            )
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            words[token] = added.content.encode()
        return words

    def encode(self, text: str) -> list[int]:
        """Encode a text; the spelling of a special token in it becomes that token."""
        (encoding,) = self._encode([text], special=True)
        return encoding.ids

    def special(self, text: str) -> int | None:
        """Return the id of the special token that is spelled like the text, None if there is none."""
        token = self._tokenizer.token_to_id(text)
        return token if token in self._reserved else None

    def decode(self, ids: Iterable[int]) -> str:
        """Spell ids, special tokens too."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_all(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the ids of each text, without separators, and how many bytes of the text each id spells.

        A special token's spelling is text like any other. Texts go to the package in batches, which it encodes in
        parallel.
        """
        known = bool(self._words)
        for group in groups(texts):
            for text, encoding in zip(group, self._encode(group, offsets=not known), strict=True):
                if known and (spelt := self._by_words(text, encoding.ids)):
                    yield spelt
                    continue
                ids_T, end_T = self._spell(text, self._encode([text])[0] if known else encoding)
                yield ids_T, bytes_spelt(text, end_T)

    def _by_words(self, text: str, ids: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Return what `encode_all` yields if the words of the ids are the text, byte for byte; else None.

        This needs no offsets, with which the package takes twice as long.
        """
        data, ids_T = text.encode(), np.asarray(ids, np.uint32)
        if b"".join(map(self._words.__getitem__, ids)) != data or np.isin(ids_T, self._reserved).any():
            return None
        end_T = np.cumsum(self._word_sizes[ids_T])
        if not text.isascii():  # move an end inside a character to the end of that character
            begins = np.flatnonzero(np.frombuffer(data + b" ", np.uint8) & 0xC0 != 0x80)
            end_T = begins[np.searchsorted(begins, end_T)]
        return ids_T, sizes(end_T)

    def _encode(self, texts: list[str], special: bool = False, offsets: bool = True) -> list[Encoding]:
        """Encode texts, reading special tokens in them or not; ValueError names the first that cannot be."""
        self._tokenizer.encode_special_tokens = not special
        try:
            encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # the package raises bare Exception
            if len(texts) > 1:  # find the one that cannot be encoded
                return [encoding for text in texts for encoding in self._encode([text], special, offsets)]
            raise ValueError(f"{self.path} cannot encode {shorten(texts[0])!r}: {error}") from None

    def _spell(self, text: str, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text, and how many of its characters each id and those before it spell.

        A model of whole words may find a special token in the text all the same: then the text is cut before the last
        character of that token, and the parts are encoded.
        """
        ids_T = np.asarray(encoding.ids, np.uint32)
        begin_T, end_T = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        found_T = np.isin(ids_T, self._reserved) & (end_T - begin_T > 1)
        if not found_T.any():
            return ids_T, end_T
        cuts = [0, *(end_T[found_T] - 1), len(text)]
        parts = [text[first:end] for first, end in itertools.pairwise(cuts)]
        spelt = [self._spell(part, one) for part, one in zip(parts, self._encode(parts), strict=True)]
        ids, ends = zip(*spelt, strict=True)
        return np.concatenate(ids), np.concatenate([end_T + cut for end_T, cut in zip(ends, cuts, strict=False)])


def eos_in(path: Path, field: str) -> str | int | None:
    """Return the end of a document that a file names: a text, {"content": text} or an id, or the first of a list.

    None if there is no such file, or it names none; ValueError if it is damaged.
    """
    if not path.is_file():
        return None
    named = read_object(path).get(field)
    name = named.get("content") if isinstance(named, dict) else named
    if isinstance(name, list) and name:
        name = name[0]
    if (named is not None and not isinstance(name, str | int)) or isinstance(name, bool):
        raise ValueError(f"{path}: {field}={named!r} is not a token or an id")
    return name


def continuation(codec, prompt: Iterable[int], row: Iterable[int]) -> str:
    """Return the text that the ids of a row add to that of a prompt's ids."""
    before, text = codec.decode(prompt), codec.decode([*prompt, *row])
    # The common prefix is shorter than `before` where the prompt ends inside a character.
    return text[len(os.path.commonprefix([before, text])) :]  # noqa: RUF071


def groups(texts: Iterable[str], most: int = 256, characters: int = 2**20) -> Iterator[list[str]]:
    """Group texts until they reach `most` texts or so many characters: all encodings at once would fill the memory."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if len(group) == most or size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def shorten(text: str) -> str:
    """Cut a text for a line that names it."""
    return text if len(text) <= 40 else text[:40] + "..."


def bytes_spelt(text: str, end_T: np.ndarray) -> np.ndarray:
    """Return how many UTF-8 bytes of a text lie between the end of the token before and each token's own end.

    The counts add up to the whole text. What a tokenizer drops (a space, say) counts with the token after it, the rest
    of the text with the last one; a character of several tokens counts with the first of them.
    """
    if not len(end_T):
        return np.zeros(0, np.uint8)
    end_T = np.maximum.accumulate(end_T)
    end_T[-1] = len(text)
    if not text.isascii():
        character = np.frombuffer(text.encode("utf-32-le"), "<u4")
        size = 1 + (character > 0x7F).astype(np.int64) + (character > 0x7FF) + (character > 0xFFFF)
        end_T = np.concatenate([[0], np.cumsum(size)])[end_T]
    return sizes(end_T)


def sizes(end_T: np.ndarray) -> np.ndarray:
    """Return the sizes of pieces that end at these places, in the narrowest type that holds them."""
    bytes_T = np.diff(end_T, prepend=0)
    return bytes_T.astype(np.min_scalar_type(bytes_T.max(initial=0)))


def tokenizer(config: DataConfig) -> Bytes | Symbols | HuggingFace:
    """Return the tokenizer of a run: `encode(text)`, `decode(ids)`, `vocab_size`, `eos` (which ends a document)."""
    if config.source in TASKS:
        return Symbols(config.source, TASKS[config.source].symbols)
    if config.tokenizer == "bytes":
        if config.eos:
            raise ValueError(f"data.eos={config.eos!r} is of a tokenizer.json; documents of bytes end with byte 0")
        return Bytes()
    return HuggingFace(config.tokenizer, config.eos)
