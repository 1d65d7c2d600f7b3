"""Many runs in one step: member-steps a second of a population, beside one run at a time.

    python -m experiments.benchmarks.population --name=population_h200
    python -m experiments.benchmarks.population --members=1,4 --rows=4                         on a CPU too

The model is that of experiments/tasks/tracking_parity.py: one layer, d_model 64, d_state 64, rows of 160 tokens, in
float32 by default. Before a population is timed, the losses of its first steps have to be those of its members, each
trained alone by the ordinary step. `over one` is member-steps a second over those of one run by itself.
"""

import contextlib
import dataclasses
import functools
import tempfile
import time

from absl import app, flags

from experiments.benchmarks import common
from experiments.tasks import tracking_parity
from launch.provenance import provenance
from mamba3_jax.config import Config
from mamba3_jax.sharding import using
from mamba3_jax.train.loop import Trainer
from mamba3_jax.train.population import Population, member_config, members

FLAGS = flags.FLAGS
CHECKED = 4  # steps whose losses are compared
# Of the losses of so few steps; in bfloat16 a rounding of another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
COLUMNS = {
    "mixer": "mixer",
    "dtype": "dtype",
    "implementation": "implementation",
    "members": "members",
    "rows": "rows",
    "ms a step": "ms",
    "member-steps/s": "member_steps_per_second",
    "over one": "over_one",
    "compile, s": "compile_s",
    "error": "error",
}


def config_of(pattern: str, dtype: str, implementation: str, rows: int) -> Config:
    """Return the config of one row of the table."""
    config = tracking_parity.get_config()
    how = {"pattern": pattern, "compute_dtype": dtype, "implementation": implementation}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **how),
        data=dataclasses.replace(config.data, batch=rows),
    )


@contextlib.contextmanager
def running(kind: type[Trainer], *what):
    """Give a trainer in a folder of its own, its step compiled and its mesh in context."""
    with tempfile.TemporaryDirectory() as workdir, kind(*what, workdir, quiet) as trainer, using(trainer.mesh):
        trainer.compile()
        yield trainer


def losses(trainer: Trainer, steps: int) -> list[list[float]]:
    """Train for so many steps; every member's loss of each."""
    found = []
    for _ in range(steps):
        trainer.state, got = trainer.update(trainer.state, trainer._put(next(trainer.data)))
        found.append([values["loss"] for values in trainer._each(got)])
    return found


def timed(trainer: Trainer) -> common.Timing:
    """Time the step on one batch."""
    batch = trainer._put(next(trainer.data))

    def step():
        trainer.state, got = trainer.update(trainer.state, batch)
        return got

    return common.measure(step, batch_seconds=0.5)


@functools.lru_cache(maxsize=1)
def alone(pattern: str, dtype: str, implementation: str, rows: int) -> tuple[list, float]:
    """(losses by member and step, seconds a step) of the first two members, each trained by itself."""
    config, found = config_of(pattern, dtype, implementation, rows), []
    for member in members(2, (1e-3,)):
        with running(Trainer, member_config(config, member)) as one:
            found.append([loss for (loss,) in losses(one, CHECKED)])
            seconds = timed(one).median
    return found, seconds


def quiet(*_) -> None:
    """Say nothing."""


def measured(pattern: str, dtype: str, implementation: str, rows: int, count: int) -> dict:
    """Check and time a population of `count` members."""
    wanted, single = alone(pattern, dtype, implementation, rows)
    config, group = config_of(pattern, dtype, implementation, rows), members(count, (1e-3,))
    begin = time.perf_counter()
    with running(Population, config, group) as population:
        compile_s = time.perf_counter() - begin
        got = list(zip(*losses(population, CHECKED), strict=True))
        errors = {member.name: common.rel_rms(*pair) for member, *pair in zip(group, got, wanted, strict=False)}
        error = common.require(errors, TOLERANCE[dtype], f"{pattern} {implementation}, {count} members")
        median = timed(population).median
    return {
        "mixer": pattern,
        "dtype": dtype,
        "implementation": implementation or "default",
        "rows": rows,
        "members": count,
        "ms": 1e3 * median,
        "member_steps_per_second": count / median,
        "over_one": count * single / median,
        "compile_s": compile_s,
        "error": error,
    }


def main(_):
    rows = []
    for pattern in FLAGS.mixers:
        for dtype, implementation in (name.split(":") for name in FLAGS.implementations):
            for count in map(int, FLAGS.members):
                rows.append(measured(pattern, dtype, implementation, FLAGS.rows, count))
                common.show(rows[-1], COLUMNS)
                if FLAGS.name:
                    common.write(FLAGS.name, provenance(FLAGS.commit), rows, FLAGS.out)
    print(common.table(rows, COLUMNS))


if __name__ == "__main__":
    flags.DEFINE_list("mixers", ["M"], "letters of mixers, one model of one layer each")
    flags.DEFINE_list("implementations", ["float32:", "float32:chunked"], "DTYPE:NAME of the op; no name: the default")
    flags.DEFINE_list("members", ["1", "4", "8", "16"], "sizes of the population")
    flags.DEFINE_integer("rows", 64, "of 160 tokens, of each member", lower_bound=1)
    flags.DEFINE_string("name", "", "write results/NAME.json after every row; empty: write nothing")
    flags.DEFINE_string("out", "", "folder of the result file, by default results/ beside this")
    flags.DEFINE_string("commit", "", "recorded where there is no git to ask")
    app.run(main, flags_parser=common.parse)
