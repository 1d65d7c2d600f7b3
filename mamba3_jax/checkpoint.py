"""Checkpoints: Orbax directories that hold parameters, the rest of the training state, data position and config.

    workdir/config.json                  the resolved config of the last run
    workdir/tokenizer/                   the run's own copy of its tokenizer.json (data/tokenizer_copy.py)
    workdir/checkpoints/<step>/params    the parameter tree; all that evaluation and decoding need
                              /state     optimizer moments, step, counters, random key (training only)
                              /data      position of the data iterator, the same on every host (training only)
                              /config    the resolved config
                              /metrics   the validation loss, where this step was evaluated

A save is written beside its final name and renamed when it is complete; a checkpoint that is no longer wanted is
renamed before it is deleted. So a directory whose name is a step is whole, whenever the process is killed.
"""

import contextlib
import dataclasses
import math
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from mamba3_jax.config import Config, from_dict, to_dict
from mamba3_jax.data import tokenizer_copy
from mamba3_jax.files import read_json, why, write_json, writing
from mamba3_jax.finite import check_finite

TRASH = "deleted"  # where Orbax moves checkpoints before it deletes them
UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax ends the name of a directory it is writing


def checkpoint_dir(workdir) -> Path:
    """Return the directory of a workdir's checkpoints, absolute, since Orbax refuses relative paths."""
    if "://" in str(workdir):
        raise ValueError(f"workdir={str(workdir)!r} is a URL: a directory of a local or mounted file system is needed")
    return Path(workdir).expanduser().resolve() / "checkpoints"


def all_steps(workdir) -> list[int]:
    """Return the steps of the complete checkpoints, oldest first; [] if there are none."""
    directory = checkpoint_dir(workdir)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def load_config(workdir, step: int | None = None) -> Config:
    """Return the config saved in a checkpoint; its tokenizer is the workdir's own copy, if there is one.

    Arguments and errors are those of `load_model`.
    """
    path = _step_path(workdir, step)
    with _reading(path):
        config = from_dict(read_json(path / "config" / "metadata"))
    if config.data.tokenizer not in ("", "bytes") and (copy := tokenizer_copy.find(workdir)):
        config.data.tokenizer = str(copy)
    return config


def load_model(workdir, step: int | None = None) -> tuple[Config, dict]:
    """Return the config and the parameters of a checkpoint, on this process's first device, whatever device saved them.

    Args:
        workdir: the directory of a run.
        step: which checkpoint; None: the newest.

    Raises:
        FileNotFoundError: there is no such workdir, no complete checkpoint in it, or none of that step.
        ValueError: the checkpoint cannot be read, or holds NaN or infinity.
    """
    path = _step_path(workdir, step)
    config = load_config(workdir, step)
    here = SingleDeviceSharding(jax.local_devices()[0])
    with _reading(path), contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        saved = handler.metadata(path / "params").tree
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
        params = handler.restore(path / "params", args=ocp.args.StandardRestore(like))
    check_finite(str(path), params)
    return config, params


def save_model(workdir, config: Config, params: dict, step: int = 0) -> None:
    """Write a checkpoint of parameters and config alone, for evaluation, decoding or as the start of a training run.

    Raises:
        ValueError: the workdir has checkpoints already, with which those of this model would be mixed up.
    """
    if steps := all_steps(workdir):
        raise ValueError(f"{checkpoint_dir(workdir)} already holds checkpoints of steps {_names(steps)}")
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(step, params)


def keep_parameters(workdir) -> None:
    """Delete, of a run that is done, all checkpoints but the newest, and the training state of that one.

    A directory whose name is a step is whole at any time.

    Raises:
        OSError: something cannot be deleted.
    """
    directory, steps = checkpoint_dir(workdir), all_steps(workdir)
    trash = directory / TRASH
    with writing(directory):
        shutil.rmtree(trash, ignore_errors=True)
        for path in [*(directory / str(step) for step in steps[:-1]), *(directory / str(steps[-1])).glob("state")]:
            trash.mkdir(exist_ok=True)
            path.rename(trash / path.name)
        shutil.rmtree(trash, ignore_errors=True)


def parameters_alone(workdir) -> bool:
    """Tell whether the newest checkpoint, which must exist, holds no training state: no run can resume from it."""
    return not (checkpoint_dir(workdir) / str(all_steps(workdir)[-1]) / "state").exists()


def write_config(workdir, config: Config) -> None:
    """Write workdir/config.json, for people; programs read the copy inside the checkpoint."""
    path = Path(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, to_dict(config), indent=2)


