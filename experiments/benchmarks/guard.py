"""What it costs to look at every new parameter and moment before they are kept: a training step with that and without.

    python -m experiments.benchmarks.guard                    on a GPU: the presets of 180M parameters
    python -m experiments.benchmarks.guard --models=text      on a CPU: experiments/text.py

The step is the trainer's own; "without" looks at the loss and the gradient's norm alone. The programs take turns in one
process, "without" as two of them: what they differ by is noise. All must compute the same loss and gradient norm.
"""

import contextlib
import statistics
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import text
from experiments.benchmarks import common, train
from launch.provenance import provenance
from mamba3_jax.config import Config
from mamba3_jax.presets import PRESETS
from mamba3_jax.train import step

PROGRAMS = {"with": True, "without": False, "without, again": False}

FLAGS = flags.FLAGS


def loss_and_norm_alone(*trees) -> jax.Array:
    """Stands in for `all_finite`: takes no notice of the parameters, which come with the optimizer's moments."""
    return ALL_FINITE(*trees) if len(trees) == 1 else jnp.bool_(True)


ALL_FINITE = step.all_finite


def config_of(model: str) -> Config:
    """Return a preset in bench shape, or the text experiment as it is."""
    if model == "text":
        return text.get_config()
    config = Config(model=PRESETS[model])
    config.data.batch, config.data.length = FLAGS.batch, FLAGS.length
    return config


def rows_of(model: str, config: Config, rounds: int, batch_seconds: float = 0.5) -> list[dict]:
    """Return a row a program: its times, and how many percent over "without" beside it, the median over the rounds."""
    calls, memory, values = {}, {}, {}
    for name, checked in PROGRAMS.items():
        program = train.trainer_program(model, config)
        patch = contextlib.nullcontext() if checked else mock.patch.object(step, "all_finite", loss_and_norm_alone)
        with patch:
            compiled = program.compile()
        calls[name], memory[name] = program.calls(compiled), common.temp_mib(compiled)
        values[name] = jax.device_get(program.values(calls[name]()))
        for error, size in train.errors(values[name], values["with"]).items():
            common.require({error: size}, train.TOLERANCE[error], f"{model}, {name}")
    count = common.calls_for(common.seconds_a_call(calls["with"], 3), batch_seconds)
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(common.seconds_a_call(call, count))
    rows = []
    for name, taken in seconds.items():
        timing = common.Timing.of(taken)
        ratios = [mine / other for mine, other in zip(taken, seconds["without"], strict=True)]
        rows.append(
            {
                "model": model,
                "batch": config.data.batch,
                "length": config.data.length,
                "check": name,
                "ms": timing.median * 1e3,
                "best_ms": timing.best * 1e3,
                "over_without_percent": 100 * (statistics.median(ratios) - 1),
                "temp_mib": memory[name],
                "loss": float(values[name]["loss"]),
                "rounds": rounds,
            }
        )
    return rows


COLUMNS = {
    "model": "model",
    "batch": "batch",
    "length": "length",
    "check of what is kept": "check",
    "ms": "ms",
    "best": "best_ms",
    "% over without": "over_without_percent",
    "temporaries, MiB": "temp_mib",
    "loss": "loss",
}


def main(argv):
    del argv
    origin, rows = provenance(FLAGS.commit), []
    for model in FLAGS.models or (["text"] if jax.default_backend() == "cpu" else ["siso-180m", "mimo-180m"]):
        rows += rows_of(model, config_of(model), FLAGS.rounds)
        path = common.write(f"guard_{jax.default_backend()}", origin, rows, FLAGS.out)
    print(common.table(rows, COLUMNS))
    print(path)


if __name__ == "__main__":
    flags.DEFINE_multi_enum("models", None, [*PRESETS, "text"], "default text on a CPU, else the presets of 180M")
    flags.DEFINE_integer("rounds", 20, "of each program, in turns", lower_bound=1)
    flags.DEFINE_integer("batch", 8, "rows of a preset's step", lower_bound=1)
    flags.DEFINE_integer("length", 2048, "tokens of a row of a preset's step", lower_bound=1)
    common.define_result(commit=True)
    app.run(main, flags_parser=common.parse)
