"""What is saved comes back bit for bit; what cannot be read is said in one line, and nothing is deleted."""

import copy
import json
import math
import shutil

import numpy as np
import pytest

from mamba3_jax.checkpoint import Checkpoints, all_steps, load_config, load_model, save_model, write_config
from mamba3_jax.config import LAYERS, from_dict, to_dict
from tests.train.tiny import get_config, random_params

STATE = {"step": np.array(3, np.int32), "moments": {"m": np.arange(3, dtype=np.float32)}}


def leaves(tree):
    import jax

    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def identical(got, want) -> bool:
    """Same structure, same bits."""
    pairs = zip(leaves(got), leaves(want), strict=True)
    return all(a == b and x.dtype == y.dtype and x.tobytes() == y.tobytes() for (a, x), (b, y) in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 1 (the best) and 3, 4 (the newest)."""
    workdir, config = tmp_path_factory.mktemp("saved"), get_config()
    with Checkpoints(workdir, config) as checkpoints:
        for step, loss in enumerate([0.5, 0.25, math.nan, 0.3, math.inf]):
            checkpoints.save(step, random_params(config, step), STATE, {"position": step}, loss)
    return workdir


def listing(workdir):
    return sorted((str(path), path.stat().st_size) for path in workdir.rglob("*"))


@pytest.mark.full
def test_newest_and_best_are_kept(saved):
    assert all_steps(saved) == [1, 3, 4]
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["1", "3", "4"]
    with Checkpoints(saved, get_config()) as checkpoints:
        assert checkpoints.best_loss() == 0.25
        assert checkpoints.latest() == 4


def test_best_is_not_kept_unless_asked(tmp_path):
    config = get_config()
    config.train.keep, config.train.keep_best = 1, False
    with Checkpoints(tmp_path, config) as checkpoints:
        for step, loss in enumerate([0.1, 0.2, 0.3]):
            checkpoints.save(step, random_params(config), STATE, {}, loss)
    assert all_steps(tmp_path) == [2]


def test_what_is_saved_comes_back(saved):
    config = get_config()
    for step, newest in ((1, False), (4, True)):
        got_config, params = load_model(saved, None if newest else step)
        assert got_config == config == load_config(saved, step)
        assert identical(params, random_params(config, step))
        assert not identical(params, random_params(config, step + 1))
    with Checkpoints(saved, config) as checkpoints:
        params, state, data = checkpoints.restore(3, random_params(config), STATE)
    assert identical((params, state), (random_params(config, 3), STATE))
    assert data == {"position": 3}


def test_parameters_alone(tmp_path):
    config, params = get_config(), random_params(get_config())
    save_model(tmp_path, config, params)
    assert identical(load_model(tmp_path)[1], params)
    with Checkpoints(tmp_path, config) as checkpoints:
        got, state, data = checkpoints.restore(0, params, STATE)
    assert identical(got, params)
    assert state is data is None
    with pytest.raises(ValueError, match="already holds checkpoints of steps 0"):
        save_model(tmp_path, config, params, step=7)


def test_what_is_not_there_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"workdir .*/absent does not exist"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 in .*; it has 1, 3, 4"):
        load_config(saved, 2)
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .*checkpoints$"):
        load_model(tmp_path)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"unfinished: 5.orbax-checkpoint-tmp"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="is a URL"):
        load_model("gs://bucket/run")


def test_what_a_kill_leaves_behind_is_ignored_and_removed(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    unfinished, trash = (workdir / "checkpoints" / name for name in ("9.orbax-checkpoint-tmp", "deleted"))
    shutil.copytree(workdir / "checkpoints" / "4", unfinished)
    shutil.copytree(workdir / "checkpoints" / "3", trash / "0")
    assert all_steps(workdir) == [1, 3, 4]
    assert identical(load_model(workdir)[1], random_params(get_config(), 4))
    with Checkpoints(workdir, get_config()) as checkpoints:
        assert checkpoints.latest() == 4
    assert not unfinished.exists()
    assert not trash.exists()
    assert all_steps(workdir) == [1, 3, 4]


@pytest.mark.parametrize("name", ["params", "state"])
def test_what_is_not_finite_is_not_saved(saved, tmp_path, name):
    workdir, config = shutil.copytree(saved, tmp_path / "run"), get_config()
    items = {"params": random_params(config), "state": copy.deepcopy(STATE)}
    bad = items["params"]["norm"]["scale"] if name == "params" else items["state"]["moments"]["m"]
    bad[1] = np.inf
    with Checkpoints(workdir, config) as checkpoints:
        before = listing(workdir)
        with pytest.raises(
            ValueError, match=rf"^checkpoint of step 5 is not saved in {workdir}/.*: 1 of .*: {name}/\w+/"
        ):
            checkpoints.save(5, *items.values(), {})
    assert listing(workdir) == before
    with pytest.raises(ValueError, match=r"^checkpoint of step 0 is not saved .*: params/norm/scale$"):
        save_model(tmp_path / "new", config, {"norm": {"scale": np.array([1, np.nan])}})
    assert all_steps(tmp_path / "new") == []


def test_every_file_of_a_checkpoint_that_says_it_is_json_is(saved):
    unlike = lambda name: pytest.fail(f"JSON has no {name}")  # noqa: E731
    for path in (saved / "checkpoints").glob("*/*/met*"):
        json.loads(path.read_text(), parse_constant=unlike)
    assert json.loads((saved / "checkpoints/1/metrics/metrics").read_text()) == {"valid_loss": 0.25}


def test_a_config_that_json_cannot_say_leaves_the_one_before(tmp_path):
    config = get_config()
    write_config(tmp_path, config)
    before = listing(tmp_path)
    config.optimizer.learning_rate = math.inf
    with pytest.raises(ValueError, match="JSON"):
        write_config(tmp_path, config)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("pattern", ["params/d/*", "params/_METADATA", "params/manifest.ocdbt", "config/metadata", "*"])
def test_a_damaged_checkpoint_is_named_and_left_alone(saved, tmp_path, pattern):
    workdir = shutil.copytree(saved, tmp_path / "run")
    for path in (workdir / "checkpoints" / "4").glob(pattern):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = listing(workdir)
    with pytest.raises(ValueError, match=r"^checkpoint of step 4 cannot be read: .*/checkpoints/4: ") as error:
        load_model(workdir)
    assert "\n" not in str(error.value)
    assert listing(workdir) == before
    assert identical(load_model(workdir, 3)[1], random_params(get_config(), 3))


def test_config_survives_json():
    config = get_config()
    config.data.task_lengths = (3, 5, 8)
    values = json.loads(json.dumps(to_dict(config)))
    assert from_dict(values) == config
    assert from_dict({"model": {"d_model": 32}}).model.d_model == 32
    values["data"]["parity_lengths"] = values["data"].pop("task_lengths")  # what it was called
    assert from_dict(values) == config
    values["model"]["scan_layers"] = True  # as was this, and with other values
    del values["model"]["unroll"]
    assert from_dict(values) == config
    values["model"]["scan_layers"] = False
    assert from_dict(values).model.unroll == LAYERS
    values["model"]["d_stat"] = 3
    with pytest.raises(ValueError, match=r"config.model has no field d_stat; it has vocab_size, "):
        from_dict(values)
