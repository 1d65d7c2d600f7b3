"""Run by test_hosts.py in two processes: saves parameters that lie over the devices of both, or has a bug in one."""

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from launch.common import define_path, run
from mamba3_jax.checkpoint import Checkpoints
from tests.train.tiny import get_config

FLAGS = flags.FLAGS
SHAPES = {"rows": (16, 2**20), "columns": (1000, 24), "scalar": ()}  # 64 MB


def params() -> dict[str, np.ndarray]:
    """Numbers of which none is another's, on every process the same."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def main(_):
    if jax.process_index() == FLAGS.bug:
        raise KeyError("a bug")
    mesh = jax.make_mesh((8,), ("x",))
    specs = {"rows": PartitionSpec("x"), "columns": PartitionSpec(None, "x"), "scalar": PartitionSpec()}
    placed = {name: jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in params().items()}
    assert not placed["rows"].is_fully_addressable
    with Checkpoints(FLAGS.workdir, get_config()) as checkpoints:
        checkpoints.save(3, placed)


if __name__ == "__main__":  # test_hosts.py imports it beside commands with flags of these names
    define_path("workdir", None, "of the checkpoint", required=True)
    flags.DEFINE_integer("bug", None, "the process that has one")
    run(main)
