"""A whole layer and a whole training step on a GPU: the kernels, as training takes them by default, and plain XLA.

    python -m experiments.benchmarks.train
    python -m experiments.benchmarks.train --models=siso-180m --implementations=default --length=8192 --batch=2
    python -m experiments.benchmarks.train --models=transformer-180m --implementations=default --batch=16 \\
        --variants=model.attn_implementation=plain --variants=
    python -m experiments.benchmarks.train --models=siso-180m --implementations=default --batch=16,32 \\
        --variants= --variants=model.unroll=1 --variants=model.unroll=1,model.remat=block

The step is the trainer's own: loss, gradients and AdamW of one of `mamba3_jax.presets` at its real vocabulary, on rows
of random tokens in documents of random length. The layer is one mixer, bfloat16, forward and with the gradient of its
parameters and its input. Every result is first compared with that of the first implementation: the step's loss and
gradient norm, the layer's output and gradients. MFU: model FLOPs (`mamba3_jax.train.flops`) over the device's peak.
"""

import ast
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from experiments.benchmarks import common
from launch.provenance import provenance
from mamba3_jax import memory
from mamba3_jax.config import Config, DataConfig, ModelConfig, check
from mamba3_jax.data.batch import Batch
from mamba3_jax.mixers.mamba3 import Mamba3
from mamba3_jax.presets import PRESETS
from mamba3_jax.sharding import make_mesh, using
from mamba3_jax.train.flops import flops_per_token, peak_flops
from mamba3_jax.train.step import batch_shapes, init_state, put, state_shapes, train_step

LAYERS = {
    "layer siso": ModelConfig(vocab_size=8, d_model=1024, pattern="M", compute_dtype="bfloat16"),
    "layer mimo4": ModelConfig(vocab_size=8, d_model=1024, pattern="M", compute_dtype="bfloat16", mimo_rank=4),
}
LAYER_BATCH, LAYER_LENGTH = 4, 2048
MODELS = ("siso-180m", "mimo-180m", *LAYERS)
# Two bfloat16 paths. What adds up over the row, of random sign, is far from float32 on either after 2,048 tokens: the
# angle's columns of in_kq_angle 0.1 on both, dt_bias 0.01 in plain XLA and 0.05 to 0.1 by the Triton kernels.
TOLERANCE = {"loss": 1e-3, "grad_norm": 2e-2, "y": 1e-2, "gradients": 2e-2, "sums": 2e-1}
ADDS_UP = ("dt_bias", "in_kq_angle")

FLAGS = flags.FLAGS


@dataclasses.dataclass
class Program:
    """One function to time."""

    model: str
    what: str
    implementation: str
    config: ModelConfig
    function: Callable
    shapes: Callable[[], tuple]  # of the arguments
    arguments: Callable[[], tuple]
    values: Callable  # of a result: what must agree between implementations, by name
    batch: int
    length: int
    variant: str = ""  # what is set otherwise in the config
    donated: bool = False  # the first argument, which the first result takes the place of
    scope: Callable = contextlib.nullcontext

    def compile(self):
        donated = {"donate_argnums": 0} if self.donated else {}
        with common.tracing():
            shapes = self.shapes()
            with self.scope():
                lowered = jax.jit(self.function, **donated).lower(*shapes)
        text = lowered.as_text()
        self.kernels = "mamba3_" in text or "__cudnn$fmha" in text  # how theirs and cuDNN's are called
        return lowered.compile()

    def calls(self, compiled) -> Callable:
        """Return a function that runs it once more; a donated argument is fed back."""
        arguments = self.arguments()
        if not self.donated:
            return partial(compiled, *arguments)
        state, *rest = arguments

        def step():
            nonlocal state
            state, result = compiled(state, *rest)
            return result

        return step


def documents(config: DataConfig, vocab_size: int) -> Batch:
    """Random tokens in documents of geometric length, 512 on average; every row begins one."""
    random = np.random.default_rng(0)
    shape = (config.batch, config.length)
    tokens_BL = random.integers(0, vocab_size, shape, np.int32)
    start_BL = random.random(shape) < 1 / 512
    start_BL[:, 0] = True
    return Batch(tokens_BL, np.roll(tokens_BL, -1, axis=1), np.ones(shape, np.float32), start_BL)


