"""Ranks: many processes compute what one computes, to the bit the same in every run; and they end together,
whatever happens to one of them, with one line that says why."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import script

import distributed
from common import UserError
from distributed import World

ROOT = Path(distributed.__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

BEGIN = """
import json, os, signal, sys, time
import numpy as np
import common, distributed, gpt2

def main():
    world = distributed.start(int(sys.argv[1]), __file__, sys.argv[1:])
"""
END = """
common.run(main)
"""


@pytest.fixture
def ranks(tmp_path):
    """ranks(n, body): a script whose main() starts n ranks and has this body, in a process of its own."""
    started = []

    def start(n, body, imports=""):
        path = tmp_path / "script.py"
        path.write_text(imports + BEGIN + body + END)
        environment = script.environment(PYTHONPATH=str(ROOT))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(subprocess.Popen([sys.executable, path, str(n)], env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def alive(pid):
    """Whether a process still runs: one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end_of(process, pids=(), seconds=5):
    """(status, what it wrote to standard error) of a process that ends in time, and its ranks with it."""
    _, err = process.communicate(timeout=90)  # a busy machine may take long to start Python
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a rank is left behind"
        time.sleep(0.02)
    return process.returncode, err


# ------------------------------------------------------------------------------------------------------------
# Sums, replies, memory

