"""Ranks: many processes compute what one computes, to the bit the same in every run; and they end together,
whatever happens to one of them, with one line that says why."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
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


SHARED = """
    def update(shared, kept):  # with the same gradients, but the whole buffer by one rank
        for name in ("flat_params", "flat_grads"):
            getattr(kept.model, name)[:] = getattr(shared.model, name)
        kept.model.loss[:] = shared.model.loss
        world.barrier()
        shared.step(1e-2, 0.5)
        kept.step(1e-2, 0.5)

    config = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=40, vocab_size=50)
    models = [gpt2.GPT2(config) for _ in range(2)]
    models[0].share(world)
    shared, kept = gpt2.AdamW(models[0], world=world), gpt2.AdamW(models[1])
    for row in np.random.default_rng(7).integers(50, size=(4, 5, 9))[:, world.rank]:
        models[0].forward(row[None, :-1], row[None, 1:])
        models[0].backward()
        world.all_reduce(models[0].sums)
        update(shared, kept)
        pairs = (shared.m, kept.m), (shared.v, kept.v), (models[0].flat_params, models[1].flat_params)
        assert all(np.array_equal(one, other) for one, other in pairs)
        world.barrier()
    assert kept.m.any() and world.part(10_000) != slice(0, 10_000)
"""


@pytest.mark.parametrize("n", [2, 4])
def test_an_update_in_parts_has_the_bits_of_a_whole_one(ranks, n):
    """On a CPU ranks always share out the update (ZeRO stage 1)."""
    assert end_of(ranks(n, SHARED)) == (0, "")


EMULATOR = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import emulator; emulator.install()\n"
ON_GPUS = """
    config = gpt2.GPT2Config(n_layer=1, n_head=3, n_embd=21, n_positions=20, vocab_size=61)
    model = gpt2.GPT2(config, "cuda", "DTYPE", seed=3 + world.rank)  # all take rank 0's parameters
    model.share(world, zero=ZERO)
    optimizer, host, curve = gpt2.AdamW(model, world=world), model.ops.to_host, []
    for block in np.random.default_rng(7).integers(61, size=(2, 2, 9)).astype(np.int32):
        for row in block[world.rank :: world.size]:
            model.forward(row[None, :-1], row[None, 1:], np.full((1, 8), 1 / 16))
            model.backward()
        world.all_reduce(model.sums)
        norm = optimizer.step(1e-2, 0.5)
        curve.append([float(host(value)[0]) for value in (optimizer.loss, norm)])
        assert not host(model.sums).any(), "a step leaves gradients or loss behind"
    optimizer.collect()
    parts = len(optimizer.m), len(model.flat_master)
    if world.rank == 0:
        model.save_pretrained("OUT")
        optimizer.save("OUT/optimizer.safetensors")
    world.barrier()
    curves = world.gather([curve, parts, len(model.flat_grads)])
    if world.rank == 0:
        print(json.dumps(curves))
"""


@pytest.mark.parametrize("dtype, zero, tolerance", [("float32", False, 1e-5), ("bfloat16", True, 2e-3)])
def test_gpus_make_the_updates_of_one_and_its_files(ranks, tmp_path, dtype, zero, tolerance):
    """With the emulator's NCCL: it has never run on two GPUs."""
    curves, files = [], []
    for n in (1, 2):
        body = ON_GPUS.replace("DTYPE", dtype).replace("ZERO", str(zero))
        text, err = ranks(n, body.replace("OUT", str(tmp_path)), imports=EMULATOR).communicate(timeout=300)
        assert err == ""
        everyone = json.loads(text)
        curve, parts, length = everyone[0]
        assert all(one == everyone[0] for one in everyone), "ranks disagree"
        assert parts == [length // n if zero else length] * 2, "moments and master weights are not shared out"
        curves.append(curve)
        files.append([safetensors.numpy.load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))])
    np.testing.assert_allclose(*curves, rtol=tolerance)
    for one, other in zip(*files, strict=True):
        assert one.keys() == other.keys() and all(one[name].shape == other[name].shape for name in one)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=20 * tolerance, err_msg=name)


def test_two_ranks_do_not_share_a_gpu(ranks, monkeypatch):
    monkeypatch.setenv("EMULATOR_BUS", "0000:01:00.0")
    status, err = end_of(
        ranks(2, ON_GPUS.replace("ZERO", "False").replace("DTYPE", "float32"), imports=EMULATOR)
    )
    assert status in (1, 2) and err.startswith("error: rank 0 and rank 1 have the same GPU"), err
    assert "more ranks than GPUs" in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# Launchers


