"""`load`: workdirs and official directories give the same model; what cannot be loaded says why."""

import shutil

import jax
import numpy as np
import pytest

import mamba3_jax
from mamba3_jax import checkpoint
from mamba3_jax.config import Config
from mamba3_jax.convert import files
from mamba3_jax.convert.names import flatten
from mamba3_jax.load import load_run
from tests.helpers import GOLDEN

OFFICIAL = GOLDEN / "lm_hybrid_attn"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The hybrid as a checkpoint of step 7, in bfloat16 as another program might have saved it."""
    model, params = mamba3_jax.load(OFFICIAL)
    path = tmp_path_factory.mktemp("runs") / "hybrid"
    checkpoint.save_model(
        path, Config(model=model.config), jax.tree.map(lambda x: x.astype("bfloat16"), params), step=7
    )
    return path


@pytest.mark.full
def test_a_workdir_is_loaded_as_float32(workdir):
    model, params = mamba3_jax.load(workdir)
    official, want = mamba3_jax.load(str(OFFICIAL))
    assert model.config == official.config
    for path, array in flatten(params).items():
        assert isinstance(array, jax.Array)
        assert array.dtype == np.float32
        assert np.array_equal(array, flatten(want)[path].astype("bfloat16")), path
    assert mamba3_jax.load(workdir, step=7)[0].config == model.config


def test_how_it_runs_can_be_chosen(workdir):
    model, _ = mamba3_jax.load(workdir, compute_dtype="bfloat16", implementation="recurrent")
    assert (model.config.compute_dtype, model.config.implementation) == ("bfloat16", "recurrent")
    for how, named in [({"d_state": 8}, "d_state"), ({"compute_dtype": "int8"}, "int8")]:
        with pytest.raises(ValueError, match=named):
            mamba3_jax.load(workdir, **how)


def test_what_is_not_there_says_what_is(workdir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        mamba3_jax.load(tmp_path / "none")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"Looked for checkpoints/ .*model\.safetensors.*notes\.txt"):
        mamba3_jax.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"step 8 .*it has 7"):
        mamba3_jax.load(workdir, step=8)
    with pytest.raises(ValueError, match="no steps"):
        mamba3_jax.load(OFFICIAL, step=1)
    for step, wanted in (("7", "step='7' is str, wanted a whole number"), (-1, "step=-1 is less than 0")):
        with pytest.raises(ValueError, match=wanted):
            mamba3_jax.load(workdir, step=step)
    with pytest.raises(ValueError, match="path is NoneType, wanted a directory"):
        mamba3_jax.load(None)


def test_of_a_sweeps_variant_the_best_member_is_named(tmp_path):
    """Its own checkpoint has all members along the first axis, which would be tensors that do not fit."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "members").mkdir()
    with pytest.raises(ValueError, match=rf"has all members of .* its best one is {tmp_path}/best"):
        load_run(tmp_path)


@pytest.mark.full
def test_parameters_that_do_not_fit_the_config_are_listed(workdir, tmp_path):
    config, params = load_run(workdir)
    params["norm"] = {"scales": params["norm"]["scale"]}
    params["embedding"]["embedding"] = params["embedding"]["embedding"][:5]
    checkpoint.save_model(tmp_path, config, params)
    with pytest.raises(ValueError, match="3 tensors do not fit") as raised:
        mamba3_jax.load(tmp_path)
    for part in ("missing norm/scale (64,)", "extra norm/scales (64,)", "embedding is (5, 64), wanted (96, 64)"):
        assert part in str(raised.value)


def test_an_official_directory_brings_its_tokenizer(tmp_path):
    assert load_run(OFFICIAL)[0].data.tokenizer == ""
    shutil.copytree(OFFICIAL, tmp_path / "with")
    (tmp_path / "with/tokenizer.json").write_text("{}")
    assert load_run(tmp_path / "with")[0].data.tokenizer == str(tmp_path / "with/tokenizer.json")


@pytest.mark.full
def test_what_is_not_finite_is_named(workdir, tmp_path, monkeypatch):
    config, params = load_run(workdir)
    params["norm"]["scale"] = params["norm"]["scale"].at[5].set(np.nan)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "check_finite", lambda *_: None)  # as a program without checks would have saved it
        checkpoint.save_model(tmp_path / "run", config, params, step=7)
    with pytest.raises(ValueError, match=r"/run/checkpoints/7: 1 of \d+ tensors hold NaN or infinity: norm/scale$"):
        mamba3_jax.load(tmp_path / "run")
    (tmp_path / "official").mkdir()
    shutil.copy(OFFICIAL / "config.json", tmp_path / "official")
    tensors = files.read_safetensors(OFFICIAL / "model.safetensors")
    tensors["backbone.norm_f.weight"] = np.full_like(tensors["backbone.norm_f.weight"], np.inf)
    files.write_safetensors(tmp_path / "official/model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors: 1 of \d+ tensors .*: backbone\.norm_f\.weight$"):
        mamba3_jax.load(tmp_path / "official")
