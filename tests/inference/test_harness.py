"""Tasks of lm-eval, run by lm-eval itself from a folder: their numbers are those of plain calls of the model."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mamba3_jax import checkpoint
from mamba3_jax.evaluate import harness
from mamba3_jax.evaluate.harness_model import wishes
from mamba3_jax.generate import Sampling, generate
from tests.helpers import GOLDEN
from tests.inference.tiny import run_config, tiny
from tests.inference.with_lm_eval import FOLDER

ROOT = Path(__file__).parents[2]
TEXTS = [f"{name} went to the {place}" for name in ("Ann", "Böb", "Cy") for place in ("sea", "old mill")]
CHOICES = [" a", " two b", " c"]
UNTIL = "w"

needs_lm_eval = pytest.mark.skipif(not (FOLDER / "installed").exists(), reason="make test-all gets lm-eval")


def process(*arguments, **environment):
    """(exit status, stdout, stderr) of with_lm_eval.py."""
    line = [sys.executable, "-m", "tests.inference.with_lm_eval", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def log_p(ids):
    """Log-probabilities after every byte of a text in one plain call."""
    fixed_BL = np.zeros((1, 64), np.int32)
    fixed_BL[0, : len(ids)] = list(ids)
    return np.asarray(log_p.run(fixed_BL))[0, : len(ids)]


def score(context: str, continuation: str):
    """(log p(continuation | context), whether it is greedy); an empty context is byte 0."""
    before, after = context.encode() or b"\0", continuation.encode()
    log_p_TV = log_p(before + after)[len(before) - 1 : -1]
    at = np.arange(len(after)), list(after)
    return float(log_p_TV[at].sum(dtype=np.float64)), bool((log_p_TV.argmax(axis=-1) == at[1]).all())


def answer(prompt: str) -> str:
    """What follows a prompt, alone, up to UNTIL."""
    (row,) = generate(*tiny("MA", 256), [list(prompt.encode())], tokens=12, sampling=Sampling(0.0), stop_ids=[0]).ids
    return bytes(row).decode(errors="replace").split(UNTIL)[0]


def task(name: str, kind: str, text: str, target: str, data: str, more: str = "") -> str:
    """The YAML of a task whose data stand beside it."""
    return (
        f"task: {name}\noutput_type: {kind}\ndoc_to_text: {json.dumps(text)}\ndoc_to_target: {json.dumps(target)}\n"
        f"target_delimiter: ''\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        f"test_split: test\n{more}"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of every kind, and what plain calls of the byte model make of them."""
    model, params = tiny("MA", 256)
    log_p.run = jax.jit(lambda tokens_BL: jax.nn.log_softmax(model.apply({"params": params}, tokens_BL)[0]))
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, text in enumerate(TEXTS):
        lls = [score(text, choice)[0] for choice in CHOICES]
        best = int(np.argmax(lls))
        follows = answer(text) if number % 2 else "nothing"
        greedy = bytes([int(log_p(text.encode())[-1].argmax())]).decode(errors="replace") if number < 2 else " z"
        label = (best + (number == 3)) % 3  # one of six is not the model's
        rows.append({"text": text, "choices": CHOICES, "label": label, "follows": follows, "next": greedy})
    (folder / "data").mkdir()
    (folder / "data/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, mean = "data/test.jsonl", "aggregation: mean, higher_is_better: true"
    end = (
        f"generation_kwargs: {{until: [{UNTIL!r}], max_gen_toks: 12}}\nmetric_list: [{{metric: exact_match, {mean}}}]\n"
    )
    for name, yaml in {
        "choice": task("choice", "multiple_choice", "{{text}}", "label", data, "doc_to_choice: choices\n"),
        "cloze": task("cloze", "loglikelihood", "{{text}}", "{{next}}", data),
        "rolling": task("rolling", "loglikelihood_rolling", "", "{{text}}", data),
        "answer": task("answer", "generate_until", "{{text}}", "{{follows}}", data, end),
        "both": "group: both\ntask: [choice, cloze]\naggregate_metric_list: [{metric: acc}]\n",
    }.items():
        (folder / f"{name}.yaml").write_text(yaml)
    return folder, rows


@pytest.mark.full
@needs_lm_eval
def test_tasks_of_every_kind(folder, tmp_path):
    """Nothing is written where a user's own copies would be, and the report keeps what it had."""
    folder, rows = folder
    config = run_config("MA", train_glob=__file__, valid_glob=str(ROOT / "README.md"))
    checkpoint.save_model(tmp_path / "run", config, tiny("MA", 256)[1], step=3)
    report = tmp_path / "run/evaluation/step_3.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"step": 3, "results": ["kept"], "tasks": {"old": {"metrics": {"acc": 1.0}}}}))
    arguments = [f"--workdir={tmp_path}/run", "--tasks=both,rolling,answer", f"--tasks_folder={folder}"]
    home = tmp_path / "home"
    home.mkdir()
    status, out, err = process("command", "evaluate", *arguments, HOME=str(home), HF_HOME=f"{home}/huggingface")
    assert status == 0, err
    assert list(home.iterdir()) == []
    written = json.loads(report.read_text())
    assert written["results"] == ["kept"]
    tasks = written["tasks"]
    assert list(tasks) == ["old", "choice", "cloze", "rolling", "answer", "both"]
    got = {name: tasks[name]["metrics"] for name in tasks}
    assert got["old"] == {"acc": 1.0}

    lls = [[score(row["text"], choice)[0] for choice in CHOICES] for row in rows]
    by_length = [[ll / len(choice) for ll, choice in zip(of, CHOICES, strict=True)] for of in lls]
    assert got["choice"]["acc"] == pytest.approx(5 / 6)
    assert got["choice"]["acc_stderr"] == pytest.approx(math.sqrt(5 / 6 * 1 / 6 / 5))
    right = [int(np.argmax(of)) == row["label"] for of, row in zip(by_length, rows, strict=True)]
    assert got["choice"]["acc_norm"] == pytest.approx(np.mean(right))

    cloze = [score(row["text"], row["next"]) for row in rows]
    assert got["cloze"]["perplexity"] == pytest.approx(math.exp(-np.mean([ll for ll, _ in cloze])), rel=1e-5)
    assert got["cloze"]["acc"] == pytest.approx(np.mean([greedy for _, greedy in cloze]))
    assert got["both"]["acc"] == pytest.approx((got["choice"]["acc"] + got["cloze"]["acc"]) / 2)

    whole = sum(score("", text)[0] for text in TEXTS)
    words, size = sum(len(re.split(r"\s+", text)) for text in TEXTS), sum(len(text.encode()) for text in TEXTS)
    assert got["rolling"]["word_perplexity"] == pytest.approx(math.exp(-whole / words), rel=1e-4)
    assert got["rolling"]["bits_per_byte"] == pytest.approx(-whole / size / math.log(2), rel=1e-5)

    assert got["answer"]["exact_match"] == pytest.approx(0.5)
    assert tasks["answer"]["documents"] == 6
    assert tasks["answer"]["shots"] == 0
    assert "launch.evaluate" in tasks["answer"]["command"]
    assert f"{got['cloze']['acc']:.4f}" in out


@pytest.mark.full
@needs_lm_eval
def test_an_official_directory_with_a_tokenizer(folder, tmp_path):
    folder, _ = folder
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(GOLDEN / "lm_siso_mlp" / name)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["</s>", "?", *" ".join(TEXTS).split()])}, "?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    arguments = ["--tasks=choice,answer", f"--tasks_folder={folder}", "--limit=2", "--shots=1"]
    arguments += ["--compute_dtype=bfloat16", f"--output={tmp_path}/out.json"]
    status, _, err = process("command", "evaluate", f"--workdir={tmp_path}", *arguments)
    assert status == 0, err
    tasks = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert [(task["documents"], task["shots"]) for task in tasks.values()] == [(2, 1), (2, 1)]


