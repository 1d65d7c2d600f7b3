"""python -m launch.compile --config=FILE.py --topology=v5e:16x16 [--what=decode] [--config.train.mesh=... ...]

Compiles the step that `launch.train` would run, or the one that decodes a token of every row, for TPUs that need not be
there, and says what it needs of each device: memory, operations, bytes of HBM, collectives, and the least time that
these take. Nothing runs, so no time is measured. A mesh whose size is not the topology's, a dimension that the mesh
does not divide and a step that does not fit into memory are one line and exit status 2.

A topology is a chip of `launch/tpu.py` and the sides of its grid: v5e:16x16 has 256 devices, v5p:4x4x4 has 64 and
tpu7x:2x2x4 has 32, two a chip. 2xv5e:16x16 is two slices of 256 devices: `data` lies over them, unless a size says
otherwise (fsdp:2x256), and what slices send one another is counted apart. With --what=decode, data.batch rows have room
for data.length tokens.
"""

from absl import flags

from launch import common, needs, tpu
from mamba3_jax.train.fit import Failed

CONFIG = common.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "chip and grid: v5e:16x16, 2xv5p:4x4x4, ...", required=True)
WHAT = flags.DEFINE_enum("what", "train", [*needs.PROGRAMS], "the step: of training, or of decoding one token a row")


def main(_):
    config = common.experiment(CONFIG)
    with common.user_errors():
        version = tpu.prepare()
        try:
            row = needs.measured(config, TOPOLOGY.value, WHAT.value)
        except Failed as error:
            common.fail(error)
    print(f"{config.name}, {WHAT.value}, {TOPOLOGY.value}, mesh {config.train.mesh!r}, libtpu {version}")
    print("\n".join(needs.lines(row)))


if __name__ == "__main__":
    common.run(main, alone=True)
