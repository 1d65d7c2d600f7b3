"""Kernels run in Pallas's interpreter where their hardware is not, so that every test is for every implementation.

The plain one: the TPU's own, which looks for races and begins with memory that is NaN, takes four times as long and is
for tests/pallas_kernels.
"""

import functools

import jax
import pytest

from mamba3_jax.ops import kernels
from mamba3_jax.ops.ssm import IMPLEMENTATIONS

# What `make test` asks of `associative`, whose frame, bias, rotation and epilogue are those of `chunked`: two recorded
# cases, one of documents and one of several ranks.
OF_ASSOCIATIVE = {"test_recorded_case[siso_varlen3-associative]", "test_recorded_case[mimo_r4_norm-associative]"}
# Optimised code takes ten times as long to compile: `make test` has that of `chunked`, which runs where no kernel does.
OPTIMISED = "test_recorded_case_with_optimised_code"


def pytest_collection_modifyitems(items):
    """Leaves interpreted kernels to `make test-all`, and on a GPU those of TPUs, whose interpreter is for the CPU.

    Tests of one implementation follow one another: one process compiles what they share.
    """
    kept, order = [], {}
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("implementation")
        if jax.default_backend() == "gpu" and name == "mosaic_tpu":
            continue
        rest = name == "associative" and item.name not in OF_ASSOCIATIVE
        rest = rest or (name == "recurrent" and item.originalname == OPTIMISED)
        if (rest or name in kernels.BACKENDS) and not item.get_closest_marker("quick"):
            item.add_marker("full")
        kept.append(item)
        order[item] = order.setdefault(item.path, len(order)), name or ""
    items[:] = sorted(kept, key=order.get)


@pytest.fixture(autouse=True, scope="package")  # tests of kernels themselves ask for them as they are
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        if jax.default_backend() == "cpu":
            for name, run in kernels.IMPLEMENTATIONS.items():
                patch.setitem(IMPLEMENTATIONS, name, functools.partial(run, interpret=True))
        yield
