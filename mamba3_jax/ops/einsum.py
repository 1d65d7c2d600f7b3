"""einsum of two arrays whose three products, one forward and two backward, all run in one dtype."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
    """What is known of a product before its numbers are."""

    left: str  # the letters of a, b and the result
    right: str
    result: str
    dtype: jnp.dtype  # of the products
    out: jnp.dtype  # of the result
    of_left: jnp.dtype  # of a, so of its gradient


def einsum(equation: str, a, b, *, dtype, out=None):
    """einsum of a and b cast to `dtype`, summed in float32 and returned in `out` (default `dtype`).

    float32 means true float32 products: the backends' default would be TF32 on NVIDIA GPUs and bfloat16 on TPUs. In
    bfloat16 the cotangent is cast too, before its two products: autodiff of a float32 `out` would make them products of
    float32 (43 of 171 ms of a training step on an H200). A gradient leaves its sum in its operand's own dtype, so that
    of a float32 weight is never rounded to bfloat16.

    Args:
        equation: "bld,df->blf", say: two operands, and every letter in at least two of the three terms.
        a: kept for the backward pass in `dtype`.
        b: kept as it is: a weight is there anyway.
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
    """einsum of operands of one dtype, summed in float32 and returned in `out`; of float32 ones truly so."""
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
    # XLA for CPU (jax 0.10.2) dies of a transposed bfloat16 product that is summed into float32.
    return da, jax.lax.optimization_barrier(db)


_narrow.defvjp(_forward, _backward)
