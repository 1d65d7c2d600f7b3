"""The Triton kernels without a GPU: they lower for CUDA, refuse what they cannot run, do not depend on their tiles.

Their results are tested with every other implementation's in tests/ops, in Pallas's interpreter, which fills outputs
with NaN first. It accepts more than the GPU does, so the kernels are lowered for CUDA too. Neither runs the Triton
compiler.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel
from mamba3_jax.ops.kernels import kernels
from mamba3_jax.ops.ssm import IMPLEMENTATIONS, ssm
from pallas_kernels.ssm.cases import MIMO, SISO
from pallas_kernels.ssm.contract import Carry, Weights
from pallas_kernels.ssm.operands import Operands, TokenArrays
from pallas_kernels.ssm.triton import rotate, scan_fwd
from pallas_kernels.ssm.triton.config import Tile
from tests.ops import cases
from tests.ops.cases import bfloat16, draw
from tests.pallas_kernels.family import GPU

KERNELS = ("angles", "rotate", "scan", "finish_back", "query_gradient", "key_gradient", "value_gradient", "rotate_back")
# Sizes that the kernels take as they are.
SISO_LARGE = SISO._replace(batch=1, length=300, groups=1, d_state=128, width=64, planes=32)
MIMO_LARGE = MIMO._replace(batch=1, length=300, d_state=128, width=64, planes=32, norm=False, shared_angle=True)


LEFT_OUT = dict.fromkeys(("skip", "gate", "bias", "looks_back", "turns"), False)  # Mamba-2's SSD


triton = functools.partial(kernels, backend="triton")


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        (SISO_LARGE, 1),
        (SISO_LARGE._replace(planes=64, groups=2, norm=True), 2),
        (SISO_LARGE._replace(d_state=16, width=32, planes=4), 1),
        (SISO_LARGE._replace(d_state=256, planes=64), 1),
        (SISO_LARGE._replace(d_state=128, width=128), 1),
        (MIMO_LARGE, 2),
        (MIMO_LARGE._replace(rank=2, shared_angle=False, norm=True), 1),
        (MIMO_LARGE._replace(rank=8, d_state=64, planes=32), 1),
        (MIMO, 1),
    ],
    ids=lambda value: f"{value}" if isinstance(value, int) else f"R{value.rank}N{value.d_state}P{value.width}",
)
def test_lowers_for_cuda(shape, splits, packed, dtype):
    tokens, heads, state = draw(shape)
    if dtype == jnp.bfloat16:
        tokens = bfloat16(tokens)
    start_BL = np.zeros(tokens.dt_BLH.shape[:2], bool) if packed else None

    def run(tokens, heads, state):
        def op(tokens, heads, state):
            tokens = tokens._replace(start_BL=start_BL)
            return triton(tokens, heads, state, rotation=shape.rotation, splits=splits, anywhere=True)

        results, pull = jax.vjp(op, tokens, heads, state)
        return results, pull(results)

    with use_abstract_mesh(GPU):
        text = jax.jit(run).trace(tokens, heads, state).lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"mamba3_{name}" in text for name in KERNELS)
    assert all((f"mamba3_{name}" in text) == (splits > 1) for name in ("segments", "segments_back"))


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        (SISO_LARGE._replace(turns=False), {"rotate", "still_back"}),  # the first adds biases
        (SISO_LARGE._replace(bias=False), {"angles", "rotate", "rotate_back", "still_back"}),
        (SISO_LARGE._replace(looks_back=False), {"angles", "rotate", "rotate_back", "still_back"}),
        (SISO_LARGE._replace(**LEFT_OUT), {"still_back"}),
        (MIMO_LARGE._replace(**LEFT_OUT), {"still_back"}),
    ],
    ids=["no_rotation", "no_bias", "first_order", "ssd", "ssd_in_ranks"],
)
def test_what_is_left_out_is_in_no_kernel(shape, kernels):
    """Lowered for CUDA, cut into two: no angles, nor what stores queries and keys once a head where nothing is done."""
    tokens, heads, state = draw(shape)

    def run(tokens, heads, state):
        op = functools.partial(triton, rotation=shape.rotation, splits=2, anywhere=True)
        results, pull = jax.vjp(op, tokens, heads, state)
        return results, pull(results)

    with use_abstract_mesh(GPU):
        traced = jax.jit(run).trace(bfloat16(tokens), heads, state)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    always = {name for name in KERNELS if name not in ("angles", "rotate", "rotate_back")} | {"segments"}
    found = {name for name in {*KERNELS, "still_back", "segments"} if re.search(rf"mamba3_{name}\b", text)}
    assert found == always | kernels


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
def test_the_largest_state_lowers_for_cuda():
    tokens, heads, state = draw(SISO_LARGE._replace(d_state=256, width=128, planes=64))

    def loss(tokens, heads, state):
        o_BLHP, _ = triton(bfloat16(tokens), heads, state, rotation="adjacent", anywhere=True)
        return jnp.sum(o_BLHP.astype(jnp.float32))

    with use_abstract_mesh(GPU):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(tokens, heads, state)
        assert "mamba3_value_gradient" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize(
    "how", [{}, {"mimo_rank": 2, "compute_dtype": "bfloat16", "remat": "op"}], ids=["siso", "mimo"]
)
def test_a_model_lowers_for_cuda(how, monkeypatch):
    """A training step's gradient on packed rows, and a decoding step."""
    monkeypatch.setitem(IMPLEMENTATIONS, "triton", functools.partial(triton, anywhere=True))
    model = LanguageModel(ModelConfig(implementation="triton", d_model=128, d_state=64, **how))
    tokens_BL, start_BL = np.zeros((2, 96), np.int32), np.zeros((2, 96), bool)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)

    def loss(params):
        return jnp.mean(jnp.square(model.apply(params, tokens_BL, None, start_BL)[0]))

    with use_abstract_mesh(GPU):
        step = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
        token = jax.jit(model.apply).trace(params, tokens_BL[:, :1]).lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"mamba3_{name}" in step for name in KERNELS)
    assert "mamba3_decode" in token


