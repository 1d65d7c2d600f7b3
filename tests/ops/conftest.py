"""Kernels run in Pallas's interpreter where their hardware is not, so that every test is for every implementation."""

import functools

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from mamba3_jax.ops import kernels
from mamba3_jax.ops.ssm import IMPLEMENTATIONS

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
        monkeypatch.setitem(
            IMPLEMENTATIONS, "mosaic_tpu", functools.partial(kernels.IMPLEMENTATIONS["mosaic_tpu"], interpret=True)
        )


@pytest.fixture(autouse=True, scope="session")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        if jax.default_backend() == "cpu":
            for name, run in kernels.IMPLEMENTATIONS.items():
                interpret = INTERPRETER if name == "mosaic_tpu" else True
                patch.setitem(IMPLEMENTATIONS, name, functools.partial(run, interpret=interpret))
        yield
