"""Run by test_harness.py in processes of their own, which alone find lm-eval: after all that the environment has."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

FOLDER = Path(__file__).parents[2] / "build" / "lm_eval"


def command(name: str, *arguments: str) -> None:
    """Run python -m launch.name."""
    sys.argv = [f"launch.{name}", *arguments]
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)


def mistakes(folder: str, *names: str) -> None:
    """Print what loading each task of a folder raises, and running it where that raises nothing; one JSON list."""
    from mamba3_jax.data.vocabulary import Bytes
    from mamba3_jax.evaluate import harness
    from tests.inference.tiny import tiny

    found = []
    for name in names:
        try:
            harness.evaluate(harness.load([name], folder), *tiny("M", 256), Bytes())
            found.append(None)
        except harness.TaskError as error:
            found.append(str(error))
    print(json.dumps(found))


def convention(folder: str) -> None:
    """Windows, where a continuation begins, and which solved examples precede a question are lm-eval's own."""
    import contextlib

    import numpy as np
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from mamba3_jax.data.vocabulary import Bytes
    from mamba3_jax.evaluate import documents, harness
    from tests.inference.tiny import tiny

    for length in (1, 7, 8, 9, 11, 30):
        for size, stride in ((8, 8), (8, 3), (8, 1), (5, 4)):
            ids = list(range(1, 1 + length))
            theirs = get_rolling_token_windows(ids, 0, size, size - stride + 1)
            ours = documents.requests(np.array(ids), 0, documents.Window(size, stride))
            assert [tuple(map(list, one)) for one in ours] == [make_disjoint_window(one) for one in theirs]
    asked, model = [], harness.wrapped(*tiny("M", 256), Bytes())
    model._score = lambda requests, what: asked.extend(requests) or []
    texts = [("ab ", "c"), ("ab", " c"), ("", "c"), (" ", "c")]
    model.loglikelihood([SimpleNamespace(args=text) for text in texts])
    assert [(bytes(context), bytes(answer)) for context, answer in asked] == [
        (b"ab", b" c"),
        (b"ab", b" c"),
        (b"\0", b"c"),
        (b"\0", b" c"),
    ]
    model = harness.wrapped(*tiny("M", 256), Bytes())
    (ours,) = harness.evaluate(harness.load(["cloze"], folder, shots=2), *tiny("M", 256), Bytes()).values()
    with contextlib.chdir(folder):
        manager = TaskManager(include_path=folder, include_defaults=False)
        how = {"task_manager": manager, "num_fewshot": 2, "bootstrap_iters": 0, "log_samples": False}
        theirs = evaluator.simple_evaluate(model, tasks=["cloze"], **how)["results"]["cloze"]
    assert ours["metrics"]["perplexity"] == theirs["perplexity,none"]
    assert ours["metrics"]["acc"] == theirs["acc,none"]


if __name__ == "__main__":
    sys.path.append(str(FOLDER))
    what, *arguments = sys.argv[1:]
    {"command": command, "mistakes": mistakes, "convention": convention}[what](*arguments)
