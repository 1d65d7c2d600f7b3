"""The TPU kernels without a TPU: their numbers in the TPU interpreter, what they refuse, that they lower for TPU.

The interpreter runs the pipeline of blocks as the grid says, in a random order where it says "parallel", with memory
that starts as NaN. Lowering finds what Mosaic cannot express, libtpu's own compiler the rest (slow).
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, SingleDeviceSharding

from experiments.benchmarks import tpu_aot
from mamba3_jax.ops.kernels import _row, kernels
from mamba3_jax.ops.ssm import ssm
from pallas_kernels.ssm import gradients
from pallas_kernels.ssm.angle import Along
from pallas_kernels.ssm.cases import MIMO, SISO, SSD
from pallas_kernels.ssm.mosaic_tpu import angle as angles
from pallas_kernels.ssm.mosaic_tpu import chunk, grid, op
from pallas_kernels.ssm.mosaic_tpu.angle import angle_before_chunks
from pallas_kernels.ssm.mosaic_tpu.config import Tiles, default
from tests.helpers import rel_rms
from tests.ops import cases
from tests.ops.cases import bfloat16, draw
from tests.pallas_kernels.family import start_of, wanted

mosaic_tpu = functools.partial(kernels, backend="mosaic_tpu")
compiled = functools.partial(mosaic_tpu, anywhere=True)  # traced for a TPU that this process does not have
INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
SMALL = SISO._replace(length=40, batch=1)
RANKED = MIMO._replace(length=20, batch=1)
# bfloat16 has 2^-9: queries, keys, values, weights and the state are rounded once each before their products. With
# ranks, sums of 8 entries (as in `MIMO`) cancel too much for these bounds, in `chunked` too; sums of 64 do not.
EXACT, ROUNDED = (1e-5, 2e-4), (5e-3, 1e-2)


def check_all(shape, starts, narrow, interpret):
    """Results and gradients of the kernels, in chunks of 16; a long row in chunks of 128, which fill lanes."""
    tokens, *others = draw(shape)
    how = {"rotation": shape.rotation, "chunk": 16 if shape.length < 256 else 128, "interpret": interpret}
    run = cases.with_gradients(functools.partial(mosaic_tpu, **how))
    inputs = bfloat16(tokens) if narrow else tokens, *others
    results, gradients = run(inputs, start_of(shape, starts), cases.cotangents(shape))
    want, want_gradients = wanted(shape, starts, narrow)
    values, tolerance = ROUNDED if narrow else EXACT
    cases.check_results(results, want, values)
    cases.check_gradients(gradients, want_gradients, tolerance)


@pytest.mark.parametrize(
    ("shape", "starts", "narrow"),
    [
        (SMALL, (), False),
        (SMALL._replace(batch=2, groups=1), (5, 16, 37), True),
        (RANKED._replace(heads=4, rank=2), (7,), False),
        (SMALL._replace(length=300, heads=4, groups=1, width=64), (), True),
    ],
    ids=["siso", "siso_packed_bfloat16", "mimo_packed", "two_blocks_of_a_group_bfloat16"],
)
def test_agrees_with_the_definition_in_the_tpu_interpreter(shape, starts, narrow):
    """Values and gradients, from a state, to a state."""
    check_all(shape, starts, narrow, INTERPRETER)
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("shape", "starts", "narrow"),
    [
        (SMALL._replace(groups=1, shared_angle=False), (0, 5, 16, 17), False),
        (
            SMALL._replace(gate=False, skip=False, heads=2, groups=1, width=64, d_state=16, planes=8, norm=True),
            (),
            False,
        ),
        (SMALL._replace(heads=3, groups=3, d_state=130, planes=60, width=70, rotation="half"), (), False),
        (SMALL._replace(heads=8, groups=4, width=24), (30,), False),
        (SMALL._replace(heads=6, groups=2, width=64), (30,), True),
        (RANKED._replace(heads=2, d_state=64, width=64, planes=16), (), True),
        (RANKED._replace(rank=8), (7,), False),
        (SMALL._replace(length=300, heads=2, groups=1, shared_angle=False), (130, 256), False),
    ],
    ids=["angles", "no_gate", "wide", "two_groups_a_block", "groups", "mimo4_bfloat16", "mimo8", "lanes"],
)
def test_agrees_with_the_definition(shape, starts, narrow):
    """More of the same, in the quick interpreter."""
    check_all(shape, starts, narrow, True)


def passes(shape, starts, monkeypatch):
    """What the passes over states alone give, and what the kernels give of a row that nothing comes before or after:
    (state after the row, gradient of the state before it) of each."""
    given = []  # as `run` is traced

    def nothing(decay, added, *how, **more):
        if added.ndim == 4:
            given.append(added)
        return jnp.zeros_like(added)

    for module in (angles, gradients, op):
        monkeypatch.setattr(module, "before_device", nothing)
    tokens, heads, state = draw(shape)
    row = _row(tokens._replace(start_BL=start_of(shape, starts)), heads, state)
    how = {"chunk": 16, "interpret": INTERPRETER, "along": Along("sequence")}

    @jax.jit
    def run(row):
        results, pull = jax.vjp(lambda before: op.scan(row._replace(before=before), shape.rotation, **how), row.before)
        (dbefore,) = pull(results)
        return [x[:, :, : shape.width, : shape.d_state] for x in given], [results.after.h_BHPN, dbefore.h_BHPN]

    found = run(row)
    pltpu.reset_tpu_interpret_mode_state()
    return found


@pytest.mark.parametrize(
    ("shape", "starts"),
    [
        (SMALL, ()),
        pytest.param(SMALL._replace(batch=2, groups=1, norm=True), (5, 16, 37), marks=pytest.mark.full),
        pytest.param(RANKED._replace(heads=4, rank=2, gate_ranked=True), (7,), marks=pytest.mark.full),
    ],
    ids=["siso", "norm_packed", "mimo_packed"],
)
def test_a_pass_over_states_alone(shape, starts, monkeypatch):
    """For rows that go on over devices, in the TPU interpreter: it gives the states of the kernels that do it all."""
    for got, want in zip(*passes(shape, starts, monkeypatch), strict=True):
        assert rel_rms(got, want) < 1e-6
        assert rel_rms(1.001 * got, want) > 1e-4


def test_a_thousandth_is_caught(monkeypatch):
    """The comparisons above are not vacuous: each of two planted errors fails them."""
    chunk_decay = chunk.Decay.chunk_decay
    with monkeypatch.context() as patch:
        patch.setattr(chunk.Decay, "chunk_decay", lambda decay: 1.001 * chunk_decay(decay))
        with pytest.raises(AssertionError, match="is not below"):
            check_all(SMALL, (), False, True)
    inverse = chunk.Rotation.inverse
    monkeypatch.setattr(chunk.Rotation, "inverse", lambda rotation, dx: 1.001 * inverse(rotation, dx))
    with pytest.raises(AssertionError, match=r"gradient of .*q_BLRGN.* is not below"):
        check_all(SMALL, (), False, True)


def test_a_state_that_is_not_carried_is_caught(monkeypatch):
    """What the TPU interpreter adds: chunks in any order give wrong numbers."""

    def parallel(**how):
        return pltpu.CompilerParams(**how | {"dimension_semantics": ("parallel", "parallel", "arbitrary")})

    class Wrong:
        CompilerParams = staticmethod(parallel)
        VMEM = pltpu.VMEM

    monkeypatch.setattr(grid, "pltpu", Wrong)
    tokens, heads, state = draw(SMALL._replace(length=96))
    run = functools.partial(mosaic_tpu, rotation="adjacent", chunk=16, interpret=INTERPRETER)
    y_BLHP, _ = jax.jit(run)(tokens, heads, state)
    pltpu.reset_tpu_interpret_mode_state()
    monkeypatch.undo()
    want, _ = jax.jit(functools.partial(ssm, implementation="chunked"))(tokens, heads, state)
    assert not np.allclose(y_BLHP, want, atol=1e-3)


def test_the_angle_after_a_million_tokens():
    """1,048,576 times the same increment: within 1e-4 rad, chunks' starts and the last angle."""
    length, angle, dt = 2**20, np.float32(2.1), np.float32(0.37)
    tiles = Tiles(tokens=256, interpret=True)
    start_BCHS, last_BHS = jax.jit(functools.partial(angle_before_chunks, document_BC1Q=None, tiles=tiles))(
        jnp.full((1, 1, 1, length), angle), jnp.full((1, 1, length), dt), jnp.zeros((1, 1, 1))
    )
    increment = float(angle) * float(dt)
    for got, tokens in ((last_BHS[0, 0, 0], length), (start_BCHS[0, -1, 0, 0] * 2 * np.pi, length - 256)):
        difference = (float(got) - increment * tokens) % (2 * np.pi)
        assert min(difference, 2 * np.pi - difference) < 1e-4


