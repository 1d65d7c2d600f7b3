"""The TPU's decode step in Pallas's interpreter against `recurrent`, lowered for TPUs, and compiled where libtpu is."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from experiments.benchmarks import hlo, ssm, tpu_aot
from mamba3_jax.ops.kernels import kernels, refused
from mamba3_jax.ops.recurrent import recurrent
from pallas_kernels.ssm.mosaic_tpu import STEPS
from pallas_kernels.ssm.mosaic_tpu.decode import Tile
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import LEFT_OUT, MIMO, SISO, bfloat16, draw

mosaic_tpu = functools.partial(kernels, backend="mosaic_tpu")
compiled = functools.partial(mosaic_tpu, anywhere=True)  # traced for a TPU that this process does not have
# Memory that nobody wrote is NaN, and two cores that touch the same address are seen.
INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
SISO, MIMO = SISO._replace(length=1), MIMO._replace(length=1)
SIZED = {"width": 16, "d_state": 32, "planes": 8}
SHAPES = {
    "siso": SISO,  # groups, an angle that heads share
    "siso_half_turn": SISO._replace(rotation="half", norm=True, shared_angle=False, skip=False, **SIZED),
    "siso_blocks": SISO._replace(heads=16, groups=4, **SIZED),  # of heads: two, see BLOCKS
    "mimo2": MIMO._replace(rank=2, groups=2, heads=4, gate_ranked=False, **SIZED),
    "mimo4": MIMO,
    "mimo4_adjacent": MIMO._replace(rotation="adjacent", norm=False, skip=False, width=20, d_state=24, planes=5),
    "mimo4_no_gate": MIMO._replace(gate=False, groups=2, shared_angle=True, heads=12),
    "mimo8_blocks": MIMO._replace(rank=8, heads=16, batch=1, **SIZED),
    **{name: shape._replace(length=1) for name, shape in LEFT_OUT.items()},
}
TPU = AbstractMesh(
    (1,),
    ("device",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
)


def how_of(name: str) -> dict:
    """Returns how a shape is interpreted: blocks of heads on two cores, since one alone cannot race."""
    if not name.endswith("blocks"):
        return {}
    return {"tile": Tile(heads=8), "interpret": dataclasses.replace(INTERPRETER, num_cores_or_threads=2)}


def step(shape, **how):
    """(tokens, heads, state) -> y, state."""
    return functools.partial(mosaic_tpu, rotation=shape.rotation, **{"interpret": INTERPRETER} | how)


def drawn(shape, *, start: bool = False):
    """Arguments of a step, every other row a start where wanted."""
    tokens, heads, state = draw(shape)
    start_BL = np.arange(shape.batch)[:, None] % 2 == 0
    return tokens._replace(start_BL=start_BL if start else None), heads, state


def double(inputs, shape):
    """`recurrent` in float64, on the very same numbers."""
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, x.dtype if x.dtype == bool else np.float64)  # noqa: E731
        results = jax.jit(functools.partial(recurrent, rotation=shape.rotation))(*jax.tree.map(wide, inputs))
        return jax.tree.map(np.asarray, results)


@pytest.mark.parametrize("name", SHAPES)
def test_is_recurrent(name):
    """Every other row a start: what holds for both is tested by both."""
    inputs = drawn(SHAPES[name], start=True)
    got = jax.jit(step(SHAPES[name], **how_of(name)))(*inputs)
    cases.check_results(got, double(inputs, SHAPES[name]), 1e-6)
    assert not interpret_pallas_call.races.races_found


def test_a_start_forgets_exactly():
    """Nothing of the state reaches the results, not even what is not a number."""
    tokens, heads, state = drawn(MIMO)
    tokens = tokens._replace(start_BL=np.ones((MIMO.batch, 1), bool))
    run = jax.jit(step(MIMO))
    poisoned = jax.tree.map(lambda array: np.full_like(array, np.nan), state)
    want = run(tokens, heads, jax.tree.map(np.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, run(tokens, heads, poisoned), want)


def test_gradients():
    """Those of `recurrent`, the state's included."""
    cotangent = cases.cotangents(MIMO)
    inputs = drawn(MIMO)
    gradients = jax.jit(lambda *inputs: jax.vjp(step(MIMO), *inputs)[1](cotangent))(*inputs)
    want = cases.reference(inputs, None, cotangent, MIMO.rotation)[1]
    cases.check_gradients(gradients, want, 1e-5)


@pytest.mark.parametrize("name", ["siso", "mimo4"])
def test_three_steps_are_a_row(name):
    shape = SHAPES[name]._replace(length=3)
    tokens, heads, state = draw(shape)
    want = double((tokens, heads, state), shape)
    run, outputs = jax.jit(step(shape)), []
    for token in range(3):
        y_BLHP, state = run(cases.rows(tokens, token, token + 1), heads, state)
        outputs.append(y_BLHP)
    cases.check_results((np.concatenate(outputs, axis=1), state), want, 2e-6)


