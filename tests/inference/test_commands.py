"""The commands as a user runs them: what they print and write, and one line for a mistake."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from launch import evaluate
from launch.data import data_with
from mamba3_jax import checkpoint
from mamba3_jax.config import DataConfig
from mamba3_jax.convert.files import FORMATS
from mamba3_jax.data import tokenizer_copy
from mamba3_jax.generate import Sampling, generate
from tests.helpers import GOLDEN
from tests.inference.tiny import run_config, tiny

ROOT = Path(__file__).parents[2]
OFFICIAL = GOLDEN / "lm_siso_mlp"


def command(name, *arguments):
    """(exit status, stdout, stderr) of python -m launch.name."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", f"launch.{name}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def mistake(name, *arguments):
    """The one line that a command ends with instead of a result."""
    status, out, err = command(name, *arguments)
    assert (status, out) == (2, ""), (out, err)
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.splitlines()[-1] == line
    return line


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A workdir of an untrained byte model."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("train", "valid"):
        (folder / f"{name}.txt").write_text(f"the quick brown fox, {name}. " * 20)
    config = run_config(train_glob=str(folder / "train.txt"), valid_glob=str(folder / "valid.txt"))
    checkpoint.save_model(folder / "run", config, tiny("M", 256)[1], step=3)
    return folder / "run"


@pytest.fixture(scope="module")
def parity_run(tmp_path_factory):
    """A workdir of the same model, as if parity had been its task."""
    folder = tmp_path_factory.mktemp("parity")
    task = {"source": "parity", "task_lengths": (32,), "task_steps": (0,)}
    checkpoint.save_model(folder / "run", run_config("M", **task), tiny("M", 256)[1])
    return folder / "run"


def test_importing_is_light():
    code = "import mamba3_jax, sys; assert 'jax' not in sys.modules; assert callable(mamba3_jax.load); mamba3_jax.ssm"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_generate(text_run):
    arguments = ["--prompt=ab\n", "--prompt=", "--tokens=40", "--top_k=50", "--top_p=0.9", "--stop=\x01\x02\x03"]
    status, out, err = command("generate", f"--workdir={text_run}", *arguments)
    assert status == 0, err
    assert out.startswith("ab\n")
    assert out.splitlines()[-1].startswith("[prefill 2 tokens")
    assert "tokens/s" in out


