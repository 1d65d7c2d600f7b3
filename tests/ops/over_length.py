"""Run by test_context.py in a process of its own with 8 devices: prints a line a case, or raises."""

import collections
import functools
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from mamba3_jax.ops import attention, context
from mamba3_jax.ops.sharded import sharded
from mamba3_jax.ops.ssm import IMPLEMENTATIONS, ssm
from pallas_kernels.ssm import angle
from pallas_kernels.ssm.cases import MIMO, SISO, SSD, Case
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import draw

LENGTH, CHUNK = 32, 8
SISO, SSD = (shape._replace(batch=4, length=LENGTH) for shape in (SISO, SSD))
MIMO = MIMO._replace(batch=4, length=LENGTH, rank=2)
AXES = ("data", "tensor", "sequence")
PARTS = ("log_a_BH", "first_BH", "angle_BHS", "ssm_BHPN", "k_BRHN", "v_BHP")  # of a transition


class Run(NamedTuple):
    """A case: `sizes` of the mesh's axes, those of 1 left out of it."""

    sizes: tuple[int, int, int]
    shape: Case = SISO
    layout: str = "contiguous"
    packed: bool = True
    state: bool = True
    implementation: str = "chunked"
    dtype: type = np.float64
    narrow: bool = False  # queries, keys, values and gate in bfloat16


QUICK = {"siso": Run((1, 1, 4))}
FULL = {
    "two": Run((1, 1, 2), layout="zigzag"),
    "eight": Run((1, 1, 8)),
    "eight_zigzag": Run((1, 1, 8), layout="zigzag"),
    "float32": Run((1, 1, 8), dtype=np.float32),
    "one_document": Run((1, 1, 4), packed=False, state=False, dtype=np.float32),
    "with_rows": Run((2, 1, 4), layout="zigzag"),
    "with_heads": Run((1, 2, 4)),
    "with_both": Run((2, 2, 2), MIMO),
    "mimo": Run((1, 1, 8), MIMO, layout="zigzag"),
    "mimo_float32": Run((1, 1, 4), MIMO, dtype=np.float32),
    "mamba2": Run((1, 2, 4), SSD),
    "recurrent": Run((1, 1, 4), implementation="recurrent"),
    "kernels": Run((1, 2, 4), implementation="triton", dtype=np.float32),
    "kernels_mimo": Run((2, 1, 4), MIMO, implementation="triton", dtype=np.float32),
    "kernels_mamba2": Run((1, 1, 4), SSD, state=False, implementation="triton", dtype=np.float32),
    "kernels_zigzag": Run((2, 1, 4), layout="zigzag", implementation="triton", dtype=np.float32),
    "tpu_kernels": Run((1, 2, 4), implementation="mosaic_tpu", dtype=np.float32),
    "tpu_kernels_chunks": Run(
        (1, 1, 2), SISO._replace(length=96, shared_angle=False), implementation="mosaic_tpu", dtype=np.float32
    ),
    "tpu_kernels_mimo": Run(
        (2, 1, 4), MIMO._replace(norm=True), layout="zigzag", implementation="mosaic_tpu", dtype=np.float32
    ),
    "tpu_kernels_mamba2": Run((1, 1, 4), SSD, state=False, implementation="mosaic_tpu", dtype=np.float32, narrow=True),
    "tpu_kernels_narrow": Run(
        (1, 1, 4),
        SISO._replace(length=128),
        layout="zigzag",
        implementation="mosaic_tpu",
        dtype=np.float32,
        narrow=True,
    ),
}


def starts(shape):
    """Documents that begin with a device's tokens, at its last one, over several devices, and rows of one."""
    start_BL = np.zeros((shape.batch, shape.length), bool)
    start_BL[0, [0, 8, 15, 16]] = True
    start_BL[1, 3] = True
    start_BL[2, [5, 6, 29]] = True
    return start_BL


