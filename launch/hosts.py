"""Several processes as one run: how they find one another, and how one that fails or is lost ends the others.

On TPU pods, GKE, Slurm, Open MPI and Kubernetes Jobs and JobSets jax finds out who they are; elsewhere flags say it:

    python -m launch.train --coordinator=HOST:PORT --processes=2 --process=0 ...     and --process=1 on the other host

This holds for several TPU slices too: GKE gives every host MEGASCALE_COORDINATOR_ADDRESS, _NUM_SLICES and _SLICE_ID,
and jax counts processes slice after slice. GPU hosts without these variables are joined in the same way, and
`train.mesh` takes each of them as a slice.

Before jax starts, process 0 calls the roll on the coordinator's port and names who is missing; afterwards these
connections stay open, unused. One that breaks means that its process is gone: all others then end within seconds,
where a collective would wait for ever, and a restart resumes. A process that should have company never runs alone.
"""

import contextlib
import json
import os
import re
import resource
import selectors
import socket
import sys
import threading
import time
import traceback
from typing import NamedTuple

import jax
from absl import flags, logging
from jax._src.clusters import ClusterEnv  # jax's own detection: the public call also starts, and dies of a timeout

from mamba3_jax.config import listed

COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where the platform does not say it")
PROCESSES = flags.DEFINE_integer(
    "processes", None, "how many processes there are; 1: this one alone, whatever the platform says", 1
)
PROCESS = flags.DEFINE_integer("process", None, "which of the processes this is, from 0", 0)
JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "seconds in which all processes have to be there", 1)

USER_ERROR, LOST = 2, 4  # exit statuses: see launch/common.py
HEARTBEAT = 40  # seconds after which jax gives up a host that vanished without closing its connections
GRACE = 3  # seconds that a failed process waits for word that another one was lost
# Variables that say that there are several processes, and how each value says how many.
CLAIMS = {
    "SLURM_NTASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "PMI_SIZE": int,
    "WORLD_SIZE": int,
    "MEGASCALE_NUM_SLICES": int,
    "TPU_WORKER_HOSTNAMES": lambda value: len(value.split(",")),
    "JOB_COMPLETION_INDEX": lambda value: 2,  # set by an indexed Kubernetes Job, which does not say how many: assume 2
}


class Missing(Exception):
    """Some processes did not come in time. The message is for the user."""


class Place(NamedTuple):
    """Which process this is."""

    address: str  # of process 0: host:port
    count: int
    index: int

    def __str__(self) -> str:
        return f"process {self.index} of {self.count} ({socket.gethostname()})"


def place() -> Place | None:
    """Return which process this is, from the flags and jax's detection; None: it is alone.

    Raises:
        ValueError: the platform speaks of several processes without saying how to join them, or flags are missing.
    """
    if PROCESSES.value == 1:
        return None
    given = (COORDINATOR.value or os.environ.get("JAX_COORDINATOR_ADDRESS"), PROCESSES.value, PROCESS.value)
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(*given, None, None, JOIN_TIMEOUT.value)[:3]
    except Exception as error:  # each platform's detection raises another type
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"the platform does not say how to join: {why} (--processes=1 runs it alone)") from error
    if found == (None, None, None):
        for name, count in CLAIMS.items():
            if (value := os.environ.get(name)) and count(value) > 1:
                raise ValueError(
                    f"{name}={value} speaks of several processes, and jax finds no way to join them: start them with "
                    "srun, mpirun or a JobSet, give --coordinator, --processes and --process, or --processes=1 for one"
                )
        return None
    found = Place(*found)
    if None in found or not re.fullmatch(r".+:\d+", found.address) or not found.index < found.count:
        raise ValueError(
            f"--coordinator={found.address}, --processes={found.count}, --process={found.index}: where the platform "
            "does not say them, wanted are HOST:PORT, how many, and which from 0"
        )
    return None if found.count == 1 else found


def join(saves: bool):
    """Return the `Company` of this process, with jax started in all of them; None: it is alone.

    Args:
        saves: jax notes a SIGTERM to any of them, so that all save (see train/resume.py); else a SIGTERM ends them.

    Raises:
        ValueError: see `place`; or the processes do not agree on how many they are.
        Missing: some did not come in time; it names them.
    """
    if (here := place()) is None:
        return None
    for name in ("stdout", "stderr"):
        setattr(sys, name, _Labelled(getattr(sys, name), f"[{here.index} {socket.gethostname()}] "))
    logging.get_absl_handler().python_handler.stream = sys.stderr
    company = Company(here, JOIN_TIMEOUT.value)
    jax.config.update("jax_enable_preemption_service", saves)
    times = {"initialization_timeout": JOIN_TIMEOUT.value, "heartbeat_timeout_seconds": HEARTBEAT}
    jax.distributed.initialize(*here, **times)
    return company


def pause() -> None:
    """Wait before this process says that it failed: if another was lost, which is the cause, `_watch` ends it now."""
    if jax.distributed.is_initialized():
        time.sleep(GRACE)


