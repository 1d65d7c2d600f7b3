"""Train and evaluate a config by the ordinary commands, and record what comes out.

    python -m experiments.record --config=experiments/text.py --workdir=runs/text_recorded

Writes experiments/results/NAME.json, where NAME is the config's: the evaluation at every length, the wall time of both
commands (compilation included), the identity of the data, commit, device and date. The workdir must be new, so that the
time is that of a whole run.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from experiments import found
from experiments.benchmarks import common
from launch.common import define_path, run, user_errors
from launch.plan import check_name
from launch.provenance import REPOSITORY, git_commit, load, provenance
from mamba3_jax.checkpoint import all_steps, load_config
from mamba3_jax.data.pipeline import identities
from mamba3_jax.files import check_writable

RESULTS = Path(__file__).parent / "results"


def timed(module: str, *arguments: str) -> float:
    """Run one of the commands to its end, and return its wall time in seconds.

    Raises:
        SystemExit: the command failed, and has said why.
    """
    begin, command = time.perf_counter(), [sys.executable, "-m", module, *arguments]
    anew = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # so that the time is that of a first run
    if code := subprocess.run(command, cwd=REPOSITORY, env=anew).returncode:
        sys.exit(code)
    return round(time.perf_counter() - begin, 1)


def check(path: Path, workdir: Path) -> None:
    """Raise ValueError for a file that is not of one run, whose place is a sweep's, and for a workdir that is there."""
    given, config = found.given_by(path)
    if "VARIANTS" in given:
        raise ValueError(f"{path} has VARIANTS: launch.sweep records them")
    check_name("config.name", config.name)
    if workdir.exists():
        raise ValueError(f"{workdir} exists: a recorded run starts from nothing")
    check_writable(workdir)
    check_writable(RESULTS / f"{config.name}.json")


def main(_):
    workdir = Path(flags.FLAGS.workdir).absolute()
    with user_errors():
        check(Path(flags.FLAGS.config), workdir)
    # Start no backend before the children have run: an accelerator may serve one process at a time.
    commit, load_before = git_commit(), load()
    seconds = {
        "train": timed("launch.train", f"--config={flags.FLAGS.config}", f"--workdir={workdir}"),
        "evaluate": timed("launch.evaluate", f"--workdir={workdir}"),
    }
    step = all_steps(workdir)[-1]
    evaluation = json.loads((workdir / "evaluation" / f"step_{step}.json").read_text())
    config, origin = load_config(workdir), provenance(commit) | {"load_before": load_before}
    of = {"seconds": seconds, "step": step, "data": identities(config.data)}
    path = common.write(config.name, origin, evaluation["results"], RESULTS, **of)
    print(f"written to {path}")


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "a file with get_config()", required=True)
    define_path("workdir", None, "a directory that does not exist yet", required=True)
    run(main)
