"""Official tensors as training loops save them: wrappers, prefixes, buffers, a tied head left out."""

import collections
import datetime
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest

from mamba3_jax import convert
from mamba3_jax.convert import files, torch_zip
from mamba3_jax.convert.names import flatten
from tests.convert.torch_save import Call, Parameter, save
from tests.helpers import GOLDEN

SOURCE = GOLDEN / "lm_siso_mlp"
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def recorded() -> dict[str, np.ndarray]:
    """The tensors of a recorded model; its head is its embedding."""
    with np.load(SOURCE / "state_dict.npz") as arrays:
        tensors = dict(arrays)
    return tensors | {HEAD: tensors[EMBEDDING]}


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.fixture
def directory(tmp_path):
    """A directory with a config.json and nothing else."""
    path = tmp_path / "official"
    path.mkdir()
    shutil.copy(SOURCE / "config.json", path)
    return path


def put(directory, held, file="pytorch_model.bin") -> None:
    """Writes the file: tensors as safetensors, or whatever torch.save takes."""
    (files.write_safetensors if file.endswith("safetensors") else save)(directory / file, held)


def same(params) -> bool:
    """Whether parameters are the recorded model's, bit for bit."""
    got, want = flatten(params), flatten(convert.read(SOURCE)[1])
    return list(got) == list(want) and all(np.array_equal(got[path], want[path]) for path in want)


def read(directory) -> str:
    """What reading says that it peeled; the parameters are the recorded ones."""
    _, params, origin = convert.read(directory)
    assert same(params)
    return "; ".join(origin.peeled)


@pytest.mark.parametrize("name", ["lm_siso_mlp", "lm_mimo_nomlp", "lm_hybrid_attn"])
def test_nothing_is_peeled_from_plain_files(name):
    assert convert.read(GOLDEN / name)[2].peeled == []


@pytest.mark.parametrize("file", files.FORMATS)
@pytest.mark.parametrize("absent", [EMBEDDING, HEAD])
def test_a_tied_head_or_embedding_may_be_left_out(directory, file, absent):
    tensors = recorded()
    there = ({EMBEDDING, HEAD} - {absent}).pop()
    del tensors[absent]
    put(directory, tensors, file)
    assert read(directory) == f"took {absent}, which is not in the file, from {there}, to which it is tied"


def test_a_head_that_is_not_tied_must_be_there(directory):
    tensors = recorded()
    del tensors[HEAD]
    put(directory, tensors)
    config = json.loads((SOURCE / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_embeddings": False}))
    with pytest.raises(ValueError, match=r"1 tensors do not fit the config: missing lm_head\.weight"):
        convert.read(directory)


LIGHTNING = {
    "epoch": 3,
    "global_step": 1000,
    "pytorch-lightning_version": "2.5.0",
    "loops": {"fit_loop": {"state_dict": {}, "seen": [1, 2.5, None, True]}},
    "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": np.ones((), np.float32)}},
    "optimizer_states": [{"state": collections.defaultdict(dict, {0: {"exp_avg": np.ones(3, np.float32)}})}],
    "lr_schedulers": [],
    "hparams_name": "kwargs",
    "hyper_parameters": Call("lightning.fabric.utilities.data", "AttributeDict", state={"lr": 1e-3}),
    "args": Call("argparse", "Namespace", state={"out": Call("pathlib", "PosixPath", "runs", "x")}),
    "metric": Call("numpy.core.multiarray", "scalar", Call("numpy", "dtype", "f8"), b"12345678"),
    "device": Call("torch", "device", "cuda", 0),
    "shape": Call("torch", "Size", (1, 2)),
    "plain": [{1, 2}, frozenset({3}), b"", b"x", bytearray(b"y"), 1j, range(3), slice(2), np.float64(2.5), -(10**30)],
    "counts": [collections.Counter("aab"), collections.deque([1.5], maxlen=3), collections.deque()],
    "when": datetime.datetime(2026, 1, 1),
}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda held: {"model": held}, "took the tensors out of 'model'"),
        (lambda held: {"state_dict": held, "epoch": 1}, "out of 'state_dict', without 'epoch' beside it"),
        (lambda held: {"module": held, "optimizer": {"m": held}}, "without 'optimizer' beside it"),
        (lambda held: {"model": {"state_dict": held}}, "out of 'model'; took the tensors out of 'state_dict'"),
        (lambda held: LIGHTNING | {"state_dict": prefixed("model.", held)}, "dropped model. from 27 names"),
        (lambda held: prefixed("module.", held), "dropped module. from 27 names"),
        (lambda held: prefixed("_orig_mod.", held), "dropped _orig_mod. from 27 names"),
        (lambda held: prefixed("module._orig_mod.model.", held), "dropped module. and _orig_mod. and model. from 27"),
        (
            lambda held: {k.replace("mixer.", "_orig_mod.mixer."): v for k, v in held.items()},
            "_orig_mod. from 16 names",
        ),
        (lambda held: {"n_averaged": np.ones((), int)} | prefixed("module.", held), "ignored 1 buffers (n_averaged)"),
        (lambda held: {k: Parameter(v) for k, v in held.items()}, ""),
    ],
)
def test_what_stands_around_the_tensors_is_peeled_and_said(directory, wrap, said):
    put(directory, wrap(collections.OrderedDict(recorded())))
    assert said in read(directory)


