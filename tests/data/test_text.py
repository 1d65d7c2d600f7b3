"""Which files are in which split, and what a bad file says."""

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


def test_line_ends_survive(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\n")
    assert list(read({"dos.txt": tmp_path / "dos.txt"})) == ["a\r\nb\n"]


def test_tokenised_once(folder):
    config = DataConfig(train_glob=f"{folder}/part0/*", valid_glob=f"{folder}/part1/*")
    text._corpus.cache_clear()
    for length in (4, 8):
        config.length = length
        text_rows(config, "train")
    assert text._corpus.cache_info().misses == 1
