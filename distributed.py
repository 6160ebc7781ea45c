"""Many processes as one: the ranks of a training run, and the little that they say to each other.

Every rank runs the same script on its own rows of the global batch (SPMD). After its backward passes the
ranks add up their gradients (an all-reduce), so that all of them make the same update:

    world = start(ranks, __file__, argv)     # starts the other ranks; in one of these: joins them
    model.share(world)                       # the same parameters on every rank
    world.all_reduce(model.sums)             # every rank's sums become the sum over all ranks
    world.all_gather(model.flat_params)      # after the update: what each rank has updated, on all of them
    replies = world.gather(my_replies)       # [of rank 0, of rank 1, ...], the same on every rank

With one rank none of this does anything. On GPUs there is one rank a GPU, and NCCL moves the arrays. On a CPU
the ranks share memory, one rank a core for a small model: an operation takes a fraction of a millisecond
there, and waking a second thread for it a tenth of one, sixty times a pass, so two processes are faster than
two threads. All else is the same code: how ranks find each other, who updates what, stopping and failing.
The few calls of NCCL (the class Nccl) have run with one rank on an H200, and with several in the emulator
alone: never on two GPUs.

A script starts its ranks itself, on one machine. torchrun, mpirun and srun start them on one or on several;
then the launcher's environment variables say which rank a process is, and where rank 0 listens. Read train.py
before this file.
"""

import atexit
import contextlib
import json
import mmap
import os
import re
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
import kernels
from common import UserError, say, say_why
from kernels import threads

SMALL = 1 << 24  # parameters: a larger model keeps all cores busy within every operation
BLOCK = 64  # elements: the parts of ranks begin at multiples, where a GPU reads 16 bytes at once
JOIN_SECONDS = 300  # until every rank must have come: the nodes of a job begin at different times
HANG_SECONDS = 900  # that rank 0 waits for another, and they twice as long for it: checkpoints take minutes
ENDED, FAILED = b".", b"!"  # the last byte of a rank: it has ended; or all must end at once, and why was said

# What the launchers call a process's rank, the number of all, and its rank among those of its machine.
# sbatch sets SLURM_PROCID and SLURM_NTASKS for its own script too, SLURM_STEP_NUM_TASKS is srun's alone.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def adopt_launcher(environment):
    """Copy the variables of mpirun and srun to those of torchrun, the only ones that are read below.

    A launcher of a single process does not count: in the shell of `srun bash` scripts start their own ranks.
    """
    for launcher in ("mpirun", "srun"):
        numbers = [environment.get(name) for name in LAUNCHERS[launcher]]
        if "RANK" in environment or None in numbers or numbers[1] == "1":
            continue
        environment.update(zip(LAUNCHERS["torchrun"], numbers))
        if launcher == "srun":
            nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
            environment.setdefault("MASTER_ADDR", first_node(nodes))
        elif numbers[1] == environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"):  # all on this machine
            environment.setdefault("MASTER_ADDR", "127.0.0.1")


def first_node(nodes):
    """The first host of Slurm's list: "gpu[03-05,9],login" -> "gpu03"."""
    name, numbers = re.match(r"([^,\[]*)(?:\[(\w+))?", nodes).groups()
    return name + (numbers or "")


adopt_launcher(os.environ)


def gpu_count():
    """How many GPUs CuPy sees."""
    return kernels.load("cuda").xp.cuda.runtime.getDeviceCount()


def choose_ranks(wanted, n_params, device, rows):
    """How many ranks share an update of so many rows: --ranks if given, else as many as make it faster.

    That is one a GPU, and on a CPU one a core for a small model. UserError if the ranks do not divide the
    rows, or if there are fewer GPUs.
    """
    launched = "WORLD_SIZE" in os.environ
    gpus = gpu_count() if device == "cuda" else 0
    ranks = 1
    if wanted:
        ranks = wanted
    elif launched:
        ranks = int(os.environ["WORLD_SIZE"])
    elif device == "cuda" or (device == "cpu" and n_params <= SMALL):
        most = gpus or threads.THREADS
        ranks = max(n for n in range(1, most + 1) if rows % n == 0)
    if rows % ranks:
        divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(f"--ranks {ranks} does not divide the {rows} rows of an update; {divisors} do")
    if gpus and ranks > gpus and not launched:
        raise UserError(f"--ranks {ranks} are more than the GPUs here; give --ranks {gpus} or fewer")
    return ranks