@pytest.mark.parametrize("shape", [SISO, MIMO], ids=["siso", "mimo"])
@pytest.mark.parametrize("starts", [(), (0, 16, 39, 40, 60)], ids=["one_document", "packed"])
def test_how_the_length_is_cut_does_not_matter(shape, starts):
    """Values and all gradients: a ragged last split, splits of one chunk, one or several chunks between checkpoints."""
    shape = shape._replace(length=67)
    inputs, cotangent = draw(shape), cases.cotangents(shape)
    start_BL = np.isin(np.arange(67), starts)[None] & np.array([[True], [False]])
    want = cases.reference(inputs, start_BL, cotangent, shape.rotation)
    for how in ((1, 16, 1), (1, 32, 2), (3, 256, 32), (5, 32, 32)):
        results, gradients = cut(shape.rotation, *how)(inputs, start_BL, cotangent)
        cases.check_results(results, want[0], 1e-5)
        cases.check_gradients(gradients, want[1], 1e-4)


@functools.cache
def cut(rotation: str, splits: int, interval: int, bwd_heads: int):
    """One program for rows of any documents."""
    how = {"splits": splits, "checkpoint_interval": interval, "rotate_bwd_heads": bwd_heads}
    return cases.with_gradients(functools.partial(triton, rotation=rotation, chunk=16, interpret=True, **how))


