"""Several processes as one run, with real processes on this machine: two hosts of four devices each."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch import hosts
from mamba3_jax.checkpoint import all_steps, load_model
from mamba3_jax.train import metrics
from tests.helpers import devices, rel_rms, without_times

ROOT = Path(__file__).parents[2]
STEPS = 12
FLAGS = ["--config=tests/train/tiny.py", "--config.data.batch=8", f"--config.train.steps={STEPS}"]
NAME = socket.gethostname()


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as door:
        return door.getsockname()[1]


class Hosts:
    """Processes that are ended with the test, whatever happens; what they print is in files."""

    def __init__(self, folder: Path, environment: dict):
        self.folder, self.environment, self.processes = folder, devices(4) | environment, []

    def start(self, *command: str, **environment: str) -> int:
        """Start one more; return its number."""
        index = len(self.processes)
        with (self.folder / f"{index}.out").open("w") as out, (self.folder / f"{index}.err").open("w") as err:
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=self.environment | environment,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            )
        return index

    def run(self, program: str, *flags: str, count: int = 2, present=None, each=lambda index: ()) -> None:
        """Start a program of several processes, those that are `present` of them."""
        whole = [
            sys.executable,
            "-m",
            program,
            *flags,
            f"--coordinator=localhost:{free_port()}",
            f"--processes={count}",
        ]
        for index in range(count) if present is None else present:
            self.start(*whole, f"--process={index}", *each(index))

    def output(self, index: int, kind: str = "out") -> str:
        return (self.folder / f"{index}.{kind}").read_text()

    def errors(self, index: int) -> str:
        """What is on stderr, without what is gloo's and the system's."""
        lines = self.output(index, "err").splitlines()
        return "\n".join(line for line in lines if line.startswith("[") and not line.startswith("[Gloo]"))

    def at(self, index: int, text: str, seconds: float = 120) -> None:
        """Wait until a process has printed this."""
        end = time.monotonic() + seconds
        while text not in self.output(index):
            assert self.processes[index].poll() is None, self.output(index, "err")
            assert time.monotonic() < end, f"no {text!r} in {self.output(index)}"
            time.sleep(0.02)

    def wait(self, seconds: float = 120) -> list[int]:
        """Return the exit statuses."""
        end = time.monotonic() + seconds
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def finish(self, seconds: float = 120) -> None:
        """Wait for a good end of all."""
        statuses = self.wait(seconds)
        assert statuses == [0] * len(statuses), [self.output(index, "err") for index in range(len(statuses))]


@pytest.fixture
def hosts_of(tmp_path, compiled):
    """Make `Hosts`, a folder each."""
    with contextlib.ExitStack() as stack:

        def make() -> Hosts:
            folder = tmp_path / f"hosts_{time.monotonic_ns()}"
            folder.mkdir()
            made = Hosts(folder, compiled)
            stack.callback(end, made)
            return made

        yield make


def end(made: Hosts) -> None:
    for process in made.processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, compiled):
    """The same run by one process of eight devices."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "launch.train", *FLAGS, f"--workdir={folder / 'run'}"]
    subprocess.run(command, cwd=ROOT, env=devices(8) | compiled, check=True, capture_output=True, timeout=120)
    return folder / "run"


def lines_of(workdir: Path) -> list[dict]:
    """Every line of the metrics that says more than how long it took."""
    lines = [without_times(line) for line in metrics.read(workdir / "metrics.jsonl")]
    return [line for line in lines if line.keys() > {"step"}]


def assert_same_run(got: Path, want: Path) -> None:
    """Every metric to 1e-6 of one process's, and the last parameters to float32 rounding."""
    ours, theirs = lines_of(got), lines_of(want)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=1e-6), our["step"]
    for name, value in flat(load_model(got)[1]).items():
        assert rel_rms(value, flat(load_model(want)[1])[name]) < 1e-5, name


def flat(tree, path=""):
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    return {name: leaf for part, branch in tree.items() for name, leaf in flat(branch, f"{path}/{part}").items()}


def test_two_processes_train_as_one(alone, tmp_path, hosts_of):
    """Losses and parameters; files, metrics and progress are the first one's; every line says whose it is."""
    two = hosts_of()
    two.run("launch.train", *FLAGS, f"--workdir={tmp_path / 'run'}")
    two.finish()
    assert_same_run(tmp_path / "run", alone)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}
    first, second = ([line for line in two.output(i).splitlines() if "[Gloo]" not in line] for i in (0, 1))
    assert second == []
    assert all(line.startswith(f"[0 {NAME}] ") for line in first)
    assert "8 x cpu, mesh {'data': 8}" in first[0]
    assert re.search(r"goodput +0\.\d+", "\n".join(first))


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_a_restart_resumes(alone, tmp_path, hosts_of, victim):
    run = tmp_path / "run"
    two = hosts_of()
    two.run("launch.train", *FLAGS, f"--workdir={run}")
    two.at(0, "step  7/")
    begin = time.monotonic()
    two.processes[victim].kill()
    statuses = two.wait(60)
    assert time.monotonic() - begin < 60
    assert statuses == ([-signal.SIGKILL, hosts.LOST] if victim == 0 else [hosts.LOST, -signal.SIGKILL])
    other = 1 - victim
    where = "localhost" if victim == 0 else NAME  # process 0 is known by its address
    gone = f"process {victim} ({where}) is gone, killed or lost with its host; all others end too: the same command goes on"
    assert two.errors(other) == f"[{other} {NAME}] error: {gone} after the last checkpoint"

    again = hosts_of()
    again.run("launch.train", *FLAGS, f"--workdir={run}")
    again.finish()
    assert "resuming after step" in again.output(0)
    assert_same_run(run, alone)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_host_saves_on_all_and_one_process_goes_on(alone, tmp_path, hosts_of, number):
    """At the same step; the checkpoint of two processes is read by one process of four devices."""
    run = tmp_path / "run"
    two = hosts_of()
    two.run("launch.train", *FLAGS, f"--workdir={run}", "--config.train.steps=2000")
    two.at(0, "step    7/")
    two.processes[1].send_signal(number)
    assert two.wait(60) == [128 + signal.SIGTERM, 128 + number]
    step = all_steps(run)[-1]
    assert step >= 7
    for index in (0, 1):
        assert f"[{index} {NAME}] stopped by signal; saved {run}/checkpoints/{step}: the same" in two.output(index)
