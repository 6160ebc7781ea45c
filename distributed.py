"""Many processes as one: the ranks of a training run, and the little that they say to each other.

Every rank runs the same script on its own rows of the global batch (SPMD). After its backward passes the
ranks add up their gradients (an all-reduce), so that all of them make the same update:

    world = start(ranks, __file__, argv)     # starts the other ranks; in one of these: joins them
    model.share(world)                       # parameters in memory that all ranks see ...
    world.all_reduce(model.sums)             # every rank's sums become the sum over all ranks
    replies = world.gather(my_replies)       # [of rank 0, of rank 1, ...], the same on every rank

With one rank none of this does anything. A small model on a CPU has one rank a core: an operation takes a
fraction of a millisecond there, and waking a second thread for it a tenth of one, sixty times a pass, so two
processes are faster than two threads. Read gpt2.py before this file and train.py after it.
"""

import atexit
import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import common
from common import UserError, say, say_why
from kernels import threads

SMALL = 1 << 24  # parameters: a larger model keeps all cores busy within every operation
ENDED = b"."  # the last word of a rank that was not killed


def choose_ranks(wanted, n_params, device, rows):
    """How many ranks share an update of so many rows: --ranks if given, else as many as pay.

    One a core pays for a small model on a CPU. UserError if each rank would not get as many rows.
    """
    ranks = 1
    if wanted:
        ranks = wanted
    elif "WORLD_SIZE" in os.environ:
        ranks = int(os.environ["WORLD_SIZE"])
    elif device == "cpu" and n_params <= SMALL:
        ranks = max(n for n in range(1, threads.THREADS + 1) if rows % n == 0)
    if rows % ranks:
        divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(f"--ranks {ranks} does not divide the {rows} rows of an update; {divisors} do")
    if ranks > 1 and device == "cuda":
        raise UserError(f"--ranks {ranks}: only one GPU is used so far; leave --ranks out")
    return ranks


# ------------------------------------------------------------------------------------------------------------
# Starting


def start(size, script, argv):
    """Be rank 0 and start the ranks 1 .. size - 1 of `script` with the arguments argv; return the World.

    A process that finds RANK in its environment is a rank already: it joins those that started it.
    """
    if "RANK" in os.environ:
        return _join(size)
    if size == 1:
        return World(0, 1)
    memory = _file_without_name()
    common.first_word = _pipe_with_one_byte()
    sockets, lifelines, processes = [], [], []
    # A new rank inherits that Ctrl-C is ignored, until it calls catch_signals(): rank 0 ends, and it follows.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for rank in range(1, size):
        our_socket, socket_of_rank = socket.socketpair()
        our_lifeline, lifeline_of_rank = socket.socketpair()
        inherited = socket_of_rank.fileno(), lifeline_of_rank.fileno(), memory, common.first_word
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "HANDMADE_FILES": " ".join(map(str, inherited)),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent), *sys.path]),
        }
        command = [sys.executable, str(script), *map(str, sys.argv[1:] if argv is None else argv)]
        processes.append(subprocess.Popen(command, env=environment, pass_fds=inherited))
        socket_of_rank.close()
        lifeline_of_rank.close()
        sockets.append(our_socket)
        lifelines.append(our_lifeline)
    signal.signal(signal.SIGINT, handler)
    return World(0, size, sockets, lifelines, memory, processes)


def _join(size):
    rank, world_size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != size:
        raise UserError(f"--ranks {size}, but WORLD_SIZE is {world_size} here; unset RANK and WORLD_SIZE")
    if size == 1:
        return World(0, 1)
    files = os.environ.get("HANDMADE_FILES")
    if not files:
        raise UserError(
            f"RANK is {rank} here, but a script starts its ranks itself: unset RANK, give --ranks"
        )
    socket_number, lifeline_number, memory, common.first_word = map(int, files.split())
    sockets = [socket.socket(fileno=socket_number)]
    lifelines = [socket.socket(fileno=lifeline_number)]
    return World(rank, size, sockets, lifelines, memory)


def _pipe_with_one_byte():
    """The file number of a pipe: the first rank that reads gets the byte, the others nothing (say_why)."""
    reader, writer = os.pipe()
    os.write(writer, b"!")
    os.close(writer)
    return reader


