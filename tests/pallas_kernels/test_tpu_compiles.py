"""The TPU kernels compiled by libtpu for every chip, at the paper's sizes, without a TPU: also over meshes of chips.

A kernel of each kind for each chip at once; heads, lengths and dtypes in all combinations on demand (slow, an hour).
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as Spec

from experiments.benchmarks import ssm, tpu_aot
from launch import hlo
from mamba3_jax.config import Config, ModelConfig
from mamba3_jax.model import boxed_shapes
from mamba3_jax.ops import context
from mamba3_jax.ops.kernels import kernels
from mamba3_jax.ops.sharded import sharded
from mamba3_jax.ops.ssm import Heads, State, Tokens
from mamba3_jax.ops.ssm import ssm as op
from mamba3_jax.sharding import loading, make_mesh, parts, using
from mamba3_jax.train.step import batch_shapes, state_shapes, train_step
from pallas_kernels.ssm.cases import Case, of_layer, varied
from pallas_kernels.ssm.mosaic_tpu.config import default

# Beside the decoding steps of test_decode_tpu.py; float32 with ranks, the longest to compile, for two chips.
QUICK = {("siso_h24_bfloat16", "forward+backward", chip) for chip in tpu_aot.CHIPS}
QUICK |= {("mimo4_long_h64_float32", "forward+backward", chip) for chip in ("v5e", "tpu7x")}
# Heads of other sizes: four side by side, and one.
CASES = tpu_aot.FULL | {
    f"siso_p{width}_float32": varied(tpu_aot.LARGE, heads=8, width=width, dtype="float32") for width in (32, 128)
}
QUICK |= {("siso_p32_float32", "forward+backward", "v5e"), ("siso_p128_float32", "forward+backward", "v4")}


def marks(name: str, what: str, chip: str):
    if (name, what) == ("siso_h24_bfloat16", "forward+backward"):
        return pytest.mark.quick
    return () if (name, what, chip) in QUICK else pytest.mark.slow


TASKS = [
    pytest.param(*(task, chip), id=f"{name}-{task.what}-{chip}", marks=marks(name, task.what, chip))
    for name, case in CASES.items()
    for task in tpu_aot.tasks_of(name, case, ["mosaic_tpu"])
    for chip in tpu_aot.CHIPS
]
KERNELS = {
    "forward": ["mamba3_tpu_scan(?!_back)"],
    "forward+backward": ["mamba3_tpu_scan(?!_back)", "mamba3_tpu_scan_back"],
    "decode": ["mamba3_decode"],
    "over devices": [f"mamba3_tpu_{name}(?!_back)" for name in ("turns", "scan", "states")]
    + ["mamba3_tpu_scan_back", "mamba3_tpu_states_back"],
}


pytestmark = pytest.mark.usefixtures("compiler")


@pytest.mark.libtpu
@pytest.mark.parametrize(("task", "chip"), TASKS)
def test_compiles(task, chip):
    check_kernels(tpu_aot.Target(chip).compile(task).as_text(), task.what)


class LeftOut(ssm.Task):
    """A task of Mamba-2's SSD: none of what can be None."""

    def arguments(self, seed: int = 0):
        left_out = {
            Tokens: ("dt_BLH", "beta_BLH", "angle_BLHS", "gate_BLHP"),
            Heads: ("q_bias_HRN", "k_bias_HRN", "skip_H", "gate_rank_HRP", "norm_HP"),
            State: ("angle_BHS", "k_BRHN", "v_BHP"),
        }
        strip = lambda part: part._replace(**dict.fromkeys(left_out[type(part)])) if type(part) in left_out else part  # noqa: E731
        return tuple(map(strip, super().arguments(seed)))


@pytest.mark.libtpu
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("what", ["forward+backward", "decode"])
def test_what_is_left_out_compiles(what, rank):
    """The scan alone: no kernel of angles before it."""
    case = varied(tpu_aot.STEP if what == "decode" else tpu_aot.LARGE, rank=rank)
    text = tpu_aot.Target("v5e").compile(LeftOut("ssd", case, "mosaic_tpu", what)).as_text()
    check_kernels(text, what)
    assert len(hlo.Program(text).kernels()) == len(KERNELS[what])


def check_kernels(text: str, what: str) -> None:
    """What is compiled for the chip's own unit has our kernels' names."""
    names = " ".join(hlo.Program(text).kernels())
    assert all(re.search(kernel, names) for kernel in KERNELS[what]), names


