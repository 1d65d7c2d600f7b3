"""What must fit is added up before anything is allocated: of training by shards, of decoding with the caches."""

import dataclasses
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh, AxisType

from mamba3_jax import checkpoint, memory
from mamba3_jax.config import Config
from mamba3_jax.generate import Sampling
from mamba3_jax.load import load_run
from mamba3_jax.presets import parameter_count
from mamba3_jax.prompts import check
from mamba3_jax.train.loop import Trainer
from mamba3_jax.train.step import batch_shapes, state_shapes
from tests.inference.tiny import tiny
from tests.train.tiny import get_config


@pytest.fixture
def small(monkeypatch):
    """A machine with 10 kB left."""
    monkeypatch.setattr(memory, "free_on_host", lambda: 10_000)


def parts(config: Config, **axes: int) -> dict[str, int]:
    """The sum for a mesh of these axes, whatever devices there are."""
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))
    return memory.training(config, state_shapes(config, mesh), batch_shapes(config.data, mesh))


def test_training_is_counted_to_the_byte():
    config = get_config()
    config.model.tie_embeddings, config.model.d_ff = False, 24
    got = parts(config, data=1)
    count = parameter_count(config.model)
    tokens = config.data.batch * config.data.length
    assert got == {
        "parameters": 4 * count,
        "gradients": 4 * count,
        "optimizer state": 8 * count + 8,  # two moments, two counts
        "batch": 13 * tokens,
        "logits": 4 * tokens * 8,
        "inputs of the layers": 4 * tokens * 16,
    }


def test_a_device_holds_its_shards():
    config = get_config()
    whole, split = parts(config, data=1), parts(config, data=2, tensor=2)
    assert {name: whole[name] // split[name] for name in ("batch", "inputs of the layers")} == {
        "batch": 2,
        "inputs of the layers": 2,
    }
    assert whole["logits"] == 4 * split["logits"]
    assert whole["parameters"] / 2 < split["parameters"] < whole["parameters"]  # what heads share is whole
    config.optimizer.accumulate = 2
    assert parts(config, data=2, tensor=2)["logits"] == split["logits"] // 2


@pytest.mark.parametrize(
    ("section", "changes", "largest"),
    [
        ("model", {"d_model": 2**16, "head_dim": 64}, "optimizer state"),
        ("model", {"vocab_size": 2**24, "d_model": 2**14}, "optimizer state"),
        ("model", {"d_ff": 2**20, "d_model": 2**14}, "optimizer state"),
        ("data", {"length": 2**27, "batch": 2**10}, "inputs of the layers"),
        ("data", {"batch": 2**20, "length": 2**20}, "inputs of the layers"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(tmp_path, section, changes, largest):
    config = get_config()
    setattr(config, section, dataclasses.replace(getattr(config, section), **changes))
    with pytest.raises(ValueError, match=r"^not enough memory: .* needed on .* free: parameters ") as raised:
        Trainer(config, tmp_path / "run")
    assert "\n" not in str(raised.value)
    sizes = memory.training(config, *shapes(config))
    assert max(sizes, key=sizes.get) == largest
    assert not (tmp_path / "run").exists()


def shapes(config: Config):
    """State and batch on one device."""
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,))
    return state_shapes(config, mesh), batch_shapes(config.data, mesh)


def test_validation_batches_of_a_task_are_counted(tmp_path):
    config = get_config()
    config.train.eval_batches, config.data.valid_rows = 2**20, 2**31 - 1
    assert memory.validation(config, 1) == {"validation batches": 2**20 * 4 * 32 * 13}
    assert memory.validation(config, 4) == {"validation batches": 2**20 * 32 * 13}
    config.data.valid_rows = 6
    assert memory.validation(config, 1) == {"validation batches": 2 * 4 * 32 * 13}
    config.train.eval_every = 0
    assert not memory.validation(config, 1)["validation batches"]


@pytest.mark.full
def test_decoding_counts_the_caches(small):
    check(tiny("MA")[0], [[1]], 50, Sampling())
    with pytest.raises(ValueError, match=r"14\.7 kB needed on .* 10 kB free: state 14\.3 kB, ids 404 B, logits 64 B"):
        check(tiny("MA")[0], [[1]], 100, Sampling())
    check(tiny("M")[0], [[1]], 1000, Sampling())


def test_parameters_that_do_not_fit_are_not_read(tmp_path, monkeypatch):
    model, params = tiny("M")
    checkpoint.save_model(tmp_path, Config(model=model.config), params)
    monkeypatch.setattr(memory, "free_on_host", lambda: 1000)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"not enough memory: .* 1 kB free: parameters "):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 5\ninactive_file 50"}, [150]),
        ({"memory.max": "max", "memory.current": "900", "memory.stat": "inactive_file 50"}, []),
        ({"memory.max": "1000", "memory.current": "1900", "memory.stat": "anon 5"}, [0]),
        (
            {"memory.limit_in_bytes": "70", "memory.usage_in_bytes": "9", "memory.stat": "total_inactive_file 2"},
            [63],
        ),
        ({}, []),
    ],
)
def test_what_a_control_group_leaves(tmp_path, files, free):
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert memory.free_in(tmp_path) == free


def test_the_host_says_what_is_free(tmp_path, monkeypatch):
    free = memory.free_on_host()
    assert free is None or free > 10**6
    for folder in (tmp_path, tmp_path / "memory"):  # where versions 2 and 1 have it: the limit is that of a parent
        folder.mkdir(exist_ok=True)
        for name, text in {"memory.max": "5000", "memory.current": "1000", "memory.stat": "anon 5"}.items():
            (folder / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    if free is not None and Path("/proc/self/cgroup").read_text():
        assert memory.free_on_host() == 4000


def test_sizes_are_readable():
    sizes = (0, 999, 1234, 10**9, 123 * 10**15, 10**30)
    assert [memory.readable(n) for n in sizes] == ["0 B", "999 B", "1.23 kB", "1 GB", "123 PB", "1e+12 EB"]
