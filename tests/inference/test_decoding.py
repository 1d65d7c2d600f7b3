"""The decode loop's own form of a model: the same numbers, no cast of a parameter inside, states updated in place."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from mamba3_jax import decoding, generate, memory
from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel, init_params
from mamba3_jax.sampling import Sampling
from tests.helpers import first, rel_rms

SMALL = ModelConfig(
    vocab_size=301,
    pad_vocab_to=16,
    d_model=48,
    d_ff=80,
    d_state=16,
    head_dim=24,
    attn_head_dim=16,
    attn_bias=True,
    out_norm=True,
    implementation="recurrent",
)
BATCH, TOKENS = 5, 8
CONFIGS = {
    "siso": {"pattern": "MM", "norm": "layer"},
    "hybrid": {"pattern": "MA", "tie_embeddings": False},
    "mimo": {"pattern": "MM", "mimo_rank": 2},
    "delta": {"pattern": "MG", "delta_head_dim": 16},
    "mamba1": {"pattern": "M1"},
    "conv": {"pattern": "MM", "conv": 4, "a_form": "learned", "bc_norm": False},
    "quaternion": {"pattern": "MM", "angles": "quaternion"},
    "narrow": {"pattern": "MM", "residual_in_fp32": False},
}


def config_of(name: str, dtype: str = "bfloat16") -> ModelConfig:
    return dataclasses.replace(SMALL, compute_dtype=dtype, **CONFIGS[name])


def to_numpy(tree):
    """NumPy's arrays in the place of jax's, of which every operation is compiled."""
    return jax.tree.map(np.asarray, tree)


@functools.cache
def params_of(config_name: str):
    params = init_params(config_of(config_name), jax.random.key(0))
    # Away from the initial 0 and 1, so that all count.
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + np.float32(0.1) * random.standard_normal(x.shape, np.float32), to_numpy(params))


@functools.cache
def prepared_of(name: str):
    """What `decoding.prepare` makes of the parameters, shapes alone: nothing is compiled."""
    config = config_of(name)
    return jax.eval_shape(lambda: decoding.prepare(config, init_params(config, jax.random.key(0))))


def some_state(config: ModelConfig):
    """A state as one that some tokens left: random numbers, and places in the caches."""
    state, random = LanguageModel(config).empty_state(BATCH, TOKENS), np.random.default_rng(2)
    draw = lambda x: random.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
    return jax.tree.map(lambda x: np.full_like(x, 3) if x.dtype == np.int32 else draw(x), to_numpy(state))


# Of two programs that XLA fuses in two ways: float32's rounding, or one of bfloat16.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}


@pytest.mark.full
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_the_models(name, dtype):
    config, params = config_of(name, dtype), params_of(name)
    token_B, start_B = jnp.arange(BATCH) * 7, jnp.arange(BATCH) == 1
    state = some_state(config)
    plain = jax.jit(lambda *a: LanguageModel(config).apply({"params": a[0]}, a[1][:, None], a[2], a[3][:, None]))
    run = jax.jit(functools.partial(decoding.step, config))
    want_BLV, want_state = plain(params, token_B, state, start_B)
    want_BLV, want_state = to_numpy((want_BLV, want_state))
    want = jax.tree.leaves((want_BLV[:, 0, : config.vocab_size], decoding.unstacked(config, want_state)))

    def errors(params):
        got = run(decoding.prepare(config, params), token_B, decoding.unstacked(config, state), start_B)
        return [rel_rms(*pair) for pair in zip(jax.tree.leaves(got), want, strict=True)]

    assert max(errors(params)) < TOLERANCE[dtype]
    layer = params["segment_0"]["block_0"]["mixer"]
    wrong = layer | {"in_zx": layer["in_zx"] * (1 + 4 * TOLERANCE[dtype])}
    wrong = params | {"segment_0": params["segment_0"] | {"block_0": params["segment_0"]["block_0"] | {"mixer": wrong}}}
    assert max(errors(wrong)) > TOLERANCE[dtype], "a planted error is seen"


@pytest.mark.parametrize("name", first(CONFIGS))
def test_matrices_are_stored_in_the_compute_dtype_and_the_rest_is_not(name):
    config, by_dtype = config_of(name), {}
    for path, shape in jax.tree_util.tree_leaves_with_path(prepared_of(name)):
        by_dtype.setdefault(str(shape.dtype), set()).add("/".join(key.key for key in path[-2:]))
    matrices = {"mixer/in_zx", "mixer/in_dt_a_trap", "mixer/in_kq_angle", "mixer/out"}
    matrices |= {"mlp/value", "mlp/gate", "mlp/out", "head/embedding" if config.tie_embeddings else "head/kernel"}
    if name == "hybrid":
        matrices |= {f"mixer/{part}{bias}" for part in ("q", "k", "v", "out") for bias in ("", "_bias")}
        by_dtype["float32"] -= {"mixer/q_bias", "mixer/k_bias"}  # the Mamba-3 layer's, of the same name
    if name == "delta":
        matrices |= {f"mixer/{part}" for part in ("in_qk", "in_zv", "in_ab")}
    if name == "mamba1":
        matrices |= {"mixer/in_rkq", "mixer/in_dt"}
    assert by_dtype["bfloat16"] == matrices
    assert {"embedding/embedding", "mixer/skip", "mixer/dt_bias", "norm1/scale"} <= by_dtype["float32"]
    assert not by_dtype["float32"] & matrices


def shapes_of(config: ModelConfig, params):
    """Shapes of the decode loop's arguments."""

    def carry():
        nothing_B = jnp.zeros(BATCH, bool)
        state = LanguageModel(config, stacked=False).empty_state(BATCH, TOKENS)
        step, token_B, out_BT = jnp.int32(0), jnp.zeros(BATCH, jnp.int32), jnp.zeros((BATCH, TOKENS), jnp.int32)
        return generate.Carry(
            step=step, token_B=token_B, start_B=nothing_B, done_B=nothing_B, out_BT=out_BT, state=state
        )

    return params, jax.eval_shape(lambda: jax.random.key(0)), jax.eval_shape(carry), jax.ShapeDtypeStruct((), jnp.int32)


