"""Attention against the definition in float64: every option, whole and in pieces, with documents and a cache; cuDNN.

Here cuDNN's kernels are lowered and not run. What is asked of them is asked of XLA, in the same words.
"""

import contextlib
import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import use_abstract_mesh

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers.attention import Attention
from mamba3_jax.model import LanguageModel, validate
from mamba3_jax.ops import attention
from tests.helpers import first, rel_rms
from tests.pallas_kernels.family import GPU, mesh_of

FORWARD, GRADIENT = 1e-5, 2e-5
BATCH, LENGTH, D_MODEL = 2, 13, 12
OPTIONS = {
    "plain": {},
    "grouped": {"attn_kv_heads": 2},
    "rope": {"attn_rope_theta": 100.0, "attn_kv_heads": 1},
    "bias": {"attn_bias": True, "attn_rope_theta": 100.0},
}


def config(**options):
    return ModelConfig(d_model=D_MODEL, attn_heads=4, attn_head_dim=6, **options)


def inputs(conf):
    """Parameters (biases not zero), x and documents that start at 0, 5, 6 and at 3."""
    x_BLD = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, D_MODEL))
    params = jax.jit(Attention(conf).init)(jax.random.key(0), x_BLD)["params"]
    params = jax.tree.map(lambda p: p.unbox() + 0.1, params, is_leaf=lambda p: hasattr(p, "unbox"))
    start_BL = np.zeros((BATCH, LENGTH), bool)
    start_BL[0, [0, 5, 6]] = start_BL[1, 3] = True
    return params, x_BLD, start_BL


def apply(conf, params, x_BLD, state=None, start_BL=None):
    return Attention(conf).apply({"params": params}, x_BLD, state, start_BL)


def naive(conf, start_BL, params, x_BLD):
    """All L x L scores of every head: softmax over the tokens of the same document that are not later."""
    token_L = np.arange(x_BLD.shape[1])
    first_BL = np.maximum.accumulate(np.where(start_BL, token_L, 0), axis=1)
    seen_BLT = (token_L <= token_L[:, None]) & (token_L >= first_BL[..., None])

    def project(name):
        x_BLHE = jnp.einsum("bld,dhe->blhe", x_BLD, params[name]) + params.get(f"{name}_bias", 0)
        if conf.attn_rope_theta and name != "v":
            half = x_BLHE.shape[-1] // 2
            angle = (token_L - first_BL)[..., None, None] * conf.attn_rope_theta ** (-np.arange(half) / half)
            turned = (x_BLHE[..., :half] + 1j * x_BLHE[..., half:]) * np.exp(1j * angle)
            x_BLHE = jnp.concatenate([turned.real, turned.imag], axis=-1)
        return jnp.repeat(x_BLHE, params["q"].shape[1] // x_BLHE.shape[2], axis=2)

    q, k, v = project("q"), project("k"), project("v")
    scores = jnp.einsum("blhe,bthe->bhlt", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen_BLT[:, None], scores, -jnp.inf))
    y_BLHE = jnp.einsum("bhlt,bthe->blhe", weights, v)
    return jnp.einsum("blhe,hed->bld", y_BLHE, params["out"]) + params.get("out_bias", 0)


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_the_definitions(options, monkeypatch):
    conf = config(**options)
    params, x_BLD, start_BL = inputs(conf)
    cotangent = np.random.default_rng(0).normal(size=x_BLD.shape)

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda p: np.asarray(p, np.float64), (params, x_BLD))
        want, pull = jax.vjp(jax.jit(functools.partial(naive, conf, start_BL)), *exact)
        want_params, want_x = jax.tree.map(np.asarray, pull(jnp.asarray(cotangent)))

    for queries in (256, 5):  # all at once; in blocks, the last one padded
        monkeypatch.setattr(attention, "QUERIES", queries)
        y_BLD, pull = jax.vjp(
            jax.jit(lambda params, x_BLD: apply(conf, params, x_BLD, None, start_BL)[0]), params, x_BLD
        )
        got_params, got_x = pull(jnp.float32(cotangent))
        assert rel_rms(y_BLD, want) < FORWARD
        assert rel_rms(y_BLD * (1 + 1e-3), want) > 10 * FORWARD  # a planted error
        assert rel_rms(got_x, want_x) < GRADIENT
        scale = max(np.abs(array).max() for array in want_params.values())
        for name, array in want_params.items():  # k_bias has gradient 0 without rope: absolute
            assert np.abs(got_params[name] - array).max() < GRADIENT * scale, name


