"""Products of few rows against their definition in float64, and lowered for CUDA: interpreted, or compiled on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from mamba3_jax.ops import projections
from pallas_kernels import linear
from pallas_kernels.linear import Product, Tile, few_rows
from tests.helpers import rel_rms
from tests.pallas_kernels.family import GPU

MODES = {
    "rows": Tile(columns=4, block=32),
    "loop": Tile(columns=8, block=32, dot=True),
    "wide_loop": Tile(columns=16, block=32, dot=True, rows=32, stages=2),
}
# A GPU's compiler leaves out roundings to bfloat16 of an interpreted kernel (`xla_allow_excess_precision`).
INTERPRET = jax.default_backend() == "cpu"
# (B, K): no remainder of any block, and one of every.
SIZES = {"even": (2, 64), "odd": (5, 75), "many": (33, 40)}


def twice(value, gate):
    return value * jax.nn.sigmoid(gate), value + gate


def shifted(y, bias):
    return (jnp.tanh(y + bias),)


def added(y, residual):
    return (y + residual,)


def three(a, b, c, bias):
    return jax.nn.softplus(a + bias), a * b, -c


def products_of(kind: str, rows: int, dtype):
    """Products of 60 rows of a matrix: bare ones, one of each epilogue, outputs of several dtypes."""
    draw = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape)  # noqa: E731
    float32 = jnp.float32
    return {
        "bare": [Product(37, (dtype,)), Product(23, (float32,), (37,))],
        "gated": [Product(19, (dtype, float32), (3, 30), twice)],
        "epilogues": [
            Product(11, (float32,), (0,), shifted, (draw(11),)),
            Product(13, (dtype,), (11,), added, (draw(rows, 13),)),
            Product(5, (float32,) * 3, (24, 29, 34), three, (draw(5),)),
            Product(21, (float32,), (39,)),
        ],
    }[kind]


def operands(size: str, dtype):
    (rows, length), keys = SIZES[size], jax.random.split(jax.random.key(0), 3)
    x_BK = 3 * jax.random.normal(keys[0], (rows, length))
    weight_MK = (jax.random.normal(keys[1], (60, length)) / length**0.5).astype(dtype)
    return x_BK, weight_MK, 1 + 0.1 * jax.random.normal(keys[2], (length,))


def wanted(x_BK, weight_MK, products, scale_K):
    """The definition, in float32 truly, of the numbers that operands are rounded to."""
    given = [projections.Product(**vars(product)) for product in products]
    given = [dataclasses.replace(product, dtypes=(jnp.float32,) * len(product.dtypes)) for product in given]
    if scale_K is not None:
        x_BK = projections.rms_norm(x_BK, scale_K)
    x_BK = x_BK.astype(weight_MK.dtype).astype(jnp.float32)
    return projections.plain(x_BK, weight_MK.astype(jnp.float32), given)


def errors(got, want, dtypes):
    """Errors over what the dtype of each output allows: of float32, of sums in another order."""
    bound = {jnp.dtype(jnp.float32): 1e-6, jnp.dtype(jnp.bfloat16): 2**-8}
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.dtype(dtype) for dtype in dtypes]
    return [rel_rms(np.asarray(a, np.float32), b) / bound[a.dtype] for a, b in pairs]


def check(mode: str, size: str, kind: str, dtype, *, normed: bool):
    x_BK, weight_MK, scale_K = operands(size, dtype)
    scale_K = scale_K if normed else None
    products = products_of(kind, len(x_BK), dtype)
    run = jax.jit(lambda x, w: few_rows(x, w, products, scale_K=scale_K, tile=MODES[mode], interpret=INTERPRET))
    got, want = run(x_BK, weight_MK), wanted(x_BK, weight_MK, products, scale_K)
    dtypes = [dtype for product in products for dtype in product.dtypes]
    # A row that rounds to the other neighbour once is one rounding in the square root of K off.
    slack = 1 if dtype == jnp.float32 or not normed else 2**-10 / 1e-6
    bounds = [slack if kind == jnp.float32 else 1 for kind in dtypes]
    assert all(error < bound for error, bound in zip(errors(got, want, dtypes), bounds, strict=True))
    return run, x_BK, weight_MK, want, dtypes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mode", "size", "kind", "normed"),
    [
        *((mode, "even", "gated", True) for mode in MODES),
        *((mode, "odd", "epilogues", False) for mode in MODES),
        *((mode, "odd", "gated", True) for mode in MODES),
        *((mode, "many", "epilogues", True) for mode in ("loop", "wide_loop")),  # in several programs
    ],
)
def test_is_its_definition(mode, size, kind, normed, dtype):
    check(mode, size, kind, dtype, normed=normed)


@pytest.mark.quick
@pytest.mark.parametrize("mode", MODES)
def test_an_odd_size_and_a_planted_error(mode):
    """One part in a thousand of the rows or of the matrix."""
    run, x_BK, weight_MK, want, dtypes = check(mode, "odd", "bare", jnp.float32, normed=False)
    for wrong in ((x_BK * 1.001, weight_MK), (x_BK, weight_MK * 1.001)):
        assert min(errors(run(*wrong), want, dtypes)) > 100


@pytest.mark.quick
def test_the_plain_definition_in_numpy():
    """Of one product with a norm and an epilogue of two matrices."""
    x_BK, weight_MK, scale_K = operands("odd", jnp.float32)
    (got,) = projections.plain(x_BK, weight_MK, [projections.Product(9, (jnp.float32,) * 2, (1, 20), twice)], scale_K)
    x, w = np.asarray(x_BK, np.float64), np.asarray(weight_MK, np.float64)
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-5) * np.asarray(scale_K, np.float64)
    value, gate = x @ w[1:10].T, x @ w[20:29].T
    assert rel_rms(got[0], value / (1 + np.exp(-gate))) < 1e-6
    assert rel_rms(got[1], value + gate) < 1e-6


@pytest.mark.quick
def test_what_it_cannot_run():
    x_BK, weight_MK, _ = operands("odd", jnp.float32)
    half = x_BK.astype("float16")
    for given, message in (
        ((half, weight_MK, [Product(9, (jnp.float32,))]), r"wants float32 or bfloat16, not \['float16', 'float32'\]"),
        ((x_BK[:, 1:], weight_MK, [Product(9, (jnp.float32,))]), r"wants \(B, K\) and \(M, K\), not \(5, 74\)"),
        ((x_BK, weight_MK, [Product(9, (jnp.float32,), (52,))]), "wants columns in 60 rows, not 9 from"),
    ):
        with pytest.raises(ValueError, match=message):
            few_rows(*given)
    if jax.default_backend() == "cpu":
        assert linear.available() == "needs an NVIDIA GPU, not 'cpu'"


@pytest.mark.quick
def test_tiles_by_rows():
    """Threads take two rows at most, tensor cores more; XLA what is float32, or too much, or its own."""
    tile = linear.default_tile
    assert not tile(2, 768, "normed", jnp.bfloat16).dot
    assert tile(3, 768, "normed", jnp.bfloat16).dot
    assert tile(2, 768, "gated", jnp.float32) is not None
    assert tile(3, 768, "gated", jnp.float32) is None
    assert tile(1000, 768, "gated", jnp.bfloat16) is None
    assert linear.kind_of([Product(9, (jnp.float32,), (0, 9))], True) == "gated"
    assert linear.kind_of([Product(9, (jnp.float32,), (0, 9)), Product(9, (jnp.float32,))], True) == "normed"


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bare", "gated", "epilogues"])
@pytest.mark.parametrize("mode", MODES)
def test_lowers_for_cuda(mode, kind, dtype):
    x_BK, weight_MK, scale_K = operands("odd", dtype)
    run = lambda x, w: few_rows(x, w, products_of(kind, len(x), dtype), scale_K=scale_K, tile=MODES[mode])  # noqa: E731
    with use_abstract_mesh(GPU):
        text = jax.jit(run).trace(x_BK, weight_MK).lower(lowering_platforms=("cuda",)).as_text()
    assert "few_rows" in text
