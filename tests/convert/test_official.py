"""Recorded official models: logits, loss, gradients and decoding from each file format, and bits that come back."""

import dataclasses
import functools
import json
import shutil

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mamba3_jax import convert
from mamba3_jax.config import ModelConfig
from mamba3_jax.convert import files, torch_zip
from mamba3_jax.convert.names import flatten, our_shapes
from mamba3_jax.model import LanguageModel, boxed_shapes
from tests.helpers import GOLDEN, golden, rel_rms

NAMES = ["lm_siso_mlp", "lm_mimo_nomlp", "lm_hybrid_attn"]
FORWARD, GRADIENT = 1e-5, 2e-4  # float32 against float64, as the manifest sets them


def npz(path):
    with np.load(path) as arrays:
        return dict(arrays)


READERS = {"state_dict.npz": npz, "model.safetensors": files.read_safetensors, "pytorch_model.bin": torch_zip.read}


@functools.cache
def read(name):
    return convert.read(GOLDEN / name)


@functools.cache
def forward(name):
    """A compiled (params, tokens) -> logits."""
    model = LanguageModel(read(name)[0])
    return jax.jit(lambda params, tokens_BL: model.apply({"params": params}, tokens_BL)[0])


def bits(tensors):
    return {name: (array.shape, str(array.dtype), array.tobytes()) for name, array in tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_format_has_the_same_parameters(name):
    model, params, _ = read(name)
    for file, reader in READERS.items():
        tensors = reader(GOLDEN / name / file)
        got = flatten(convert.to_params(tensors, model))
        assert all(np.array_equal(array, flatten(params)[path]) for path, array in got.items()), file
        assert bits(convert.to_state_dict(params, model)) == bits(tensors)
    wanted = flatten(flax.linen.meta.unbox(boxed_shapes(model)))
    assert {path: leaf.shape for path, leaf in wanted.items()} == our_shapes(model)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    _, io = golden(f"{name}_io")
    logits_BLV = forward(name)(read(name)[1], io["in.tokens"])
    assert rel_rms(logits_BLV, io["out.logits"]) < FORWARD


@pytest.mark.parametrize("name", NAMES)
def test_logits_notice_a_thousandth_in_any_tensor(name):
    model, params, _ = read(name)
    tensors, (_, io) = convert.to_state_dict(params, model), golden(f"{name}_io")
    noise = np.random.default_rng(0)
    for key, tensor in tensors.items():
        if key == "lm_head.weight":
            continue  # tied: it is the embedding
        wrong = tensors | {key: tensor * (1 + 1e-3 * noise.standard_normal(tensor.shape).astype(np.float32))}
        wrong["lm_head.weight"] = wrong["backbone.embedding.weight"]
        logits_BLV = forward(name)(convert.to_params(wrong, model), io["in.tokens"])
        assert rel_rms(logits_BLV, io["out.logits"]) > FORWARD, key


@pytest.mark.full
def test_loss_and_every_gradient():
    name = "lm_siso_mlp"
    (config, params, _), (case, io) = read(name), golden(f"{name}_io")
    assert case["grads"]

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens_BL, targets_BL):
        logits_BLV, _ = LanguageModel(config).apply({"params": params}, tokens_BL)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), targets_BL[..., None], axis=-1))

    value, grads = loss(params, io["in.tokens"], io["in.targets"])
    assert rel_rms(value, io["out.loss"][0]) < FORWARD
    grads = convert.to_state_dict(grads, config)
    recorded = {key.removeprefix("grad."): array for key, array in io.items() if key.startswith("grad.")}
    assert set(recorded) == set(grads) - {"lm_head.weight"}
    for key, want in recorded.items():
        assert rel_rms(grads[key], want) < GRADIENT, key
        assert rel_rms(grads[key] * 1.001, want) > GRADIENT, key


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_four_decode_steps(name):
    (config, params, _), (_, io) = read(name), golden(f"{name}_io")
    model, (batch, length) = LanguageModel(config), io["in.tokens"].shape
    step = jax.jit(lambda tokens_BL, state: model.apply({"params": params}, tokens_BL, state))
    _, state = step(io["in.tokens"][:, : length - 4], model.empty_state(batch, length + 1))
    for place in range(length - 4, length):
        logits_BLV, state = step(io["in.tokens"][:, place : place + 1], state)
        assert rel_rms(logits_BLV[:, 0], io["out.logits"][:, place]) < FORWARD
    stale = jax.tree.map(lambda x: x * 1.001 if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    (right, _), (wrong, _) = (step(io["in.tokens"][:, -1:], each) for each in (state, stale))
    assert rel_rms(wrong, right) > FORWARD


# Sizes that the recorded models do not have.
OTHERS = {
    "untied": ModelConfig(
        vocab_size=93, d_model=32, pattern="M", d_state=8, head_dim=16, tie_embeddings=False, d_ff=128
    ),
    "layer norm, groups, out norm, rank 1": ModelConfig(
        vocab_size=10,
        d_model=32,
        pattern="MAMM",
        d_state=8,
        head_dim=16,
        norm="layer",
        n_groups=2,
        out_norm=True,
        mimo_rank=1,
        attn_head_dim=8,
        d_ff=128,
    ),
}


@functools.cache
def random_params(name):
    rng = np.random.default_rng(1)
    flat = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in our_shapes(OTHERS[name]).items()}
    return convert.names.unflatten(flat)


