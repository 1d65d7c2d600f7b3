"""`pytorch_model.bin` without torch. strided.bin was written by torch 2.13.0; `STRIDED` says what it holds."""

import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mamba3_jax.convert import files, torch_zip
from tests.helpers import GOLDEN

FILE = Path(__file__).parent / "strided.bin"
BASE = np.arange(24, dtype=np.float32)
BRAIN = (np.arange(-5, 7, dtype=np.float32) / np.float32(3)).astype(ml_dtypes.bfloat16).reshape(3, 4)
STRIDED = {
    "whole": BASE.reshape(4, 6),
    "transposed": BASE.reshape(4, 6).T,
    "corner": BASE.reshape(4, 6)[1:3, 2:5],
    "every": BASE[1::5],
    "expanded": np.full((2, 3), 3, np.float32),
    "cube": BASE.reshape(2, 3, 4).transpose(2, 0, 1),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "half": (np.arange(6, dtype=np.float32) / np.float32(7)).astype(np.float16).reshape(2, 3),
    "brain": BRAIN,
    "brain_row": BRAIN[2],
}


def same(got, want) -> bool:
    """Equal names, shapes, dtypes and bits."""
    return list(got) == list(want) and all(
        got[name].shape == np.shape(want[name])
        and got[name].dtype == want[name].dtype
        and got[name].tobytes() == want[name].tobytes()
        for name in want
    )


def test_reads_views_and_dtypes_that_torch_wrote():
    got = torch_zip.read(FILE)
    assert same(got, STRIDED)
    assert not same(got, STRIDED | {"every": STRIDED["every"] * np.float32(1.001)})


def test_reads_and_writes_the_same_bits(tmp_path):
    torch_zip.write(tmp_path / "out.bin", torch_zip.read(FILE))
    assert same(torch_zip.read(tmp_path / "out.bin"), STRIDED)


def test_shared_arrays_share_a_storage(tmp_path):
    array = np.ones((100, 10), np.float32)
    torch_zip.write(tmp_path / "tied.bin", {"a": array, "b": array})
    torch_zip.write(tmp_path / "two.bin", {"a": array, "b": array.copy()})
    sizes = [(tmp_path / name).stat().st_size for name in ("tied.bin", "two.bin")]
    assert sizes[1] - sizes[0] > array.nbytes
    assert same(torch_zip.read(tmp_path / "tied.bin"), {"a": array, "b": array})