def mesh_of(sizes):
    axes = {axis: size for axis, size in zip(AXES, sizes, strict=True) if size > 1}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def order(case: Run):
    """Which token of a row lies in which place."""
    parts = np.arange(case.shape.length).reshape(case.sizes[2], -1)
    if case.layout == "zigzag":
        runs = np.arange(case.shape.length).reshape(2 * case.sizes[2], -1)
        parts = [np.concatenate([runs[z], runs[-1 - z]]) for z in range(case.sizes[2])]
    return np.concatenate(list(parts))


def op_of(case: Run):
    how = {"rotation": case.shape.rotation, "implementation": case.implementation, "chunk": CHUNK}
    op = lambda *inputs: ssm(*inputs[:3], **how, along=inputs[3])  # noqa: E731
    data, tensor, sequence = (axis if size > 1 else None for axis, size in zip(AXES, case.sizes, strict=True))
    lies = context.divide(sequence, case.layout, case.shape.length)
    return sharded(context.across(op, lies, **how), data, tensor, sequence)


def worst(case: Run):
    """Raises where the op over devices is not `recurrent` on one, values and every gradient."""
    inputs, cotangent = draw(case.shape, dtype=case.dtype), cases.cotangents(case.shape, dtype=case.dtype)
    if case.narrow:
        inputs = (cases.bfloat16(inputs[0]), *inputs[1:])
    start_BL = starts(case.shape) if case.packed else None
    if not case.state:
        inputs = (*inputs[:2], None)
    want = cases.reference(inputs, start_BL, cotangent, case.shape.rotation)
    places = order(case)
    back = np.argsort(places)
    moved = lambda tree, places: jax.tree.map(lambda x: np.asarray(x)[:, places], tree)  # noqa: E731

    def call(inputs, start_BL):
        return op_of(case)(inputs[0]._replace(start_BL=start_BL), *inputs[1:])

    @jax.jit
    def run(inputs, start_BL, cotangent):
        values, pull = jax.vjp(lambda inputs: call(inputs, start_BL), inputs)
        return values, pull(jax.tree.map(lambda x, like: x.astype(like.dtype), cotangent, values))[0]

    with jax.enable_x64(case.dtype == np.float64), jax.set_mesh(mesh_of(case.sizes)):
        given = (moved(inputs[0], places), *inputs[1:])
        (y_BLHP, state), gradient = run(given, moved(start_BL, places), (moved(cotangent[0], places), cotangent[1]))
        got = (moved(y_BLHP, back), state), (moved(gradient[0], back), *gradient[1:])
    # Of bfloat16 as for the kernels on one device, test_ssm_mosaic_tpu.py.
    results, gradients = (5e-3, 1e-2) if case.narrow else (1e-12,) * 2 if case.dtype == np.float64 else (1e-5,) * 2
    cases.check_results(got[0], want[0], results)
    cases.check_gradients(got[1], want[1], gradients)
    return y_BLHP.sharding.shard_shape(y_BLHP.shape)


def caught(part: str) -> bool:
    """Tells whether one part in a thousand of what the second device's tokens do to a state is seen."""
    transition = context.transition

    def spoilt(*inputs, **how):
        of, factor = transition(*inputs, **how), 1 + 1e-3 * (jax.lax.axis_index("sequence") == 1)
        if part in of._fields:
            return of._replace(**{part: getattr(of, part) * factor})
        return of._replace(state=of.state._replace(**{part: getattr(of.state, part) * factor}))

    return seen(context, "transition", spoilt, QUICK["siso"]._replace(dtype=np.float32))


def caught_of_kernels(name: str) -> bool:
    """Tells whether it is seen in the state that comes to the second device, or in the gradient, by kernels."""
    before = angle._before

    def spoilt(decay, added, *how):
        x = before(decay, added, *how)
        return x * (1 + 1e-3 * (jax.lax.axis_index("sequence") == 1)) if x.dtype == np.float32 else x

    return seen(angle, "_before", spoilt, FULL[name]._replace(sizes=(1, 1, 4)))


def seen(module, name: str, spoilt, case: Run) -> bool:
    """Tells whether a case fails with this in the place of a module's function."""
    right = getattr(module, name)
    setattr(module, name, spoilt)
    try:
        worst(case)
    except AssertionError:
        return True
    finally:
        setattr(module, name, right)
    return False


