"""What tests share: the error metric, the recorded official cases, and the compiler's options."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
# Compiler options that undo those of conftest.py.
AS_USERS = {"xla_backend_optimization_level": 3}
if jax.default_backend() == "cpu":
    AS_USERS["xla_cpu_parallel_codegen_split_count"] = 32
    if jax.__version_info__ < (0, 11):
        AS_USERS["xla_cpu_use_fusion_emitters"] = True


def devices(count: int) -> dict[str, str]:
    """The environment of a process that has so many CPU devices, and these tests' compiler options."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def first(values) -> list:
    """The values of a parameter: the first for `make test`, the others, which are the same code again, for the rest."""
    quick, *others = values
    return [quick, *(pytest.param(other, marks=pytest.mark.full) for other in others)]


def rel_rms(got, want) -> float:
    """RMS of the difference over RMS of the reference, in float64; 0/0 is 0 and NaN stays NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    difference = np.sqrt(np.mean(np.square(got - want)))
    return float(difference / np.sqrt(np.mean(np.square(want)))) if difference != 0 else 0.0


def without_times(metrics: dict) -> dict:
    """Metrics, or a result's row, without those that depend on the clock."""
    return {name: value for name, value in metrics.items() if not name.startswith(("tokens_per_second", "seconds_"))}


def golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The manifest entry and the arrays of one recorded case (tests/golden/manifest.json says how it was made)."""
    cases = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    case = next(case for case in cases if case["name"] == name)
    with np.load(GOLDEN / case["file"]) as arrays:
        return case, dict(arrays)
