"""The residuals of the kernels' backward pass, by name, for `jax.checkpoint`'s policies and config.remat."""

import functools

import jax
import pytest

from mamba3_jax.mixers.mixer import KEPT
from mamba3_jax.ops.kernels import kernels
from pallas_kernels.ssm.cases import MIMO, SISO
from tests.ops import cases
from tests.ops.cases import bfloat16, draw

SHAPES = {  # that the kernels take as they are, of a chunk and a split
    "siso": SISO._replace(length=64, groups=1, d_state=32, width=16, planes=8),
    "mimo": MIMO._replace(length=16, d_state=32, width=16, planes=8, shared_angle=True),
}


def with_remat(how: str | None, shape):
    """The op as the mixer calls it."""
    op = functools.partial(kernels, backend="triton", rotation=shape.rotation, interpret=True)
    if how is None:
        return op
    return jax.checkpoint(op, policy=jax.checkpoint_policies.save_only_these_names(*KEPT[how]))


def pulled(op, *inputs):
    values, pull = jax.vjp(op, *inputs)
    return pull(values)


def nbytes(tree) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(tree))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_residuals(shape):
    tokens, heads, state = draw(shape)
    inputs = (bfloat16(tokens), heads, state)
    kept = {}
    for how in (None, "rotation", "op"):
        kept[how] = nbytes(jax.eval_shape(lambda *a, how=how: jax.vjp(with_remat(how, shape), *a)[1], *inputs))
    rows = shape.batch * shape.heads * shape.length * shape.rank
    y, rotated = rows * shape.width * 2, 2 * rows * shape.d_state * 2
    states = 2 * nbytes(state.ssm_BHPN)  # before the one split, and after
    assert kept["op"] <= nbytes(inputs)
    assert kept["rotation"] == kept["op"] + y + states
    assert kept[None] >= kept["rotation"] + rotated


@pytest.mark.full
@pytest.mark.parametrize("how", KEPT)
def test_it_changes_no_gradient(how):
    shape = SHAPES["siso"]
    inputs = draw(shape)
    want, got = (jax.jit(functools.partial(pulled, with_remat(each, shape)))(*inputs) for each in (None, how))
    cases.check_gradients(got, want, 1e-5)
