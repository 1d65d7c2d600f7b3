"""Steps compiled for TPUs that are not there: what is read from their programs, and what is refused."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from experiments.benchmarks import flops
from launch import hlo, hlo_text, needs, tpu
from launch.provenance import REPOSITORY
from mamba3_jax import memory
from mamba3_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from mamba3_jax.sharding import make_mesh
from mamba3_jax.train.fit import Failed
from mamba3_jax.train.step import batch_shapes, state_shapes


def tiny(mesh: str, **model) -> Config:
    sizes = {"d_model": 128, "pattern": "M", "d_state": 64, "compute_dtype": "bfloat16", "remat": "none"} | model
    return Config(
        name="tiny", model=ModelConfig(**sizes), data=DataConfig(length=128, batch=8), train=TrainConfig(mesh=mesh)
    )


@pytest.fixture
def topology(compiler):
    return tpu.devices_of("v5e:2x4")


@pytest.mark.libtpu
def test_the_step_of_training(compiler):
    """Its state is donated, kernels are in it, parameters are gathered and their gradients scattered or summed."""
    config = tiny("fsdp:2,tensor:2")
    row = needs.measured(config, "v5e:2x2")
    mesh = make_mesh(config.train.mesh, tpu.devices_of("v5e:2x2"))
    state, batch = state_shapes(config, mesh), batch_shapes(config.data, mesh)
    given = memory.on_a_device((state, batch)) / 1e9
    assert given <= row["arguments_gb"] < 2 * given  # tiles fill up
    assert row["aliased_gb"] >= 0.99 * memory.on_a_device(state) / 1e9
    assert row["arguments_gb"] <= row["peak_gb"] <= row["held_gb"]
    assert {"mamba3_tpu_scan", "mamba3_tpu_scan_back"} <= set(row["kernels"])
    assert {"all-gather", "all-reduce"} <= {each["kind"] for each in row["collectives"]}
    parameters = memory.on_a_device(state.params) / 1e9
    assert row["sent_gb"] > parameters / 2  # at least what gathers them, in bfloat16
    assert row["gflop"] > row["model_gflop"] > 0
    assert 0 < row["mfu_in_turn"] < row["mfu_at_once"] < 1
    assert any("MFU" in line for line in needs.lines(row))
    assert any("a device 64 of the width" in line for line in needs.lines(row))
    assert not any("of the width" in line for line in needs.lines(row | {"width": None}))


@pytest.mark.libtpu
@pytest.mark.full
def test_the_step_of_decoding(compiler):
    """The state is written in place, and rows over `data` exchange nothing."""
    row = needs.measured(tiny("data:4"), "v5e:2x2", "decode")
    assert row["kernels"]
    assert row["collectives"] == []
    assert row["aliased_gb"] > 0.9 * (row["outputs_gb"] - 8 * 256 * 4 / 4 / 1e9) > 0


def exchanges(x_LD):
    """Exchange an array in every way, its all-reduce five times over."""

    def turn(x_LD, _):
        return 0.5 * jax.lax.psum(jnp.tanh(x_LD), "fsdp"), None

    x_LD, _ = jax.lax.scan(turn, x_LD, None, length=5)
    x_LD = jax.lax.all_gather(x_LD, "data", tiled=True)
    x_LD = jax.lax.psum_scatter(x_LD, "fsdp", tiled=True)
    x_LD = jax.lax.ppermute(x_LD, "data", [(0, 1), (1, 0)])
    return jax.lax.all_to_all(x_LD.reshape(4, -1, x_LD.shape[-1]), "fsdp", 0, 0, tiled=True)


def exchanged(devices, function) -> dict[str, hlo.Collective]:
    """The collectives, by kind, of a function of a part (256, 1024) of an array over data:2, fsdp:4."""
    mesh = make_mesh("data:2,fsdp:4", devices)
    x_LD = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh, Spec("data")))
    run = jax.shard_map(function, mesh=mesh, in_specs=Spec("data"), out_specs=Spec(("data", "fsdp")), check_vma=False)
    program = hlo.Program(jax.jit(run).lower(x_LD).compile().as_text())
    return {each.kind: each for each in program.collectives()}


@pytest.mark.libtpu
def test_known_exchanges_are_counted(topology):
    part = 256 * 1024 * 4
    found = exchanged(topology, exchanges)
    assert found == {
        "all-reduce": hlo.Collective("all-reduce", part, devices=4, times=5),
        "all-gather": hlo.Collective("all-gather", 2 * part, devices=2, times=1),
        "reduce-scatter": hlo.Collective("reduce-scatter", 2 * part, devices=4, times=1),
        "collective-permute": hlo.Collective("collective-permute", part // 2, devices=1, times=1),
        "all-to-all": hlo.Collective("all-to-all", part // 2, devices=4, times=1),
    }
    assert found["all-reduce"].sent == 5 * part * 2 * 3 / 4
    assert found["all-gather"].sent == part


@pytest.mark.libtpu
def test_what_slices_exchange_is_told_apart(compiler):
    """Of each kind, over data: within a slice a device has its part of a sum scattered and gathered."""
    devices, part = tpu.devices_of("2xv5e:2x2"), 256 * 1024 * 4
    of = functools.partial(hlo.Collective, devices=2, times=1, dcn=True)
    assert exchanged(devices, lambda x_LD: jax.lax.psum(x_LD, ("data", "fsdp"))) == {
        "reduce-scatter": hlo.Collective("reduce-scatter", part, devices=4, times=1),
        "all-reduce": of("all-reduce", part // 4),
        "all-gather": hlo.Collective("all-gather", part, devices=4, times=1),
    }
    gathered = exchanged(devices, lambda x_LD: jax.lax.all_gather(x_LD, "data", tiled=True))
    assert gathered == {"all-gather": of("all-gather", 2 * part)}
    scattered = exchanged(devices, lambda x_LD: jax.lax.psum_scatter(x_LD, "data", tiled=True))
    assert scattered == {"reduce-scatter": of("reduce-scatter", part)}


@pytest.mark.libtpu
@pytest.mark.full
def test_the_step_on_two_slices(compiler):
    """Between slices, over data, go the gradients in float32: at least a device's part, and at most all of fsdp's."""
    config = tiny("data:2,fsdp:2,tensor:2")
    row = needs.measured(config, "2xv5e:2x2")
    mesh = make_mesh(config.train.mesh, tpu.devices_of("2xv5e:2x2"))
    gradients = memory.on_a_device(state_shapes(config, mesh).params) / 1e9
    assert {each["kind"] for each in row["collectives"] if each["dcn"]} == {"all-reduce"}
    assert gradients < row["dcn_gb"] < 2.5 * gradients
    assert row["dcn_ms"] == pytest.approx(row["dcn_gb"] / 3.125 * 1e3)
    assert any("of 2 slices" in line for line in needs.lines(row))


@pytest.mark.libtpu
def test_one_exchange_more_is_seen(topology):
    """Planted: what is scattered is gathered once more."""
    found = exchanged(topology, lambda x_LD: jax.lax.all_gather(exchanges(x_LD), "fsdp", tiled=True))
    assert found["all-gather"].devices == 4


@pytest.mark.libtpu
def test_products_are_counted(topology):
    """As the jaxpr has them, whose forms the compiler changes: batches become windows of convolutions."""

    def loss(x_BLHP, w_HPD, q_BLD, k_BMD):
        y_BLD = jnp.einsum("blhp,hpd->bld", x_BLHP, w_HPD)
        z_BLM = jnp.einsum("bld,bmd->blm", q_BLD, k_BMD)
        return (y_BLD**2).sum() + (jnp.tanh(z_BLM) ** 2).sum()

    place = NamedSharding(make_mesh("data:-1", topology), Spec())
    shapes = [(4, 256, 3, 64), (3, 64, 256), (4, 256, 128), (4, 384, 128)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    function = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    program = hlo.Program(jax.jit(function).lower(*arguments).compile().as_text())
    assert program.operations() == flops.count(function, *arguments).matmul


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("channel_id=1, replica_groups=[16,4]<=[4,16]T(1,0), dimensions={0}", 4),
        ("channel_id=1, replica_groups={{0,2,4},{1,3,5}}, to_apply=%add", 3),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, dimensions={3}", 8),
        ("replica_groups=mesh['a'=2,'b'=8], device_ids=([2,8]T(1,0)) {'a','b':(1)4}, to_apply=%add", 8),
        ("source_target_pairs={{0,1},{1,0}}", 1),
    ],
)
def test_groups_of_devices_are_read(written, size):
    assert hlo_text.group_size(f", {written}") == size


def test_groups_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="how many devices"):
        hlo_text.group_size(", replica_groups=other")


# An all-gather that is begun, goes on beside a product and ends: one chain of three fusions.
CHAIN = """HloModule jit_f

