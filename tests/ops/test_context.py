"""Rows split over devices are the rows of one device: values, states and every gradient, whoever has which tokens."""

import subprocess
import sys

import pytest

from mamba3_jax.ops import context
from mamba3_jax.ops.context import Context
from tests.helpers import devices
from tests.ops import over_length


def lines(which: str) -> list[str]:
    command = [sys.executable, "-m", "tests.ops.over_length", which]
    done = subprocess.run(command, env=devices(8), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_four_devices_compute_what_one_does():
    assert lines("quick") == ["siso 4 8 4 4"]


@pytest.mark.full
def test_any_number_of_devices_computes_what_one_does():
    """In both layouts, with rows and heads split too, by kernels; an error in any part of what crosses is caught."""
    *done, caught, not_equal, not_equal_zigzag, unknown = lines("full")
    assert [line.split()[0] for line in done] == list(over_length.FULL)
    for line in done:
        case = over_length.FULL[line.split()[0]]
        sizes = (case.shape.batch, case.shape.length, case.shape.heads)
        parts = tuple(case.sizes[place] for place in (0, 2, 1))
        assert line.split()[1:4] == [str(size // part) for size, part in zip(sizes, parts, strict=True)]
    assert caught.split() == [*over_length.PARTS, "kernels"]
    assert not_equal == "length=6 is not a multiple of 4, the runs of layout='contiguous' on sequence=4"
    assert not_equal_zigzag == "length=12 is not a multiple of 8, the runs of layout='zigzag' on sequence=4"
    assert unknown == "layout='spiral' is not one of ['contiguous', 'zigzag']"


def test_without_a_mesh_rows_are_whole():
    assert context.divide("sequence", "zigzag", 64) is None
    assert Context("sequence", "zigzag").runs == 2
