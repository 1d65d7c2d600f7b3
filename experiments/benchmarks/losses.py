"""Do losses stay what they were? The same runs by `launch.train` of several trees: before a change, and after.

    git worktree add /tmp/before COMMIT
    python -m experiments.benchmarks.losses --trees=before=/tmp/before --trees=after=. --config=experiments/text.py \\
        --fields="--config.train.steps=300 --config.train.log_every=50"

Every tree trains every seed, all of them side by side: set XLA_PYTHON_CLIENT_MEM_FRACTION so that they fit. A seed
names parameters and data, so trees are compared seed by seed. Seeds say how uncertain training is: a change that only
makes it faster moves a seed's loss by less than seeds differ. A loss is the mean since the last one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from experiments.benchmarks import common
from launch.common import user_errors
from launch.provenance import provenance
from mamba3_jax.train import metrics

COLUMNS = {name: name for name in ("tree", "seed", "step", "loss")}

FLAGS = flags.FLAGS


def trees_of(given: list[str]) -> dict[str, Path]:
    """Return the trees by name, of "NAME=FOLDER" each; ValueError for what is no tree, and a name given twice."""
    trees = {}
    for one in given:
        name, _, folder = one.partition("=")
        path = Path(folder).absolute()
        if not (name and folder) or name in trees or not (path / "launch" / "train.py").is_file():
            raise ValueError(f"--trees={one}: want NAME=FOLDER, each name once, where FOLDER has launch/train.py")
        trees[name] = path
    return trees


def start(tree: Path, seed: int, workdir: Path) -> subprocess.Popen:
    """Begin a run of one tree in a process of its own; what it prints is kept in a file beside the workdir."""
    command = [sys.executable, "-m", "launch.train", f"--config={FLAGS.config}", f"--workdir={workdir}"]
    command += [*FLAGS.fields.split(), f"--config.seed={seed}", f"--config.data.seed={seed}"]
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    with workdir.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=tree, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=log)


def rows_of(trees: dict[str, Path], seeds: int) -> list[dict]:
    """Train every tree on every seed, and return a row a logged step; exit with a line where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        workdirs = {(name, seed): Path(folder, f"{name}_{seed}") for name in trees for seed in range(seeds)}
        runs = {run: start(trees[run[0]], run[1], workdir) for run, workdir in workdirs.items()}
        try:
            for (name, seed), run in runs.items():
                if code := run.wait():
                    tail = workdirs[name, seed].with_suffix(".log").read_text().strip().splitlines()[-1:]
                    sys.exit(f"error: {name}, seed {seed}: status {code}: {' '.join(tail)}")
        finally:
            for run in runs.values():
                run.kill()
        return [
            {"tree": name, "seed": seed, "step": line["step"], "loss": line["loss"]}
            for (name, seed), workdir in workdirs.items()
            for line in metrics.read(workdir / metrics.FILE)
            if "loss" in line
        ]


def last(rows: list[dict]) -> dict[str, list[float]]:
    """Return the loss at the last logged step, by tree: one a seed."""
    step, found = max(row["step"] for row in rows), {}
    for row in rows:
        if row["step"] == step:
            found.setdefault(row["tree"], []).append(row["loss"])
    return found


def main(argv):
    del argv
    with user_errors():
        trees = trees_of(FLAGS.trees)
        if not Path(FLAGS.config).is_file():
            raise ValueError(f"--config={FLAGS.config} is no file")
    origin = provenance(FLAGS.commit)
    rows = rows_of(trees, FLAGS.seeds)
    path = common.write(FLAGS.name, origin, rows, FLAGS.out, config=FLAGS.config, fields=FLAGS.fields)
    print(common.table(rows, COLUMNS))
    print(last(rows))
    print(path)


if __name__ == "__main__":
    flags.DEFINE_multi_string("trees", ["now=."], "NAME=FOLDER: a checkout, or a folder that has one's files")
    flags.DEFINE_string("config", "experiments/text.py", "a config file that every tree can read")
    flags.DEFINE_string("fields", "", "more arguments of launch.train")
    flags.DEFINE_integer("seeds", 2, "runs of every tree", lower_bound=1)
    common.define_result(name="losses", commit=True)
    app.run(main, flags_parser=common.parse)
