"""An einsum of two arrays whose three products, one forward and two backward, all run in one dtype."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
    """The static arguments of a product."""

    left: str  # the letters of a
    right: str  # the letters of b
    result: str
    dtype: jnp.dtype  # of the products
    out: jnp.dtype  # of the result
    of_left: jnp.dtype  # of a, and so of its gradient


def einsum(equation: str, a, b, *, dtype, out=None):
    """Return the einsum of a and b cast to `dtype`, summed in float32, in the dtype `out` (by default `dtype`).

    float32 means true float32 products: the backends' default would be TF32 on NVIDIA GPUs and bfloat16 on TPUs. In
    bfloat16 the cotangent is cast too, before its two products: autodiff of a float32 `out` would make them float32
    products (43 of 171 ms of a training step on an H200). The sums of a gradient are returned in its operand's own
    dtype, so the gradient of a float32 weight is never rounded to bfloat16.

    Args:
        equation: such as "bld,df->blf": two operands, and every letter in at least two of the three terms.
        a: its cast to `dtype` is kept for the backward pass.
        b: kept for the backward pass as it is: a weight is in memory anyway.
        dtype: float32 or bfloat16.
        out: of the result.

    Raises:
        ValueError: another kind of equation.
    """
    (left, right, result), dtype, out = _terms(equation), jnp.dtype(dtype), jnp.dtype(out or dtype)
    if dtype == jnp.float32:
        return product(equation, a.astype(dtype), b.astype(dtype), out)
    plan = Plan(left=left, right=right, result=result, dtype=dtype, out=out, of_left=jnp.dtype(a.dtype))
    return _narrow(plan, a, b)


def product(equation: str, a, b, out):
    """Return the einsum of operands of one dtype, summed in float32, in dtype `out`; float32 means true float32."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=out)


def _terms(equation: str) -> list[str]:
    left, _, rest = equation.partition(",")
    right, _, result = rest.partition("->")
    for letter in sorted({*left, *right, *result}):
        if sum(letter in term for term in (left, right, result)) < 2 or not letter.isalpha():
            raise ValueError(f"{equation=} has {letter!r}, wanted letters that are in two of three terms")
    return [left, right, result]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow(plan: Plan, a, b):
    equation = f"{plan.left},{plan.right}->{plan.result}"
    return product(equation, a.astype(plan.dtype), b.astype(plan.dtype), plan.out)


def _forward(plan: Plan, a, b):
    return _narrow(plan, a, b), (a.astype(plan.dtype), b)


def _backward(plan: Plan, residuals, d):
    (a, b), d = residuals, d.astype(plan.dtype)
    da = product(f"{plan.result},{plan.right}->{plan.left}", d, b.astype(plan.dtype), plan.of_left)
    db = product(f"{plan.left},{plan.result}->{plan.right}", a, d, b.dtype)
    # XLA for CPU (jax 0.10.2) aborts in a transposed bfloat16 product that is summed into float32.
    return da, jax.lax.optimization_barrier(db)


_narrow.defvjp(_forward, _backward)