@pytest.mark.parametrize(
    ("shape", "starts"),
    [
        (SISO._replace(length=300, heads=4, groups=1, d_state=128, width=64, planes=32), ()),
        (MIMO._replace(length=300, heads=4, groups=2, d_state=128, width=64, planes=32), (5, 299)),
        (SSD._replace(length=300, heads=4, groups=1, d_state=128, width=64), (5, 299)),
        (SISO._replace(length=300, groups=1, d_state=128, width=64, planes=32, looks_back=False, bias=False), ()),
    ],
    ids=["siso", "mimo_packed", "ssd_packed", "first_order"],
)
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_lowers_for_tpu(shape, starts, narrow):
    tokens, heads, state = draw(shape)
    tokens = bfloat16(tokens) if narrow else tokens

    def op(tokens, heads, state):
        tokens = tokens._replace(start_BL=start_of(shape, starts))
        return compiled(
            tokens, heads, state, rotation=shape.rotation, tiles=default("v5e", shape.rank, dtype=tokens.q_BLRGN.dtype)
        )

    def with_gradients(*inputs):
        results, pull = jax.vjp(op, *inputs)
        return results, pull(results)

    def count(run):
        traced = jax.jit(run).trace(tokens, heads, state)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.custom_call @tpu_custom_call")

    assert count(op) == 1 + shape.turns  # the scan, and the angles before every chunk
    assert count(with_gradients) == 2 + shape.turns