# ------------------------------------------------------------------------------------------------------------
# Starting, and finding each other


def start(size, script, argv):
    """Be rank 0 and start the ranks 1 .. size - 1 of `script` with the arguments argv; return the World.

    A process that finds RANK in its environment is a rank already: it joins those that were started with it.
    """
    arguments = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    launched = "RANK" in os.environ
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", size))
    if world_size != size:
        remedy = f"give --ranks {world_size}, or unset RANK and WORLD_SIZE"
        raise UserError(f"--ranks {size}, but WORLD_SIZE is {world_size} here; {remedy}")
    if size == 1:
        return World(0, 1)
    if rank > 0:
        return _join(rank, size, arguments)
    server = _listen(_address()[1]) if launched else socket.create_server(("127.0.0.1", 0))
    memory = _file_without_name()
    common.error_pipe = _pipe_with_one_byte()
    folder = f"/proc/{os.getpid()}/fd" if launched else "/dev/fd"  # ranks started here inherit the files
    files = [f"{folder}/{number}" for number in (memory, common.error_pipe)]
    processes = []
    try:
        if not launched:
            with common.ctrl_c_waits():  # the others never get Ctrl-C while they start: they end with rank 0
                for other in range(1, size):
                    processes.append(_start_process(other, size, script, arguments, server, memory))
        sockets, lifelines = _welcome(server, size, arguments, files, processes)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    server.close()
    return World(0, size, sockets, lifelines, memory, processes)


