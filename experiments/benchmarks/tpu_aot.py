"""The op compiled for TPUs that need not be there: what each program moves and how long its compiler thinks it takes.

    python -m experiments.benchmarks.tpu_aot                  every chip, SISO and MIMO R=4, bf16
    python -m experiments.benchmarks.tpu_aot --full           the paper's heads and lengths, bf16 and f32: hours
    python -m experiments.benchmarks.tpu_aot --implementations=mosaic_tpu --chips=v5e --cases=siso

`launch/tpu.py` says how to get the compiler. Nothing runs. What has one entry a token goes in and comes out as a
model's projections leave it, (B, L, everything else): `v`, `gate` and `y` are (B, L, H P), and the op sees them
reshaped inside the program, which moves nothing. As (B, L, H, P) arguments of their own, P = 64 would fill half of a
tile's 128 lanes, and XLA would copy them around any program; a result file without `arguments` is of those.

From the compiler: bytes moved to and from HBM and cycles (`launch.hlo` says how they are added up; a kernel's cycles
from the compiler's simulation of a smaller call, see `kernel_cycles`), temporary memory, seconds to compile. By
arithmetic: matrix operations (of `chunked`, counted from its jaxpr, whatever the implementation), the least bytes
(inputs and outputs once; `passes`: once in each of two passes, forward and backward, which read the inputs both), and
the roofline, the larger of operations and least bytes over the chip's peaks. `estimate` is the largest of cycles over
the clock (where that is known), bytes over the bandwidth and operations over the peak: good for ranking programs, never
compared with a TPU. All per device: half a chip on v4 and Ironwood (tpu7x), a whole one on the others.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl import app, flags
from jax.sharding import Mesh, SingleDeviceSharding

from experiments.benchmarks import common, flops, ssm
from launch import hlo, tpu
from launch.provenance import REPOSITORY, provenance
from launch.tpu import CHIPS, Chip
from mamba3_jax.ops.kernels import kernels as run_kernels
from mamba3_jax.ops.ssm import IMPLEMENTATIONS, Heads, State
from pallas_kernels.ssm.cases import Case, of_layer, varied

FLAGS = flags.FLAGS
# A float32 product at Precision.HIGHEST is six of bfloat16.
PASSES = {"bfloat16": 1, "float32": 6}

LARGE = of_layer(batch=16, length=2048, heads=32, width=64, d_state=128, dtype="bfloat16")
LONG = varied(LARGE, batch=1, length=32768)
STEP = varied(LARGE, batch=128, length=1)
CASES = ssm.with_mamba2(ssm.with_mimo({"siso": LARGE, "siso_decode": STEP}), ["siso", "siso_decode"])
FULL = {
    f"{name}_h{heads}_{dtype}": varied(case, heads=heads, dtype=dtype)
    for dtype in PASSES
    for heads in (24, 32, 64)
    for name, case in ssm.with_mimo({"siso": LARGE, "siso_long": LONG, "siso_decode": STEP}).items()
}


class Target:
    """One device of a chip, to compile for."""

    def __init__(self, name: str):
        self.name, self.chip = name, CHIPS[name]
        bounds = [1] * 3  # one chip: a kernel under plain jit needs no shard_map
        self.device = tpu.devices_of(self.chip.topology, chips_per_host_bounds=bounds)[0]

    def compile(self, task: ssm.Task):
        place = SingleDeviceSharding(self.device)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(lambda: joined(task.arguments())),
        )
        donated = {"donate_argnums": 0} if task.what == "decode" else {}
        mesh = Mesh(np.array([self.device]), ("one",))
        its_own = mock.patch.dict(IMPLEMENTATIONS, mosaic_tpu=kernels_for(self.name))
        with its_own, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the mesh tells Pallas which chip it is
            return jax.jit(in_a_model(task), **donated).lower(*arguments).compile()


def joined(tree):
    """Reshapes what has one entry a token to (B, L, X); weights and states stay as they are."""
    whole = lambda x: isinstance(x, (Heads, State))  # noqa: E731
    return jax.tree.map(lambda x: x if whole(x) else x.reshape(*x.shape[:2], -1), tree, is_leaf=whole)


def in_a_model(task: ssm.Task):
    """Return the task's function between `joined` arguments and results."""
    shapes = jax.eval_shape(task.arguments)

    def function(*arguments):
        return joined(task.function()(*jax.tree.map(lambda x, like: x.reshape(like.shape), arguments, shapes)))

    return function