def port():
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def launched(tmp_path):
    """launched(body, [(variables of rank 0, its flags), ...]): processes as a launcher starts them."""
    started = []

    def start(body, ranks, imports="", size=None):
        path = tmp_path / "script.py"
        path.write_text(imports + BEGIN + body + END)
        for variables, flags in ranks:
            environment = script.environment(PYTHONPATH=str(ROOT), **variables)
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
            command = [sys.executable, path, str(size or len(ranks)), *flags]
            started.append(subprocess.Popen(command, env=environment, **pipes))
        return started

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def variables(launcher, rank, size, at):
    """What a launcher tells a rank."""
    names = distributed.LAUNCHERS[launcher]
    told = dict(zip(names, map(str, (rank, size, rank))))
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(at)}
    own = {
        "torchrun": address | {"TORCHELASTIC_USE_AGENT_STORE": "False"},
        "mpirun": {"OMPI_COMM_WORLD_LOCAL_SIZE": str(size), "MASTER_PORT": str(at)},
        "srun": {"SLURM_STEP_NODELIST": "localhost,other[03-05]", "MASTER_PORT": str(at)},
    }
    return told | own[launcher]


SUM = """
    sums = world.zeros_for_sums(100, np.float32)
    sums[:] = world.rank + 1
    world.all_reduce(sums)
    print(json.dumps([world.rank, world.size, sums.sum().item(), os.environ["LOCAL_RANK"]]))
"""


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "srun"])
def test_ranks_of_a_launcher_find_each_other(launched, launcher):
    at = port()
    processes = launched(SUM, [(variables(launcher, rank, 2, at), []) for rank in range(2)])
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=60)
        assert err == "" and json.loads(out) == [rank, 2, 300, str(rank)]


def test_the_first_node_of_slurms_list():
    lists = ["gpu[03-05,9],login", "gpu7", "a-b[1,3]", "node1,node2", "gpu-[001-128]"]
    assert [distributed.first_node(nodes) for nodes in lists] == ["gpu03", "gpu7", "a-b1", "node1", "gpu-001"]


def test_a_launcher_of_one_process_is_none():
    for launcher in ("mpirun", "srun"):
        told = variables(launcher, 0, 1, 1)
        distributed.adopt_launcher(told)
        assert "RANK" not in told
    told = dict(SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_LOCALID="0")  # sbatch's own script, without srun
    distributed.adopt_launcher(told)
    assert "RANK" not in told


def test_gpus_of_a_launcher(launched, tmp_path):
    at, body = (
        port(),
        ON_GPUS.replace("ZERO", "True").replace("DTYPE", "float32").replace("OUT", str(tmp_path)),
    )
    processes = launched(body, [(variables("torchrun", r, 2, at), []) for r in range(2)], imports=EMULATOR)
    assert [process.communicate(timeout=120)[1] for process in processes] == ["", ""]


def test_ranks_with_other_flags_are_told_so_by_one_line(launched):
    at = port()
    flags = [["--lr", "1"], ["--lr", "2"], ["--lr", "1"]]
    processes = launched(SUM, [(variables("torchrun", r, 3, at), flags[r]) for r in range(3)])
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2, 2]
    wanted = "error: rank 1 has other flags than rank 0 (3 --lr 2; 3 --lr 1); start all with the same\n"
    assert sorted(said) == ["", "", wanted]


def test_a_stranger_at_the_port_is_no_rank(launched):
    at = port()
    (first,) = launched(SUM, [(variables("torchrun", 0, 2, at), [])], size=2)
    for message in (b"5", b"[1, 2]", b"GET / HTTP/1.1"):
        deadline = time.monotonic() + 30
        while True:  # until rank 0 listens
            try:
                stranger = socket.create_connection(("localhost", at))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with stranger:
            stranger.sendall(struct.pack("<Q", len(message)) + message)
    second = launched(SUM, [(variables("torchrun", 1, 2, at), [])], size=2)[-1]
    for rank, process in enumerate((first, second)):
        out, err = process.communicate(timeout=60)
        assert err == "" and json.loads(out)[:3] == [rank, 2, 300]


def test_a_port_that_is_taken_is_one_clear_line(launched):
    with socket.create_server(("", 0)) as server:
        at = server.getsockname()[1]
        (process,) = launched(SUM, [(variables("torchrun", 0, 2, at), [])], size=2)
        status, err = end_of(process)
    assert status == 2
    assert err.startswith(f"error: rank 0 cannot listen at port {at}") and "set another MASTER_PORT" in err


