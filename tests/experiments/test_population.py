"""The benchmark of populations: what cannot be timed is refused before anything is compiled."""

import subprocess
import sys

import pytest

from experiments.benchmarks import population


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--members=1,two", "--members=1,two: 'two' is not a whole number from 1 up"),
        ("--members=0", "--members=0: '0' is not a whole number from 1 up"),
        ("--implementations=chunked", "'chunked' is not DTYPE:NAME with DTYPE one of float32, bfloat16"),
    ],
)
def test_a_mistake_is_one_line(flag, message):
    command = [sys.executable, "-m", "experiments.benchmarks.population", flag]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("mixer", "how", "message"),
    [
        ("Q", "float32:", "'Q'"),
        ("M", "float32:fastest", "'fastest'"),
        ("M", "float16:", "'float16:' is not DTYPE:NAME"),
    ],
)
def test_a_kind_that_cannot_be_trained_is_refused(mixer, how, message):
    assert population.kinds_of(["M"], ["float32:", "bfloat16:chunked"], 4) == [
        ("M", "float32", ""),
        ("M", "bfloat16", "chunked"),
    ]
    with pytest.raises(ValueError, match=message):
        population.kinds_of(["M", mixer], ["float32:", how], 4)
