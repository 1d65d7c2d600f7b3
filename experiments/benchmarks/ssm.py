"""The op alone: every implementation on the same inputs, its error, its time, its memory, and the floors under it.

    python -m experiments.benchmarks.ssm                                       the cases for this device
    python -m experiments.benchmarks.ssm --cases=mimo4 --chunk=16,32,64        a sweep of the chunk size
    python -m experiments.benchmarks.ssm --device=tpu                          on a TPU, which it has not run on yet
    python -m experiments.benchmarks.ssm --growth                              operations and memory against length

Times forward, and forward with the gradient of everything that goes in; for a case of one token, a decoding step whose
state is donated and fed back. First the same configuration is run on a short row and compared with `recurrent` in
float64: values, state and every gradient. Beside the times stand two floors measured in the same run: every input and
output moved once at the bandwidth of a copy, and the matrix products of plain XLA's algorithm at the rate of a large
one. Calls take turns on several copies of small inputs, so that a device's cache does not hold them.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import common, flops
from launch.provenance import provenance
from mamba3_jax.ops.ssm import IMPLEMENTATIONS, Heads, State, Tokens, empty_state, ssm
from pallas_kernels.ssm.cases import Case, of_layer, varied


def with_mimo(cases: dict[str, Case]) -> dict[str, Case]:
    """Add each of the cases with four ranks."""
    return cases | {f"mimo4{name.removeprefix('siso')}": varied(case, rank=4) for name, case in cases.items()}


def with_mamba2(cases: dict[str, Case], names: Sequence[str]) -> dict[str, Case]:
    """Add the cases of these names as Mamba-2 calls the op."""
    return cases | {f"mamba2{name.removeprefix('siso')}": varied(cases[name], mixer="mamba2") for name in names}


LARGE = of_layer(batch=16, length=2048, heads=32, width=64, d_state=128, dtype="bfloat16")
SMALL = of_layer(batch=2, length=2048, heads=8, width=64, d_state=64)
CASES = {
    "gpu": with_mamba2(
        with_mimo(
            {
                "siso": LARGE,
                "siso_b2_l16384": varied(LARGE, batch=2, length=16384),
                "siso_b1_l131072": varied(LARGE, batch=1, length=131072),
                "siso_b1_l2048": varied(LARGE, batch=1),
                "siso_decode": varied(LARGE, batch=128, length=1, heads=64),
            }
        ),
        ["siso", "siso_decode"],
    ),
    "tpu": with_mimo(
        {
            "siso": LARGE,
            "siso_b1_l32768": varied(LARGE, batch=1, length=32768),
            "siso_decode": varied(LARGE, batch=128, length=1),
        }
    ),
    "cpu": with_mamba2(with_mimo({"siso": SMALL}), ["siso"]),
}
# Those for this device where none are named.
IMPLEMENTATIONS_OF = {
    "gpu": ["triton", "chunked"],
    "tpu": ["mosaic_tpu", "chunked"],
    "cpu": ["chunked", "associative"],
}
CHECKED_LENGTH = 331  # prime: no chunk size divides it
GROWTH_LENGTHS = (2048, 8192, 32768, 131072)
CACHE_BYTES = 2**28  # more than any device's

# float32 sums over a few hundred tokens; bfloat16 keeps 8 bits of every operand. Values, gradients, and those of what
# adds up over the row.
TOLERANCE = {"float32": (1e-5, 2e-4, 2e-4), "bfloat16": (5e-3, 1e-2, 2e-2)}
ADDS_UP = ("dt_BLH", "log_a_BLH", "angle_BLHS")

FLAGS = flags.FLAGS


def inputs(case: Case, seed: int = 0) -> tuple[Tokens, Heads]:
    """Random tokens and heads with the statistics of a fresh layer: dt from 0.001 to 0.1, keys of unit RMS."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def normal(name, dtype=case.dtype):
        key, shape = next(keys), case.shape_of(name)
        return None if shape is None else jax.random.normal(key, shape, jnp.float32).astype(dtype)

    def uniform(low, high):
        return jax.random.uniform(next(keys), case.shape_of("log_a_BLH"), jnp.float32, low, high)

    dt_BLH = jnp.exp(uniform(np.log(1e-3), np.log(1e-1)))
    tokens = Tokens(
        q_BLRGN=normal("q_BLRGN"),
        k_BLRGN=normal("k_BLRGN"),
        v_BLHP=normal("v_BLHP"),
        dt_BLH=dt_BLH if case.turns else None,
        log_a_BLH=-dt_BLH * uniform(0.5, 2.0),
        gamma_BLH=(gamma_BLH := dt_BLH * uniform(0.0, 1.0)),
        beta_BLH=dt_BLH - gamma_BLH if case.looks_back else None,
        angle_BLHS=jnp.pi * jnp.tanh(normal("angle_BLHS", "float32")) if case.turns else None,
        gate_BLHP=normal("gate_BLHP"),
    )
    means = dict.fromkeys(("v_rank_HRP", "out_rank_HRP"), 1 / case.rank)
    means |= dict.fromkeys(("q_bias_HRN", "k_bias_HRN", "skip_H", "gate_rank_HRP"), 1)
    around = {name: normal(name, "float32") for name in means}
    heads = Heads(**{name: means[name] + 0.1 * x for name, x in around.items() if x is not None})
    return tokens, heads


