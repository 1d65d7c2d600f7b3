"""Work and memory a token of the parallel paths do not grow with the length, and the backward pass keeps no matrices.

Only shapes are traced and compiled here, nothing runs. XLA's own count takes the body of a loop once, so the work is
counted from the jaxpr: multiply-adds of matrix products, times the trips of the loops around them.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.ssm import ssm
from pallas_kernels.ssm.cases import Case
from tests.ops.cases import draw

LENGTHS = (2048, 8192, 32768, 131072)
PARALLEL = ("associative", "chunked")  # a GPU's or TPU's kernel is compiled for no CPU
SISO = Case(batch=1, heads=2, groups=1, d_state=16, width=8, planes=4)
MIMO = SISO._replace(rank=4, rotation="half")
FLOAT = 4  # bytes
# The matrices of a chunk, 512 KiB whatever the length, are planned into arrays of a row that nobody reads any more. On
# a GPU there is no room for them in those of 2,048 tokens, which are as small: so memory is measured of longer rows.
LONG = (8192, 32768, 131072, 524288)


def abstract(shape: Case, length: int):
    """The op's inputs, shapes only."""

    def lengthen(array):
        return jax.ShapeDtypeStruct((shape.batch, length, *array.shape[2:]), array.dtype)

    tokens, heads, state = draw(shape._replace(length=1))
    return jax.tree.map(lengthen, tokens), *jax.eval_shape(lambda *parts: parts, heads, state)


def functions(shape: Case, implementation: str):
    """The forward pass; and the gradients of a loss of everything that comes out."""
    op = functools.partial(ssm, rotation=shape.rotation, implementation=implementation)

    def loss(*inputs):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(op(*inputs)))

    return {"forward": op, "gradients": jax.grad(loss, argnums=(0, 1, 2))}


def inner(jaxpr):
    """(equation's inner jaxpr, times it runs) for every equation that has one."""
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(value, "eqns"):
                yield value, times
            elif hasattr(value, "jaxpr"):
                yield value.jaxpr, times


def work(jaxpr) -> int:
    """Multiply-adds of all matrix products, and one for every element that any other operation writes."""
    total = 0
    for equation in jaxpr.eqns:
        size = sum(math.prod(out.aval.shape) for out in equation.outvars)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            size *= math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        total += size
    return total + sum(times * work(body) for body, times in inner(jaxpr))


@pytest.mark.full
@pytest.mark.parametrize("implementation", PARALLEL)
@pytest.mark.parametrize("shape", [SISO, MIMO], ids=["siso", "mimo"])
def test_work_a_token_is_constant(shape, implementation):
    for name, function in functions(shape, implementation).items():
        total = {length: work(jax.make_jaxpr(function)(*abstract(shape, length)).jaxpr) for length in LENGTHS}
        a_token = [(total[b] - total[a]) / (b - a) for a, b in itertools.pairwise(LENGTHS)]
        assert max(a_token) < 1.001 * min(a_token), f"{name}: {a_token}"
        assert min(a_token) > shape.heads * shape.width * shape.d_state, "the count misses the state's update"


def attention(tokens, heads, state):
    """What grows with the length."""
    score = jnp.exp(jnp.einsum("blhp,bmhp->bhlm", tokens.v_BLHP, tokens.v_BLHP))
    return jnp.einsum("bhlm,bmhp->blhp", score, tokens.v_BLHP)


def test_growing_work_is_caught():
    """Attention's work a token grows with the length, and the count sees it."""
    short, long = (work(jax.make_jaxpr(attention)(*abstract(SISO, n)).jaxpr) / n for n in LENGTHS[:2])
    assert long == pytest.approx(4 * short, rel=0.01)


def bytes_a_token(function, lengths) -> list[float]:
    """Temporary bytes that each token more takes, from one length to the next."""
    lowered = {length: jax.jit(function).lower(*abstract(MIMO, length)) for length in lengths}
    plans = {length: lowered[length].compile().memory_analysis() for length in lengths}
    return [
        (plans[b].temp_size_in_bytes - plans[a].temp_size_in_bytes) / (b - a) for a, b in itertools.pairwise(lengths)
    ]


@pytest.mark.full
@pytest.mark.parametrize("implementation", PARALLEL)
@pytest.mark.parametrize("name", ["forward", "gradients"])
def test_memory_a_token_is_constant(name, implementation):
    """Temporary bytes as XLA plans them: the same for a token at every length, and a small multiple of its inputs."""
    slope = bytes_a_token(functions(MIMO, implementation)[name], LONG)
    assert max(slope) < 1.05 * max(min(slope), 1), f"bytes a token: {slope}"
    inputs = sum(math.prod(leaf.shape[2:]) * FLOAT for leaf in jax.tree.leaves(abstract(MIMO, 1)[0]))
    assert max(slope) < 6 * inputs, f"{slope} bytes a token beside {inputs} of its inputs"


def test_growing_memory_is_caught():
    """A token more of attention takes memory for every token before it, and the plan says so."""
    first, second = bytes_a_token(attention, (512, 2048, 8192))
    assert second == pytest.approx(4 * first, rel=0.1)


@pytest.mark.parametrize("implementation", PARALLEL)
@pytest.mark.parametrize("shape", [SISO, MIMO], ids=["siso", "mimo"])
def test_backward_keeps_inputs_and_chunk_states(shape, implementation):
    """What the forward pass leaves for the backward: nothing of Q x Q, no state a token, less than twice the inputs
    beside the states between chunks."""
    length, chunk = 2048, 32
    op = functools.partial(ssm, rotation=shape.rotation, implementation=implementation, chunk=chunk)
    inputs = abstract(shape, length)
    residuals = jax.tree.leaves(jax.eval_shape(lambda *inputs: jax.vjp(op, *inputs)[1], *inputs))
    for leaf in residuals:
        assert leaf.shape[-2:] != (chunk, chunk), f"{leaf.shape} is a matrix of a chunk"
    kept = sum(math.prod(leaf.shape) for leaf in residuals)
    states = (length // chunk) * math.prod(inputs[2].ssm_BHPN.shape)
    given = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(inputs))
    assert states < kept < 2 * given + states, f"{kept} numbers kept, {given} came in, {states} are chunk states"


def test_an_op_that_keeps_chunk_matrices_is_caught():
    def careless(x_CQN):
        return jax.lax.map(lambda x_QN: jnp.exp(x_QN @ x_QN.T) @ x_QN, x_CQN)

    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(careless, x)[1], np.zeros((8, 32, 4), np.float32)))
    assert any(leaf.shape[-2:] == (32, 32) for leaf in kept)
