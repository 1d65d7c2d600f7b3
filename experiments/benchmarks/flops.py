"""Operations of a function, counted from its jaxpr: no compiler, no device, exact for matrix products."""

import math
from typing import NamedTuple

import jax
from jax.extend import core

# One operation an output element. Comparisons, selections, conversions and movement are not arithmetic.
ELEMENTWISE = frozenset(
    "abs acos add add_any asin atan atan2 cbrt ceil cos cosh div erf erf_inv erfc exp exp2 expm1 floor integer_pow "  # noqa: SIM905
    "lgamma log log1p logistic max min mul neg pow rem round rsqrt sign sin sinh sqrt square sub tan tanh".split()
)
# One operation an input element.
REDUCTIONS = frozenset(
    "argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_max reduce_min reduce_prod reduce_sum".split()  # noqa: SIM905
)
# How often these run, or what they hold, is not in the jaxpr.
UNCOUNTABLE = frozenset({"while", "pallas_call", "custom_call", "ffi_call", "pure_callback", "io_callback"})


class Operations(NamedTuple):
    """Floating point operations: two a multiply-add in matrix products, one an element otherwise."""

    matmul: int
    elementwise: int

    def times(self, count: int) -> "Operations":
        return Operations(self.matmul * count, self.elementwise * count)

    def plus(self, other: "Operations") -> "Operations":
        return Operations(self.matmul + other.matmul, self.elementwise + other.elementwise)


def count(function, *args) -> Operations:
    """Operations of one call of `function(*args)`; the arguments may be `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: a primitive whose operations the jaxpr does not tell (a `while` loop, a foreign kernel).
    """
    return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def count_jaxpr(jaxpr) -> Operations:
    """Operations of a jaxpr; the body of a `scan` counts once a trip, a `cond` as its costliest branch."""
    total = Operations(0, 0)
    for equation in jaxpr.eqns:
        total = total.plus(count_equation(equation))
    return total


def count_equation(equation) -> Operations:
    name = equation.primitive.name
    if name in UNCOUNTABLE:
        raise ValueError(f"the operations of {name!r} cannot be counted from a jaxpr")
    if name == "dot_general":
        return Operations(dot_operations(equation), 0)
    if name in ELEMENTWISE:
        return Operations(0, equation.outvars[0].aval.size)
    if name in REDUCTIONS:
        return Operations(0, equation.invars[0].aval.size)
    inner = [count_jaxpr(body) for body in inner_jaxprs(equation)]
    if not inner:
        return Operations(0, 0)
    if name == "cond":
        return max(inner, key=sum)
    total = inner[0]
    for more in inner[1:]:
        total = total.plus(more)
    return total.times(equation.params["length"] if name == "scan" else 1)


def dot_operations(equation) -> int:
    """2 (output elements) (contracted elements)."""
    (left_contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in left_contracted)


def inner_jaxprs(equation) -> list:
    """Return what an equation calls: the bodies in its parameters. A custom gradient's rules are not part of it."""
    bodies = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, core.ClosedJaxpr):
                bodies.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                bodies.append(item)
    return bodies