@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_come_back(name):
    model, params = OTHERS[name], random_params(name)
    tensors = convert.to_state_dict(params, model)
    back = flatten(convert.to_params(tensors, model))
    assert bits(back) == bits(flatten(params))
    wanted = flatten(flax.linen.meta.unbox(boxed_shapes(model)))
    assert {path: leaf.shape for path, leaf in wanted.items()} == our_shapes(model)


def test_names_of_other_sizes():
    first = set(convert.to_state_dict(random_params("untied"), OTHERS["untied"]))
    assert {"backbone.layers.0.norm2.weight", "backbone.norm_f.weight", "lm_head.weight"} <= first
    second = convert.to_state_dict(random_params("layer norm, groups, out norm, rank 1"), list(OTHERS.values())[1])
    shapes = {name.removeprefix("backbone.layers."): array.shape for name, array in second.items()}
    assert shapes["0.norm.bias"] == shapes["3.norm2.bias"] == shapes["backbone.norm_f.bias"] == (32,)
    assert shapes["2.mixer.norm.weight"] == (64,)
    assert shapes["2.mixer.mimo_z"] == (4, 1, 16)
    assert shapes["2.mixer.in_proj.weight"] == (2 * 64 + 2 * 8 * 2 * 1 + 3 * 4 + 2, 32)
    assert shapes["1.mixer.in_proj.weight"] == (96, 32)
    assert "1.mixer.in_proj.bias" not in shapes


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """The hybrid as an official directory in bfloat16, some tensors in float32, in both file formats."""
    directory = tmp_path_factory.mktemp("official") / "bf16"
    shutil.copytree(GOLDEN / "lm_hybrid_attn", directory)
    (directory / "state_dict.npz").unlink()
    tensors, done = torch_zip.read(directory / "pytorch_model.bin"), {}
    for name, array in tensors.items():
        exact = name.endswith(("dt_bias", "B_bias", "C_bias"))
        done[name] = array.copy() if exact else array.astype(ml_dtypes.bfloat16)
    done["lm_head.weight"] = done["backbone.embedding.weight"]
    torch_zip.write(directory / "pytorch_model.bin", done)
    files.write_safetensors(directory / "model.safetensors", done)
    return directory


def test_bfloat16_comes_back_bit_for_bit(bf16, tmp_path):
    model, params, origin = convert.read(bf16)
    assert all(array.dtype == np.float32 for array in flatten(params).values())
    assert sorted(set(origin.dtypes.values())) == ["bfloat16", "float32"]
    origin.save(tmp_path)
    convert.write(tmp_path, model, params, files.Origin.load(tmp_path))
    for name, format in files.FORMATS.items():
        assert bits(format.read(tmp_path / name)) == bits(format.read(bf16 / name))
        assert (tmp_path / name).read_bytes() == (bf16 / name).read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((bf16 / "config.json").read_text())