def buffers() -> dict[str, np.ndarray]:
    return {
        "backbone.layers.0.mixer.rotary_emb.inv_freq": np.ones(4, np.float64),
        "module.backbone.norm_f.num_batches_tracked": np.ones((), np.int64),
        "position_ids": np.ones((1, 3), np.int32),
        "cos_cached": np.ones(2, np.float16),
        "total_ops": np.ones(2, bool),
    }


@pytest.mark.parametrize("file", files.FORMATS)
def test_known_buffers_are_ignored_and_said(directory, file):
    put(directory, recorded() | buffers(), file)
    said = read(directory)
    assert said.startswith("ignored 5 buffers (")
    assert all(name in said for name in buffers())


@pytest.mark.parametrize("file", files.FORMATS)
@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8", "uint8", "bool", "float64"])
def test_other_buffers_and_weights_of_other_dtypes_are_named(directory, file, dtype):
    put(directory, recorded() | {"backbone.mask": np.ones(3, dtype)}, file)
    with pytest.raises(ValueError, match=rf"1 tensors are not one of .*: backbone\.mask {dtype}"):
        convert.read(directory)
    name = "backbone.layers.0.mixer.D"
    put(directory, recorded() | {name: recorded()[name].astype(dtype)}, file)
    with pytest.raises(ValueError, match=rf"not one of \['float32', .*: {name} {dtype}"):
        convert.read(directory)


def test_a_dtype_that_numpy_has_not_is_named(directory):
    tensors = recorded() | {HEAD: recorded()[HEAD].astype(ml_dtypes.float8_e4m3fn)}
    put(directory, tensors, "model.safetensors")
    with pytest.raises(ValueError, match=r"dtype that is not read: lm_head\.weight F8_E4M3"):
        convert.read(directory)


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (lambda held: prefixed("net.gpt.", held), "all 27 extra names are right but for the prefix 'net.gpt.'"),
        (
            lambda held: {k.removeprefix("backbone."): v for k, v in held.items() if k != HEAD},
            "all 26 extra names are right but for a lacking prefix 'backbone.'",
        ),
        (lambda held: held | prefixed("ema.", held), "right but for the prefix 'ema.'"),
        (lambda held: held | prefixed("model.", held), f"{EMBEDDING} and model.{EMBEDDING} are both {EMBEDDING}"),
        (lambda held: {"model": held, "ema": held}, "tensors of unknown use stand beside 'model': 'ema'"),
        (lambda held: {"model": held, "state_dict": held}, r"which of ['state_dict', 'model'] is the model?"),
        (lambda held: {"weights": held}, "1 are not tensors: 'weights'"),
        (lambda held: {"model": {}, "epoch": 3}, "2 are not tensors: 'model', 'epoch'"),
        (lambda held: {"model": {0: held[HEAD]}}, "these names are not strings: 0"),
        (lambda held: {"model": held | {"x": "text"}}, "1 are not tensors: 'x'"),
        (
            lambda held: held | {"head.scale": np.ones(3, np.float32)},
            "1 tensors do not fit the config: extra head.scale",
        ),
        (
            lambda held: Call("mamba_ssm.models.mixer_seq_simple", "MambaLMHeadModel", held),
            "a mamba_ssm.models.mixer_seq_",
        ),
        (lambda held: {"model": held, "config": Call("my.project", "Config")}, "a my.project.Config, and only tensors"),
        (lambda held: {f"{place}": held[HEAD] for place in range(1000)}, "1027 tensors do not fit the config: missing"),
    ],
)
def test_what_is_not_known_is_named_in_a_short_line(directory, wrap, named):
    put(directory, wrap(recorded()))
    with pytest.raises(ValueError, match=re.escape(named)) as raised:
        convert.read(directory)
    assert "pytorch_model.bin" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1200


def test_errors_list_ten_tensors_and_count_the_rest(directory):
    put(directory, {name: tensor[..., :1] for name, tensor in recorded().items()})
    with pytest.raises(ValueError, match=r"27 tensors do not fit .* and 17 more$") as raised:
        convert.read(directory)
    assert str(raised.value).count(", wanted (") == 10


def test_a_dict_that_holds_itself_ends(directory):
    held = {"epoch": 1}
    held["model"] = held
    held["state_dict"] = {"module": held}
    put(directory, held)
    with pytest.raises(ValueError, match="not tensors"):
        convert.read(directory)


def test_peeled_files_are_written_back_plain(directory, tmp_path):
    dtypes = {name: "float32" if name.endswith("dt_bias") else ml_dtypes.bfloat16 for name in recorded()}
    tensors = {name: array.astype(dtypes[name]) for name, array in recorded().items() if name != HEAD}
    put(directory, {"state_dict": prefixed("model.", tensors | buffers())})
    model, params, origin = convert.read(directory)
    origin.save(tmp_path)
    assert files.Origin.load(tmp_path) == origin
    assert len(origin.peeled) == 4
    convert.write(tmp_path, model, params, files.Origin.load(tmp_path))
    back = torch_zip.read(tmp_path / "pytorch_model.bin")
    assert list(back) == list(recorded())
    for name, array in back.items():
        assert array.dtype == dtypes[name]
        assert np.array_equal(array, tensors[EMBEDDING if name == HEAD else name])
    assert convert.read(tmp_path)[2].peeled == []