def scan_operands(rows=64, d_state=32, width=16, dtype=jnp.float32, rank=1) -> scan_fwd.ScanOperands:
    """Shapes alone."""

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    rotated, scalars = shape(1, 2, rows, d_state, dtype=dtype), shape(1, 2, rows)
    v_BLHP = shape(1, rows // rank, 2, width, dtype=dtype)
    return scan_fwd.ScanOperands(
        q_BHTN=rotated,
        k_BHTN=rotated,
        v_BLHP=v_BLHP,
        gate_BLHP=None,
        log_decay_BHT=scalars,
        decay_rest_BHT=None,
        gamma_BHT=scalars,
        kappa_BHT=scalars,
        document_BT=None,
        h_BHZPN=shape(1, 2, 1, width, d_state),
        weights=Weights(),
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("sizes", "tile", "message"),
    [
        ({"d_state": 48}, Tile(), "d_state=48 is not a power of two from 16 to 256"),
        ({"d_state": 8}, Tile(), "d_state=8 is not a power of two from 16 to 256"),
        ({"width": 256}, Tile(), "width=256 is not a power of two from 16 to 128"),
        ({}, Tile(rows=8), "tile.rows=8 is not a power of two from 16 to 128"),
        ({"rows": 96}, Tile(), "rows=96 and tile.rank=1 do not fit tile.splits=1 of chunks of tile.rows=64"),
        ({}, Tile(rank=3), "tile.rank=3 is not a power of two from 1 to 16"),
        ({}, Tile(splits=2), "rows=64 and tile.rank=1 do not fit tile.splits=2 of chunks of tile.rows=64"),
        ({"dtype": jnp.float16}, Tile(), "q is float16, wanted float32 or bfloat16"),
    ],
)
def test_what_the_scan_cannot_run(sizes, tile, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(scan_fwd.forward, tile=tile, residuals=False), scan_operands(**sizes))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("d_state", "planes", "length", "message"),
    [
        (48, 12, 64, "d_state=48 is not a power of two"),
        (64, 8, 64, "d_state=64 is not a power of two with a quarter or half of it pairs=8"),
        (64, 16, 60, "length=60 and rank=1 do not fit"),
    ],
)
def test_what_the_rotation_cannot_run(d_state, planes, length, message):
    x_BLRGN, scalars_BHL = jnp.zeros((1, length, 1, 1, d_state)), jnp.zeros((1, 2, length))
    bias_HRN = jnp.zeros((2, 1, d_state))
    operands = Operands(
        tokens=TokenArrays(q_BLRGN=x_BLRGN, k_BLRGN=x_BLRGN, v_BLHP=jnp.zeros((1, length, 2, 16)), gate_BLHP=None),
        angle_BLHS=jnp.zeros((1, length, 1, planes)),
        dt_BHL=scalars_BHL,
        log_decay_BHL=scalars_BHL,
        decay_rest_BHL=None,
        gamma_BHL=scalars_BHL,
        kappa_BHL=None,
        document_BL=None,
        before=Carry(angle_BHS=jnp.zeros((1, 2, planes)), h_BHPN=jnp.zeros((1, 2, 16, d_state))),
        weights=Weights(q_bias_HRN=bias_HRN, k_bias_HRN=bias_HRN),
    )
    with pytest.raises(ValueError, match=message):
        rotate.rotate(operands, Tile())


@pytest.mark.quick
def test_a_named_implementation_runs_or_raises(monkeypatch):
    def run(inputs, shape=SISO):
        return triton(*inputs, rotation=shape.rotation, interpret=True)

    monkeypatch.setitem(IMPLEMENTATIONS, "triton", triton)
    tokens, heads, state = draw(SISO)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="implementation='triton' needs an NVIDIA GPU, not 'cpu'"):
            ssm(tokens, heads, state, implementation="triton")
    for shape, message in (
        (SISO._replace(d_state=258), "d_state up to 256 .* not d_state=258"),
        (SISO._replace(d_state=250, planes=40), "d_state up to 256 .* not d_state=250 with pairs=40"),
        (SISO._replace(width=129), "P up to 128, not d_state=8 with pairs=2, P=129"),
        (MIMO._replace(rank=3), "a power of two up to 16, not rank=3"),
    ):
        with pytest.raises(ValueError, match=message):
            run(draw(shape), shape)
    with pytest.raises(ValueError, match="wants P d_state up to 128 x 128 in float32, not d_state=256, P=128"):
        run(draw(SISO._replace(d_state=256, width=128, planes=64)))
    with pytest.raises(ValueError, match="computes in float32, log_a is float64"):
        run(draw(SISO, dtype=np.float64))
