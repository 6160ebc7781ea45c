"""What all tests share: hypothesis draws the same examples in every run, and settings do not leak.

At the end they say what ran in the emulator, and what NVRTC made of the kernels that training uses.
"""

import sys

import pytest
from hypothesis import settings

import kernels
from kernels import threads as pool

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _threads():
    """A test may set pool.THREADS; the next one finds what was there."""
    before = pool.THREADS
    yield
    pool.THREADS = before


@pytest.fixture(autouse=True)
def _auto_is_the_cpu(monkeypatch):
    """With the emulator installed there seems to be a GPU: who asks for no device means the CPU."""
    choose = kernels.choose
    monkeypatch.setattr(
        kernels, "choose", lambda device, dtype: choose({"auto": "cpu"}.get(device, device), dtype)
    )


def pytest_terminal_summary(terminalreporter):
    """Of the modules that this session has loaded: a run of a few tests says nothing about kernels."""
    for module, title in (("emulator.launcher", "the emulator"), ("test_nvrtc", "NVRTC")):
        lines = sys.modules[module].report() if module in sys.modules else []
        if lines:
            terminalreporter.section(title)
            terminalreporter.write("\n".join(lines) + "\n")
