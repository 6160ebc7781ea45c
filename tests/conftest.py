"""What all tests share: hypothesis draws the same examples in every run, and settings do not leak.

At the end they say what ran in the emulator, and what NVRTC made of the kernels that training uses.
"""

import os
import signal
import sys

import pytest
from hypothesis import settings

import kernels
from kernels import threads as pool

# A script that runs in the process of the tests is the only rank: it starts no others (script.environment).
os.environ.update(RANK="0", WORLD_SIZE="1")
# A shell lets a job in the background ignore Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
os.environ["RANK"], os.environ["WORLD_SIZE"] = "0", "1"  # main() in this process starts no others


@pytest.fixture(autouse=True)
def _threads():
    """A test may set pool.THREADS; the next one finds what was there."""
    before = pool.THREADS
    yield
    pool.THREADS = before


@pytest.fixture(autouse=True)
def _signals():
    """A run catches signals; the next test finds what was there."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture(autouse=True)
def _auto_is_the_cpu(monkeypatch):
    """With the emulator installed there seems to be a GPU: who asks for no device means the CPU."""
    choose = kernels.choose

    def choose_cpu(device, dtype, **settings):
        return choose("cpu" if device == "auto" else device, dtype, **settings)

    monkeypatch.setattr(kernels, "choose", choose_cpu)


# What ran in the emulator and what NVRTC reported: of this process, or of all workers of pytest-xdist.


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist: hand it to the main process
        launched, table = collected()
        session.config.workeroutput["launched"] = [[*key, n] for key, n in launched.items()]
        session.config.workeroutput["nvrtc"] = [[*key, row] for key, row in table.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if not hasattr(node, "workeroutput"):
        return  # it crashed
    import emulator.launcher  # noqa: PLC0415  the main process has run no test
    import test_nvrtc  # noqa: PLC0415

    for file, name, n in node.workeroutput["launched"]:
        emulator.launcher.launched[file, name] += n
    for file, name, row in node.workeroutput["nvrtc"]:
        test_nvrtc.TABLE.setdefault((file, name), {}).update({int(card): text for card, text in row.items()})


def collected():
    """What the tests of this process have counted, of the modules that it has loaded."""
    launcher, nvrtc = sys.modules.get("emulator.launcher"), sys.modules.get("test_nvrtc")
    return launcher.launched if launcher else {}, nvrtc.TABLE if nvrtc else {}


def pytest_terminal_summary(terminalreporter):
    """Of the modules that this session has loaded: a run of a few tests says nothing about kernels."""
    for module, title in (("emulator.launcher", "the emulator"), ("test_nvrtc", "NVRTC")):
        lines = sys.modules[module].report() if module in sys.modules else []
        if lines:
            terminalreporter.section(title)
            terminalreporter.write("\n".join(lines) + "\n")
