"""The benchmarks' own machinery: a figure is checked, says where it is from, and reaches the README unchanged."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import common, flops, layer, peer, ssm, table
from launch.provenance import provenance
from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.mamba3 import Mamba3
from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from pallas_kernels.ssm.cases import of_layer, varied

TINY = of_layer(batch=1, length=32, heads=2, width=4, d_state=8, rank=2)


# Operations


def test_dot_counts_two_a_multiply_add():
    left, right = jax.ShapeDtypeStruct((3, 4, 5), jnp.float32), jax.ShapeDtypeStruct((3, 5, 6), jnp.float32)
    product = partial(jnp.einsum, "bij,bjk->bik")
    assert flops.count(product, left, right) == (2 * 3 * 4 * 5 * 6, 0)


def test_loops_calls_and_branches():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    once = 2 * 8**3

    def step(carry, _):
        return jax.checkpoint(lambda y: jnp.sin(y @ y))(carry), None

    scanned = jax.jit(lambda x: jax.lax.scan(step, x, length=7)[0])
    assert flops.count(scanned, x) == (7 * once, 7 * 64)
    # Backward of a checkpointed y @ y: the product again, and two products for its two operands.
    gradient = jax.grad(lambda x: scanned(x).sum())
    assert flops.count(gradient, x).matmul == 7 * 4 * once
    branches = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    assert flops.count(branches, x).matmul == 2 * once


def test_unknown_trip_count_is_refused():
    with pytest.raises(ValueError, match="while"):
        flops.count(lambda x: jax.lax.while_loop(lambda y: y < 3, lambda y: y + 1, x), 0.0)


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["chunked", "associative"])
def test_operations_a_token_do_not_grow(implementation):
    def a_token(length):
        longer = varied(TINY, length=length)
        function = partial(ssm.backward, case=longer, implementation=implementation, chunk=16)
        return sum(flops.count(function, *ssm.abstract(longer))) / length

    assert a_token(4096) == pytest.approx(a_token(1024), rel=1e-3)


@pytest.mark.full
def test_threads_trace_one_after_another(crowd):
    tasks = [ssm.Task("tiny", TINY, "crowd", what) for what in ("forward", "forward+backward")]
    with ThreadPoolExecutor() as pool:
        checks = [pool.submit(task.check) for task in tasks]
        assert not any(isinstance(each, Exception) for each in pool.map(ssm.Task.compile, tasks))
        assert all(check.result()["value_error"] < 1e-5 for check in checks)
    assert set(crowd) == {1}


# The check before a time


@pytest.mark.full
def test_wrong_result_is_rejected(monkeypatch):
    assert ssm.check(TINY, "chunked", 16)["value_error"] < 1e-5

    def off_by_a_thousandth(*args, **options):
        y_BLHP, state = IMPLEMENTATIONS["recurrent"](*args, **options)
        return y_BLHP * 1.001, state

    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", off_by_a_thousandth)
    with pytest.raises(ValueError, match="wrong, values"):
        ssm.check(TINY, "wrong", 16)


@pytest.mark.full
def test_on_a_tpu_every_path_is_taken(monkeypatch):
    """Its cases, tiny, and the kernels interpreted: checked against the host's float64, then called."""

    def once(call):
        jax.block_until_ready(call())
        return common.Timing(median=1.0, best=1.0, batches=1)

    monkeypatch.setattr(common, "measure", once)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_tpu", partial(IMPLEMENTATIONS["mosaic_tpu"], interpret=True))
    monkeypatch.setattr(ssm, "CHECKED_LENGTH", 37)
    tasks = []
    for name in ("siso", "siso_decode"):
        case = ssm.CASES["tpu"][name]
        case = varied(case, batch=2, length=min(case.length, 32), heads=2, width=16, d_state=64)
        tasks += ssm.tasks_of(name, case, ssm.IMPLEMENTATIONS_OF["tpu"], [None])
    rows = list(ssm.rows_of(tasks, {"bfloat16": {"copy_gb_s": 1.0, "matmul_gflop_s": 1.0}}))
    assert all(row["ms"] > 0 and row["value_error"] > 0 for row in rows)
    assert [row["implementation"] for row in rows if row["case"] == "siso"] == [*["mosaic_tpu"] * 2, *["chunked"] * 2]
    steps = [row["implementation"] for row in rows if row["case"] == "siso_decode"]
    assert steps == ["recurrent", "mosaic_tpu"]


def test_require_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"dk 1\.0e-03"):
        common.require({"dq": 1e-7, "dk": 1e-3}, 1e-5, "gradients")
    with pytest.raises(ValueError, match="dv nan"):
        common.require({"dv": float("nan")}, 1e-5, "gradients")


@pytest.mark.full
def test_our_layer_gets_the_peers_weights():
    """The tensors that peer.py draws are, in official layout, those our mixer runs with."""
    small = peer.Layer(batch=1, length=8, d_model=16, d_state=8, head_dim=8, rank=2)
    params, tensors = layer.our_params(small), peer.weights(small)
    x_BLD, dy_BLD = peer.activations(small)
    assert x_BLD.shape == dy_BLD.shape == (1, 8, 16)
    inner = small.heads * small.head_dim
    np.testing.assert_array_equal(params["in_zx"].reshape(16, -1), tensors["in_proj.weight"][: 2 * inner].T)
    np.testing.assert_array_equal(params["v_rank"], tensors["mimo_x"])
    y_BLD, _ = Mamba3(layer.model_config(small)).apply({"params": params}, x_BLD)
    assert y_BLD.shape == x_BLD.shape


