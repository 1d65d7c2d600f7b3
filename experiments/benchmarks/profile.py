"""Where the op's time goes on a GPU: every kernel of a call, its time, and how often it runs.

    python -m experiments.benchmarks.profile --cases=siso,mimo4

The figures of jax's own profiler, over some calls of what `experiments.benchmarks.ssm` times, which checks the results;
here nothing is checked. What runs on the device one after another adds up to about a call's time: the rest is idle.
"""

import collections
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from absl import app, flags

from experiments.benchmarks import common, ssm
from launch.provenance import provenance

FLAGS = flags.FLAGS
COLUMNS = {name: name for name in ("case", "what", "kernel", "ms", "times", "share")}
CALLS = 5


def profiled(function, calls: int = CALLS) -> dict[str, tuple[float, float]]:
    """Of every kernel, by name: ms a call of `function` and how often it runs in one, the slowest first."""
    jax.block_until_ready(function())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = function()
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        found = collections.defaultdict(list)
        for plane in data.planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            found[event.name].append(event.duration_ns)
    taken = {name: (sum(ns) / calls / 1e6, len(ns) / calls) for name, ns in found.items()}
    return dict(sorted(taken.items(), key=lambda item: -item[1][0]))


def task_call(task: ssm.Task, compiled):
    """Return a function of no arguments, as `ssm.measure_task` times it."""
    if task.what == "decode":
        state, *rest = task.arguments()

        def step():
            nonlocal state
            state, y_BLHP = compiled(state, *rest)
            return y_BLHP

        return step
    turns = itertools.cycle([task.arguments(seed) for seed in range(2)])
    return lambda: compiled(*next(turns))


def rows_of(task: ssm.Task, compiled) -> list[dict]:
    kernels = profiled(task_call(task, compiled))
    whole = sum(ms for ms, _ in kernels.values())
    row = {"case": task.name, "what": task.what}
    return [row | {"kernel": name, "ms": ms, "times": n, "share": ms / whole} for name, (ms, n) in kernels.items()]


def main(argv):
    del argv
    if jax.default_backend() != "gpu":
        raise app.UsageError(f"this needs a GPU, the backend is {jax.default_backend()!r}")
    cases = ssm.CASES["gpu"]
    names = ssm.chosen("cases", FLAGS.cases, cases)
    tasks = [task for name in names for task in ssm.tasks_of(name, cases[name], [FLAGS.implementation], [None])]
    tasks = [task for task in tasks if task.implementation == FLAGS.implementation]
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(ssm.Task.compile, tasks))
    rows = []
    for task, compiled in zip(tasks, programs, strict=True):
        if isinstance(compiled, Exception):
            raise compiled
        rows += rows_of(task, compiled)
        path = common.write(FLAGS.name, provenance(FLAGS.commit), rows, FLAGS.out)
        mine = [row for row in rows if (row["case"], row["what"]) == (task.name, task.what)]
        print(common.table([row for row in mine if row["share"] > 0.005], COLUMNS))
        print(f"{task.name} {task.what}: {sum(row['ms'] for row in mine):.3f} ms in kernels", flush=True)
    print(path)


if __name__ == "__main__":
    flags.DEFINE_list("cases", ["siso", "mimo4"], "names in experiments.benchmarks.ssm.CASES")
    flags.DEFINE_string("implementation", "triton", "a name in mamba3_jax.ops.ssm.IMPLEMENTATIONS")
    common.define_result(name="profile_gpu", commit=True)
    app.run(main, flags_parser=common.parse)
