"""A file is written whole or not at all, whoever else writes it."""

import json

import pytest

from mamba3_jax.files import check_writable, replace, write_json, written


@pytest.mark.parametrize(
    "meanwhile", [lambda path: replace(path, "other"), check_writable], ids=["another writes", "another asks"]
)
def test_who_writes_a_file_meanwhile_takes_nothing_away(meanwhile, tmp_path):
    """Sweeps of other variants, say, write the same results.json."""
    path = tmp_path / "x.json"
    with written(path) as partial:
        partial.write_text("mine")
        meanwhile(path)
        assert not path.exists() or path.read_text() == "other"
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_what_was_there_stays_whole(error, tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def write_half():
        with written(path) as partial:
            partial.write_text("half of")
            raise error

    with pytest.raises((OSError, KeyboardInterrupt)):
        write_half()
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
