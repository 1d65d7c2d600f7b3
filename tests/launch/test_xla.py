"""XLA's flags by device, and the cache of compiled programs: with real processes, as a user's environment has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import xla
from tests.helpers import without_times

ROOT = Path(__file__).parents[2]
FONTS = os.environ["XDG_CACHE_HOME"]  # matplotlib has a cache in the same place, and words of its own
# A command that says at its end how many programs it asked for, and how many of them it found.
COUNTING = """
import atexit, collections, json, runpy, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
atexit.register(lambda: print(json.dumps([counts["compile_requests_use_cache"], counts["cache_hits"]])))
sys.argv = ["launch.train", *sys.argv[1:]]
runpy.run_module("launch.train", run_name="__main__")
"""


def train(workdir, home, *flags, **environment):
    """Programs asked for, programs found, stderr; three steps."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    command = [sys.executable, "-c", COUNTING, "--config=tests/train/tiny.py", f"--workdir={workdir}"]
    done = subprocess.run(
        [*command, "--config.train.steps=3", *flags],
        cwd=ROOT,
        env=clean | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home), "MPLCONFIGDIR": FONTS} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return *json.loads(done.stdout.splitlines()[-1]), done.stderr


def timeless(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [without_times(line) for line in lines]


@pytest.mark.full
def test_a_second_start_compiles_nothing_and_a_damaged_program_is_compiled_anew(tmp_path):
    asked, found, _ = train(tmp_path / "first", tmp_path)
    assert asked > 10 > found
    kept = tmp_path / "mamba3_jax"
    assert kept.stat().st_mode & 0o077 == 0
    assert train(tmp_path / "second", tmp_path) == (asked, asked, "")
    assert timeless(tmp_path / "second") == timeless(tmp_path / "first")

    programs = sorted(kept.glob("*-cache"), key=lambda path: path.stat().st_size)
    whole = programs[-1].read_bytes()
    programs[-1].write_bytes(whole[: len(whole) // 2])
    programs[-2].write_bytes(b"\0" * 1000)
    programs[-3].with_name(programs[-3].name.replace("-cache", "-atime")).unlink()  # killed while it was written
    asked, found, errors = train(tmp_path / "third", tmp_path)
    assert (asked - found, errors.count("Error reading persistent compilation cache")) == (3, 2)
    assert timeless(tmp_path / "third") == timeless(tmp_path / "first")


@pytest.mark.full
@pytest.mark.parametrize("where", ["file", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_one_line_of_warning(tmp_path, where):
    (tmp_path / "file").touch()
    asked, found, errors = train(tmp_path / "run", tmp_path / where)
    assert (asked, found) == (0, 0)
    assert errors.startswith("warning: compiled programs are not kept: ")
    assert errors.count("\n") == 1


@pytest.mark.full
def test_jax_s_own_variables_win(tmp_path):
    train(tmp_path / "run", tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    names = {path.name.split("-")[-1] for path in (tmp_path / "mine").iterdir()}
    assert names == {"cache"}, "not bounded: no times of use, no lock"
    assert not (tmp_path / "home").exists()
    train(tmp_path / "off", tmp_path / "home", JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("named", "platform"), [("cuda,cpu", "gpu"), ("cpu", "cpu"), ("tpu", "tpu"), ("rocm", "rocm"), ("GPU", "gpu")]
)
def test_the_platform_is_what_the_environment_names(monkeypatch, named, platform):
    monkeypatch.setenv("JAX_PLATFORMS", named)
    assert xla.platform() == platform


@pytest.mark.parametrize(("nodes", "platform"), [(["nvidia0"], "gpu"), (["vfio/0"], "tpu"), (["nvidiactl"], "cpu")])
def test_else_the_platform_is_of_the_devices_there(monkeypatch, tmp_path, nodes, platform):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(xla, "DEVICES", tmp_path)
    for node in nodes:
        (tmp_path / node).parent.mkdir(exist_ok=True)
        (tmp_path / node).touch()
    assert xla.platform() == platform


def test_flags_are_added_and_none_is_overridden(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=x")
    xla.set_flags()
    wanted = (
        "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=x --xla_gpu_enable_dynamic_slice_fusion=false"
    )
    assert os.environ["XLA_FLAGS"] == wanted
    xla.set_flags()
    assert os.environ["XLA_FLAGS"] == wanted
    for platform in ("cpu", "tpu", "rocm"):
        monkeypatch.setenv("JAX_PLATFORMS", platform)
        monkeypatch.delenv("XLA_FLAGS", raising=False)
        xla.set_flags()
        assert "XLA_FLAGS" not in os.environ


def test_xla_knows_every_flag():
    """It would end the process, as it does at one that does not exist."""
    flags = [f"--{name}={value}" for table in xla.FLAGS.values() for name, value in table.items()]
    program = "import jax; jax.devices()"
    for given, known in ((flags, True), (["--xla_no_such_flag=1"], False)):
        environment = os.environ | {"XLA_FLAGS": " ".join(given), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == known, done.stderr
