"""The page of what the experiments found: nothing is left out of it, and it says where everything is from."""

import dataclasses
import json
import re
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest

from experiments import found, report, summary
from experiments.benchmarks import table
from experiments.figures import metric
from launch.provenance import REPOSITORY

TOY = '''"""Is a < b?

    python -m launch.sweep --config=toy.py --workdir=runs/toy

Cost: 1.5 minutes, of nothing. Expect little.
"""

from mamba3_jax.config import Config, DataConfig

VARIANTS = {"plain": {}, "wide": {"model.d_model": 128}, "late": {"model.d_state": 32}}
METRIC = "scaled_last@32"
EXPECT = {"plain": ("worst scaled_last@32", 0.9, 1.0), "wide": ("best scaled_last@32", 0.9, 1.0),
          "late": ("best scaled_last@32", 0.9, 1.0)}
PAPER = {"plain": 99.5, "late": 1.25}


def get_config():
    return Config(name="toy", data=DataConfig(source="parity", length=16, task_lengths=(16,), task_steps=(5,)))
'''


def result_of(scores: dict[str, dict[float, list[float]]]) -> dict:
    """A sweep's result, of scaled_last at 32 by variant, rate and seed; at 8 all are right."""
    rows = [
        {
            "variant": name,
            "seed": seed,
            "learning_rate": rate,
            "loss": 1 - score,
            "scores": [{"length": 8, "scaled_last": 1.0}, {"length": 32, "scaled_last": score}],
        }
        for name, rates in scores.items()
        for rate, seeds in rates.items()
        for seed, score in enumerate(seeds)
    ]
    origin = {"commit": "0123abc", "date": "2026-11-30", "device": "a pocket calculator"}
    variants = {name: origin | {"parameters": 1234} for name in scores}
    return origin | {
        "jax": "0.0",
        "command": "python -m launch.sweep --config=toy.py",
        "seconds": 61.4,
        "metric": "scaled_last@32",
        "shown": ["scaled_last@8", "scaled_last@32"],
        "variants": variants,
        "rows": rows,
    }


RESULT = ("jax", "command", "seconds", "rows")  # without one of them a sweep's result cannot be drawn
SCORES = {"plain": {1e-3: [0.5, 0.6], 1e-2: [0.95, 1.0]}, "wide": {1e-3: [0.25, 0.35], 1e-2: [0.1, 0.2]}}


def record(folder: Path, result: dict, name: str = "toy") -> None:
    path = folder / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of experiments with one file, of whose three variants two have run."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.py").write_text(TOY)
    record(tmp_path, result_of(SCORES))
    return tmp_path


def test_an_experiment_is_read_from_its_file_and_its_result(folder):
    (toy,) = found.experiments(folder)
    assert (toy.question, toy.command) == ("Is a < b?", "python -m launch.sweep --config=toy.py --workdir=runs/toy")
    assert (toy.cost, toy.trained, toy.missing) == ("1.5 minutes", 16, ["late"])
    heads, plain, wide, late = summary.cells(toy)
    assert heads[2:] == ["scaled_last@8", "scaled_last@32", "scaled_last@32 over plain", "best scaled_last@32", "paper"]
    assert plain == ["plain", "0.01", "100.0 100.0", "95.0 100.0", "", "100.0", "99.5"]
    assert wide[:4] + wide[5:] == ["wide", "0.001", "100.0 100.0", "25.0 35.0", "35.0", "-"]
    assert late == ["late", "not run yet", "", "", "", "", "1.25"]
    assert [holds for holds, _ in summary.expectations(toy)] == [True, False, None]


def test_the_page_leaves_nothing_out(folder):
    page = report.page(found.experiments(folder))
    wanted = [
        "Is a &lt; b?",
        "--config=toy.py",
        "61 s on a pocket calculator",
        "0123abc, 2026-11-30",
        "1,234 parameters",
    ]
    wanted += ["d_model=128", "95.0 100.0", "99.5", "2 of 3", "1 of 3, 1 not run yet", 'src="toy.png"']
    wanted += [
        "wide: best scaled_last@32 35.0, NOT as expected: 90.0 .. 100.0",
        "late: best scaled_last@32 not run yet",
    ]
    assert [text for text in wanted if text not in page] == []
    assert "<script" not in page
    (folder / "results" / "toy.json").unlink()
    page = report.page(found.experiments(folder))
    assert all(f"<td>{name}<" in page for name in ("plain", "wide", "late"))
    assert page.count(found.MISSING) >= 3
    assert "toy.png" not in page


