"""Run by test_sharded.py in a process of its own with 8 devices: prints a line a case, or raises."""

import functools
import math
import re

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from mamba3_jax.ops.cross_entropy import linear_cross_entropy
from mamba3_jax.ops.look_up import Split, look_up
from mamba3_jax.ops.sharded import one_device, sharded
from mamba3_jax.ops.ssm import IMPLEMENTATIONS, ssm
from mamba3_jax.sharding import make_mesh
from pallas_kernels.ssm.cases import MIMO, SISO, SSD
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import draw

SISO = SISO._replace(batch=4, length=21, heads=4)
MIMO = MIMO._replace(batch=4, length=21, heads=4)
AXES = ("data", "tensor")
CASES = {
    # implementation, shape, mesh, packed rows
    "a_group_on_two_devices": ("chunked", SISO, "tensor:4", False),
    "one_row": ("chunked", SISO._replace(batch=1, shared_angle=False), "data:2,tensor:2", False),
    "mamba2": ("chunked", SSD._replace(batch=4, length=21), "data:2,tensor:2", True),
    "kernels": ("triton", SISO, "data:2,tensor:2", True),
    "kernels_mimo": ("triton", MIMO._replace(rank=2), "data:2,tensor:2", False),
    "tpu_kernels": ("mosaic_tpu", SISO._replace(heads=8, groups=4), "data:2,tensor:4", True),
    "tpu_kernels_mimo": ("mosaic_tpu", MIMO, "data:4,tensor:2", False),
    "tpu_rows": ("mosaic_tpu", SISO._replace(batch=8), "data:8", False),
    "tpu_decode": ("mosaic_tpu", SISO._replace(heads=8, length=1), "data:2,tensor:4", True),
    "tpu_decode_mimo": ("mosaic_tpu", MIMO._replace(length=2), "data:4,tensor:2", False),
}


def mesh_of(spec: str):
    """Of as many devices as it takes."""
    devices = math.prod(int(part.partition(":")[2]) for part in spec.split(","))
    return make_mesh(spec, jax.devices()[:devices])


def results(op, inputs, start_BL, cotangent):
    """Values and the gradients of everything."""

    def call(inputs):
        tokens, heads, state = inputs
        return op(tokens._replace(start_BL=start_BL), heads, state)

    values, pull = jax.vjp(call, inputs)
    return values, pull(cotangent)[0]


def worst(op, shape, mesh, packed: bool):
    """Raises where the op over the mesh is not `recurrent` on one device; checks that its output is split."""
    inputs, cotangent = draw(shape), cases.cotangents(shape)
    start_BL = np.random.default_rng(0).random((shape.batch, shape.length)) < 0.2 if packed else None
    want = cases.reference(inputs, start_BL, cotangent, shape.rotation)
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(results, sharded(op, *(axis if axis in mesh.shape else None for axis in AXES))))
        got = run(inputs, start_BL, cotangent)
    cases.check_results(got[0], want[0], 1e-5)
    cases.check_gradients(got[1], want[1], 1e-4)
    return got[0][0].sharding.shard_shape(got[0][0].shape)