def casts(jaxpr, of: set) -> list[str]:
    """Casts anywhere in a jaxpr of what has one of these shapes."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "convert_element_type" and equation.invars[0].aval.shape in of:
            found.append(str(equation))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += casts(inner, of) if isinstance(inner, core.Jaxpr) else []
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_no_parameter_is_cast_in_the_loop(name):
    config, prepared = config_of(name), prepared_of(name)
    loop = functools.partial(generate.decode, config, Sampling(top_p=0.9), ())
    matrices = {x.shape for x in jax.tree.leaves(prepared) if x.dtype == jnp.bfloat16}
    matrices |= {shape[::-1] for shape in matrices if len(shape) == 2}
    assert not casts(jax.make_jaxpr(loop)(*shapes_of(config, prepared)).jaxpr, matrices)
    as_they_were = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), prepared)
    assert casts(jax.make_jaxpr(loop)(*shapes_of(config, as_they_were)).jaxpr, matrices)


def body_of_the_loop(hlo: str, shape: str) -> list[str]:
    """The lines of the body of the loop that carries arrays of this shape, without those inside fusions."""
    (name,) = set(re.findall(rf"{re.escape(shape)}.* while\(.*body=%?([\w.\-]+)", hlo))
    return re.search(rf"^%?{re.escape(name)} .*?^}}", hlo, re.MULTILINE | re.DOTALL).group().splitlines()


@pytest.mark.full
@pytest.mark.parametrize(("name", "layers"), [("siso", 2), ("hybrid", 1)])
def test_the_compiled_loop_writes_each_state_once_in_its_place(name, layers):
    config, prepared = config_of(name), prepared_of(name)
    loop = jax.jit(functools.partial(generate.decode, config, Sampling(0.0), ()), donate_argnums=2)
    compiled = loop.lower(*shapes_of(config, prepared)).compile()
    (shape,) = {x.shape for x in jax.tree.leaves(some_state(config)) if x.ndim == 5 and x.dtype == jnp.float32}
    shape = f"f32[{','.join(map(str, shape[1:]))}]"
    made = [re.search(r"\} ([\w\-]+)\(", line).group(1) for line in body_of_the_loop(compiled.as_text(), shape)
            if re.search(rf" = {re.escape(shape)}", line)]  # fmt: skip
    assert sorted(made) == ["fusion"] * layers + ["get-tuple-element"] * layers
    plan = compiled.memory_analysis()
    assert plan.alias_size_in_bytes >= memory.on_a_device(shapes_of(config, prepared)[2].state)


@pytest.mark.parametrize(("free", "tries"), [(None, 1), (10**9, 1), (2 * 10**7, 2), (0, 2)])
def test_a_piece_of_the_prefill_shrinks_until_it_fits(free, tries, monkeypatch):
    tried = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def compile_prefill(tokens_BL, start_BL, piece):
        tried.append(piece)
        return piece

    monkeypatch.setattr(memory, "of_program", lambda piece: 1000 * piece)
    monkeypatch.setattr(memory, "free_on_device", lambda: free)
    run, tokens_BL, _, piece = generate.fitting(compile_prefill, [[1] * 100_001, [1]], None, held=0)
    assert run == piece == tried[-1]
    assert (tokens_BL.shape[1] - 1) % piece == 0
    assert tried[0] == 50_000  # two of equal length, none over PREFILL_MOST / 2 rows
    assert len(tried) == tries
    assert free is None or 1000 * piece <= max(free, 1000 * generate.PREFILL)


def test_a_given_piece_is_obeyed(monkeypatch):
    monkeypatch.setattr(memory, "of_program", lambda _: 10**9)
    monkeypatch.setattr(memory, "free_on_device", lambda: 0)
    assert generate.fitting(lambda *_: None, [[1] * 9], 4, held=0)[-1] == 4