@pytest.mark.parametrize("chip", tpu_aot.CHIPS)
def test_more_vmem_than_a_chip_has_is_refused(chip):
    """The limit is below what the chip has, and the error says what to shrink."""
    version = {"v4": "TPU_V4", "v5e": "TPU_V5E", "v5p": "TPU_V5P", "v6e": "TPU_V6E", "tpu7x": "TPU_7X"}[chip]
    has = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[version], 1).vmem_capacity_bytes
    tiles = default(chip, 1)
    assert tiles.vmem * 2**20 < has
    case = varied(tpu_aot.LARGE, length=4096)
    how = {"rotation": case.rotation, "tiles": dataclasses.replace(tiles, tokens=4096)}
    run = functools.partial(kernels, backend="mosaic_tpu", anywhere=True, **how)
    message = rf"takes about .* MiB of VMEM, more than tiles.vmem={tiles.vmem}: shrink tiles.tokens=4096"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: run(*ssm.inputs(case), ssm.random_state(case, 0)))


MESHES = {  # topology: data, tensor
    "v4:2x2x2": (2, 8),
    "v5e:2x4": (2, 4),
    "v5p:2x2x2": (4, 2),
    "v6e:2x4": (4, 2),
    "tpu7x:2x2x1": (2, 4),
}
OF_TOKENS = Tokens(**dict.fromkeys(Tokens._fields, Spec("data", None, "tensor")))
OF_TOKENS = OF_TOKENS._replace(**dict.fromkeys(("q_BLRGN", "k_BLRGN", "angle_BLHS"), Spec("data")))
OF_STATE = State(**dict.fromkeys(State._fields, Spec("data", "tensor")))._replace(k_BRHN=Spec("data", None, "tensor"))


