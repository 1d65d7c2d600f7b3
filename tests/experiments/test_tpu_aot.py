"""What is read from a compiled TPU program, and the arithmetic beside it; nothing here needs the TPU compiler."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.benchmarks import common, ssm, tpu_aot
from launch import hlo, hlo_text, tpu
from launch.provenance import REPOSITORY
from pallas_kernels.ssm.cases import of_layer, varied

# A loop of 16 trips over slices of an array in HBM; its body writes 128 rows of 2,048 in place, by way of VMEM.
PROGRAM = """HloModule jit_f, is_scheduled=true, input_output_alias={}

%update (p0: f32[2048,256], p1: f32[128,256], p2: s32[]) -> f32[2048,256] {
  %p0 = BIG parameter(0)
  %p1 = f32[128,256]{1,0:T(8,128)} parameter(1)
  %p2 = INT parameter(2)
  %zero = INT constant(0)
  ROOT %dus = BIG dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%take (q0: f32[2048,256], q1: s32[]) -> f32[128,256] {
  %q0 = BIG parameter(0)
  %q1 = INT parameter(1)
  %zero.1 = INT constant(0)
  %turned = BIG bitcast(%q0)
  ROOT %part = f32[128,256]{1,0:T(8,128)} dynamic-slice(%turned, %q1, %zero.1), dynamic_slice_sizes={128,256}
}

%body (arg: (s32[], f32[2048,256], f32[2048,256])) -> (s32[], f32[2048,256], f32[2048,256]) {
  %arg = (INT, BIG, BIG) parameter(0)
  %i = INT get-tuple-element(%arg), index=0
  %x = BIG get-tuple-element(%arg), index=1
  %y = BIG get-tuple-element(%arg), index=2
  %near = f32[128,256]{1,0:T(8,128)S(1)} fusion(%x, %i), calls=%take, backend_config={"w":{"estimated_cycles":"100"}}
  %far = BIG fusion(%y, %near, %i), kind=kLoop, calls=%update, backend_config={"w":{"estimated_cycles":"50"}}
  %one = INT constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %out = (INT, BIG, BIG) tuple(%next, %x, %far)
}

%condition (arg.1: (s32[], f32[2048,256], f32[2048,256])) -> pred[] {
  %arg.1 = (INT, BIG, BIG) parameter(0)
  %i.1 = INT get-tuple-element(%arg.1), index=0
  %bound = INT constant(16)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (a: f32[2048,256], b: bf16[3,64]) -> f32[2048,256] {
  %a = BIG parameter(0)
  %b = bf16[3,64]{1,0:T(4,128)(2,1)} parameter(1)
  %begin = s32[]{:T(128)S(6)} constant(0)
  %room = BIG custom-call(), custom_call_target="AllocateBuffer"
  %start = (bf16[3,64]{1,0:T(4,128)(2,1)S(1)}, bf16[3,64]{1,0:T(4,128)(2,1)}, u32[]{:S(2)}) copy-start(%b)
  %done = bf16[3,64]{1,0:T(4,128)(2,1)S(1)} copy-done(%start)
  %packed = (INT, BIG, BIG) tuple(%begin, %a, %room)
  %while = (INT, BIG, BIG) while(%packed), condition=%condition, body=%body
  ROOT %result = BIG get-tuple-element(%while), index=2
}
""".replace("BIG", "f32[2048,256]{1,0:T(8,128)}").replace("INT", "s32[]{:T(128)}")
ROWS = 128 * 256 * 4  # bytes that a trip reads, and that it writes


def test_a_loop_counts_once_a_trip_and_only_what_it_moves():
    cost = hlo.Program(PROGRAM).cost()
    scalars = cost.hbm_bytes - 16 * 2 * ROWS - 4 * 128 * 2  # the copy of b: three rows of 64 fill a tile of 4 x 128
    assert 0 <= scalars <= 16 * 8 * 512
    assert cost.cycles == 16 * 150
    once = hlo.Program(PROGRAM.replace("constant(16)", "constant(1)")).cost()
    assert once.cycles == 150
    by_fours = hlo.Program(
        PROGRAM.replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(4)")
    ).cost()
    assert by_fours.cycles == 4 * 150
    said = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.Program(said.replace("direction=LT", "direction=NE")).cost().cycles == 3 * 150
    unknown = PROGRAM.replace('"estimated_cycles":"100"', f'"estimated_cycles":"{2**63 - 1}"')
    assert hlo.Program(unknown).cost().cycles == 16 * 50


def test_vmem_is_not_hbm():
    shape = "f32[2048,256]{1,0:T(8,128)S(1)}"
    assert hlo_text.hbm_bytes(shape) == 0
    assert hlo_text.hbm_bytes(shape, anywhere=True) == hlo_text.hbm_bytes(shape.replace("S(1)", "")) == 2048 * 256 * 4
    assert hlo_text.hbm_bytes("f32[5,3]{0,1:T(8,128)}") == 8 * 128 * 4  # the layout's minor axis is the first
    assert hlo_text.hbm_bytes("(bf16[16,128]{1,0:T(8,128)(2,1)}, s32[]{:T(128)}, token[])") == 16 * 128 * 2 + 4


def test_unknown_trip_count_is_refused():
    with pytest.raises(ValueError, match="how often"):
        hlo.Program(PROGRAM.replace("direction=LT", "direction=NE")).cost()


def test_a_kernel_is_seen():
    call = '  %k = f32[8,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call"\n  %while = '
    assert hlo.Program(PROGRAM).kernels() == []
    assert hlo.Program(PROGRAM.replace("  %while = ", call)).kernels() == ["k"]


def test_floors_are_arithmetic():
    """A step in float32: the state twice and little else; one product with the state, as six of bfloat16."""
    case = of_layer(batch=2, length=1, heads=4, width=64, d_state=128)
    task = ssm.Task("step", case, "recurrent", "decode")
    found = tpu_aot.floors(task, tpu_aot.CHIPS["v5e"])
    assert found["matmul_gflop"] == pytest.approx(2 * 2 * 4 * 64 * 128 / 1e9)
    assert found["matmul_ms"] == pytest.approx(6 * found["matmul_gflop"] / 197)
    assert 2 * 4 * (2 * 4 * 64 * 128) < found["least_mb"] * 1e6 < 1.2 * 2 * 4 * (2 * 4 * 64 * 128)
    assert found["roofline_ms"] == pytest.approx(found["least_mb"] / 819)
    half = tpu_aot.floors(dataclasses.replace(task, case=varied(case, dtype="bfloat16")), tpu_aot.CHIPS["v5e"])
    assert half["matmul_ms"] == pytest.approx(found["matmul_ms"] / 6)
    assert found["passes_mb"] == found["least_mb"]


def test_both_passes_read_what_goes_in():
    case = of_layer(batch=2, length=16, heads=4, width=64, d_state=128)
    one, both = (
        tpu_aot.floors(ssm.Task("row", case, "chunked", what), tpu_aot.CHIPS["v5e"])
        for what in ("forward", "forward+backward")
    )
    inputs = ssm.nbytes(jax.eval_shape(lambda: ssm.inputs(case, 0))) / 1e6
    dy = 4 * 2 * 16 * 4 * 64 / 1e6
    assert both["passes_mb"] - both["least_mb"] == pytest.approx(inputs)
    assert both["passes_mb"] == pytest.approx(one["passes_mb"] + 2 * inputs + dy)


@pytest.mark.full
def test_arguments_are_those_of_a_model():
    """Values, gates, outputs and their gradients are (B, L, H P), weights and states as they are; the same numbers."""
    case = of_layer(batch=2, length=3, heads=4, width=8, d_state=16, groups=2)
    task = ssm.Task("small", case, "recurrent", "forward+backward")
    arguments = task.arguments()
    tokens, heads, dy = tpu_aot.joined(arguments)
    assert tokens.v_BLHP.shape == tokens.gate_BLHP.shape == dy.shape == (2, 3, 32)
    assert tokens.q_BLRGN.shape == (2, 3, 32)
    assert heads.q_bias_HRN.shape == (4, 1, 16)
    got, want = tpu_aot.in_a_model(task)(tokens, heads, dy), task.function()(*arguments)
    (y, state), (dtokens, _) = got
    assert y.shape == dtokens.v_BLHP.shape == (2, 3, 32)
    assert state.ssm_BHPN.shape == (2, 4, 8, 16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.ravel(a), np.ravel(b)), got, want)


def test_estimate_is_the_largest():
    row = {"chip": "v5e", "matmul_ms": 1.0, "roofline_ms": 1.5, "hbm_mb": 1638.0, "least_mb": 819.0}
    row |= {"passes_mb": 1260.0}
    of_bytes = {"bytes_over_least": 2.0, "bytes_over_passes": 1.3}
    found = tpu_aot.estimates(row | {"mega_cycles": 6.0})
    assert found == of_bytes | {"estimate_ms": 4.0, "estimate_over_roofline": pytest.approx(4 / 1.5)}
    assert tpu_aot.estimates(row | {"mega_cycles": 1.0})["estimate_ms"] == pytest.approx(2.0)
    assert tpu_aot.estimates(row) == of_bytes  # a part of the truth is no estimate
    no_clock = tpu_aot.estimates(row | {"chip": "v6e", "mega_cycles": 1000.0, "matmul_ms": 0.0})
    assert no_clock["estimate_ms"] == pytest.approx(1638 / 1640)


def test_rows_stand_beside_plain_xla():
    at = {"chip": "v5e", "case": "siso", "what": "forward", "matmul_ms": 0.0, "roofline_ms": 1.0, "least_mb": 819.0}
    at |= {"passes_mb": 819.0}
    plain = at | {"implementation": "chunked", "hbm_mb": 8190.0, "mega_cycles": 30.0}
    kernel = at | {"implementation": "mosaic_tpu", "hbm_mb": 819.0, "mega_cycles": 1.5}
    failed = at | {"implementation": "other", "failed": "VMEM"}
    shown = tpu_aot.derived([kernel, plain, failed])
    assert shown[0]["hbm_mb_over_plain"] == pytest.approx(0.1)
    assert shown[0]["estimate_ms_over_plain"] == pytest.approx(1 / 20)
    assert shown[0]["mega_cycles_over_plain"] == pytest.approx(1 / 20)
    assert not any(name.endswith("_over_plain") for row in shown[1:] for name in row)


def test_kernel_cycles_are_drawn_out(monkeypatch):
    """What two small calls take, plus as much again for all further work."""

    def simulated(task, chip, kernels):
        if task.case.length > 1 and task.case.heads > 2:
            raise RuntimeError("the compiler stops")
        return 100 + 10 * task.case.batch * task.case.length * task.case.heads

    monkeypatch.setattr(tpu_aot, "simulated", simulated)
    step = ssm.Task("step", tpu_aot.STEP, "mosaic_tpu", "decode")
    assert tpu_aot.kernel_cycles(step, "v5e", {"k"}) == 100 + 10 * 128 * 32
    row = ssm.Task("siso", tpu_aot.LARGE, "mosaic_tpu", "forward")
    assert tpu_aot.kernel_cycles(row, "v5e", {"k"}) == 16 * (100 + 10 * 2048 * 32)
    with pytest.raises(RuntimeError, match="v4"):
        tpu_aot.kernel_cycles(step, "v4", {"k"})
    text = 'hlo_op_estimate {\n  hlo_op_name: "mamba3_decode.1"\n  estimated_cycles: 42\n  num_equivalent_hlos: 2\n}'
    assert tpu_aot.profiled(text) == ("mamba3_decode", 84)


def test_earlier_rows_are_kept_where_versions_agree():
    task = ssm.Task("siso", tpu_aot.LARGE, "chunked", "forward")
    row = {"chip": "v4", "case": "siso", "implementation": "chunked", "what": "forward"}
    other = row | {"chip": "v5e"}
    same = {"jax": "1", "libtpu": "2", "arguments": "joined"}
    before = same | {"commit": "c", "date": "d", "rows": [row, other]}
    taken = other | {"commit": "c", "date": "d"} | tpu_aot.floors(task, tpu_aot.CHIPS["v5e"])
    assert tpu_aot.kept(before, [("v4", task)], same) == [taken]
    assert tpu_aot.kept(before, [("v4", task)], same | {"libtpu": "3"}) == []
    del before["arguments"]  # of other arguments, before there was a choice
    assert tpu_aot.kept(before, [("v4", task)], same) == []
    assert tpu_aot.kept(None, [("v4", task)], {}) == []


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match=r'pip install --target=\S*build/libtpu "libtpu==0\.0\.4\d\.\*"'):
        tpu.prepare()


def test_a_compiler_out_of_the_environment_is_found(monkeypatch, tmp_path):
    """As `make test` puts it; one that is installed as usual goes first."""
    monkeypatch.setitem(sys.modules, "libtpu", None)  # what the test imports in its place leaves with it
    monkeypatch.setattr(tpu, "LIBTPU", tmp_path / "built")
    bare = [folder for folder in sys.path if not (Path(folder) / "libtpu").exists()]
    for name, paths in (("built", bare), ("installed", [str(tmp_path / "installed"), *bare])):
        (tmp_path / name / "libtpu").mkdir(parents=True)
        (tmp_path / name / "libtpu" / "__init__.py").write_text(f"__version__ = {name!r}")
        del sys.modules["libtpu"]
        monkeypatch.setattr(sys, "path", paths)
        assert tpu.prepare() == name


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_keeps_the_compiler_out_of_the_environment():
    """Where libtpu can be imported, every command says that it finds no TPU host, and looks for one."""
    make = ["make", "--dry-run", "--always-make", "test"]
    printed = subprocess.run(make, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    installs = [line for line in printed.splitlines() if "requirements-test.txt" in line]
    assert installs
    assert all(f"--target={tpu.LIBTPU.relative_to(REPOSITORY)} " in line for line in installs)


def test_recorded_table_has_a_commit_and_a_compiler():
    result = common.read("tpu_aot")
    if result is not None:
        assert result["libtpu"] in result["device"]
        assert {row["chip"] for row in result["rows"]} <= set(tpu_aot.CHIPS)