class _Labelled:
    """A stream that begins every line with the process that wrote it."""

    def __init__(self, stream, label: str):
        self._stream, self._label, self._held = stream, label, ""

    def write(self, text: str) -> int:
        whole, newline, self._held = (self._held + text).rpartition("\n")
        if newline:  # written in one piece, since other processes may write to the same terminal or file
            self._stream.write(self._label + whole.replace("\n", f"\n{self._label}") + newline)
        return len(text)

    def flush(self) -> None:
        if self._held:
            self.write("\n")
        self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


class Company:
    """The other processes of this run. Process 0 has a connection to each, and passes on why the run ends.

    As a context manager around the program it ends all processes with this one, unless all end in the same way anyway.
    """

    def __init__(self, here: Place, seconds: float):
        self._here, self._ending, self._leaving = here, threading.Lock(), threading.Event()
        deadline = time.monotonic() + seconds
        late = f"within {seconds} s: --join_timeout waits longer"
        self._peers: dict[socket.socket, str] = {}
        (self._call_the_roll if here.index == 0 else self._answer)(deadline, late)
        threading.Thread(target=self._watch, daemon=True).start()

    def _call_the_roll(self, deadline: float, late: str) -> None:
        port, there = int(self._here.address.rsplit(":", 1)[1]), {}
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection a process, and there may be thousands
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            door = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=self._here.count)
        except OSError as error:
            raise ValueError(f"{self._here} cannot listen on port {port}: {error}") from error
        with door:
            while len(there) < self._here.count - 1 and (left := deadline - time.monotonic()) > 0:
                door.settimeout(left)
                with contextlib.suppress(OSError, ValueError):  # a caller that is not a process of ours gets no answer
                    peer, _ = door.accept()
                    peer.settimeout(GRACE)
                    words = _hear(peer, "process", "processes", "host")
                    there[words["process"]] = (peer, words)
        self._peers = {peer: f"process {index} ({words['host']})" for index, (peer, words) in there.items()}
        if others := {words["processes"] for _, words in there.values()} - {self._here.count}:
            text = f"{self._here} was told of {self._here.count} processes, another one of {others.pop()}"
            self._tell(USER_ERROR, text)
            raise ValueError(text)
        if missing := sorted(set(range(1, self._here.count)) - set(there)):
            text = f"process {listed(missing)} of {self._here.count} did not join {self._here} {late}"
            self._tell(LOST, text)
            raise Missing(text)
        for peer in self._peers:
            _keep(peer)
        self._tell(0, "all are there")  # `_watch` finds whoever has gone meanwhile

    def _answer(self, deadline: float, late: str) -> None:
        host, port = self._here.address.rsplit(":", 1)
        why = ""
        while (left := deadline - time.monotonic()) > 0:
            try:
                peer = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
                _say(peer, process=self._here.index, processes=self._here.count, host=socket.gethostname())
                peer.settimeout(left + GRACE)  # process 0 may have begun later, and will name who is missing
                words = _hear(peer, "status", "text")
            except (OSError, ValueError) as error:  # it is not up yet, or a run before this one is still ending there
                why = str(error)
                time.sleep(0.2)
                continue
            if words["status"]:
                raise (Missing if words["status"] == LOST else ValueError)(words["text"])
            _keep(peer)
            self._peers = {peer: f"process 0 ({host})"}
            return
        raise Missing(f"process 0 did not answer {self._here} at {self._here.address} {late} ({why})")

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    try:
                        words = _hear(key.fileobj, "status", "text")
                    except ValueError:
                        if self._leaving.is_set():
                            return
                        gone = f"{self._peers[key.fileobj]} is gone, killed or lost with its host; all others end too"
                        words = {"status": LOST, "text": f"{gone}: the same command goes on after the last checkpoint"}
                    self._end(**words)

    def _tell(self, status: int, text: str) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                _say(peer, status=status, text=text)

    def _end(self, status: int, text: str, said: bool = False) -> None:
        """End this process and, through process 0, all others, without waiting for jax, which might take for ever."""
        self._ending.acquire()  # never released: only one thread may end the process
        self._tell(status, text)
        if not said:
            print(f"error: {text}", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code != USER_ERROR):  # all others end like this
            self._leaving.set()
            jax.distributed.shutdown()
            return
        status, words = USER_ERROR, getattr(error, "__notes__", [])  # `common.fail` added them, and has printed them
        if not isinstance(error, SystemExit):
            status = 1 if isinstance(error, Exception) else 130  # Ctrl-C
            if status == 1:
                pause()
            traceback.print_exception(error)
            words = traceback.format_exception_only(error)[:1]
        self._end(status, f"{self._here}: {' '.join(words).strip()}", said=True)


def _keep(peer: socket.socket) -> None:
    """Send keep-alives over a connection that stays idle for days: firewalls forget one that is silent for minutes."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # on Linux; elsewhere the first keep-alive is sent after two hours
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)


def _say(peer: socket.socket, **words) -> None:
    peer.sendall(json.dumps(words, allow_nan=False).encode() + b"\n")


def _hear(peer: socket.socket, *names: str) -> dict:
    """Return what the other side says; ValueError where it is gone, or does not say just these names and is no peer."""
    try:
        words = json.loads(peer.makefile("rb", buffering=0).readline(2**16) or "null")
    except OSError as error:
        raise ValueError(str(error)) from error
    if not isinstance(words, dict) or words.keys() != set(names):
        raise ValueError(f"it said {words!r}")
    return words
