"""Times every way to run the op's cases on the GPU at hand, and writes the fastest into mamba3_jax/ops/tuned.json.

    python -m experiments.benchmarks.tune                          every case; the same command goes on after a stop
    python -m experiments.benchmarks.tune --cases=siso,mimo4 --out=DIR
    python -m experiments.benchmarks.tune --recorded=experiments/benchmarks/results/ssm_hopper.json

What is timed is forward+backward, of a case of one token the step. First every implementation as it comes; then, of
those NEAR the fastest, every cut of the sequence in STRUCTURE, and from the best of these every launch in LAUNCHES
alone: one kernel hardly changes another's time, so the best of each are then put together, and kept if they are faster
still. The untouched kernels are checked against `recurrent` in float64, and every other way against them, before it is
timed; what does not compile or is not right is not a choice. Every time is kept in --progress at once.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import common, ssm
from launch.provenance import provenance
from mamba3_jax.files import read_object, replace, write_json
from mamba3_jax.ops import kernels, tuned
from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from mamba3_jax.ops.tuned import Choice
from pallas_kernels.ssm.cases import Case, of_layer

# By implementation. Rows of a chunk are tokens times ranks; the names are those of its launch.
STRUCTURE = {
    "triton": {"rows": (16, 32, 64), "programs": (128, 256, 512)},
    "mosaic_gpu": {"programs": (132, 264, 528)},
}
STEP = {"triton": {"columns": (16, 32, 64, 128), "warps": (1, 2, 4, 8)}}  # of one token, as STRUCTURE
WARPS_AND_STAGES = ([4, 1], [4, 2], [4, 3], [8, 1], [8, 2])
LAUNCHES = {
    "triton": {
        "rotate_tokens": (16, 32),
        "rotate_heads": (4, 8, 16),
        "rotate": ([1, 1], [2, 1], [4, 1]),
        "rotate_bwd_heads": (8, 16, 32),
        "rotate_bwd": ([1, 1], [2, 1], [4, 1]),
        "checkpoint_interval": (128, 256, 512),
        "epilogue_bwd": ([2, 1], [4, 1], [8, 1]),
        **dict.fromkeys(("forward", "split_sums", "query", "key", "value"), WARPS_AND_STAGES),
    }
}
# Gradients that add up over a long row, of random sign, differ by this much between two right orders of bfloat16.
LONG_SUMS = 0.2
WORTH = 0.99  # of the time: two measurements of the same differ by less than the rest
NEAR = 1.25  # of the fastest as they come: launches gain less than the rest, so what is slower is not searched

FLAGS = flags.FLAGS


@dataclasses.dataclass
class Trial(ssm.Task):
    """One way to run a case."""

    launch: dict = dataclasses.field(default_factory=dict)

    def function(self, implementation: str | None = None):
        del implementation

        def op(tokens, heads, state=None):
            run = IMPLEMENTATIONS[self.implementation]
            return run(tokens, heads, state, rotation=self.case.rotation, **self.launch)

        @common.tracing()
        def backward(tokens, heads, dy_BLHP):
            y_BLHP, pull, state = jax.vjp(op, tokens, heads, has_aux=True)
            return (y_BLHP, state), pull(dy_BLHP)

        @common.tracing()
        def step(state, tokens, heads):
            return op(tokens, heads, state)[::-1]

        return step if self.what == "decode" else backward

    def compile(self):
        """Or the error that stopped it, of whatever kind: then this is no way to run it."""
        try:
            return super().compile()
        except Exception as error:
            return error


@jax.jit
def differences(got, want) -> list:
    """Relative RMS of every array, on the device; not a number where one has such."""

    def rms(x):
        return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return [rms(a.astype(jnp.float32) - b.astype(jnp.float32)) / jnp.maximum(rms(b), 1e-30) for a, b in pairs]


class Clock:
    """Milliseconds of one implementation of a case by launch; infinite for what cannot run or is not right."""

    def __init__(self, name: str, case: Case, implementation: str, progress: "Progress"):
        self.name, self.case, self.implementation, self.progress = name, case, implementation, progress
        self.what = "decode" if case.length == 1 else "forward+backward"
        self.want = None

    def times(self, launches: list[dict]) -> list[float]:
        """Of each; those that were taken before are not taken again."""
        todo = [launch for launch in launches if self._key(launch) not in self.progress.taken]
        at_once = os.cpu_count() or 1
        with ThreadPoolExecutor(at_once) as pool:
            for begin in range(0, len(todo), at_once):
                part = todo[begin : begin + at_once]
                trials = [Trial(self.name, self.case, self.implementation, self.what, launch=each) for each in part]
                for trial, compiled in zip(trials, list(pool.map(Trial.compile, trials)), strict=True):
                    self.progress.take(self._key(trial.launch), self._time(trial, compiled))
        return [self.progress.taken[self._key(launch)]["ms"] or math.inf for launch in launches]

    def _key(self, launch: dict) -> str:
        return json.dumps([self.name, self.implementation, launch], sort_keys=True, allow_nan=False)

    def _time(self, trial: Trial, compiled) -> dict:
        try:
            if isinstance(compiled, Exception):
                raise compiled
            self._check(trial, compiled)
            timing = ssm.measure_task(trial, compiled, ssm.nbytes(jax.eval_shape(trial.arguments)))
        except Exception as error:
            return {"ms": None, "error": str(error)[:200]}
        return {"ms": timing.median * 1e3}

    def _check(self, trial: Trial, compiled) -> None:
        """Right on a short row, and on the whole case what the implementation gives when it is told nothing."""
        if self.want is None:
            if self.what == "decode":
                ssm.check_decode(self.case, self.implementation)
            else:
                ssm.check(ssm.short(self.case), self.implementation, None)
            untold = dataclasses.replace(trial, launch={})
            self.want = jax.jit(untold.function())(*untold.arguments())
        found = differences(compiled(*trial.arguments()), self.want)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.want)]
        found = {path: float(error) for path, error in zip(paths, found, strict=True)}
        sums = {path: found.pop(path) for path in paths if path.endswith(ssm.ADDS_UP)}
        what = f"{self.implementation} {trial.launch}"
        common.require(found, ssm.TOLERANCE[self.case.dtype][2], what)
        common.require(sums, LONG_SUMS, what)


class Progress:
    """Every time taken, in a file that is written at once; one of another device, jax or commit is begun anew."""

    def __init__(self, path: Path, origin: dict):
        self.path, self.origin, self.taken = path, origin, {}
        if path.exists():
            there = read_object(path)
            if there.get("origin") == origin and isinstance(there.get("taken"), dict):
                self.taken = there["taken"]
                print(f"{path} has {len(self.taken)} times: going on")
            else:
                print(f"{path} is of {there.get('origin')}, this is {origin}: beginning anew")

    def take(self, key: str, result: dict) -> None:
        self.taken[key] = result
        print(key, result, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"origin": self.origin, "taken": self.taken})


def search(structure: dict, launches: dict, times: Callable[[list[dict]], list[float]]) -> tuple[dict, float]:
    """Return the fastest launch, and its time; see the module."""

    def better(best, ms, options):
        for option, taken in zip(options, times(options), strict=True):
            if taken < WORTH * ms:
                best, ms = option, taken
        return best, ms

    (untold,) = times([{}])
    best, ms = {}, untold
    if structure:
        cuts = [dict(zip(structure, values, strict=True)) for values in itertools.product(*structure.values())]
        best, ms = better(best, ms, cuts)
    together, alone = dict(best), (best, ms)
    singles = {name: [best | {name: value} for value in values] for name, values in launches.items()}
    times([option for options in singles.values() for option in options])  # all side by side; below they are known
    for name, options in singles.items():
        option, taken = better(best, ms, options)
        if option is not best:
            together[name] = option[name]
            alone = min(alone, (option, taken), key=lambda each: each[1])
    return better(*alone, [together]) if together != alone[0] else alone


def options(case: Case, implementation: str) -> tuple[dict, dict]:
    """Return the STRUCTURE and LAUNCHES there are for a case, in the implementation's own words."""
    if case.length == 1:
        return STEP.get(implementation, {}), {}
    structure = dict(STRUCTURE.get(implementation, {}))
    if "rows" in structure:
        structure["chunk"] = sorted({max(1, rows // case.rank) for rows in structure.pop("rows")})
    return structure, LAUNCHES.get(implementation, {})


def recorded_configs(result: dict) -> list[Choice]:
    """Return the fastest of every case of a run of `experiments.benchmarks.ssm`, each implementation as it comes."""
    entries = []
    for name, sizes in result["cases"].items():
        case = of_layer(**sizes)
        what = "decode" if case.length == 1 else "forward+backward"
        rows = [row for row in result["rows"] if (row["case"], row["what"]) == (name, what) and "ms" in row]
        entries.append(entry_of(case, {row["implementation"]: row["ms"] for row in rows}, {}, result))
    return entries


def entry_of(case: Case, ms: dict[str, float], launch: dict, origin: dict) -> Choice:
    """Return the table's entry for a case, of the times of its implementations."""
    return Choice(
        device=origin["device"],
        rank=case.rank,
        dtype=case.dtype,
        width=tuned.rounded(case.width),
        d_state=tuned.rounded(case.d_state),
        heads=case.batch * case.heads,
        length=case.length,
        implementation=min(ms, key=ms.get),
        launch=launch,
        measured={f"{each}, ms": round(taken, 4) for each, taken in ms.items() if taken < math.inf}
        | {name: origin[name] for name in ("commit", "jax", "date")},
    )


def choice_of(name: str, case: Case, progress: Progress, origin: dict) -> Choice:
    """Return the table's entry for a case: the fastest implementation, and how each is launched."""
    abstract = jax.eval_shape(lambda: ssm.inputs(case)[0])
    run_here = [name for name in kernels.BACKENDS if kernels.refused(name, abstract) is None]
    implementations = (*run_here, "recurrent" if case.length == 1 else "chunked")
    clocks = {implementation: Clock(name, case, implementation, progress) for implementation in implementations}
    fastest, launch = {each: clock.times([{}])[0] for each, clock in clocks.items()}, {}
    for implementation in implementations:
        if fastest[implementation] > NEAR * min(fastest.values()):
            continue
        told, fastest[implementation] = search(*options(case, implementation), clocks[implementation].times)
        if told:
            launch[implementation] = told
    best = min(fastest, key=fastest.get)
    if fastest[best] == math.inf:
        raise ValueError(f"{name}: no implementation of {list(fastest)} ran; {progress.path} says why")
    return entry_of(case, fastest, launch, origin)


def write(entry: Choice, path: Path) -> None:
    """Into the table, in the place of what it had for the same; one line an entry."""
    key = Choice.__match_args__[: Choice.__match_args__.index("implementation")]
    same = lambda other: all(getattr(other, name) == getattr(entry, name) for name in key)  # noqa: E731
    there = path if path.exists() else tuned.PATH
    entries = [*(other for other in tuned.read(there) if not same(other)), entry]
    tuned.read.cache_clear()
    entries.sort(key=lambda each: [getattr(each, name) for name in key])
    lines = ",\n".join(json.dumps(dataclasses.asdict(each), allow_nan=False) for each in entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, f"[\n{lines}\n]\n")


def main(argv):
    del argv
    path = Path(FLAGS.out) / tuned.PATH.name if FLAGS.out else tuned.PATH
    if FLAGS.recorded:
        for entry in recorded_configs(read_object(Path(FLAGS.recorded))):
            write(entry, path)
        print(path)
        return
    if jax.default_backend() != "gpu":
        raise app.UsageError(f"there is nothing to tune without a GPU: the backend is {jax.default_backend()!r}")
    names = ssm.chosen("cases", FLAGS.cases or list(ssm.CASES["gpu"]), ssm.CASES["gpu"])
    origin = provenance(FLAGS.commit)
    progress = Progress(Path(FLAGS.progress), {name: origin[name] for name in ("device", "jax", "commit")})
    tuned.table = tuple  # nothing: what is timed is what is asked for, not what was chosen before
    for name in names:
        entry = choice_of(name, ssm.CASES["gpu"][name], progress, origin)
        write(entry, path)
        print(f"{name}: {entry.implementation} {entry.launch} {entry.measured}", flush=True)
    print(path)


if __name__ == "__main__":
    flags.DEFINE_list("cases", [], "names in experiments.benchmarks.ssm.CASES for GPUs; empty: all")
    flags.DEFINE_string("recorded", "", "instead: a result file of experiments.benchmarks.ssm, whose fastest are taken")
    flags.DEFINE_string("progress", "runs/tune.json", "every time taken; the same command goes on from it")
    flags.DEFINE_string("out", "", "directory of tuned.json; empty: where the op reads it")
    flags.DEFINE_string("commit", "", "recorded where the code runs outside its git checkout")
    app.run(main, flags_parser=common.parse)
