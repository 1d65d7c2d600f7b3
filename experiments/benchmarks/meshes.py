"""The training step on two GPUs of one host beside one of them: equal results, speed, memory, and what is exchanged.

    python -m experiments.benchmarks.meshes [--groups=equal-siso-180m,context-131072]

First the losses and gradient norms of programs that train on the same rows are compared, after three updates. In
float32 they must be equal but for the order of sums. Speed is compared at equal tokens a device, so that two devices
have twice as many tokens as one:

    efficiency   the step's time on one device over that on two
    data         has twice the rows; what it loses is the exchange of gradients
    sequence     has rows of twice the length; what it loses beyond data is the price of context parallelism

What is sent is counted in the compiled program (`launch/hlo.py`). A program that does not fit has a row that says so.
"""

import dataclasses
import functools
import math
from functools import partial

import jax
from absl import app, flags

from experiments.benchmarks import common, ssm, train
from launch import hlo
from launch.provenance import provenance
from mamba3_jax import memory
from mamba3_jax.config import Config, DataConfig
from mamba3_jax.presets import PRESETS
from mamba3_jax.sharding import make_mesh
from mamba3_jax.train.flops import flops_per_token, peak_flops
from mamba3_jax.train.step import TrainState, init_state, put

ONE = "data:1"
UPDATES = 3  # before losses are compared, which then depend on gradients and optimizer too
FLOAT32 = "model.compute_dtype=float32"
BLOCK = "model.remat=block"
EQUAL = {"loss": 1e-5, "grad_norm": 1e-4}  # relative errors of float32
NEAR = {name: train.TOLERANCE[name] for name in EQUAL}  # and of bfloat16

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Step:
    """One program: the training step of a model on a mesh."""

    model: str
    mesh: str
    batch: int
    length: int
    variant: str = ""

    @property
    def devices(self) -> int:
        return math.prod(int(axis.partition(":")[2]) for axis in self.mesh.split(","))

    @property
    def rows(self) -> tuple:
        """Return what the step trains on: steps with equal rows must compute equal results."""
        return self.model, self.batch, self.length, self.variant

    @property
    def share(self) -> tuple:
        """Return the work of one device: the time of a step is compared with that of one device with an equal share."""
        return self.model, self.batch * self.length // self.devices, self.variant

    def program(self) -> train.Program:
        """Return the program of the step, whose arguments lie on its mesh."""
        mesh = make_mesh(self.mesh, jax.devices()[: self.devices])
        program = train.step_program(self.model, "", self.batch, self.length, self.variant, mesh)

        def arguments():
            shardings = jax.tree.map(lambda shape: shape.sharding, program.shapes()[0])
            rows = train.documents(DataConfig(batch=self.batch, length=self.length), program.config.vocab_size)
            return jax.device_put(initial(self.model), shardings), put(rows, mesh)

        return dataclasses.replace(program, arguments=arguments)


@functools.cache
def initial(model: str) -> TrainState:
    """Return the state before the first step, on the host: computed once, where every mesh would compile its own."""
    return jax.device_get(jax.jit(partial(init_state, Config(model=PRESETS[model])))())


def groups() -> dict[str, list[Step]]:
    """Return all steps by group. A group is compiled and compared together; its step on one device comes first."""
    equal = {
        "siso-180m": (ONE, "data:2", "fsdp:2", "tensor:2", "sequence:2"),
        "mimo-180m": (ONE, "tensor:2", "sequence:2"),
        "hybrid-180m": (ONE, "tensor:2", "sequence:2"),
    }
    float32 = partial(Step, batch=2, length=1024, variant=FLOAT32)
    of_equal = {f"equal-{model}": [float32(model, mesh) for mesh in meshes] for model, meshes in equal.items()}
    siso = partial(Step, "siso-180m")
    of_context = {
        f"context-{length}": [
            siso(ONE, 1, length),
            siso("sequence:2", 1, 2 * length),
            siso("data:2", 2, length),
            siso(ONE, 1, 2 * length),
        ]
        for length in (131072, 16384)
    }
    of_step = [siso(ONE, 16, 2048), *(siso(mesh, 32, 2048) for mesh in ("data:2", "fsdp:2", "tensor:2"))]
    # Two rows of a million tokens do not fit on a device.
    block = partial(Step, batch=1, variant=BLOCK)
    long = [block("siso-180m", ONE, length=2**20), block("siso-180m", "sequence:2", length=2**21)]
    long.append(block("hybrid-180m", ONE, length=2**18))
    return of_equal | of_context | {"step": [*of_step, siso("sequence:2", 16, 4096)], "long": long}


