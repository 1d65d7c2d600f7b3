"""Sharded files, and files that are not what their names say."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

import mamba3_jax
from mamba3_jax import convert
from mamba3_jax.convert import files
from mamba3_jax.convert.names import flatten
from tests.convert.torch_save import save
from tests.helpers import GOLDEN

SOURCE = GOLDEN / "lm_siso_mlp"
WRITERS = {"model.safetensors": files.write_safetensors, "pytorch_model.bin": save}
D = "backbone.layers.0.mixer.D"


def recorded() -> dict[str, np.ndarray]:
    with np.load(SOURCE / "state_dict.npz") as arrays:
        return dict(arrays)


def shard_names(file: str, count: int) -> list[str]:
    stem, kind = file.split(".")
    return [f"{stem}-{number + 1:05}-of-{count:05}.{kind}" for number in range(count)]


def shard(directory, file, tensors, count=3) -> dict[str, str]:
    """Writes an official directory with its tensors dealt out over shards; returns the index's map."""
    directory.mkdir(exist_ok=True)
    shutil.copy(SOURCE / "config.json", directory)
    names, of = list(tensors), {}
    for number, name in enumerate(shard_names(file, count)):
        part = names[number::count]
        of |= dict.fromkeys(part, name)
        WRITERS[file](directory / name, {name: tensors[name] for name in part})
    write_index(directory, file, of)
    return of


def write_index(directory, file, weight_map) -> None:
    held = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / f"{file}.index.json").write_text(json.dumps(held))


@pytest.mark.parametrize("file", files.FORMATS)
def test_shards_are_the_whole_file(file, tmp_path):
    tensors = recorded()
    del tensors["lm_head.weight"]
    exact = {name: array.astype(np.float32 if name == D else ml_dtypes.bfloat16) for name, array in tensors.items()}
    shard(tmp_path / "in", file, {f"model.{name}": array for name, array in exact.items()})
    assert convert.is_official(tmp_path / "in")
    model, params, origin = convert.read(tmp_path / "in")
    assert origin.peeled[:2] == [f"joined 3 shards of {file}", "dropped model. from 26 names"]
    assert origin.files == [file]

    convert.write(tmp_path, model, params, origin)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.json", "in", file])
    back = files.FORMATS[file].read(tmp_path / file)
    assert set(back) == set(exact) | {"lm_head.weight"}
    assert all(back[name].dtype == array.dtype and np.array_equal(back[name], array) for name, array in exact.items())
    want = flatten(convert.read(tmp_path)[1])
    assert all(
        np.array_equal(array, want[name]) for name, array in flatten(mamba3_jax.load(tmp_path / "in")[1]).items()
    )


def missing_shard(directory, file, of):
    (directory / shard_names(file, 3)[1]).unlink()
    return rf"names 3 shards, and 1 are not there: {shard_names(file, 3)[1]}"


def broken_link(directory, file, of):
    path = directory / shard_names(file, 3)[1]
    path.unlink()
    path.symlink_to("nowhere")
    return "1 are not there"


def twice(directory, file, of):
    one = shard_names(file, 3)[0]
    name = next(name for name in of if of[name] != one)
    held = {other: recorded()[other] for other in of if of[other] == one or other == name}
    WRITERS[file](directory / one, held)
    return rf"disagree in 1 tensors: {name} is in {one} and in {of[name]}"


def not_in_the_index(directory, file, of):
    name = next(iter(of))
    write_index(directory, file, {other: of[other] for other in of if other != name})
    return rf"{name} is in {of[name]}, but not in the index"


def in_no_shard(directory, file, of):
    write_index(directory, file, of | {"x.weight": of[D]})
    return rf"x\.weight is in no shard, the index says {of[D]}"


def wrong_shard(directory, file, of):
    other = next(one for one in shard_names(file, 3) if one != of[D])
    write_index(directory, file, of | {D: other})
    return rf"{D} is in {of[D]}, the index says {other}"


def all_wrong(directory, file, of):
    others = dict(zip(shard_names(file, 3), reversed(shard_names(file, 3)), strict=True))
    write_index(directory, file, {name: others[held] for name, held in of.items()} | dict.fromkeys("abc", of[D]))
    return r"disagree in 20 tensors: .* and 10 more$"


