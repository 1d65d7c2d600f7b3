"""Which files are in which split, and what a bad file says."""

import gzip
import json
import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mamba3_jax.config import DataConfig
from mamba3_jax.data import text
from mamba3_jax.data.text import files, in_valid, read, standard_library, text_rows


@pytest.fixture
def folder(tmp_path):
    for i in range(60):
        path = tmp_path / f"part{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {i}")
    return tmp_path


def test_standard_library_splits_by_file():
    train, valid = (files(DataConfig(), split) for split in ("train", "valid"))
    assert train.keys().isdisjoint(valid)
    assert {**train, **valid} == standard_library()
    assert list(train) == sorted(train)
    assert "json/decoder.py" in standard_library()
    assert not any("test" in name.split("/") or "site-packages" in name for name in standard_library())
    size = {split: text_rows(DataConfig(), split).count * 256 for split in ("train", "valid")}
    assert size["train"] > 8e6
    assert 0.02 < size["valid"] / size["train"] < 0.12


def test_the_split_of_a_name_never_changes():
    assert [name for name in ("ast.py", "os.py", "json/decoder.py", "cgi.py", "tarfile.py") if in_valid(name)] == []
    assert sum(in_valid(f"{i}.txt") for i in range(20_000)) == pytest.approx(1000, abs=100)


def test_split_of_a_glob_does_not_depend_on_where_it_lies(folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "deep"
    folder.rename(moved)
    before = set(files(DataConfig(train_glob=f"{moved}/**/*.txt"), "valid"))
    moved.rename(folder)
    config = DataConfig(train_glob=f"{folder}/**/*.txt")
    train, valid = files(config, "train"), files(config, "valid")
    assert set(valid) == before == {name for name in {**train, **valid} if in_valid(name)} != set()
    assert len(train) + len(valid) == 60
    assert "part0/00.txt" in {**train, **valid}


def test_two_globs(folder):
    config = DataConfig(train_glob=f"{folder}/part0/*", valid_glob=f"{folder}/part1/*")
    assert len(files(config, "train")) == len(files(config, "valid")) == 20
    config.valid_glob = f"{folder}/*/0*.txt"
    with pytest.raises(ValueError, match=r"files are in both data.train_glob and data.valid_glob"):
        files(config, "train")


def test_one_file_named_without_a_wildcard(folder):
    config = DataConfig(train_glob=f"{folder}/part0/00.txt", valid_glob=f"{folder}/part1/01.txt")
    assert [list(files(config, split)) for split in ("train", "valid")] == [["00.txt"], ["01.txt"]]


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.train_glob='.*\.none' matches no file"):
        files(DataConfig(train_glob=f"{folder}/*.none"), "train")
    missing = "train" if in_valid("00.txt") else "valid"
    with pytest.raises(ValueError, match=f"none falls to the {missing} split.*name data.valid_glob"):
        files(DataConfig(train_glob=f"{folder}/part0/00.txt"), missing)

    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text: .* at byte 3"):
        list(read({"latin.txt": tmp_path / "latin.txt"}))

    (tmp_path / "empty.txt").write_bytes(b"")
    assert list(read({"empty.txt": tmp_path / "empty.txt"})) == []
    config = DataConfig(train_glob=f"{tmp_path}/empty.txt", valid_glob=f"{folder}/part1/*")
    with pytest.raises(ValueError, match="the 1 files of the train split: there is no text"):
        text_rows(config, "train")


@pytest.mark.parametrize(
    ("name", "pattern", "hint", "mended"),
    [
        ("[v1] set", "[v1] set/*.txt", r": \[ \] in a glob stand for one .* write '(.*)'", "[[]v1] set/*.txt"),
        ("[v1] set", "[v1] set/a.txt", r": \[ \] in a glob stand for one .* write '(.*)'", "[[]v1] set/a.txt"),
        ("set", "set", r": .*/set is a directory; for the files in it write '(.*)'", "set/**/*"),
        ("set", "set/", r": .*/set is a directory; for the files in it write '(.*)'", "set/**/*"),
        ("set", "s*", r": .*/set is a directory; for the files in it write '(.*)'", "s*/**/*"),
        ("set", "set/*.text", "()$", None),
        ("set", "[v1] set/*.txt", "()$", None),
    ],
)
def test_why_a_glob_matches_no_file(tmp_path, name, pattern, hint, mended):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=f"data.train_glob='.*' matches no file{hint}") as error:
        files(DataConfig(train_glob=f"{tmp_path}/{pattern}"), "train")
    if mended:
        written = re.search(hint, str(error.value))[1]
        assert written == f"{tmp_path}/{mended}"
        names = list(files(DataConfig(train_glob=written, valid_glob=__file__), "train"))
        assert names == ["set/a.txt" if "*" in pattern and name == "set" else "a.txt"]


