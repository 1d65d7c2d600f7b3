"""What there is to run and what came out: the rows of experiments/README.md."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from experiments.benchmarks.common import significant
from experiments.parity import scaled


@dataclass(frozen=True)
class Experiment:
    """One row. `result` is a path under experiments/, and `got` reads a sentence out of it."""

    question: str
    command: str
    cost: str
    expected: str
    result: str
    got: Callable[[dict], str]


def layer_ratios(result: dict) -> str:
    """How many times faster than the peer, task by task."""
    ratios = [f"{row['layer']} {row['what']} {significant(row['ratio'])}x" for row in result["rows"] if "ratio" in row]
    return ", ".join(ratios) or "only our own layer was timed"


def op_times(result: dict, implementation: str = "chunked") -> str:
    """One implementation's times, forward / forward+backward."""
    rows = [row for row in result["rows"] if row["implementation"] == implementation and "ms" in row]
    times = {}
    for row in rows:
        times.setdefault(row["case"], []).append(significant(row["ms"]))
    return ", ".join(f"{case} {' / '.join(ms)} ms" for case, ms in times.items())


def train_speed(result: dict) -> str:
    """What the default does, and how many times faster it is than plain XLA."""
    rows = {(row["model"], row["what"], row["implementation"].split(":")[0]): row for row in result["rows"]}
    said = []
    for (model, what, implementation), row in rows.items():
        plain = rows.get((model, what, "chunked"))
        if implementation == "default" and plain is not None:
            step = f"{significant(row['tokens_per_second'])} tokens/s" if what == "training step" else ""
            speed = step or f"{what} {significant(row['ms'])} ms"
            said.append(f"{model} {speed} ({significant(plain['ms'] / row['ms'])}x)")
    return ", ".join(said) or "only one implementation was timed"


def growth_factors(result: dict) -> str:
    """From the shortest to the longest length, of the implementation that is the default."""
    rows = [row for row in result["rows"] if row["implementation"] == "chunked" and row["rank"] == 1]
    first, last = rows[0], rows[-1]
    factors = (last[key] / first[key] for key in ("matmul_flop_a_token", "temp_kib_a_token"))
    operations, memory = map(significant, factors)
    return (
        f"from {first['length']:,} to {last['length']:,} tokens: FLOP a token x {operations}, memory a token x {memory}"
    )


def depth_factors(result: dict) -> str:
    """Of each model, from its shallowest to its deepest."""
    models = {row["model"]: [] for row in result["rows"]}
    for row in result["rows"]:
        models[row["model"]].append(row)
    return "; ".join(f"{name} {_deeper(rows[0], rows[-1])}" for name, rows in models.items())


def _deeper(first: dict, last: dict) -> str:
    seconds, size = (significant(last[key] / first[key]) for key in ("compile_s", "hlo_instructions"))
    return f"from {first['layers']} to {last['layers']} layers: compile time x {seconds}, HLO instructions x {size}"


def tpu_estimates(result: dict) -> str:
    """For one chip, how far plain XLA is from the roofline; for all, what kernels take of its cycles."""
    plain, kernels = {}, {}
    for row in result["rows"]:
        if row["chip"] == "v5e" and row["implementation"] in ("chunked", "recurrent") and "estimate_ms" in row:
            plain[f"{row['case']} {row['what']}"] = row["estimate_over_roofline"]
        if "mega_cycles_over_plain" in row:
            name = f"{row['case']} {row['what']} {row['implementation']}"
            kernels.setdefault(name, []).append(row["mega_cycles_over_plain"])
    over = ", ".join(f"{name} {significant(ratio)}x" for name, ratio in plain.items())
    spans = ", ".join(f"{name} {significant(min(x))} to {significant(max(x))}" for name, x in kernels.items())
    return f"v5e, plain XLA over the roofline: {over}; cycles over plain XLA's, all chips: {spans or 'no kernel yet'}"


def parity_scores(result: dict) -> str:
    """Every variant's and seed's accuracy at the longest trained length."""
    length = str(max(result["trained_lengths"]))
    scores = {row["variant"]: row["accuracy"][length] for row in result["rows"]}
    each = [f"{name} {' '.join(f'{scaled(seed):.0f}' for seed in seeds)}" for name, seeds in scores.items()]
    return f"at {length}: " + ", ".join(each)