def step_program(
    model: str, implementation: str, batch: int, length: int, variant: str = "", mesh: Mesh | None = None
) -> Program:
    """Return the step of one of the presets, with what `variant` sets, on a mesh; None: of one device."""
    config = Config(model=dataclasses.replace(PRESETS[model], implementation=implementation))
    config.data = DataConfig(batch=batch, length=length)
    set_fields(config, variant)
    return dataclasses.replace(trainer_program(model, config, mesh), variant=variant)


def set_fields(config: Config, variant: str) -> None:
    """Set "model.unroll=1,optimizer.clip=0.5" in a config; ValueError for what is no field or no value of one."""
    for setting in filter(None, variant.split(",")):
        path, _, text = setting.partition("=")
        *sections, name = path.split(".")
        section = functools.reduce(getattr, sections, config)
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        try:
            setattr(section, name, value)
        except AttributeError as error:
            raise ValueError(f"{setting!r}: {error}") from error
    check(config)


def trainer_program(model: str, config: Config, mesh: Mesh | None = None) -> Program:
    """Make the step of a config as `mamba3_jax.train.loop` compiles it, on a mesh; None: of one device."""
    mesh = make_mesh("data:1", jax.devices()[:1]) if mesh is None else mesh

    def shapes():
        return state_shapes(config, mesh), batch_shapes(config.data, mesh)

    def arguments():
        shardings = jax.tree.map(lambda shape: shape.sharding, shapes()[0])
        with using(mesh):
            state = jax.jit(partial(init_state, config), out_shardings=shardings)()
            return state, put(documents(config.data, config.model.vocab_size), mesh)

    return Program(
        model=model,
        what="training step",
        implementation=config.model.implementation,
        config=config.model,
        function=partial(train_step, config),
        shapes=shapes,
        arguments=arguments,
        values=lambda metrics: {name: metrics[name] for name in ("loss", "grad_norm")},
        batch=config.data.batch,
        length=config.data.length,
        donated=True,
        scope=partial(using, mesh),
    )


def layer_programs(model: str, implementation: str, batch: int, length: int) -> list[Program]:
    """One mixer: forward, and forward with every gradient."""
    config = dataclasses.replace(LAYERS[model], implementation=implementation)
    mixer = Mamba3(config)

    def forward(params, x_BLD):
        return mixer.apply({"params": params}, x_BLD)[0]

    def backward(params, x_BLD, dy_BLD):
        y_BLD, pull = jax.vjp(forward, params, x_BLD)
        return y_BLD, pull(dy_BLD)

    def values(result):
        y_BLD, (of_params, of_x_BLD) = result
        of_sums = {name: of_params.pop(name) for name in ADDS_UP}
        return {"y": y_BLD, "gradients": (of_params, of_x_BLD), "sums": of_sums}

    def arguments(count: int):
        keys = jax.random.split(jax.random.key(0), count)
        shape = (batch, length, config.d_model)
        params = nn.meta.unbox(mixer.init(keys[0], jnp.zeros((1, 1, config.d_model)))["params"])
        return params, *(jax.random.normal(key, shape).astype(config.compute_dtype) for key in keys[1:])

    def program(what, function, count, values):
        given = jax.jit(partial(arguments, count))
        shapes = partial(jax.eval_shape, given)
        return Program(
            model=model,
            what=what,
            implementation=implementation,
            config=config,
            function=function,
            shapes=shapes,
            arguments=given,
            values=values,
            batch=batch,
            length=length,
        )

    return [
        program("forward", forward, 2, lambda y_BLD: {"y": y_BLD}),
        program("forward+backward", backward, 3, values),
    ]


def programs_of(
    model: str, implementations: list[str], batches: list[int], length: int, variants: Sequence[str] = ("",)
) -> list[Program]:
    """Beside each other what is compared; "default" is what a config without an implementation gets."""
    found = []
    for implementation in implementations:
        name = "" if implementation == "default" else implementation
        if model in LAYERS:
            found += layer_programs(model, name, LAYER_BATCH, LAYER_LENGTH)
        else:
            found += [step_program(model, name, batch, length, variant) for variant in variants for batch in batches]
    return sorted(found, key=lambda program: (program.what, program.batch))