def test_ranks_on_cpus_of_several_machines_are_refused(launched):
    """They share no memory; but what they say to each other reaches all."""
    elsewhere = "import os, distributed\ndistributed._machine = lambda: os.environ['RANK']\n"
    at, body = port(), "    print(world.gather(world.rank + 5), flush=True)\n" + SUM
    told = [(variables("torchrun", rank, 2, at), []) for rank in range(2)]
    (out, err), (other_out, other_err) = (p.communicate(timeout=60) for p in launched(body, told, elsewhere))
    assert out == other_out == "[5, 6]\n" and err == ""
    assert (
        other_err == "error: ranks on a CPU share memory: start all on one machine, or take --device cuda\n"
    )


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_of_a_launcher_takes_the_others_down(launched, killed):
    at = port()
    body = FOR_EVER.replace("time.sleep(0.01)", f"time.sleep(0.01 if world.rank == {killed} else 60)")
    processes = launched(body, [(variables("srun", rank, 2, at), []) for rank in range(2)])
    processes[0].stdout.readline()
    time.sleep(0.2)
    processes[killed].kill()
    status, err = end_of(processes[1 - killed], [processes[1 - killed].pid])
    assert status == 1
    assert err == f"error: rank {killed} was killed; the last checkpoint stands, go on with --resume\n"


def test_a_signal_that_a_launcher_passes_on_is_no_second_one(launched):
    at, body = port(), FOR_EVER.replace("time.sleep(0.01)", "time.sleep(0.5)")
    processes = launched(body, [(variables("torchrun", rank, 2, at), []) for rank in range(2)])
    processes[0].stdout.readline()
    time.sleep(0.2)
    for name in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        for process in processes:
            process.send_signal(name)
        time.sleep(0.05)
    assert [end_of(process)[0] for process in processes] == [143, 143]


@pytest.mark.parametrize("hanging", [0, 1, 2])
def test_a_rank_that_hangs_is_named_and_all_end(ranks, hanging):
    """Whether its process is stopped, or it waits for ever; the others wait for rank 0 twice as long."""
    body = FOR_EVER.replace("        world.barrier()", "        world.barrier()\n        HANG")
    body = body.replace("HANG", f"os.kill(os.getpid(), signal.SIGSTOP) if world.rank == {hanging} else None")
    process = ranks(3, "    pass\n" + body, imports="import distributed\ndistributed.HANG_SECONDS = 1\n")
    pids = [int(pid) for pid in process.stdout.readline().split()]
    if hanging:
        status, err = end_of(process, pids)
        assert status == 1
    else:  # nobody is there to wait for the process that the test has started, but itself
        deadline = time.monotonic() + 20
        while any(map(alive, pids[1:])) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, pids[1:]))
        process.kill()
        err = process.communicate()[1]
    seconds = "1 seconds" if hanging else "2 seconds"
    assert err.startswith(f"error: rank {hanging} hangs: nothing came from it for {seconds}"), err
    assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# How many


def test_how_many_ranks_pay(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(distributed.threads, "THREADS", 4)
    choose = distributed.choose_ranks
    assert [choose(None, 1 << 20, "cpu", rows) for rows in (8, 6, 9, 7, 1)] == [4, 3, 3, 1, 1]
    assert choose(None, 1 << 24, "cpu", 8) == 4 and choose(None, (1 << 24) + 1, "cpu", 8) == 1
    assert choose(None, 1 << 20, "reference", 8) == 1
    monkeypatch.setattr(distributed, "gpu_count", lambda: 4)
    assert [choose(None, 1 << 30, "cuda", rows) for rows in (512, 6, 1)] == [4, 3, 1]
    assert choose(2, 1 << 30, "cpu", 8) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose(None, 1 << 30, "cpu", 8) == 2


def test_ranks_that_do_not_fit_are_refused(monkeypatch):
    assert distributed.choose_ranks(3, 1, "cpu", 6) == 3
    with pytest.raises(UserError, match="--ranks 4 does not divide the 6 rows of an update; 1, 2, 3, 6 do"):
        distributed.choose_ranks(4, 1, "cpu", 6)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(distributed, "gpu_count", lambda: 2)
    with pytest.raises(UserError, match="--ranks 3 are more than the GPUs here; give --ranks 2 or fewer"):
        distributed.choose_ranks(3, 1, "cuda", 6)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.start(1, "script.py", []).size == 1
    with pytest.raises(UserError, match="--ranks 2, but WORLD_SIZE is 1"):
        distributed.start(2, "script.py", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="MASTER_ADDR does not say where rank 0 is"):
        distributed.start(2, "script.py", [])


# ------------------------------------------------------------------------------------------------------------
# The end


IMPORTS = """
import os, signal, time
if "RANK" in os.environ:
    print(flush=True)
    time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
"""


def test_ctrl_c_while_ranks_begin_is_one_word(ranks):
    """The others are at their imports; they are gone 5 seconds later, and print no traceback."""
    process = ranks(3, "", imports=IMPORTS)
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
