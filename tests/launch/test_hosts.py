"""Several processes as one run, with real processes on this machine: two hosts of four devices each."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import hosts
from mamba3_jax.checkpoint import UNFINISHED, all_steps, load_model
from mamba3_jax.train import metrics, resume
from tests.helpers import devices, rel_rms, without_times
from tests.launch import saves

ROOT = Path(__file__).parents[2]
STEPS = 12
FLAGS = ["--config=tests/train/tiny.py", "--config.data.batch=8", f"--config.train.steps={STEPS}"]
NAME = socket.gethostname()
# What gloo's threads write in pieces, of two lines at once too.
GLOO = r"\[Gloo\] Rank \d*|\d* is connected to \d*|\d* peer ranks\. Expected number of connected peer ranks is : \d*"


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as door:
        return door.getsockname()[1]


class Hosts:
    """Processes that are ended with the test, whatever happens; what they print is in files."""

    def __init__(self, folder: Path, environment: dict):
        self.folder, self.environment, self.processes = folder, devices(4) | environment, []

    def start(self, *command: str, **environment: str) -> None:
        """Start one more."""
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

    def run(
        self, program: str, *flags: str, count=2, present=None, each=lambda index: (), under=None, **environment: str
    ) -> None:
        """Start a program of several processes, those that are `present`, with flags for `each`, `under` commands."""
        whole = [
            sys.executable,
            "-m",
            program,
            *flags,
            f"--coordinator=localhost:{free_port()}",
            f"--processes={count}",
        ]
        for index in range(count) if present is None else present:
            self.start(*(under or {}).get(index, ()), *whole, f"--process={index}", *each(index), **environment)

    def output(self, index: int, kind: str = "out") -> str:
        """What a process has printed, without what is gloo's."""
        return without_gloo((self.folder / f"{index}.{kind}").read_text())

    def errors(self, index: int) -> str:
        """What is on stderr, without what is the system's."""
        return "\n".join(line for line in self.output(index, "err").splitlines() if line.startswith("["))

    def at(self, index: int, text: str, seconds: float = 240) -> None:
        """Wait until a process has printed this."""
        end = time.monotonic() + seconds
        while text not in self.output(index):
            assert self.processes[index].poll() is None, self.output(index, "err")
            assert time.monotonic() < end, f"no {text!r} in {self.output(index)}"
            time.sleep(0.02)

    def wait(self, seconds: float = 240) -> list[int]:
        """Return the exit statuses."""
        end = time.monotonic() + seconds
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def finish(self, seconds: float = 240) -> None:
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


def without_gloo(text: str) -> str:
    if "[Gloo]" not in text:
        return text
    lines = re.sub(GLOO, "", text).splitlines(keepends=True)
    return "".join(line for line in lines if not re.fullmatch(r"\d*\s*", line))


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
    subprocess.run(command, cwd=ROOT, env=devices(8) | compiled, check=True, capture_output=True, timeout=240)
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


@pytest.mark.parametrize(
    "text",
    [
        "[Gloo] Rank 6 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7\n",
        "[Gloo] Rank [Gloo] Rank 6 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7\n"
        "7 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7\n",
        "[Gloo] Rank 6 is connected to 7[Gloo] Rank 7 is connected to  peer ranks. Expected number of connected peer "
        "ranks is : 77 peer ranks. Expected number of connected peer ranks is : \n7\n",
    ],
)
def test_what_gloo_prints_is_left_out(text):
    """Also where two of its threads write into each other's lines, or before one of ours."""
    assert without_gloo(text) == ""
    assert without_gloo(f"{text}[0 {NAME}] step 1\n{text}") == f"[0 {NAME}] step 1\n"
    assert without_gloo(f"[Gloo] Rank [0 {NAME}] step 1\n") == f"[0 {NAME}] step 1\n"
    assert without_gloo("101\n") == "101\n"  # generated


