"""Many runs in one step: how many steps of members a population makes in a second, beside one run at a time.

    python -m experiments.benchmarks.population --name=population_h200
    python -m experiments.benchmarks.population --members=1,4 --rows=4                         on a CPU too

The model is that of experiments/tasks/tracking_parity.py: one layer, d_model 64, d_state 64, rows of 160 tokens, in
float32 by default. Before a population is timed, the losses of its first two members in its first steps are compared
with those of the same two, each trained alone by the ordinary step. A member-step is one step of one member; `over one`
divides their rate by that of one run alone.
"""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
import time

from absl import app, flags

from experiments.benchmarks import common
from experiments.tasks import tracking_parity
from launch.common import user_errors
from launch.provenance import provenance
from mamba3_jax.config import Config
from mamba3_jax.sharding import using
from mamba3_jax.train.fit import validate
from mamba3_jax.train.loop import Trainer
from mamba3_jax.train.population import Population, member_config, members

FLAGS = flags.FLAGS
CHECKED = 4  # steps whose losses are compared
# Relative error of those losses. A population adds in another order than a run alone, and bfloat16 rounds each sum.
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
    """Give a trainer of `kind(*what)` in a temporary folder, its step compiled and its mesh in context."""
    with tempfile.TemporaryDirectory() as workdir, kind(*what, workdir, quiet) as trainer, using(trainer.mesh):
        trainer.compile()
        yield trainer


def losses(trainer: Trainer, steps: int) -> list[list[float]]:
    """Train for so many steps, and return of each step every member's loss."""
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
    """Train the first two members, each by itself, and return their losses by step, and the seconds a step of one."""
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


def kinds_of(mixers: list[str], implementations: list[str], rows: int) -> list[tuple[str, str, str]]:
    """Return the (pattern, dtype, implementation) of each mixer with each DTYPE:NAME.

    Raises:
        ValueError: one that cannot be trained.
    """
    kinds = []
    for pattern, how in itertools.product(mixers, implementations):
        dtype, _, implementation = how.partition(":")
        if dtype not in TOLERANCE:
            raise ValueError(f"--implementations: {how!r} is not DTYPE:NAME with DTYPE one of {', '.join(TOLERANCE)}")
        validate(config_of(pattern, dtype, implementation, rows))
        kinds.append((pattern, dtype, implementation))
    return kinds


def main(_):
    counts, rows = common.numbers("members"), []
    with user_errors():
        kinds = kinds_of(FLAGS.mixers, FLAGS.implementations, FLAGS.rows)
    for (pattern, dtype, implementation), count in itertools.product(kinds, counts):
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
    common.define_result(name="", empty="none is written", commit=True)
    app.run(main, flags_parser=common.parse)
