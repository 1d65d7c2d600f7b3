"""bfloat16 q, k, v and gate on the kernels, as models use them: odd sizes, packed rows, carried states, long rows.

Judged by `recurrent` in float64 on the rounded numbers. Queries, keys, values, weights and the state are rounded to
bfloat16 (2^-9) once each before their products. On a GPU, at sizes that fill its tiles and more of them; on a CPU the
kernels run in Pallas's interpreter, at few and small ones.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.ops.kernels import BACKENDS
from mamba3_jax.ops.ssm import IMPLEMENTATIONS, ssm
from pallas_kernels.ssm.cases import MIMO, SISO
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import bfloat16, draw

VALUES, GRADIENTS, SUMS = 5e-3, 1e-2, 2e-2
# Over the row, so do their errors; of either sign: what is left has those of all of it (the skip's with a norm, which
# does not see scale).
ADD_UP = ("dt_BLH", "log_a_BLH", "angle_BLHS", "angle_BHS", "skip_H")
ON_GPU = jax.default_backend() == "gpu"
on_gpu = pytest.mark.skipif(not ON_GPU, reason="a GPU's memory and sizes")
every_kernel = pytest.mark.parametrize("implementation", sorted(BACKENDS))

SISO = SISO._replace(heads=3, groups=1, d_state=64, width=32, planes=16)
MIMO = MIMO._replace(heads=2, d_state=64, width=32, planes=32, batch=1)
LEFT_OUT = dict.fromkeys(("skip", "gate", "bias", "looks_back", "turns"), False)  # Mamba-2's SSD
SHAPES = {
    "siso": SISO._replace(length=65),
    "mimo": MIMO._replace(length=33),
    "ssd": SISO._replace(length=65, **LEFT_OUT),
}
if ON_GPU:
    SISO = SISO._replace(d_state=128, width=64, planes=32)
    MIMO = MIMO._replace(d_state=128, width=64, planes=32, shared_angle=True)
    SHAPES = {f"siso_l{length}": SISO._replace(length=length) for length in (1, 63, 65, 1000, 2047)}
    SHAPES |= {f"mimo_l{length}": MIMO._replace(length=length, heads=5) for length in (1, 63, 1000)}
    SHAPES |= {f"no_{part}": SISO._replace(length=1000, **{part: False}) for part in LEFT_OUT}
    SHAPES |= {"ssd": SISO._replace(length=1000, **LEFT_OUT), "ssd_r4": MIMO._replace(length=1000, **LEFT_OUT)}
    SHAPES |= {f"r{rank}": MIMO._replace(length=257, rank=rank) for rank in (2, 8)}
    SHAPES |= {
        f"n{n}_p{p}_{'half' if part == 4 else 'whole'}": SISO._replace(
            length=131, d_state=n, width=p, planes=n // part, groups=3, norm=True, rotation="half"
        )
        for (n, p), part in itertools.product(((16, 32), (32, 64), (64, 64), (128, 128), (256, 64)), (2, 4))
    }


def narrow(inputs):
    """Tokens and what a state holds of them in bfloat16."""
    tokens, heads, state = inputs
    before = {"k_BRHN": state.k_BRHN, "v_BHP": state.v_BHP}
    return bfloat16(tokens), heads, state._replace(**jax.tree.map(lambda x: x.astype(jnp.bfloat16), before))


def drawn(shape):
    """With a norm, biases and skips near 1, as layers have them: it divides by the RMS of the output, in a document's
    first token (D + gamma q . k) x, and where others bring that near zero all gradients of the row are its rounding."""
    tokens, heads, state = draw(shape)
    if shape.norm:
        near = {name: getattr(heads, name) for name in ("q_bias_HRN", "k_bias_HRN", "skip_H")}
        heads = heads._replace(**jax.tree.map(lambda x: 1 + np.float32(0.1) * x, near))
    return narrow((tokens, heads, state))


def start_of(shape, packed: bool):
    """Documents of a few tokens and of many, in the last row of the batch alone."""
    if not packed:
        return None
    starts = np.isin(np.arange(shape.length), (0, 5, 17, 18, 64, 700)) & (np.arange(shape.length) < shape.length - 2)
    return starts[None] & (np.arange(shape.batch) == shape.batch - 1)[:, None]


def pulled(implementation, shape):
    """(inputs, start, cotangents) -> (y, state), gradients."""
    chunk = None if ON_GPU else 16
    return cases.pulled(implementation, shape.rotation, chunk)


def runs(implementation, shape) -> bool:
    """Or it raises what it does not support, which is all that is wanted then."""
    op = functools.partial(IMPLEMENTATIONS[implementation], rotation=shape.rotation)
    try:
        jax.eval_shape(op, *drawn(shape._replace(length=2)))
    except ValueError as error:
        if f"implementation='{implementation}'" not in str(error):
            raise
        return False
    return True


@every_kernel
@pytest.mark.parametrize(
    ("name", "packed"),
    itertools.product(SHAPES, (False, True))
    if ON_GPU
    else [("siso", False), ("mimo", True), pytest.param("ssd", True, marks=pytest.mark.quick)],
)
def test_agrees_with_the_definition(name, packed, implementation):
    """Values, and gradients of everything, the states before and after included."""
    shape = SHAPES[name]
    if not runs(implementation, shape):
        return
    inputs = drawn(shape)
    y, after = cases.cotangents(shape)
    cotangent = (y.astype(jnp.bfloat16), narrow((inputs[0], None, after))[2])
    start_BL = start_of(shape, packed)
    want = cases.reference(inputs, start_BL, cotangent, shape.rotation)
    results, gradients = pulled(implementation, shape)(inputs, start_BL, cotangent)
    cases.check_results(results, want[0], VALUES)
    of = lambda tree, sums: {k: v for k, v in cases.named(tree).items() if k.endswith(ADD_UP) == sums}  # noqa: E731
    cases.check_gradients(of(gradients, False), of(want[1], False), GRADIENTS)
    cases.check_gradients(of(gradients, True), of(want[1], True), SUMS)


@every_kernel
def test_an_error_of_one_part_in_a_hundred_is_caught(implementation):
    """What bfloat16 leaves to see of one: in an input, of the very outputs and gradients that are compared above."""
    shape = SHAPES["siso_l65" if ON_GPU else "siso"]
    inputs = drawn(shape)
    wrong = (inputs[0]._replace(dt_BLH=inputs[0].dt_BLH * np.float32(1.01)), *inputs[1:])
    y, after = cases.cotangents(shape)
    cotangent = (y.astype(jnp.bfloat16), narrow((inputs[0], None, after))[2])
    want = cases.reference(inputs, None, cotangent, shape.rotation)
    results, _ = pulled(implementation, shape)(wrong, None, cotangent)
    with pytest.raises(AssertionError, match="is not below"):
        cases.check_results(results, want[0], VALUES)


@every_kernel
def test_no_gradient_crosses_a_start(implementation):
    """Exactly 0.0, from the later document into the earlier one and the state before it."""
    shape, begin = SISO._replace(batch=1, heads=1, length=100), 70
    tokens, heads, state = drawn(shape)
    start_BL = (np.arange(shape.length) == begin)[None]

    @jax.jit
    def gradients(tokens, state):
        def loss(tokens, state):
            tokens = tokens._replace(start_BL=start_BL)
            y_BLHP, after = ssm(tokens, heads, state, rotation=shape.rotation, implementation=implementation)
            return jnp.sum(y_BLHP[:, begin:].astype(jnp.float32)) + sum(jnp.sum(x.astype(jnp.float32)) for x in after)

        return jax.grad(loss, argnums=(0, 1))(tokens, state)

    of_tokens, of_state = jax.tree.map(lambda x: np.asarray(x, np.float64), gradients(tokens, state))
    for array in jax.tree.leaves(of_tokens):
        assert not array[:, :begin].any()
        assert array[:, begin:].any()
    assert not any(array.any() for array in of_state)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_what_adds_up_over_a_row_is_as_good_as_over_a_few_tokens(implementation):
    """Its errors must not add up with it: the gradients of dt, log_a, the angles and the first angle."""
    shape = SISO._replace(batch=1, heads=1, length=600)
    check_sums(pulled(implementation, shape), shape, GRADIENTS)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_a_norm_before_a_gradient_of_the_last_state(implementation):
    """It makes the gradients of the outputs small against that, whose rounding then shows in the gradient of log_a."""
    shape = MIMO._replace(heads=2, d_state=128, width=64, planes=32, shared_angle=True, length=257, rank=2)
    check_sums(cases.pulled(implementation, shape.rotation, None), shape, SUMS)


def check_sums(call, shape, tolerance: float):
    """The gradients that add up over the row."""
    inputs = drawn(shape)
    y, after = cases.cotangents(shape)
    cotangent = (y.astype(jnp.bfloat16), narrow((inputs[0], None, after))[2])
    want = cases.reference(inputs, None, cotangent, shape.rotation)
    _, gradients = call(inputs, None, cotangent)
    of_sums = lambda tree: {k: v for k, v in cases.named(tree).items() if k.endswith(ADD_UP)}  # noqa: E731
    assert len(of_sums(gradients)) == len(ADD_UP)
    cases.check_gradients(of_sums(gradients), of_sums(want[1]), tolerance)


@on_gpu
@every_kernel
@pytest.mark.parametrize("shape", [SISO, MIMO], ids=["siso", "mimo"])
def test_the_same_bits_whatever_memory_held(shape, implementation):
    """Every entry of every output is written: memory full of NaN before, and of other numbers."""
    shape = shape._replace(length=1000, heads=8)
    inputs, start_BL = drawn(shape), start_of(shape, True)
    y, after = cases.cotangents(shape)
    cotangent = (y.astype(jnp.bfloat16), narrow((inputs[0], None, after))[2])
    call, found = pulled(implementation, shape), []
    for poison in (np.nan, 1e30):
        spoilt = [jnp.full(2**27, poison, jnp.float32).block_until_ready() for _ in range(16)]
        del spoilt
        found.append(jax.tree.leaves(jax.tree.map(np.asarray, call(inputs, start_BL, cotangent))))
    for first, second in zip(*found, strict=True):
        assert np.isfinite(np.asarray(first, np.float64)).all()
        np.testing.assert_array_equal(first, second)


@on_gpu
@pytest.mark.alone
@every_kernel
def test_a_million_tokens(implementation):
    """Past 2^32 entries of queries of all heads: the last tokens' outputs and gradients are those of the last alone."""
    length, last = 2**20, 4096
    shape = SISO._replace(batch=1, heads=32, length=2)
    _, heads, _ = draw(shape)
    keys = iter(jax.random.split(jax.random.key(0), 16))
    tokens, _, _ = drawn(shape)

    def long(array):
        shape_BL = (1, length, *array.shape[2:])
        return jax.random.uniform(next(keys), shape_BL, jnp.float32, 0.1, 0.9).astype(array.dtype)

    tokens = jax.tree.map(long, tokens)
    tokens = tokens._replace(log_a_BLH=-tokens.log_a_BLH)
    end = jax.tree.map(lambda array: array[:, -last:], tokens)
    op = functools.partial(ssm, implementation=implementation)
    _, middle = jax.jit(op)(jax.tree.map(lambda array: array[:, :-last], tokens), heads, None)

    def loss(v_BLHP, tokens, state):
        y_BLHP, after = op(tokens._replace(v_BLHP=v_BLHP), heads, state)
        return jnp.sum(jnp.square(y_BLHP[:, -64:].astype(jnp.float32))), (y_BLHP[:, -last:], after)

    call = jax.jit(jax.grad(loss, has_aux=True))
    d_whole, whole = call(tokens.v_BLHP, tokens, None)
    d_end, alone = call(end.v_BLHP, end, middle)
    assert rel_rms(whole[0], alone[0]) < VALUES
    cases.check_results((0 * whole[0], whole[1]), (0 * np.asarray(alone[0], np.float64), alone[1]), VALUES)
    assert rel_rms(d_whole[:, -last:], d_end) < GRADIENTS
