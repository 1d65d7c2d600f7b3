"""python -m launch.sweep --config=experiments/tasks/FILE.py --workdir=DIR [--variants=a,b] [--seeds=N]
                       [--learning_rates=1e-3,3e-3] [--results=FOLDER] [--config.train.steps=N ...]

Trains every variant of an experiment, its seeds x learning rates as one compiled step, scores them and compares them.

The file has, beside get_config():

    VARIANTS        {name: {"model.discretization": "exponential_euler"}}: fields by path, in place of the config's;
                    a learning rate is none of them, since LEARNING_RATES are every variant's
    SEEDS           how many (1); member s has seed and data.seed s higher: of all variants seed s sees the same rows
    LEARNING_RATES  each with every seed (the config's own)
    LENGTHS         scored, LENGTH or "LENGTH:PAIRS" (a task's default ones; of text the trained one)
    METRIC          chooses a variant's learning rate ("scaled_last@LENGTH", "loss@LENGTH", see evaluate/comparison.py)
    SHOWN           metrics of the table, a column each (METRIC)
    EXPECT          {name: ("worst scaled_last@256", 0.95, 1.0)}: a statistic over the seeds, its least and its most;
                    "difference METRIC" is the mean difference to the first variant, seed by seed
    SIZES           {line: {variant: size}}: variants that differ in a size, smaller ones first, all over 0
    EQUAL           [(line, variant)]: at which size the line has the variant's METRIC, with an interval over seeds

The same command resumes, bit for bit after SIGKILL, and goes past the variants that are done, in DIR or in
FOLDER/NAME.json. Under DIR/VARIANT stand result.json, members/NAME/metrics.jsonl, and best/, the best member as an
ordinary workdir for the other commands. A variant that is done keeps the parameters of its members alone, from which
other LENGTHS are scored without training; another training of a variant, done or begun, needs another DIR. One process
at a time is at a variant. DIR/results.json and FOLDER/NAME.json have every member's numbers, those that diverged too,
of all variants that are done just as asked, whichever --variants names; FOLDER/NAME.json is first written when nothing
that it had would be missing. Exit statuses are those of `launch.train`, but for 3.
"""

import sys
from collections.abc import Collection
from pathlib import Path

from absl import flags

from launch import common, experiment
from launch.asked import asked_of, done_before, recorded
from launch.plan import check_name, read_plan
from mamba3_jax.checkpoint import checkpoint_dir
from mamba3_jax.config import Config
from mamba3_jax.evaluate import comparison, equal
from mamba3_jax.files import check_writable
from mamba3_jax.train.fit import Failed
from mamba3_jax.train.loop import Stopped, say

CONFIG = common.define_config()
WORKDIR = common.define_path("workdir", None, "Directory of the sweep.", required=True)
VARIANTS = flags.DEFINE_list("variants", [], "which of the file's; default all")
SEEDS = flags.DEFINE_integer("seeds", None, "how many, in place of the file's", lower_bound=1)
RATES = flags.DEFINE_list("learning_rates", [], "in place of the file's")
RESULTS = common.define_path("results", None, "folder that gets NAME.json too, e.g. experiments/results")
COMMIT = flags.DEFINE_string("commit", "", "recorded where there is no git to ask")


def learning_rates() -> list[float]:
    """Return --learning_rates as numbers."""
    try:
        return [float(rate) for rate in RATES.value]
    except ValueError as error:
        raise ValueError(f"--learning_rates={','.join(RATES.value)}: {error}") from None


def check_rate(config: Config, rates: Collection[float]) -> None:
    """Raise ValueError where a flag gives the config a learning rate that no member has."""
    name = "config.optimizer.learning_rate"
    if name in flags.FLAGS and (rate := config.optimizer.learning_rate) not in rates:
        raise ValueError(f"--{name}={rate} would be nobody's: name --learning_rates in place of LEARNING_RATES")


def main(_):
    config = common.experiment(CONFIG)
    workdir = Path(WORKDIR.value).expanduser()
    with common.user_errors():
        checkpoint_dir(workdir)
        rates = learning_rates()
        how = {"only": VARIANTS.value, "seeds": SEEDS.value or 0, "rates": rates}
        plan = read_plan(common.config_path(), config, **how)
        check_rate(config, {member.learning_rate for member in plan.members})
        if RESULTS.value:
            check_name("config.name", config.name)
        kept = Path(RESULTS.value).expanduser() / f"{config.name}.json" if RESULTS.value else None
        # What is not there, damaged or cannot be written ends it here, before anything is trained.
        known = recorded(kept, plan) if kept else {}
        for name in plan.chosen:
            if name not in known:
                asked_of(plan, name)
                done_before(plan, name, workdir / name)
        for path in (workdir / "results.json", *([kept] if kept else [])):
            check_writable(path)
    try:
        found = experiment.sweep(plan, config.name, workdir, kept, known, COMMIT.value)
    except (Failed, OSError) as error:
        common.fail(error)
    except Stopped as stopped:
        say(stopped)
        sys.exit(128 + stopped.number)
    say(f"\n{comparison.table(found['rows'], plan.shown, plan.metric)}\n")
    for expectation in found["expected"]:
        say(comparison.said(expectation))
    for (line, variant), crossing in equal.equals(found["rows"], plan.sizes, plan.equal, plan.metric).items():
        say(equal.said(line, "size", variant, plan.metric, crossing))
    say(f"{found['seconds']:.0f} s in all, written to {workdir / 'results.json'}")


if __name__ == "__main__":
    common.run(main, alone=True)
