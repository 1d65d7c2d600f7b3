"""What `torch.save` writes, without torch: Python's own pickler meets stand-ins under torch's names."""

import collections
import io
import math
import pickle
import sys
import types
import zipfile
from unittest import mock

import numpy as np

from mamba3_jax.convert.torch_zip import STORAGES


class Module(types.ModuleType):
    """A module that exists while a pickle is made, so that the pickler finds in it what it names."""

    def put(self, name):
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


TORCH, UTILS = Module("torch"), Module("torch._utils")
KINDS = {np.dtype(dtype): TORCH.put(name) for name, dtype in STORAGES.items()}
REBUILD, PARAMETER = UTILS.put("_rebuild_tensor_v2"), UTILS.put("_rebuild_parameter")


class Parameter:
    """A torch.nn.Parameter of an array."""

    def __init__(self, array):
        self.array = array


class Storage:
    """What a tensor's bytes are: pickled as a persistent id."""

    def __init__(self, array):
        self.array = array


class Call:
    """Pickled as the call of a class by its name: Call("argparse", "Namespace"); `state` is set afterwards."""

    def __init__(self, module, name, *arguments, state=None):
        self.module, self.name, self.arguments, self.state = module, name, arguments, state


class Pickler(pickle.Pickler):
    """Writes arrays as tensors, and keeps their storages."""

    def __init__(self, file, modules):
        super().__init__(file, protocol=2)
        self.modules, self.storages = modules, {}

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        key, _ = self.storages.setdefault(id(value.array), (str(len(self.storages)), value.array))
        return "storage", KINDS[value.array.dtype], key, "cuda:0", value.array.size

    def reducer_override(self, value):
        if isinstance(value, np.ndarray):
            stride = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim))
            return REBUILD, (Storage(value), 0, value.shape, stride, False, collections.OrderedDict())
        if isinstance(value, Parameter):
            return PARAMETER, (value.array, True, collections.OrderedDict())
        if isinstance(value, Call):
            parents = value.module.split(".")
            for depth in range(len(parents)):
                self.modules.setdefault(".".join(parents[: depth + 1]), Module(".".join(parents[: depth + 1])))
            module = self.modules[value.module]
            made = getattr(module, value.name, None) or module.put(value.name)
            return made, value.arguments, value.state
        return NotImplemented


def save(path, value) -> None:
    """torch.save(value, path)."""
    modules = {"torch": TORCH, "torch._utils": UTILS}
    pickled = io.BytesIO()
    with mock.patch.dict(sys.modules, modules):
        pickler = Pickler(pickled, sys.modules)
        pickler.dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        for key, array in pickler.storages.values():
            archive.writestr(f"archive/data/{key}", array.tobytes())
