"""Products in one dtype in both passes: against float64, by dtype, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.einsum import einsum
from tests.helpers import rel_rms

EQUATIONS = {"bld,df->blf": ((2, 5, 8), (8, 6)), "blgke,btke->bgklt": ((2, 3, 2, 2, 8), (2, 7, 2, 8))}


def arrays(equation, of_left, of_right, out, seed=0):
    """a, b and the cotangent of the result."""
    random = np.random.default_rng(seed)
    a, b = (random.standard_normal(shape) for shape in EQUATIONS[equation])
    d = random.standard_normal(np.einsum(equation, a, b).shape)
    return jnp.asarray(a, of_left), jnp.asarray(b, of_right), jnp.asarray(d, out)


def exact(equation, a, b, d):
    """Result and gradients in float64."""
    a, b, d = (np.asarray(x, np.float64) for x in (a, b, d))
    terms, result = equation.split("->")
    left, right = terms.split(",")
    return (
        np.einsum(equation, a, b),
        np.einsum(f"{result},{right}->{left}", d, b),
        np.einsum(f"{left},{result}->{right}", a, d),
    )


def pulled(equation, a, b, d, **how):
    result, pull = jax.vjp(functools.partial(einsum, equation, **how), a, b)
    return result, *pull(d)


@pytest.mark.parametrize("out", ["float32", "bfloat16"])
@pytest.mark.parametrize("of_right", ["float32", "bfloat16"])
@pytest.mark.parametrize("of_left", ["float32", "bfloat16"])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_three_products_of_bfloat16(equation, of_left, of_right, out):
    """Every operand is rounded once, sums are float32, and a gradient has the dtype of what it is of."""
    a, b, d = arrays(equation, of_left, of_right, out)
    run = jax.jit(functools.partial(pulled, equation, dtype=jnp.bfloat16, out=jnp.dtype(out)))
    got = run(a, b, d)
    assert [x.dtype for x in got] == [jnp.dtype(name) for name in (out, of_left, of_right)]
    want = exact(equation, *(x.astype(jnp.bfloat16) for x in (a, b, d)))
    for x, exactly in zip(got, want, strict=True):
        tolerance = 1e-6 if x.dtype == jnp.float32 else 2**-8
        assert rel_rms(np.asarray(x, np.float64), exactly) < tolerance
        assert rel_rms(np.asarray(x, np.float64) * 1.01, exactly) > tolerance


@pytest.mark.parametrize("equation", EQUATIONS)
def test_float32_is_float32(equation):
    a, b, d = arrays(equation, "float32", "float32", "float32")
    for x, exactly in zip(pulled(equation, a, b, d, dtype=jnp.float32), exact(equation, a, b, d), strict=True):
        assert rel_rms(np.asarray(x, np.float64), exactly) < 1e-6


def test_no_product_has_operands_of_two_dtypes():
    """In the program, in both passes: 3 products, all of bfloat16."""
    a, b, d = arrays("bld,df->blf", "bfloat16", "float32", "float32")
    run = functools.partial(pulled, "bld,df->blf", dtype=jnp.bfloat16, out=jnp.float32)
    text = jax.jit(run).lower(a, b, d).as_text()
    products = [line.rpartition(" : ")[2] for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all(line.partition("->")[0].count("xbf16>") == 2 for line in products), products


def test_a_transposed_gradient_compiles():
    """What a tied embedding asks for: XLA for CPU has died of it."""
    a, b, _ = arrays("bld,df->blf", "bfloat16", "float32", "float32")
    loss = lambda b: jnp.sum(einsum("bld,df->blf", a, b.T, dtype=jnp.bfloat16))  # noqa: E731
    assert np.isfinite(np.asarray(jax.jit(jax.grad(loss))(b.T))).all()


@pytest.mark.parametrize("equation", ["ab,bc->a", "ab,bc", "...a,ab->...b"])
def test_other_equations_are_refused(equation):
    with pytest.raises(ValueError, match="in two of three terms"):
        einsum(equation, jnp.ones((2, 2)), jnp.ones((2, 2)), dtype=jnp.bfloat16)
