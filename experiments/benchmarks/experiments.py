"""What there is to run beside sweeps and what came out: rows of experiments/README.md, and those of the main README."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from experiments.benchmarks import losses
from experiments.benchmarks.common import significant
from mamba3_jax.evaluate import comparison


@dataclass(frozen=True)
class Experiment:
    """One row. `result` is a path under experiments/, and `got` reads a sentence out of it."""

    question: str
    command: str
    cost: str
    expected: str
    result: str
    got: Callable[[dict], str]


@dataclass(frozen=True)
class Headline:
    """One row of the main README. `result` is a path under experiments/, and `number` reads one cell out of it."""

    what: str
    result: str
    number: Callable[[dict], str]
    command: str


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
    """Return what the default does, and how many times faster it is than plain XLA."""
    rows = {(row["model"], row["what"], row["implementation"].split(":")[0]): row for row in result["rows"]}
    said = []
    for (model, what, implementation), row in rows.items():
        plain = rows.get((model, what, "chunked"))
        if implementation == "default" and plain is not None:
            step = f"{significant(row['tokens_per_second'])} tokens/s" if what == "training step" else ""
            speed = step or f"{what} {significant(row['ms'])} ms"
            said.append(f"{model} {speed} ({significant(plain['ms'] / row['ms'])}x)")
    return ", ".join(said) or "only one implementation was timed"


def step_speed(result: dict) -> str:
    """Return each step's tokens a second, share of the device's peak and memory, by model, rows and what is set."""
    said = []
    for row in result["rows"]:
        what = f"{row['model']} B{row['batch']}{' ' if row['variant'] else ''}{row['variant']}"
        memory = f"{row['peak_mib'] / 1024:.0f} GiB"
        said.append(f"{what} {significant(row['tokens_per_second'])} tokens/s ({100 * row['mfu']:.1f}%, {memory})")
    return ", ".join(said)


# What a kernel of a step is, by what its name has; anything else is a pass that XLA makes over memory.
KERNELS = {"mamba3_": "our kernels", "cudnn": "cuDNN's attention", "nvjet": "products", "gemm": "products"}


def step_parts(result: dict) -> str:
    """Return what each step's time in kernels is made of."""
    steps = {}
    for row in result["rows"]:
        kind = next((kind for name, kind in KERNELS.items() if name in row["kernel"]), "XLA's passes")
        parts = steps.setdefault(row["case"], {})
        parts[kind] = parts.get(kind, 0.0) + row["ms"]
    said = []
    for case, parts in steps.items():
        each = [f"{kind} {significant(ms)}" for kind, ms in sorted(parts.items(), key=lambda part: -part[1])]
        said.append(f"{case}: {significant(sum(parts.values()))} ms, {', '.join(each)}")
    return "; ".join(said)


def last_losses(result: dict) -> str:
    """Return the last losses of each tree, seed by seed."""
    of = [f"{tree} {' / '.join(f'{loss:.4f}' for loss in each)}" for tree, each in losses.last(result["rows"]).items()]
    return f"{', '.join(of)} after {max(row['step'] for row in result['rows'])} steps"


def decode_speed(result: dict) -> str:
    """Return the time a token of what `generate` runs, over the floor and over what it was before, by batch."""
    rows = [row for row in result["rows"] if row["what"] == "decode" and row["sampling"] == "plain"]
    former = {(row["model"], row["batch"]): row for row in rows if row["path"] == "former"}
    said = []
    for (model, batch), row in generated(result).items():
        before = former.get((model, batch))
        faster = f", {significant(before['ms'] / row['ms'])}x as fast as before" if before else ""
        over = significant(row["over_floor"])
        said.append(f"{model} B{batch} {significant(row['ms'])} ms a token, {over}x the floor{faster}")
    return "; ".join(said) or "no loop was timed"


def generated(result: dict) -> dict[tuple[str, int], dict]:
    """Return the rows of the loop that `generate` runs by model and batch: a layer in few kernels where that was."""
    found = {}
    for path in ("loop", "fused"):
        for row in result["rows"]:
            if row["what"] == "decode" and (row["path"], row["sampling"]) == (path, "plain"):
                found[row["model"], row["batch"]] = row
    return found


