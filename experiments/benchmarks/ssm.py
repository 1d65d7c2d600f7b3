"""The op alone: every implementation on the same inputs, its error, its time, its memory, and the floors under it.

    python -m experiments.benchmarks.ssm                                       the cases for this device
    python -m experiments.benchmarks.ssm --cases=mimo4 --chunk=16,32,64        a sweep of the chunk size
    python -m experiments.benchmarks.ssm --growth                              operations and memory against length

Times forward, and forward with the gradient of everything that goes in. First the same configuration is run on a short
row and compared with `recurrent` in float64: values, state and every gradient. Beside the times stand two floors
measured in the same run: every input and output moved once at the bandwidth of a copy, and the implementation's own
matrix products at the rate of a large one.
"""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks import common, flops
from mamba3_jax.ops.ssm import IMPLEMENTATIONS, Heads, Tokens, ssm


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call; the letters are those of `mamba3_jax.ops.types`."""

    batch: int
    length: int
    heads: int
    width: int
    d_state: int
    groups: int = 1
    rank: int = 1
    dtype: str = "float32"

    @property
    def rotation(self) -> str:
        return "adjacent" if self.rank == 1 else "half"


LARGE = Case(batch=16, length=2048, heads=32, width=64, d_state=128, dtype="bfloat16")
SMALL = Case(batch=2, length=2048, heads=8, width=64, d_state=64)
CASES = {
    "gpu": {"siso": LARGE, "mimo4": dataclasses.replace(LARGE, rank=4)},
    "tpu": {"siso": LARGE, "mimo4": dataclasses.replace(LARGE, rank=4)},
    "cpu": {"siso": SMALL, "mimo4": dataclasses.replace(SMALL, rank=4)},
}
CHECKED_LENGTH = 331  # prime: no chunk size divides it
GROWTH_LENGTHS = (2048, 8192, 32768, 131072)
# float32 sums over a few hundred tokens; bfloat16 keeps 8 bits of every operand. As in tests/ops.
TOLERANCE = {"float32": (1e-5, 2e-4), "bfloat16": (1e-2, 3e-2)}

FLAGS = flags.FLAGS


def inputs(case: Case, seed: int = 0) -> tuple[Tokens, Heads]:
    """Random tokens and heads with the statistics of a fresh layer: dt from 0.001 to 0.1, keys of unit RMS."""
    random = np.random.default_rng(seed)
    shape_BLH = (case.batch, case.length, case.heads)
    shape_BLRGN = (case.batch, case.length, case.rank, case.groups, case.d_state)
    planes = case.d_state // 4

    def normal(*shape, dtype=case.dtype):
        return jnp.asarray(random.standard_normal(shape, np.float32), dtype)

    dt_BLH = jnp.asarray(np.exp(random.uniform(np.log(1e-3), np.log(1e-1), shape_BLH)), jnp.float32)
    tokens = Tokens(
        q_BLRGN=normal(*shape_BLRGN),
        k_BLRGN=normal(*shape_BLRGN),
        v_BLHP=normal(*shape_BLH, case.width),
        dt_BLH=dt_BLH,
        log_a_BLH=-dt_BLH * jnp.asarray(random.uniform(0.5, 2.0, shape_BLH), jnp.float32),
        trap_BLH=jnp.asarray(random.uniform(0, 1, shape_BLH), jnp.float32),
        angle_BLHS=jnp.pi * jnp.tanh(normal(*shape_BLH[:2], 1, planes, dtype="float32")),
        gate_BLHP=normal(*shape_BLH, case.width),
    )
    shape_HRN, shape_HRP = (case.heads, case.rank, case.d_state), (case.heads, case.rank, case.width)
    mixed = {name: 1 / case.rank + 0.1 * normal(*shape_HRP, dtype="float32") for name in ("v_rank_HRP", "out_rank_HRP")}
    heads = Heads(
        q_bias_HRN=1 + 0.1 * normal(*shape_HRN, dtype="float32"),
        k_bias_HRN=1 + 0.1 * normal(*shape_HRN, dtype="float32"),
        skip_H=1 + 0.1 * normal(case.heads, dtype="float32"),
        gate_rank_HRP=1 + 0.1 * normal(*shape_HRP, dtype="float32") if case.rank > 1 else None,
        **(mixed if case.rank > 1 else {}),
    )
    return tokens, heads


def forward(tokens: Tokens, heads: Heads, *, case: Case, implementation: str, chunk: int | None):
    """The op, from no state."""
    return ssm(tokens, heads, rotation=case.rotation, implementation=implementation, chunk=chunk)


def backward(tokens: Tokens, heads: Heads, dy_BLHP, *, case: Case, implementation: str, chunk: int | None):
    """The output, the state, and the gradient of sum(y dy) with respect to everything that went in."""

    def loss(tokens, heads):
        y_BLHP, state = forward(tokens, heads, case=case, implementation=implementation, chunk=chunk)
        return jnp.sum(y_BLHP.astype(jnp.float32) * dy_BLHP), (y_BLHP, state)

    (_, values), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(tokens, heads)
    return values, gradients


def check(case: Case, implementation: str, chunk: int | None) -> dict[str, float]:
    """Errors of the same configuration on a short row against `recurrent` in float64.

    Returns the largest relative error of the values (output and state) and of the gradients.

    Raises:
        ValueError: one of them is over the tolerance of the case's dtype.
    """
    small = dataclasses.replace(case, batch=1, length=CHECKED_LENGTH, heads=2 * case.groups)
    function = partial(backward, case=small, implementation=implementation, chunk=chunk)
    got_values, got_gradients = jax.jit(function)(*checked_inputs(small))
    want_values, want_gradients = reference(small)
    of_values, of_gradients = TOLERANCE[case.dtype]
    values, gradients = named_errors(got_values, want_values), named_errors(got_gradients, want_gradients)
    return {
        "value_error": common.require(values, of_values, f"{implementation}, values"),
        "gradient_error": common.require(gradients, of_gradients, f"{implementation}, gradients"),
    }


def checked_inputs(small: Case):
    """Other numbers than those that are timed, and the gradient of the output."""
    tokens, heads = inputs(small, seed=1)
    dy_BLHP = np.random.default_rng(2).standard_normal(tokens.v_BLHP.shape, np.float32)
    return tokens, heads, jnp.asarray(dy_BLHP)


@lru_cache
def reference(small: Case):
    """`backward` of `recurrent` in float64, on the very numbers that the implementation gets."""
    arguments = jax.tree.map(lambda array: np.asarray(array, np.float64), checked_inputs(small))
    with jax.enable_x64(True):
        function = partial(backward, case=small, implementation="recurrent", chunk=None)
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def named_errors(got, want) -> dict[str, float]:
    """`rel_rms` of every array of two equal trees, by its path."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(want)]
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return {path: common.rel_rms(a, b) for path, (a, b) in zip(paths, pairs, strict=True)}