def check_cross_entropy():
    """Rows over data, columns over tensor: one device's numbers, and nothing as large as a tile's logits moves."""
    random, (batch, length, width, vocab) = np.random.default_rng(0), (4, 40, 8, 4096)
    x_BLD = random.standard_normal((batch, length, width), np.float32)
    head_DV = random.standard_normal((width, vocab), np.float32)
    targets_BL = random.integers(0, vocab, (batch, length), np.int32)
    weights_BL = random.random((batch, length), np.float32)
    split = Split(batch="data", vocab="tensor")
    loss = functools.partial(linear_cross_entropy, vocab_size=vocab, z_loss=0.01, tiles=4, split=split)
    run = jax.jit(jax.value_and_grad(lambda *arrays: loss(*arrays), (0, 1), has_aux=True))
    want = run(x_BLD, head_DV, targets_BL, weights_BL)
    with jax.set_mesh(mesh := mesh_of("data:2,tensor:4")):
        rows, columns = NamedSharding(mesh, Spec("data")), NamedSharding(mesh, Spec(None, "tensor"))
        arrays = [jax.device_put(x, rows) for x in (x_BLD, targets_BL, weights_BL)]
        arrays.insert(1, jax.device_put(head_DV, columns))
        compiled = run.lower(*arrays).compile()
        got = compiled(*arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rel_rms(np.asarray(a), np.asarray(b)) < 1e-6
    assert got[1][1].sharding.spec == columns.spec
    moved = re.findall(
        r"= f32\[([\d,]*)\]\S* (all-gather|all-reduce|all-to-all|collective-permute)\(", compiled.as_text()
    )
    sizes = {
        kind: max(math.prod(map(int, dims.split(","))) for dims, k in moved if k == kind and dims) for _, kind in moved
    }
    # The head's gradient is summed over rows, dx over columns; a device's logits of a tile are 20 x 1,024.
    assert sizes.pop("all-gather", 0) <= batch * length, "a number a token"
    assert set(sizes) == {"all-reduce"}, sizes
    assert sizes["all-reduce"] <= max(width * vocab // 4, batch * length * width), sizes
    print("cross_entropy")


def check_look_up():
    """Rows, width and entries split: one device's rows to the bit, NaN past the table, and its gradient."""
    random = np.random.default_rng(0)
    table_VD, dx_BLD = random.standard_normal((12, 8), np.float32), random.standard_normal((8, 6, 8), np.float32)
    tokens_BL = random.integers(0, 12, (8, 6), np.int32)
    tokens_BL[3, 2] = 12

    def run(split, table_VD):
        x_BLD, pull = jax.vjp(lambda table_VD: look_up(table_VD, tokens_BL, split), table_VD)
        return x_BLD, pull(dx_BLD)[0]

    want = jax.jit(functools.partial(run, Split()))(table_VD)
    assert np.isnan(want[0][3, 2]).all()
    with jax.set_mesh(mesh := make_mesh("data:2,fsdp:2,tensor:2")):
        split = Split(batch=("data", "fsdp"), width="fsdp", vocab="tensor")
        place = NamedSharding(mesh, Spec("tensor", "fsdp"))
        compiled = jax.jit(functools.partial(run, split), out_shardings=(None, place)).lower(table_VD).compile()
        got = compiled(jax.device_put(table_VD, place))
    np.testing.assert_array_equal(got[0], want[0])
    assert rel_rms(got[1], want[1]) < 1e-6
    gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", compiled.as_text())
    assert gathered, "tokens"
    assert set(gathered) == {"s32"}, "and neither the table nor rows"
    print("look_up")


def main():
    check_cross_entropy()
    check_look_up()
    for name in ("triton", "mosaic_tpu"):
        # Not the TPU's interpreter: of several devices side by side, that can wait for itself (jax 0.10).
        IMPLEMENTATIONS[name] = functools.partial(IMPLEMENTATIONS[name], interpret=True)
    for name, (implementation, shape, spec, packed) in CASES.items():
        op = functools.partial(ssm, rotation=shape.rotation, implementation=implementation, chunk=8)
        shard = worst(op, shape, mesh_of(spec), packed)
        print(name, *shard)

    def one_head_wrong(tokens, heads, state):
        y_BLHP, state = ssm(tokens, heads, state)
        return y_BLHP * (1 + 1e-3 * (jax.lax.axis_index("tensor") == 1)), state

    mesh = mesh_of("data:2,tensor:2")
    try:
        worst(one_head_wrong, SISO, mesh, False)
    except AssertionError:
        print("caught")

    seen = []

    def seeing(tokens, heads, state):
        seen.append(one_device())
        return ssm(tokens, heads, state)

    with jax.set_mesh(mesh):
        assert sharded(ssm, None, None) is ssm
        try:
            jax.eval_shape(sharded(ssm, *AXES), *draw(SISO._replace(heads=3, groups=1)))
        except ValueError as error:
            print(error)
        jax.eval_shape(sharded(seeing, *AXES), *draw(SISO))
        assert (seen, one_device()) == ([True], False)  # inside, the default may be a kernel


if __name__ == "__main__":
    main()