def pipeline_speed(result: dict) -> str:
    """Return tokens a second of every tokenizer, of a batch and of the text at the start of a run."""
    each = [f"{row['what']} {row['tokenizer']} {row['tokens_per_second']:,.0f} tokens/s" for row in result["rows"]]
    return ", ".join(each)


def task_speed(result: dict) -> str:
    """Return tokens a second of one core, of the slowest and the fastest generated task."""
    rows = sorted(result["rows"], key=lambda row: row["tokens_per_cpu_second"])
    each = [f"{row['tokenizer']} {row['tokens_per_cpu_second']:,.0f}" for row in (rows[0], rows[-1])]
    return f"from {each[0]} to {each[1]} tokens/s of a core"


def growth_factors(result: dict) -> str:
    """Return by what FLOP and memory a token of the default grow from the shortest to the longest length."""
    rows = [row for row in result["rows"] if row["implementation"] == "chunked" and row["rank"] == 1]
    first, last = rows[0], rows[-1]
    keys = ("matmul_flop_a_token", "temp_kib_a_token")
    operations, memory = (significant(last[key] / first[key]) for key in keys)
    lengths = f"from {first['length']:,} to {last['length']:,} tokens"
    return f"{lengths}: FLOP a token x {operations}, memory a token x {memory}"


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


def restores(result: dict) -> str:
    """Return, of a training state on other meshes, by how much a device exceeds its part at worst."""
    rows = result["rows"]
    worst = max(row["device_gb"] / row["part_gb"] for row in rows)
    host = max(row["host_gb"] / row["held_gb"] for row in rows)
    return (
        f"{rows[0]['state_gb']:.2f} GB onto {len(rows)} meshes: a device holds at most {worst:.2f} of its part, "
        f"the host at most {host:.2f} of what its devices hold"
    )


def pod_steps(result: dict) -> str:
    """Return, of every large model that fits, what limits its step and the most that its MFU can be."""
    rows = [row for row in result["rows"] if row["model"].endswith("1.5b") and "failed" not in row]
    each = [
        f"{row['model']} {row['topology']} {row['mesh']} L {row['length']:,}: {row['limit']}, "
        f"{100 * row['mfu_in_turn']:.0f} to {100 * row['mfu_at_once']:.0f}%"
        for row in rows
    ]
    return "; ".join(each)


def text_scores(result: dict) -> str:
    """Bits per byte at the trained length and at the longest evaluated, and how long it took."""
    first, last = result["rows"][0], result["rows"][-1]
    bits = [f"{significant(row['bits_per_byte'])} in rows of {row['length']:,}" for row in (first, last)]
    return f"{', '.join(bits)}; trained in {result['seconds']['train']:.0f} s"


def population_speed(result: dict) -> str:
    """Read how many times as fast the largest population of each kind is as one run at a time."""
    largest = {(row["mixer"], row["dtype"], row["implementation"]): row for row in result["rows"]}
    return ", ".join(
        f"{' '.join(kind)}, {row['members']} members: {significant(row['over_one'])}x" for kind, row in largest.items()
    )