def tasks_of(name: str, case: Case, implementations: list[str]) -> list[ssm.Task]:
    """Return the tasks of a case; `chunked` of one token is `recurrent`."""
    if case.length == 1:
        steps = dict.fromkeys("recurrent" if each == "chunked" else each for each in implementations)
        return [ssm.Task(name, case, each, "decode") for each in steps]
    whats = ("forward", "forward+backward")
    return [ssm.Task(name, case, each, what) for what in whats for each in implementations]


def row_of(task: ssm.Task, target: Target) -> dict:
    """Compiles one task for one chip and returns its row."""
    row = {"chip": target.name, "case": task.name, "implementation": task.implementation, "what": task.what}
    row |= floors(task, target.chip)
    begin = time.perf_counter()
    try:
        compiled = target.compile(task)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return row | {"failed": str(error).strip().splitlines()[0][:200]}
    row["compile_s"] = time.perf_counter() - begin
    memory, program = compiled.memory_analysis(), hlo.Program(compiled.as_text())
    cost, cycles = program.cost(), 0.0
    row |= {"temp_mib": memory.temp_size_in_bytes / 2**20, "hbm_mb": cost.hbm_bytes / 1e6}
    kernels = {re.sub(r"\.\d+$", "", name) for name in program.kernels()}
    if kernels:
        try:
            cycles = kernel_cycles(task, target.name, kernels)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return row | {"no_cycles": str(error)[:200]}
    return row | {"mega_cycles": (cost.cycles + cycles) / 1e6}


def floors(task: ssm.Task, chip: Chip) -> dict:
    """Return operations, bytes and the time that they need at least."""
    operations, moved, again = counted(task.case, task.what)
    matmul_ms = operations * PASSES[task.case.dtype] / chip.tera_flops / 1e9
    bytes_ms = moved / chip.gb_s / 1e6
    return {
        "matmul_gflop": operations / 1e9,
        "least_mb": moved / 1e6,
        "passes_mb": (moved + again) / 1e6,
        "matmul_ms": matmul_ms,
        "roofline_ms": max(matmul_ms, bytes_ms),
    }


@functools.cache
def counted(case: Case, what: str) -> tuple[float, int, int]:
    """Return operations, bytes of what goes in and out, and those that the second of two passes reads again."""
    task = ssm.Task("counted", case, "recurrent" if what == "decode" else "chunked", what)
    abstract = jax.eval_shape(task.arguments)
    operations = flops.count(task.function(), *abstract).matmul
    moved = ssm.nbytes(abstract) + ssm.nbytes(jax.eval_shape(task.function("chunked"), *abstract))
    # In training the loss lies between the passes, so what went in is read again; dy, the last, is the second's alone.
    again = ssm.nbytes(abstract[:-1]) if what == "forward+backward" else 0
    return operations, moved, again


def estimates(row: dict) -> dict:
    """Return what follows from a program's bytes and cycles."""
    if "failed" in row:
        return {}
    chip, cycles = CHIPS[row["chip"]], row.get("mega_cycles")
    found = {"bytes_over_least": row["hbm_mb"] / row["least_mb"], "bytes_over_passes": row["hbm_mb"] / row["passes_mb"]}
    if cycles is None:
        return found
    times = [row["matmul_ms"], row["hbm_mb"] / chip.gb_s, cycles / chip.ghz if chip.ghz else 0.0]
    return found | {"estimate_ms": max(times), "estimate_over_roofline": max(times) / row["roofline_ms"]}


def derived(rows: list[dict]) -> list[dict]:
    """Add to rows what follows from them, and to those of the kernels their share of plain XLA's figures."""
    key = lambda row: (row["chip"], row["case"], row["what"])  # noqa: E731
    rows = [row | estimates(row) for row in rows]
    plain = {key(row): row for row in rows if row["implementation"] in ("chunked", "recurrent")}
    for i, row in enumerate(rows):
        base = plain.get(key(row), row)
        for field in ("hbm_mb", "mega_cycles", "estimate_ms"):
            if base is not row and row.get(field) is not None and base.get(field) is not None:
                rows[i] = rows[i] | {f"{field}_over_plain": row[field] / base[field]}
    return rows


