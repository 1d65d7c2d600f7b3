"""`pytorch_model.bin` read and written without torch: a zip of one pickle and one record of raw bytes a storage.

Reading runs nothing: the unpickler knows four kinds of name (an ordered dict, three storages, the tensor rebuilder) and
refuses any other by name, so a file can only hold tensors.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16}


class Storage:
    """A name of `STORAGES` met in the pickle: the class, not its bytes."""

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)


def rebuild(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """A (possibly strided) view of a storage; anything that reaches outside it raises ValueError."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min([offset, *size, *stride]) < 0 or (math.prod(size) and last >= storage.size):
        raise ValueError(f"a tensor of {size=} {stride=} {offset=} does not fit its storage of {storage.size}")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


NAMES = {("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): rebuild} | {
    ("torch", name): Storage(dtype) for name, dtype in STORAGES.items()
}


class Reader(pickle.Unpickler):
    """Unpickles ordered dicts of tensors and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str):
        super().__init__(archive.open(f"{prefix}data.pkl"))
        self.archive, self.prefix, self.storages = archive, prefix, {}

    def find_class(self, module, name):
        if (module, name) not in NAMES:
            wanted = ", ".join(f"torch.{name}" for name in STORAGES)
            raise ValueError(f"it holds a {module}.{name}, and only tensors ({wanted}) are read")
        return NAMES[module, name]

    def persistent_load(self, saved):
        kind, storage, key, _device, size = saved
        if kind != "storage" or not isinstance(storage, Storage):
            raise ValueError(f"it refers to a {kind!r}, and only storages are read")
        if key not in self.storages:
            self.storages[key] = np.frombuffer(self.archive.read(f"{self.prefix}data/{key}"), storage.dtype)
        if self.storages[key].size != size or self.storages[key].dtype != storage.dtype:
            raise ValueError(f"storage {key} holds {self.storages[key].size} numbers, and its tensor wants {size}")
        return self.storages[key]


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `torch.save`d state dict by name: float32, float16 or bfloat16, strided and shared ones too.

    Raises:
        ValueError: not such a file, truncated, or with anything in it but tensors; the message says which.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"a zip with {len(pickles)} data.pkl, wanted one (torch.save of torch 1.6 or later)")
            prefix = pickles[0].removesuffix("data.pkl")
            if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
                raise ValueError("big-endian tensors are not read")
            tensors = Reader(archive, prefix).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, TypeError, EOFError, AttributeError) as error:
        raise ValueError(f"{path} is not a PyTorch state dict, or is truncated: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    strangers = [k for k, v in tensors.items() if not isinstance(v, np.ndarray)] if isinstance(tensors, dict) else "all"
    if strangers:
        raise ValueError(f"{path}: wanted a dict of tensors; not tensors: {strangers}")
    return dict(tensors)


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """What `torch.save(state_dict, path)` writes. Entries that are one array share one storage, as a tied head does."""
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
    """Protocol 2, opcode by opcode: the classes it names are torch's, which need not be installed."""

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