def test_equal_tensors_make_equal_files(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        torch_zip.write(tmp_path / folder / "x.bin", STRIDED | {"scalar": np.asarray(STRIDED["scalar"])})
    assert (tmp_path / "one/x.bin").read_bytes() == (tmp_path / "two/x.bin").read_bytes()


class Evil:
    """Would run a command if unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def rewritten(path: Path, out: Path, **replaced: bytes) -> Path:
    """A copy of a zip whose records of these last names hold something else."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, replaced.get(name.split("/")[-1].replace(".", "_"), source.read(name)))
    return out


@pytest.mark.parametrize(
    ("pickled", "named"),
    [
        (pickle.dumps(Evil(os.mkdir, "owned"), 2), "mkdir"),
        (pickle.dumps(Evil(eval, "1"), 4), "eval"),
        (b"\x80\x02ctorch\nQInt8Storage\n.", "torch.QInt8Storage"),
        (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "torch._utils._rebuild_sparse_tensor"),
        (b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr"),
        (pickle.dumps({"args": Evil(os.mkdir, "owned"), "x": [1]}, 2), "mkdir"),
        (pickle.dumps({"step": 3, "x": [1]}, 2), "step"),
        (pickle.dumps([1, 2], 2), "dict of tensors"),
        (b"not a pickle", "not a PyTorch state dict"),
    ],
)
def test_anything_but_tensors_is_refused_by_name(tmp_path, monkeypatch, pickled, named):
    monkeypatch.chdir(tmp_path)
    bad = rewritten(FILE, tmp_path / "bad.bin", data_pkl=pickled)
    with pytest.raises(ValueError, match=named) as raised:
        torch_zip.read(bad)
    assert "bad.bin" in str(raised.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "named",
    [
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"cnumpy\ndtype\n",
    ],
)
@pytest.mark.parametrize("state", [b"}X\x05\x00\x00\x00dtypeX\x02\x00\x00\x00f8s", b"N}X\x07\x00\x00\x00computeNs\x86"])
def test_a_pickle_changes_nothing_that_it_names(tmp_path, named, state):
    bad = rewritten(FILE, tmp_path / "bad.bin", data_pkl=b"\x80\x02" + named + state + b"b.")
    with pytest.raises(ValueError, match=r"bad\.bin"):
        torch_zip.read(bad)
    assert same(torch_zip.read(FILE), STRIDED)


def test_attributes_of_an_ordered_dict_are_not_kept(tmp_path):
    held = b"ccollections\nOrderedDict\n)R}X\x04\x00\x00\x00keysK\x01sb."
    assert torch_zip.read(rewritten(FILE, tmp_path / "x.bin", data_pkl=b"\x80\x02" + held)) == {}


def test_a_damaged_byte_of_a_storage_is_noticed(tmp_path):
    content = bytearray(FILE.read_bytes())
    content[content.index(BASE.tobytes()) + 5] ^= 1
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.bin .*CRC-32"):
        torch_zip.read(tmp_path / "bad.bin")


def test_a_compressed_file_is_read(tmp_path):
    with zipfile.ZipFile(FILE) as source, zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert same(torch_zip.read(tmp_path / "x.bin"), STRIDED)


def test_tensors_lie_in_the_file(tmp_path):
    """Reading maps a file into memory: no copy of its bytes is made."""
    array = np.ones(10_000_000, np.float32)
    torch_zip.write(tmp_path / "x.bin", {"x": array})
    files.write_safetensors(tmp_path / "x.safetensors", {"x": array})
    for read, file in [(torch_zip.read, "x.bin"), (files.read_safetensors, "x.safetensors")]:
        tracemalloc.start()
        got = read(tmp_path / file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000
        assert np.array_equal(got["x"], array)


def test_views_outside_their_storage_are_refused(tmp_path):
    short = rewritten(FILE, tmp_path / "short.bin", **{"0": BASE[:23].tobytes()})
    with pytest.raises(ValueError, match="storage 0 holds 23"):
        torch_zip.read(short)
    storage = BASE[:6]
    for offset, size, stride in [(0, (2, 3), (4, 1)), (5, (2,), (1,)), (-1, (2,), (1,)), (3, (2,), (-1,))]:
        with pytest.raises(ValueError, match="does not fit"):
            torch_zip.rebuild(storage, offset, size, stride)
    many = torch_zip.rebuild(storage, 0, (1000,), (0,))  # as large as one likes, of one number
    with pytest.raises(ValueError, match="view of another"):
        torch_zip.rebuild(many, 0, (1000,), (1,))
    assert torch_zip.rebuild(storage, 4, (2,), (1,)).tolist() == [4, 5]


def test_other_files_are_refused(tmp_path):
    whole = FILE.read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "legacy.bin").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    big = rewritten(FILE, tmp_path / "big.bin", byteorder=b"big")
    for path in (tmp_path / "cut.bin", tmp_path / "legacy.bin", big):
        with pytest.raises(ValueError, match=path.name):
            torch_zip.read(path)
    with pytest.raises(ValueError, match=r"legacy\.bin: it is of torch before 1\.6"):
        torch_zip.read(tmp_path / "legacy.bin")


def test_torch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is no dependency; run where it is installed")
    tensors = torch_zip.read(GOLDEN / "lm_siso_mlp/pytorch_model.bin")
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    torch_zip.write(tmp_path / "x.bin", tensors)
    for mmap in (False, True):
        got = torch.load(tmp_path / "x.bin", weights_only=True, mmap=mmap)
        assert list(got) == list(tensors)
        for name, array in tensors.items():
            assert got[name].dtype == torch.bfloat16
            assert np.array_equal(got[name].view(torch.int16).numpy(), array.view(np.int16))
        assert got["lm_head.weight"].data_ptr() == got["backbone.embedding.weight"].data_ptr()