def test_results_that_are_not_used():
    """Any one used alone gives the gradients that zeros for the others give: the same bits, and not all of them 0."""
    shape = SMALL._replace(heads=2, length=20)
    tokens, heads, state = draw(shape)
    op = functools.partial(mosaic_tpu, rotation=shape.rotation, chunk=16, interpret=True)

    @jax.jit
    def run(*inputs):
        (results, pull), found = jax.vjp(op, *inputs), {}
        zeros, structure = jax.tree.flatten(jax.tree.map(jnp.zeros_like, results))
        for index, (name, value) in enumerate(cases.named(results).items()):
            with_zeros = jax.tree.unflatten(structure, [*zeros[:index], value, *zeros[index + 1 :]])
            _, alone = jax.vjp(lambda *inputs, index=index: jax.tree.leaves(op(*inputs))[index], *inputs)
            found[name] = alone(value), pull(with_zeros)
        return found

    for name, (got, want) in run(tokens, heads, state).items():
        assert any(np.any(leaf) for leaf in jax.tree.leaves(want)), name
        for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(leaf, other, name)


LOOPS = {
    "once": lambda op, v: op(v)[0],
    "checkpoint": lambda op, v: jax.checkpoint(op)(v)[0],
    "layers": lambda op, v: jax.lax.scan(lambda v, _: jax.checkpoint(op)(v), v, length=3)[0],
}


