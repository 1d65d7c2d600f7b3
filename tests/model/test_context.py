"""Models whose rows are split over devices are those of one: logits, states and gradients, in both layouts."""

import subprocess
import sys

import pytest

from tests.helpers import devices
from tests.model import over_length


def check(which: str, cases: dict) -> list[str]:
    """Passes where every case is computed as by one device; returns what else is said."""
    command = [sys.executable, "-m", "tests.model.over_length", which]
    done = subprocess.run(command, env=devices(8), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    errors = dict(line.split() for line in lines[: len(cases)])
    assert list(errors) == list(cases)
    assert max(map(float, errors.values())) < 1e-5, errors
    return lines[len(cases) :]


def test_four_devices_compute_a_hybrid_as_one_does():
    said = check("quick", over_length.QUICK)
    assert said == ["mamba2 cannot split its rows over devices, wanted a mesh without 'sequence'"]


@pytest.mark.full
def test_every_mixer_is_computed_as_one_device_does():
    assert not check("full", over_length.FULL)
