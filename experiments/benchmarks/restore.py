"""What restoring a training state onto another mesh holds at its peak, of each device and of the host.

    python -m experiments.benchmarks.restore [--layers=3] [--workdir=DIR]

A state of layers as wide as those of the 1.5B model is saved from 8 CPU devices, and restored onto other meshes of as
many and of fewer, each in a process of its own. Devices share the host's memory here, so the host's peak has in it what
all devices hold (a part as often as it has copies), and what is read and not yet placed. A device's own peak is that of
its arrays, sampled every millisecond. Bits are compared by their sums.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import resource
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging

from experiments.benchmarks import common
from launch.provenance import provenance
from mamba3_jax import memory
from mamba3_jax.checkpoint import Checkpoints
from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.presets import PRESETS
from mamba3_jax.sharding import make_mesh
from mamba3_jax.train.step import TrainState, state_shapes

SAVED = ("fsdp:8", 8)
MESHES = {"fsdp:8": 8, "fsdp:4,tensor:2": 8, "data:2,fsdp:4": 8, "fsdp:4": 4, "data:1": 1}  # and of how many devices
VOCABULARY = 32768  # the model's own table would be most of so few layers

FLAGS = flags.FLAGS


def model_of(layers: int) -> ModelConfig:
    """Return the 1.5B model with few layers and tokens."""
    return dataclasses.replace(PRESETS["siso-1.5b"], pattern="M" * layers, vocab_size=VOCABULARY)


def drawn(shapes: TrainState) -> TrainState:
    """Return a state of these shapes and shardings, of random numbers: zeros would be no work to read."""

    def draw(shape):
        def part(index):
            sizes = [len(range(*place.indices(size))) for place, size in zip(index, shape.shape, strict=True)]
            return np.random.default_rng(0).random(sizes, np.float32).astype(shape.dtype)

        return jax.make_array_from_callback(shape.shape, shape.sharding, part)

    return jax.tree.map(draw, shapes)


def sums(state: TrainState) -> list[int]:
    """Return the sum of each array's bits: whatever mesh it lies on."""

    def total(array) -> int:
        own = (np.asarray(shard.data) for shard in array.addressable_shards if shard.replica_id == 0)
        return sum(int(np.sum(part.reshape(-1).view(np.uint32), dtype=np.uint64)) for part in own)

    return [total(array) for array in jax.tree.leaves(state)]


def host_bytes() -> int:
    """Return what this process has in memory; what the system caches of files is not in it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def device_bytes() -> int:
    """Return what the fullest device holds; arrays that share a buffer hold it once."""
    held = collections.defaultdict(dict)
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            held[shard.device][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return max((sum(buffers.values()) for buffers in held.values()), default=0)


def watched(function):
    """Return what the function gives, its seconds, and by how much a device's and the host's bytes rose at most."""
    peaks, done, before = [0, 0], threading.Event(), (device_bytes(), host_bytes())

    def look() -> None:
        now = device_bytes(), host_bytes()
        peaks[:] = [max(peak, a - b) for peak, a, b in zip(peaks, now, before, strict=True)]

    def watch() -> None:
        while not done.wait(1e-3):
            with contextlib.suppress(RuntimeError):  # an array is gone meanwhile
                look()

    watching, begin = threading.Thread(target=watch), time.perf_counter()
    watching.start()
    try:
        result = jax.block_until_ready(function())
        seconds = time.perf_counter() - begin
    finally:
        done.set()
        watching.join()
    look()  # what is given is held, whether or not a sample fell on it
    return result, seconds, *peaks


def ready(model: ModelConfig, spec: str, devices: int) -> tuple[Config, TrainState]:
    """Give this process so many devices, and return the config and the state's shapes on their mesh."""
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    config = Config(model=model)
    return config, state_shapes(config, make_mesh(spec))


def save(workdir: Path, model: ModelConfig) -> list[int]:
    """Save a state from `SAVED`, and return its sums."""
    config, shapes = ready(model, *SAVED)
    state = drawn(shapes)
    rest = state._asdict()
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(0, rest.pop("params"), rest, {})
    return sums(state)


def restore(workdir: Path, model: ModelConfig, spec: str, devices: int) -> tuple[dict, list[int]]:
    """Restore the state onto a mesh, and return a row and its sums."""
    config, shapes = ready(model, spec, devices)
    rest = shapes._asdict()
    params = rest.pop("params")
    with Checkpoints(workdir, config) as checkpoints:
        (params, rest, _), seconds, device, host = watched(lambda: checkpoints.restore(0, params, rest))
    state = TrainState(params=params, **rest)
    leaves = jax.tree.leaves(state)
    row = {
        "saved": SAVED[0],
        "mesh": spec,
        "devices": devices,
        "state_gb": sum(array.nbytes for array in leaves) / 1e9,
        "part_gb": memory.on_a_device(shapes) / 1e9,
        "device_gb": device / 1e9,
        "held_gb": sum(shard.data.nbytes for array in leaves for shard in array.addressable_shards) / 1e9,
        "host_gb": host / 1e9,
        "seconds": seconds,
    }
    return row, sums(state)


def measured(workdir: Path, model: ModelConfig, meshes: dict[str, int]) -> list[dict]:
    """Save a state, restore it onto each mesh, each in a process of its own, and return a row of each.

    Raises:
        ValueError: what is restored is not what was saved.
    """
    rows, spawn = [], multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        want = pool.apply(save, (workdir, model))
        for spec, devices in meshes.items():
            row, got = pool.apply(restore, (workdir, model, spec, devices))
            if got != want:
                raise ValueError(f"what is restored onto {spec!r} is not what was saved from {SAVED[0]!r}")
            rows.append(row)
            common.show(row, COLUMNS)
    return rows


COLUMNS = {
    "saved from": "saved",
    "restored onto": "mesh",
    "devices": "devices",
    "state GB": "state_gb",
    "a device's part": "part_gb",
    "a device's peak": "device_gb",
    "of all devices": "held_gb",
    "the host's peak": "host_gb",
    "s": "seconds",
}


def main(argv):
    del argv
    jax.config.update("jax_platforms", "cpu")
    origin = provenance()
    with tempfile.TemporaryDirectory(dir=FLAGS.workdir or None) as workdir:
        rows = measured(Path(workdir), model_of(FLAGS.layers), MESHES)
    common.write("restore_cpu", origin, rows, FLAGS.out, layers=FLAGS.layers)


if __name__ == "__main__":
    flags.DEFINE_integer("layers", 3, "of the model", 1)
    flags.DEFINE_string("workdir", "", "where the checkpoint is written; empty: where temporary files are")
    common.define_result()
    app.run(main, flags_parser=common.parse)
