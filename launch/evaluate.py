"""Evaluate a checkpoint on the held-out split of what it was trained on.

    python -m launch.evaluate --workdir=DIR [--step=N] [--lengths=256,512,1024] [--tokens=131072]
                              [--valid_glob=GLOB] [--windows=W:S] [--by_document] [--tokenizer=tokenizer.json]
                              [--eos=TOKEN] [--output=PATH]
    python -m launch.evaluate --workdir=DIR --tasks=NAME,... --tasks_folder=FOLDER [--limit=N] [--shots=N]

Prints a table (text: loss, perplexity, bits per byte, loss by position, past the trained length too; a task: accuracy
by length), then writes it to PATH, by default DIR/evaluation/step_N.json; a score that is not finite is null there.
DIR may be a directory in the official layout, and may be read-only if PATH is given. With several processes
(`launch/hosts.py`) each scores a part of the rows.

--by_document adds whole documents, each from an empty state, and --windows=W:S windows of W tokens that slide over them
by S (`mamba3_jax/evaluate/documents.py`). They score every token once, and perplexities of words and bytes are defined
as in lm-eval.

--tasks runs tasks of lm-eval (pip install 'mamba3_jax[lm-eval]') from the YAML files of FOLDER and downloads nothing
(`mamba3_jax/evaluate/harness.py`). The report keeps the entries that other runs wrote of the same checkpoint.
Documents, windows and tasks run on one device, and every process runs all of them.
"""

import dataclasses
import sys
from pathlib import Path

import jax
from absl import flags

from launch.common import define_path, fail, run, user_errors
from launch.data import codec_of, data_with, held_out
from launch.provenance import provenance
from mamba3_jax import checkpoint, files, memory
from mamba3_jax.config import DataConfig
from mamba3_jax.data.synthetic import TASKS
from mamba3_jax.evaluate import documents, language, tasks
from mamba3_jax.evaluate.likelihood import Likelihoods
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
WINDOWS = flags.DEFINE_list("windows", [], "W:S: also windows of W tokens by strides of S; several, comma-separated")
BY_DOCUMENT = flags.DEFINE_bool("by_document", False, "also every document whole, from an empty state")
TASK_NAMES = flags.DEFINE_list("tasks", [], "tasks of lm-eval to run, comma-separated, instead of held-out data")
TASKS_FOLDER = define_path("tasks_folder", None, "where the YAML files of the tasks are")
LIMIT = flags.DEFINE_integer("limit", None, "how many documents of a task to run; default all", lower_bound=1)
SHOTS = flags.DEFINE_integer("shots", None, "how many solved examples precede a question; default as the task says", 0)
TOKENIZER = define_path("tokenizer", None, "tokenizer.json instead of the checkpoint's own")
EOS = flags.DEFINE_string("eos", None, "the token, or its id, that ends a document; default as data.eos of the config")
OUTPUT = define_path("output", None, "where the report goes; default evaluation/step_N.json in the workdir")
COMPUTE_DTYPE = flags.DEFINE_string("compute_dtype", None, "float32 or bfloat16; default as trained")


def lengths(data: DataConfig) -> list[int | str]:
    """Read --lengths as numbers, or "LENGTH:PAIRS" of a task with pairs."""
    if not LENGTHS.value:
        return []
    try:
        if data.source in TASKS:
            return [tasks.written(setting) for setting in tasks.settings_of(data, LENGTHS.value)]
        if wrong := [part for part in LENGTHS.value if not part.isdecimal()]:
            raise ValueError(f"{wrong[0]!r} is not a length in tokens, as held-out text has")
        return language.check_lengths([int(part) for part in LENGTHS.value])
    except ValueError as error:
        raise ValueError(f"--lengths={','.join(LENGTHS.value)}: {error}") from None


