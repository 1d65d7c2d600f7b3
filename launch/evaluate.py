"""Evaluate a checkpoint on the held-out split of what it was trained on.

    python -m launch.evaluate --workdir=DIR [--step=N] [--lengths=256,512,1024] [--tokens=131072]
                              [--valid_glob=GLOB] [--tokenizer=tokenizer.json] [--eos=TOKEN] [--output=PATH]

Prints a table (text: loss, perplexity, bits per byte, loss by position, past the trained length too; a task: accuracy
by length), then writes it to PATH, by default DIR/evaluation/step_N.json; a score that is not finite is null there.
DIR may be a directory in the official layout, and may be read-only where PATH is given. Of several processes
(`launch/hosts.py`) each scores a part of the rows.
"""

import dataclasses
import datetime
import json
import sys
from pathlib import Path

import jax
from absl import flags

from launch.common import define_path, fail, held_out, run, user_errors
from mamba3_jax import checkpoint, memory
from mamba3_jax.config import DataConfig
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import language, tasks
from mamba3_jax.finite import or_null
from mamba3_jax.load import build, load_run

WORKDIR = define_path("workdir", None, "a workdir, or a directory in the official layout", required=True)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default the newest")
LENGTHS = flags.DEFINE_list(
    "lengths",
    [],
    "lengths in tokens, or LENGTH:PAIRS of a task with pairs, comma-separated; default multiples of the trained one",
)
TOKENS = flags.DEFINE_integer(
    "tokens", 131072, "about how many to score for each length, in whole rows; 0: all there are"
)
VALID_GLOB = define_path("valid_glob", None, "text files to evaluate on instead of the run's own")
TOKENIZER = define_path("tokenizer", None, "tokenizer.json instead of the checkpoint's own")
EOS = flags.DEFINE_string("eos", None, "the token, or its id, that ends a document; default as data.eos of the config")
OUTPUT = define_path("output", None, "where the report goes; default evaluation/step_N.json in the workdir")
COMPUTE_DTYPE = flags.DEFINE_string("compute_dtype", None, "float32 or bfloat16; default as trained")


def lengths(data: DataConfig) -> list[int | str]:
    """--lengths as numbers; of a task with pairs "LENGTH:PAIRS" too."""
    if not LENGTHS.value:
        return []
    try:
        if data.source in TASKS:
            return [tasks.written(setting) for setting in tasks.settings_of(data, LENGTHS.value)]
        return language.check_lengths([int(part) for part in LENGTHS.value])
    except ValueError as error:
        raise ValueError(f"--lengths={','.join(LENGTHS.value)}: {error}") from None


def check_memory(model, data, wanted: list[int | str]) -> None:
    """Raise ValueError where rows of the longest length do not fit beside the parameters, or a task has none such."""
    if data.source in TASKS:
        longest = max(tasks.settings_of(data, wanted)).length
    else:
        longest = max(wanted, default=4 * data.length)
    rows = max(1, min(data.batch, TOKENS.value // longest)) if TOKENS.value else data.batch
    memory.fit_device(memory.carrying(model, rows, longest))


def main(_argv):
    with user_errors():
        if TOKENS.value < 0:
            raise ValueError(f"--tokens={TOKENS.value} is negative; 0 takes all")
        steps = checkpoint.all_steps(WORKDIR.value)
        config, params = load_run(WORKDIR.value, step=STEP.value)
        model = build(config, **({"compute_dtype": COMPUTE_DTYPE.value} if COMPUTE_DTYPE.value else {}))
        data = held_out(config, VALID_GLOB.value, TOKENIZER.value, EOS.value)
        wanted = lengths(data)
        step = STEP.value if STEP.value is not None else (steps[-1] if steps else 0)
        check_memory(model, data, wanted)
        target = Path(OUTPUT.value or f"{WORKDIR.value}/evaluation/step_{step}.json").expanduser()

    kind, trained = (tasks, data.task_lengths[-1]) if data.source in TASKS else (language, data.length)
    chief = jax.process_index() == 0
    say = (lambda line: print(line, file=sys.stderr, flush=True)) if chief else None
    results = kind.evaluate(model, params, data, lengths=wanted, max_tokens=TOKENS.value, say=say)
    if not chief:
        return
    print(f"{WORKDIR.value}, step {step}\n{kind.table(results, trained)}", flush=True)
    report = {
        "command": " ".join(["python -m launch.evaluate", *sys.argv[1:]]),
        "step": step,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": dataclasses.asdict(data),
        "results": results,
    }
    write(target, report)
    print(f"written to {target}")


def write(target: Path, report: dict) -> None:
    """Write the report; where that fails, the table has been printed and one line says how to write it elsewhere."""
    try:
        with checkpoint.writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.replace(target, json.dumps(or_null(report), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        fail(f"{error}; --output=PATH writes it elsewhere")


if __name__ == "__main__":
    run(main)