def ceilings(dtype: str) -> dict[str, float]:
    """What this device does at best: a copy's GB/s, counting bytes read and written, and a matrix product's GFLOP/s."""
    on_host = jax.default_backend() == "cpu"
    elements, side = (2**24, 1024) if on_host else (2**28, 8192)
    source = jax.random.normal(jax.random.key(0), (elements,), jnp.float32)
    copy = common.measure(partial(jax.jit(jnp.negative), source))
    left, right = jax.random.normal(jax.random.key(1), (2, side, side), jnp.float32).astype(dtype)
    product = common.measure(partial(jax.jit(partial(jnp.matmul, precision="highest")), left, right))
    return {"copy_gb_s": 8 * elements / copy.best / 1e9, "matmul_gflop_s": 2 * side**3 / product.best / 1e9}


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def rows_of(name: str, case: Case, implementation: str, chunk: int | None, best: dict[str, float]) -> list[dict]:
    """Check, then time forward and forward with backward; one row each."""
    errors = check(case, implementation, chunk)
    tokens, heads = inputs(case)
    dy_BLHP = jax.random.normal(jax.random.key(3), tokens.v_BLHP.shape, jnp.float32)
    rows = []
    for what, function, arguments in (
        ("forward", forward, (tokens, heads)),
        ("forward+backward", backward, (tokens, heads, dy_BLHP)),
    ):
        function = partial(function, case=case, implementation=implementation, chunk=chunk)
        row = {"case": name, "implementation": implementation, "chunk": chunk or "auto", "what": what, **errors}
        operations = flops.count(function, *arguments).matmul
        moved = nbytes(arguments) + nbytes(jax.eval_shape(function, *arguments))
        row |= {
            "gflop": operations / 1e9,
            "bytes_floor_ms": moved / best["copy_gb_s"] / 1e6,
            "matmul_floor_ms": operations / best["matmul_gflop_s"] / 1e6,
        }
        try:
            compiled = jax.jit(function).lower(*arguments).compile()
            timing = common.measure(partial(compiled, *arguments))
            row |= {"ms": timing.median * 1e3, "best_ms": timing.best * 1e3, "temp_mib": common.temp_mib(compiled)}
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row["failed"] = "out of memory"
        rows.append(row)
    return rows