@pytest.fixture(scope="module")
def word_run(tmp_path_factory):
    """A workdir of the same model with words for ids; the third that it draws after w1 <|user|> is <|end_turn|>."""
    folder, (model, params) = tmp_path_factory.mktemp("words"), tiny("M", 256)
    drawn = generate(model, params, [[1, 2]], tokens=8, sampling=Sampling(temperature=0)).ids[0]
    end = drawn[2]
    assert end not in (1, 2, *drawn[:2])
    words = {
        "<|user|>" if i == 2 else "<|end_turn|>" if i == end else "</s>" if i == 0 else f"w{i}": i for i in range(256)
    }
    made = Tokenizer(models.WordLevel(words, unk_token="w255"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|user|>", "<|end_turn|>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    config = run_config(
        tokenizer=str(folder / "tokenizer.json"), train_glob=__file__, valid_glob=str(ROOT / "README.md")
    )
    checkpoint.save_model(folder / "run", config, params)
    tokenizer_copy.keep(folder / "run", config.data.tokenizer)
    (folder / "tokenizer.json").rename(folder / "moved.json")
    return folder, drawn


@pytest.mark.full
def test_special_tokens_stop_and_are_repeated(word_run):
    folder, drawn = word_run
    first, second, _, fourth, *_ = (f"w{i}" for i in drawn)
    greedy = [f"--workdir={folder / 'run'}", "--prompt=w1  <|user|>", "--temperature=0", "--tokens=8"]
    status, out, err = command("generate", *greedy, "--stop=<|end_turn|>")
    assert status == 0, err
    assert out.splitlines()[0] == f"w1  <|user|> {first} {second}"
    more = ["--stop_ids=", f"--stop=<|end_turn|> {fourth}", f"--prompt_ids=1,2,{drawn[0]}"]
    status, out, err = command("generate", *greedy, *more)
    assert status == 0, err
    assert out.splitlines()[:2] == [f"w1  <|user|> {first} {second} ", f"w1 <|user|> {first} {second} "]


def test_another_tokenizer_takes_the_place_with_a_warning(word_run, capsys):
    folder, _ = word_run
    data = DataConfig(tokenizer=str(folder / "run/tokenizer/tokenizer.json"), eos="w5")
    moved = str(folder / "moved.json")
    assert data_with(data, moved, None) == dataclasses.replace(data, tokenizer=moved)  # the same file
    assert data_with(data, None, "w6").eos == "w6"
    assert capsys.readouterr().err == ""
    assert data_with(data, "bytes", None) == dataclasses.replace(data, tokenizer="bytes", eos="")
    assert capsys.readouterr().err.startswith("warning: --tokenizer=bytes is not the tokenizer of the checkpoint, ")


def test_evaluate(text_run):
    status, out, err = command("evaluate", f"--workdir={text_run}", "--lengths=32,64")
    assert status == 0, err
    assert "2x the trained length" in out
    report = json.loads((text_run / "evaluation/step_3.json").read_text())
    assert report["step"] == 3
    assert report["command"] == f"python -m launch.evaluate --workdir={text_run} --lengths=32,64"
    assert {"commit", "date", "device", "jax"} <= report.keys()
    assert [r["length"] for r in report["results"]] == [32, 64]
    assert f"{report['results'][0]['loss']:.4f}" in out


@pytest.mark.full
def test_evaluate_documents_and_windows(text_run, tmp_path):
    """They are lines of the same table, and what tasks have written of the checkpoint stays."""
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"step": 3, "results": ["old"], "tasks": {"any": {}}}))
    arguments = [f"--workdir={text_run}", "--lengths=32", "--windows=64:32", "--by_document", f"--output={report}"]
    status, out, err = command("evaluate", *arguments)
    assert status == 0, err
    assert [line.split()[0] for line in out.split("\n\n")[0].splitlines()[2:]] == ["32", "64:32", "document"]
    written = json.loads(report.read_text())
    assert written["tasks"] == {"any": {}}
    assert [r["length"] for r in written["results"]] == [32]
    assert [(r["window"], r["stride"], r["documents"]) for r in written["documents"]] == [(64, 32, 1), (None, None, 1)]
    assert (
        written["documents"][0]["tokens"]
        == written["documents"][1]["tokens"]
        == 20 * len("the quick brown fox, valid. ")
    )