@pytest.mark.full
@pytest.mark.parametrize("documents", [False, True])
def test_pieces_with_a_cache_are_the_whole(documents):
    conf = config(**OPTIONS["rope"])
    params, x_BLD, start_BL = inputs(conf)
    start_BL = start_BL if documents else None
    layer = jax.jit(lambda x_BLD, state, start_BL: apply(conf, params, x_BLD, state, start_BL))
    whole_BLD, _ = layer(x_BLD, None, start_BL)

    state, pieces = Attention.empty_state(conf, BATCH, LENGTH + 2), []
    for begin, end in [(0, 4), (4, 5), (5, 6), (6, 13)]:
        start = None if start_BL is None else start_BL[:, begin:end]
        y_BLD, state = layer(x_BLD[:, begin:end], state, start)
        pieces.append(y_BLD)
    assert rel_rms(jnp.concatenate(pieces, axis=1), whole_BLD) < FORWARD
    assert state.position_B.tolist() == [LENGTH, LENGTH]
    assert state.first_B.tolist() == ([6, 3] if documents else [0, 0])


def test_a_full_cache_gives_nan_and_not_wrong_numbers():
    conf = config()
    params, x_BLD, _ = inputs(conf)
    _, state = apply(conf, params, x_BLD[:, :3])  # the capacity is those 3 tokens
    assert state.k_BTKE.shape[1] == 3
    y_BLD, state = apply(conf, params, x_BLD[:, 3:4], state)
    assert np.isnan(y_BLD).all()
    with pytest.raises(ValueError, match="length=4 tokens do not fit in a cache of capacity 3"):
        apply(conf, params, x_BLD[:, :4], state)


NARROW = config(compute_dtype="bfloat16", attn_implementation="cudnn", attn_rope_theta=100.0, attn_kv_heads=2)
NARROW = dataclasses.replace(NARROW, attn_head_dim=8)


@pytest.fixture
def asked(monkeypatch):
    """A GPU as far as the choice sees; the words that cuDNN is asked in, and XLA answers."""
    words, answer = [], jax.nn.dot_product_attention

    def ask(*arrays, implementation, **options):
        words.append((implementation, options["is_causal"], options["mask"] is not None))
        return answer(*arrays, implementation="xla", **options)

    monkeypatch.setattr(attention, "unavailable", lambda: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", ask)
    return words


@pytest.mark.parametrize("documents", first([True, False]))
def test_what_cudnn_is_asked_is_attention(documents, asked):
    """Values and gradients; without the mask, or with query heads of another group, they are others."""
    params, x_BLD, start_BL = inputs(NARROW)
    x_BLD, start_BL = x_BLD[:, :12], start_BL[:, :12] if documents else None

    def run(implementation, start_BL, params=params):
        conf = dataclasses.replace(NARROW, attn_implementation=implementation)

        @jax.jit
        def call(params, x_BLD):
            y_BLD, pull = jax.vjp(lambda params, x_BLD: apply(conf, params, x_BLD, None, start_BL)[0], params, x_BLD)
            return y_BLD, pull(jnp.ones_like(y_BLD))

        return jax.tree.leaves(call(params, x_BLD))

    got, want = run("cudnn", start_BL), run("plain", start_BL)
    assert asked[-1] == ("cudnn", True, documents)
    scale = max(np.abs(array).max() for array in want)
    assert max(np.abs(np.float32(a) - np.float32(b)).max() for a, b in zip(got, want, strict=True)) < 1e-2 * scale
    regrouped = params | {"q": params["q"][:, np.array([0, 2, 1, 3])]}
    wrong = [run("cudnn", start_BL, regrouped)[0], *([run("cudnn", None)[0]] if documents else [])]
    assert all(rel_rms(y_BLD, want[0]) > 3e-2 for y_BLD in wrong)


def test_cudnn_lowers_for_cuda_and_its_mask_is_one_for_all_layers(monkeypatch):
    monkeypatch.setattr(attention, "unavailable", lambda: None)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # jax asks for the installed
    conf = dataclasses.replace(NARROW, vocab_size=8, pattern="AA", attn_implementation="")
    model, tokens_BL, start_BL = LanguageModel(conf), np.zeros((3, 192), np.int32), np.zeros((3, 192), bool)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens_BL)

    def step(params, start_BL):
        return jax.grad(lambda params: jnp.mean(model.apply(params, tokens_BL, None, start_BL)[0]))(params)

    def calls(*args):
        with use_abstract_mesh(GPU):
            text = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"__cudnn\$fmha(\w+)", text), set(re.findall(r"tensor<([0-9x]*)x192x192xbf16>", text))

    assert calls(params, None) == (["Softmax", "SoftmaxBackward"], set())
    assert calls(params, start_BL) == (["ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward"], {"3x1"})


