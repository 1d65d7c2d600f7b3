"""What tests of experiments share."""

import threading
import time

import pytest

from mamba3_jax.ops.ssm import IMPLEMENTATIONS


@pytest.fixture
def crowd(monkeypatch) -> list[int]:
    """Adds the implementation "crowd", `recurrent` that is slow to trace, and returns how many threads were in it."""
    inside, counts, lock = set(), [], threading.Lock()

    def run(*args, **options):
        with lock:
            inside.add(threading.get_ident())
            counts.append(len(inside))
        time.sleep(0.05)
        try:
            return IMPLEMENTATIONS["recurrent"](*args, **options)
        finally:
            with lock:
                inside.discard(threading.get_ident())

    monkeypatch.setitem(IMPLEMENTATIONS, "crowd", run)
    return counts