def _file_without_name():
    """The number of an open file for shared memory, which is gone when the last process has ended."""
    if hasattr(os, "memfd_create"):  # Linux; unlike /dev/shm it is not kept small in a container
        return os.memfd_create("handmade")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class World:
    """The ranks of a run as one of them sees them: it is `rank` of `size`.

    Rank 0 has a socket to each of the others. A second socket, the lifeline, tells when the other process
    ends.
    """

    def __init__(self, rank, size, sockets=(), lifelines=(), memory=None, processes=()):
        self.rank, self.size = rank, size
        self.sockets, self.lifelines, self.memory, self.processes = sockets, lifelines, memory, processes
        self.allocated = 0  # bytes of the shared memory
        self.asked_to_stop = 0  # the signal that this process received: SIGINT, SIGTERM, or 0
        self.stop = 0  # the signal that any rank had received at the last exchange: all ranks have the same
        self.all_sums = None  # (size, n): the sums of every rank
        self.other_ended = threading.Event()
        self.closing = False
        if size > 1:
            threads.THREADS = max(1, threads.THREADS // size)
            threading.Thread(target=self._watch, daemon=True).start()
            atexit.register(self.close)

    # -- exchange ------------------------------------------------------------------------------------------

    def gather(self, value):
        """[value of rank 0, value of rank 1, ...] on every rank; a value is what JSON can say.

        Every rank must call it, in the same order. It is a barrier too, and carries the requests to stop.
        """
        if self.size == 1:
            self.stop = self.asked_to_stop
            return [value]
        mine = [self.asked_to_stop, value]
        if self.rank == 0:
            everyone = [mine] + [self._receive(other) for other in self.sockets]
            for other in self.sockets:
                self._send(other, everyone)
        else:
            self._send(self.sockets[0], mine)
            everyone = self._receive(self.sockets[0])
        self.stop = max(asked for asked, _ in everyone)
        return [value for _, value in everyone]

    def barrier(self):
        """Wait until every rank is here."""
        self.gather(None)

    def all_reduce(self, sums):
        """Let sums (n,), which come from zeros_for_sums(), hold the sum over all ranks, in the order of
        ranks.

        Each rank adds up one part of the buffer and writes the total into everybody's.
        """
        if self.size == 1:
            self.stop = self.asked_to_stop
            return
        self.barrier()  # every rank's sums are complete
        mine = self.part(sums.size)
        total = self.all_sums[0, mine].copy()
        for other in self.all_sums[1:]:
            total += other[mine]
        self.all_sums[:, mine] = total
        self.barrier()  # every part has its total

    def part(self, n):
        """The slice of a flat buffer of n elements that this rank adds up and updates, in multiples of 64."""
        blocks = -(-n // 64)
        start, end = (64 * (blocks * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(start, min(end, n))

    def _send(self, other, value):
        message = json.dumps(value).encode()
        try:
            other.sendall(struct.pack("<Q", len(message)) + message)
        except OSError:
            self._end_with_the_other()

    def _receive(self, other):
        (length,) = struct.unpack("<Q", self._read(other, 8))
        return json.loads(self._read(other, length))

    def _read(self, other, length):
        message = bytearray()
        while len(message) < length:
            try:
                part = other.recv(min(length - len(message), 1 << 20))
            except OSError:
                part = b""
            if not part:
                self._end_with_the_other()
            message += part
        return bytes(message)

    # -- memory --------------------------------------------------------------------------------------------

    def zeros(self, shape, dtype):
        """An array of zeros that all ranks see. Every rank asks for the same arrays, in the same order."""
        n = int(np.prod(shape))
        page = mmap.ALLOCATIONGRANULARITY
        start, length = self.allocated, -(-n * np.dtype(dtype).itemsize // page) * page
        self.allocated += length
        if self.rank == 0:
            os.ftruncate(self.memory, self.allocated)
        self.barrier()  # the file has its length
        return np.frombuffer(mmap.mmap(self.memory, length, offset=start), dtype, count=n).reshape(shape)

    def zeros_for_sums(self, n, dtype):
        """A buffer (n,) of this rank's own that all_reduce() takes."""
        self.all_sums = self.zeros((self.size, n), dtype)
        return self.all_sums[self.rank]

    # -- the end -------------------------------------------------------------------------------------------

    def catch_signals(self):
        """From now on Ctrl-C and SIGTERM ask the loop to end after its step; a second one ends at once."""
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._caught)

    def _caught(self, name, frame):
        if self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = int(name)
        if self.rank == 0:
            say("\nfinishing this step; once more to stop at once")

    def _watch(self):
        """Run in a thread: when another rank is killed, end this process too. Nothing is saved then."""
        watched = list(self.lifelines)
        while watched:
            for lifeline in select.select(watched, [], [])[0]:
                try:
                    last_word = lifeline.recv(1)
                except OSError:
                    last_word = b""
                if last_word == ENDED:
                    self.other_ended.set()
                    watched.remove(lifeline)
                    continue
                if self.closing:  # close() has killed a rank that did not end by itself
                    return
                killed = self.lifelines.index(lifeline) + 1 if self.rank == 0 else 0
                say_why(f"error: rank {killed} was killed; the last checkpoint stands, go on with --resume")
                os._exit(1)

    def _end_with_the_other(self):
        """End, because the other process has: it said why, or it was killed and _watch() says so."""
        self.other_ended.wait(2)
        raise SystemExit(1)

    def close(self):
        """End this rank's part; rank 0 waits for the others, which end when they find that it is gone."""
        self.closing = True
        for lifeline in self.lifelines:
            try:
                lifeline.sendall(ENDED)
            except OSError:  # that rank has ended
                pass
        for other in self.sockets:
            other.close()
        deadline = time.monotonic() + 5
        for process in self.processes:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