def test_two_processes_train_as_one(alone, tmp_path, hosts_of):
    """Losses and parameters; files, metrics and progress are the first one's; every line says whose it is."""
    two = hosts_of()
    two.run("launch.train", *FLAGS, f"--workdir={tmp_path / 'run'}")
    two.finish()
    assert_same_run(tmp_path / "run", alone)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}
    first = two.output(0).splitlines()
    assert two.output(1) == ""
    assert all(line.startswith(f"[0 {NAME}] ") for line in first)
    assert "8 x cpu, mesh {'data': 8}" in first[0]
    assert re.search(r"goodput +0\.\d+", "\n".join(first))


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_a_restart_resumes(alone, tmp_path, hosts_of, victim):
    run = tmp_path / "run"
    two = hosts_of()
    workers = [] if victim else ["--config.data.workers=1"]  # which may not keep its connections open
    two.run("launch.train", *FLAGS, f"--workdir={run}", *workers)
    two.at(0, "step  7/")
    begin = time.monotonic()
    two.processes[victim].kill()
    statuses = two.wait(60)
    assert time.monotonic() - begin < 60
    assert statuses == ([-signal.SIGKILL, hosts.LOST] if victim == 0 else [hosts.LOST, -signal.SIGKILL])
    other = 1 - victim
    where = "localhost" if victim == 0 else NAME  # process 0 is known by its address
    gone = f"process {victim} ({where}) is gone, killed or lost with its host; all others end too: "
    assert two.errors(other) == f"[{other} {NAME}] error: {gone}the same command goes on after the last checkpoint"

    again = hosts_of()
    again.run("launch.train", *FLAGS, f"--workdir={run}")
    again.finish()
    assert "resuming after step" in again.output(0)
    assert_same_run(run, alone)


@pytest.mark.full
def test_a_process_lost_in_a_save_is_what_all_others_say(tmp_path, hosts_of):
    """Not that a file could not be written, which a restart would not mend."""
    three, run = hosts_of(), tmp_path / "run"
    flags = [*FLAGS, "--config.data.batch=6", f"--workdir={run}"]
    three.run("launch.train", *flags, count=3, XLA_FLAGS=devices(1)["XLA_FLAGS"])
    three.at(0, "step  3/")
    while not any((run / "checkpoints").glob("*" + UNFINISHED)):
        assert three.processes[1].poll() is None
        time.sleep(0.001)
    three.processes[1].kill()
    assert three.wait(60) == [hosts.LOST, -signal.SIGKILL, hosts.LOST]
    for other in (0, 2):
        assert three.errors(other).startswith(f"[{other} {NAME}] error: process 1 ({NAME}) is gone, killed or lost")


@pytest.mark.full
@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])])
def test_a_signal_saves_on_all_and_one_process_goes_on(tmp_path, hosts_of, number, to):
    """To one host or to all, at the same step; the checkpoint of two processes is read by one of four devices."""
    run, straight = tmp_path / "run", tmp_path / "straight"
    # A learning rate that does not depend on the number of steps.
    flags = [*FLAGS, "--config.optimizer.schedule=constant", "--config.optimizer.warmup=0"]
    two = hosts_of()
    two.run("launch.train", *flags, f"--workdir={run}", "--config.train.steps=2000")
    two.at(0, "step    7/")
    for index in to:
        two.processes[index].send_signal(number)
    assert two.wait(120) == [128 + (number if index in to else signal.SIGTERM) for index in (0, 1)]
    step = all_steps(run)[-1]
    assert step >= 7
    for index in (0, 1):
        assert f"[{index} {NAME}] stopped by signal; saved {run}/checkpoints/{step}: the same" in two.output(index)

    one = hosts_of()
    for workdir in (run, straight):
        more = [f"--workdir={workdir}", f"--config.train.steps={step + 3}"]
        one.start(sys.executable, "-m", "launch.train", *flags, *more)
    one.finish()
    assert f"resuming after step {step}" in one.output(0)
    assert_same_run(run, straight)


@pytest.mark.full
def test_two_processes_evaluate_and_generate_as_one(alone, tmp_path, hosts_of):
    two, one, report = hosts_of(), hosts_of(), tmp_path / "report.json"
    evaluate = [f"--workdir={alone}", "--lengths=16,48", "--tokens=2048"]
    two.run("launch.evaluate", *evaluate, f"--output={report}")
    one.start(sys.executable, "-m", "launch.evaluate", *evaluate)
    two.finish()
    one.finish()
    ours, theirs = (json.loads(path.read_text())["results"] for path in (report, *alone.glob("evaluation/*.json")))
    assert ours == [pytest.approx(their, rel=1e-6) for their in theirs]
    assert two.output(1) == ""

    two, one = hosts_of(), hosts_of()
    generate = [f"--workdir={alone}", "--prompt_ids=1,0,1", "--tokens=20"]
    two.run("launch.generate", *generate)
    one.start(sys.executable, "-m", "launch.generate", *generate)
    two.finish()
    one.finish()
    assert two.output(0).splitlines()[0] == f"[0 {NAME}] {one.output(0).splitlines()[0]}"
    assert two.output(1) == ""


