"""Configs: what a value may be, what a config file may say wrongly, and a pattern's two forms."""

import copy
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections.config_flags import config_flags, tuple_parser

from launch.common import MODULE, of_config_file
from mamba3_jax import config

ROOT = Path(__file__).parents[2]
NAMES = ("mamba3", "attention")
PROGRAM = """
from launch import common
holder = common.define_config()
common.run(lambda _: print(repr(common.experiment(holder).model.pattern)))
"""


SECTIONS = {"": config.Config(), **{s: getattr(config.Config(), s) for s in ("model", "data", "optimizer", "train")}}
FIELDS = [(section, field) for section, held in SECTIONS.items() for field in dataclasses.fields(held)]
FLOATS = [(section, field.name) for section, field in FIELDS if field.type is float]
OF_EITHER_SIGN = [("model", "bc_bias_initial")]
INTS = [(section, field.name) for section, field in FIELDS if field.type in (int, tuple[int, ...])]
NAN, INF = float("nan"), float("inf")


def refused(section: str, name: str, value) -> str:
    """The error of a config that is the default but for one value."""
    changed = config.Config()
    setattr(getattr(changed, section) if section else changed, name, value)
    path = f"config.{section}.{name}" if section else f"config.{name}"
    with pytest.raises(ValueError, match=f"^{path}=") as raised:
        config.check(changed)
    return str(raised.value)


def test_the_defaults_are_in_their_ranges():
    config.check(config.Config())


@pytest.mark.parametrize(("section", "name"), FLOATS)
def test_every_float_is_a_float32_of_its_sign(section, name):
    below = () if (section, name) in OF_EITHER_SIGN else (-1.0,)
    for value in (NAN, INF, -INF, *below, 1e39, 10**400, 1e-60, -1e-60, 1e-40):
        assert "is not a float32 number in" in refused(section, name, value)
    assert "is not of type float" in refused(section, name, True)


@pytest.mark.parametrize(("section", "name"), INTS)
def test_every_whole_number_has_an_end_on_both_sides(section, name):
    several = isinstance(getattr(SECTIONS[section], name), tuple)
    for value in (-1, 10**12):
        assert " .. " in refused(section, name, (2, value) if several else value)
    for value in (True, 1.5, NAN, "1"):
        assert "is not of type" in refused(section, name, (value,) if several else value)


@pytest.mark.parametrize(
    ("section", "name", "value", "wish"),
    [
        ("optimizer", "b2", 1 - 1e-9, "[0, 1)"),  # 1 in float32: the bias correction was 0
        ("optimizer", "b1", 1.0, "[0, 1)"),
        ("optimizer", "warmup", 1.0, "[0, 1)"),
        ("optimizer", "learning_rate", 0.0, "(0, inf)"),
        ("model", "rope_fraction", 2.0, "(0, 1]"),
        ("model", "head_dim", 0, "1 .. 65536"),
        ("model", "expand", -2, "1 .. 256"),
        ("data", "length", 10**9, "2 .. 134217728"),
        ("data", "batch", 10**7, "1 .. 1048576"),
        ("data", "workers", 10**6, "0 .. 1024"),
        ("train", "eval_batches", 10**9, "0 .. 1048576"),
        ("data", "seed", 2**32, "0 .. 4294967295"),
    ],
)
def test_an_end_is_named(section, name, value, wish):
    assert refused(section, name, value).endswith(
        f"={value!r} is not {'a float32 number ' * ('.' not in wish)}in {wish}"
    )


def test_a_million_layers_are_counted_not_printed():
    begin = time.perf_counter()
    message = refused("model", "pattern", "M" * 10**6)
    assert len(message) < 200
    assert "has 1000000 layers, wanted 1 .. 1024" in message
    assert time.perf_counter() - begin < 1


def test_only_fields_can_be_set():
    changed = config.Config()
    with pytest.raises(AttributeError, match="ModelConfig has no field 'd_stat', did you mean d_state"):
        changed.model.d_stat = 4
    with pytest.raises(AttributeError, match="Config has no field 'lerning'; it has name, seed, "):
        changed.lerning = 1
    changed.model.d_state = 4
    for same in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed)), dataclasses.replace(changed)):
        assert same == changed
    assert changed != config.Config()