@pytest.mark.parametrize("name", ["siso", "mimo4"])
def test_a_few_tokens_at_once(name):
    """A row's last one a start: values, and gradients of everything."""
    shape = SHAPES[name]._replace(length=STEPS)
    tokens, heads, state = draw(shape)
    start_BL = np.arange(STEPS) == np.array([[STEPS - 1], [STEPS]])

    @jax.jit
    def run(inputs, cotangent):
        def op(inputs):
            return step(shape)(inputs[0]._replace(start_BL=start_BL), *inputs[1:])

        results, pull = jax.vjp(op, inputs)
        return results, pull(cotangent)[0]

    inputs, cotangent = (tokens, heads, state), cases.cotangents(shape)
    results, gradients = run(inputs, cotangent)
    want = cases.reference(inputs, start_BL, cotangent, shape.rotation)
    cases.check_results(results, want[0], 2e-6)
    cases.check_gradients(gradients, want[1], 1e-5)
    shifted = tokens._replace(q_BLRGN=np.roll(tokens.q_BLRGN, 1, axis=1))
    with pytest.raises(AssertionError, match="is not below"):
        cases.check_results(run((shifted, heads, state), cotangent)[0], want[0], 2e-6)


@pytest.mark.parametrize("name", ["siso", "mimo4"])
def test_bfloat16(name):
    """q, k, v and gate of 8 bits: the state is as exact as ever, y and the key left behind are rounded once."""
    tokens, heads, state = drawn(SHAPES[name])
    narrow = lambda array: jnp.asarray(array, jnp.bfloat16)  # noqa: E731
    state = state._replace(k_BRHN=narrow(state.k_BRHN), v_BHP=narrow(state.v_BHP))
    inputs = bfloat16(tokens), heads, state
    y_BLHP, after = jax.jit(step(SHAPES[name]))(*inputs)
    want_y_BLHP, want = double(inputs, SHAPES[name])
    assert (y_BLHP.dtype, after.k_BRHN.dtype, after.v_BHP.dtype) == (jnp.bfloat16,) * 3
    assert rel_rms(np.asarray(after.ssm_BHPN, np.float64), want.ssm_BHPN) < 1e-6
    for got, exact in ((y_BLHP, want_y_BLHP), (after.k_BRHN, want.k_BRHN)):
        assert rel_rms(np.asarray(got, np.float64), exact) < 2**-8


@pytest.mark.parametrize("field", ["ssm_BHPN", "k_BRHN", "v_BHP", "angle_BHS"])
def test_a_planted_error_is_caught(field):
    inputs = drawn(MIMO)
    tokens, heads, state = inputs
    want = double(inputs, MIMO)
    wrong = state._replace(**{field: getattr(state, field) * np.float32(1.001)})
    with pytest.raises(AssertionError, match="is not below"):
        cases.check_results(planted()(tokens, heads, wrong), want, 1e-6)


@functools.cache
def planted():
    return jax.jit(step(MIMO))


@pytest.mark.quick
def test_what_it_cannot_run():
    with jax.enable_x64(True), pytest.raises(ValueError, match="float32 or bfloat16, not"):
        step(SISO)(*jax.tree.map(jnp.asarray, draw(SISO, dtype=np.float64)))
    with pytest.raises(ValueError, match="needs a TPU, the backend is 'cpu'"):
        step(SISO, interpret=None)(*drawn(SISO))
    with pytest.raises(ValueError, match=r"tile\.heads=3 is neither n_heads=4"):
        step(SISO, tile=Tile(heads=3))(*drawn(SISO))
    large = SISO._replace(heads=64, width=64, d_state=128, batch=1)
    with pytest.raises(ValueError, match=r"tile\.heads=64 takes .* MiB of VMEM, over tile\.vmem=4"):
        jax.eval_shape(step(large, tile=Tile(heads=64, vmem=4)), *drawn(large))


def test_what_it_refuses(monkeypatch):
    """Asked before it runs, of steps too: dtypes, and heads that do not divide and take more VMEM than there is."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    shape = SISO._replace(batch=1, heads=96, width=64, d_state=128, looks_back=True)
    for heads, wish in ((96, None), (100, r"tile\.heads=100 takes .* MiB of VMEM, over tile\.vmem=14")):
        tokens = drawn(shape._replace(heads=heads, groups=1), start=True)[0]
        found = refused("mosaic_tpu", tokens)
        assert found is None if wish is None else re.search(wish, found)
    half = tokens._replace(q_BLRGN=tokens.q_BLRGN.astype(np.float16))
    assert refused("mosaic_tpu", half) == "wants float32 or bfloat16, not ['float16', 'float32']"


def lower(shape, *, start: bool, narrow: bool):
    tokens, heads, state = drawn(shape, start=start)
    tokens = bfloat16(tokens) if narrow else tokens
    with use_abstract_mesh(TPU):
        run = functools.partial(compiled, rotation=shape.rotation)
        traced = jax.jit(run, donate_argnums=2).trace(tokens, heads, state)
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
        case = dataclasses.replace(tpu_aot.STEP, rank=rank, dtype=dtype)
        task = ssm.Task("step", case, "mosaic_tpu", "decode")
        compiled = target.compile(task)
        program = hlo.Program(compiled.as_text())
        assert len(program.kernels()) == 1
        state = jax.eval_shape(task.arguments)[0]
        assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * ssm.nbytes(state)
        least = tpu_aot.floors(ssm.Task("step", case, "recurrent", "decode"), target.chip)["least_mb"]
        # Some chips get copies of what is small, of the angles, values and gates: P = 64 fills half of a tile's lanes.
        assert program.cost().hbm_bytes / 1e6 < 1.15 * least
