"""Resuming a run: what may change meanwhile, one run at a time in a workdir by a lock, and stopping on a signal."""

import contextlib
import dataclasses
import fcntl
import signal
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mamba3_jax.checkpoint import Checkpoints, all_steps
from mamba3_jax.config import Config, to_dict
from mamba3_jax.data import tokenizer_copy

# Sections and fields that may differ in a resumed run: how long, how fast and how it runs. Any other makes another run.
MAY_CHANGE = {
    "name",
    "optimizer",
    "train",
    "data.workers",
    "model.implementation",
    "model.chunk",
    "model.attn_implementation",
    "model.remat",
    "model.unroll",
}
MAY_NOT = {"optimizer.name"}  # though the rest of the section may: a checkpoint holds the moments of this optimizer


def changes(old: Config, new: Config) -> dict[str, tuple]:
    """Return (old, new) of every field that differs, by the field's path."""
    return dict(_changes(to_dict(old), to_dict(new), ""))


def _changes(old: dict, new: dict, path: str):
    for name in new:
        if isinstance(new[name], dict):
            yield from _changes(old[name], new[name], f"{path}{name}.")
        elif old[name] != new[name]:
            yield f"{path}{name}", (old[name], new[name])


def check(saved: Config, config: Config, path, *, model_only: bool = False) -> dict[str, tuple]:
    """Return the changes of a config with which a run resumes.

    Args:
        saved: the config in the checkpoint.
        config: that of the run.
        path: of the checkpoint.
        model_only: it holds parameters alone, from which a run with any data and seed may start.

    Raises:
        ValueError: a field may not change; the message names it.
    """
    found = changes(saved, config)
    for field, (old, new) in found.items():
        section = field.split(".")[0]
        may = {section, field} & MAY_CHANGE and field not in MAY_NOT
        if may or (model_only and section != "model"):
            continue
        raise ValueError(
            f"config.{field}={new!r}, but {path} was trained with {old!r}: "
            "a run resumes with the model, data, seed and optimizer it began with; use another workdir"
        )
    return found


def with_own_tokenizer(config: Config, workdir) -> Config:
    """Return the config with the workdir's own copy of the tokenizer, if there are checkpoints and a copy.

    Raises:
        ValueError: the config names another tokenizer.
    """
    if not all_steps(workdir) or (own := tokenizer_copy.to_resume(workdir, config.data.tokenizer)) is None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=own))


@contextlib.contextmanager
def alone(workdir: Path, name: str = "lock"):
    """Hold the lock workdir/NAME, which the system releases however the process ends.

    Raises:
        ValueError: another run holds the lock. The two would delete each other's checkpoints.
    """
    path = workdir / name
    path.touch()  # this closes the file too: in a bucket other hosts see it only then (`check_shared`)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {workdir}: it holds {path}") from None
        yield


def check_shared(workdir: Path) -> None:
    """Raise ValueError unless all processes see one directory: the lock that the first one holds, and its checkpoints.

    If each host had a disk of its own, each would get a part of every checkpoint and none a whole one.
    """
    steps = multihost_utils.process_allgather(np.int32(max(all_steps(workdir), default=-1))).reshape(-1).tolist()
    if len(set(steps)) > 1 or not (workdir / "lock").exists():
        found = ", ".join("none" if step < 0 else str(step) for step in steps)
        raise ValueError(f"{workdir} is not one directory on all hosts: newest checkpoints by process are {found}")


class Signals:
    """Notes SIGTERM and SIGINT, so that the run can save before it ends; a second signal ends it at once.

    With several processes jax handles SIGTERM: it tells all of them, and after which step they are to stop.
    """

    def __enter__(self):
        self.caught = 0
        self._several = jax.process_count() > 1
        numbers = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number, frame):
        self.caught = number
        signal.signal(number, signal.SIG_DFL)
        if self._several:
            signal.raise_signal(signal.SIGTERM)

    def stop(self, checkpoints: Checkpoints, step: int) -> int:
        """Return the number of the signal on which to stop after this step; 0: go on. All processes stop together."""
        if not self._several:
            return self.caught
        return (self.caught or signal.SIGTERM) if checkpoints.reached_preemption(step) else 0

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)