@pytest.mark.parametrize(
    ("change", "size", "packed", "message"),
    [
        ({}, (2, 128, 4, 8), True, None),
        ({}, (2, 127, 4, 8), False, "plain"),  # short
        ({}, (2, 2**14, 4, 8), True, None),
        ({}, (2, 2**15, 4, 8), True, "plain"),  # a mask of 4 GiB
        ({}, (2, 2**15, 4, 8), False, None),
        ({"dtype": jnp.float32}, (2, 128, 4, 8), True, "computes in bfloat16, not float32"),
        ({}, (2, 128, 4, 12), True, "wants attn_head_dim a multiple of 8 up to 128, not 12"),
        ({}, (2, 128, 4, 136), True, "wants attn_head_dim a multiple of 8 up to 128, not 136"),
        ({}, (2, 129, 4, 8), True, "wants rows of documents to have an even number of tokens, not 129"),
        ({}, (2, 129, 4, 8), False, None),
    ],
)
def test_cudnn_is_chosen_where_it_runs_and_refused_by_name_where_not(change, size, packed, message, monkeypatch):
    monkeypatch.setattr(attention, "unavailable", lambda: None)
    queries = jax.ShapeDtypeStruct(size, change.get("dtype", jnp.bfloat16))
    assert attention.choose("", queries, packed) == ("plain" if message else "cudnn")
    assert attention.choose("plain", queries, packed) == "plain"
    if message in (None, "plain"):
        assert attention.choose("cudnn", queries, packed) == "cudnn"
    else:
        with pytest.raises(ValueError, match=f"attn_implementation='cudnn' {message}"):
            attention.choose("cudnn", queries, packed)


@pytest.mark.parametrize(
    ("here", "wanted", "wish"),
    [
        (("NVIDIA H200", "9.0"), None, None),
        (("NVIDIA H200", "9.0"), ("NVIDIA H200", "gpu"), None),
        (("NVIDIA H200", "9.0"), ("TPU v5 lite", "tpu"), "needs an NVIDIA GPU, not 'TPU v5 lite'"),
        (
            ("Tesla V100-NVIDIA", "7.0"),
            None,
            "needs an NVIDIA GPU of this process from Ampere on, not 'Tesla V100-NVIDIA'",
        ),
        (
            ("cpu", None),
            ("NVIDIA H200", "gpu"),
            "needs an NVIDIA GPU of this process from Ampere on, not 'NVIDIA H200'",
        ),
    ],
)
def test_whether_there_is_cudnn_is_asked_of_the_mesh_in_context(here, wanted, wish, monkeypatch):
    kind, capability = here
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind, compute_capability=capability)])
    with use_abstract_mesh(mesh_of(*wanted, cores=1)) if wanted else contextlib.nullcontext():
        assert attention.unavailable() == wish


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is one")
def test_without_a_gpu_cudnn_is_refused_by_name():
    with pytest.raises(ValueError, match="attn_implementation='cudnn' needs an NVIDIA GPU, not 'cpu'"):
        apply(NARROW, *inputs(NARROW)[:2])
    with pytest.raises(ValueError, match=r"config\.attn_implementation='flash' is not '' or one of"):
        validate(dataclasses.replace(NARROW, pattern="A", attn_implementation="flash"))
