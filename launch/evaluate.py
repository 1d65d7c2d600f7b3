"""Evaluate a checkpoint on the held-out split of what it was trained on.

    python -m launch.evaluate --workdir=DIR [--step=N] [--lengths=256,512,1024] [--tokens=131072]
                              [--valid_glob=GLOB] [--tokenizer=tokenizer.json] [--eos=TOKEN]

Prints a table (text: loss, perplexity, bits per byte, loss by position, past the trained length too; a task: accuracy
by length) and writes it to DIR/evaluation/step_N.json. DIR may be a directory in the official layout.
"""

import dataclasses
import datetime
import json
import os
import sys
from pathlib import Path

import jax
from absl import flags

from launch.common import codec_of, data_with, run, user_errors
from mamba3_jax import checkpoint
from mamba3_jax.data import loader
from mamba3_jax.evaluate import language, tasks
from mamba3_jax.load import build, load_run

WORKDIR = flags.DEFINE_string("workdir", None, "a workdir, or a directory in the official layout", required=True)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default the newest")
LENGTHS = flags.DEFINE_list("lengths", [], "lengths in tokens, comma-separated; default multiples of the trained one")
TOKENS = flags.DEFINE_integer(
    "tokens", 131072, "about how many to score for each length, in whole rows; 0: all there are"
)
VALID_GLOB = flags.DEFINE_string("valid_glob", None, "text files to evaluate on instead of the run's own")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer.json instead of the checkpoint's own")
EOS = flags.DEFINE_string("eos", None, "the token, or its id, that ends a document; default as data.eos of the config")
COMPUTE_DTYPE = flags.DEFINE_string("compute_dtype", None, "float32 or bfloat16; default as trained")


def data_of(config):
    """The run's data as the flags change it, checked before anything is compiled."""
    data = config.data
    if VALID_GLOB.value:
        data = dataclasses.replace(data, source="text", valid_glob=VALID_GLOB.value)
    data = data_with(data, TOKENIZER.value, EOS.value)
    if not data.tokenizer:
        raise ValueError("this checkpoint names no tokenizer: give --tokenizer=tokenizer.json")
    codec_of(data, config.model.vocab_size)
    next(loader(data, "valid", vocab_size=config.model.vocab_size))
    return data


def lengths() -> list[int]:
    """--lengths as numbers."""
    try:
        return language.check_lengths([int(part) for part in LENGTHS.value]) if LENGTHS.value else []
    except ValueError as error:
        raise ValueError(f"--lengths={','.join(LENGTHS.value)}: {error}") from None


def main(_argv):
    with user_errors():
        wanted = lengths()
        if TOKENS.value < 0:
            raise ValueError(f"--tokens={TOKENS.value} is negative; 0 takes all")
        steps = checkpoint.all_steps(WORKDIR.value)
        config, params = load_run(WORKDIR.value, step=STEP.value)
        model = build(config, **({"compute_dtype": COMPUTE_DTYPE.value} if COMPUTE_DTYPE.value else {}))
        data, step = data_of(config), STEP.value if STEP.value is not None else (steps[-1] if steps else 0)
        target = Path(WORKDIR.value).expanduser() / "evaluation" / f"step_{step}.json"
        target.parent.mkdir(exist_ok=True)

    kind, trained = (tasks, data.parity_lengths[-1]) if data.source in tasks.CHANCE else (language, data.length)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    results = kind.evaluate(model, params, data, lengths=wanted, max_tokens=TOKENS.value, say=say)
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
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, target)
    print(f"written to {target}")


if __name__ == "__main__":
    run(main)
