"""Models whose rows are split over devices are those of one: logits, states and gradients, in both layouts."""

import subprocess
import sys

import pytest

from tests.helpers import devices
from tests.model import over_length


def check(which: str, cases: dict):
    command = [sys.executable, "-m", "tests.model.over_length", which]
    done = subprocess.run(command, env=devices(8), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    errors = dict(line.split() for line in done.stdout.splitlines())
    assert list(errors) == list(cases)
    assert max(map(float, errors.values())) < 1e-5, errors


def test_four_devices_compute_a_hybrid_as_one_does():
    check("quick", over_length.QUICK)


@pytest.mark.full
def test_every_mixer_is_computed_as_one_device_does():
    check("full", over_length.FULL)