@pytest.mark.full
@needs_lm_eval
def test_mistakes_of_tasks_are_one_line(tmp_path):
    whole = json.dumps({"text": "a b"}) + "\n"
    for name, text in {"whole": whole, "damaged": whole + '{"text": "a', "other": json.dumps({"tex": "a b"})}.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
        (tmp_path / f"{name}.yaml").write_text(task(name, "loglikelihood", "{{text}}", "b", f"{name}.jsonl"))
    (tmp_path / "gone.yaml").write_text(task("gone", "loglikelihood", "{{text}}", "b", "gone.jsonl"))
    (tmp_path / "remote.yaml").write_text("task: remote\noutput_type: loglikelihood\ndataset_path: org/name\n")
    (tmp_path / "metric.yaml").write_text(
        task("metric", "loglikelihood", "{{text}}", "b", "whole.jsonl", "metric_list: [{metric: no_such}]\n")
    )
    (tmp_path / "broken.yaml").write_text("task: [broken\n")
    (tmp_path / "split.yaml").write_text(
        task("split", "loglikelihood", "{{text}}", "b", "whole.jsonl", "validation_split: validation\n")
    )
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.yaml").write_text(task("empty", "loglikelihood", "{{text}}", "b", "empty.jsonl"))
    names = ["whole", "nowhere", "damaged", "other", "gone", "remote", "metric", "split", "empty"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    status, out, err = process("mistakes", tmp_path, *names, TMPDIR=str(temporary))
    assert status == 0, err
    assert list(temporary.iterdir()) == []
    lines = dict(zip(names, json.loads(out.splitlines()[-1]), strict=True))
    assert lines.pop("whole") is None
    for name, line in lines.items():
        assert line.startswith(f"--tasks={name}")
        assert "\n" not in line
    assert lines["split"].endswith("of a split without a file the YAML says validation_split: null")
    assert lines["empty"].endswith("a file of its data has no document")
    assert "has no such task, only damaged, empty, gone, metric" in lines["nowhere"]
    assert "broken.yaml cannot be read: ParserError: " in lines["nowhere"]
    assert "JSON" in lines["damaged"]
    assert "'text' is undefined" in lines["other"]
    assert "gone.jsonl" in lines["gone"]
    assert "org/name" in lines["remote"]
    assert "no_such" in lines["metric"]


ANSWERS = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
# Of the tasks of the paper's language models: lm-eval's own YAML, the split it scores, and a document of the data.
PAPER = {
    "lambada_openai": ("lambada/lambada_openai", "test", {"text": "He gave it to a man called Bob"}),
    "hellaswag": (
        "hellaswag/hellaswag",
        "validation",
        {"activity_label": "Cooking", "ctx_a": "A.", "ctx_b": "he", "endings": ["eats.", "sleeps."], "label": "1"},
    ),
    "piqa": ("piqa/piqa", "validation", {"goal": "boil water", "sol1": "heat it", "sol2": "cool it", "label": 0}),
    "arc_easy": ("arc/arc_easy", "test", ANSWERS),
    "arc_challenge": ("arc/arc_challenge", "test", ANSWERS),
    "winogrande": (
        "winogrande/default",
        "validation",
        {"sentence": "Ann saw Eve but _ left.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    ),
    "openbookqa": ("openbookqa/openbookqa", "test", ANSWERS | {"question_stem": "The sun is"}),
}


@pytest.mark.full
@needs_lm_eval
def test_the_tasks_of_the_paper_run_from_copies_of_their_data(tmp_path):
    """By the lines that experiments/README.md shows."""
    for name, (yaml, split, document) in PAPER.items():
        (tmp_path / f"{name}.jsonl").write_text(2 * (json.dumps(document) + "\n"))
        others = [f"{field}: null\n" for other, field in harness.SPLITS.items() if other != split]
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {FOLDER}/lm_eval/tasks/{yaml}.yaml\ntask: {name}_local\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs: {{data_files: {{{split}: {name}.jsonl}}}}\n{''.join(others)}"
        )
    status, out, err = process("mistakes", tmp_path, *(f"{name}_local" for name in PAPER))
    assert (status, json.loads(out.splitlines()[-1])) == (0, [None] * len(PAPER)), err


@pytest.mark.full
@needs_lm_eval
def test_windows_boundaries_and_solved_examples_are_those_of_lm_eval(folder):
    status, out, err = process("convention", folder[0])
    assert (status, out) == (0, ""), err


def test_wishes_of_an_answer_are_read():
    """As `lm_eval.models.utils.normalize_gen_kwargs` reads them."""
    assert wishes({}) == (256, [], Sampling(temperature=0.0))
    assert wishes({"until": "\n", "max_gen_toks": 8, "max_tokens": 9}) == (8, ["\n"], Sampling(temperature=0.0))
    drawn = {"until": ["a", "", "b"], "max_new_tokens": 3, "do_sample": True, "temperature": 0.5, "top_k": 4}
    assert wishes(drawn) == (3, ["a", "b"], Sampling(0.5, 4))
    assert wishes(drawn | {"do_sample": False})[2] == Sampling(temperature=0.0)
    with pytest.raises(ValueError, match="temperature=-1"):
        wishes({"temperature": -1})


def test_without_lm_eval_one_line_says_how_to_get_it(monkeypatch, tmp_path):
    for name in [*harness.OFFLINE, "HF_HOME"]:
        monkeypatch.setenv(name, "")  # and put back
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(harness.TaskError, match=r"take the package lm-eval .*: pip install 'mamba3_jax\[lm-eval\]'$"):
        harness.load(["any"], tmp_path)
    with pytest.raises(harness.TaskError, match="is not a folder"):
        harness.load(["any"], tmp_path / "none")
