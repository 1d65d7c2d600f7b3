"""The decode step's kernel in Pallas's interpreter against `recurrent`, and lowered for CUDA: no Triton compiler."""

import functools

import jax
import pytest
from jax.sharding import use_abstract_mesh

from pallas_kernels.ssm.cases import MIMO, SISO
from pallas_kernels.ssm.triton.decode_fused import FusedTile
from pallas_kernels.ssm.triton.decode_rotated import RotatedTile
from tests.ops import cases
from tests.ops.cases import bfloat16, draw
from tests.pallas_kernels.family import GPU, TOKENS, Decoding, check_forgets, double, drawn

SIZED = {"length": 1, "width": 32, "d_state": 64, "planes": 16}
TILES = {
    "fma": RotatedTile(),
    "fma_rows": RotatedTile(rows=16, columns=16),
    "dot": RotatedTile(columns=128, sums="dot"),
    "dot_columns": RotatedTile(columns=16, sums="dot"),
    "dot_rows": RotatedTile(rows=16, sums="dot"),
    "fused": FusedTile(),
    "fused_16": FusedTile(columns=16, warps=2),
}


class TestDecoding(Decoding):
    backend = "triton"
    differentiated = ("siso", "mimo4", "mimo4_adjacent")
    shapes = TOKENS | {
        "siso_half_turn": SISO._replace(rotation="half", norm=True, shared_angle=False, **SIZED),
        "mimo2": MIMO._replace(rank=2, groups=2, heads=4, gate_ranked=False, **SIZED),
        "mimo4_adjacent": MIMO._replace(
            rotation="adjacent", norm=False, skip=False, **SIZED | {"width": 20, "d_state": 24, "planes": 5}
        ),
        "mimo4_no_gate": MIMO._replace(gate=False, groups=2, shared_angle=True, **SIZED),
    }


step = TestDecoding().step


def shape_of(rank: int):
    return (MIMO if rank > 1 else SISO)._replace(rank=rank, **SIZED)


@functools.cache
def compiled(tile: str, rank: int):
    """One program of a tile for both tests."""
    return jax.jit(step(shape_of(rank), tile=TILES[tile]))


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_is_recurrent(tile, rank):
    shape = shape_of(rank)
    inputs = drawn(shape, start=True)
    cases.check_results(compiled(tile, rank)(*inputs), double(inputs, shape), 1e-6)


@pytest.mark.parametrize("tile", ["fma", "fma_rows", "dot_columns", "fused"])
def test_every_tile_forgets_exactly(tile):
    check_forgets(lambda inputs: compiled(tile, 4)(*inputs), shape_of(4))


@pytest.mark.quick
def test_what_it_cannot_run():
    with pytest.raises(ValueError, match="a power of two up to 16, not rank=3"):
        step(MIMO)(*draw(TOKENS["mimo4"]._replace(rank=3)))
    with pytest.raises(ValueError, match=r"is neither 'fma' nor 'dot'"):
        step(SISO, tile=RotatedTile(sums="sum"))(*draw(TOKENS["siso"]))
    with pytest.raises(ValueError, match=r"P up to 128, not .*P=129"):
        step(SISO)(*draw(TOKENS["siso"]._replace(width=129)))
    tokens, heads, state = draw(TOKENS["siso"])
    half = {name: getattr(tokens, name).astype("float16") for name in ("q_BLRGN", "k_BLRGN", "v_BLHP")}
    with pytest.raises(ValueError, match="wants q, k and v in float32 or bfloat16, not float16"):
        step(SISO)(tokens._replace(**half), heads, state)


@pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")
@pytest.mark.parametrize("start", [False, True], ids=["goes_on", "start"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_lowers_for_cuda(rank, tile, start):
    shape = shape_of(rank)
    tokens, heads, state = drawn(shape, start=start)
    op = step(shape, tile=TILES[tile], interpret=None, anywhere=True)
    with use_abstract_mesh(GPU):
        traced = jax.jit(op, donate_argnums=2).trace(bfloat16(tokens), heads, state)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mamba3_decode" in text
