"""Which tests of kernels are quick."""

from pathlib import Path

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Leave all but the quick ones of this folder to `make test-all`."""
    for item in items:
        if HERE in item.path.parents and not item.get_closest_marker("quick"):
            item.add_marker("full")
