"""The tuner without a GPU: what it searches, what it refuses, that it goes on where it was stopped, what it writes."""

import dataclasses
import json
import math
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from experiments.benchmarks import common, ssm, tune
from launch.provenance import provenance
from mamba3_jax.ops import kernels, tuned
from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from pallas_kernels.ssm.cases import of_layer, varied
from pallas_kernels.ssm.triton.config import Tile
from pallas_kernels.ssm.triton.step import default_tile

TINY = of_layer(batch=2, length=24, heads=2, width=8, d_state=8)
ORIGIN = {"device": "NVIDIA H200", "jax": "1", "commit": "abc"}


def test_every_launch_is_one_of_the_kernels():
    fields = {field.name for field in dataclasses.fields(Tile)}
    assert set(tune.LAUNCHES["triton"]) <= fields
    assert all(set(tune.STEP["triton"]) <= set(vars(default_tile(rank))) for rank in (1, 4))
    structure, _ = tune.options(varied(TINY, rank=2), "triton")
    assert structure == {"programs": (128, 256, 512), "chunk": [8, 16, 32]}


@pytest.mark.parametrize("broken", [None, ("a", 3), ("x", 1)])
def test_search_finds_the_best_of_each(broken):
    """Where one kernel does not change another's time; what cannot run is not chosen."""
    cost = {"a": {0: 5.0, 1: 4.0, 2: 4.5, 3: 2.0}, "x": {0: 3.0, 1: 1.0, 2: 2.0}, "y": {0: 3.0, 1: 3.0}}
    asked = []

    def times(launches):
        asked.extend(launches)
        whole = [sum(costs[launch.get(name, 0)] for name, costs in cost.items()) for launch in launches]
        return [math.inf if broken in launch.items() else ms for launch, ms in zip(launches, whole, strict=True)]

    best, ms = tune.search({"a": (1, 2, 3)}, {"x": (1, 2), "y": (0, 1)}, times)
    want = {"a": 1 if broken == ("a", 3) else 3, "x": 2 if broken == ("x", 1) else 1}  # y: no faster, so not told
    assert best == want
    assert [ms] == times([want])
    assert tune.search({}, {}, times) == ({}, 11.0)


def test_search_takes_the_best_alone_where_both_together_are_worse():
    table = {(): 10.0, ("x",): 8.0, ("y",): 9.0, ("x", "y"): 12.0}
    times = lambda launches: [table[tuple(sorted(launch))] for launch in launches]  # noqa: E731
    assert tune.search({}, {"x": (1,), "y": (1,)}, times) == ({"x": 1}, 8.0)


@pytest.mark.full
@pytest.mark.parametrize("what", ["forward+backward", "decode"])
def test_threads_trace_one_after_another(what, crowd):
    case = varied(TINY, length=1) if what == "decode" else TINY
    trials = [tune.Trial("tiny", case, "crowd", what, launch={}) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        assert not any(isinstance(each, Exception) for each in pool.map(tune.Trial.compile, trials))
    assert set(crowd) == {1}


@pytest.fixture
def checked(monkeypatch):
    """Beside the op's own: an implementation, of little else, whose output is scaled as it is told.

    Returns what was checked against `recurrent`, which test_benchmarks.py tests.
    """

    def run(tokens, heads, state, *, rotation, chunk=None, scale=1.0):
        if scale == 0:
            raise NotImplementedError("no scale")
        return tokens.v_BLHP * scale, state

    monkeypatch.setitem(IMPLEMENTATIONS, "scaled", run)
    quick = {"batch_seconds": 1e-3, "batches": 1, "warm_up": 1}
    monkeypatch.setattr(common.measure, "__kwdefaults__", common.measure.__kwdefaults__ | quick)
    found = []
    for check in ("check", "check_decode"):
        monkeypatch.setattr(ssm, check, lambda case, implementation, *_: found.append(implementation))
    return found


@pytest.mark.full
def test_what_is_wrong_is_no_choice_and_nothing_is_timed_twice(checked, tmp_path):
    path = tmp_path / "tune.json"
    clock = tune.Clock("tiny", TINY, "scaled", tune.Progress(path, ORIGIN))
    launches = [{}, {"scale": 1.1}, {"scale": 1.0}, {"scale": 0}, {"scales": 1}]
    right, wrong, same, *cannot = clock.times(launches)
    assert checked == ["scaled"]
    assert right < math.inf
    assert same < math.inf
    assert wrong == math.inf
    assert cannot == [math.inf] * 2
    taken = json.loads(path.read_text())["taken"]
    assert [("relative error" in each.get("error", "")) for each in taken.values()] == [
        False,
        True,
        False,
        False,
        False,
    ]

    again = tune.Clock("tiny", TINY, "scaled", tune.Progress(path, ORIGIN))
    again._time = None  # not called
    assert again.times(launches) == [right, wrong, same, *cannot]
    assert tune.Progress(path, ORIGIN | {"commit": "def"}).taken == {}


@pytest.fixture
def no_table(tmp_path, monkeypatch):
    """Instead of the one that is shipped."""
    monkeypatch.setattr(tuned, "PATH", tmp_path / "shipped.json")
    tuned.PATH.write_text("[]")


@pytest.mark.full
def test_an_entry_is_written_in_the_place_of_the_one_before(checked, no_table, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "BACKENDS", {"scaled": "", "other": ""})
    monkeypatch.setattr(kernels, "refused", lambda name, tokens: None if name == "scaled" else "wants a GPU")
    progress, path = tune.Progress(tmp_path / "tune.json", ORIGIN), tmp_path / "tuned.json"
    step = varied(TINY, length=1)
    for case in (TINY, step, TINY):
        entry = tune.choice_of("tiny" if case is TINY else "step", case, progress, provenance("abc"))
        tune.write(entry, path)
    long, one = sorted(tuned.read(path), key=lambda each: -each.length)
    assert (long.length, long.rank, long.width, long.d_state, long.heads) == (24, 1, 8, 8, 4)
    assert long.implementation in ("scaled", "chunked")
    assert {"scaled, ms", "chunked, ms", "commit"} <= set(long.measured)
    assert one.implementation in ("scaled", "recurrent")


def test_the_fastest_of_a_recorded_run_are_choices(no_table, tmp_path):
    """By forward+backward, or a step's time; what ran out of memory has none."""
    step = varied(TINY, length=1)
    rows = [
        {"case": "long", "implementation": "chunked", "what": "forward", "ms": 1.0},
        {"case": "long", "implementation": "chunked", "what": "forward+backward", "ms": 9.0},
        {"case": "long", "implementation": "triton", "what": "forward", "ms": 2.0},
        {"case": "long", "implementation": "triton", "what": "forward+backward", "ms": 8.0},
        {"case": "long", "implementation": "mosaic_gpu", "what": "forward+backward", "failed": "out of memory"},
        {"case": "step", "implementation": "recurrent", "what": "decode", "ms": 3.0},
    ]
    cases = {"long": TINY.sizes(), "step": step.sizes()}
    entries = tune.recorded_configs(ORIGIN | {"date": "today", "cases": cases, "rows": rows})
    assert [(each.length, each.implementation) for each in entries] == [(24, "triton"), (1, "recurrent")]
    for entry in entries:
        tune.write(entry, tmp_path / "tuned.json")
    assert {each.implementation for each in tuned.read(tmp_path / "tuned.json")} == {"triton", "recurrent"}


def test_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(tune, "FLAGS", types.SimpleNamespace(recorded="", out=""))
    if jax.default_backend() == "cpu":
        with pytest.raises(tune.app.UsageError, match="without a GPU: the backend is 'cpu'"):
            tune.main([])
