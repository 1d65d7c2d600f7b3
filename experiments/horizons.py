"""Predict where the best members of a horizon sweep fail, and record it beside where they do.

    python -m experiments.horizons --config=experiments/tasks/horizon_z6.py --sweep=runs/horizon_z6

Reads SWEEP/VARIANT/best, which `launch.sweep` left, and writes experiments/results/NAME_predicted.json. A row is a
variant: the length where its last answer is halfway to chance, as measured and as predicted from rows of the trained
length alone (`mamba3_jax/analysis/horizon.py`); it is null if that is at no length asked.
"""

import sys
import time
from pathlib import Path

from experiments.benchmarks import common
from launch.asked import done_before
from launch.common import config_path, define_config, define_path, experiment, run, user_errors
from launch.plan import Plan, check_name, read_plan
from launch.provenance import provenance
from mamba3_jax.analysis.horizon import group_of, horizon
from mamba3_jax.files import check_writable
from mamba3_jax.finite import or_null
from mamba3_jax.load import build, load_run

CONFIG = define_config()
SWEEP = define_path("sweep", None, "the workdir of the sweep", required=True)
RESULTS = Path(__file__).parent / "results"


def best_of(plan: Plan, name: str, folder: Path) -> str:
    """Return the name of a variant's best member; ValueError unless the sweep is done, and as the file asks for it."""
    if not (result := done_before(plan, name, folder)):
        raise ValueError(f"{folder} has no result that is as the config asks for it: launch.sweep makes one")
    return result["best"]


def row(variant: str, member: str, config, params) -> dict:
    """Return the row of a variant's best member, without the curves, which `launch.inspect` shows."""
    found = horizon(build(config), params, config.data)
    curves = found["predicted"]
    found["predicted"] = {
        cause: {name: part[name] for name in part if name != "points"} for cause, part in curves.items()
    }
    return or_null({"variant": variant, "member": member, **found})


def main(_):
    config, begin, origin = experiment(CONFIG), time.perf_counter(), provenance()
    with user_errors():
        if not group_of(config.data.source):
            raise ValueError(f"{config.data.source=} asks for no group's product")
        check_name("config.name", config.name)
        plan, sweep = read_plan(config_path(), config), Path(SWEEP.value).expanduser()
        check_writable(RESULTS / f"{config.name}_predicted.json")
        members = {name: best_of(plan, name, sweep / name) for name in plan.variants}
        loaded = {name: load_run(sweep / name / "best") for name in plan.variants}
    rows = []
    for variant, (own, params) in loaded.items():
        rows.append(row(variant, members[variant], own, params))
        fails = {cause: part.get("fails", "absent") for cause, part in rows[-1]["predicted"].items()}
        print(f"{variant}: fails at {rows[-1]['fails']}, predicted {fails}", file=sys.stderr, flush=True)
    seconds = round(time.perf_counter() - begin, 1)
    print(f"written to {common.write(f'{config.name}_predicted', origin, rows, RESULTS, seconds=seconds)}")


if __name__ == "__main__":
    run(main)
