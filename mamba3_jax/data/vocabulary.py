"""Text to token ids and back: bytes, bits, or a Hugging Face `tokenizer.json`."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mamba3_jax.config import DataConfig
from mamba3_jax.data.synthetic import TASKS

# The separator of documents has no fixed name in a tokenizer.json: the first of these that exists is it.
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|im_end|>", "[SEP]")


class Bytes:
    """UTF-8 bytes: ids 0..255; byte 0, which text does not hold, separates documents."""

    vocab_size = 256
    eos = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8 (a character cut in two, say) come out as U+FFFD."""
        return bytes(int(i) for i in ids).decode(errors="replace")

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each text, without separators."""
        for text in texts:
            yield np.frombuffer(text.encode(), np.uint8)


class Bits:
    """The characters 0 and 1: the language of the generated tasks, which has no separator."""

    vocab_size = 2
    eos = None

    def encode(self, text: str) -> list[int]:
        if stray := set(text) - set("01"):
            raise ValueError(f"the text of a parity model is made of 0 and 1, got {sorted(stray)[0]!r}")
        return [int(character) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(str(int(i)) for i in ids)


class HuggingFace:
    """A `tokenizer.json` of the package `tokenizers`. No special tokens are added around a text."""

    def __init__(self, path: str):
        if not Path(path).is_file():
            raise FileNotFoundError(f"data.tokenizer={path!r} is neither 'bytes' nor a file")
        try:
            self._tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have gaps, so the width is the largest id, not the number of entries.
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.eos = self._find_eos(path)

    def _find_eos(self, path: str) -> int:
        for name in EOS_NAMES:
            if (token := self._tokenizer.token_to_id(name)) is not None:
                return token
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        raise ValueError(
            f"{path} has no end of text token: none of {', '.join(EOS_NAMES)}; its special tokens are {special}"
        )

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each text, without separators; a batch of texts at a time, which the package does in parallel."""
        texts = iter(texts)
        while group := [text for _, text in zip(range(256), texts, strict=False)]:
            for encoding in self._tokenizer.encode_batch(group, add_special_tokens=False):
                yield np.asarray(encoding.ids, np.uint32)


def tokenizer(config: DataConfig) -> Bytes | Bits | HuggingFace:
    """The tokenizer of a run: `encode(text)`, `decode(ids)`, `vocab_size`, `eos` (the id that ends a document)."""
    if config.source in TASKS:
        return Bits()
    return Bytes() if config.tokenizer == "bytes" else HuggingFace(config.tokenizer)
