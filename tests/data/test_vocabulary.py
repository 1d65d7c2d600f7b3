"""Tokenizers: there and back, the separator, and what a bad one says."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mamba3_jax.config import DataConfig
from mamba3_jax.data import tokenizer
from mamba3_jax.data.vocabulary import BYTE_LETTERS

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
    assert [(ids.tolist(), spelt) for ids, spelt in codec.encode_all([TEXT, "b"])] == [
        (codec.encode(TEXT), None),
        ([98], None),
    ]


def test_bits():
    codec = tokenizer(DataConfig(source="parity"))
    assert codec.encode("0110") == [0, 1, 1, 0]
    assert codec.decode([0, 1, 1]) == "011"
    assert codec.decode([1, 7]) == "1\ufffd"
    with pytest.raises(ValueError, match="made of 0 and 1, got 'x'"):
        codec.encode("01x")


def test_hugging_face(tmp_path):
    path = train(tmp_path / "tokenizer.json", ["<pad>", "<|endoftext|>"])
    codec = tokenizer(DataConfig(tokenizer=path))
    assert codec.eos == 1
    assert codec.decode(codec.encode(TEXT)) == TEXT
    texts = [TEXT, "x = 1"] * 200
    assert [ids.tolist() for ids, _ in codec.encode_all(texts)] == [codec.encode(text) for text in texts]
    assert max(max(codec.encode(text)) for text in texts) < codec.vocab_size


def test_hugging_face_ids_with_gaps(tmp_path):
    made = Tokenizer(models.WordLevel({"a": 0, "b": 7, "</s>": 9, "?": 2}, unk_token="?"))
    made.save(str(tmp_path / "gaps.json"))
    codec = tokenizer(DataConfig(tokenizer=str(tmp_path / "gaps.json")))
    assert (codec.vocab_size, codec.eos) == (10, 9)


def word_level():
    made = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2, "b": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>", "<unk>"])
    return made


def unigram():
    """As SentencePiece makes them: its pieces hold the separator, and bytes for what it does not know."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -2.0) for piece in "▁as</>")]
    made = Tokenizer(models.Unigram([*pieces, *((f"<0x{byte:02X}>", -9.0) for byte in range(256))], 0, True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens(["</s>", "<unk>"])
    return made


def word_piece():
    """Lower case, without accents and space, as BERT's."""
    words = {"[UNK]": 0, "[SEP]": 1, "a": 2, "##b": 3, "e": 4}
    made = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[SEP]", "[UNK]"])
    return made


def byte_fallback():
    """As SentencePiece's BPE: a space before the text, bytes for what it does not know."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "</s>", "▁", "a", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["</s>", "<unk>"])
    return made


def composing():
    """Byte-level with a normalizer that makes text shorter, and a separator that is not marked as special."""
    made = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    made.normalizer, made.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.add_tokens([AddedToken("</s>", special=False)])
    return made


KINDS = (word_level, unigram, word_piece, byte_fallback, composing)


def saved(make, path):
    make().save(str(path))
    return tokenizer(DataConfig(tokenizer=str(path)))


@pytest.mark.parametrize("make", KINDS)
def test_a_special_token_in_a_document_is_text(make, tmp_path):
    codec = saved(make, tmp_path / "tokenizer.json")
    texts = ["a </s> b </s>", "</s>", "a </s>", "[SEP] a [SEP]a", "a"]
    for text, (ids, spelt) in zip(texts, codec.encode_all(texts), strict=True):
        assert len(ids) > 0
        assert codec.eos not in ids, text
        assert spelt.sum() == len(text.encode())
    assert codec.eos in codec.encode("a </s>") or codec.eos in codec.encode("a [SEP]")  # a prompt may hold one


@pytest.mark.parametrize("make", [*KINDS, None])
def test_the_bytes_that_tokens_spell_are_the_text(make, tmp_path):
    path = tmp_path / "tokenizer.json"
    codec = saved(make, path) if make else tokenizer(DataConfig(tokenizer=train(path, ["</s>"])))
    texts = ["a ", "  aB\n é e\u0301 ", "世界 a 🙂🙂zebra", "a" + 400 * " " + "b", " ", "x"]
    for text, (ids, spelt) in zip(texts, codec.encode_all(texts), strict=True):
        assert len(spelt) == len(ids)
        assert spelt.sum() == (len(text.encode()) if len(ids) else 0), text
    if make is None:  # where every token's bytes are known
        ((ids, spelt),) = codec.encode_all(["x = 1 + 2 = x"])
        assert spelt.tolist() == [len(codec.decode([i])) for i in ids]
        assert max(spelt) > 1


@pytest.mark.parametrize("changed", [{}, {"normalizer": normalizers.NFC()}, {"prefix": True}, {"drops": True}])
def test_bytes_by_the_words_are_those_by_the_offsets(changed, tmp_path):
    """Of byte-level tokenizers; where the words are not the text, the offsets have the say."""
    assert set(BYTE_LETTERS) == set(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer.from_file(train(tmp_path / "tokenizer.json", ["</s>"]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="prefix" in changed)
    if "drops" in changed:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), made.pre_tokenizer])
    if "normalizer" in changed:
        made.normalizer = changed["normalizer"]
    made.save(str(tmp_path / "tokenizer.json"))
    texts = [TEXT, "x = 1", "  é e\u0301 ", "世界🙂🙂 a", "a </s> é", " ", "", "\0\x7f\xad\u07ff\uffff"]
    by_words, by_offsets = (tokenizer(DataConfig(tokenizer=str(tmp_path / "tokenizer.json"))) for _ in range(2))
    by_offsets._words = []
    for text, one, other in zip(texts, by_words.encode_all(texts), by_offsets.encode_all(texts), strict=True):
        assert [array.tolist() for array in one] == [array.tolist() for array in other], text
        assert [array.dtype for array in one] == [array.dtype for array in other], text
    taken = [by_words._by_words(text, by_words._encode([text], offsets=False)[0].ids) for text in texts]
    assert (taken[1] is None) == ("prefix" in changed or "drops" in changed)
    assert taken[4] is None or 1 not in taken[4][0]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.tokenizer='byte' is neither 'bytes' nor a file"):
        tokenizer(DataConfig(tokenizer="byte"))
    with pytest.raises(FileNotFoundError, match=rf"it is a directory: write {tmp_path}/tokenizer.json"):
        tokenizer(DataConfig(tokenizer=f"{tmp_path}/"))
    with pytest.raises(FileNotFoundError, match=r"nor a file: `python -m experiments.corpus` builds it"):
        tokenizer(DataConfig(tokenizer=f"{tmp_path}/build/corpus/tokenizer.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is not a Hugging Face tokenizer.json"):
        tokenizer(DataConfig(tokenizer=str(tmp_path / "bad.json")))
    path = train(tmp_path / "no_eos.json", ["<start>", "<stop>"])
    with pytest.raises(ValueError, match=r"no end of text token.*special tokens are \['<start>', '<stop>'\]: name one"):
        tokenizer(DataConfig(tokenizer=path))
    path = train(tmp_path / "no_eos.json", [f"<{i}>" for i in range(25)])
    with pytest.raises(
        ValueError, match=r"special tokens are \['<0>', .* '<9>' and 15 more\]: name one, or its id, by"
    ):
        tokenizer(DataConfig(tokenizer=path))
    for eos in ("<25>", "300", "-1"):
        with pytest.raises(ValueError, match=f"data.eos='{eos}' is not a token of .*no_eos.json, nor the id of one"):
            tokenizer(DataConfig(tokenizer=path, eos=eos))
    with pytest.raises(ValueError, match=r"data.eos='</s>' is of a tokenizer.json"):
        tokenizer(DataConfig(eos="</s>"))


def test_what_the_package_cannot_do_is_named(tmp_path):
    for model in (models.WordLevel({}, unk_token="?"), models.BPE()):
        Tokenizer(model).save(str(tmp_path / "empty.json"))
        with pytest.raises(ValueError, match=r"empty.json has an empty vocabulary"):
            tokenizer(DataConfig(tokenizer=str(tmp_path / "empty.json")))
    for model in (
        models.WordLevel({"a": 0, "</s>": 1}, unk_token="?"),
        models.WordPiece({"a": 0, "</s>": 1}, unk_token="?"),
        models.BPE({"a": 0, "</s>": 1}, [], unk_token="?"),
        models.Unigram([("a", -1.0), ("</s>", -1.0)], None, False),
    ):
        Tokenizer(model).save(str(tmp_path / "known.json"))
        codec = tokenizer(DataConfig(tokenizer=str(tmp_path / "known.json")))
        assert codec.encode("a") == [0]
        with pytest.raises(ValueError, match=r"known.json cannot encode 'zebra': .*([Uu]nk|UNK)"):
            codec.encode("zebra")
        long = "zebra" * 100
        with pytest.raises(ValueError, match=rf"known.json cannot encode '{long[:40]}\.\.\.': ") as error:
            list(codec.encode_all(["a", long, "a"]))
        assert "\n" not in str(error.value)


SPECIAL = ["<a>", "<b>", "<c>", "<d>", "</s>"]


@pytest.mark.parametrize(
    ("files", "eos", "want"),
    [
        ({}, "", 4),
        ({}, "<c>", 2),
        ({}, "3", 3),
        ({"tokenizer_config": {"eos_token": "<b>"}, "generation_config": {"eos_token_id": 2}}, "", 1),
        ({"tokenizer_config": {"eos_token": "<b>"}}, "<a>", 0),
        ({"tokenizer_config": {"eos_token": {"content": "<d>", "special": True}}}, "", 3),
        ({"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": [3, 1]}}, "", 3),
        ({"tokenizer_config": {}, "generation_config": {}, "special_tokens_map": {"eos_token": "<c>"}}, "", 2),
        ({"special_tokens_map": {"eos_token": {"content": "<c>"}}}, "", 2),
    ],
)
def test_which_token_ends_a_document(tmp_path, files, eos, want):
    path = train(tmp_path / "tokenizer.json", SPECIAL)
    for name, held in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(held))
    assert tokenizer(DataConfig(tokenizer=path, eos=eos)).eos == want


@pytest.mark.parametrize("name", ["<|end_of_text|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|eod|>", "<end_of_turn>"])
def test_known_names(tmp_path, name):
    assert tokenizer(DataConfig(tokenizer=train(tmp_path / "tokenizer.json", ["<pad>", name]))).eos == 1


@pytest.mark.parametrize(
    ("file", "held", "message"),
    [
        ("tokenizer_config", '{"eos_token": "<b>"', "is not JSON"),
        ("tokenizer_config", "[]", "holds list, wanted an object"),
        ("tokenizer_config", '{"eos_token": "<e>"}', "eos_token='<e>' is not a token of .*tokenizer.json"),
        ("tokenizer_config", '{"eos_token": {"text": "<b>"}}', "eos_token={'text': '<b>'} is not a token or an id"),
        ("generation_config", '{"eos_token_id": 1000}', "eos_token_id=1000 is not a token"),
        ("generation_config", '{"eos_token_id": -1}', "eos_token_id=-1 is not a token"),
        ("generation_config", '{"eos_token_id": true}', "eos_token_id=True is not a token or an id"),
        ("generation_config", '{"eos_token_id": []}', r"eos_token_id=\[\] is not a token or an id"),
        ("special_tokens_map", b"\xff\xff{}", "is not JSON"),
    ],
)
def test_a_damaged_file_beside_it_is_named(tmp_path, file, held, message):
    path = train(tmp_path / "tokenizer.json", SPECIAL)
    (tmp_path / f"{file}.json").write_bytes(held if isinstance(held, bytes) else held.encode())
    with pytest.raises(ValueError, match=rf"{file}.json:? {message}") as error:
        tokenizer(DataConfig(tokenizer=path))
    assert "\n" not in str(error.value)
    assert tokenizer(DataConfig(tokenizer=path, eos="<b>")).eos == 1  # named: nothing beside it is read
