"""Where the time of the op, or of a training step, goes on a GPU: every kernel of a call, its time, how often it runs.

    python -m experiments.benchmarks.profile --cases=siso,mimo4
    python -m experiments.benchmarks.profile --cases= --models=transformer-180m --batch=32

The figures of jax's own profiler, over some calls of what `experiments.benchmarks.ssm` and `train` time, which check
the results; here nothing is checked. What runs on the device one after another adds up to about a call's time: the rest
is idle. A step has thousands of kernels: those whose names differ by a number alone are added up.
"""

import collections
import itertools
import re
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from experiments.benchmarks import common, ssm, train
from launch.provenance import provenance
from mamba3_jax.presets import PRESETS

FLAGS = flags.FLAGS
COLUMNS = {name: name for name in ("case", "what", "kernel", "ms", "times", "share")}
CALLS = 5
LENGTH = 2048  # of a training step's rows


def profiled(function, calls: int = CALLS, name=lambda event: event) -> dict[str, tuple[float, float]]:
    """Return ms a call of `function`, and how often it runs in one, of every kernel by `name`, the slowest first."""
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
                            found[name(event.name)].append(event.duration_ns)
    taken = {kernel: (sum(ns) / calls / 1e6, len(ns) / calls) for kernel, ns in found.items()}
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


def without_numbers(kernel: str) -> str:
    """Return a kernel's name without the numbers by which XLA tells equal ones apart: loop_add_fusion_12."""
    return re.sub(r"(_\d+)+$", "", kernel)


def rows_of(case: str, what: str, kernels: dict[str, tuple[float, float]]) -> list[dict]:
    whole = sum(ms for ms, _ in kernels.values())
    row = {"case": case, "what": what}
    return [row | {"kernel": name, "ms": ms, "times": n, "share": ms / whole} for name, (ms, n) in kernels.items()]


def main(argv):
    del argv
    if jax.default_backend() != "gpu":
        raise app.UsageError(f"this needs a GPU, the backend is {jax.default_backend()!r}")
    cases = ssm.CASES["gpu"]
    names = ssm.chosen("cases", FLAGS.cases, cases)
    tasks = [task for name in names for task in ssm.tasks_of(name, cases[name], [FLAGS.implementation], [None])]
    tasks = [task for task in tasks if task.implementation == FLAGS.implementation]
    models, batches = ssm.chosen("models", FLAGS.models, PRESETS), common.numbers("batch")
    steps = [train.step_program(model, "", batch, LENGTH) for model in models for batch in batches]
    programs, rows = [*tasks, *steps], []
    for program, compiled in zip(programs, common.compiled_all(lambda each: each.compile(), programs), strict=True):
        if isinstance(compiled, Exception):
            raise compiled
        if isinstance(program, ssm.Task):
            mine = rows_of(program.name, program.what, profiled(task_call(program, compiled)))
        else:
            kernels = profiled(program.calls(compiled), name=without_numbers)
            mine = rows_of(f"{program.model}, {program.batch} rows", program.what, kernels)
        rows += mine
        path = common.write(FLAGS.name, provenance(FLAGS.commit), rows, FLAGS.out)
        print(common.table([row for row in mine if row["share"] > 0.005], COLUMNS))
        print(f"{mine[0]['case']} {program.what}: {sum(row['ms'] for row in mine):.3f} ms in kernels", flush=True)
    print(path)


if __name__ == "__main__":
    flags.DEFINE_list("cases", ["siso", "mimo4"], "names in experiments.benchmarks.ssm.CASES")
    flags.DEFINE_string("implementation", "triton", "a name in mamba3_jax.ops.ssm.IMPLEMENTATIONS")
    flags.DEFINE_list("models", [], f"training steps: {', '.join(PRESETS)}")
    flags.DEFINE_list("batch", ["32"], "rows of a training step, one or more numbers")
    common.define_result(name="profile_gpu", commit=True)
    app.run(main, flags_parser=common.parse)