def two_devices(result: dict) -> str:
    """Read the largest difference of a float32 loss, and the efficiency of each mesh by the group of its steps."""
    rows = [row for row in result["rows"] if "failed" not in row]
    off = max((row["loss error"] for row in rows if "ms" not in row and row["loss error"] is not None), default=None)
    timed = [f"{row['group']} {row['mesh']} {100 * row['efficiency']:.0f}%" for row in rows if "efficiency" in row]
    return f"losses off by at most {significant(off)}; of one device's speed {', '.join(timed) or '-'}"


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
        question="And on an H200, with fewer spills, waits and fusions (ssm_h200_before: 837a78d48, before)?",
        command="python -m experiments.benchmarks.ssm --implementations=mosaic_gpu --name=ssm_h200",
        cost="2 minutes, one GPU",
        expected="training of siso 1.84 -> 1.71 ms, mimo4 7.05 -> 6.4; of 131,072 tokens 7.75 -> 7.2, 31.5 -> 29",
        result="benchmarks/results/ssm_h200.json",
        got=partial(op_times, implementation="mosaic_gpu"),
    ),
    Experiment(
        question="And before that, the Hopper kernels apart from Triton's (ssm_h200_long_before: 43ba093b4, with)?",
        command="python -m experiments.benchmarks.ssm --implementations=mosaic_gpu --name=ssm_h200_long "
        "--cases=siso_b2_l16384,mimo4_b1_l131072,siso_decode,mimo4_decode",
        cost="minutes, one GPU",
        expected="none over 2% slower than in ssm_h200_long_before",
        result="benchmarks/results/ssm_h200_long.json",
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
        question="How close is a training step of the 180M models to an H200's peak, in rows of 2,048 tokens?",
        command="python -m experiments.benchmarks.train --models=siso-180m --models=mimo-180m "
        "--models=transformer-180m --implementations=default --batch=16,32 --name=train_h200",
        cost="4 minutes, one GPU",
        expected="SISO over 330,000 tokens/s (37%); a MIMO step at most 1.55 of SISO's",
        result="benchmarks/results/train_h200.json",
        got=step_speed,
    ),
    Experiment(
        question="What do layers in a scan cost there, and what does computing again (9849b47c0)?",
        command="python -m experiments.benchmarks.train --models=siso-180m --implementations=default --batch=16 "
        "--name=train_h200_layers --variants= --variants=model.unroll=1 --variants=model.unroll=4 "
        "--variants=model.remat=rotation --variants=model.remat=block",
        cost="4 minutes, one GPU",
        expected="all layers unrolled are the fastest; a block computed again takes a third of the memory",
        result="benchmarks/results/train_h200_layers.json",
        got=step_speed,
    ),
    Experiment(
        question="And one of 1.5B parameters?",
        command="python -m experiments.benchmarks.train --models=siso-1.5b --implementations=default --batch=8,16 "
        "--name=train_h200_1b",
        cost="3 minutes, one GPU",
        expected="over 38,000 tokens/s",
        result="benchmarks/results/train_h200_1b.json",
        got=step_speed,
    ),
    Experiment(
        question="And a Transformer's of 180M, with cuDNN's attention?",
        command="python -m experiments.benchmarks.train --models=transformer-180m --implementations=default "
        "--batch=32 --name=train_h200_baselines",
        cost="2 minutes, one GPU",
        expected="45% of the peak",
        result="benchmarks/results/train_h200_baselines.json",
        got=step_speed,
    ),
    Experiment(
        question="And Mamba-2's, by the same kernels?",
        command="python -m experiments.benchmarks.train --models=mamba2-180m --implementations=default --batch=32 "
        "--name=train_h200_mamba2",
        cost="2 minutes, one GPU",
        expected="about what Mamba-3 takes",
        result="benchmarks/results/train_h200_mamba2.json",
        got=step_speed,
    ),
    Experiment(
        question="And on one row of 1,048,576 tokens?",
        command="python -m experiments.benchmarks.train --models=siso-180m --implementations=default --batch=1 "
        "--length=1048576 --variants=model.remat=block --name=train_h200_long",
        cost="2 minutes, one GPU",
        expected="it fits, and takes under 6 s",
        result="benchmarks/results/train_h200_long.json",
        got=step_speed,
    ),
    Experiment(
        question="What is the time of these steps made of?",
        command="python -m experiments.benchmarks.profile --cases= --models=transformer-180m,siso-180m --batch=32 "
        "--name=profile_h200_steps",
        cost="2 minutes, one GPU",
        expected="over half of it products",
        result="benchmarks/results/profile_h200_steps.json",
        got=step_parts,
    ),
    Experiment(
        question="Are losses what they were before the step was made fast (d80ecd0e5), on a CPU?",
        command="git worktree add /tmp/before d80ecd0 && python -m experiments.benchmarks.losses "
        "--trees=before=/tmp/before --trees=after=. --seeds=3 --name=losses_cpu --fields='--config.train.steps=300 "
        "--config.train.log_every=25 --config.train.eval_every=0 --config.model.compute_dtype=bfloat16'",
        cost="3 minutes, 2 cores",
        expected="seed by seed closer than seeds are to one another",
        result="benchmarks/results/losses_cpu.json",
        got=last_losses,
    ),
    Experiment(
        question="And with the kernels, of 180M parameters, on a GPU?",
        command="python -m experiments.benchmarks.losses --trees=before=/tmp/before --trees=after=. --seeds=3 "
        "--name=losses_h200 --fields='...' (the fields stand in the file)",
        cost="5 minutes, one GPU",
        expected="seed by seed closer than seeds are to one another",
        result="benchmarks/results/losses_h200.json",
        got=last_losses,
    ),
    Experiment(
        question="What does the input pipeline give (pipeline_cpu_before: with rows cut one by one)?",
        command="python -m experiments.benchmarks.pipeline",
        cost="2 minutes, 2 cores",
        expected="batches far over 500,000 tokens/s; tokenising, once a run, as fast as the package `tokenizers`",
        result="benchmarks/results/pipeline_cpu.json",
        got=pipeline_speed,
    ),
    Experiment(
        question="What do many runs in one compiled step give over one run at a time?",
        command="python -m experiments.benchmarks.population --name=population_cpu --members=1,4,8 --rows=8",
        cost="2 minutes, 2 cores",
        expected="about 1x on a CPU, which is full with one; several times as much on a GPU",
        result="benchmarks/results/population_cpu.json",
        got=population_speed,
    ),
    Experiment(
        question="How fast are the generated tasks drawn (batch 256, length 160), which a GPU must not wait for?",
        command="python -m experiments.benchmarks.pipeline --of=tasks --name=tasks_cpu",
        cost="2 minutes, one core",
        expected="each over 5,000,000 tokens/s of a core",
        result="benchmarks/results/tasks_cpu.json",
        got=task_speed,
    ),
    Experiment(
        question="How far is a generated token from moving weights and state once, and what do top-k and top-p cost "
        "(decode_h200_before: the latter, and before a layer was five kernels)?",
        command="python -m experiments.benchmarks.decode --name=decode_h200",
        cost="10 minutes, one GPU",
        expected="SISO 180M 0.31 ms a token at batch 1, 0.43 at 8, 1.35 at 128; top-k and top-p at most 0.2 ms more",
        result="benchmarks/results/decode_h200.json",
        got=decode_speed,
    ),
    Experiment(
        question="And of 1.5B parameters?",
        command="python -m experiments.benchmarks.decode --models=siso-1.5b --samplings=plain --what=decode,prefill "
        "--name=decode_h200_1b",
        cost="5 minutes, one GPU",
        expected="1.7 ms a token at batch 1, 2.0 at 8, 6.5 at 128",
        result="benchmarks/results/decode_h200_1b.json",
        got=decode_speed,
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
        question="What limits a training step on a pod of TPUs, and does it fit (no TPU)?",
        command="python -m experiments.benchmarks.pods",
        cost="2 hours, 2 cores",
        expected="1.5B on 256 v5e: peak at most 5 GB, 3 GB sent a step beside activations; compute limits every step",
        result="benchmarks/results/pods.json",
        got=pod_steps,
    ),
    Experiment(
        question="What do two GPUs do in the time of one, by each axis of the mesh, and is it the same?",
        command="python -m experiments.benchmarks.meshes",
        cost="15 minutes, two GPUs of one host",
        expected="float32 losses equal to 1e-5; rows of 131,072 tokens a device over sequence within 5% of one device",
        result="benchmarks/results/meshes_h200.json",
        got=two_devices,
    ),
    Experiment(
        question="What does a restore onto another mesh hold at its peak?",
        command="python -m experiments.benchmarks.restore",
        cost="2 minutes, 2 cores, 7 GB",
        expected="a device its part and no more",
        result="benchmarks/results/restore_cpu.json",
        got=restores,
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


def bits_per_byte(result: dict) -> str:
    """Read the bits per byte at the trained length."""
    return f"{significant(result['rows'][0]['bits_per_byte'])} after {result['seconds']['train']:.0f} s"


def best_rate(result: dict, *, variant: str) -> str:
    """Read a sweep's metric of each of a variant's seeds, at its best learning rate."""
    metric = result["metric"]
    rows = comparison.at_best_rate(comparison.by_variant(result["rows"])[variant], metric)
    return ", ".join(f"{100 * comparison.value(row, metric):.0f}" for row in rows)


def layer_training(result: dict) -> str:
    """Read how many times faster than the peer a layer and its gradients are."""
    rows = [row for row in result["rows"] if row["what"] == "forward+backward"]
    return " / ".join(f"{significant(row['ratio'])}x" for row in rows)


def milliseconds(result: dict, *cases: str, what: str) -> str:
    """Read the times of cases in the Hopper kernels, in the file's order."""
    rows = [row for row in result["rows"] if row["implementation"] == "mosaic_gpu" and row["case"] in cases]
    rows = [row for row in rows if row["what"] == what]
    return f"{' / '.join(significant(row['ms']) for row in rows)} ms"


def a_token(result: dict) -> str:
    """Read the times a token of the loop that `generate` runs, by batch."""
    return f"{' / '.join(significant(row['ms']) for row in generated(result).values())} ms"


def best_steps(result: dict) -> str:
    """Read each model's fastest step, and its share of the device's peak."""
    best = {}
    for row in sorted(result["rows"], key=lambda row: row["mfu"]):
        best[row["model"]] = row
    rows = [best[model] for model in dict.fromkeys(row["model"] for row in result["rows"])]
    rates, shares = ([row[name] for row in rows] for name in ("tokens_per_second", "mfu"))
    return f"{' / '.join(map(significant, rates))} tokens/s ({' / '.join(f'{100 * share:.0f}' for share in shares)}%)"


def kernel_cycles(result: dict) -> str:
    """Read the smallest and the largest part of plain XLA's cycles that the TPU kernels take."""
    parts = [row["mega_cycles_over_plain"] for row in result["rows"] if "mega_cycles_over_plain" in row]
    return f"{significant(min(parts))} to {significant(max(parts))}"


HEADLINES = (
    Headline("Bits a byte of held-out Python source", "results/text.json", bits_per_byte, "make run"),
    Headline(
        "Parity at 256 bits, three seeds", "results/parity.json", partial(best_rate, variant="mamba3"), "make parity"
    ),
    Headline(
        "Layer over mamba3-jax, SISO / R 4",
        "benchmarks/results/layer_cpu.json",
        layer_training,
        "experiments.benchmarks.layer",
    ),
    Headline(
        "Op, 16 x 2,048, training: SISO / R 4",
        "benchmarks/results/ssm_h200.json",
        lambda result: milliseconds(result, "siso", "mimo4", what="forward+backward"),
        "experiments.benchmarks.ssm",
    ),
    Headline(
        "Op, one token of 128 rows: SISO / R 4",
        "benchmarks/results/ssm_h200.json",
        lambda result: milliseconds(result, "siso_decode", "mimo4_decode", what="decode"),
        "experiments.benchmarks.ssm",
    ),
    Headline(
        "180M training step: SISO / R 4",
        "benchmarks/results/train_h200.json",
        best_steps,
        "experiments.benchmarks.train",
    ),
    Headline(
        "1.5B training step, SISO", "benchmarks/results/train_h200_1b.json", best_steps, "experiments.benchmarks.train"
    ),
    Headline(
        "180M, a decoded token: 1 / 8 / 128 rows",
        "benchmarks/results/decode_h200.json",
        a_token,
        "experiments.benchmarks.decode",
    ),
    Headline(
        "1.5B, a decoded token: 1 / 8 / 128 rows",
        "benchmarks/results/decode_h200_1b.json",
        a_token,
        "experiments.benchmarks.decode",
    ),
    Headline(
        "TPU kernels' cycles, over plain XLA's",
        "benchmarks/results/tpu_aot.json",
        kernel_cycles,
        "experiments.benchmarks.tpu_aot",
    ),
)
