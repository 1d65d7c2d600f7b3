"""Checkpoints: Orbax directories of parameters, the rest of the training state, data position and config together.

    workdir/config.json                  the resolved config of the last run
    workdir/tokenizer/                   the run's own copy of its tokenizer.json (data/tokenizer_copy.py)
    workdir/checkpoints/<step>/params    the parameter tree; all that evaluation and decoding need
                              /state     optimizer moments, step, counters, random key (training only)
                              /data      position of the data iterator, the same on every host (training only)
                              /config    the resolved config
                              /metrics   the validation loss, where this step was evaluated

A save is written beside its final name and renamed when it is complete, and a checkpoint that is no longer wanted is
renamed away before it is deleted: whatever carries a step's number is whole, wherever a kill falls.
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

TRASH = "deleted"  # where Orbax moves what is no longer kept
UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax ends the name of a directory it is writing


def checkpoint_dir(workdir) -> Path:
    """Where the checkpoints of a workdir lie, absolute (Orbax refuses relative paths)."""
    if "://" in str(workdir):
        raise ValueError(f"workdir={str(workdir)!r} is a URL: a directory of a local or mounted file system is needed")
    return Path(workdir).expanduser().resolve() / "checkpoints"


def all_steps(workdir) -> list[int]:
    """Step of the complete checkpoints, oldest first; [] where there is none."""
    directory = checkpoint_dir(workdir)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def load_config(workdir, step: int | None = None) -> Config:
    """Return the config saved in a checkpoint (None: the newest), its tokenizer the workdir's own copy if there is one.

    FileNotFoundError, ValueError: see `load_model`.
    """
    path = _step_path(workdir, step)
    with _reading(path):
        config = from_dict(read_json(path / "config" / "metadata"))
    if config.data.tokenizer not in ("", "bytes") and (copy := tokenizer_copy.find(workdir)):
        config.data.tokenizer = str(copy)
    return config


def load_model(workdir, step: int | None = None) -> tuple[Config, dict]:
    """Config and parameters of a checkpoint (None: the newest), on the default device, whatever device saved them.

    Raises:
      FileNotFoundError: no such workdir, no complete checkpoint in it, or none of that step.
      ValueError: the checkpoint is there and cannot be read, or holds NaN or infinity.
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

    Raises ValueError if the workdir has a checkpoint already: it would be mixed up with another model's.
    """
    if steps := all_steps(workdir):
        raise ValueError(f"{checkpoint_dir(workdir)} already holds checkpoints of steps {_names(steps)}")
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(step, params)


def keep_parameters(workdir) -> None:
    """Delete all but the newest checkpoint, and of that all but parameters and config: of a run that is done.

    Whatever carries a step's number stays whole. Raises OSError where something cannot be deleted.
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
    """Tell whether the newest checkpoint, of which there is one, holds no state: training does not go on from it."""
    return not (checkpoint_dir(workdir) / str(all_steps(workdir)[-1]) / "state").exists()


def write_config(workdir, config: Config) -> None:
    """workdir/config.json, for people; programs read the copy inside the checkpoint."""
    path = Path(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, to_dict(config), indent=2)


class Checkpoints:
    """The checkpoints of a training run.

    Saves are asynchronous: `save` returns once the arrays are copied from the device. Opening removes what an
    interrupted save or deletion left behind. Use it as a context manager: leaving it waits for the last save.
    A save that fails, then or later, raises OSError naming the directory, and the checkpoints before it stay whole.
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
        """Start a save; do nothing if the step has been saved already. `data`: the loader's position, JSON-able.

        Raises ValueError, and writes nothing, for parameters or a state that hold NaN or infinity.
        """
        if step in self._manager.all_steps():
            return
        check_finite(f"checkpoint of step {step} is not saved in {self.directory}", {"params": params, "state": state})
        items = {"params": ocp.args.StandardSave(params), "config": ocp.args.JsonSave(to_dict(self.config))}
        if state is not None:
            items["state"] = ocp.args.StandardSave(state)
            items["data"] = ocp.args.JsonSave(data)
        # A loss that is not a number is no best one, and JSON has no infinity.
        metrics = {"valid_loss": valid_loss} if math.isfinite(valid_loss) else {}
        self.wait()
        self._remove(TRASH)
        with writing(self.directory / str(step)):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        self._saving = step

    def wait(self) -> None:
        """Until the last save is complete on disk; raises OSError if it failed."""
        with writing(self.directory / str(self._saving)):
            self._manager.wait_until_finished()

    def best_loss(self) -> float:
        """Return the lowest validation loss among the checkpoints kept; inf if none was evaluated."""
        losses = [(self._manager.metrics(step) or {}).get("valid_loss", math.inf) for step in self._manager.all_steps()]
        return min(losses, default=math.inf)

    def latest(self) -> int | None:
        """Return the newest complete step, None if there is none."""
        return max(all_steps(self.workdir), default=None)

    def reached_preemption(self, step: int) -> bool:
        """Whether the runtime of a multi-host job told all hosts to stop after this step."""
        return self._manager.reached_preemption(step)

    def restore(self, step: int, params, state) -> tuple[Any, Any, Any]:
        """Parameters, state and data position, in the structure and shardings of these `params` and `state`.

        ShapeDtypeStructs with a sharding do. A checkpoint of `save_model` has parameters alone: the others are None.
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
    """Return how the threads of a save wait for those of other processes: not where their own part has failed.

    The others wait for that part, and Orbax would for them, for twenty minutes; so this process can say what failed.
    """
    wait = ocp.multihost.get_barrier_sync_fn()

    def sync(*, key: str, timeout_ms: int) -> None:
        if (failure := sys.exception()) and threading.current_thread() is not threading.main_thread():
            raise failure
        wait(key=key, timeout_ms=timeout_ms)

    return sync


@dataclasses.dataclass
class NewestAndBest:
    """Orbax preservation policy: the `keep` newest checkpoints and, if `best`, that of the lowest validation loss."""

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
    """Whatever goes wrong while a complete checkpoint is read, the file is at fault: one line that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"checkpoint of step {path.name} cannot be read: {path}: {why(error)}") from error


def _names(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