def compiled(step: Step):
    """Return the program of a step and its executable, or in place of that the compiler's error."""
    program = step.program()
    try:
        return program, program.compile()
    except jax.errors.JaxRuntimeError as error:
        return program, error


def row_of(step: Step, program: train.Program, binary, want: dict | None) -> tuple[dict, dict]:
    """Check a step, then time it; return its row, and its loss and gradient norm.

    Args:
        step: what is run.
        program: of the step.
        binary: the compiled program.
        want: loss and gradient norm of another step on the same rows; None: this one is the first.

    Raises:
        ValueError: the step's own differ from these, or are not finite.
    """
    call = program.calls(binary)
    for _ in range(UPDATES):
        metrics = jax.device_get(call())
    got = {name: float(metrics[name]) for name in EQUAL}
    row = {"loss": got["loss"]}
    exact = FLOAT32 in step.variant
    for name, tolerance in (EQUAL if exact else NEAR).items():
        # The first is compared with itself: only a number that is not finite differs.
        error = common.rel_rms(got[name], (want or got)[name])
        common.require({name: error}, tolerance, str(step))
        row[f"{name} error"] = None if want is None else error
    exchanged = hlo.Program(binary.as_text()).collectives()
    row |= {
        "kernels": program.kernels,
        "peak_mib": memory.of_program(binary) / 2**20,
        "sent_mib": sum(each.sent for each in exchanged) / 2**20,
        "collectives": sorted({each.kind for each in exchanged}),
    }
    if not exact:
        timing = common.measure(call, batch_seconds=0.5, batches=3, warm_up=1)
        tokens = step.batch * step.length / timing.median
        row |= {"ms": timing.median * 1e3, "best_ms": timing.best * 1e3, "tokens_per_second": tokens}
        if peak := peak_flops(0.0):
            flops = tokens * flops_per_token(program.config, step.length)
            row["mfu"] = flops / (peak / jax.device_count() * step.devices)
    return row, got


def measured(wanted: dict[str, list[Step]], written) -> None:
    """Measure the steps of every group in order, and call `written` with all rows so far after each step."""
    rows = []
    for name, steps in wanted.items():
        values, alone, programs = {}, {}, common.compiled_all(compiled, steps, name)
        for step, (program, binary) in zip(steps, programs, strict=True):
            row = {"group": name, **dataclasses.asdict(step), "devices": step.devices}
            try:
                if isinstance(binary, jax.errors.JaxRuntimeError):
                    raise binary
                found, got = row_of(step, program, binary, values.get(step.rows))
                values.setdefault(step.rows, got)
                row |= found
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                row["failed"] = common.one_line(error)
            if step.devices == 1:
                alone.setdefault(step.share, row.get("ms"))
            elif alone.get(step.share) and "ms" in row:
                row["efficiency"] = alone[step.share] / row["ms"]
            rows.append(row)
            common.show(row, COLUMNS)
            written(rows)


COLUMNS = {
    "": "group",
    "model": "model",
    "mesh": "mesh",
    "rows": "batch",
    "length": "length",
    "variant": "variant",
    "loss": "loss",
    "of loss": "loss error",
    "of gradient norm": "grad_norm error",
    "ms": "ms",
    "tokens/s": "tokens_per_second",
    "MFU": "mfu",
    "efficiency": "efficiency",
    "memory of a device, MiB": "peak_mib",
    "it sends, MiB": "sent_mib",
    "failed": "failed",
}


def main(argv):
    del argv
    if len(jax.devices()) < 2:
        raise app.UsageError(f"needs 2 devices: there is {len(jax.devices())}")
    known = groups()
    wanted = ssm.chosen("groups", FLAGS.groups or list(known), known)
    write = partial(common.write, FLAGS.name, provenance(FLAGS.commit), directory=FLAGS.out)
    measured({name: known[name] for name in wanted}, lambda rows: write(rows=rows))


if __name__ == "__main__":
    flags.DEFINE_list("groups", [], "of steps, in this order; empty: all")
    common.define_result(name="meshes_h200", commit=True)
    app.run(main, flags_parser=common.parse)
