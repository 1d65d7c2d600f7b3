"""Tokens are made once of each text; whatever is wrong with those that are kept, they are made anew."""

import os
from pathlib import Path

import numpy as np
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.data import text, token_cache
from mamba3_jax.data.vocabulary import HuggingFace
from tests.data.test_vocabulary import SPECIAL, train

TEXT = [f"document {i} of a few words|and more of them" for i in range(40)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two files of text and a tokenizer, all text worth its place."""
    monkeypatch.setattr(token_cache, "WORTH", 0)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.txt").write_text("\n".join(TEXT[number::2]))
    (tmp_path / "valid.txt").write_text("others")
    path = train(tmp_path / "tokenizer.json", SPECIAL)
    return DataConfig(
        train_glob=f"{folder}/*", valid_glob=str(tmp_path / "valid.txt"), tokenizer=path, eos=SPECIAL[0], length=8
    )


def tokens(config: DataConfig):
    """As another process has them."""
    text._corpus.cache_clear()
    return text.corpus(config, "train")


def kept(config: DataConfig) -> list:
    return sorted((Path(config.train_glob).parent / token_cache.FOLDER).glob("*"))


def same(got, want) -> bool:
    pairs = [(getattr(got, name), getattr(want, name)) for name in ("ids_T", "first_T", "bytes_T")]
    return all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in pairs)


def test_kept_tokens_are_those_that_were_made(data, monkeypatch):
    monkeypatch.setattr(token_cache, "WORTH", 2**40)
    made = tokens(data)
    assert kept(data) == []
    monkeypatch.setattr(token_cache, "WORTH", 0)
    assert same(tokens(data), made)
    assert len(kept(data)) == 1
    monkeypatch.setattr(HuggingFace, "encode_all", None)
    assert same(tokens(data), made)
    assert list(text.matches(data.train_glob, "train_glob")) == ["0.txt", "1.txt"]  # a glob does not see them


@pytest.mark.parametrize("change", ["content", "name", "tokenizer", "eos", "separator", "code"])
def test_whatever_decides_the_tokens_tells_them_apart(data, change, tmp_path, monkeypatch):
    before = tokens(data)
    if change == "content":
        (tmp_path / "text" / "1.txt").write_text("other words")
    elif change == "name":
        (tmp_path / "text" / "1.txt").rename(tmp_path / "text" / "1.text")
    elif change == "tokenizer":
        train(tmp_path / "tokenizer.json", [*SPECIAL, "<more>"])
    elif change == "eos":
        data.eos = SPECIAL[1]
    elif change == "separator":
        data.separator = "|"
    else:
        (tmp_path / "code.py").write_text("# another")
        monkeypatch.setattr(token_cache, "CODE", [tmp_path / "code.py"])
    after = tokens(data)
    assert len(kept(data)) == 2
    assert same(after, before) == (change in ("name", "code"))


@pytest.mark.parametrize("damage", ["begin", "ids", "bytes", "cut", "empty", "other", "folder"])
def test_a_damaged_or_foreign_file_is_made_anew(data, damage, tmp_path, caplog):
    want = tokens(data)
    (path,) = kept(data)
    content = bytearray(path.read_bytes())
    if damage in ("begin", "ids", "bytes"):
        place = {"begin": 0, "ids": content.index(want.ids_T.tobytes()), "bytes": content.index(want.bytes_T.tobytes())}
        content[place[damage] + 1] ^= 1
    elif damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content.clear()
    elif damage == "other":
        (tmp_path / "text" / "0.txt").rename(tmp_path / "text" / "2.txt")
        tokens(data)
        (other,) = set(kept(data)) - {path}
        content = other.read_bytes()
        (tmp_path / "text" / "2.txt").rename(tmp_path / "text" / "0.txt")
    path.write_bytes(content)
    if damage == "folder":
        path.unlink()
        path.mkdir()
    assert same(tokens(data), want)
    assert f"{path} cannot be read, and is made anew" in caplog.text
    if damage != "folder":
        caplog.clear()
        assert same(tokens(data), want)
        assert caplog.text == ""


def test_a_place_that_cannot_be_written_is_no_error(data, tmp_path, caplog):
    (tmp_path / "text" / token_cache.FOLDER).write_text("mine")
    assert len(tokens(data).ids_T) > 40
    assert "tokens are not kept beside their text" in caplog.text
    assert (tmp_path / "text" / token_cache.FOLDER).read_text() == "mine"


def test_what_was_not_used_for_longest_goes(data, monkeypatch):
    monkeypatch.setattr(token_cache, "KEPT", 2)
    tokens(data)
    (first,) = kept(data)
    os.utime(first, (0, 0))
    abandoned = first.with_name("x.npz.y.partial")
    abandoned.touch()
    os.utime(abandoned, (0, 0))
    data.separator = "a"
    tokens(data)
    (second,) = set(kept(data)) - {first}
    os.utime(second, (0, 0))
    data.separator = ""
    tokens(data)  # the first is used again
    data.separator = "b"
    tokens(data)
    assert first in kept(data)
    assert second not in kept(data)
    assert len(kept(data)) == 2
