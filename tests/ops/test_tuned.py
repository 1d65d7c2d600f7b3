"""The table of what was measured to be the fastest: which entry serves, and that what cannot be is refused."""

import contextlib
import dataclasses
import functools
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import use_abstract_mesh

from mamba3_jax.ops import kernels, ssm, tuned
from mamba3_jax.ops.tuned import Choice, choose
from mamba3_jax.ops.types import Heads
from pallas_kernels.ssm.cases import SISO
from pallas_kernels.ssm.triton.config import Launch, Tile, order_of, tile_of
from tests.ops.cases import bfloat16, draw
from tests.pallas_kernels.family import GPU, mesh_of

SHAPE = SISO._replace(batch=2, length=48, heads=32, groups=1, d_state=128, width=64, planes=32)
ENTRY = Choice("NVIDIA H200", 1, "bfloat16", width=64, d_state=128, heads=64, length=48, implementation="triton")


def tokens_of(shape=SHAPE, dtype=jnp.bfloat16):
    """Shapes alone."""
    tokens = jax.eval_shape(lambda: draw(shape)[0])
    return jax.eval_shape(bfloat16, tokens) if dtype == jnp.bfloat16 else tokens


@pytest.fixture
def table(monkeypatch):
    """Puts entries in the place of the shipped ones."""
    return lambda *entries: monkeypatch.setattr(tuned, "table", lambda: entries)


def test_the_nearest_entry_serves(table):
    few = dataclasses.replace(ENTRY, heads=2)
    long = dataclasses.replace(ENTRY, length=4096)
    step = dataclasses.replace(ENTRY, length=1)
    other = dataclasses.replace(ENTRY, device="NVIDIA H100 80GB HBM3")
    table(few, long, step, other, ENTRY)
    assert choose("NVIDIA H200", tokens_of()) is ENTRY
    assert choose("NVIDIA H200", tokens_of(SHAPE._replace(heads=64, length=40))) is ENTRY
    assert choose("NVIDIA H200", tokens_of(SHAPE._replace(batch=1, heads=4))) is few
    assert choose("NVIDIA H200", tokens_of(SHAPE._replace(length=2048))) is long
    assert choose("NVIDIA H200", tokens_of(SHAPE._replace(length=1))) is step
    assert choose("NVIDIA H100 80GB HBM3", tokens_of(SHAPE._replace(length=2048))) is other  # its own, though far
    assert choose("NVIDIA GH200 480GB", tokens_of(SHAPE._replace(batch=1, heads=4))) is few  # its architecture's
    # Another rank, dtype or state, an architecture without entries, a device that nobody knows: what was chosen by hand
    assert choose("NVIDIA H200", tokens_of(SHAPE._replace(width=32))) is None
    assert choose("NVIDIA H200", tokens_of(SHAPE._replace(d_state=256))) is None
    assert choose("NVIDIA H200", tokens_of(SHAPE._replace(rank=2))) is None
    assert choose("NVIDIA H200", tokens_of(dtype=jnp.float32)) is None
    assert choose("NVIDIA A100-SXM4-80GB", tokens_of()) is None
    assert choose("NVIDIA Quantum 9000", tokens_of()) is None


@pytest.fixture
def on_h200():
    with use_abstract_mesh(GPU):
        yield


def test_the_default_implementation(table, on_h200, monkeypatch):
    def default(entry, shape=SHAPE):
        table(*[entry] * (entry is not None))
        return ssm.default_implementation(tokens_of(shape))

    monkeypatch.delitem(kernels.BACKENDS, "mosaic_gpu")  # which asks the GPU itself
    plain = dataclasses.replace(ENTRY, implementation="chunked")
    assert default(None) == default(ENTRY) == default(None, SHAPE._replace(length=1)) == "triton"
    assert default(plain) == "chunked"
    # A kernel that the table names and that cannot run these inputs gives way; a plain one is for everything.
    later = dataclasses.replace(ENTRY, implementation="later")
    monkeypatch.setitem(ssm.IMPLEMENTATIONS, "later", None)
    monkeypatch.setitem(kernels.BACKENDS, "later", "later")
    backend = SimpleNamespace(available=lambda: None, unsupported=lambda inputs: None, STEPS=1)
    monkeypatch.setitem(sys.modules, "later", backend)
    backend.available = lambda: "wants something else"
    assert default(later) == "triton"
    backend.available = lambda: None
    assert default(later) == "later"
    monkeypatch.delitem(kernels.BACKENDS, "later")
    assert default(None, SHAPE._replace(rank=3)) == "chunked"
    assert default(None, SHAPE._replace(rank=3, length=1)) == "recurrent"
    with pytest.raises(ValueError, match=r"tuned.json has .*implementation='fastest'.* is not one of"):
        default(dataclasses.replace(ENTRY, implementation="fastest"))