def test_the_page_says_which_text_it_was(folder):
    assert "<dt>data</dt>" not in report.page(found.experiments(folder))
    result = result_of(SCORES)
    for variant in result["variants"].values():
        variant["asked"] = {"data": {"train": "9 tokens 01ab", "valid": "3 tokens 02cd"}}
    record(folder, result)
    page = report.page(found.experiments(folder))
    assert "<dt>data</dt><dd>train 9 tokens 01ab, valid 3 tokens 02cd</dd>" in page
    result["variants"]["wide"]["asked"]["data"]["valid"] = "4 tokens 03ef"
    record(folder, result)
    assert "valid 3 tokens 02cd; train 9 tokens 01ab, valid 4 tokens 03ef" in report.page(found.experiments(folder))


def test_a_result_whose_file_is_gone_is_shown(folder):
    record(folder, result_of(SCORES), "gone")
    _, gone = found.experiments(folder)
    page = report.page([gone])
    assert "gone: its file is gone" in page
    assert "<td>2 of 2</td>" in page
    assert summary.overview(gone)["got"].startswith("scaled_last@32: plain 95.0 100.0, wide 25.0 35.0 (0123abc")
    record(folder, {"benchmark": "toy", "rows": []})  # of another program
    assert found.experiments(folder)[0].result is None


def test_predictions_stand_beside_what_they_predict(folder):
    predicted = {"forgetting": {"fails": 30.4}, "angles": {"absent": "why"}, "both": {"fails": None}}
    row = {"variant": "plain", "trained": 16, "fails": 32.0, "predicted": predicted | {"half_step": {"fails": 9.0}}}
    row |= {"restored": [{"length": 24, "as_it_is": 0.25, "scaled_back": 0.75}, {"absent": "why"}]}
    origin = {"command": "python -m a", "commit": "4567def", "date": "2026-11-30"}
    record(folder, origin | {"benchmark": "toy_predicted", "rows": [row]}, "toy_predicted")
    (toy,) = found.experiments(folder)
    page = report.page([toy])
    cells = ("plain", "32", "30", "-", "at none asked", "9", "25.0, 75.0", "-")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "4567def" in page


@pytest.mark.parametrize("table", ["EXPECT = {'no': ('best loss', 0, 1)}", "PAPER = {'no': 1}"])
def test_numbers_of_no_variant_are_refused(table, folder):
    with open(folder / "tasks" / "toy.py", "a") as file:
        file.write(table)
    with pytest.raises(ValueError, match="'no', which is none of its variants"):
        found.experiments(folder)