@common.tracing()
def forward(tokens: Tokens, heads: Heads, *, case: Case, implementation: str, chunk: int | None):
    """Return the op, from no state."""
    return ssm(tokens, heads, rotation=case.rotation, implementation=implementation, chunk=chunk)


@common.tracing()
def backward(tokens: Tokens, heads: Heads, dy_BLHP, *, case: Case, implementation: str, chunk: int | None):
    """Return the output, the state, and the gradient of sum(y dy) with respect to everything that went in."""
    function = partial(forward, case=case, implementation=implementation, chunk=chunk)
    y_BLHP, pull, state = jax.vjp(function, tokens, heads, has_aux=True)
    return (y_BLHP, state), pull(dy_BLHP.astype(y_BLHP.dtype))


@common.tracing()
def decode(state: State, tokens: Tokens, heads: Heads, *, case: Case, implementation: str | None, chunk: int | None):
    """Return the state after one more token, and the token's output."""
    del chunk
    y_BLHP, state = ssm(tokens, heads, state, rotation=case.rotation, implementation=implementation)
    return state, y_BLHP


@lru_cache
def check(case: Case, implementation: str, chunk: int | None) -> dict[str, float]:
    """Return the errors on `case`, a short one, against `recurrent` in float64.

    Returns the largest relative error of the values (output and state), of the gradients, and of those of dt, log_a and
    the angle, which add up over the row.

    Raises:
        ValueError: one of them is over the tolerance of the case's dtype.
    """
    function = partial(backward, case=case, implementation=implementation, chunk=chunk)
    got_values, got_gradients = jax.jit(function)(*checked_inputs(case))
    want_values, want_gradients = reference(case)
    of_values, of_gradients, of_sums = TOLERANCE[case.dtype]
    values, gradients = named_errors(got_values, want_values), named_errors(got_gradients, want_gradients)
    sums = {name: gradients.pop(name) for name in list(gradients) if name.endswith(ADDS_UP)}
    return {
        "value_error": common.require(values, of_values, f"{implementation}, values"),
        "gradient_error": common.require(gradients, of_gradients, f"{implementation}, gradients"),
        "sum_error": common.require(sums, of_sums, f"{implementation}, gradients of dt, log_a and angle"),
    }


def short(case: Case) -> Case:
    """Return the same case on a short row of few heads; of one token, a short row as well: it decodes to a state."""
    return varied(case, batch=1, length=CHECKED_LENGTH, heads=2 * case.groups)


