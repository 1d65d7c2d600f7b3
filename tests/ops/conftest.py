"""Kernels run in Pallas's interpreter where their hardware is not, so that every test is for every implementation."""

import functools

import jax
import pytest

from mamba3_jax.ops.mosaic_gpu import mosaic_gpu
from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from mamba3_jax.ops.triton import triton


@pytest.fixture(autouse=True, scope="session")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        if jax.default_backend() == "cpu":
            for name, kernels in (("triton", triton), ("mosaic_gpu", mosaic_gpu)):
                patch.setitem(IMPLEMENTATIONS, name, functools.partial(kernels, interpret=True))
        yield