def test_a_damaged_result_is_named(folder):
    """Truncated, of another kind, or without what is drawn: one line that says which file, and no picture of it."""
    path = folder / "results" / "toy.json"
    whole = path.read_text()
    texts = {name: json.dumps({key: part for key, part in json.loads(whole).items() if key != name}) for name in RESULT}
    for text in (whole[:100], "", "[]", "\0", '{"rows": 5}', '{"rows": [5]}', *texts.values()):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"toy\.json is (not JSON|not a result|damaged)"):
            found.experiments(folder)
    for damaged in ({"rows": []}, {"rows": [{"variant": "plain"}]}, {"variants": {"plain": {}}}, {"seconds": "long"}):
        path.write_text(json.dumps(json.loads(whole) | damaged))
        with pytest.raises(ValueError, match=r"toy\.json is damaged"):
            found.experiments(folder)
    path.write_text(whole)
    (folder / "results" / "toy_predicted.json").write_text("{")
    with pytest.raises(ValueError, match=r"toy_predicted\.json is not JSON"):
        found.experiments(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("toy", {"rows": [{**row, "curve": "x"} for row in result_of(SCORES)["rows"]]}),
        ("toy", {"variants": {name: {**of, "asked": 5} for name, of in result_of(SCORES)["variants"].items()}}),
        ("toy_predicted", {"rows": [{"variant": "plain", "predicted": None}]}),
        ("toy_predicted", {"rows": [{"variant": "plain"}], "commit": 0, "date": 0}),
    ],
)
def test_a_result_that_cannot_be_drawn_is_named(file, content, folder):
    """What only the drawing reads: it is found then, in one line, and nothing is written."""
    path = folder / "results" / f"{file}.json"
    path.write_text(json.dumps((result_of(SCORES) if file == "toy" else {}) | content))
    experiments = found.experiments(folder)
    with pytest.raises(ValueError, match=r"toy\.json, or what goes with it, cannot be drawn: \w+Error: "):
        report.write(experiments, folder / "report")
    assert not list(folder.glob("report/*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("EXPECT = {'plain': 5}", "toy.py: EXPECT={'plain': 5} is not"),
        ("PAPER = {'plain': '99.5'}", "toy.py: PAPER={'plain': '99.5'} is not"),
        ("METRIC, PAPER = 'loss@32', {'plain': 0}", "toy.py: PAPER={'plain': 0} is not a perplexity"),
        ("SIZES = {'x': {'plain': 'wide'}}", "toy.py: SIZES={'x': {'plain': 'wide'}} is not"),
        ("EQUAL = [('x', 'plain')]", "toy.py: EQUAL has ('x', 'plain'): wanted pairs"),
        ("SIZE = 5", "toy.py: SIZE=5 is not a name"),
        ("__doc__ = None", "toy.py: wanted a docstring"),
        ("get_config = dict", "toy.py: get_config() does not return"),
        ("nothing", "toy.py:21: NameError"),
    ],
)
def test_what_a_file_says_wrongly_is_named(more, message, folder):
    (folder / "tasks" / "toy.py").write_text(f"{TOY}\n\n{more}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        found.experiments(folder)


def test_two_files_do_not_share_a_result(folder):
    """As where an ablation was begun as a copy of another."""
    (folder / "tasks" / "copy.py").write_text(TOY)
    with pytest.raises(ValueError, match="are both called 'toy'"):
        found.experiments(folder)


def test_pictures_say_what_they_are_drawn_from_and_are_drawn_again(folder):
    target, read = folder / "report", lambda: found.experiments(folder)
    assert report.write(read(), target) == ["index.html", "toy.png"]
    picture = (target / "toy.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert b"commit 0123abc, 2026-11-30" in picture
    assert report.outdated(read(), target) == report.write(read(), target) == []

    record(folder, result_of(SCORES | {"late": {1e-2: [0.5, 0.5]}}))
    assert report.outdated(read(), target) == ["index.html", "toy.png"]
    report.write(read(), target)
    (folder / "results" / "toy.json").unlink()
    assert report.write(read(), target) == ["index.html", "toy.png"]
    assert [path.name for path in target.iterdir()] == ["index.html"]


def test_figures_are_by_length_by_size_or_by_variant(folder, tmp_path):
    (toy,) = found.experiments(folder)
    drawn = metric.figure_of(toy)
    assert drawn.lines[0] == ("plain", [8, 32], [[100.0, 100.0], [95.0, 100.0]])
    assert (drawn.trained, drawn.chance) == (16, 0)

    with open(folder / "tasks" / "toy.py", "a") as file:
        file.write("SIZES, SIZE = {'all': {'plain': 64, 'wide': 128, 'late': 256}}, 'd_model'")
    (by_size,) = found.experiments(folder)
    drawn = metric.figure_of(by_size)
    assert drawn.lines == [("all", [64, 128], [[95.0, 100.0], [25.0, 35.0]])]
    assert drawn.across == "d_model"

    result = result_of(SCORES)
    for row in result["rows"]:
        row["scores"] += [{"length": at, "pairs": 2, "scaled_last": at / 64} for at in (8, 16)]
    record(folder, result | {"metric": "scaled_last@8:2"})
    (folder / "tasks" / "toy.py").write_text(TOY)
    drawn = metric.figure_of(found.experiments(folder)[0])  # by length, of the metric's pairs alone
    assert drawn.lines[0] == ("plain", [8, 16], [[12.5, 12.5], [25.0, 25.0]])
    assert drawn.across == "length, tokens with 2 pairs"

    result = result_of({"plain": {1e-3: [0.5, 0.6]}})
    result["rows"][0]["loss"] = None  # it diverged
    record(folder, result | {"metric": "loss"})
    (folder / "tasks" / "toy.py").write_text(TOY)
    (by_variant,) = found.experiments(folder)
    assert metric.figure_of(by_variant).names == ("plain",)
    for number, experiment in enumerate((toy, by_size, by_variant)):
        metric.draw(experiment, metric.figure_of(experiment), tmp_path / f"{number}.png")


LOSSES = {"a": 3.0, "b_8": 3.2, "b_32": 2.8, "same": 3.001}
LANGUAGE = '''"""Which is less?

    python -m launch.sweep --config=words.py --workdir=runs/words
"""

from mamba3_jax.config import Config, ModelConfig

VARIANTS = {"a": {}, "b_8": {"model.pattern": "A"}, "b_32": {}, "same": {}}
METRIC, PAPER = "loss@32", {"a": 20.0, "b_8": 22.0, "b_32": 18.0}
SIZES, SIZE, EQUAL, DECODE = {"B": {"b_8": 8, "b_32": 32}}, "d_state", [("B", "a")], "decode_words"
EXPECT = {"b_32": ("difference loss@32", -0.3, -0.1)}


def get_config():
    return Config(name="words", model=ModelConfig(d_model=64, pattern="M"))
'''


@pytest.fixture
def words(tmp_path) -> found.Experiment:
    """An experiment on text of four seeds, whose shared noise pairing takes away, and its times of decoding."""
    (tmp_path / "words.py").write_text(LANGUAGE)
    noise, own = (0.3, -0.1, 0.0, 0.2), (0.002, -0.002, 0.004, -0.004)
    rows = [
        {
            "variant": name,
            "seed": seed,
            "learning_rate": 1e-3,
            "scores": [{"length": 32, "loss": loss + noise[seed] + own[seed] * (name != "a")}],
        }
        for name, loss in LOSSES.items()
        for seed in range(4)
    ]
    result = result_of({name: {} for name in LOSSES}) | {"metric": "loss@32", "shown": ["loss@32"], "rows": rows}
    record(tmp_path, result, "words")
    times = [
        {
            "model": name,
            "what": "decode",
            "path": path,
            "batch": batch,
            "context": context,
            "ms": ms,
            "state_bytes": size,
        }
        for name, context, ms, size in (("a", 64, 2.0, 4096), ("a", 16, 1.0, 1024), ("b_8", None, 0.5, 2048))
        for path, batch, ms in (("loop", 8, ms), ("loop", 1, ms / 8), ("fused", 8, ms / 2), ("former", 8, ms / 4))
    ]
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "decode_words.json").write_text(json.dumps({"device": "a pocket calculator", "rows": times}))
    (read,) = found.experiments(tmp_path)
    return read


def test_the_papers_difference_stands_beside_ours(words):
    heads, a, b_8, b_32, same = summary.cells(words)
    assert heads[2:] == ["loss@32", "loss@32 over a", "paper, perplexity", "paper over a"]
    assert a[2:] == ["3.1000 (sd 0.1826)", "", "20", ""]
    assert (b_8[3:], b_32[4:], same[4:]) == (["0.2000 ± 0.0058", "22", "0.0953"], ["18", "-0.1054"], ["-", "-"])
    assert "b_8 +0.2000 ± 0.0058 (paper +0.0953)" in summary.overview(words)["got"]
    assert summary.expectations(words)[0] == (
        True,
        "b_32: difference loss@32 -0.2000, as expected: -0.3000 .. -0.1000",
    )


def test_what_is_not_resolved_is_a_bound_in_words(words):
    (said,) = summary.unresolved(words)
    assert said == "same over a, loss@32: between -0.0048 and 0.0068"
    assert f"<li>{said}</li>" in report.page([words])
    apart = [dict(row, scores=[{"length": 32, "loss": 3.0 + (row["variant"] != "a")}]) for row in words.rows]
    assert summary.unresolved(dataclasses.replace(words, result=words.result | {"rows": apart})) == []


def test_the_size_of_equal_loss_stands_beside_the_papers(words):
    """Halfway between 8 and 32 in octaves; by the paper's perplexities 2 ln(22/20) / ln(22/18) octaves from 8."""
    (said,) = summary.equals(words)
    assert said.startswith("B has the loss@32 of a at d_state 16 (")
    assert said.endswith("; the paper's is 15.5")
    assert escape(said) in report.page([words])
    assert summary.equals(dataclasses.replace(words, result=None)) == []


def test_losses_are_drawn_as_differences_and_against_decoding(words, tmp_path):
    drawn = metric.pictures(words)
    assert list(drawn) == ["words.png", "words_differences.png", "words_tradeoff.png"]
    apart = drawn["words_differences.png"]
    assert (apart.first, [row.label for row in apart.rows]) == ("a", ["b_8", "b_32", "same"])
    assert apart.rows[0].seeds == pytest.approx([0.202, 0.198, 0.204, 0.196])
    assert [row.paper and round(row.paper, 4) for row in apart.rows] == [0.0953, -0.1054, None]
    costs = drawn["words_tradeoff.png"]
    assert (list(costs.lines), costs.batch) == (["B", "a"], 8)
    assert [(point.ms, point.state_kib, point.note) for point in costs.lines["a"]] == [(0.5, 1, "16"), (1.0, 4, "64")]
    assert [(point.ms, point.note) for point in costs.lines["B"]] == [(0.25, "8")]
    for name, figure in drawn.items():
        metric.draw(words, figure, tmp_path / name)
        assert metric.source(words, figure).encode() in (tmp_path / name).read_bytes()
    plain = dataclasses.replace(words, sizes={}, decoding=None)
    assert list(metric.pictures(plain)) == ["words.png"]
    assert metric.pictures(plain)["words.png"] == apart


@pytest.mark.parametrize(("up", "shown"), [("late_loss", False), ("accuracy, %", True)])
def test_a_loss_far_off_does_not_hide_the_others(up, shown, folder):
    """Of a loss alone: numbers of two models within a nat are seen, one eight nats above is not."""
    (toy,) = found.experiments(folder)
    lines = [metric.Line(f"{loss}", [16, 64], [[3.0], [loss]]) for loss in (3.1, 3.2, 11.0)]
    figure = metric.plot(toy, metric.Figure(lines, "length, tokens", up, trained=16))
    low, high = figure.axes[0].get_ylim()
    assert low < 3.0 < 3.2 < high
    assert (high > 11.0) == shown
    metric.plt.close(figure)


def test_curves_have_every_seed_where_they_are_recorded(folder):
    result = result_of(SCORES)
    for index, row in enumerate(result["rows"]):
        row["curve"] = {"step": [5, 10], "loss": [2.0, None], "accuracy": [0.25, 0.5 + index / 100]}
    record(folder, result)
    (toy,) = found.experiments(folder)
    assert list(metric.pictures(toy)) == ["toy.png", "toy_curves.png"]
    drawn = metric.curves_of(toy)
    assert drawn.lines[0] == ("plain", [5, 10], [[25.0, 25.0], [52.0, 53.0]])  # of the better rate
    assert 'src="toy_curves.png"' in report.page([toy])
    assert report.write([toy], folder / "report") == ["index.html", "toy.png", "toy_curves.png"]


def test_the_recorded_page_is_up_to_date():
    assert report.outdated(found.experiments()) == [], "run python -m experiments.report"


def test_the_readmes_have_the_report_and_the_sweeps():
    text = (REPOSITORY / "README.md").read_text()
    places = re.findall(r"\(experiments/report/(\S+?)\)", text)
    assert {"parity.png", "index.html"} <= set(places)
    assert all((report.FOLDER / place).exists() for place in places)
    drawn = table.TABLES["experiments"]()
    assert [sweep.question for sweep in table.sweeps() if sweep.question not in drawn] == []


@pytest.mark.parametrize("path", sorted(found.FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_no_program_goes_past_an_argument(path):
    """`report check` would rewrite what it was to check, and a benchmark of other sizes than asked write a result."""
    source = path.read_text()
    assert source.count("app.run(main") == len(re.findall(r"app.run\(main, flags_parser=(common\.)?parse\)", source))


def test_an_argument_that_is_no_flag_is_one_line():
    command = [sys.executable, "-m", "experiments.report", "check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: unexpected argument 'check': flags are written --name=value\n"
