"""The copy of a tokenizer in a workdir: whole, recognised, and not mistaken for another."""

import shutil
import subprocess

import pytest

from mamba3_jax.data import tokenizer_copy
from mamba3_jax.data.tokenizer_copy import differ, find, keep, to_resume


@pytest.fixture
def original(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("words.json", "tokenizer_config.json", "notes.txt"):
        (folder / name).write_text(name)
    return folder / "words.json"


@pytest.fixture
def workdir(tmp_path, original):
    keep(tmp_path / "run", str(original))
    return tmp_path / "run"


def test_it_is_found_where_the_workdir_is(workdir, original, tmp_path):
    shutil.rmtree(original.parent)
    moved = workdir.rename(tmp_path / "moved")
    assert find(moved) == moved / "tokenizer" / "tokenizer.json"
    assert sorted(path.name for path in (moved / "tokenizer").iterdir()) == [
        "SHA256SUMS",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert find(moved).read_text() == "words.json"
    assert [path.name for path in moved.iterdir()] == ["tokenizer"]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=moved / "tokenizer", check=True)
    assert to_resume(moved, str(original)) == str(find(moved))


def test_what_is_no_file_is_not_copied(tmp_path):
    for name in ("bytes", "", str(tmp_path / "none.json")):
        keep(tmp_path / "run", name)
    assert find(tmp_path / "run") is None
    assert to_resume(tmp_path / "run", "bytes") is None


def test_a_copy_is_replaced_by_another_but_not_by_itself(workdir, original):
    keep(workdir, str(find(workdir)))
    assert find(workdir).read_text() == "words.json"
    original.write_text("new")
    (original.parent / "tokenizer_config.json").unlink()
    keep(workdir, str(original))
    assert find(workdir).read_text() == "new"
    assert not (workdir / "tokenizer" / "tokenizer_config.json").exists()


def test_another_tokenizer_is_no_resume(workdir, original):
    assert to_resume(workdir, str(original)) == str(find(workdir))
    assert to_resume(workdir, "bytes") is None
    original.write_text("changed")
    with pytest.raises(
        ValueError, match=r"words.json' \(sha256 \w{12}\) is not, or no longer, what the checkpoints have, "
    ):
        to_resume(workdir, str(original))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_changed_copy_is_named(workdir, file):
    (workdir / "tokenizer" / file).write_text("edited")
    with pytest.raises(ValueError, match=rf"{file} has changed since it was copied"):
        find(workdir)


def test_a_copy_in_part_is_named(workdir):
    (workdir / "tokenizer" / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"run/tokenizer is not a whole copy of a tokenizer: .*SHA256SUMS"):
        find(workdir)


def test_which_are_known_to_differ(workdir, original, tmp_path):
    copy = str(find(workdir))
    assert not differ(copy, str(original))
    assert not differ("bytes", "bytes")
    assert not differ(str(tmp_path / "gone.json"), copy)
    assert differ("bytes", copy)
    original.write_text("changed")
    assert differ(copy, str(original))
    assert tokenizer_copy.sha256(original) != tokenizer_copy.sha256(find(workdir))
