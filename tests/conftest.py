"""Where the time of the suite goes is the compiler and Python's tracing: what both do, they do once and quickly."""

import gc
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Machine code left unoptimised computes the same programs in a third of the compile time, and in a fifth less of that
# where it is not cut into pieces for more cores than a worker has; processes that tests start included.
# `helpers.AS_USERS` compiles as users do.
QUICK = {"xla_backend_optimization_level": "0", "xla_cpu_parallel_codegen_split_count": "1"}
if version("jax") < "0.11":  # later ones do not know it
    QUICK["xla_cpu_use_fusion_emitters"] = "false"
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([flags, *(f"--{name}={QUICK[name]}" for name in QUICK if name not in flags)]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Equal programs are compiled once: in another worker, in the rest of `make test-all`, in a run that goes on.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# What commands would keep in the user's own folder goes into one of the session, which its workers share.
if "PYTEST_XDIST_WORKER" not in os.environ:
    SESSION = tempfile.TemporaryDirectory(prefix="mamba3_jax_tests_")
    os.environ["XDG_CACHE_HOME"] = SESSION.name
# Traced programs are kept, so that there are millions of objects to look through and next to none to free.
gc.set_threshold(100_000, 50, 100)

# Processes that wait for one another: most of two minutes.
LONGEST = {"test_killed_and_stopped_is_the_same_run"}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[str, str]:
    """The environment of processes that are killed, maybe as they write to their compilation cache: one for them."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}


@pytest.fixture
def compiler(monkeypatch):
    """Let a test find the compiler for TPUs, which other processes should not, and tell it that there is no TPU."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from launch import tpu

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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Begins with what takes longest, so that no worker is alone with it when the others have nothing left."""
    items.sort(key=lambda item: item.originalname not in LONGEST)