def kernel_cycles(task: ssm.Task, chip: str, kernels: set[str]) -> float:
    """Draws out two small calls to all of the task's kernels: the compiler simulates every step of a grid.

    Raises:
        RuntimeError: the compiler simulates nothing (for v4) or fails to.
    """
    if chip == "v4":
        raise RuntimeError("the compiler simulates no kernel for v4")
    if task.case.length == 1:
        return drawn_out(task, chip, kernels, [{"batch": 4}, {"batch": 8}])
    row = dataclasses.replace(task, case=varied(task.case, batch=1, length=min(task.case.length, 2048)))
    rows = task.case.batch * task.case.length / row.case.length
    # More heads: what is done once a chunk is not drawn out. Where operands lie in VMEM it may fail at several blocks
    # of heads ("No DMA issue node found"); with a single one it counts what is done once a chunk for every block.
    by_heads = [[{"heads": x} for x in pair] for pair in ((4, 8), (8, 16), (2, 4))]
    for smaller in (*by_heads, [{"heads": 2, "length": x} for x in (512, 1024)]):
        try:
            return rows * drawn_out(row, chip, kernels, smaller)
        except RuntimeError as error:
            failed = error
    raise failed


def drawn_out(task: ssm.Task, chip: str, kernels: set[str], smaller: list[dict]) -> float:
    """Add to the cycles of two smaller calls as many for all further work as the second takes for its own."""
    cases = [varied(task.case, **fields) for fields in smaller]
    one, two = (simulated(dataclasses.replace(task, case=case), chip, kernels) for case in cases)
    first, second, all_ = (case.batch * case.length * case.heads for case in (*cases, task.case))
    return one + (two - one) * (all_ - first) / (second - first)