def check_memory(model, data, wanted: list[int | str]) -> None:
    """Raise ValueError where rows of the longest length do not fit beside the parameters, or a task has no such row."""
    if data.source in TASKS:
        longest = max(tasks.settings_of(data, wanted)).length
    else:
        longest = max(wanted, default=4 * data.length)
    rows = max(1, min(data.batch, TOKENS.value // longest)) if TOKENS.value else data.batch
    memory.fit_device(memory.carrying(model, rows, longest))


def check_together() -> None:
    """Raise ValueError for a flag that would have no effect beside, or without, --tasks."""
    alone = (
        ("limit", "shots") if not TASK_NAMES.value else ("lengths", "tokens", "valid_glob", "windows", "by_document")
    )
    if given := [name for name in alone if flags.FLAGS[name].present]:
        beside = "held-out data, not of --tasks" if TASK_NAMES.value else "--tasks, which are not given"
        value = flags.FLAGS[given[0]].value
        said = ",".join(value) if isinstance(value, list) else value
        raise ValueError(f"--{given[0]}={said} is of {beside}")


def main(_argv):
    with user_errors():
        if bool(TASK_NAMES.value) != bool(TASKS_FOLDER.value):
            raise ValueError("--tasks=NAME,... and --tasks_folder=FOLDER go together")
        check_together()
        if TOKENS.value < 0:
            raise ValueError(f"--tokens={TOKENS.value} is negative; 0 takes all")
        windows()
        steps = checkpoint.all_steps(WORKDIR.value)
        step = STEP.value if STEP.value is not None else (steps[-1] if steps else 0)
        target = Path(OUTPUT.value or f"{WORKDIR.value}/evaluation/step_{step}.json").expanduser()
        before = written(target, step)
        if not jax.process_index():
            check_written(target)
        config, params = load_run(WORKDIR.value, step=STEP.value)
        model = build(config, **({"compute_dtype": COMPUTE_DTYPE.value} if COMPUTE_DTYPE.value else {}))

    evaluated = of_tasks if TASK_NAMES.value else of_held_out
    report, text = evaluated(config, model, params, provenance(), before)
    if jax.process_index():
        return
    print(f"{WORKDIR.value}, step {step}\n{text}", flush=True)
    write(target, {"step": step, **report})
    print(f"written to {target}")


def of_held_out(config, model, params, origin: dict, before: dict) -> tuple[dict, str]:
    """Return (the report, its table) of held-out text, or of the generated task that the model was trained on."""
    with user_errors():
        data = held_out(config, VALID_GLOB.value, TOKENIZER.value, EOS.value)
        wanted, forms = lengths(data), windows()
        check_memory(model, data, wanted)
        scorer = Likelihoods(model, params)
        if forms:
            found, eos = documents.held_out(data, TOKENS.value)
            asked = documents.ask(scorer, found, eos, forms)  # raises now for what does not fit

    generated = data.source in TASKS
    kind, trained = (tasks, data.task_lengths[-1]) if generated else (language, data.length)
    results = kind.evaluate(model, params, data, lengths=wanted, max_tokens=TOKENS.value, say=say())
    report = {**origin, "data": dataclasses.asdict(data), "results": results}
    if generated:
        return report, kind.table(results, trained)
    report |= {name: before[name] for name in before if name == "tasks"}
    if forms:
        report["documents"] = documents.evaluate(scorer, found, asked, say=say())
    return report, language.table(results, trained, documents.lines(report.get("documents", ())))


def of_tasks(config, model, params, origin: dict, before: dict) -> tuple[dict, str]:
    """Return (the report, its table) of tasks of lm-eval; the report keeps all other entries of the one before."""
    from mamba3_jax.evaluate import harness  # needs a package that others do not

    with user_errors():
        data = data_with(config.data, TOKENIZER.value, EOS.value)
        if data.source in TASKS:
            raise ValueError(f"{WORKDIR.value} was trained on {data.source}, which is no text, and --tasks ask in text")
        codec = codec_of(data, config.model.vocab_size)
        if codec is None:
            raise ValueError("this checkpoint names no tokenizer: give --tokenizer=tokenizer.json")
        asked = harness.load(TASK_NAMES.value, TASKS_FOLDER.value, LIMIT.value, SHOTS.value)
    try:
        results = harness.evaluate(asked, model, params, codec, say=say())
    except (harness.TaskError, FloatingPointError) as error:
        fail(error)
    entries = {name: {**result, **origin} for name, result in results.items()}
    return before | {"tasks": before.get("tasks", {}) | entries}, harness.table(results)


def windows() -> list[documents.Window]:
    """Read --windows and --by_document; the whole document comes last."""
    try:
        found = [documents.window(text) for text in WINDOWS.value]
    except ValueError as error:
        raise ValueError(f"--windows={','.join(WINDOWS.value)}: {error}") from None
    return found + [documents.Window()] * BY_DOCUMENT.value


def say():
    """Return the function that prints a line of progress in the first process; None in the others."""
    return None if jax.process_index() else lambda line: print(line, file=sys.stderr, flush=True)


def written(target: Path, step: int) -> dict:
    """Return the report of this step that the file holds, {} without one; ValueError for a file that is no report."""
    try:
        report = files.read_json(target)
    except OSError:  # there is none, or it cannot be read: `check_written` says whether it can be written
        return {}
    except ValueError as error:
        raise ValueError(f"{error}; --output=PATH writes another one") from None
    known = isinstance(report, dict) and "step" in report and ("results" in report or "tasks" in report)
    if not known or not isinstance(report.get("tasks", {}), dict):
        raise ValueError(f"{target} is there and not a report; --output=PATH writes another one")
    return report if report["step"] == step else {}


def check_written(target: Path) -> None:
    """Raise OSError where the report cannot be written, before anything is scored."""
    try:
        files.check_writable(target)
    except OSError as error:
        raise OSError(f"{error}; --output=PATH writes it elsewhere") from None


def write(target: Path, report: dict) -> None:
    """Write the report, after the table was printed; where that fails, one line says how to write it elsewhere."""
    try:
        with files.writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(target, or_null(report))
    except OSError as error:
        fail(f"{error}; --output=PATH writes it elsewhere")


if __name__ == "__main__":
    run(main)