@pytest.fixture
def on_tpu(monkeypatch):
    """Programs are for a TPU of some kind, or several."""
    monkeypatch.setitem(ssm.IMPLEMENTATIONS, "mosaic_tpu", kernels.IMPLEMENTATIONS["mosaic_tpu"])  # not interpreted
    with contextlib.ExitStack() as stack:

        def become(kind: str, devices: int = 1):
            stack.enter_context(use_abstract_mesh(mesh_of(kind, "tpu", cores=1, devices=devices)))

        yield become


@pytest.mark.full
@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x"])
def test_the_default_on_a_tpu_is_its_kernels(kind, on_tpu):
    """Of a row and of one token; of what the kernels do not support, plain XLA."""
    step = SHAPE._replace(length=1)
    kernels = {"row": SHAPE, "step": step, "mimo": SHAPE._replace(rank=4), "step of rank 3": step._replace(rank=3)}
    plain = {"rank 3": SHAPE._replace(rank=3), "state": SHAPE._replace(d_state=258), "wide": SHAPE._replace(width=129)}
    on_tpu(kind)
    for dtype in (jnp.float32, jnp.bfloat16):
        for name, shape in (kernels | plain).items():
            wanted = "mosaic_tpu" if name in kernels else "chunked"
            assert ssm.default_implementation(tokens_of(shape, dtype)) == wanted, name
    half = tokens_of(step)
    half = half._replace(q_BLRGN=jax.ShapeDtypeStruct(half.q_BLRGN.shape, jnp.float16))
    assert ssm.default_implementation(half) == "recurrent"


@pytest.mark.full
def test_the_default_on_a_tpu_has_vmem_for_its_shapes(on_tpu):
    """Where a kernel would raise that it has not, plain XLA runs: heads that do not divide, a large state on v4."""
    on_tpu("TPU v4")
    heads = SHAPE._replace(length=1, heads=100, batch=1)
    assert ssm.default_implementation(tokens_of(heads)) == "recurrent"
    assert ssm.default_implementation(tokens_of(heads._replace(heads=96))) == "mosaic_tpu"
    large = SHAPE._replace(length=2048, batch=1, d_state=256, width=128)
    assert ssm.default_implementation(tokens_of(large)) == "chunked"
    with pytest.raises(ValueError, match=r"more than tiles\.vmem=15: shrink tiles\.tokens=256"):
        jax.eval_shape(jax.grad(named), *draw_shapes(large))
    on_tpu("TPU v5 lite")
    assert ssm.default_implementation(tokens_of(large)) == "mosaic_tpu"


@pytest.mark.full
@pytest.mark.parametrize(("d_state", "dtype"), [(128, jnp.bfloat16), (256, jnp.bfloat16), (256, jnp.float32)])
def test_the_default_on_a_tpu_is_not_refused_later(d_state, dtype, on_tpu):
    """As heads take more and more VMEM: what is chosen is traced in both rotations, with all that there can be."""
    on_tpu("TPU v4")
    chosen = []
    for n_heads in range(2, 130, 8):
        shape = SHAPE._replace(length=512, batch=1, d_state=d_state, heads=n_heads, norm=True)
        tokens = tokens_of(shape, dtype)
        chosen.append(ssm.default_implementation(tokens) == "mosaic_tpu")
        for rotation in ["adjacent", "half"] if chosen[-1] else []:

            def both(tokens, heads, state, rotation=rotation):
                results, pull = jax.vjp(functools.partial(ssm.ssm, rotation=rotation), tokens, heads, state)
                return pull(results)

            jax.eval_shape(both, tokens, *jax.eval_shape(lambda shape=shape: draw(shape)[1:]))
    assert not chosen[-1]
    assert chosen == sorted(chosen, reverse=True)


def named(tokens, heads):
    return jnp.sum(ssm.ssm(tokens, heads, implementation="mosaic_tpu")[0])


def draw_shapes(shape):
    return jax.eval_shape(lambda: draw(shape)[:2])