@lru_cache
def check_decode(case: Case, implementation: str | None) -> dict[str, float]:
    """Return the errors of three decoding steps from a random state against `recurrent` in float64."""
    case = varied(case, batch=2, heads=2 * case.groups)

    def steps(state, tokens, heads, implementation):
        outputs = []
        for _ in range(3):
            state, y_BLHP = decode(state, tokens, heads, case=case, implementation=implementation, chunk=None)
            outputs.append(y_BLHP)
        return outputs, state._replace(angle_BHS=jnp.stack([jnp.cos(state.angle_BHS), jnp.sin(state.angle_BHS)]))

    arguments = (random_state(case, seed=5), *inputs(case, seed=1))
    got = jax.jit(partial(steps, implementation=implementation))(*arguments)
    with exactly():
        exact = jax.tree.map(lambda array: np.asarray(array, np.float64), arguments)
        want = jax.tree.map(np.asarray, jax.jit(partial(steps, implementation="recurrent"))(*exact))
    errors = named_errors(got, want)
    return {"value_error": common.require(errors, TOLERANCE[case.dtype][0], f"{implementation}, decoding")}


def random_state(case: Case, seed: int) -> State:
    tokens, _ = inputs(case, seed)
    state, keys = empty_state(tokens), iter(jax.random.split(jax.random.key(seed), 4))
    return jax.tree.map(lambda x: jax.random.uniform(next(keys), x.shape, jnp.float32).astype(x.dtype), state)


def checked_inputs(small: Case):
    """Other numbers than those that are timed, and the gradient of the output."""
    tokens, heads = inputs(small, seed=1)
    dy_BLHP = np.random.default_rng(2).standard_normal(tokens.v_BLHP.shape, np.float32)
    return tokens, heads, jnp.asarray(dy_BLHP, tokens.v_BLHP.dtype)


@lru_cache
def reference(small: Case):
    """`backward` of `recurrent` in float64, on the very numbers that the implementation gets."""
    arguments = jax.tree.map(lambda array: np.asarray(array, np.float64), checked_inputs(small))
    with exactly():
        function = partial(backward, case=small, implementation="recurrent", chunk=None)
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


@contextlib.contextmanager
def exactly():
    """Inside, float64 is float64: a TPU has none, and makes it up of float32 numbers, so the host computes for it."""
    host = jax.devices("cpu")[0] if jax.default_backend() == "tpu" else None
    with jax.enable_x64(True), jax.default_device(host):
        yield


def named_errors(got, want) -> dict[str, float]:
    """`rel_rms` of every array of two equal trees, by its path."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(want)]
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return {path: common.rel_rms(a, b) for path, (a, b) in zip(paths, pairs, strict=True)}


def ceilings(dtype: str) -> dict[str, float]:
    """Return this device's best: a copy's GB/s, counting bytes read and written, and a matrix product's GFLOP/s."""
    on_host = jax.default_backend() == "cpu"
    elements, side = (2**24, 1024) if on_host else (2**28, 8192)
    source = jax.random.normal(jax.random.key(0), (elements,), jnp.float32)
    copy = common.measure(partial(jax.jit(jnp.negative), source))
    left, right = jax.random.normal(jax.random.key(1), (2, side, side), jnp.float32).astype(dtype)
    product = common.measure(partial(jax.jit(partial(jnp.matmul, precision="highest")), left, right))
    return {"copy_gb_s": 8 * elements / copy.best / 1e9, "matmul_gflop_s": 2 * side**3 / product.best / 1e9}


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass
class Task:
    """One function to time."""

    name: str
    case: Case
    implementation: str | None
    what: str
    chunk: int | None = None

    def function(self, implementation: str | None = None):
        function = {"forward": forward, "forward+backward": backward, "decode": decode}[self.what]
        return partial(function, case=self.case, implementation=implementation or self.implementation, chunk=self.chunk)

    def arguments(self, seed: int = 0):
        tokens, heads = inputs(self.case, seed)
        if self.what == "forward":
            return tokens, heads
        if self.what == "decode":
            return random_state(self.case, seed), tokens, heads
        return tokens, heads, jax.random.normal(jax.random.key(3), tokens.v_BLHP.shape).astype(tokens.v_BLHP.dtype)

    def check(self) -> dict[str, float]:
        """See `check` and `check_decode`, whose results are kept."""
        if self.what == "decode":
            return check_decode(self.case, self.implementation)
        return check(short(self.case), self.implementation, self.chunk)

    def compile(self):
        """Or the error that stopped it."""
        donated = {"donate_argnums": 0} if self.what == "decode" else {}
        try:
            return jax.jit(self.function(), **donated).lower(*jax.eval_shape(self.arguments)).compile()
        except jax.errors.JaxRuntimeError as error:
            return error


