"""Kernels run in Pallas's interpreter where their hardware is not, so that every test is for every implementation."""

import functools

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from mamba3_jax.ops.mosaic_gpu import mosaic_gpu
from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from mamba3_jax.ops.tpu import mosaic_tpu
from mamba3_jax.ops.triton import triton

# Blocks are moved as the grid says, in a random order where it says "parallel"; what nobody wrote is not a number.
INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def pytest_collection_modifyitems(items):
    """On a GPU without the TPU's kernels, whose interpreter is for the CPU."""
    if jax.default_backend() == "gpu":
        of = lambda item: getattr(item, "callspec", None) and item.callspec.params.get("implementation")  # noqa: E731
        items[:] = [item for item in items if of(item) != "mosaic_tpu"]


@pytest.fixture
def without_callbacks(monkeypatch):
    """TPUs' kernels in Pallas's own interpreter: the TPU's calls back to Python, and `jax.checkpoint` refuses that."""
    if jax.default_backend() == "cpu":
        monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_tpu", functools.partial(mosaic_tpu, interpret=True))


@pytest.fixture(autouse=True, scope="session")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        if jax.default_backend() == "cpu":
            for name, kernels in (("triton", triton), ("mosaic_gpu", mosaic_gpu)):
                patch.setitem(IMPLEMENTATIONS, name, functools.partial(kernels, interpret=True))
            patch.setitem(IMPLEMENTATIONS, "mosaic_tpu", functools.partial(mosaic_tpu, interpret=INTERPRETER))
        yield