def compiled_over(topology: str, case: Case) -> str:
    """The default, forward and backward (one token: forward), over a mesh of all of a topology's devices."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    axes = ("data", "tensor")
    mesh = Mesh(np.array(devices).reshape(MESHES[topology]), axes, axis_types=(AxisType.Auto,) * 2)

    def call(tokens, heads, state):
        run = sharded(functools.partial(op, rotation=case.rotation), *axes)
        if case.length == 1:
            return run(tokens, heads, state)
        results, pull = jax.vjp(run, tokens, heads, state)
        return results, pull(results)

    def placed(arrays, specs):
        place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
        return type(arrays)(*(None if x is None else place(x, s) for x, s in zip(arrays, specs, strict=True)))

    arguments = jax.eval_shape(lambda: (*ssm.inputs(case), ssm.random_state(case, 0)))
    specs = (OF_TOKENS, Heads(*[Spec("tensor")] * len(Heads._fields)), OF_STATE)
    with use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(call).lower(*map(placed, arguments, specs)).compile().as_text()


@pytest.mark.libtpu
@pytest.mark.parametrize(
    "topology", [name if name == "v5e:2x4" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
@pytest.mark.parametrize(("length", "rank"), [(1, 1), (512, 1), pytest.param(512, 4, marks=pytest.mark.slow)])
def test_compiles_over_a_mesh(topology, length, rank):
    """The kernels are in it. Nothing is gathered: only gradients of what is shared are summed, over either axis."""
    case = of_layer(batch=8, length=length, heads=32, width=64, d_state=128, rank=rank, groups=1, dtype="bfloat16")
    text = compiled_over(topology, case)
    check_kernels(text, "decode" if length == 1 else "forward+backward")
    moved = set(re.findall(r"\b(all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", text))
    assert moved == (set() if length == 1 else {"all-reduce"})


@pytest.mark.full
@pytest.mark.libtpu
@pytest.mark.parametrize("rank", [1, 4])
def test_rows_over_devices_compile(rank):
    """Every device has the passes over states and the scan; only states, and gradients' sums, cross."""
    case = of_layer(batch=2, length=4096, heads=8, width=64, d_state=128, rank=rank, groups=1, dtype="bfloat16")
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    axes = ("sequence", "tensor")
    mesh = Mesh(np.array(devices).reshape(4, 2), axes, axis_types=(AxisType.Auto,) * 2)

    def along(*inputs):
        return op(*inputs[:3], rotation=case.rotation, along=inputs[3])

    def loss(tokens, heads):
        lies = context.divide("sequence", "zigzag", case.length)
        run = sharded(context.across(along, lies, rotation=case.rotation), None, "tensor", "sequence")
        return jnp.sum(run(tokens, heads)[0].astype(jnp.float32))

    def placed(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    tokens, heads = jax.eval_shape(lambda: ssm.inputs(case))
    tokens = jax.tree.map(lambda x: placed(x, Spec(None, "sequence")), tokens)
    heads = jax.tree.map(lambda x: placed(x, Spec("tensor")), heads)
    with use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(jax.grad(loss, (0, 1))).lower(tokens, heads).compile().as_text()
    check_kernels(text, "over devices")
    moved = set(re.findall(r"\b(all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", text))
    assert moved == {"collective-permute", "all-reduce"}


@pytest.mark.libtpu
def test_what_is_gathered_is_seen(monkeypatch):
    """Beside the test above: outputs that every device is to have whole."""
    case = of_layer(batch=8, length=1, heads=32, width=64, d_state=128, dtype="bfloat16")
    monkeypatch.setitem(globals(), "sharded", lambda run, *axes: whole(sharded_of(run, *axes)))
    assert "all-gather" in compiled_over("v5e:2x4", case)


sharded_of = sharded


def whole(run):
    return lambda *inputs: jax.lax.with_sharding_constraint(run(*inputs)[0], Spec())


STEP = ModelConfig(vocab_size=4096, d_model=256, d_ff=384, d_state=64, head_dim=32, compute_dtype="bfloat16")


def moved_by_a_step(spec: str, accumulate: int = 1) -> tuple[str, list[tuple[str, str]]]:
    """A training step compiled for 8 chips, and what its gathers and sums move: (kind, shape) of each array."""
    mesh = make_mesh(spec, topologies.get_topology_desc("v5e:2x4", platform="tpu").devices)
    config = Config(model=STEP)
    config.optimizer.accumulate = accumulate
    config.data.batch, config.data.length = parts(mesh, "batch") * accumulate, 96
    shapes = state_shapes(config, mesh)
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    with using(mesh):
        step = jax.jit(functools.partial(train_step, config), out_shardings=(shardings, None), donate_argnums=0)
        text = step.lower(shapes, batch_shapes(config.data, mesh)).compile().as_text()
    moved = re.findall(r"= \(?(.*?) (all-reduce|all-gather)(?:-start)?\(", text)
    return text, [(kind, shape) for found, kind in moved for shape in re.findall(r"\w+\[([\d,]*)\]", found)]


@pytest.mark.full
@pytest.mark.libtpu
def test_a_training_step_over_a_mesh():
    """By kernels. Over tensor two sums a layer cross forward and two backward; no activation is gathered, nor a table.

    The loss has its sum in both of its branches.
    """
    text, shapes = moved_by_a_step("data:2,fsdp:2,tensor:2")
    check_kernels(text, "forward+backward")
    assert shapes.count(("all-reduce", "1,96,256")) == 2 * 2 + 2
    # Of one device 1 x 96 x 256, of all 4 x 96 x 256; the table is gathered over fsdp, once.
    assert [shape for kind, shape in shapes if kind == "all-gather" and shape.endswith("96,256")] == []
    assert {shape for kind, shape in shapes if kind == "all-gather" and re.search(r"4096|2048", shape)} <= {"256,2048"}


@pytest.mark.full
@pytest.mark.libtpu
def test_micro_batches_over_data_are_summed_once():
    """Each gradient, that of the table too, which has two parts: XLA would sum in every turn of the loop, both."""
    text, shapes = moved_by_a_step("data:8", accumulate=4)
    check_kernels(text, "forward+backward")
    params = jax.tree.leaves(nn.meta.unbox(boxed_shapes(STEP)))
    assert sorted(shape for _, shape in shapes if shape) == sorted(",".join(map(str, x.shape)) for x in params)


@pytest.mark.libtpu
@pytest.mark.parametrize(
    ("topology", "spec"),
    [("v5p:4x4x4", "data:32,tensor:2"), ("v6e:8x8", "data:16,tensor:4"), ("v5e:16x16", "data:2,fsdp:16,tensor:8")],
)
def test_a_torus_has_axes_of_any_size(topology, spec):
    """Parts of a physical axis too; and every host is fed, those that share rows alike."""
    mesh = make_mesh(spec, topologies.get_topology_desc(topology, platform="tpu").devices)
    assert ",".join(f"{name}:{size}" for name, size in mesh.shape.items()) == spec
    hosts = {device.process_index for device in mesh.devices.flat}
    loaded = [loading(mesh, host) for host in sorted(hosts)]
    (count,) = {count for _, count in loaded}
    shares = [index for index, _ in loaded]
    assert {shares.count(index) for index in range(count)} == {len(hosts) // count}
