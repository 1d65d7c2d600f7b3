"""A run that is killed and stopped, again and again, is bit for bit the run that was not. With real processes."""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mamba3_jax.checkpoint import UNFINISHED, Checkpoints, all_steps, load_model
from mamba3_jax.sharding import make_mesh
from mamba3_jax.train import metrics
from mamba3_jax.train.step import state_shapes
from tests.helpers import devices, rel_rms, without_times
from tests.train.tiny import get_config

ROOT = Path(__file__).parents[2]
STEPS = get_config().train.steps


def start(workdir, compiled, *flags, preexec_fn=None, **environment):
    command = [
        sys.executable,
        "-m",
        "launch.train",
        "--config=tests/train/tiny.py",
        f"--workdir={workdir}",
        *flags,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | compiled | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def finish(process) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def at_step(process, step) -> None:
    """Waits for the progress line of a step."""
    for line in process.stdout:
        if line.startswith(f"step {step:{len(str(STEPS))}}/"):
            return
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def kill_in_a_save(process, checkpoints) -> str:
    """SIGKILL while a checkpoint is being written; returns the name of its directory.

    The process is stopped first, so that what was seen half written is still so when it dies.
    """
    while process.poll() is None:
        if any(checkpoints.glob("*" + UNFINISHED)):
            process.send_signal(signal.SIGSTOP)
            if found := sorted(path.name for path in checkpoints.glob("*" + UNFINISHED)):
                process.kill()
                process.communicate()
                return found[0]
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    raise AssertionError(f"ended before a save was seen: {process.stderr.read()}")


def everything(workdir):
    """Parameters, the rest of the state and data position of the last checkpoint, as bytes by name."""
    config = get_config()
    rest = state_shapes(config, make_mesh("data:-1", jax.devices()[:1]))._asdict()
    with Checkpoints(workdir, config) as checkpoints:
        params, state, data = checkpoints.restore(STEPS, rest.pop("params"), rest)
    leaves = jax.tree_util.tree_leaves_with_path((params, state))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}, data


def timeless(workdir):
    """Every line's metrics, without what depends on the clock."""
    lines = [without_times(line) for line in metrics.read(workdir / "metrics.jsonl")]
    return [line for line in lines if line.keys() > {"step"}]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, compiled):
    """60 steps in one go."""
    workdir = tmp_path_factory.mktemp("straight")
    finish(start(workdir, compiled))
    return workdir


def test_killed_and_stopped_is_the_same_run(straight, tmp_path, compiled):
    checkpoints = tmp_path / "checkpoints"

    process = start(tmp_path, compiled)
    at_step(process, 12)
    unfinished = kill_in_a_save(process, checkpoints)
    saved = all_steps(tmp_path)
    assert saved
    assert int(unfinished.removesuffix(UNFINISHED)) > saved[-1]

    process = start(tmp_path, compiled)
    at_step(process, saved[-1] + 1)  # the first line: it resumed after the last complete one
    assert not (checkpoints / unfinished).exists() or saved[-1] + 5 == int(unfinished.removesuffix(UNFINISHED))
    at_step(process, 31)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    process = start(tmp_path, compiled)
    at_step(process, 43)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, errors
    stopped = all_steps(tmp_path)[-1]
    assert 43 <= stopped < STEPS
    assert f"saved {checkpoints}/{stopped}: the same command resumes" in output

    fresh = start(tmp_path, compiled, JAX_ENABLE_COMPILATION_CACHE="false")  # a program compiled anew is the same too
    assert f"resuming after step {stopped}" in finish(fresh)

    state, data = everything(straight)
    got_state, got_data = everything(tmp_path)
    assert got_state.keys() == state.keys()
    assert [name for name in state if got_state[name] != state[name]] == []
    assert got_data == data == data | {"position": STEPS}
    assert timeless(tmp_path) == timeless(straight)
    assert len([line for line in timeless(straight) if "loss" in line]) == STEPS


@pytest.mark.full
def test_four_devices_are_one_and_take_over_its_checkpoint(straight, tmp_path, compiled):
    """From the single device's parameters at some step on, a data axis of 4 computes the same to float32 rounding."""
    first = all_steps(straight)[0]
    assert first < STEPS
    (tmp_path / "checkpoints").mkdir()
    subprocess.run(["cp", "-r", straight / "checkpoints" / str(first), tmp_path / "checkpoints"], check=True)
    output = finish(start(tmp_path, compiled, **devices(4)))
    assert "4 x cpu, mesh {'data': 4}" in output
    assert f"resuming after step {first}" in output
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(load_model(tmp_path)[1]),
        jax.tree.leaves(load_model(straight)[1]),
        strict=True,
    ):
        assert rel_rms(got, want) < 1e-4, path
        assert rel_rms(np.asarray(got) * 1.001, want) > 5e-4


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config.model.d_stat=64"],
            "error: --config.model.d_stat=64: config.model has no field 'd_stat', did you mean",
        ),
        (["--config.data.batch=8"], "error: config.data.batch=8, but "),
        (["--config.optimizer.name=muon"], "error: config.optimizer.name='muon', but "),
        (["--config.train.log_every=0"], "error: config.train.log_every=0 is not in 1 .. 2147483647"),
    ],
)
def test_a_mistake_is_one_line(straight, compiled, flags, message):
    process = start(straight, compiled, *flags)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.startswith(message)
    assert errors.count("\n") == 1
    assert output == ""


@pytest.mark.full
def test_a_checkpoint_that_cannot_be_written_is_one_line(straight, tmp_path, compiled):
    """No file may have more than 8,000 bytes, which is less than the state; `straight` has filled the cache."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (8_000, 8_000))
    process = start(tmp_path, compiled, preexec_fn=limit)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.startswith(f"error: {tmp_path}/checkpoints/5 cannot be written: ")
    assert f"; no checkpoint was saved in {tmp_path}/checkpoints: once that is mended, " in errors
    assert errors.count("\n") == 1
    assert all_steps(tmp_path) == []


@pytest.mark.full
def test_a_damaged_checkpoint_is_one_line(straight, tmp_path, compiled):
    newest = all_steps(straight)[-1]
    (tmp_path / "checkpoints").mkdir()
    subprocess.run(["cp", "-r", straight / "checkpoints" / str(newest), tmp_path / "checkpoints"], check=True)
    for path in (tmp_path / "checkpoints").rglob("d/*"):
        path.write_bytes(b"")
    process = start(tmp_path, compiled)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.startswith(f"error: checkpoint of step {newest} cannot be read: {tmp_path}/checkpoints/{newest}: ")
    assert errors.count("\n") == 1
    assert json.loads((tmp_path / "checkpoints" / str(newest) / "config" / "metadata").read_text())
