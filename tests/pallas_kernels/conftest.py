"""What tests of kernels share."""

import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from launch import tpu

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Leave all but the quick ones of this folder to `make test-all`."""
    for item in items:
        if HERE in item.path.parents and not item.get_closest_marker("quick"):
            item.add_marker("full")


@pytest.fixture
def compiler(monkeypatch):
    """Let a test find the compiler for TPUs, which other processes should not, and tell it that there is no TPU."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tpu.LIBTPU)])
    pytest.importorskip("libtpu", reason="no libtpu, the compiler for TPUs")
    for name, value in tpu.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # What is compiled for a chip that is not there is written to a cache and cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