def text_scores(result: dict) -> str:
    """Bits per byte at the trained length and at the longest evaluated, and how long it took."""
    first, last = result["rows"][0], result["rows"][-1]
    bits = [f"{significant(row['bits_per_byte'])} in rows of {row['length']:,}" for row in (first, last)]
    return f"{', '.join(bits)}; trained in {result['seconds']['train']:.0f} s"


EXPERIMENTS = (
    Experiment(
        question="What does a small model learn of real text in minutes on a CPU (bits per byte, held out)?",
        command="python -m experiments.record --config=experiments/text.py --workdir=runs/text_recorded",
        cost="2 minutes, 2 cores",
        expected="about 1.9 (gzip -9: 1.89)",
        result="results/text.json",
        got=text_scores,
    ),
    Experiment(
        question="Does rotation by a data-dependent angle track a state (parity), and what else does?",
        command="python -m experiments.parity --workdir=runs/parity",
        cost="2 minutes, 2 cores",
        expected="at 256, percent from chance to perfect: Mamba-3 95 to 100, Euler 85 to 100, the others about 0",
        result="results/parity.json",
        got=parity_scores,
    ),
    Experiment(
        question="Is one layer faster than the other JAX package's, on a CPU?",
        command="python -m experiments.benchmarks.layer --peer_python=build/peer/bin/python",
        cost="4 minutes, 2 cores",
        expected="over 1x on each",
        result="benchmarks/results/layer_cpu.json",
        got=layer_ratios,
    ),
    Experiment(
        question="How fast is the op on a GPU in plain XLA (batch 16, length 2,048, 32 heads, P 64, N 128, bf16)?",
        command="python -m experiments.benchmarks.ssm --implementations=chunked --cases=siso,mimo4",
        cost="3 minutes, one GPU",
        expected="SISO 4 ms forward, 20 ms forward+backward; MIMO R=4 15 and 84",
        result="benchmarks/results/ssm_gpu.json",
        got=op_times,
    ),
    Experiment(
        question="And in the Hopper kernels, at that size, over long rows, with few heads, and a token at a time?",
        command="python -m experiments.benchmarks.ssm --implementations=mosaic_gpu,triton,chunked --name=ssm_hopper",
        cost="5 minutes, one GPU",
        expected="forward / forward+backward of siso 0.45 / 2.3 ms, mimo4 1.3 / 7.9 on an H100",
        result="benchmarks/results/ssm_hopper.json",
        got=partial(op_times, implementation="mosaic_gpu"),
    ),
    Experiment(
        question="How much faster do the kernels make a whole layer, and a training step of the 180M models, on a GPU?",
        command="python -m experiments.benchmarks.train",
        cost="4 minutes, one GPU",
        expected="2.7x a SISO step, 3.9x a MIMO step; a layer 4 to 8 times, SISO and MIMO",
        result="benchmarks/results/train_gpu.json",
        got=train_speed,
    ),
    Experiment(
        question="What would the op take on TPUs, by the TPU compiler's own estimate (no TPU)?",
        command="python -m experiments.benchmarks.tpu_aot",
        cost="40 minutes, 2 cores",
        expected="v5e, plain XLA: a SISO step 1.9x the roofline, training more; the kernels at most half its cycles",
        result="benchmarks/results/tpu_aot.json",
        got=tpu_estimates,
    ),
    Experiment(
        question="Do work and memory a token grow with the length?",
        command="python -m experiments.benchmarks.ssm --growth",
        cost="3 minutes, 2 cores",
        expected="x 1.00 and x 1.00 at most",
        result="benchmarks/results/growth_cpu.json",
        got=growth_factors,
    ),
    Experiment(
        question="Does compiling take longer for a deeper model?",
        command="python -m experiments.benchmarks.depth",
        cost="2 minutes, 2 cores",
        expected="x 1.0 in size",
        result="benchmarks/results/depth_cpu.json",
        got=depth_factors,
    ),
)