def test_line_ends_survive(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\n")
    assert list(read({"dos.txt": tmp_path / "dos.txt"})) == ["a\r\nb\n"]


def documents(path, **fields):
    return list(read({path.name: path}, **fields))


def test_a_separator_parts_documents(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one\n<|endoftext|>\n two <|end|><|endoftext|>\n<|endoftext|><|endoftext|>three\n")
    assert documents(path, separator="<|endoftext|>") == ["one\n", "\n two <|end|>", "three\n"]
    assert documents(path) == [path.read_text()]
    config = DataConfig(length=8, train_glob=str(path), valid_glob=__file__, separator="<|endoftext|>")
    batch = text_rows(config, "train").gather(np.arange(4))
    assert (batch.tokens_BL == 0).sum() - (batch.start_BL & (batch.tokens_BL == 0)).sum() == 3
    config.separator = ""  # another corpus, not the one kept
    assert (text_rows(config, "train").gather(np.arange(4)).tokens_BL == 0).sum() == 0


def test_json_lines_are_documents(tmp_path):
    texts = ["one\n", "", "two <|endoftext|>\u2028 é", "three"]
    lines = "".join(json.dumps({"id": i, "body": text}, ensure_ascii=i > 1) + "\n" for i, text in enumerate(texts))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json.gz"):
        data = (lines + "\n").encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        assert documents(tmp_path / name, key="body", separator="<|endoftext|>") == [text for text in texts if text]


def test_compressed_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("é\r\nx".encode()))
    assert documents(tmp_path / "a.txt.gz") == ["é\r\nx"]
    assert documents(tmp_path / "a.txt.gz", separator="\r\n") == ["é", "x"]
    for name, data in (("cut", (tmp_path / "a.txt.gz").read_bytes()[:-9]), ("plain", b"text")):
        (tmp_path / f"{name}.gz").write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}.gz is not a whole gzip file"):
            documents(tmp_path / f"{name}.gz")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"lines.jsonl, line 2 is not JSON: "),
        ("[" * 100_000, r"lines.jsonl, line 2 is not JSON: "),
        (b'{"text": "\xff"}', r"lines.jsonl, line 2 is not JSON: "),
        ('["b"]', r"line 2 is not an object with the field data.key='text', but list"),
        ('{"body": "b", "id": 1}', r"line 2 has no field data.key='text'; it has body, id"),
        (json.dumps(dict.fromkeys("abcdefghijkl")), r"it has a, b, c, d, e, f, g, h, i, j and 2 more"),
        ("{}", r"line 2 has no field data.key='text'; it has none"),
        ('{"text": null}', r"line 2: the field data.key='text' is not a string, but NoneType"),
        (r'{"text": "\ud800"}', r"line 2: the field data.key='text' is not text: surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + (line.encode() if isinstance(line, str) else line))
    with pytest.raises(ValueError, match=message):
        documents(path)


def test_parquet_rows_are_documents(tmp_path, monkeypatch):
    path = tmp_path / "part.parquet"
    texts = [f"row {i} é" for i in range(3000)]
    columns = {"text": texts, "id": range(3000), "hole": ["a", None, *texts[2:]]}
    pa.parquet.write_table(pa.table(columns), path, row_group_size=1000)
    assert documents(path) == texts
    for key, message in (
        ("body", r"part.parquet has no column data.key='body'; it has text, id, hole"),
        ("id", r"part.parquet: the column data.key='id' is not of strings, but int64"),
        ("hole", r"part.parquet, row 2: the column data.key='hole' is not a string, but null"),
    ):
        with pytest.raises(ValueError, match=message):
            documents(path, key=key)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part.parquet is not a Parquet file that can be read"):
        documents(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"part.parquet takes the package pyarrow: pip install 'mamba3_jax\[parquet\]'"
    ):
        documents(path)


def test_tokenised_once(folder):
    config = DataConfig(train_glob=f"{folder}/part0/*", valid_glob=f"{folder}/part1/*")
    text._corpus.cache_clear()
    for length in (4, 8):
        config.length = length
        text_rows(config, "train")
    assert text._corpus.cache_info().misses == 1