# Timing and results


def test_interleave_takes_turns():
    order, ticks = [], iter(range(1, 100))

    def clock(name):
        order.append(name)
        return float(next(ticks))

    timings = common.interleave({"a": partial(clock, "a"), "b": partial(clock, "b")}, rounds=3)
    assert "".join(order) == "ababab"
    assert timings["a"] == common.Timing(median=3.0, best=1.0, batches=3)
    assert timings["b"] == common.Timing(median=4.0, best=2.0, batches=3)


def test_measure_waits_for_the_result():
    square = jax.jit(lambda x: x @ x)
    timing = common.measure(partial(square, jnp.ones((64, 64))), batch_seconds=0.01, batches=3)
    assert 0 < timing.best <= timing.median
    assert timing.batches == 3


def test_result_file_says_where_it_is_from(tmp_path):
    path = common.write("layer_cpu", provenance(), [{"ms": 1.5}], tmp_path, note="x")
    written = json.loads(path.read_text())
    assert written["rows"] == [{"ms": 1.5}]
    assert {"commit", "date", "device", "jax", "command", "load_before"} <= set(written)
    assert common.read("layer_cpu", tmp_path) == written
    assert common.read("absent", tmp_path) is None
    assert [each.name for each in tmp_path.iterdir()] == ["layer_cpu.json"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.23456, "1.23"), (123.4, "123"), (1234.6, "1,235"), (0.01234, "0.0123"), (131072, "131,072"), (None, "-")],
)
def test_numbers_in_tables(value, text):
    assert common.significant(value) == text


def test_a_result_that_is_not_a_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        common.write("layer_cpu", {}, [{"ms": float("nan")}], tmp_path)
    assert not list(tmp_path.iterdir())


# Tables in the README files


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """A directory of results with one layer benchmark in it."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    rows = [{"layer": "SISO", "what": "forward", "ours_ms": 50.0, "peer_ms": 120.0, "ratio": 2.4, "error": 1e-6}]
    common.write("layer_cpu", provenance("abc123"), rows)
    return rows


def test_table_is_drawn_between_its_markers(taken):
    text = "before\n<!-- table:layer -->\nold\n<!-- end -->\nafter\n<!-- table:ssm -->\n<!-- end -->\n"
    drawn = table.render(text)
    assert "| SISO | forward | 50.0 | 120 | 2.40 |" in drawn
    assert "abc123" in drawn
    assert "temp MiB" not in drawn  # no row has it
    assert "old" not in drawn
    assert drawn.startswith("before\n")
    assert "<!-- end -->\nafter\n<!-- table:ssm -->\nNot measured yet.\n<!-- end -->" in drawn
    assert table.render(drawn) == drawn


def test_changed_figure_makes_the_readme_outdated(taken, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(table.render("<!-- table:layer -->\n<!-- end -->\n"))
    assert table.outdated((readme, tmp_path / "absent.md")) == {}
    common.write("layer_cpu", provenance("abc123"), [taken[0] | {"ours_ms": 50.0 * 1.01}])
    assert "50.5" in table.outdated((readme,))[readme]


@pytest.mark.parametrize("lines", ["EXPERIMENTS", "HEADLINES"])
def test_a_line_of_a_result_that_cannot_be_drawn_names_it(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "REPOSITORY", tmp_path)
    monkeypatch.setattr(table, "sweeps", list)
    for entry in getattr(table, lines):
        path = tmp_path / "experiments" / entry.result
        common.write(path.stem, {}, [{}], path.parent)
        monkeypatch.setattr(table, lines, [entry])
        with pytest.raises(ValueError, match=rf"{path} cannot be drawn: \w+Error: "):
            table.TABLES[{"EXPERIMENTS": "experiments", "HEADLINES": "results"}[lines]]()


@pytest.mark.parametrize("name", sorted(table.TABLES.keys() - {"sweeps", "experiments", "results", "evaluation"}))
def test_a_table_of_a_result_that_cannot_be_drawn_names_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for file in ("tpu_aot", "pods", "pods_before", f"{name}_cpu"):
        common.write(file, {}, [{}])
    with pytest.raises(ValueError, match=rf"{tmp_path}/\w+.json cannot be drawn: KeyError: "):
        table.TABLES[name]()


def test_unknown_table_is_an_error():
    with pytest.raises(ValueError, match="table:nothing"):
        table.render("<!-- table:nothing -->\n<!-- end -->")


def test_readme_tables_are_up_to_date():
    assert not table.outdated(table.FILES), "run python -m experiments.benchmarks.table"


def test_the_main_readme_has_short_cells():
    lines = table.TABLES["results"]().splitlines()
    cells = [cell for line in lines for cell in line.strip("| ").split(" | ")]
    assert 8 <= len(lines) <= 12
    assert max(map(len, cells)) <= 40, max(cells, key=len)


def test_peer_script_needs_nothing_of_ours():
    """It runs where our package is not: imported alone, by its path, it takes in no module of this repository."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='peer'); print('mamba3_jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, layer.PEER], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.strip() == "False"


def test_default_peer_sizes_are_the_marks():
    assert layer.LAYERS["SISO"] == peer.Layer(2, 2048, 256, 64, 64, 2, 0)
    config = layer.model_config(layer.LAYERS["MIMO R=4"])
    assert isinstance(config, ModelConfig)
    assert (config.mimo_rank, config.d_state, config.compute_dtype) == (4, 64, "float32")