def no_index(directory, file, of):
    (directory / f"{file}.index.json").unlink()
    return rf"has shards \({shard_names(file, 3)[0]}, .*\), but not {file}\.index\.json"


def left_out(directory, file, of):
    shutil.copy(directory / shard_names(file, 3)[0], directory / shard_names(file, 4)[3])
    return rf"does not name 1 shards that are there: {shard_names(file, 4)[3]}"


def no_json(directory, file, of):
    (directory / f"{file}.index.json").write_text("{")
    return r"index\.json is not JSON"


def nested_json(directory, file, of):
    (directory / f"{file}.index.json").write_text("[" * 100_000)
    return r"index\.json is not JSON"


def no_map(directory, file, of):
    (directory / f"{file}.index.json").write_text('{"metadata": {}}')
    return "has no weight_map"


def map_of_numbers(directory, file, of):
    write_index(directory, file, of | {D: 3})
    return "has no weight_map, an object of tensor names and file names"


def a_pointer(directory, file, of):
    (directory / of[D]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    return rf"{of[D]} is a Git LFS pointer"


def outside(where):
    def damage(directory, file, of):
        shutil.copy(directory / of[D], directory.parent / "x")
        write_index(directory, file, of | {D: where.format(directory.parent)})
        return "names files that are not in its directory: '"

    return damage


DAMAGES = [missing_shard, broken_link, twice, not_in_the_index, in_no_shard, wrong_shard, all_wrong, no_index, left_out]
DAMAGES += [no_json, nested_json, no_map, map_of_numbers, a_pointer]
DAMAGES += [outside(where) for where in ("../x", "{}/x", "", ".", "..", "sub/../../x", "x\0")]


@pytest.mark.parametrize("file", files.FORMATS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_shards_that_do_not_fit_are_named(file, damage, tmp_path):
    tensors = {name: array for name, array in recorded().items() if name != "lm_head.weight"}
    of = shard(tmp_path / "in", file, tensors)
    named = damage(tmp_path / "in", file, of)
    assert convert.is_official(tmp_path / "in")
    with pytest.raises(ValueError, match=named) as raised:
        convert.read(tmp_path / "in")
    assert "\n" not in str(raised.value)


def test_a_whole_file_is_read_before_shards(tmp_path):
    shard(tmp_path, "model.safetensors", recorded())
    shutil.copy(SOURCE / "model.safetensors", tmp_path)
    said = ["did not read model.safetensors.index.json, since model.safetensors is there whole"]
    assert convert.read(tmp_path)[2].peeled == said


def empty(path):
    path.write_bytes(b"")
    return "is empty"


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n")
    return "is a Git LFS pointer"


def folder(path):
    path.mkdir()
    return "is a directory, wanted a file"


def link(path):
    path.symlink_to("../blobs/4d7a")
    return r"is a link to \.\./blobs/4d7a, which is not there"


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"]
)
@pytest.mark.parametrize("damage", [empty, pointer, folder, link])
def test_a_file_that_is_none_is_named_for_what_it_is(file, damage, tmp_path):
    shutil.copytree(SOURCE, tmp_path / "in")
    for name in ("state_dict.npz", "model.safetensors", *([] if file == "config.json" else ["pytorch_model.bin"])):
        (tmp_path / "in" / name).unlink()
    path = tmp_path / "in" / file
    path.unlink(missing_ok=True)
    named = damage(path)
    for load in (convert.read, mamba3_jax.load):
        with pytest.raises(ValueError, match=rf"{file} {named}"):
            load(tmp_path / "in")


def test_a_file_in_the_place_of_the_directory_is_named():
    for load in (convert.read, mamba3_jax.load):
        with pytest.raises(FileNotFoundError, match="there is a file, not a directory"):
            load(SOURCE / "model.safetensors")


def test_an_error_lists_ten_files_of_a_directory(tmp_path):
    for number in range(1000):
        (tmp_path / f"{number:03}.txt").touch()
    for load in (convert.read, mamba3_jax.load):
        with pytest.raises(FileNotFoundError, match=r"'009\.txt' and 990 more"):
            load(tmp_path)