%part (p: bf16[128,256]) -> bf16[256,256] {
  %p = bf16[128,256]{1,0} parameter(0)
  ROOT %g = bf16[256,256]{1,0} all-gather(%p), replica_groups=[1,2]<=[2], frontend_attributes={chain_id="3"}
}

%summed (q: f32[256,256]) -> f32[128,256] {
  %q = f32[256,256]{1,0} parameter(0)
  %r = f32[256,256]{1,0} all-reduce(%q), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %at = s32[] constant(0)
  ROOT %s = f32[128,256]{1,0} dynamic-slice(%r, %at, %at), dynamic_slice_sizes={128,256}
}

ENTRY %main (a: bf16[128,256], b: f32[256,256]) -> bf16[256,256] {
  %a = bf16[128,256]{1,0} parameter(0)
  %b = f32[256,256]{1,0} parameter(1)
  %async-collective-start = bf16[256,256]{1,0} fusion(%a), calls=%part
  %fusion.1 = bf16[256,256]{1,0} fusion(%a), calls=%part
  %all-reduce-scatter.1 = f32[128,256]{1,0} fusion(%b), calls=%summed
  ROOT %async-collective-done = bf16[256,256]{1,0} fusion(%a), calls=%part
}
"""


def test_a_chain_counts_once_and_a_sum_of_which_a_part_is_kept_is_a_scatter():
    gathered, scattered = hlo.Program(CHAIN).collectives()
    assert gathered == hlo.Collective("all-gather", 256 * 256 * 2, devices=2, times=1)
    assert scattered == hlo.Collective("reduce-scatter", 256 * 256 * 4, devices=2, times=1)
    apart = CHAIN.replace("all-reduce-scatter", "fusion.2").replace(', frontend_attributes={chain_id="3"}', "")
    assert [each.kind for each in hlo.Program(apart).collectives()] == ["all-gather"] * 2 + ["all-reduce", "all-gather"]


# A layer's part of what all layers have, read and written as tpu7x does: laid out anew, by a fusion within, before.
STACKED = """HloModule jit_f