def tasks_of(name: str, case: Case, implementations: list[str], chunks: list[int | None]) -> list[Task]:
    tasks = []
    for implementation, chunk in itertools.product(implementations, chunks):
        if case.length > 1:
            tasks += [Task(name, case, implementation, what, chunk=chunk) for what in ("forward", "forward+backward")]
        elif not tasks:  # a step has no chunks: plain XLA, and the kernels asked for
            kernels = [each for each in implementations if each not in ("recurrent", "associative", "chunked")]
            tasks = [Task(name, case, each, "decode") for each in ("recurrent", *kernels)]
    return tasks


def row_of(task: Task, compiled, best: dict[str, float]) -> dict:
    """Check, then time what was compiled."""
    row = {"case": task.name, "implementation": task.implementation or "default", "chunk": task.chunk or "auto"}
    row["what"] = task.what
    row |= task.check()
    abstract = jax.eval_shape(task.arguments)
    operations = flops.count(task.function("recurrent" if task.what == "decode" else "chunked"), *abstract).matmul
    moved = nbytes(abstract) + nbytes(jax.eval_shape(task.function(), *abstract))
    row |= {
        "gflop": operations / 1e9,
        "bytes_floor_ms": moved / best["copy_gb_s"] / 1e6,
        "matmul_floor_ms": operations / best["matmul_gflop_s"] / 1e6,
    }
    try:
        if isinstance(compiled, Exception):
            raise compiled
        timing = measure_task(task, compiled, nbytes(abstract))
        row |= {"ms": timing.median * 1e3, "best_ms": timing.best * 1e3, "temp_mib": common.temp_mib(compiled)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row["failed"] = "out of memory"
    return row


def measure_task(task: Task, compiled, size: int) -> common.Timing:
    if task.what == "decode":
        state, tokens, heads = task.arguments()

        def step():
            nonlocal state
            state, y_BLHP = compiled(state, tokens, heads)
            return y_BLHP

        return common.measure(step)
    copies = [task.arguments(seed) for seed in range(max(1, min(16, CACHE_BYTES // size)))]
    turns = itertools.cycle(copies)
    return common.measure(lambda: compiled(*next(turns)))


def rows_of(tasks: list[Task], best: dict[str, dict]) -> Iterator[dict]:
    """Compile and check all tasks side by side, then time them; give a row a task."""
    with ThreadPoolExecutor() as pool:
        # What fails here fails again where its row is wanted.
        once = {(short(task.case), task.implementation, task.chunk): task for task in tasks}
        checks = [pool.submit(task.check) for task in once.values()]
        compiled = list(pool.map(Task.compile, tasks))
        wait(checks)
    for task, program in zip(tasks, compiled, strict=True):
        yield row_of(task, program, best[task.case.dtype])


def growth(case: Case, implementation: str, chunk: int | None) -> list[dict]:
    """Give operations a token and temporary memory of forward+backward at growing lengths: compiled, never run."""
    rows = []
    for length in GROWTH_LENGTHS:
        longer = varied(case, batch=1, heads=2, length=length)
        arguments = jax.eval_shape(lambda longer=longer: abstract(longer))
        function = partial(backward, case=longer, implementation=implementation, chunk=chunk)
        operations = flops.count(function, *arguments)
        compiled = jax.jit(function).lower(*arguments).compile()
        rows.append(
            {
                "implementation": implementation,
                "rank": case.rank,
                "length": length,
                "matmul_flop_a_token": operations.matmul / length,
                "other_flop_a_token": operations.elementwise / length,
                "temp_kib_a_token": common.temp_mib(compiled) * 1024 / length,
            }
        )
    return rows


def abstract(case: Case):
    """Return the arguments of `backward`, for their shapes alone."""
    one_token = inputs(varied(case, length=1))
    tokens, heads = one_token
    tokens = jax.tree.map(lambda array: jnp.broadcast_to(array, (case.batch, case.length, *array.shape[2:])), tokens)
    return tokens, heads, jnp.zeros(tokens.v_BLHP.shape, case.dtype)


COLUMNS = {
    "case": "case",
    "implementation": "implementation",
    "chunk": "chunk",
    "": "what",
    "ms": "ms",
    "best": "best_ms",
    "bytes floor": "bytes_floor_ms",
    "matmul floor": "matmul_floor_ms",
    "temp MiB": "temp_mib",
    "error": "value_error",
    "gradient error": "gradient_error",
    "of dt, log_a, angle": "sum_error",
    "failed": "failed",
}
GROWTH_COLUMNS = {
    "implementation": "implementation",
    "rank": "rank",
    "length": "length",
    "matmul FLOP a token": "matmul_flop_a_token",
    "other FLOP a token": "other_flop_a_token",
    "temp KiB a token": "temp_kib_a_token",
}


def chosen(flag: str, given: list[str], known) -> list[str]:
    """Return the names given, or a one-line error that lists what there is."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise app.UsageError(f"--{flag}: {unknown} not in {sorted(known)}")
    return given


def main(argv):
    del argv
    if FLAGS.device:
        # Of a TPU the host too: see `exactly`.
        platforms = {"gpu": "cuda", "tpu": "tpu,cpu"}.get(FLAGS.device, FLAGS.device)
        jax.config.update("jax_platforms", platforms)
    platform = jax.default_backend()
    origin = provenance(FLAGS.commit)
    implementations = FLAGS.implementations or IMPLEMENTATIONS_OF[platform]
    implementations = chosen("implementations", implementations, IMPLEMENTATIONS)
    cases = CASES[platform]
    names = chosen("cases", FLAGS.cases or list(cases), cases)
    chunks = [chunk or None for chunk in common.numbers("chunk", least=0)]
    best, rows = {}, []
    if not FLAGS.growth:
        best = {dtype: ceilings(dtype) for dtype in {cases[name].dtype for name in names}}
    if FLAGS.growth:
        found = (
            row
            for name, implementation, chunk in itertools.product(names, implementations, chunks)
            for row in growth(cases[name], implementation, chunk)
        )
    else:
        found = rows_of([task for name in names for task in tasks_of(name, cases[name], implementations, chunks)], best)
    kind, columns = ("growth", GROWTH_COLUMNS) if FLAGS.growth else ("ssm", COLUMNS)
    sizes = {name: cases[name].sizes() for name in names}
    for row in found:
        rows.append(row)
        common.show(row, columns)
        # After every row: a program that is stopped leaves what it has.
        path = common.write(FLAGS.name or f"{kind}_{platform}", origin, rows, FLAGS.out, cases=sizes, ceilings=best)
    print(common.table(rows, columns))
    print(path)


if __name__ == "__main__":
    flags.DEFINE_list(
        "implementations", [], "names in mamba3_jax.ops.ssm.IMPLEMENTATIONS; empty: the ones for this device"
    )
    flags.DEFINE_list("cases", [], "names in CASES for this device; empty: all")
    flags.DEFINE_list("chunk", ["0"], "tokens a chunk, one or several; 0: the implementation chooses")
    flags.DEFINE_enum("device", "", ["", "cpu", "gpu", "tpu"], "empty: JAX's default")
    flags.DEFINE_bool("growth", False, "instead: operations and memory a token at growing lengths")
    common.define_result(name="", empty="ssm_DEVICE or growth_DEVICE", commit=True)
    app.run(main, flags_parser=common.parse)
