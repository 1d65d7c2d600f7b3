"""A pattern is a string of letters or, in a config file, a tuple of names; a flag gives the letters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mamba3_jax import config

ROOT = Path(__file__).parents[2]
NAMES = ("mamba3", "attention")
PROGRAM = """
from launch import common
holder = common.define_config()
common.run(lambda _: print(repr(common.experiment(holder).model.pattern)))
"""


def named() -> config.Config:
    return config.Config(model=config.ModelConfig(pattern=NAMES))


def test_names_are_a_pattern_and_survive_json():
    config.check(named())
    assert config.from_dict(json.loads(json.dumps(config.to_dict(named())))) == named()


@pytest.mark.parametrize("pattern", [("mamba3", 1), ["mamba3"], 3, None])
def test_another_type_is_named(pattern):
    wrong = named()
    wrong.model.pattern = pattern
    with pytest.raises(ValueError, match=r"config\.model\.pattern=.* is not of type str"):
        config.check(wrong)


def test_a_flag_overrides_names_by_letters(tmp_path):
    path = tmp_path / "named.py"
    path.write_text(
        "from mamba3_jax import config\ndef get_config():\n"
        f"    return config.Config(model=config.ModelConfig(pattern={NAMES!r}))\n"
    )
    for overrides, want in ([], NAMES), (["--config.model.pattern=MA"], "MA"):
        command = [sys.executable, "-c", PROGRAM, f"--config={path}", *overrides]
        done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
        assert done.stdout.strip() == repr(want), done.stderr