def test_trained_values_are_not_rounded_in_silence(bf16, tmp_path):
    model, params, origin = convert.read(bf16)
    params["norm"]["scale"] = params["norm"]["scale"] * np.float32(1.001)
    with pytest.raises(ValueError, match=r"1 tensors no longer fit .*backbone.norm_f.weight was bfloat16"):
        convert.write(tmp_path, model, params, origin)
    assert not list(tmp_path.iterdir())
    convert.write(tmp_path, model, params, origin, dtype="bfloat16", files=["model.safetensors"])
    assert set(convert.read(tmp_path)[2].dtypes.values()) == {"bfloat16"}


def test_a_changed_model_gets_its_own_config(bf16, tmp_path):
    model, params, origin = convert.read(bf16)
    convert.write(tmp_path, dataclasses.replace(model, a_floor=0.5), params, origin)
    assert json.loads((tmp_path / "config.json").read_text())["ssm_cfg"]["A_floor"] == 0.5


def test_what_a_dtype_cannot_hold_is_not_written_as_infinity(tmp_path):
    model, params, _ = read("lm_siso_mlp")
    large = params | {"norm": {"scale": params["norm"]["scale"] + np.float32(1e5)}}
    with pytest.raises(ValueError, match=r"1 of \d+ tensors hold NaN or infinity: backbone\.norm_f\.weight$"):
        convert.write(tmp_path, model, large, dtype="float16")
    assert not list(tmp_path.iterdir())
    convert.write(tmp_path, model, large, dtype="bfloat16")


def test_unfit_tensors_are_listed_in_one_error():
    model, params, _ = read("lm_siso_mlp")
    tensors = convert.to_state_dict(params, model)
    del tensors["backbone.layers.1.mixer.D"], tensors["backbone.norm_f.weight"]
    tensors["backbone.layers.2.norm.weight"] = np.ones(64, np.float32)
    tensors["lm_head.weight"] = np.ones((93, 64), np.float32)
    with pytest.raises(ValueError, match="4 tensors do not fit") as raised:
        convert.to_params(tensors, model)
    for part in (
        "missing backbone.layers.1.mixer.D (4,)",
        "missing backbone.norm_f.weight (64,)",
        "extra backbone.layers.2.norm.weight (64,)",
        "lm_head.weight is (93, 64), wanted (96, 64)",
    ):
        assert part in str(raised.value)


def test_unfit_parameters_are_listed_in_one_error():
    model, params, _ = read("lm_siso_mlp")
    flat = flatten(params) | {"norm/bias": np.ones(64), "norm/scale": np.ones(3)}
    del flat["embedding/embedding"]
    with pytest.raises(ValueError, match=r"missing embedding/embedding \(96, 64\); extra norm/bias .*wanted \(64,\)"):
        convert.to_state_dict(convert.names.unflatten(flat), model)


def test_a_tied_head_must_be_the_embedding():
    model, params, _ = read("lm_siso_mlp")
    tensors = convert.to_state_dict(params, model)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * np.float32(1.001)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not backbone\.embedding\.weight"):
        convert.to_params(tensors, model)


def test_what_is_not_there_or_not_readable(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        convert.read(tmp_path / "none")
    (tmp_path / "weights.h5").touch()
    with pytest.raises(FileNotFoundError, match=r"weights\.h5"):
        convert.read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        convert.read(tmp_path)
    shutil.copy(GOLDEN / "lm_siso_mlp/config.json", tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        convert.read(tmp_path)
    files.write_safetensors(tmp_path / "model.safetensors", {"x": np.ones(3)})
    with pytest.raises(ValueError, match=r"not one of .*float64"):
        convert.read(tmp_path)
