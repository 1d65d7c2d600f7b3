"""Tokenizers: there and back, the separator, and what a bad one says."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mamba3_jax.config import DataConfig
from mamba3_jax.data import tokenizer

TEXT = 'Grüße, 世界! "naïve"\n\tx = 1 + 2\r\n'


def train(path, special, text=TEXT):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text] * 4, trainer)
    made.save(str(path))
    return str(path)


def test_bytes():
    codec = tokenizer(DataConfig())
    assert codec.encode("é\n") == [0xC3, 0xA9, 10]
    assert codec.decode(np.array(codec.encode(TEXT))) == TEXT
    assert codec.decode([0xC3]) == "\ufffd"
    assert (codec.vocab_size, codec.eos) == (256, 0)
    assert [ids.tolist() for ids in codec.encode_all([TEXT, "b"])] == [codec.encode(TEXT), [98]]


def test_bits():
    codec = tokenizer(DataConfig(source="parity"))
    assert codec.encode("0110") == [0, 1, 1, 0]
    assert codec.decode([0, 1, 1]) == "011"
    with pytest.raises(ValueError, match="made of 0 and 1, got 'x'"):
        codec.encode("01x")


def test_hugging_face(tmp_path):
    path = train(tmp_path / "tokenizer.json", ["<pad>", "<|endoftext|>"])
    codec = tokenizer(DataConfig(tokenizer=path))
    assert codec.eos == 1
    assert codec.decode(codec.encode(TEXT)) == TEXT
    texts = [TEXT, "x = 1"] * 200
    assert [ids.tolist() for ids in codec.encode_all(texts)] == [codec.encode(text) for text in texts]
    assert max(max(codec.encode(text)) for text in texts) < codec.vocab_size


def test_hugging_face_ids_with_gaps(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "b": 7, "</s>": 9, "?": 2}, unk_token="?"))
    made.save(str(tmp_path / "gaps.json"))
    codec = tokenizer(DataConfig(tokenizer=str(tmp_path / "gaps.json")))
    assert (codec.vocab_size, codec.eos) == (10, 9)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.tokenizer='byte' is neither 'bytes' nor a file"):
        tokenizer(DataConfig(tokenizer="byte"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is not a Hugging Face tokenizer.json"):
        tokenizer(DataConfig(tokenizer=str(tmp_path / "bad.json")))
    path = train(tmp_path / "no_eos.json", ["<start>", "<stop>"])
    with pytest.raises(ValueError, match=r"no end of text token.*special tokens are \['<start>', '<stop>'\]"):
        tokenizer(DataConfig(tokenizer=path))