class Checkpoints:
    """The checkpoints of a training run.

    Use it as a context manager: leaving it waits for the last save. The constructor removes what an interrupted save or
    deletion left behind. Saves are asynchronous: `save` returns once the arrays are copied from the device. A save that
    fails, at once or later, raises OSError naming the directory, and the checkpoints before it stay whole.
    """

    def __init__(self, workdir, config: Config):
        self.workdir, self.config = workdir, config
        self.directory, self._saving = checkpoint_dir(workdir), None
        self._remove(TRASH)
        self._remove("*" + UNFINISHED)
        options = ocp.CheckpointManagerOptions(
            create=True,
            best_fn=lambda metrics: metrics.get("valid_loss", math.inf),
            best_mode="min",
            preservation_policy=NewestAndBest(config.train.keep, config.train.keep_best),
            todelete_subdir=TRASH,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier()) if jax.process_count() > 1 else None,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Wait for the last save and the deletions after it."""
        with writing(self.directory):
            self._manager.close()
        self._remove(TRASH)

    def save(self, step: int, params, state=None, data=None, valid_loss: float = math.inf) -> None:
        """Start a save; do nothing if the step has been saved already.

        Args:
            step: the steps trained so far, which name the checkpoint.
            params: the parameter tree.
            state: the rest of the training state; None saves parameters alone.
            data: the position of the data iterator, plain values that JSON can hold; read if there is a state.
            valid_loss: the validation loss; infinity: this step was not evaluated.

        Raises:
            ValueError: parameters or state hold NaN or infinity; nothing is written.
            OSError: this save failed, or the one before it.
        """
        if step in self._manager.all_steps():
            return
        check_finite(f"checkpoint of step {step} is not saved in {self.directory}", {"params": params, "state": state})
        items = {"params": ocp.args.StandardSave(params), "config": ocp.args.JsonSave(to_dict(self.config))}
        if state is not None:
            items["state"] = ocp.args.StandardSave(state)
            items["data"] = ocp.args.JsonSave(data)
        # A loss that is not finite is never the best one, and JSON cannot hold it.
        metrics = {"valid_loss": valid_loss} if math.isfinite(valid_loss) else {}
        self.wait()
        self._remove(TRASH)
        with writing(self.directory / str(step)):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        self._saving = step

    def wait(self) -> None:
        """Wait until the last save is complete on disk; raise OSError if it failed."""
        with writing(self.directory / str(self._saving)):
            self._manager.wait_until_finished()

    def best_loss(self) -> float:
        """Return the lowest validation loss of the checkpoints on disk; infinity if none was evaluated."""
        losses = [(self._manager.metrics(step) or {}).get("valid_loss", math.inf) for step in self._manager.all_steps()]
        return min(losses, default=math.inf)

    def latest(self) -> int | None:
        """Return the newest complete step, None if there is none."""
        return max(all_steps(self.workdir), default=None)

    def reached_preemption(self, step: int) -> bool:
        """Tell whether the runtime of a multi-host job told all hosts to stop after this step."""
        return self._manager.reached_preemption(step)

    def restore(self, step: int, params, state) -> tuple[Any, Any, Any]:
        """Return (params, state, data) of a step, in the structure and shardings of the given `params` and `state`.

        These may be ShapeDtypeStructs with shardings. A checkpoint of `save_model` has parameters alone: state and data
        are then None.
        """
        path = self.directory / str(step)
        items = {"params": ocp.args.StandardRestore(params)}
        if training := (path / "state").exists():
            items |= {"state": ocp.args.StandardRestore(state), "data": ocp.args.JsonRestore()}
        with _reading(path):
            got = self._manager.restore(step, args=ocp.args.Composite(**items))
            return (got.params, got.state, got.data) if training else (got.params, None, None)

    def _remove(self, pattern: str) -> None:
        if jax.process_index() == 0:
            for path in self.directory.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def _barrier():
    """Return the barrier at which the threads of a save wait for other processes, unless they themselves have failed.

    If this process fails to save its part, the others wait for that part, and Orbax would make this process wait for
    them, for twenty minutes. Raising the failure at once lets this process say what it is.
    """
    wait = ocp.multihost.get_barrier_sync_fn()

    def sync(*, key: str, timeout_ms: int) -> None:
        if (failure := sys.exception()) and threading.current_thread() is not threading.main_thread():
            raise failure
        wait(key=key, timeout_ms=timeout_ms)

    return sync


@dataclasses.dataclass
class NewestAndBest:
    """An Orbax preservation policy: the `keep` newest checkpoints and, if `best`, the one of lowest validation loss."""

    keep: int
    best: bool

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        wanted = {info.step for info in checkpoints[-self.keep :]}
        losses = {info.step: (info.metrics or {}).get("valid_loss", math.inf) for info in checkpoints}
        step = min(losses, key=losses.get)
        if self.best and losses[step] < math.inf:
            wanted.add(step)
        return [info.step in wanted for info in checkpoints]


def _step_path(workdir, step: int | None) -> Path:
    directory, steps = checkpoint_dir(workdir), all_steps(workdir)
    if not directory.parent.is_dir():
        raise FileNotFoundError(f"workdir {directory.parent} does not exist")
    if not steps:
        found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        unfinished = f"; unfinished: {', '.join(found)}" if found else ""
        raise FileNotFoundError(f"no complete checkpoint in {directory}{unfinished}")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; it has {_names(steps)}")
    return directory / str(steps[-1] if step is None else step)


@contextlib.contextmanager
def _reading(path: Path):
    """Turn whatever goes wrong while a complete checkpoint is read into a ValueError of one line that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"checkpoint of step {path.name} cannot be read: {path}: {why(error)}") from error


def _names(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