@pytest.mark.parametrize("given", [False, True], ids=["no_state", "a_state"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_no_zeros_of_a_state(loop, given):
    """Where the state after the row is not used the kernels read no gradient of it; where there is none before the row,
    not that either, and write no gradient of it."""
    tokens, heads, state = draw(SISO._replace(length=128, heads=4, groups=1, d_state=128, width=64, planes=32))

    def loss(v_BLHP, state):
        def op(v_BLHP):
            inputs = (tokens._replace(v_BLHP=v_BLHP), heads, state)
            return compiled(*inputs, rotation="adjacent", tiles=default("v5e", 1))

        return jnp.sum(loop(op, v_BLHP))

    traced = jax.jit(jax.grad(loss)).trace(tokens.v_BLHP, state if given else None)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    size = "x".join(map(str, state.ssm_BHPN.shape))
    found = {}
    for line in text.splitlines():
        if "@tpu_custom_call" in line:
            name = re.search(r'kernel_name = "(\w+)"', line).group(1)
            operands, results = line.rsplit(" : ", 1)[1].split(" -> ")
            found.setdefault(name, set()).add(tuple(f"<{size}xf32>" in types for types in (operands, results)))
    assert found["mamba3_tpu_scan"] == {(given, True)}
    assert found["mamba3_tpu_scan_back"] == {(False, given)}


@pytest.mark.quick
def test_a_named_implementation_runs_or_raises(monkeypatch):
    monkeypatch.setitem(ssm.__globals__["IMPLEMENTATIONS"], "mosaic_tpu", mosaic_tpu)
    tokens, heads, state = draw(SMALL)
    interpreted = functools.partial(mosaic_tpu, rotation="adjacent", interpret=INTERPRETER)
    with pytest.raises(ValueError, match="implementation='mosaic_tpu' needs a TPU, the backend is"):
        ssm(tokens, heads, state, implementation="mosaic_tpu")
    for shape, message in (
        (SMALL._replace(rank=3, ranked=True), "a rank of 1, 2, 4, 8, not rank=3"),
        (SMALL._replace(d_state=258), "d_state up to 256 and P up to 128, not d_state=258"),
        (SMALL._replace(width=129), "P up to 128, not d_state=8, P=129"),
    ):
        with pytest.raises(ValueError, match=message):
            interpreted(*draw(shape))
    halved = {name: getattr(tokens, name).astype(np.float16) for name in ("q_BLRGN", "k_BLRGN", "v_BLHP")}
    with pytest.raises(ValueError, match="wants q, k and v in float32 or bfloat16, not float16"):
        interpreted(tokens._replace(**halved), heads, state)
    with jax.enable_x64(True), pytest.raises(ValueError, match="computes in float32, log_a is float64"):
        interpreted(tokens._replace(log_a_BLH=np.float64(tokens.log_a_BLH)), heads, state)
    with pytest.raises(ValueError, match="chip='v9' is not one of"):
        default("v9", 1)
    run = functools.partial(compiled, rotation="adjacent", tiles=Tiles(tokens=1024, vmem=16))
    with pytest.raises(ValueError, match=r"scan takes about .* more than tiles.vmem=16: shrink tiles.tokens=1024"):
        jax.eval_shape(run, *draw(SMALL._replace(length=1100)))
    with pytest.raises(ValueError, match=r"n_heads=4 is not a multiple of .* tiles.heads=3"):
        interpreted(tokens, heads, state, tiles=Tiles(heads=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "narrow"),
    [
        (SISO._replace(batch=1, length=2048, heads=32, groups=1, d_state=128, width=64, planes=32), True),
        (MIMO._replace(batch=1, length=2000, heads=24, groups=1, d_state=128, width=64, planes=32), False),
    ],
    ids=["siso_bfloat16", "mimo_packed_float32"],
)
@pytest.mark.parametrize("chip", tpu_aot.CHIPS)
@pytest.mark.libtpu
@pytest.mark.usefixtures("compiler")
def test_libtpu_compiles(chip, shape, narrow):
    """Forward and backward, without a TPU: what Mosaic's compiler refuses, and what does not fit in VMEM."""
    device = tpu_aot.Target(chip).device
    tokens, heads, state = draw(shape)
    start_BL = start_of(shape, () if narrow else (700,))
    if narrow:
        tokens = bfloat16(tokens)
    sharding = SingleDeviceSharding(device)

    def flat(array):
        """As a model has them: P or N beside heads, ranks and groups in memory."""
        return array.reshape(*array.shape[:2], -1) if array is not None and array.ndim > 3 else array

    def op(flattened, heads, state):
        unflat = jax.tree.map(lambda array, like: array.reshape(like.shape), flattened, tokens)
        unflat = unflat._replace(start_BL=start_BL)
        return compiled(
            unflat, heads, state, rotation=shape.rotation, tiles=default(chip, shape.rank, dtype=tokens.q_BLRGN.dtype)
        )

    def with_gradients(*inputs):
        results, pull = jax.vjp(op, *inputs)
        return results, pull(results)

    inputs = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        (jax.tree.map(flat, tokens), heads, state),
    )
    with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("one",)).abstract_mesh):
        lowered = jax.jit(with_gradients).lower(*inputs)
    text = lowered.compile().as_text()
    assert "mamba3_tpu_scan_back" in text