def simulated(task: ssm.Task, chip: str, kernels: set[str]) -> int:
    """Simulate the task's kernels in a process of its own, since libtpu reads the wish once: returns cycles.

    It may stop when it takes a simulated program apart ("type check", in a destructor): what it has written by then is
    whole, and enough where every kernel is in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"{name}={value}" for name, value in task.case.sizes().items()]
        command = [
            sys.executable,
            "-m",
            "experiments.benchmarks.tpu_aot",
            f"--chips={chip}",
            f"--only={','.join(sizes)}",
        ]
        command += [f"--implementations={task.implementation}", f"--what={task.what}"]
        env = os.environ | {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}"}
        run = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
        found = [profiled(path.read_text()) for path in Path(folder).glob("*_static_llo_profile.textproto")]
    found = [(name, cycles) for name, cycles in found if name in kernels]  # the others are XLA's own
    if {name for name, _ in found} != kernels:
        stopped = [line for line in run.stderr.splitlines() if line.startswith(("F", "Traceback"))]
        print(*stopped[:3], file=sys.stderr)
        raise RuntimeError("the compiler stops where it simulates it")
    return sum(cycles for _, cycles in found)


def profiled(text: str) -> tuple[str, int]:
    """Return the name of an operation, a kernel's or XLA's own, without its number, and its cycles."""
    name = re.search(r'hlo_op_name:\s*"([^"]*?)(?:\.\d+)?"', text).group(1)
    times = re.search(r"num_equivalent_hlos:\s*(\d+)", text)
    return name, int(re.search(r"estimated_cycles:\s*(\d+)", text).group(1)) * int(times.group(1) if times else 1)


def only(sizes: str, implementation: str, what: str, chip: str) -> None:
    """Compiles one call, for what the compiler leaves in the folder that its flags name."""
    given = dict(part.split("=") for part in sizes.split(","))
    case = of_layer(**{name: int(value) if value.isdecimal() else value for name, value in given.items()})
    Target(chip).compile(ssm.Task("only", case, implementation, what))


def kernels_for(chip: str):
    """Return `mosaic_tpu` as it runs on that chip, whatever this process has: of up to STEPS tokens, as steps."""

    def implementation(tokens, heads, state, *, rotation: str, chunk: int | None):
        from pallas_kernels.ssm.mosaic_tpu import config

        how = {"rotation": rotation, "chunk": chunk}
        if tokens.log_a_BLH.shape[1] > config.STEPS:
            how["tiles"] = config.default(chip, tokens.q_BLRGN.shape[2], dtype=tokens.q_BLRGN.dtype)
        return run_kernels(tokens, heads, state, backend="mosaic_tpu", anywhere=True, **how)

    return implementation


COLUMNS = {
    "chip": "chip",
    "case": "case",
    "implementation": "implementation",
    "": "what",
    "least MB": "least_mb",
    "HBM MB": "hbm_mb",
    "over least": "bytes_over_least",
    "over passes": "bytes_over_passes",
    "temp MiB": "temp_mib",
    "Mcycles": "mega_cycles",
    "roofline, ms": "roofline_ms",
    "estimate, ms": "estimate_ms",
    "over roofline": "estimate_over_roofline",
    "bytes / plain": "hbm_mb_over_plain",
    "cycles / plain": "mega_cycles_over_plain",
    "estimate / plain": "estimate_ms_over_plain",
    "failed": "failed",
    "without cycles": "no_cycles",
}


def kept(before: dict | None, tasks: list[tuple[str, ssm.Task]], origin: dict) -> list[dict]:
    """Return rows of an earlier run by the same compiler, of the same arguments, that this one does not take again.

    What follows by arithmetic, and may have got more since, is worked out anew.
    """
    if before is None or any(before.get(key) != origin[key] for key in ("jax", "libtpu", "arguments")):
        return []
    again = {(chip, task.name, task.implementation, task.what) for chip, task in tasks}
    rows = [r for r in before["rows"] if (r["chip"], r["case"], r["implementation"], r["what"]) not in again]
    taken, cases = {"commit": before["commit"], "date": before["date"]}, CASES | FULL
    task = lambda row: ssm.Task(row["case"], cases[row["case"]], "chunked", row["what"])  # noqa: E731
    return [taken | row | floors(task(row), CHIPS[row["chip"]]) for row in rows]


def main(argv):
    del argv
    compiler = common.prepare_tpu()
    implementations = ssm.chosen("implementations", FLAGS.implementations, IMPLEMENTATIONS)
    chips = ssm.chosen("chips", FLAGS.chips, CHIPS)
    if FLAGS.only:
        return only(FLAGS.only, implementations[0], FLAGS.what, chips[0])
    cases = FULL if FLAGS.full else CASES
    names = ssm.chosen("cases", FLAGS.cases or list(cases), cases)
    tasks = [(chip, t) for chip in chips for name in names for t in tasks_of(name, cases[name], implementations)]
    tasks = [(chip, task) for chip, task in tasks if FLAGS.what in ("", task.what)]
    origin = provenance() | compiler
    origin |= {"arguments": "joined: (B, L, H P), as a model has them"}
    rows = kept(common.read(FLAGS.name, FLAGS.out) if FLAGS.keep else None, tasks, origin)
    sizes = {name: case.sizes() for name, case in (CASES | FULL).items()}
    peaks = {name: dataclasses.asdict(chip) for name, chip in CHIPS.items()}
    for chip, task in tasks:
        rows.append(row_of(task, Target(chip)) | {"commit": origin["commit"], "date": origin["date"]})
        common.show(derived(rows)[-1], COLUMNS)
        # After every row: a program that is stopped leaves what it has.
        used = {row["case"]: sizes[row["case"]] for row in rows}
        path = common.write(FLAGS.name, origin, derived(rows), FLAGS.out, cases=used, chips=peaks)
    print(common.table(derived(rows), COLUMNS))
    print(path)


if __name__ == "__main__":
    flags.DEFINE_list("implementations", ["chunked", "mosaic_tpu"], "names in mamba3_jax.ops.ssm.IMPLEMENTATIONS")
    flags.DEFINE_list("chips", list(CHIPS), "names in CHIPS")
    flags.DEFINE_list("cases", [], "names in CASES, or in FULL with --full; empty: all")
    flags.DEFINE_enum("what", "", ["", "forward", "forward+backward", "decode"], "empty: all")
    flags.DEFINE_bool("full", False, "the paper's heads and lengths, bf16 and f32")
    flags.DEFINE_bool("keep", True, "rows of the result file that this run does not take again, where versions agree")
    common.define_result(name="tpu_aot")
    flags.DEFINE_string("only", "", "internal: compile one case of these sizes and leave")
    app.run(main, flags_parser=common.parse)