def crossing(case: Run) -> dict[str, int]:
    """Counts the collectives of the outputs and the gradients of everything, by kind."""
    tokens, heads, _ = draw(case.shape)
    with jax.set_mesh(mesh := mesh_of(case.sizes)):
        split = NamedSharding(mesh, Spec(None, "sequence"))
        op, tokens = op_of(case), jax.tree.map(lambda x: jax.device_put(x, split), tokens)
        run = jax.jit(jax.value_and_grad(lambda *inputs: jnp.sum(op(*inputs)[0]), (0, 1)))
        text = run.lower(tokens, heads).compile().as_text()
    return collections.Counter(
        re.findall(r" (all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", text)
    )


def attends(layout: str):
    """Attention's values and gradients are one device's, and it does not compute scores of runs after the queries'."""
    attention.QUERIES = 3  # at a time, with some of padding
    random, case = np.random.default_rng(0), Run((2, 1, 4), layout=layout)
    q_BLHE, k_BLKE, v_BLKE = (random.standard_normal((2, LENGTH, heads, 4), np.float32) for heads in (4, 2, 2))
    first_BL = np.where(np.arange(LENGTH) < 13, 0, 13) * np.array([[0], [1]])

    def loss(split, *arrays):
        y_BLHE = attention.rows(*arrays, first_BL[:, order(case)] if split else first_BL, context=split)
        weights_BLHE = jnp.cos(jnp.arange(y_BLHE.size)).reshape(y_BLHE.shape)
        return jnp.sum(y_BLHE * (weights_BLHE[:, order(case)] if split else weights_BLHE)), y_BLHE

    run = lambda split: jax.jit(jax.value_and_grad(functools.partial(loss, split), (0, 1, 2), has_aux=True))  # noqa: E731
    (_, want_BLHE), want = run(None)(q_BLHE, k_BLKE, v_BLKE)
    with jax.set_mesh(mesh_of(case.sizes)):
        over = run(context.divide("sequence", layout, LENGTH))
        (_, got_BLHE), got = over(*(x[:, order(case)] for x in (q_BLHE, k_BLKE, v_BLKE)))
        k_BLKE[:, -1] = np.nan
        (_, spoilt_BLHE), _ = over(*(x[:, order(case)] for x in (q_BLHE, k_BLKE, v_BLKE)))
    back = np.argsort(order(case))
    for a, b in zip((got_BLHE, *got), (want_BLHE, *want), strict=True):
        assert rel_rms(np.asarray(a)[:, back], b) < 1e-6
    run_length = LENGTH // (case.sizes[2] * context.RUNS[layout])
    assert np.isfinite(np.asarray(spoilt_BLHE)[:, back][:, :-run_length]).all()


def refusals():
    """What cannot be split, and what is not."""
    with jax.set_mesh(mesh_of((1, 1, 4))):
        for layout, length in (("contiguous", 6), ("zigzag", 12), ("spiral", 8)):
            try:
                context.divide("sequence", layout, length)
            except ValueError as error:
                print(error)
        assert context.divide("sequence", "contiguous", 3) is None
        assert context.divide("sequence", "zigzag", 7) is None
        assert context.divide(None, "zigzag", 8) is None


def main(which: str):
    for name in ("triton", "mosaic_tpu"):
        # Not the TPU's interpreter: of several devices side by side, that can wait for itself (jax 0.10).
        IMPLEMENTATIONS[name] = functools.partial(IMPLEMENTATIONS[name], interpret=True)
    for name, case in {"quick": QUICK, "full": FULL}[which].items():
        print(name, *worst(case))
    if which == "full":
        for layout in context.RUNS:
            attends(layout)
        print(dict(crossing(QUICK["siso"])), dict(crossing(FULL["eight_zigzag"])))
        kernels = (name for name in ("kernels", "tpu_kernels") if caught_of_kernels(name))
        print(*(part for part in PARTS if caught(part)), *kernels)
        refusals()


if __name__ == "__main__":
    main(*sys.argv[1:])
