"""Kernels run in Pallas's interpreter where their hardware is not, so that every test is for every implementation."""

import functools

import jax
import pytest

from mamba3_jax.ops.ssm import IMPLEMENTATIONS
from mamba3_jax.ops.triton import triton


@pytest.fixture(autouse=True, scope="session")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        if jax.default_backend() == "cpu":
            patch.setitem(IMPLEMENTATIONS, "triton", functools.partial(triton, interpret=True))
        yield
