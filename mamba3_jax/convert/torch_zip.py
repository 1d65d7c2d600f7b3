"""Read and write `pytorch_model.bin` without torch: a zip of one pickle and, for each storage, a record of raw bytes.

Reading runs no code of the file: the unpickler builds tensors and plain containers from the names in `NAMES`, puts an
empty object in place of those in `INERT` (what training loops save beside the weights), and refuses any other name.
"""

import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mamba3_jax.convert.peel import unwrap

# The first three are dtypes of weights, the others of buffers.
STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # how a file of torch before 1.6 begins


# A pickle can set attributes of whatever it names. The classes that it can name here have none that can be set, so no
# file changes how the next one is read.


class Storage(NamedTuple):
    """Stands for a class of `STORAGES` that the pickle names; it holds no bytes."""

    dtype: np.dtype


class Function(NamedTuple):
    """Stands for a function or class that the pickle calls."""

    compute: Callable

    def __call__(self, *arguments):
        return self.compute(*arguments)


class Dict(dict):
    """An OrderedDict, without the attributes (`_metadata`) that torch gives a state dict."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class Inert:
    """Takes whatever is put into it and holds nothing."""

    __slots__ = ()

    def __new__(cls, *_arguments, **_named):
        return super().__new__(cls)

    def take(self, *_anything):
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = take


def rebuild(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """Return a (possibly strided) view of a storage; ValueError for one that reaches outside of it."""
    if storage.ndim != 1 or not storage.flags.c_contiguous:
        raise ValueError("a tensor is a view of another, wanted a view of a storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min([offset, *size, *stride]) < 0 or (math.prod(size) and last >= storage.size):
        raise ValueError(f"a tensor of {size=} {stride=} {offset=} does not fit its storage of {storage.size}")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def rebuild_parameter(tensor, *_requires_grad_hooks_state):
    """Return the tensor of a torch.nn.Parameter."""
    return tensor


NAMES = {
    ("collections", "Counter"): Function(dict),
    ("collections", "OrderedDict"): Dict,
    ("collections", "defaultdict"): Function(lambda *_factory: {}),
    ("collections", "deque"): Function(lambda items=(), *_longest: list(items)),
    ("builtins", "dict"): Function(dict),
    ("builtins", "list"): Function(list),
    ("builtins", "set"): Function(list),
    ("torch", "Size"): Function(tuple),
    ("torch._utils", "_rebuild_tensor_v2"): Function(rebuild),
    ("torch._utils", "_rebuild_parameter"): Function(rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(rebuild_parameter),
} | {("torch", name): Storage(np.dtype(dtype)) for name, dtype in STORAGES.items()}
INERT = {
    "_codecs": ["encode"],
    "argparse": ["Namespace"],
    "builtins": ["bytearray", "bytes", "complex", "frozenset", "slice", "xrange"],
    "datetime": ["date", "datetime", "timedelta"],
    "lightning.fabric.utilities.data": ["AttributeDict"],
    "lightning.pytorch.utilities.parsing": ["AttributeDict"],
    "lightning_fabric.utilities.data": ["AttributeDict"],
    "numpy": ["dtype", "ndarray"],
    "numpy._core.multiarray": ["_reconstruct", "scalar"],
    "numpy.core.multiarray": ["_reconstruct", "scalar"],
    "pathlib": ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"],
    "pathlib._local": ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"],
    "pytorch_lightning.utilities.parsing": ["AttributeDict"],
    "torch": [
        "device",
        "float32",
        "float16",
        "bfloat16",
        "float64",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ],
    "torch.torch_version": ["TorchVersion"],
    "types": ["SimpleNamespace"],
}


class Reader(pickle.Unpickler):
    """Unpickles tensors in plain containers, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str, content: np.ndarray):
        super().__init__(archive.open(f"{prefix}data.pkl"))
        self.archive, self.prefix, self.content, self.storages = archive, prefix, content, {}

    def find_class(self, module, name):
        module = "builtins" if module == "__builtin__" else module  # protocol 2 writes Python 2's name of the module
        if (module, name) in NAMES:
            return NAMES[module, name]
        if name in INERT.get(module, ()):
            return Inert
        raise ValueError(f"it holds a {module}.{name}, and only tensors are read: save model.state_dict() alone")

    def persistent_load(self, saved):
        kind, storage, key, _device, size = saved
        if kind != "storage" or not isinstance(storage, Storage):
            raise ValueError(f"it refers to a {kind!r}, and only storages are read")
        if key not in self.storages:
            self.storages[key] = self.record(f"{self.prefix}data/{key}").view(storage.dtype)
        if self.storages[key].size != size or self.storages[key].dtype != storage.dtype:
            raise ValueError(f"storage {key} holds {self.storages[key].size} numbers, and its tensor wants {size}")
        return self.storages[key]

    def record(self, name: str) -> np.ndarray:
        """Return the bytes of a record, checked: a view of the file, or a copy of a record that is compressed."""
        info = self.archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self.archive.read(info), np.uint8)
        self.archive.open(info).close()  # checks the local header
        lengths = self.content[info.header_offset + 26 :][:4].tobytes()  # of the name and of the padding after it
        first = info.header_offset + 30 + sum(struct.unpack("<HH", lengths))
        record = self.content[first : first + info.file_size]
        if record.size != info.file_size or zlib.crc32(record) != info.CRC:
            raise zipfile.BadZipFile(f"bad CRC-32 of {name}")
        return record


