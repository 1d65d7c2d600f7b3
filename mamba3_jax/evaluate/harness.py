"""Run tasks of lm-eval (EleutherAI's harness, 0.4.13) from a local folder on a model of ours; nothing is downloaded.

A task is a YAML file, https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/task_guide.md. Its data are
files: `dataset_path: json` and `dataset_kwargs: {data_files: {test: test.jsonl}}`, where relative paths begin at
--tasks_folder. lm-eval is imported when tasks are loaded; what it and `datasets` write goes into a folder that ends
with the process.
"""

import contextlib
import functools
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba3_jax.config import listed
from mamba3_jax.evaluate.harness_model import HarnessModel

HOME = "mamba3_jax_lm_eval_"  # how the name of that folder begins; it is a temporary one
# Environment variables, which the packages read when they are imported.
OFFLINE = {
    **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    **dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"), "1"),
}
SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


class TaskError(ValueError):
    """A task, its data or its answers are not what lm-eval or the model can read. The message is for the user."""


class Asked(NamedTuple):
    """Tasks that are loaded, as `lm_eval.evaluator.evaluate` takes them."""

    tasks: dict[str, Any]
    limit: int | None


@functools.cache
def home() -> tempfile.TemporaryDirectory:
    """Make the folder of what the packages keep. It ends with the process: they read its name once, when imported."""
    return tempfile.TemporaryDirectory(prefix=HOME)


def load(names: Sequence[str], folder: str, limit: int | None = None, shots: int | None = None) -> Asked:
    """Load tasks, groups or tags of a folder with their data.

    Args:
        names: of tasks, groups or tags, as the YAML files in the folder or its subfolders give them.
        folder: of the YAML files.
        limit: how many documents of a task to take; None: all.
        shots: solved examples before a question; None: as the task says. A task that says 0 keeps it, as in lm-eval.

    Raises:
        TaskError: lm-eval is not installed, there is no such folder or task, or a task or its data cannot be read.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise TaskError(f"--tasks_folder={folder} is not a folder")
    os.environ.update(OFFLINE | {"HF_HOME": home().name})
    try:
        import lm_eval
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise TaskError(f"--tasks take the package lm-eval ({error}): pip install 'mamba3_jax[lm-eval]'") from None
    logging.getLogger(lm_eval.__name__).setLevel(logging.ERROR)  # it warns of every default
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs as an error it raises too
    # Tasks and the choice of solved examples draw from these; lm-eval's own command seeds them alike.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name not in manager.all_tasks:
            raise TaskError(unknown(name, folder, manager))
        with heard() as said:
            try:
                with contextlib.chdir(folder):  # where `datasets` looks for files of relative paths
                    loaded = manager.load([name])
            except Exception as error:
                if isinstance(error, KeyError) and error.args[0] in SPLITS:
                    said.append(f"of a split without a file the YAML says {SPLITS[error.args[0]]}: null")
                if isinstance(error, StopIteration):
                    said.append("a file of its data has no document")
                raise TaskError("; ".join([f"--tasks={name} of {folder}: {cause(error)}", *said])) from None
        found = {kind: found[kind] | of_kind for kind, of_kind in loaded.items()}
    for task in found["tasks"].values():
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return Asked(found, limit)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what lm-eval logs as errors, such as the name of an unknown metric, instead of printing it."""
    said, handler, logger = [], logging.Handler(logging.ERROR), logging.getLogger("lm_eval")
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def cause(error: BaseException) -> str:
    """Return the first cause of an error of the packages, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def unknown(name: str, folder: Path, manager) -> str:
    """Say that there is no such task, which tasks there are, and which files lm-eval left out, unable to read them."""
    from lm_eval.tasks._yaml_loader import load_yaml

    skipped = []
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            skipped.append(f"; {path} cannot be read: {cause(error)}")
    return f"--tasks={name}: {folder} has no such task, only {listed(manager.all_tasks) or 'none'}{''.join(skipped)}"


def evaluate(asked: Asked, model, params, codec, *, say: Callable[[str], None] | None = None) -> dict[str, dict]:
    """Return the result of each task and group: {name: {"version", "shots", "documents", "metrics": {name: value}}}.

    A metric has lm-eval's name, and its filter in brackets where it has one. Where it is the mean over documents,
    NAME_stderr is its standard error; lm-eval would bootstrap that of other metrics, which is left out.

    Raises:
        TaskError: documents do not have what a task asks for, or a row does not fit into memory.
        FloatingPointError: the model's logits are not numbers.
    """
    from lm_eval import evaluator

    answers = wrapped(model, params, codec, say)
    try:
        found = evaluator.evaluate(answers, asked.tasks, limit=asked.limit, bootstrap_iters=0)
    except Exception as error:
        if answers.running:
            raise
        why = cause(error)
        if "larger than population" in why:  # of random.sample
            why += "; --shots, or a task's num_fewshot, are more than the documents that they are drawn from"
        raise TaskError(f"--tasks={','.join(asked.tasks['tasks'])}: {why}") from None
    return {
        name: {
            "version": found["versions"].get(name),
            "shots": found["n-shot"].get(name),
            "documents": row.get("sample_len", row.get("sample_count")),
            "metrics": metrics(row, asked.tasks["tasks"].get(name), found["samples"].get(name, ())),
        }
        for name, row in found["results"].items()
    }


def wrapped(model, params, codec, say: Callable[[str], None] | None = None):
    """Return a model of lm-eval's class that answers as `HarnessModel` does."""
    from lm_eval.api.model import TemplateLM

    return type("Mamba3JAX", (HarnessModel, TemplateLM), {})(model, params, codec, say)


def metrics(row: dict, task, samples: Sequence[dict]) -> dict[str, float]:
    """Return the numbers in a row of lm-eval's results, whose keys are "metric,filter"; means get a standard error."""
    from lm_eval.api.metrics import mean, mean_stderr

    found = {}
    for key, number in row.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        found[name] = float(number)
        values = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
        if task is not None and task.aggregation().get(metric) is mean and len(values) > 1:
            found[f"{name}_stderr"] = float(mean_stderr(values))
    return found


def table(results: dict[str, dict]) -> str:
    """Return the results as text, a line a metric."""
    width = max(4, *map(len, results))
    lines = [f"  {'task':{width}}  version  shots  documents     value   stderr  metric"]
    for name, result in results.items():
        head = f"  {name:{width}}  {result['version']!s:>7}  {result['shots']!s:>5}  {result['documents']!s:>9}"
        for metric, number in result["metrics"].items():
            error = result["metrics"].get(f"{metric}_stderr")
            if not metric.endswith("_stderr"):
                shown = f"{number:.4f}" if abs(number) < 1000 else f"{number:.5g}"
                lines.append(f"{head}  {shown:>8}  {'' if error is None else f'{error:.4f}':>7}  {metric}")
    return "\n".join(lines)