CONFIG = "from mamba3_jax.config import Config, ModelConfig\ndef get_config():\n    config = Config()\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            CONFIG + "    config.model.d_stat = 4\n",
            ":4: AttributeError: ModelConfig has no field 'd_stat', did you mean d_",
        ),
        (CONFIG + "    return Config(model=ModelConfig(d_modl=4))\n", ":4: TypeError: .* argument 'd_modl'"),
        (CONFIG + "    return {}['x']\n", ":4: KeyError: 'x'"),
        (CONFIG + "    raise SystemExit('no')\n", ":4: SystemExit: no"),
        (CONFIG + "    return open('/nowhere')\n", ":4: FileNotFoundError: .*'/nowhere'"),
        (CONFIG + "    dataclasses.replace(config)\n", ":4: NameError: name 'dataclasses'"),
        (CONFIG + "    import json\n    json.loads('{')\n", ":5: JSONDecodeError: "),  # raised below the file
        ("import nothing_at_all\n", ":1: ModuleNotFoundError: No module named 'nothing_at_all'"),
        ("def get_config():\n    return (\n", ":2: SyntaxError: '\\(' was never closed"),
        ("\0", ":0: SyntaxError: .*null bytes"),
        ("", ": there is no get_config"),
    ],
)
def test_what_a_config_file_raises_is_a_line_of_it(tmp_path, monkeypatch, source, message):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)  # a second file would find what the first one defined
    path = tmp_path / "wrong.py"
    path.write_text(source)
    with pytest.raises((Exception, SystemExit)) as raised:
        repr(config_flags.ConfigFileFlagParser("config", lock_config=False).parse(str(path)).model)
    found = of_config_file(raised.value)
    assert re.search(message, found), found
    assert str(path) in found or source == "\0"
    assert of_config_file(ValueError("of a flag")) == ""
    with pytest.raises(ValueError, match="as tuple") as raised:  # of a flag's value, not of the file
        tuple_parser.TupleParser().parse("32,,64")
    assert of_config_file(raised.value) == ""


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


def test_text_to_train_on_is_not_validated_on_the_files_own(tmp_path):
    """A flag for one glob alone would leave the other as the file has it."""
    text = 'data=DataConfig(train_glob="a/*.txt", valid_glob="b/*.txt")'
    source = f"from mamba3_jax.config import Config, DataConfig\ndef get_config():\n    return Config({text})\n"
    (tmp_path / "text.py").write_text(source)
    found = []
    for overrides in (["train_glob=c"], ["train_glob=c", "valid_glob="]):
        flags = [f"--config.data.{override}" for override in overrides]
        command = [sys.executable, "-c", PROGRAM, f"--config={tmp_path / 'text.py'}", *flags]
        found.append(subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300))
    assert [done.returncode for done in found] == [2, 0]
    (line,) = found[0].stderr.splitlines()
    assert "--config.data.train_glob=c alone leaves data.valid_glob='b/*.txt' of " in line


def test_a_config_file_that_raises_ends_the_command_in_one_line(tmp_path):
    (tmp_path / "wrong.py").write_text(CONFIG + "    config.model.d_stat = 4\n")
    command = [sys.executable, "-c", PROGRAM, f"--config={tmp_path / 'wrong.py'}", "--config.model.d_state=8"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'wrong.py'}:4: AttributeError: ModelConfig has no field 'd_stat'")
    assert done.returncode == 2


INTERRUPTED = """
from pathlib import Path
from launch import common
from mamba3_jax import files

class Content(str):
    def encode(self):
        raise KeyboardInterrupt

common.run(lambda _: files.replace(Path("report.json"), Content()), alone=True)
"""


def test_ctrl_c_ends_a_command_in_one_line_and_leaves_no_half_a_file(tmp_path):
    (tmp_path / "report.json").write_text("before")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (130, "error: stopped by Ctrl-C\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "before"


EMPTY_PATHS = """
import importlib, sys
from absl import flags
flags.FLAGS.mark_as_parsed()
paths = {
    "train": ["workdir"],
    "evaluate": ["workdir", "tokenizer", "valid_glob"],
    "generate": ["workdir", "tokenizer"],
    "convert": ["source", "target", "tokenizer"],
    "sweep": ["workdir", "results"],
}
for command, names in paths.items():
    before = set(flags.FLAGS)
    importlib.import_module(f"launch.{command}")
    for name in names:
        flags.FLAGS[name].value = "somewhere"
    for name in names:
        for value, wish in {"": "an empty path", " ": "an empty path", "gs://bucket/runs": "a URL"}.items():
            try:
                setattr(flags.FLAGS, name, value)
            except flags.IllegalFlagValueError as error:
                assert wish in str(error)
            else:
                sys.exit(f"{command} --{name}={value!r} was taken")
        flags.FLAGS[name].value = "somewhere"
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
"""


@pytest.mark.full
def test_no_command_takes_an_empty_path_or_a_url():
    done = subprocess.run([sys.executable, "-c", EMPTY_PATHS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