def test_where_a_tpu_has_no_default_kernel(on_tpu):
    """One that is not known; several, which XLA would have to divide a kernel over."""
    with use_abstract_mesh(mesh_of("TPU v3", "tpu", cores=1)):
        assert ssm.default_implementation(tokens_of()) == "chunked"
        with pytest.raises(ValueError, match=r"device 'TPU v3' is not one of .*: pass tiles"):
            jax.eval_shape(named, *draw_shapes(SHAPE))
    on_tpu("TPU v5 lite", devices=4)
    for shape, plain in ((SHAPE, "chunked"), (SHAPE._replace(length=1), "recurrent")):
        with pytest.warns(UserWarning, match=r"XLA on TPU v5 lite, .* left out: mosaic_tpu wants each device's part"):
            assert ssm.default_implementation(tokens_of(shape)) == plain
    with pytest.warns(UserWarning, match="left out: mosaic_tpu wants a rank of 1, 2, 4, 8, not rank=3"):
        assert ssm.default_implementation(tokens_of(SHAPE._replace(rank=3))) == "chunked"


def tile(tokens, config) -> Tile:
    """Returns how Triton's kernels are cut for these tokens."""
    shapes = jax.eval_shape(lambda tokens: kernels._row(tokens, Heads(), None), tokens)
    d_state, planes = tokens.q_BLRGN.shape[-1], tokens.angle_BLHS.shape[-1]
    return tile_of(shapes, order_of("adjacent", d_state, planes).size, config, False)


def test_the_launch_is_the_tables(table, on_h200):
    told = {"chunk": 32, "programs": 512, "forward": [8, 3], "rotate_heads": 2}
    table(dataclasses.replace(ENTRY, launch={"triton": told}))
    tokens = tokens_of(SHAPE._replace(length=1024))
    by_hand = tile(tokens, {})
    assert by_hand == Tile(rows=64, width=64, splits=4)
    assert tile(tokens, tuned.config("triton", tokens)) == dataclasses.replace(
        by_hand, rows=32, splits=8, forward=Launch(8, 3), rotate_heads=2
    )
    assert tuned.config("mosaic_gpu", tokens) == {}
    for launch in ({"chunks": 1}, {"forwards": [4, 2]}):
        with pytest.raises(ValueError, match=rf"implementation='triton' has no {next(iter(launch))} to be launched"):
            tile(tokens, launch)


def test_a_token_is_told_too(table, on_h200):
    table(dataclasses.replace(ENTRY, length=1, dtype="float32", launch={"triton": {"nonsense": 1}}))
    tokens, heads, state = draw(SHAPE._replace(length=1))
    with pytest.raises(ValueError, match="has no nonsense to be launched with"):
        kernels.kernels(tokens, heads, state, rotation="adjacent", backend="triton", anywhere=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": "1"}, "entry 1: rank='1' is not a positive int"),
        ({"heads": 0}, "entry 1: heads=0 is not a positive int"),
        ({"device": 5}, "entry 1: device=5 is not a str"),
        ({"launch": [1]}, r"entry 1: launch=\[1\] is not a dict"),
        ({"ranks": 1}, "entry 1: .* has not the fields device, rank"),
    ],
)
def test_a_wrong_entry_is_named(change, message, tmp_path):
    path = tmp_path / "tuned.json"
    entry = dataclasses.asdict(ENTRY)
    path.write_text(json.dumps([entry]))
    assert tuned.read(path) == (ENTRY,)
    path = tmp_path / "other.json"
    path.write_text(json.dumps([entry, entry | change]))
    with pytest.raises(ValueError, match=message):
        tuned.read(path)
    path.write_text("[")
    with pytest.raises(ValueError, match=r"other.json is not JSON"):
        tuned.read(path)


def test_the_shipped_table_can_be_used():
    """Every entry names implementations that are, and launches that the kernels know."""
    for entry in tuned.table():
        assert {entry.implementation, *entry.launch} <= set(ssm.IMPLEMENTATIONS), entry
        assert tuned.architecture(entry.device), entry
        sizes = (entry.width, entry.d_state)
        assert sizes == tuple(map(tuned.rounded, sizes)), entry
        if entry.length > 1:
            shape = SHAPE._replace(rank=entry.rank, width=entry.width, d_state=entry.d_state)
            tile(tokens_of(shape), entry.launch.get("triton", {}))
