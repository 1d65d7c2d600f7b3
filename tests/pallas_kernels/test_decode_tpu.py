"""The TPU's decode step in Pallas's interpreter against `recurrent`, lowered for TPUs, and compiled where libtpu is."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import use_abstract_mesh

from experiments.benchmarks import ssm, tpu_aot
from launch import hlo
from mamba3_jax.ops.kernels import refused
from pallas_kernels.ssm.cases import MIMO, SISO, varied
from pallas_kernels.ssm.mosaic_tpu import STEPS
from pallas_kernels.ssm.mosaic_tpu.decode import Tile
from tests.ops import cases
from tests.ops.cases import bfloat16, draw
from tests.pallas_kernels.family import TOKENS, TPU, Decoding, drawn

# Memory that nobody wrote is NaN, and two cores that touch the same address are seen.
INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
SIZED = {"length": 1, "width": 16, "d_state": 32, "planes": 8}


class TestDecoding(Decoding):
    """Every other row a start: what holds for both is tested by both."""

    backend = "mosaic_tpu"
    interpret = INTERPRETER
    starts = (True,)
    differentiated = ("mimo4",)
    shapes = TOKENS | {
        "siso_half_turn": SISO._replace(rotation="half", norm=True, shared_angle=False, skip=False, **SIZED),
        "siso_blocks": SISO._replace(heads=16, groups=4, **SIZED),  # of heads: two, see `how_of`
        "mimo2": MIMO._replace(rank=2, groups=2, heads=4, gate_ranked=False, **SIZED),
        "mimo4_adjacent": MIMO._replace(
            rotation="adjacent", norm=False, skip=False, **SIZED | {"width": 20, "d_state": 24, "planes": 5}
        ),
        "mimo4_no_gate": MIMO._replace(gate=False, groups=2, shared_angle=True, heads=12, length=1),
        "mimo8_blocks": MIMO._replace(rank=8, heads=16, batch=1, **SIZED),
    }

    def how_of(self, name: str) -> dict:
        """Blocks of heads on two cores, since one alone cannot race."""
        if not name.endswith("blocks"):
            return {}
        return {"tile": Tile(heads=8), "interpret": dataclasses.replace(INTERPRETER, num_cores_or_threads=2)}

    def run(self, name: str, inputs):
        results = jax.tree.map(np.asarray, super().run(name, inputs))
        assert not interpret_pallas_call.races.races_found
        return results


SISO, MIMO = TOKENS["siso"], TOKENS["mimo4"]
SHAPES, step = TestDecoding.shapes, TestDecoding().step


@pytest.mark.parametrize("name", ["siso", "mimo4"])
def test_a_few_tokens_at_once(name):
    """A row's last one a start: values, and gradients of everything."""
    shape = SHAPES[name]._replace(length=STEPS)
    tokens, heads, state = draw(shape)
    start_BL = np.arange(STEPS) == np.array([[STEPS - 1], [STEPS]])
    run = cases.with_gradients(step(shape))
    inputs, cotangent = (tokens, heads, state), cases.cotangents(shape)
    results, gradients = run(inputs, start_BL, cotangent)
    want = cases.reference(inputs, start_BL, cotangent, shape.rotation)
    cases.check_results(results, want[0], 2e-6)
    cases.check_gradients(gradients, want[1], 1e-5)
    shifted = tokens._replace(q_BLRGN=np.roll(tokens.q_BLRGN, 1, axis=1))
    with pytest.raises(AssertionError, match="is not below"):
        cases.check_results(run((shifted, heads, state), start_BL, cotangent)[0], want[0], 2e-6)


@pytest.mark.quick
def test_what_it_cannot_run():
    with jax.enable_x64(True), pytest.raises(ValueError, match="float32 or bfloat16, not"):
        step(SISO)(*jax.tree.map(jnp.asarray, draw(SISO, dtype=np.float64)))
    with pytest.raises(ValueError, match="needs a TPU, the backend is 'cpu'"):
        step(SISO, interpret=None)(*draw(SISO))
    with pytest.raises(ValueError, match=r"tile\.heads=3 is neither n_heads=4"):
        step(SISO, tile=Tile(heads=3))(*draw(SISO))
    large = SISO._replace(heads=64, width=64, d_state=128, batch=1)
    with pytest.raises(ValueError, match=r"tile\.heads=64 takes .* MiB of VMEM, over tile\.vmem=4"):
        jax.eval_shape(step(large, tile=Tile(heads=64, vmem=4)), *draw(large))


def test_what_it_refuses():
    """Asked before it runs, of steps too: dtypes, and heads that do not divide and take more VMEM than there is."""
    shape = SISO._replace(batch=1, heads=96, width=64, d_state=128, looks_back=True)
    for heads, wish in ((96, None), (100, r"tile\.heads=100 takes .* MiB of VMEM, over tile\.vmem=14")):
        tokens = drawn(shape._replace(heads=heads, groups=1), start=True)[0]
        with use_abstract_mesh(TPU):
            found = refused("mosaic_tpu", tokens)
        assert found is None if wish is None else re.search(wish, found)
    half = tokens._replace(q_BLRGN=tokens.q_BLRGN.astype(np.float16))
    with use_abstract_mesh(TPU):
        assert refused("mosaic_tpu", half) == "wants float32 or bfloat16, not ['float16', 'float32']"


def lower(shape, *, start: bool, narrow: bool):
    tokens, heads, state = drawn(shape, start=start)
    tokens = bfloat16(tokens) if narrow else tokens
    with use_abstract_mesh(TPU):
        traced = jax.jit(step(shape, interpret=None, anywhere=True), donate_argnums=2).trace(tokens, heads, state)
        return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("rotation", ["adjacent", "half"])
def test_lowers_for_tpu(rank, rotation):
    shape = (SISO if rank == 1 else MIMO)._replace(rank=rank, rotation=rotation, heads=16, **SIZED)
    for narrow in (False, True):
        assert "tpu_custom_call" in lower(shape, start=narrow, narrow=narrow)


@pytest.mark.libtpu
@pytest.mark.parametrize("chip", tpu_aot.CHIPS)
@pytest.mark.usefixtures("compiler")
def test_compiles_and_moves_the_least(chip):
    """For real chips: the state in place, and next to nothing moved but inputs and outputs once."""
    target = tpu_aot.Target(chip)
    for rank, dtype in ((1, "bfloat16"), (4, "float32")):
        case = varied(tpu_aot.STEP, rank=rank, dtype=dtype)
        task = ssm.Task("step", case, "mosaic_tpu", "decode")
        compiled = target.compile(task)
        program = hlo.Program(compiled.as_text())
        assert len(program.kernels()) == 1
        state = jax.eval_shape(task.arguments)[0]
        assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * ssm.nbytes(state)
        least = tpu_aot.floors(ssm.Task("step", case, "recurrent", "decode"), target.chip)["least_mb"]
        # Some chips get copies of what is small, of the angles, values and gates: P = 64 fills half of a tile's lanes.
        assert program.cost().hbm_bytes / 1e6 < 1.15 * least