@pytest.mark.full
def test_evaluate_says_first_that_it_cannot_write(text_run, tmp_path):
    """Root may write into a read-only directory, but not into a file."""
    run = shutil.copytree(text_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    (run / "evaluation").touch()
    arguments = [f"--workdir={run}", "--lengths=32", "--tokens=64"]
    status, out, err = command("evaluate", *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {run}/evaluation/step_3.json cannot be written: ")
    assert line.endswith("; --output=PATH writes it elsewhere")
    status, out, err = command("evaluate", *arguments, f"--output={tmp_path}/reports/3.json")
    assert status == 0, err
    assert json.loads((tmp_path / "reports/3.json").read_text())["step"] == 3
    assert out.endswith(f"written to {tmp_path}/reports/3.json\n")


PICTURES = ("eigenvalues", "layers", "state")


@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.full)])
def test_inspect(text_run, tmp_path, other):
    arguments = [f"--workdir={text_run}", f"--out={tmp_path}/seen", "--rows=2"]
    status, out, err = command("inspect", *arguments, *([f"--other={text_run}", "--layer=0"] if other else []))
    assert status == 0, err
    assert out.splitlines()[0] == "2 rows of 32 tokens of text, held out"
    assert "mamba3 has no delta" in out
    report = json.loads((tmp_path / "seen/inspection.json").read_text())
    assert len(report["checkpoints"]) == 1 + other
    assert report["command"].startswith("python -m launch.inspect --workdir=")
    assert {"commit", "date", "device", "jax"} <= report.keys()
    found = report["checkpoints"][0]["layers"]
    for horizon in (choose(head["horizon"] for head in found[0]["heads"]) for choose in (min, max)):
        assert f"{horizon:.1f}" in out
    assert report["checkpoints"][-1]["layers"] == found  # on the same rows
    for name in PICTURES:
        assert (tmp_path / f"seen/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert out.endswith(f"written to {tmp_path}/seen\n")


@pytest.mark.full
def test_inspect_an_official_directory(tmp_path):
    """Its layers are Mamba-3 and attention, which has nothing of what is looked for; the tokenizer is given."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(93)}, unk_token="w92"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    arguments = [f"--tokenizer={tmp_path}/tokenizer.json", f"--valid_glob={ROOT}/README.md", "--eos=w0", "--length=64"]
    for name in ("lm_hybrid_attn", "lm_siso_mlp"):
        official = GOLDEN / name
        status, out, err = command("inspect", f"--workdir={official}", f"--out={tmp_path}/seen", *arguments)
        assert status == 0, err
        assert ("attention has no dt, log_a" in out) == (name == "lm_hybrid_attn")
        assert json.loads((tmp_path / "seen/inspection.json").read_text())["checkpoints"][0]["horizon"] is None


def test_a_score_that_is_not_finite_is_null(tmp_path):
    evaluate.write(tmp_path / "report.json", {"results": [{"loss": float("nan"), "tokens": 3}]})
    assert json.loads((tmp_path / "report.json").read_text()) == {"results": [{"loss": None, "tokens": 3}]}


def test_a_report_that_is_there_is_read_or_named(tmp_path):
    report = tmp_path / "report.json"
    assert evaluate.written(report, 3) == {}
    report.write_text(json.dumps({"step": 3, "results": []}))
    assert evaluate.written(report, 3) == {"step": 3, "results": []}
    assert evaluate.written(report, 4) == {}  # of another checkpoint
    report.write_text('{"step": 3')
    with pytest.raises(ValueError, match=r"report.json is not JSON: .*; --output=PATH writes another one$"):
        evaluate.written(report, 3)
    for other in ([], 5, {}, {"step": 3}, {"name": "a config"}, {"step": 3, "tasks": 5}, {"step": 3, "tasks": []}):
        report.write_text(json.dumps(other))  # somebody's, which is not to be replaced
        with pytest.raises(ValueError, match=r"report\.json is there and not a report; --output=PATH writes another"):
            evaluate.written(report, 3)


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, capsys):
    """As where a disk has become full: the table has been printed by then."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        evaluate.write(tmp_path / "file" / "report.json", {})
    line = capsys.readouterr().err
    assert line.startswith(f"error: {tmp_path}/file/report.json cannot be written: ")
    assert line.endswith("; --output=PATH writes it elsewhere\n")


@pytest.mark.full
def test_parameters_that_are_not_finite_are_refused(text_run, tmp_path, monkeypatch):
    config, params = checkpoint.load_model(text_run)
    params["norm"]["scale"] *= float("nan")
    monkeypatch.setattr(checkpoint, "check_finite", lambda *_: None)  # as a program without checks would have saved it
    checkpoint.save_model(tmp_path / "run", config, params)
    for name, arguments in {
        "evaluate": [f"--workdir={tmp_path}/run"],
        "convert": [f"--source={tmp_path}/run", f"--target={tmp_path}/official"],
    }.items():
        assert "checkpoints/0: 1 of 14 tensors hold NaN or infinity: norm/scale" in mistake(name, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.full
def test_convert_there_and_back(tmp_path):
    official, run, back = tmp_path / "official", tmp_path / "run", tmp_path / "new/back"
    shutil.copytree(OFFICIAL, official)
    (official / "state_dict.npz").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (official / name).write_text(name)
    assert command("convert", f"--source={official}", f"--target={run}")[0] == 0
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json", "official.json", "tokenizer"]
    (official / "tokenizer.json").rename(official / "tokenizer.was")
    assert command("convert", f"--source={run}", f"--target={back}")[0] == 0
    (official / "tokenizer.was").rename(official / "tokenizer.json")
    assert sorted(path.name for path in back.iterdir()) == sorted(path.name for path in official.iterdir())
    assert (back / "tokenizer.json").read_text() == "tokenizer.json"
    assert json.loads((back / "config.json").read_text()) == json.loads((official / "config.json").read_text())
    for file, format in FORMATS.items():
        got, want = format.read(back / file), format.read(official / file)
        assert list(got) == list(want)
        assert all(got[name].tobytes() == array.tobytes() for name, array in want.items())
    assert "exists already" in mistake("convert", f"--source={official}", f"--target={run}")

    (official / "model.safetensors").write_bytes((official / "model.safetensors").read_bytes()[:50_000])
    assert "model.safetensors" in mistake("convert", f"--source={official}", f"--target={tmp_path / 'cut'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "official", "run"]


@pytest.mark.full
def test_convert_says_what_it_peeled(tmp_path):
    official, run, back = (tmp_path / name for name in ("official", "run", "back"))
    official.mkdir()
    shutil.copy(OFFICIAL / "config.json", official)
    read, write = FORMATS["model.safetensors"]
    tensors = read(OFFICIAL / "model.safetensors")
    write(official / "model-00001-of-00001.safetensors", {f"model.{name}": tensors[name] for name in tensors})
    index = {"weight_map": dict.fromkeys((f"model.{name}" for name in tensors), "model-00001-of-00001.safetensors")}
    (official / "model.safetensors.index.json").write_text(json.dumps(index))

    peeled = "joined 1 shards of model.safetensors; dropped model. from 27 names"
    status, out, _ = command("convert", f"--source={official}", f"--target={run}")
    assert (status, out.splitlines()) == (0, [f"{official}: {peeled}", f"{official} (official) -> {run}"])
    status, out, _ = command("convert", f"--source={run}", f"--target={back}")
    assert (status, out.splitlines()[0]) == (0, f"{back}: written plain; when {run} was made: {peeled}")
    assert sorted(path.name for path in back.iterdir()) == ["config.json", "model.safetensors"]
    got = read(back / "model.safetensors")
    assert sorted(got) == sorted(tensors)
    assert all(got[name].tobytes() == tensors[name].tobytes() for name in tensors)

    (official / "model-00001-of-00001.safetensors").unlink()
    line = mistake("convert", f"--source={official}", f"--target={tmp_path / 'none'}")
    assert "names 1 shards, and 1 are not there: model-00001-of-00001.safetensors" in line
    assert "a file, not a directory" in mistake("convert", f"--source={run}/config.json", f"--target={tmp_path}/none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "official", "run"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("generate", ["--workdir={run}", "--promt=x"], "promt"),
        ("generate", ["--workdir=/nowhere/at/all", "--prompt=x"], "/nowhere/at/all"),
        ("generate", ["--workdir={official}", "--prompt_ids=1,93"], "token id 93 at place 1"),
        ("generate", ["--workdir={run}", "--prompt=x", "--seed=-1"], "seed"),
        ("generate", ["--workdir={run}", "--prompt_ids=1,300"], "token id 300 at place 1"),
        ("generate", ["--workdir={run}", "--prompt=x", "--prompt=a\udcff"], r"--prompt=b'a\xff' is not UTF-8"),
        ("evaluate", ["--workdir={run}", "--step=4"], "no checkpoint of step 4"),
        ("evaluate", ["--workdir={run}", "--windows=64:65"], "--windows=64:65: '64:65' is not W:S"),
        ("evaluate", ["--workdir={run}", "--tasks=any"], "--tasks=NAME,... and --tasks_folder=FOLDER go together"),
        ("evaluate", ["--workdir={run}", "--tasks=any", "--tasks_folder={run}", "--limit=0"], "limit"),
        ("evaluate", ["--workdir={run}", "--limit=2"], "--limit=2 is of --tasks, which are not given"),
        ("evaluate", ["--workdir={run}", "--lengths=64:4"], "'64:4' is not a length in tokens"),
        (
            "evaluate",
            ["--workdir={run}", "--tasks=any", "--tasks_folder={run}", "--by_document"],
            "--by_document=True is of held-out data, not of --tasks",
        ),
        (
            "evaluate",
            ["--workdir={parity}", "--tasks=any", "--tasks_folder=."],
            "was trained on parity, which is no text",
        ),
        ("evaluate", ["--workdir={parity}", "--by_document"], "data.source='parity' has no documents of text"),
        ("inspect", ["--workdir={run}", "--step=4"], "no checkpoint of step 4"),
        ("inspect", ["--workdir=/nowhere/at/all"], "/nowhere/at/all"),
        ("inspect", ["--workdir={run}", "--layer=1"], "--layer=1 is not a layer of {run}, step 3: wanted 0 to 0"),
        ("inspect", ["--workdir={run}", "--length=1"], "length 1 is less than 2"),
        ("inspect", ["--workdir={official}"], "names no tokenizer"),
        ("inspect", ["--workdir={run}", "--other={official}"], "has another vocabulary than --workdir={run}"),
        ("evaluate", ["--workdir={official}", "--tokenizer=bytes"], "ids up to 255, the model's vocabulary is 93"),
    ],
)
def test_mistakes_are_one_line(text_run, parity_run, name, arguments, named):
    places = {"run": text_run, "official": OFFICIAL, "parity": parity_run}
    assert named.format_map(places) in mistake(name, *(part.format_map(places) for part in arguments))
