import pytest


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[str, str]:
    """The environment of processes that are killed, maybe as they write to their compilation cache: one for them."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