EXCHANGE = """
    values = np.random.default_rng(world.rank).standard_normal(1000).astype(np.float32)
    sums = world.zeros_for_sums(1000, np.float32)
    part = world.part

    def slow_part(n):  # rank 0 has its part first, and must wait for the others
        time.sleep(0.1 * world.rank)
        return part(n)

    world.part = slow_part
    for last in (0, world.size - 1):  # the second time nothing may be left of the first
        if world.rank == last:
            time.sleep(0.2)  # the others must wait for its sums
        sums[:] = values
        world.all_reduce(sums)
        total = sums.copy()
        world.barrier()
        assert np.array_equal(total, sums), "all_reduce returned too soon"
    shared = world.zeros((world.size, 5), np.int32)
    shared[world.rank] = world.rank + 1
    world.barrier()
    part = part(1000)
    seen = [sums.tobytes().hex(), shared.tolist(), [part.start, part.stop], world.rank, "ä" * 100_000]
    everyone = world.gather(seen)
    threads = distributed.threads.THREADS
    if world.rank == world.size - 1:  # not only rank 0 knows it all
        print(json.dumps([everyone, threads]))
"""


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_reduce_gather_and_shared_memory(ranks, n):
    body = (
        EXCHANGE
        if n > 1
        else EXCHANGE.replace("world.zeros_for_sums(1000,", "np.zeros(1000,").replace(
            "world.zeros((world.size, 5),", "np.zeros((1, 5),"
        )
    )
    out, err = ranks(n, body).communicate(timeout=60)
    assert err == ""
    everyone, threads = json.loads(out)
    values = [np.random.default_rng(rank).standard_normal(1000).astype(np.float32) for rank in range(n)]
    total = values[0].copy()
    for other in values[1:]:  # in the order of ranks: other orders round differently
        total += other
    reverse = sum(reversed(values))
    assert n < 3 or not np.array_equal(total, reverse), "the order makes no difference here"
    start = 0
    for rank, (sums, shared, part, its_rank, text) in enumerate(everyone):
        assert bytes.fromhex(sums) == total.tobytes(), rank
        assert shared == [[k + 1] * 5 for k in range(n)]
        assert part[0] == start and (part[0] % 64, its_rank, text) == (0, rank, "ä" * 100_000)
        start = part[1]
    assert start == 1000
    assert threads == max(1, len(os.sched_getaffinity(0)) // n)


UPDATES = """
    config = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=40, vocab_size=50)
    model = gpt2.GPT2(config, dtype="float64")
    model.share(world)
    optimizer = gpt2.AdamW(model, weight_decay=0.1, world=world)
    rows = np.random.default_rng(7).integers(50, size=(3, 12, 9))
    norms = []
    for block in rows:
        for row in block[world.rank :: world.size]:
            model.forward(row[None, :-1], row[None, 1:], np.full((1, 8), 1 / 96))
            model.backward()
        world.all_reduce(model.sums)
        loss = float(model.loss[0])
        norms.append([float(optimizer.step(1e-2)[0]), loss])
        assert not model.sums.any(), "a step leaves gradients or loss behind"
    world.barrier()
    results = world.gather([norms, model.flat_params.tolist(), optimizer.m.tolist(), optimizer.v.tolist()])
    if world.rank == 0:
        print(json.dumps(results))
"""


def test_ranks_make_the_updates_of_one(ranks):
    def results(n):
        out, err = ranks(n, UPDATES).communicate(timeout=60)
        assert err == ""
        return json.loads(out)

    (alone,), together = results(1), results(3)
    for result in together:
        assert result == together[0], "ranks disagree"
        for one, other in zip(result, alone):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
    assert results(3) == together, "not the same bits again"


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 64 * 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_cover_a_buffer_once_and_are_alike(n, size):
    parts = []
    for rank in range(size):
        world = World(0, 1)
        world.rank, world.size = rank, size
        parts.append(world.part(n))
    assert [part.start for part in parts] == [0] + [part.stop for part in parts[:-1]]
    assert parts[-1].stop == n and all(part.start % 64 == 0 or part.start == n for part in parts)
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 128


def test_one_rank_needs_no_other():
    world = World(0, 1)
    sums = np.ones(3)
    world.all_reduce(sums)
    world.barrier()
    assert (
        world.gather({"a": 1}) == [{"a": 1}] and sums.tolist() == [1, 1, 1] and world.part(9) == slice(0, 9)
    )
    for exchange in (lambda: world.all_reduce(sums), world.barrier, lambda: world.gather(0)):
        world.asked_to_stop, world.stop = signal.SIGTERM, 0
        exchange()
        assert world.stop == signal.SIGTERM


# ------------------------------------------------------------------------------------------------------------
# How many


def test_how_many_ranks_pay(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(distributed.threads, "THREADS", 4)
    choose = distributed.choose_ranks
    assert [choose(None, 1 << 20, "cpu", rows) for rows in (8, 6, 9, 7, 1)] == [4, 3, 3, 1, 1]
    assert choose(None, 1 << 24, "cpu", 8) == 4 and choose(None, (1 << 24) + 1, "cpu", 8) == 1
    assert choose(None, 1 << 20, "cuda", 8) == choose(None, 1 << 20, "reference", 8) == 1
    assert choose(2, 1 << 30, "cpu", 8) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose(None, 1 << 30, "cpu", 8) == 2


def test_ranks_that_do_not_fit_are_refused(monkeypatch):
    assert distributed.choose_ranks(3, 1, "cpu", 6) == 3
    with pytest.raises(UserError, match="--ranks 4 does not divide the 6 rows of an update; 1, 2, 3, 6 do"):
        distributed.choose_ranks(4, 1, "cpu", 6)
    with pytest.raises(UserError, match="only one GPU"):
        distributed.choose_ranks(2, 1, "cuda", 6)
    assert distributed.start(1, "script.py", []).size == 1
    with pytest.raises(UserError, match="--ranks 2, but WORLD_SIZE is 1"):
        distributed.start(2, "script.py", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="starts its ranks itself: unset RANK, give --ranks"):
        distributed.start(2, "script.py", [])


# ------------------------------------------------------------------------------------------------------------
# The end


IMPORTS = """
import os, signal, time
if "RANK" in os.environ:
    time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
"""


def test_ctrl_c_while_ranks_begin_is_one_word(ranks):
    """The others are at their imports; they are gone 5 seconds later, and print no traceback."""
    process = ranks(3, "    print(flush=True)\n    world.barrier()\n", imports=IMPORTS)
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert end_of(process) == (130, "\ninterrupted\n")


FOR_EVER = """
    world.catch_signals()
    pids = world.gather(os.getpid())
    if world.rank == 0:
        print(*pids, flush=True)
    while not world.stop:
        time.sleep(0.01)
        world.barrier()
    sys.exit(128 + world.stop)
"""


@pytest.mark.parametrize("size, killed", [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("working", [False, True])
def test_who_is_killed_takes_the_others_down_with_one_line(ranks, size, killed, working):
    body = FOR_EVER
    if working:  # they are far from the next exchange
        body = body.replace("time.sleep(0.01)", f"time.sleep(0.01 if world.rank == {killed} else 60)")
    process = ranks(size, body)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.2)
    os.kill(pids[killed], signal.SIGKILL)
    status, err = end_of(process, pids)
    assert status == (1 if killed else -signal.SIGKILL)
    assert err == f"error: rank {killed} was killed; the last checkpoint stands, go on with --resume\n"


@pytest.mark.parametrize("name, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("to", [0, 2, "all"])
def test_a_signal_to_one_or_to_all_stops_all(ranks, name, status, to):
    process = ranks(3, FOR_EVER)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.2)
    os.killpg(process.pid, name) if to == "all" else os.kill(pids[to], name)
    ended, err = end_of(process, pids)
    assert ended == status
    assert err.strip() == ("" if to == 2 else "finishing this step; once more to stop at once")


FAILURES = {  # what goes wrong, status of rank 0, and what the user reads
    "all alike": ("raise common.UserError('it is broken')", 2, "error: it is broken\n"),
    "one": ("if world.rank == 2: raise common.UserError('2 is broken')", 1, "error: 2 is broken\n"),
    "the first": ("if world.rank == 0: raise common.UserError('0 is broken')", 2, "error: 0 is broken\n"),
    "full": ("raise OSError(28, 'No space left on device')", 2, "error: No space left on device; free some"),
    "interrupted": ("raise KeyboardInterrupt", 130, "\ninterrupted\n"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_ranks_that_fail_say_so_once_and_end(ranks, what):
    line, status, words = FAILURES[what]
    body = FOR_EVER.replace("    while", "    world.barrier()\n    " + line + "\n    while")
    process = ranks(3, body)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    ended, err = end_of(process, pids)
    assert ended == status and err.startswith(words) and err.strip().count("\n") == 0, err


def test_a_bug_in_one_rank_is_its_traceback_and_the_end_of_all(ranks):
    line = "if world.rank == 1: raise ZeroDivisionError('a bug')"
    process = ranks(3, FOR_EVER.replace("    while", "    " + line + "\n    while"))
    pids = [int(pid) for pid in process.stdout.readline().split()]
    status, err = end_of(process, pids)
    assert status == 1 and err.count("Traceback") == 1 and err.endswith("ZeroDivisionError: a bug\n")


def test_a_rank_that_ends_early_is_no_killed_one(ranks):
    body = """
    pids = world.gather(os.getpid())
    if world.rank == 0:
        print(*pids, flush=True)
        time.sleep(0.5)  # the last checkpoint
"""
    process = ranks(3, body)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert end_of(process, pids) == (0, "")