def growth(case: Case, implementation: str, chunk: int | None) -> list[dict]:
    """Operations a token and temporary memory of forward+backward at growing lengths. Compiles, runs nothing."""
    rows = []
    for length in GROWTH_LENGTHS:
        longer = dataclasses.replace(case, batch=1, heads=2, length=length)
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
    """The arguments of `backward`, for their shapes alone."""
    one_token = inputs(dataclasses.replace(case, length=1))
    tokens, heads = one_token
    tokens = jax.tree.map(lambda array: jnp.broadcast_to(array, (case.batch, case.length, *array.shape[2:])), tokens)
    return tokens, heads, jnp.zeros(tokens.v_BLHP.shape, jnp.float32)


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
    """The names given, or a one-line error that lists what there is."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise app.UsageError(f"--{flag}: {unknown} not in {sorted(known)}")
    return given


def main(argv):
    del argv
    if FLAGS.device:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(FLAGS.device, FLAGS.device))
    platform = jax.default_backend()
    origin = common.provenance(FLAGS.commit)
    implementations = chosen("implementations", FLAGS.implementations, IMPLEMENTATIONS)
    cases = CASES[platform]
    names = chosen("cases", FLAGS.cases or list(cases), cases)
    chunks = [int(chunk) or None for chunk in FLAGS.chunk]
    best, rows = {}, []
    if not FLAGS.growth:
        best = {dtype: ceilings(dtype) for dtype in {cases[name].dtype for name in names}}
    for name in names:
        for implementation in implementations:
            for chunk in chunks:
                if FLAGS.growth:
                    rows += growth(cases[name], implementation, chunk)
                else:
                    rows += rows_of(name, cases[name], implementation, chunk, best[cases[name].dtype])
    print(common.table(rows, GROWTH_COLUMNS if FLAGS.growth else COLUMNS))
    kind = "growth" if FLAGS.growth else "ssm"
    sizes = {name: dataclasses.asdict(cases[name]) for name in names}
    name = FLAGS.name or f"{kind}_{platform}"
    print(common.write(name, origin, rows, FLAGS.out, cases=sizes, ceilings=best))


if __name__ == "__main__":
    flags.DEFINE_list("implementations", ["chunked", "associative"], "names in mamba3_jax.ops.ssm.IMPLEMENTATIONS")
    flags.DEFINE_list("cases", [], "names in CASES for this device; empty: all")
    flags.DEFINE_list("chunk", ["0"], "tokens a chunk, one or several; 0: the implementation chooses")
    flags.DEFINE_enum("device", "", ["", "cpu", "gpu", "tpu"], "empty: JAX's default")
    flags.DEFINE_bool("growth", False, "instead: operations and memory a token at growing lengths")
    flags.DEFINE_string("out", "", "directory of the result file; empty: experiments/benchmarks/results")
    flags.DEFINE_string("name", "", "of the result file; empty: ssm_DEVICE or growth_DEVICE")
    flags.DEFINE_string("commit", "", "recorded where the code runs outside its git checkout")
    app.run(main)
