"""Without numba (the extras `solver` and `dev`) there is nothing here to test."""

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("numba") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Time limits of the tests are for solving, not for compiling."""
    from neocc.passes.layout.pairwise.solve import compile_loops

    compile_loops()
