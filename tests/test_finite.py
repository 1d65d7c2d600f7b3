"""NaN and infinity are found in any array, wherever it lies, and named."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mamba3_jax.finite import all_finite, check_finite, or_null
from tests.helpers import devices

ROOT = Path(__file__).parents[1]
HUGE = np.full(4, 1e38, np.float32)  # its norm overflows float32


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_is_found(make, dtype, value):
    good = {"a": {"b": make(np.ones((2, 3), jnp.dtype(dtype)))}, "n": make(np.int32(3)), "huge": make(HUGE)}
    check_finite("params", good)
    assert all_finite(good)
    array = np.ones((2, 3), jnp.dtype(dtype))
    array[1, 2] = value
    bad = good | {"a": {"b": make(array)}}
    assert not all_finite(bad)
    with pytest.raises(ValueError, match=r"^params: 1 of 3 tensors hold NaN or infinity: a/b$"):
        check_finite("params", bad)


def test_ten_are_named_and_the_rest_counted():
    tree = {f"layer_{index:02}": np.float32(np.nan) for index in range(13)}
    with pytest.raises(ValueError, match=r"^x: 13 of 13 tensors .*: layer_00, .*layer_09 and 3 more$"):
        check_finite("x", tree)


def test_nothing_is_finite():
    check_finite("nothing", {})
    assert all_finite(())


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mamba3_jax.finite import check_finite
mesh = jax.make_mesh((4,), ("data",))
split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
array = np.ones(8, np.float32)
good = {"split": jax.device_put(array, split), "whole": jax.device_put(array, whole), "here": array}
check_finite("x", good)
bad = array.copy()  # the arrays on devices may share the memory of the first
bad[5] = np.inf  # on the third device
try:
    check_finite("x", good | {"split": jax.device_put(bad, split)})
except ValueError as error:
    print(error)
"""


def test_arrays_of_a_mesh():
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, cwd=ROOT, env=devices(4), capture_output=True, text=True)
    assert done.stdout == "x: 1 of 3 tensors hold NaN or infinity: split\n", (done.returncode, done.stderr)


def test_json_has_null_in_place_of_no_number():
    value = {"a": [1.5, float("nan"), {"b": float("inf")}], "c": (-float("inf"), 2, "x", None, True)}
    assert json.loads(json.dumps(or_null(value), allow_nan=False)) == {
        "a": [1.5, None, {"b": None}],
        "c": [None, 2, "x", None, True],
    }


def test_json_is_written_without_nan_everywhere():
    found = 0
    for folder in ("mamba3_jax", "launch", "experiments", "pallas_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                    found += 1
                    assert "allow_nan=False" in map(ast.unparse, node.keywords), f"{path}:{node.lineno}"
    assert found > 10


def test_arrays_of_other_shapes_in_one_place_are_each_looked_at():
    """As an optimizer's factored moments beside their parameter."""
    good = [{"w": np.ones((2, 3), np.float32)}, {"w": np.ones(2, np.float32)}, {"w": np.ones((2, 3), np.float32)}]
    assert all_finite(*good)
    for place, tree in enumerate(good):
        bad = {"w": np.full_like(tree["w"], np.nan)}
        assert not all_finite(*good[:place], bad, *good[place + 1 :])
