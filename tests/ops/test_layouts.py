"""What every kernel is given and gives, as recorded in layouts.json: a change at the boundary changes no kernel.

`python -m tests.ops.test_layouts` records it again, for a change that is meant to.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.ssm import IMPLEMENTATIONS, ssm
from pallas_kernels.ssm.cases import MIMO, SISO, SSD
from tests.ops.cases import bfloat16, draw

PATH = Path(__file__).with_name("layouts.json")
LARGE = {"batch": 1, "heads": 2, "groups": 1, "d_state": 50, "width": 24, "planes": 5}
SHAPES = {
    "siso": SISO._replace(**LARGE | {"length": 131, "d_state": 128, "width": 64, "planes": 32}),
    "siso_padded": SISO._replace(**LARGE, length=131, norm=True),
    "mimo": MIMO._replace(**LARGE | {"length": 40, "d_state": 64, "width": 64, "planes": 16}),
    "mimo_padded": MIMO._replace(**LARGE, length=530, norm=False, shared_angle=True),
    "ssd": SSD._replace(**LARGE, length=131),
    "siso_token": SISO._replace(**LARGE | {"length": 1, "d_state": 64, "width": 64, "planes": 16}),
    "mimo_token": MIMO._replace(**LARGE | {"length": 1, "d_state": 64, "width": 64, "planes": 16}),
    "ssd_token": SSD._replace(**LARGE | {"length": 1}),
}
KERNELS = ("triton", "mosaic_gpu", "mosaic_tpu")
PACKED = ("siso", "mimo_padded", "siso_token")


def kernels(jaxpr) -> list[str]:
    """Every pallas_call of a program, as "name: sorted inputs -> sorted outputs"; a kernel in a loop once."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("pallas_call", "mpmd_map", "core_map"):
            found.append(_line(equation))
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += kernels(inner)
    return found


def _line(equation) -> str:
    name = equation.params.get("name") or getattr(equation.params.get("name_and_src_info"), "name", "?")
    sides = (sorted(_array(v.aval) for v in side) for side in (equation.invars, equation.outvars))
    return f"{name}: {' -> '.join(' '.join(side) for side in sides)}"


def _array(aval) -> str:
    return f"{aval.dtype.name}[{','.join(map(str, aval.shape))}]"


def traced(implementation: str, case: str) -> dict[str, list[str]]:
    """The kernels of the forward pass, and of both."""
    shape = SHAPES[case]
    tokens, heads, state = draw(shape)
    if case in PACKED:
        tokens = tokens._replace(start_BL=np.arange(shape.length)[None] % 50 == 7)
    inputs = bfloat16(tokens), heads, state

    def op(tokens, heads, state):
        return ssm(tokens, heads, state, rotation=shape.rotation, implementation=implementation)

    def both(*inputs):
        results, pull = jax.vjp(op, *inputs)
        return pull(jax.tree.map(jnp.ones_like, results))

    return {name: kernels(jax.make_jaxpr(run)(*inputs).jaxpr) for name, run in (("forward", op), ("both", both))}


@functools.cache
def recorded() -> dict:
    return json.loads(PATH.read_text())


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels_are_given_what_they_were(implementation, case):
    assert traced(implementation, case) == recorded()[implementation][case]


if __name__ == "__main__":
    for name in KERNELS:
        IMPLEMENTATIONS[name] = functools.partial(IMPLEMENTATIONS[name], interpret=True)
    found = {name: {case: traced(name, case) for case in SHAPES} for name in KERNELS}
    PATH.write_text(json.dumps(found, indent=1) + "\n")
