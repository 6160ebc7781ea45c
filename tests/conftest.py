"""What all tests share: hypothesis draws the same examples in every run, and settings do not leak."""

import pytest
from hypothesis import settings

from kernels import threads as pool

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _threads():
    """A test may set pool.THREADS; the next one finds what was there."""
    before = pool.THREADS
    yield
    pool.THREADS = before