def read(path: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, np.ndarray]:
    """Return by name the tensors that `torch.save` wrote: a state dict, or one in a known wrapper, which `say` is told.

    All of them, strided and shared ones too, are views of the file, mapped into memory: it must not change while they
    are used.

    Raises:
        ValueError: it is no such file, is truncated, or holds anything but tensors; the message says which.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(LEGACY)) == LEGACY:
                raise ValueError("it is of torch before 1.6: load it with torch, and torch.save it again")
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"a zip with {len(pickles)} data.pkl, wanted one (torch.save of torch 1.6 or later)")
            prefix = pickles[0].removesuffix("data.pkl")
            if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
                raise ValueError("big-endian tensors are not read")
            content = np.memmap(path, np.uint8, "r").view(np.ndarray)
            return unwrap(Reader(archive, prefix, content).load(), say)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle or zip raises nearly anything
        raise ValueError(f"{path} is not a PyTorch state dict, or is truncated: {error}") from error


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write what `torch.save(state_dict, path)` does. Entries that are one array, as a tied head, share a storage."""
    keys = {}
    for array in tensors.values():
        keys.setdefault(id(array), (str(len(keys)), array))
    pickled = state_dict_pickle(tensors, {identity: key for identity, (key, _) in keys.items()})
    records = {"data.pkl": pickled, "byteorder": b"little"}
    records |= {f"data/{key}": np.ascontiguousarray(array).reshape(-1).view(np.uint8) for key, array in keys.values()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (records | {"version": b"3\n"}).items():
            # A ZipInfo of its own has a fixed date: equal tensors make equal files.
            with archive.open(zipfile.ZipInfo(f"{path.stem}/{name}"), "w", force_zip64=len(content) >= 2**31) as record:
                record.write(content)


def state_dict_pickle(tensors: dict[str, np.ndarray], keys: dict[int, str]) -> bytes:
    """Return a state dict's pickle, protocol 2, opcode by opcode: it names torch's classes, which need not be here."""

    def text(string):
        return pickle.BINUNICODE + struct.pack("<I", len(string.encode())) + string.encode()

    def number(value):
        payload = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return pickle.LONG1 + bytes([len(payload)]) + payload

    def named(module, name):
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def group(*items):
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    names = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
    empty = named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    out = [pickle.PROTO + b"\x02", empty, pickle.MARK]
    for name, array in tensors.items():
        size = array.shape
        stride = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
        storage = [text("storage"), named("torch", names[array.dtype]), text(keys[id(array)]), text("cpu")]
        arguments = group(
            group(*storage, number(array.size)) + pickle.BINPERSID,
            number(0),
            group(*map(number, size)),
            group(*map(number, stride)),
            pickle.NEWFALSE,
            empty,
        )
        out += [text(name), named("torch._utils", "_rebuild_tensor_v2"), arguments, pickle.REDUCE]
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])