def errors(got: dict, want: dict) -> dict[str, float]:
    """Return the largest relative error under each name, after raising for one over its tolerance."""
    found = {}
    for name, wanted in want.items():
        pairs = zip(jax.tree.leaves(got[name]), jax.tree.leaves(wanted), strict=True)
        found[name] = max(common.rel_rms(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
    return found


def row_of(program: Program, compiled, want: dict | None) -> tuple[dict, dict]:
    """Check, then time; returns the row, and the values that were checked."""
    call = program.calls(compiled)
    got = jax.device_get(program.values(call()))
    row = {"model": program.model, "what": program.what, "batch": program.batch, "length": program.length}
    row["variant"] = program.variant
    row["implementation"] = program.implementation or f"default: {'kernels' if program.kernels else 'plain XLA'}"
    row |= {f"{name} error": error for name, error in errors(got, want or got).items()}
    for name, tolerance in TOLERANCE.items():
        if name in got:
            common.require({name: row[f"{name} error"]}, tolerance, f"{program.model}, {program.what}")
    timing = common.measure(call, batch_seconds=0.5)
    row |= {"ms": timing.median * 1e3, "best_ms": timing.best * 1e3}
    row |= {"temp_mib": common.temp_mib(compiled), "peak_mib": memory.of_program(compiled) / 2**20}
    row["tokens_per_second"] = program.batch * program.length / timing.median
    if program.what == "training step":
        row["loss"] = float(got["loss"])
        if peak := peak_flops(0.0):
            flops = row["tokens_per_second"] * flops_per_token(program.config, program.length)
            row["mfu"] = flops * jax.device_count() / peak  # of the one device it runs on
    return row, got


COLUMNS = {
    "model": "model",
    "batch": "batch",
    "length": "length",
    "": "what",
    "implementation": "implementation",
    "variant": "variant",
    "ms": "ms",
    "best": "best_ms",
    "tokens/s": "tokens_per_second",
    "MFU": "mfu",
    "memory, MiB": "peak_mib",
    "loss": "loss",
    "of loss": "loss error",
    "of gradient norm": "grad_norm error",
    "of output": "y error",
    "of gradients": "gradients error",
    "of sums over the row": "sums error",
}


def main(argv):
    del argv
    if jax.default_backend() != "gpu":
        raise app.UsageError(f"needs a GPU: the backend is {jax.default_backend()!r}")
    origin = provenance(FLAGS.commit)
    batches = common.numbers("batch")
    programs = [
        program
        for model in FLAGS.models
        for program in programs_of(model, FLAGS.implementations, batches, FLAGS.length, FLAGS.variants)
    ]
    rows, want, before = [], None, None
    compiled = common.compiled_all(Program.compile, programs)
    for program, binary in zip(programs, compiled, strict=True):
        if (program.model, program.what, program.batch) != before:
            want, before = None, (program.model, program.what, program.batch)
        row, got = row_of(program, binary, want)
        want = want or got
        rows.append(row)
        common.show(row, COLUMNS)
        # After every row: a program that is stopped leaves what it has.
        path = common.write(FLAGS.name, origin, rows, FLAGS.out)
    print(common.table(rows, COLUMNS))
    print(path)


if __name__ == "__main__":
    flags.DEFINE_multi_enum("models", list(MODELS), [*PRESETS, *LAYERS], "which models and layers")
    flags.DEFINE_list("implementations", ["chunked", "default"], "names in ops.ssm.IMPLEMENTATIONS, or default")
    flags.DEFINE_list("batch", ["8"], "rows of a training step, one or more numbers")
    flags.DEFINE_multi_string("variants", [""], "a row each: a step's fields, as model.unroll=1,model.remat=block")
    flags.DEFINE_integer("length", 2048, "tokens of a row of a training step", lower_bound=1)
    common.define_result(name="train_gpu", commit=True)
    app.run(main, flags_parser=common.parse)
