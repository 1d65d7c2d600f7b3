"""What tests of kernels share."""

import sys

import pytest

from experiments.benchmarks import tpu_aot


@pytest.fixture
def compiler(monkeypatch):
    """Lets a test find the compiler for TPUs, which other processes should not, and tells it that there is no TPU."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tpu_aot.LIBTPU)])
    pytest.importorskip("libtpu", reason="no libtpu, the compiler for TPUs")
    for name, value in tpu_aot.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
