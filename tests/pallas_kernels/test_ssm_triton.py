"""The Triton kernels without a GPU: they lower for CUDA, refuse what they cannot run, leave nothing unwritten.

Their results are tested with every other implementation's in tests/ops, in Pallas's interpreter. That accepts more than
the GPU does, so they are lowered for CUDA too. Neither runs the Triton compiler.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from mamba3_jax.ops.ssm import ssm
from mamba3_jax.ops.triton import check, triton
from pallas_kernels.ssm.triton import Tile, scan
from tests.ops import cases
from tests.ops.cases import MIMO, SISO, bfloat16, draw
from tests.ops.quick import quick_jit

GPU = AbstractMesh(
    (1,),
    ("device",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu"),
)


def inputs(rows=64, d_state=32, width=16, dtype=jnp.float32, batch=1, n_heads=2):
    """Arguments of `scan`, random."""
    random = np.random.default_rng(0)

    def normal(*sizes):
        return jnp.asarray(random.standard_normal((batch, n_heads, *sizes)), jnp.float32)

    q, k, x = (normal(rows, size).astype(dtype) for size in (d_state, d_state, width))
    rest, gamma, kappa = -0.1 * jnp.abs(normal(rows)), normal(rows), normal(rows)
    document = jnp.zeros((batch, rows), jnp.int32)
    return q, k, x, jnp.zeros_like(rest), rest, gamma, kappa, document, normal(width, d_state)


def run(*arrays, tile: Tile):
    """Outputs and all gradients of `scan`."""
    *real, document, h_BHPN = arrays
    results, pull = jax.vjp(lambda h_BHPN, *real: scan(*real, document, h_BHPN, tile), h_BHPN, *real)
    return results, pull(results)


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("d_state", "width", "rank", "segments"),
    [
        (16, 16, 1, 2),
        (128, 64, 1, 1),
        (128, 64, 1, 4),
        (256, 128, 1, 1),
        (64, 32, 2, 1),
        (128, 64, 4, 2),
        (128, 64, 8, 1),
    ],
)
def test_lowers_for_cuda(d_state, width, rank, segments, dtype):
    arrays = inputs(256, d_state, width, dtype)
    with use_abstract_mesh(GPU):
        traced = jax.jit(functools.partial(run, tile=Tile(rank=rank, segments=segments))).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mamba3_scan" in text
    assert "mamba3_scan_backward" in text
    assert ("mamba3_segments_backward" in text) == (segments > 1)


@pytest.mark.parametrize("shape", [SISO, MIMO], ids=["siso", "mimo"])
@pytest.mark.parametrize("starts", [(), (0, 16, 39, 40, 60)], ids=["one_document", "packed"])
def test_the_number_of_segments_does_not_matter(shape, starts):
    """Values and all gradients, a ragged last segment and segments of one chunk included."""
    shape = shape._replace(length=67)
    inputs, cotangent = draw(shape), cases.cotangents(shape)
    start_BL = np.isin(np.arange(67), starts)[None] & np.array([[True], [False]])
    want = cases.reference(inputs, start_BL, cotangent, shape.rotation)

    @functools.partial(quick_jit, static_argnums=0)
    def run(segments, inputs):
        def op(inputs):
            tokens, heads, state = inputs
            tokens = tokens._replace(start_BL=start_BL)
            return triton(tokens, heads, state, rotation=shape.rotation, chunk=16, segments=segments, interpret=True)

        results, pull = jax.vjp(op, inputs)
        return results, pull(cotangent)[0]

    for segments in (1, 2, 3, 5):
        results, gradients = run(segments, inputs)
        cases.check_results(results, want[0], 1e-5)
        cases.check_gradients(gradients, want[1], 1e-4)


def test_rows_after_the_end_do_nothing():
    """Zero keys' weights and no decay: the outputs, states and gradients before them are the same, bit for bit."""
    arrays = inputs(64)
    tail = [jnp.pad(array, [(0, 0)] * 2 + [(0, 32)] + [(0, 0)] * (array.ndim - 3)) for array in arrays[:7]]
    document = jnp.zeros((1, 96), jnp.int32)
    tile = Tile(rows=32, interpret=True)
    short, padded = run(*arrays, tile=tile), run(*tail, document, arrays[8], tile=tile)
    np.testing.assert_array_equal(padded[0][0][:, :, :64], short[0][0])
    np.testing.assert_array_equal(padded[0][1], short[0][1])
    for got, want in zip(padded[1], short[1], strict=True):
        np.testing.assert_array_equal(got[:, :, :64] if got.shape != want.shape else got, want)


@pytest.mark.parametrize(
    ("sizes", "tile", "message"),
    [
        ({"d_state": 48}, Tile(), "d_state=48 is not a power of two from 16 to 256"),
        ({"d_state": 8}, Tile(), "d_state=8 is not a power of two from 16 to 256"),
        ({"width": 256}, Tile(), "width=256 is not a power of two from 16 to 128"),
        ({}, Tile(rows=8), "tile.rows=8 is not a power of two from 16 to 128"),
        ({"rows": 96}, Tile(), "rows=96 and tile.rank=1 do not fit tile.segments=1 of chunks of tile.rows=64"),
        ({}, Tile(rank=3), "rows=64 and tile.rank=3 do not fit tile.segments=1 of chunks of tile.rows=64"),
        ({}, Tile(segments=2), "rows=64 and tile.rank=1 do not fit tile.segments=2 of chunks of tile.rows=64"),
        ({"dtype": jnp.float16}, Tile(), "q is float16, wanted float32 or bfloat16"),
    ],
)
def test_what_the_kernels_cannot_run(sizes, tile, message):
    with pytest.raises(ValueError, match=message):
        scan(*inputs(**sizes), tile)


def test_a_named_implementation_runs_or_raises(monkeypatch):
    monkeypatch.setitem(ssm.__globals__["IMPLEMENTATIONS"], "triton", ssm.__globals__["triton"])
    tokens, heads, state = draw(SISO)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="implementation='triton' needs an NVIDIA GPU, the backend is 'cpu'"):
            ssm(tokens, heads, state, implementation="triton")
    for shape, message in (
        (SISO._replace(d_state=258), "d_state up to 256 and P up to 128, not d_state=258"),
        (SISO._replace(width=129), "d_state up to 256 and P up to 128, not d_state=8, P=129"),
        (MIMO._replace(rank=3), "a power of two up to 16, not rank=3"),
    ):
        with pytest.raises(ValueError, match=message):
            check(draw(shape)[0], interpret=True)
    with pytest.raises(ValueError, match="computes in float32, dt is float64"):
        check(draw(SISO, dtype=np.float64)[0], interpret=True)


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize("shape", [SISO, MIMO], ids=["siso", "mimo"])
def test_the_whole_op_lowers_for_cuda(shape, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tokens, heads, state = draw(shape._replace(length=200))
    op = functools.partial(ssm, rotation=shape.rotation, implementation="triton")
    monkeypatch.setitem(ssm.__globals__["IMPLEMENTATIONS"], "triton", ssm.__globals__["triton"])

    def loss(*inputs):
        return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(op(*inputs)))

    with use_abstract_mesh(GPU):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(bfloat16(tokens), heads, state)
        assert "mamba3_scan_backward" in traced.lower(lowering_platforms=("cuda",)).as_text()
