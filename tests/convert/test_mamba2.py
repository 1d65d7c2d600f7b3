"""Official Mamba-2 models: a float64 model by hand from the official tensors, bits that come back, and refusals."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import mamba3_jax
from mamba3_jax import convert
from mamba3_jax.config import ModelConfig
from mamba3_jax.convert import files
from mamba3_jax.convert.names import official_shapes, our_shapes
from mamba3_jax.model import LanguageModel, boxed_shapes
from tests.convert.by_hand import logits
from tests.helpers import rel_rms

ROOT = Path(__file__).parents[2]
FORWARD = 1e-5  # float32 against float64, as in test_official.py
# As state-spaces/mamba2-130m has it, but small; with groups, a feed-forward and attention. All else is the default.
CONFIG = {
    "d_model": 32,
    "d_intermediate": 128,
    "n_layer": 3,
    "vocab_size": 13,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16, "ngroups": 2},
    "attn_layer_idx": [1],
    "attn_cfg": {"causal": True, "num_heads": 4, "num_heads_kv": 2, "qkv_proj_bias": False, "out_proj_bias": False},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
TOKENS = np.random.default_rng(2).integers(0, 13, (1, 11))
INNER, STATE, HEADS = 64, 16, 4  # x; all groups' B, or C; dt
BC = [*range(INNER), *range(INNER + STATE, INNER + 2 * STATE), *range(INNER, INNER + STATE)]  # of x | B | C
# Official names and shapes as torch registers them: parameters of a module before those of its children.
MAMBA2 = {
    "dt_bias": (HEADS,),
    "A_log": (HEADS,),
    "D": (HEADS,),
    "in_proj.weight": (2 * INNER + 2 * STATE + HEADS, 32),
    "conv1d.weight": (INNER + 2 * STATE, 1, 4),
    "conv1d.bias": (INNER + 2 * STATE,),
    "norm.weight": (INNER,),
    "out_proj.weight": (32, INNER),
}
MIXERS = [MAMBA2, {"in_proj.weight": (64, 32), "out_proj.weight": (32, 32)}, MAMBA2]
FEED_FORWARD = {"norm2.weight": (32,), "mlp.fc1.weight": (256, 32), "mlp.fc2.weight": (32, 128)}


@functools.cache
def official():
    """Random official tensors, in their order, none of them at a value that hides it."""
    shapes = {"backbone.embedding.weight": (16, 32)}
    for layer, mixer in enumerate(MIXERS):
        inside = {"norm.weight": (32,)} | {f"mixer.{name}": shape for name, shape in mixer.items()} | FEED_FORWARD
        shapes |= {f"backbone.layers.{layer}.{name}": shape for name, shape in inside.items()}
    shapes["backbone.norm_f.weight"] = (32,)
    random = np.random.default_rng(0)
    tensors = {name: 0.5 * random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]}


@functools.cache
def by_hand():
    return logits(official(), CONFIG, TOKENS)


@functools.cache
def forward():
    """A compiled official tensors -> logits by our model."""
    config = convert.from_official(CONFIG)
    run = jax.jit(lambda params: LanguageModel(config).apply({"params": params}, TOKENS)[0])
    return lambda tensors: run(convert.to_params(tensors, config))


def tied(tensors):
    return tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]}


def test_sizes_and_fields():
    model = convert.from_official(CONFIG)
    assert (model.pattern, model.d_conv, model.n_groups, model.d_ff) == ("2A2", 4, 2, 128)
    assert list(official_shapes(model).items()) == [(name, tensor.shape) for name, tensor in official().items()]
    wanted = convert.names.flatten(jax.tree.map(lambda leaf: leaf.value, boxed_shapes(model), is_leaf=is_box))
    assert {path: leaf.shape for path, leaf in wanted.items()} == our_shapes(model)


def is_box(leaf):
    return hasattr(leaf, "value")


@pytest.mark.parametrize(
    ("d_model", "layers", "millions"), [(768, 24, "128.99"), (2560, 64, "2702.60")], ids=["mamba2-130m", "mamba2-2.7b"]
)
def test_released_sizes_have_the_released_parameters(d_model, layers, millions):
    released = {"d_model": d_model, "n_layer": layers, "vocab_size": 50277, "pad_vocab_size_multiple": 16}
    model = convert.from_official(released | {"ssm_cfg": {"layer": "Mamba2"}})
    shapes = {name: shape for name, shape in official_shapes(model).items() if name != "lm_head.weight"}  # it is tied
    assert f"{sum(map(math.prod, shapes.values())) / 1e6:.2f}" == millions


def test_logits_are_those_by_hand():
    assert rel_rms(forward()(official()), by_hand()) < FORWARD


@pytest.mark.parametrize("name", [name for name in official() if name != "lm_head.weight"])
def test_logits_notice_a_thousandth_in_any_tensor(name):
    noise, tensor = np.random.default_rng(3), official()[name]
    wrong = official() | {name: tensor * (1 + 1e-3 * noise.standard_normal(tensor.shape).astype(np.float32))}
    assert rel_rms(forward()(tied(wrong)), by_hand()) > FORWARD


def test_b_for_c_and_taps_in_reverse_are_seen():
    swapped = [*range(INNER), *(INNER + row for row in BC), *range(2 * INNER + 2 * STATE, len(BC) + INNER + HEADS)]
    for name in ("backbone.layers.0.mixer", "backbone.layers.2.mixer"):
        rows = {"in_proj.weight": swapped, "conv1d.weight": BC, "conv1d.bias": BC}
        wrong = {f"{name}.{part}": official()[f"{name}.{part}"][order] for part, order in rows.items()}
        assert rel_rms(forward()(official() | wrong), by_hand()) > 1e-2
        wrong = {f"{name}.conv1d.weight": official()[f"{name}.conv1d.weight"][..., ::-1]}
        assert rel_rms(forward()(official() | wrong), by_hand()) > 1e-2


def directory_of(path, dtype, names):
    """An official directory as the official code saves it: in a model of bfloat16, D is still float32."""
    path.mkdir()
    said = CONFIG | {"ssm_cfg": CONFIG["ssm_cfg"] | {"chunk_size": 256, "d_ssm": INNER}}
    (path / "config.json").write_text(json.dumps(said))
    tensors = {name: x if name.endswith(".D") else x.astype(dtype) for name, x in official().items()}
    for name in names:
        files.FORMATS[name].write(path / name, tied(tensors))
    return path


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("names", [["model.safetensors"], ["pytorch_model.bin"]])
def test_files_come_back_bit_for_bit(dtype, names, tmp_path):
    source, workdir, back = directory_of(tmp_path / "source", dtype, names), tmp_path / "workdir", tmp_path / "back"
    model, params, origin = convert.read(source)
    assert model == convert.from_official(CONFIG)
    workdir.mkdir()
    back.mkdir()
    origin.save(workdir)
    convert.write(back, model, params, files.Origin.load(workdir))
    assert sorted(path.name for path in back.iterdir()) == sorted(["config.json", *names])
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (back / names[0]).read_bytes() == (source / names[0]).read_bytes()


def test_an_infinity_in_config_json_is_left_out_aloud(tmp_path):
    source = directory_of(tmp_path / "source", np.float32, ["model.safetensors"])
    said = json.loads((source / "config.json").read_text())
    limited = said | {"ssm_cfg": said["ssm_cfg"] | {"dt_limit": [0.0, math.inf]}}
    (source / "config.json").write_text(json.dumps(limited))
    model, params, origin = convert.read(source)
    assert origin.peeled == ["left ssm_cfg.dt_limit, which says the default, out of config.json"]
    origin.save(tmp_path)
    convert.write(tmp_path, model, params, files.Origin.load(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == said


def test_ours_come_back_through_files(tmp_path):
    """Ours -> official -> ours, by `load`, with every field of an official Mamba-2 at a value that is no default."""
    model = ModelConfig(
        vocab_size=13,
        d_model=32,
        pattern="2222",
        norm="layer",
        tie_embeddings=False,
        residual_in_fp32=False,
        d_state=6,
        expand=3,
        head_dim=16,
        n_groups=3,
        d_conv=3,
        dt_min=0.01,
        dt_max=0.2,
        dt_init_floor=1e-3,
    )
    random = np.random.default_rng(1)
    flat = {path: random.standard_normal(shape).astype(np.float32) for path, shape in our_shapes(model).items()}
    convert.write(tmp_path, model, convert.names.unflatten(flat))
    loaded, params = mamba3_jax.load(tmp_path)
    assert loaded.config == model
    back = convert.names.flatten(params)
    assert {path: np.asarray(array).tobytes() for path, array in back.items()} == {
        path: array.tobytes() for path, array in flat.items()
    }


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("bias", True, "ssm_cfg.bias is True; only False is supported"),
        ("conv_bias", False, "ssm_cfg.conv_bias is False; only True"),
        ("D_has_hdim", True, "ssm_cfg.D_has_hdim is True; only False"),
        ("rmsnorm", False, "ssm_cfg.rmsnorm is False; only True"),
        ("norm_before_gate", True, "ssm_cfg.norm_before_gate is True; only False"),
        ("dt_limit", [0.001, 0.1], r"ssm_cfg.dt_limit is .0.001, 0.1.; only .0.0, inf. is"),
        ("d_ssm", 32, "ssm_cfg.d_ssm is 32; only null and 64"),
        ("ngroups", 3, "ssm_cfg.ngroups is 3, wanted a divisor of the 4 heads"),
        ("headdim", 24, "headdim 24"),
        ("d_conv", 1, "d_conv=1 is not in 2"),
        ("d_conv", "4", "ssm_cfg: d_conv is '4', wanted a whole number"),
        ("rope_fraction", 0.5, "ssm_cfg has unknown keys .'rope_fraction'"),
        ("sliding_window", 128, "ssm_cfg has unknown keys .'sliding_window'"),
    ],
)
def test_what_our_layer_does_not_have_is_named(key, value, named):
    with pytest.raises(ValueError, match=named) as raised:
        convert.from_official(CONFIG | {"ssm_cfg": CONFIG["ssm_cfg"] | {key: value}})
    assert "\n" not in str(raised.value)


def test_attention_that_ours_does_not_have_is_named():
    """That of mamba2attn-2.7b has a convolution and rotates half of each head."""
    for key, value in {"d_conv": 4, "rotary_emb_dim": 64}.items():
        with pytest.raises(ValueError, match=f"attn_cfg.{key} is {value}; only 0 is supported"):
            convert.from_official(CONFIG | {"attn_cfg": CONFIG["attn_cfg"] | {key: value}})


def test_how_a_new_layer_begins_and_how_it_is_run_change_nothing():
    said = {"A_init_range": [1, 8], "conv_init": 0.1, "chunk_size": 64, "use_mem_eff_path": False}
    other = CONFIG | {"ssm_cfg": CONFIG["ssm_cfg"] | said}
    assert convert.from_official(other) == convert.from_official(CONFIG)


def test_both_kinds_of_layers_in_one_model_are_refused():
    with pytest.raises(ValueError, match="layers of Mamba3 and Mamba2 in one model have no official counterpart"):
        convert.to_official(ModelConfig(pattern="M2A"))


@pytest.mark.full
def test_the_command_converts_there_and_back(tmp_path):
    names = ["model.safetensors", "pytorch_model.bin"]
    source, run, back = (
        directory_of(tmp_path / "source", ml_dtypes.bfloat16, names),
        tmp_path / "run",
        tmp_path / "back",
    )
    for here, there in ((source, run), (run, back)):
        line = [sys.executable, "-m", "launch.convert", f"--source={here}", f"--target={there}"]
        subprocess.run(line, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)
    for name in names:
        assert (back / name).read_bytes() == (source / name).read_bytes()
    loaded = [mamba3_jax.load(path)[0].apply({"params": mamba3_jax.load(path)[1]}, TOKENS)[0] for path in (source, run)]
    np.testing.assert_array_equal(*loaded)


@pytest.mark.full
@pytest.mark.parametrize("implementation", ["recurrent", "associative", "chunked"])
def test_tokens_one_by_one_are_those_by_hand(implementation):
    config = dataclasses.replace(convert.from_official(CONFIG), implementation=implementation)
    model, params = LanguageModel(config), convert.to_params(official(), config)
    step = jax.jit(lambda tokens_BL, state: model.apply({"params": params}, tokens_BL, state))
    state, out = model.empty_state(1, TOKENS.shape[1]), []
    for place in range(TOKENS.shape[1]):
        logits_BLV, state = step(TOKENS[:, place : place + 1], state)
        out.append(logits_BLV)
    assert rel_rms(np.concatenate(out, axis=1), by_hand()) < FORWARD