@pytest.mark.full
@pytest.mark.parametrize("chief", [True, False])
def test_who_does_not_come_is_named(tmp_path, hosts_of, chief):
    """By its number, on every host, before anything is computed."""
    flags = [*FLAGS, f"--workdir={tmp_path / 'run'}", "--join_timeout=5"]
    some = hosts_of()
    some.run("launch.train", *flags, count=4, present=(0, 2) if chief else (1, 2))
    assert some.wait(60) == [hosts.LOST] * 2
    for index, number in enumerate((0, 2) if chief else (1, 2)):
        said = (
            f"process 1, 3 of 4 did not join process 0 of 4 ({NAME}) within 5 s"
            if chief
            else f"process 0 did not answer process {number} of 4 ({NAME}) at localhost:"
        )
        assert some.errors(index).startswith(f"[{number} {NAME}] error: {said}")
        assert some.errors(index).count("\n") == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_an_error_on_one_host_ends_all_with_its_line(tmp_path, hosts_of):
    """A workdir that is not shared is seen; one that another run holds is seen by the first process alone."""
    two = hosts_of()
    two.run("launch.train", *FLAGS, each=lambda index: [f"--workdir={tmp_path / str(index)}"])
    assert two.wait(60) == [hosts.USER_ERROR] * 2
    said = f"{tmp_path / '1'} is not one directory on all hosts: newest checkpoints by process are none, none"
    assert two.errors(1) == f"[1 {NAME}] error: {said}"
    assert two.errors(0) == f"[0 {NAME}] error: process 1 of 2 ({NAME}): {said}"

    two, held = hosts_of(), tmp_path / "held"
    held.mkdir()
    with resume.alone(held):
        two.run("launch.train", *FLAGS, f"--workdir={held}")
        assert two.wait(60) == [hosts.USER_ERROR] * 2
    assert f"error: another run is at work in {held}" in two.errors(0)
    assert f"error: process 0 of 2 ({NAME}): another run is at work in {held}" in two.errors(1)


@pytest.mark.full
def test_one_process_restores_what_two_saved_and_holds_it_once(tmp_path, hosts_of):
    """Bit for bit, arrays that lay over the devices of both."""
    two, want = hosts_of(), saves.params()
    two.run("tests.launch.saves", f"--workdir={tmp_path / 'run'}")
    two.finish()
    held, before, done = [], in_use(), threading.Event()

    def watch():
        while not done.wait(0.001):
            held.append(in_use() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    _, got = load_model(tmp_path / "run")
    jax.block_until_ready(got)
    done.set()
    watching.join()
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], want[name]) for name in want)
    size = sum(array.nbytes for array in want.values())
    assert size <= max(held) < 1.01 * size
    assert len(held) > 20


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_bug_on_one_host_is_a_traceback_there_and_a_line_on_others(tmp_path, hosts_of, victim):
    two = hosts_of()
    two.run("tests.launch.saves", f"--workdir={tmp_path / 'run'}", f"--bug={victim}")
    assert two.wait(60) == [1, 1]
    assert f"\n[{victim} {NAME}] KeyError: 'a bug'" in two.errors(victim)
    assert two.errors(1 - victim) == f"[{1 - victim} {NAME}] error: process {victim} of 2 ({NAME}): KeyError: 'a bug'"


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_on_one_host_ends_all(tmp_path, hosts_of, victim):
    """No file of one process may have more than 8 kB, which is less than the state; programs are not kept, then."""
    two, run = hosts_of(), tmp_path / "run"
    limited = {victim: ["bash", "-c", 'ulimit -f 8; exec "$@"', "--"]}
    off = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    two.run("launch.train", *FLAGS, f"--workdir={run}", under=limited, **off)
    assert two.wait(90) == [hosts.USER_ERROR] * 2
    said = f"{run}/checkpoints/5 cannot be written: "
    assert f"[{victim} {NAME}] error: {said}" in two.errors(victim)
    assert f"[{1 - victim} {NAME}] error: process {victim} of 2 ({NAME}): {said}" in two.errors(1 - victim)
    assert all_steps(run) == []