%anew (x: bf16[8,256,256]) -> bf16[8,256,256] {
  %x = bf16[8,256,256]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %c = bf16[8,256,256]{2,1,0:T(8,128)(2,1)} copy(%x)
}

%part (p: bf16[8,256,256], i: s32[]) -> bf16[1,256,256] {
  %p = bf16[8,256,256]{2,1,0:T(16,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  %f = bf16[8,256,256]{2,1,0:T(8,128)(2,1)} fusion(%p), calls=%anew
  ROOT %s = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%f, %i), dynamic_slice_sizes={1,256,256}
}

ENTRY %main (a: bf16[8,256,256], i: s32[]) -> bf16[1,256,256] {
  %a = bf16[8,256,256]{2,1,0:T(16,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %r = bf16[1,256,256]{2,1,0:T(8,128)(2,1)} fusion(%a, %i), calls=%part
}
"""


def test_what_is_laid_out_anew_and_sliced_is_read_as_the_slice():
    part = 256 * 256 * 2
    assert hlo.Program(STACKED).cost().hbm_bytes == 2 * part + 4  # and which of them
    more = STACKED.replace("copy(%x)", "negate(%x)")  # planted: all of it is computed
    assert hlo.Program(more).cost().hbm_bytes == 9 * part + 4


def test_what_another_unit_is_called_to_exchange_counts():
    """The sparse cores of v5p, v6e and tpu7x."""
    called = CHAIN.replace("fusion(%b), calls=%summed", "call-start(%b), to_apply=%summed")
    assert [each.kind for each in hlo.Program(called).collectives()] == ["all-gather", "all-reduce"]


def test_the_roofline_is_arithmetic():
    sent = [{"sent_gb": 0.1, "dcn": False}, {"sent_gb": 0.3, "dcn": False}, {"sent_gb": 0.0125, "dcn": True}]
    row = {"gflop": 197.0, "hbm_gb": 0.819, "collectives": sent}
    found = needs.roofline(row, 98.5, tpu.CHIPS["v5e"])
    assert (found["compute_ms"], found["hbm_ms"], found["ici_ms"], found["dcn_ms"]) == pytest.approx((1, 1, 2, 4))
    assert found["limit"] == "dcn"
    assert (found["mfu_at_once"], found["mfu_in_turn"]) == pytest.approx((0.125, 0.0625))
    assert needs.roofline(row | {"collectives": sent[:2]}, 98.5, tpu.CHIPS["v5e"])["limit"] == "ici"


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match=r"topology='v9:2x2' begins with none of v4, .*tpu7x: wanted, say, v5e:16x16"):
        needs.measured(tiny("data:-1"), "v9:2x2")


@pytest.mark.libtpu
@pytest.mark.parametrize(
    ("topology", "mesh", "message"),
    [
        ("v5e:2x3", "data:-1", r"topology='v5e:2x3': .*not divisible"),
        ("99999999999xv5e:2x2", "data:-1", "topology='99999999999xv5e:2x2' has more than 131072 devices"),
        ("v5e:999999x999999", "data:-1", "topology='v5e:999999x999999' has more than 131072 devices"),
        (
            "2xv4:2x2x1",
            "data:2",
            r"topology='2xv4:2x2x1': what v4 sends to other slices is not known",
        ),
        ("2xv5e:2x2", "fsdp:8", r"mesh='fsdp:8': data=1 is not a multiple of the 2 slices"),
        ("v5e:2x2", "data:3", r"mesh='data:3' does not make up the 4 devices"),
        ("v5e:2x4", "tensor:8", r"'heads' is an axis of 4, not a multiple of the mesh's tensor=8"),
        ("v5e:4x4", "data:16", r"data.batch=8 is not a positive multiple of 16"),
    ],
)
def test_what_cannot_be_is_refused(topology, mesh, message, compiler):
    with pytest.raises(ValueError, match=message):
        needs.measured(tiny(mesh), topology)


@pytest.mark.libtpu
def test_too_large_a_model_is_refused_before_it_is_compiled(compiler):
    with pytest.raises(
        ValueError, match=r"not enough memory: .* needed on each of 4 devices TPU v5 lite, 17.2 GB free"
    ):
        needs.measured(tiny("data:-1", d_model=16384, d_ff=2**17), "v5e:2x2")


@pytest.mark.libtpu
def test_what_the_compiler_finds_too_large_is_one_line(compiler):
    """A feed-forward whose activations, which nothing adds up before, are more than a chip has."""
    config = tiny("data:-1", d_ff=2**16)
    config.data.batch, config.data.length = 256, 2048
    with pytest.raises(Failed, match=r"data.batch=256 with model.remat='none' does not fit: .*memory.*15.75G"):
        needs.measured(config, "v5e:2x2")


@pytest.mark.libtpu
def test_the_command_says_what_is_wrong_in_one_line():
    """In a process of its own: exit status 2."""
    command = [sys.executable, "-m", "launch.compile", "--config=tests/train/tiny.py"]
    command += ["--topology=v5e:2x4", "--config.train.mesh=tensor:8"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*'heads' is an axis of 4, not a multiple .*\n", done.stderr)
