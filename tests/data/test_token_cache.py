"""Tokens are made once of each text; whatever is wrong with those that are kept, they are made anew."""

import os
from pathlib import Path

import numpy as np
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.data import text, token_cache
from mamba3_jax.data.vocabulary import HuggingFace
from mamba3_jax.files import written
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


FORMS = {  # of another program's file, or of one that was written by hand
    "type": {"ids_T": np.ones(9)},
    "sign": {"ids_T": -np.ones(9, np.int64)},
    "shape": {"ids_T": np.ones((1, 9), np.uint16)},
    "length": {"first_T": np.ones(8, bool)},
    "none": {"ids_T": np.ones(0, np.uint16), "first_T": np.ones(0, bool), "bytes_T": np.ones(0, np.uint8)},
}


@pytest.mark.parametrize("damage", ["begin", "ids", "bytes", "cut", "empty", "other", "folder", *FORMS])
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
    if damage in FORMS:
        whole = {"ids_T": np.ones(9, np.uint16), "first_T": np.ones(9, bool), "bytes_T": np.ones(9, np.uint8)}
        np.savez(path, key=path.stem, **(whole | FORMS[damage]))
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
    with pytest.raises(OSError, match="killed"), written(first) as abandoned:
        raise OSError("killed")
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
    assert not abandoned.exists()


def test_what_is_not_of_the_cache_is_left_alone(data, monkeypatch):
    """Another's files in its folder; and one that cannot be dropped keeps no other."""
    monkeypatch.setattr(token_cache, "KEPT", 2)
    tokens(data)
    (first,) = kept(data)
    mine, stuck = first.with_name("mine.npz"), first.with_name(f"{'0' * 32}.npz")
    mine.write_text("mine")
    stuck.mkdir()
    for path in (mine, stuck):
        os.utime(path, (0, 0))
    for separator in "abc":
        data.separator = separator
        tokens(data)
    assert mine.read_text() == "mine"
    assert len(set(kept(data)) - {mine, stuck}) == 2


def test_tokens_of_text_that_changes_meanwhile_are_not_kept(data, tmp_path, monkeypatch, caplog):
    """They would be taken for those of the text as it was."""
    encode, path = HuggingFace.encode_all, tmp_path / "text" / "0.txt"
    before = path.read_text()

    def changing(codec, texts):
        path.write_text("other words")
        return encode(codec, texts)

    monkeypatch.setattr(HuggingFace, "encode_all", changing)
    other = tokens(data)
    assert "it changed while it was tokenised" in caplog.text
    monkeypatch.setattr(HuggingFace, "encode_all", encode)
    path.write_text(before)
    assert not same(tokens(data), other)


def test_tokens_lie_beside_links_and_not_where_these_lead_to(data, tmp_path):
    for number in range(2):
        (tmp_path / f"disk_{number}").mkdir()
        (tmp_path / "text" / f"{number}.txt").rename(tmp_path / f"disk_{number}" / f"{number}.txt")
        (tmp_path / "text" / f"{number}.txt").symlink_to(tmp_path / f"disk_{number}" / f"{number}.txt")
    tokens(data)
    assert len(kept(data)) == 1
    assert [path.parent.name for path in tmp_path.rglob(token_cache.FOLDER)] == ["text"]


def test_nothing_is_kept_in_the_root_of_the_disk(data, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_save", None)
    paths = [tmp_path / "valid.txt", Path("/proc/version")]
    assert token_cache.cached(paths, HuggingFace(data.tokenizer, data.eos), {}, lambda: "made") == "made"


def test_a_glob_of_hidden_folders_does_not_find_them(data, tmp_path):
    data.train_glob = f"{tmp_path}/text/**/.*/*"
    (tmp_path / "text" / ".more").mkdir()
    (tmp_path / "text" / ".more" / "a.txt").write_text("words")
    (tmp_path / "text" / token_cache.FOLDER).mkdir()
    (tmp_path / "text" / token_cache.FOLDER / f"{'0' * 32}.npz").write_bytes(b"\xff")
    assert list(text.matches(data.train_glob, "train_glob")) == [".more/a.txt"]