def in_use() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


# What one process tells of the others, without them.


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2 speaks of several processes, and jax finds no way to join them: start"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4 speaks of several"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b speaks of several"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX=0 speaks of several"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "--coordinator=a:1, --processes=None, --process=None: where"),
        ({"SLURM_NTASKS": "1", "WORLD_SIZE": "1", "TPU_WORKER_HOSTNAMES": "a"}, None),
        ({}, None),
    ],
)
def test_a_process_with_company_never_runs_alone(monkeypatch, environment, message):
    clean(monkeypatch, environment)
    if message:
        with pytest.raises(ValueError, match=re.escape(message)):
            hosts.place()
        hosts.PROCESSES.value = 1
    assert hosts.place() is None


def clean(monkeypatch, environment: dict, **values) -> None:
    """This environment, and these flags."""
    for name in (*hosts.CLAIMS, "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("coordinator", "processes", "process", "join_timeout"):
        monkeypatch.setattr(hosts, name.upper(), types.SimpleNamespace(value=values.get(name)))


@pytest.mark.parametrize(
    "values",
    [
        {"coordinator": "a", "processes": 2, "process": 1},
        {"coordinator": "a:1", "processes": 2, "process": 2},
        {"processes": 2, "process": 1},
        {"coordinator": "a:1", "processes": 2},
    ],
)
def test_flags_that_say_half_are_refused(monkeypatch, values):
    clean(monkeypatch, {}, **values)
    with pytest.raises(ValueError, match="where the platform does not say them, wanted are HOST:PORT, how many"):
        hosts.place()


def test_slurm_says_who_they_are(monkeypatch):
    given = {"JOB_ID": "7", "STEP_NODELIST": "node[003-004]", "NTASKS": "16", "PROCID": "9", "LOCALID": "1"}
    clean(monkeypatch, {f"SLURM_{name}": value for name, value in given.items()})
    address, *rest = hosts.place()
    assert (address.split(":")[0], *rest) == ("node003", 16, 9)
    clean(monkeypatch, {}, processes=1)
    assert hosts.place() is None


@pytest.mark.parametrize(("slice_", "worker", "index"), [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)])
def test_gke_says_who_they_are_on_two_slices(monkeypatch, slice_, worker, index):
    """Of two hosts each, by the variables that GKE sets where a JobSet has two replicas of a job."""
    slices = {"NUM_SLICES": "2", "SLICE_ID": str(slice_), "COORDINATOR_ADDRESS": "localhost"}
    of_slice = {"TPU_WORKER_HOSTNAMES": f"host-{slice_}-0,host-{slice_}-1", "TPU_WORKER_ID": str(worker)}
    clean(monkeypatch, {f"MEGASCALE_{name}": value for name, value in slices.items()} | of_slice, join_timeout=10)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    assert hosts.place() == hosts.Place("localhost:8482", 4, index)


def test_the_roll_is_called_whoever_else_knocks():
    """Late ones are waited for; what is not one of them is not answered, and keeps none of them out."""
    port, found = free_port(), {}

    def come(index: int, after: float) -> None:
        time.sleep(after)
        found[index] = hosts.Company(hosts.Place(f"localhost:{port}", 9, index), 20)

    threads = [threading.Thread(target=come, args=(index, index / 50)) for index in range(9)]
    for thread in threads[:-1]:
        thread.start()
    for knock in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"process": 8}\n'):
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=5) as stranger:
            stranger.sendall(knock)
    threads[-1].start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == list(range(9))
    assert sorted(found[0]._peers.values()) == [f"process {index} ({NAME})" for index in range(1, 9)]
    for company in found.values():
        company._leaving.set()
    for company in found.values():
        for peer in company._peers:
            peer.close()


def test_lines_are_labelled_in_one_piece(tmp_path):
    with (tmp_path / "log").open("w") as file:
        stream = hosts._Labelled(file, "[1 b] ")
        print("a\nb", file=stream)
        print("c", end="", file=stream, flush=True)
        print(file=stream)
    assert (tmp_path / "log").read_text() == "[1 b] a\n[1 b] b\n[1 b] c\n[1 b] \n"