def _start_process(rank, size, script, arguments, server, memory):
    """Start a rank above 0, on this machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": server.getsockname()[1]}
    environment = os.environ | {name: str(number) for name, number in numbers.items()}
    environment |= {
        "MASTER_ADDR": "127.0.0.1",
        "STARTED_BY_RANK_0": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent), *sys.path]),
    }
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(command, env=environment, pass_fds=(memory, common.error_pipe))


def _address():
    """(host, port) at which rank 0 listens, as the launcher's variables say."""
    host, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "29500"))
    if not host:
        raise UserError(
            f"RANK is {os.environ['RANK']} here, but MASTER_ADDR does not say where rank 0 is; set it, or "
            "unset RANK and WORLD_SIZE: a script starts its ranks itself"
        )
    # torchrun may listen at this port itself; the next one is ours then.
    return host, port + (os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def _listen(port):
    try:
        return socket.create_server(("", port))
    except OSError as error:
        what = f"rank 0 cannot listen at port {port} ({error.strerror})"
        raise UserError(f"{what}; set another MASTER_PORT") from None


def _welcome(server, size, arguments, files, processes):
    """Rank 0: wait until all others have come; return the sockets and the lifelines to ranks 1 .. size - 1.

    If not all come, or one has other flags, all that are here end with the same UserError.
    """
    connections, settings, error = {}, {}, None  # {(rank, kind): connection}, {rank: (size, arguments)}
    everyone = {(rank, kind) for rank in range(1, size) for kind in ("socket", "lifeline")}
    deadline = time.monotonic() + JOIN_SECONDS
    server.settimeout(0.1)
    while everyone - connections.keys() and error is None:
        for rank, process in enumerate(processes, 1):
            if process.poll() is None:
                continue
            if process.returncode > 0:  # it said why
                raise SystemExit(1)
            error = f"rank {rank} was killed"
        if time.monotonic() > deadline:
            rank = min(everyone - connections.keys())[0]
            what = f"rank {rank} of {size} did not come within {JOIN_SECONDS} seconds"
            error = f"{what}; start all ranks together"
        try:
            connection, _ = server.accept()
            connection.settimeout(5)
            rank, kind, its_size, its_arguments = _receive(connection)
        except (OSError, ValueError, TypeError):  # nobody came, or it was no rank
            continue
        connections[rank, kind] = connection
        settings[rank] = its_size, its_arguments
    for rank, (its_size, its_arguments) in sorted(settings.items()):
        if its_size != size:
            error = f"rank {rank} is of {its_size} ranks, rank 0 of {size}; start all with the same number"
        elif its_arguments != arguments:
            its_flags, flags = " ".join(its_arguments) or "none", " ".join(arguments) or "none"
            error = f"rank {rank} has other flags than rank 0 ({its_flags}; {flags}); start all with the same"
    for (_, kind), connection in connections.items():
        if kind == "socket" and not (error and processes):  # those that were started here are killed
            with contextlib.suppress(OSError):  # the rank has ended: the World will find out
                _send(connection, [error, _machine(), files])
    if error:
        raise UserError(error)
    return [[connections[rank, kind] for rank in range(1, size)] for kind in ("socket", "lifeline")]


def _join(rank, size, arguments):
    """Any other rank: connect to rank 0; return the World."""
    connections = []
    try:
        for kind in ("socket", "lifeline"):
            connections.append(_connect(*_address()))
            _send(connections[-1], [rank, kind, size, arguments])
        connections[0].settimeout(2 * JOIN_SECONDS)
        error, machine, files = _receive(connections[0])
    except OSError:
        raise SystemExit(1) from None  # rank 0 has ended and said why
    memory = None
    if machine == _machine():
        with contextlib.suppress(OSError):  # a machine may hide one process's files from another
            memory, common.error_pipe = os.open(files[0], os.O_RDWR), os.open(files[1], os.O_RDONLY)
    if error:
        raise UserError(error)
    return World(rank, size, connections[:1], connections[1:], memory)


def _connect(host, port):
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return socket.create_connection((host, port), timeout=5)
        except OSError as error:
            if "STARTED_BY_RANK_0" in os.environ:
                raise SystemExit(1) from None  # it listened before this process was started: it has ended
            if time.monotonic() > deadline:
                what = f"rank 0 does not answer at {host}, port {port} ({error})"
                raise UserError(f"{what}; see MASTER_ADDR, MASTER_PORT, and whether it runs") from None
            time.sleep(0.1)


def _machine():
    """A name for the system that this process runs in, the same for all processes that see each other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _send(connection, value):
    """Send what JSON can say, after its length in bytes."""
    message = json.dumps(value).encode()
    connection.sendall(struct.pack("<Q", len(message)) + message)


def _receive(connection):
    """Return what the other end has sent with _send(); OSError if that has ended or is silent too long."""
    (length,) = struct.unpack("<Q", _read(connection, 8))
    return json.loads(_read(connection, length))


def _read(connection, length):
    message = bytearray()
    while len(message) < length:
        part = connection.recv(min(length - len(message), 1 << 20))
        if not part:
            raise ConnectionError
        message += part
    return bytes(message)


def _pipe_with_one_byte():
    """The file number of a pipe: only the first rank that reads from it gets the byte (common.say_why)."""
    reader, writer = os.pipe()
    os.write(writer, b"!")
    os.close(writer)
    return reader


def _file_without_name():
    """The number of an open file for shared memory; the file is gone when the last process has ended."""
    if hasattr(os, "memfd_create"):  # Linux; unlike /dev/shm it is not kept small in a container
        return os.memfd_create("handmade")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# ------------------------------------------------------------------------------------------------------------
# Being one of them


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
        self.asked_at = 0.0  # seconds
        self.launched = size > 1 and not processes and "STARTED_BY_RANK_0" not in os.environ
        self.stop = 0  # the signal that any rank had received at the last exchange: all ranks have the same
        self.all_sums = None  # (size, n): the sums of every rank, on a CPU
        self.nccl, self.zero = None, False  # on GPUs; with --zero each keeps the moments of its part alone
        self.other_ended = threading.Event()
        self.closing = False
        if size > 1:
            threads.THREADS = max(1, threads.THREADS // size)
            for connection in (*sockets, *lifelines):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # messages are short
                connection.settimeout(None)
            for connection in sockets:  # while rank 0 waits for one rank, the others wait for rank 0
                connection.settimeout(HANG_SECONDS if rank == 0 else 2 * HANG_SECONDS)
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
            everyone = [mine] + [self._receive_from(rank) for rank in range(1, self.size)]
            for rank in range(1, self.size):
                self._send_to(rank, everyone)
        else:
            self._send_to(0, mine)
            everyone = self._receive_from(0)
        self.stop = max(asked for asked, _ in everyone)
        return [value for _, value in everyone]

    def barrier(self):
        """Wait until every rank is here."""
        self.gather(None)

    def _send_to(self, rank, value):
        try:
            _send(self.sockets[max(0, rank - 1)], value)
        except OSError:
            self._abort()

    def _receive_from(self, rank):
        """What another rank sends: its part of an exchange."""
        connection = self.sockets[max(0, rank - 1)]
        try:
            return _receive(connection)
        except TimeoutError:
            self._abort_all(
                f"rank {rank} hangs: nothing came from it for {connection.gettimeout():.0f} seconds"
            )
        except OSError:
            self._abort()

    # -- sums and shares -----------------------------------------------------------------------------------

    def part(self, n):
        """The slice of a flat buffer of n elements that this rank updates, in multiples of 64.

        On GPUs without --zero every rank has all parameters and moments, and updates them all.
        """
        if self.nccl and not self.zero:
            return slice(0, n)
        blocks = -(-n // BLOCK)
        start, end = (BLOCK * (blocks * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(start, min(end, n))

    def all_reduce(self, sums):
        """Let sums (n,) hold the sum over all ranks, and exchange the requests to stop.

        On a CPU the buffer comes from zeros_for_sums(): each rank adds up one part of all ranks' buffers, in
        the order of ranks, and writes the total into all of them. With --zero a rank gets the sums of its
        part alone, and those of the last 64 elements, where the loss is.
        """
        self.barrier()  # on a CPU: every rank's sums are complete
        if self.size == 1:
            return
        if self.nccl and self.zero:
            self.nccl.reduce_scatter(sums[:-BLOCK])
            self.nccl.all_reduce(sums[-BLOCK:])
        elif self.nccl:
            self.nccl.all_reduce(sums)
        else:
            mine = self.part(sums.size)
            total = self.all_sums[0, mine].copy()
            for other in self.all_sums[1:]:
                total += other[mine]
            self.all_sums[:, mine] = total
            self.barrier()  # every part has its total

    def all_gather(self, array):
        """Copy each rank's part of a flat buffer to all ranks."""
        if self.nccl and self.zero:
            self.nccl.all_gather(array)
        elif not self.nccl:
            self.barrier()  # on a CPU the buffer is shared: every part is written now

    def use_gpus(self, ops, zero=False):
        """From now on NCCL sums over GPUs. With zero a rank keeps the moments of its part alone."""
        self.nccl, self.zero = Nccl(self, ops), zero

    def zeros(self, shape, dtype):
        """An array of zeros that all ranks of a CPU see. Every rank asks for the same, in the same order."""
        if self.memory is None:
            raise UserError("ranks on a CPU share memory: start all on one machine, or take --device cuda")
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

    def _caught(self, name, frame):
        if self.asked_to_stop:
            if self.launched and time.monotonic() - self.asked_at < 5:
                return  # the same request: a launcher passes on a signal that all ranks have got already
            raise KeyboardInterrupt
        self.asked_to_stop, self.asked_at = int(name), time.monotonic()
        if self.rank == 0:
            say("\nfinishing this step; once more to stop at once")

    def _watch(self):
        """What a thread does: when another rank is killed, end this process too. Nothing is saved then."""
        watched = list(self.lifelines)
        while watched:
            for lifeline in select.select(watched, [], [])[0]:
                try:
                    last_byte = lifeline.recv(1)
                except OSError:
                    last_byte = b""
                if last_byte == FAILED:
                    os._exit(1)
                if last_byte == ENDED:
                    self.other_ended.set()
                    watched.remove(lifeline)
                    continue
                if self.closing:  # close() has killed a rank that did not end by itself
                    return
                killed = self.lifelines.index(lifeline) + 1 if self.rank == 0 else 0
                self._abort_all(f"rank {killed} was killed")
        if self.rank > 0:
            time.sleep(30)
            os._exit(1)  # rank 0 has ended, and this one hangs

    def _send_last_byte(self, byte):
        """Send ENDED or FAILED to the ranks that this one is connected with."""
        for lifeline in self.lifelines:
            with contextlib.suppress(OSError):  # that rank has ended
                lifeline.sendall(byte)

    def _abort_all(self, why):
        """End all ranks at once. Nothing is saved, since an update may be half done."""
        say_why(f"error: {why}; the last checkpoint stands, go on with --resume")
        self._send_last_byte(FAILED)
        for process in self.processes:
            process.kill()
        os._exit(1)

    def _abort(self):
        """End, because the other rank has ended: it has said why, or _watch() says that it was killed."""
        self.other_ended.wait(2)
        raise SystemExit(1)

    def close(self):
        """End this rank's part; rank 0 waits for the others, which end when they find that it is gone."""
        self.closing = True
        self._send_last_byte(ENDED)
        for other in self.sockets:
            other.close()
        deadline = time.monotonic() + 5
        if self.nccl:
            self.nccl.close(deadline)
        for process in self.processes:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


NCCL_TYPES, NCCL_SUM = {"float32": 7, "bfloat16": 9}, 0  # of nccl.h; CuPy has no name for bfloat16


class Nccl:
    """Sums and shares of arrays on the GPUs of all ranks, by NVIDIA's NCCL, on the stream that computes.

    Each call only queues the work: the host waits for nothing. The arrays are flat.
    """

    def __init__(self, world, ops):
        from cupy.cuda import nccl  # noqa: PLC0415  a CPU has no CuPy

        if not nccl.available:
            raise UserError("several GPUs need NCCL: python -m pip install nvidia-nccl-cu13 (or -cu12)")
        gpus = world.gather([_machine(), ops.DEVICE.pci_bus_id])
        for rank, gpu in enumerate(gpus):
            if gpu in gpus[:rank]:
                ranks = f"rank {gpus.index(gpu)} and rank {rank} have the same GPU"
                raise UserError(f"{ranks}: there are more ranks than GPUs; start one a GPU")
        unique_id = world.gather(list(nccl.get_unique_id()) if world.rank == 0 else None)[0]
        self.rank, self.size, self.current_stream = world.rank, world.size, ops.xp.cuda.get_current_stream
        self.comm = nccl.NcclCommunicator(world.size, bytes(unique_id), world.rank)

    def all_reduce(self, array):
        """array becomes its sum over all ranks."""
        self._queue(self.comm.allReduce, array, array, array.size, NCCL_SUM)

    def reduce_scatter(self, array):
        """This rank's part of array, one of `size` equal ones, becomes its sum over all ranks."""
        part = self._part(array)
        self._queue(self.comm.reduceScatter, array, part, part.size, NCCL_SUM)

    def all_gather(self, array):
        """Each rank's part of array goes to all ranks."""
        part = self._part(array)
        self._queue(self.comm.allGather, part, array, part.size)

    def broadcast(self, array):
        """array becomes rank 0's."""
        self._queue(self.comm.broadcast, array, array, array.size, 0)

    def _queue(self, call, source, target, n, *more):
        dtype, stream = NCCL_TYPES[source.dtype.name], self.current_stream()
        call(source.data.ptr, target.data.ptr, n, dtype, *more, stream.ptr)

    def _part(self, array):
        n = array.size // self.size
        return array[self.rank * n : (self.rank + 1) * n]

    def close(self, deadline):
        """Abort what other ranks will never take part in: the process could not end while it is queued."""
        while not self.current_stream().done and time.monotonic() < deadline:
            time.sleep(0.01)
        self.comm.abort()
