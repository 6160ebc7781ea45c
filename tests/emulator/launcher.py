"""Guarded memory and launches: what stands between fake_cupy.py and the compiled kernels.

Everything that a GPU would not notice is an error here, with the kernel's name: wrong arguments, a bad grid,
too much shared memory, an access outside an array, a deadlock.
"""

import bisect
import collections
import ctypes
import functools
import os
import re
import signal
import struct
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from . import compiler

MAX_THREADS = 1024
STACK_BYTES = (1 << 20) if compiler.SANITIZE else (1 << 17)
SHARED_GUARD, SHARED_STRIDE = 0x10000, 0x60000  # as in emulator.h
STATIC_SHARED_LIMIT = 48 * 1024  # and of dynamic shared memory, until the kernel's attribute is raised
OPTIN_SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227}  # KB, by compute capability


MAP_MAGIC = 0x50414D524F534E54  # as in tensor_map.h

launched = collections.Counter()  # {(stem of the .cu file, kernel with its template's arguments): launches}


def report():
    """What this process ran of the project's kernels, a line for each file: a list of lines, or none."""
    lines, total, KERNELS = [], [0, 0, 0, 0], Path(__file__).parents[2] / "kernels"
    for path in sorted(KERNELS.glob("*.cu")):
        runs = {name: n for (file, name), n in launched.items() if file == path.stem}
        ran = {name.partition("<")[0] for name in runs}
        row = (
            len(ran),
            len(compiler.kernel_names(path.read_text(), plain=False)),
            len(runs),
            sum(runs.values()),
        )
        lines.append("{:>4} of {:<3} {:8}  {:8}  ".format(*row) + path.name)
        total = [a + b for a, b in zip(total, row)]
    if not total[-1]:
        return []
    what = "{} of {} kernels in {} variants (templates, tiles), {:,} launches".format(*total)
    return [f"   kernels variants  launches  ran in the emulator: {what}", *lines]


class KernelError(RuntimeError):
    """A kernel did what it must not do; the message says which, where and what."""


# ------------------------------------------------------------------------------- the structures of emulator.h


class _Failure(ctypes.Structure):
    _fields_ = [
        ("failed", ctypes.c_int),
        ("signal", ctypes.c_int),
        ("block", ctypes.c_uint * 3),
        ("thread", ctypes.c_uint * 3),
        ("address", ctypes.c_void_p),
        ("instruction", ctypes.c_void_p),
        ("message", ctypes.c_char * 2048),
    ]


class _Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("invoke", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint64),
        ("dynamic_bytes", ctypes.c_uint64),
        ("order", ctypes.c_int64),
        ("next_block", ctypes.c_void_p),
        ("stacks", ctypes.c_void_p),
        ("stack_bytes", ctypes.c_uint64),
        ("shared", ctypes.c_void_p),
        ("shared_count", ctypes.c_int64),
        ("lowest", ctypes.c_void_p),
        ("highest", ctypes.c_void_p),
        ("failure", ctypes.c_void_p),
        ("enter", ctypes.c_void_p),
        ("leave", ctypes.c_void_p),
        ("find_array", ctypes.c_void_p),
        ("adding", ctypes.c_void_p),
        ("copies", ctypes.c_int64),
    ]


class _Parameter(ctypes.Structure):
    _fields_ = [
        ("pointer", ctypes.c_char),
        ("constant", ctypes.c_char),
        ("kind", ctypes.c_char),
        ("padding", ctypes.c_char),
        ("bytes", ctypes.c_int),
    ]

    def __str__(self):
        bits = 8 * self.bytes
        name = {
            "f": "float" if bits == 32 else "double",
            "i": f"int{bits}",
            "u": f"uint{bits}",
            "b": "bf16",
            "o": "bool",
            "v": "byte",
            "s": f"a struct of {self.bytes} bytes",
        }[self.kind.decode()]
        return ("const " if ord(self.constant) else "") + name + ("*" if ord(self.pointer) else "")


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_void_p),
        ("invoke", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("parameters", _Parameter * 64),
    ]


# ----------------------------------------------------------------------------------------------------- memory


@functools.cache
def runtime():
    """The compiled runtime.cpp."""
    library = ctypes.CDLL(str(compiler.compile_runtime()))
    library.emulator_allocate.restype = ctypes.c_void_p
    library.emulator_allocate.argtypes = [ctypes.c_uint64]
    library.emulator_release.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.emulator_intact.restype = ctypes.c_int64
    library.emulator_intact.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.emulator_find.restype = ctypes.c_int
    library.emulator_stacks.restype = ctypes.c_void_p
    library.emulator_stacks.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    return library


class Memory:
    """One allocation, filled with 0xff (NaN), between pages that cannot be touched."""

    live = {}  # address: bytes of every allocation  # noqa: RUF012
    objects = weakref.WeakValueDictionary()  # address: the Memory  # noqa: RUF012
    in_use = 0

    def __init__(self, n_bytes):
        self.bytes = int(n_bytes)
        self.address = runtime().emulator_allocate(self.bytes)
        if not self.address:
            raise MemoryError(f"no room for {self.bytes} bytes")
        if self.bytes > 4096:
            ctypes.memset(self.address, 0xFF, self.bytes)
        Memory.live[self.address] = self.bytes
        Memory.objects[self.address] = self
        Memory.in_use += self.bytes

    def __del__(self):
        if getattr(self, "address", None) and Memory is not None:
            Memory.live.pop(self.address, None)
            Memory.in_use -= self.bytes
            runtime().emulator_release(self.address, self.bytes)

    def bytes_array(self):
        """The bytes as a NumPy array, which keeps this object alive."""
        buffer = (ctypes.c_ubyte * max(self.bytes, 1)).from_address(self.address)
        buffer.memory = self
        return np.frombuffer(buffer, np.uint8, self.bytes)

    def damage(self):
        """None, or where a kernel wrote outside."""
        at = runtime().emulator_intact(self.address, self.bytes)
        if at == 0:
            return None
        return f"{-at} bytes before its beginning" if at < 0 else f"{at - 1} bytes after its end"


def mapped(argument):
    """The Memory behind a tensor map, as include/tensor_map.h has it; None if `argument` is none."""
    if not isinstance(argument, (np.ndarray, np.void)) or argument.nbytes != 128:
        return None
    magic, address = struct.unpack_from("<QQ", argument.tobytes())
    if magic != MAP_MAGIC:
        return None
    start, n_bytes = nearest(address) or (0, 0)
    return Memory.objects.get(start) if start <= address < start + n_bytes else None


def nearest(address):
    """What lies at or near an address that faulted: (start, bytes) of the closest allocation, or None."""
    starts = sorted(Memory.live)
    at = bisect.bisect(starts, address)
    around = [starts[i] for i in (at - 1, at) if 0 <= i < len(starts)]

    def distance(start):
        return max(start - address, address - (start + Memory.live[start]) + 1, 0)

    best = min(around, key=distance, default=None)
    return (best, Memory.live[best]) if best is not None and distance(best) < (16 << 20) else None


# --------------------------------------------------------------------------------------------------- launches


def setting(name, default):
    """An environment variable of the emulator, read at each launch so that a test may change it."""
    return os.environ.get(name, default)


COPIES = {"mixed": 0, "eager": 1, "late": 2}


def _copies():
    """EMULATOR_COPIES, when TMA's copies arrive: mixed, by chance; eager, at once; late, when all wait."""
    text = setting("EMULATOR_COPIES", "mixed")
    if text not in COPIES:
        raise KernelError(f"EMULATOR_COPIES={text} is none of {', '.join(COPIES)}")
    return COPIES[text]


def _order():
    """EMULATOR_ORDER, the order of threads and blocks: forward, reverse, or the seed of a shuffle."""
    text = setting("EMULATOR_ORDER", "1")
    return {"forward": 0, "reverse": -1}.get(text) if not text.isdigit() else max(int(text), 1)


@functools.cache
def _workers():
    """Threads of the operating system to spread a launch's blocks over; each has 1024 stacks of its own."""
    count = int(setting("EMULATOR_THREADS", "0")) or min(os.cpu_count() or 1, 4)
    return count, ThreadPoolExecutor(count)


@functools.cache
def _stacks(worker):
    stacks = runtime().emulator_stacks(MAX_THREADS + 1, STACK_BYTES)
    if not stacks:
        raise MemoryError("no address space for the stacks of 1024 threads")
    return stacks


def _is_shared(symbol):
    """Whether a symbol is a shared variable: _ZZ begins the name of a variable inside of a function."""
    return symbol == "emulator_shared_memory" or (
        symbol.startswith("_ZZ") and not symbol.startswith("_ZZN8emulator")
    )


class Library:
    """A compiled module, loaded once per worker: `names` as asked for, `kernels` as in the text, `clusters`
    the sizes of those that have one."""

    def __init__(self, path, names, kernels=(), clusters=()):
        self.path, self.names, self.kernels, self.clusters = path, list(names), kernels, dict(clusters)
        self.file = path.stem.rpartition("-")[0]  # matmul of matmul.cu
        self.symbols = compiler.symbols(path)
        spans = [(at, at + n) for name, (at, n) in self.symbols.items() if _is_shared(name)]
        self.shared_span = min(low for low, _ in spans), max(high for _, high in spans)

    @functools.cache  # noqa: B019  (modules live as long as the process)
    def instance(self, worker):
        """(library, table of kernels, where the library was loaded) for one worker."""
        library = compiler.open_library(self.path, worker)
        library.emulator_run.argtypes = [ctypes.c_void_p]
        library.emulator_run.restype = None
        table = (_Kernel * len(self.names)).in_dll(library, "emulator_kernels")
        anchor = ctypes.addressof(ctypes.c_ubyte.in_dll(library, "emulator_anchor"))
        return library, table, anchor - self.symbols["emulator_anchor"][0]

    def shared_variables(self, index):
        """[(address in the file, bytes, own)]: the static shared variables that kernel `index` may reach.

        They are the variables of the kernel itself, its own, and those of every function that is no kernel:
        _ZZ<function>E<variable> by the rules of C++ name mangling.
        """
        kernels = tuple(f"{len(name)}{name}" for name in self.kernels)
        mine = self._prefix(index)
        found = []
        for symbol, (value, size) in self.symbols.items():
            if symbol == "emulator_shared_memory" or not _is_shared(symbol):
                continue
            own = symbol[3:].startswith(mine)
            if own or not symbol[3:].startswith(kernels):
                found.append((value, size, own))
        return found

    def _prefix(self, index):
        """The mangled name of kernel `index`, less its _Z: found through its address."""
        _, table, loaded = self.instance(0)
        address = table[index].function - loaded
        for symbol, (value, _) in self.functions().items():
            if value == address:
                return symbol[2:] if symbol.startswith("_Z") else f"{len(symbol)}{symbol}"
        raise compiler.CompileError(f"{self.path} has no symbol for kernel {self.names[index]}")

    @functools.cache  # noqa: B019
    def functions(self):
        """{name: (address, bytes)} of the library's functions."""
        return compiler.symbols(self.path, functions=True)


class Kernel:
    """A function of a Library: checks a launch and runs it."""

    def __init__(self, library, name, capability=90):
        self.library, self.name, self.capability = library, name, capability
        self.index = library.names.index(name)
        _, table, _ = library.instance(0)
        self.parameters = list(table[self.index].parameters[: table[self.index].count])
        self.shared_variables = library.shared_variables(self.index)
        # Which other functions a kernel calls is not known: their variables do not count for the limits.
        self.static_bytes = sum(size for _, size, own in self.shared_variables if own)
        self.cluster = library.clusters.get(name.partition("<")[0], 1)
        self.max_dynamic_shared_size_bytes = STATIC_SHARED_LIMIT - self.static_bytes
        self.seconds_per_block = None

    # ---- checks

    def check_shape(self, grid, block, shared_mem):
        """A launch's grid, block and dynamic shared memory against the limits of the hardware."""

        def three(sizes, what):
            sizes = tuple(int(n) for n in (sizes if isinstance(sizes, (tuple, list)) else (sizes,)))
            sizes += (1,) * (3 - len(sizes))
            if len(sizes) > 3 or min(sizes) < 1:
                raise KernelError(f"{self.name}: {what} {sizes} must have one to three sizes, all at least 1")
            return sizes

        grid, block = three(grid, "grid"), three(block, "block")
        limits = ((2**31 - 1, 65535, 65535), (1024, 1024, 64))
        for sizes, limit, what in ((grid, limits[0], "grid"), (block, limits[1], "block")):
            if any(n > most for n, most in zip(sizes, limit)):
                raise KernelError(f"{self.name}: {what} {sizes} is over the limit of {limit}")
        if block[0] * block[1] * block[2] > MAX_THREADS:
            raise KernelError(f"{self.name}: block {block} has more than {MAX_THREADS} threads")
        if self.cluster > 1:
            self._check_cluster(grid, block)
        if self.static_bytes > STATIC_SHARED_LIMIT:
            raise KernelError(
                f"{self.name}: {self.static_bytes} bytes of static shared memory, "
                f"{STATIC_SHARED_LIMIT} are allowed"
            )
        allowed = OPTIN_SHARED_LIMIT.get(self.capability, 99) * 1024
        if self.max_dynamic_shared_size_bytes + self.static_bytes > allowed:
            raise KernelError(
                f"{self.name}: max_dynamic_shared_size_bytes = {self.max_dynamic_shared_size_bytes} (static: "
                f"{self.static_bytes}), but a block of sm_{self.capability} has {allowed} bytes at most"
            )
        if not 0 <= shared_mem <= self.max_dynamic_shared_size_bytes:
            raise KernelError(
                f"{self.name}: {shared_mem} bytes of dynamic shared memory (static: {self.static_bytes}), "
                f"{self.max_dynamic_shared_size_bytes} are allowed: set max_dynamic_shared_size_bytes"
            )
        return grid, block

    def _check_cluster(self, grid, block):
        threads = block[0] * block[1] * block[2]
        if grid[0] % self.cluster:
            raise KernelError(f"{self.name}: grid {grid} does not divide into clusters of {self.cluster}")
        if threads % 128:
            raise KernelError(f"{self.name}: block {block} of a cluster is not of whole warpgroups")
        if threads * self.cluster > MAX_THREADS:
            raise KernelError(
                f"{self.name}: {self.cluster} blocks of {threads} threads, but the emulator has "
                f"{MAX_THREADS} for a cluster"
            )
        if self.shared_variables:
            raise KernelError(
                f"{self.name}: the emulator has no static shared variables for clusters, neither in the "
                "kernel nor in functions of its file: take dynamic shared memory"
            )

    def pack(self, arguments):
        """The arguments as ctypes values, each checked against the kernel's parameter."""
        if len(arguments) != len(self.parameters):
            wanted = ", ".join(map(str, self.parameters))
            raise TypeError(
                f"{self.name} takes {len(self.parameters)} arguments ({wanted}), not {len(arguments)}"
            )
        return [self._pack(i, a, p) for i, (a, p) in enumerate(zip(arguments, self.parameters))]

    def _pack(self, position, argument, parameter):
        def wrong(what):
            return TypeError(f"{self.name}: argument {position} is {what}, the kernel wants {parameter}")

        kind = parameter.kind.decode()
        if ord(parameter.pointer):
            if argument is None:
                raise wrong("None, of which CuPy makes 0xffffffff (its issue 9046): pass np.uint64(0)")
            if isinstance(argument, (int, np.uint64, np.int64)):  # an address: nothing more can be checked
                return ctypes.c_void_p(int(argument))
            if not hasattr(argument, "data") or not hasattr(argument.data, "ptr"):
                raise wrong(f"{argument!r} ({type(argument).__name__})")
            if not _fits(argument.dtype, kind, parameter.bytes):
                raise wrong(f"an array of {argument.dtype}")
            return ctypes.c_void_p(argument.data.ptr)
        if isinstance(argument, np.ndarray) and argument.size == 1 and kind == "s":
            argument = argument.reshape(())[()]  # a struct by value, as CuPy does it
        elif isinstance(argument, (bool, int, float)):
            width = 1 if isinstance(argument, bool) else 8
            if width != parameter.bytes:
                kinds = {"f": "np.float32", "i": "np.int32", "u": "np.uint32", "o": "bool"}
                raise wrong(
                    f"the Python {type(argument).__name__} {argument!r}, which goes as {width} bytes"
                    f" (wrap it in {kinds.get(kind, 'a NumPy type')})"
                )
            argument = (np.bool_ if width == 1 else np.int64 if isinstance(argument, int) else np.float64)(
                argument
            )
        if not isinstance(argument, np.generic):
            raise wrong(f"{argument!r} ({type(argument).__name__})")
        has = {"f": "f", "i": "i", "u": "u", "b": "o", "V": "s"}.get(argument.dtype.kind, "?")
        if has == "?" or str(argument.dtype) == "bfloat16":
            has = "b" if str(argument.dtype) == "bfloat16" else "s"
        same = has == kind or {has, kind} <= {"i", "u", "v"} or kind == "s"
        if not same or argument.dtype.itemsize != parameter.bytes:
            raise wrong(f"{argument!r} ({argument.dtype})")
        room = (ctypes.c_ubyte * (parameter.bytes + 64))()  # aligned to 64, as a TensorMap must be
        value = (ctypes.c_ubyte * parameter.bytes).from_buffer(room, -ctypes.addressof(room) % 64)
        ctypes.memmove(value, argument.tobytes(), parameter.bytes)
        return value

    # ---- the launch

    def __call__(self, grid, block, arguments, shared_mem=0):
        """Run the kernel and wait for it."""
        grid, block = self.check_shape(grid, block, int(shared_mem))
        packed = self.pack(arguments)
        self.run(grid, block, arguments, packed, int(shared_mem))

    def run(self, grid, block, arguments, packed, shared_mem):
        """Run what the checks have accepted; with EMULATOR_TWICE=1 in two orders that must agree."""
        launched[self.library.file, self.name] += 1
        found = [getattr(argument, "memory", None) or mapped(argument) for argument in arguments]
        memories = {memory.address: memory for memory in found if memory is not None}
        if setting("EMULATOR_TWICE", "0") == "0":
            self._run(grid, block, arguments, packed, shared_mem, memories, _order())
            return
        arrays = [memory.bytes_array() for memory in memories.values()]
        before = [array.copy() for array in arrays]
        self._run(grid, block, arguments, packed, shared_mem, memories, 0)
        forward = [array.copy() for array in arrays]
        for array, old in zip(arrays, before):
            array[...] = old
        self._run(grid, block, arguments, packed, shared_mem, memories, -1)
        for memory, array, other in zip(memories.values(), arrays, forward):
            if not np.array_equal(array, other):
                at = int(np.flatnonzero(array != other)[0])
                raise KernelError(
                    f"{self.name}: the result depends on the order of threads and blocks: a race. "
                    f"First at byte {at} of {self._describe(memory.address, memory.bytes, arguments)}"
                )

    def _run(self, grid, block, arguments, packed, shared_mem, memories, order):
        blocks = grid[0] * grid[1] * grid[2] // self.cluster
        pointers = (ctypes.c_void_p * len(packed))(*(ctypes.addressof(value) for value in packed))
        next_block, adding, copies = ctypes.c_uint64(0), ctypes.c_uint32(0), _copies()
        seconds = self.seconds_per_block
        workers, pool = (1, None)
        if blocks > 1 and seconds is not None and seconds * blocks > 2e-3:
            workers, pool = _workers()
            workers = min(workers, blocks)

        def work(worker):
            library, table, loaded = self.library.instance(worker)
            failure = _Failure()
            ranges = (_Range * len(self.shared_variables))(
                *((loaded + start, size) for start, size, _ in self.shared_variables)
            )
            entry = table[self.index]
            functions = runtime()
            launch = _Launch(
                kernel=entry.function,
                invoke=entry.invoke,
                arguments=ctypes.addressof(pointers),
                grid=grid,
                block=block,
                cluster=self.cluster,
                dynamic_bytes=shared_mem,
                order=order,
                next_block=ctypes.addressof(next_block),
                stacks=_stacks(worker),
                stack_bytes=STACK_BYTES,
                shared=ctypes.addressof(ranges),
                shared_count=len(ranges),
                lowest=loaded + self.library.shared_span[0],
                highest=loaded + self.library.shared_span[1],
                failure=ctypes.addressof(failure),
                enter=ctypes.cast(functions.emulator_enter, ctypes.c_void_p).value,
                leave=ctypes.cast(functions.emulator_leave, ctypes.c_void_p).value,
                find_array=ctypes.cast(functions.emulator_find, ctypes.c_void_p).value,
                adding=ctypes.addressof(adding),
                copies=copies,
            )
            library.emulator_run(ctypes.addressof(launch))
            if failure.failed:
                next_block.value = 1 << 40  # the others need not go on
            return failure, loaded

        runtime().emulator_watch()
        start = time.perf_counter()
        try:
            done = [work(0)] if workers == 1 else list(pool.map(work, range(workers)))
        finally:
            runtime().emulator_unwatch()
        self.seconds_per_block = (time.perf_counter() - start) * workers / blocks
        for failure, loaded in done:
            if failure.failed:
                raise KernelError(self._explain(failure, loaded, arguments))
        for memory in memories.values():
            if where := memory.damage():
                what = self._describe(memory.address, memory.bytes, arguments)
                raise KernelError(f"{self.name}: a thread wrote outside of {what}, {where}")

    def _describe(self, start, n_bytes, arguments):
        """The allocation at `start`, by the arguments that lie in it."""
        for i, argument in enumerate(arguments):
            memory = getattr(argument, "memory", None)
            if memory is not None and memory.address == start:
                return f"argument {i} ({argument.dtype} {argument.shape})"
            if memory is None and (memory := mapped(argument)) is not None and memory.address == start:
                return f"the array of argument {i}, a tensor map"
        return f"an array of {n_bytes} bytes that is no argument"

    def _explain(self, failure, loaded, arguments):
        where = f"{self.name}: block {tuple(failure.block)}, thread {tuple(failure.thread)}"
        if not failure.signal:
            # @number is a distance from emulator_run, see touch() in emulator.h
            message = failure.message.decode(errors="replace")
            run = self.library.functions()["emulator_run"][0]
            line = lambda match: (
                compiler.source_line(self.library.path, run + int(match[1])) or "an unknown line"
            )
            message = re.sub(r"@(-?\d+)", line, message)
            # and $address is a place in an array
            array = lambda match: self._describe(*(nearest(int(match[1])) or (0, 0)), arguments)
            message = re.sub(r"\$(\d+)", array, message)
            return f"{where}: {message}"
        line = compiler.source_line(self.library.path, (failure.instruction or 0) - loaded)
        if line:
            where += f", at {line}"
        number, writes, address = failure.signal & 255, failure.signal >> 8, failure.address
        if number == signal.SIGFPE:
            return f"{where}: integer division by zero"
        if number in (signal.SIGILL, signal.SIGTRAP):
            return (
                f"{where}: a misaligned access, an index outside of an array of known size, "
                "a division by zero or a shift by too much (a check of the compiler's)"
            )
        if not address:
            return f"{where}: a null pointer, a wild pointer or a misaligned 16-byte access"
        verb = "writes" if writes else "reads"
        for worker in range(_workers()[0]):
            stack = (address - _stacks(worker)) % STACK_BYTES
            if 0 <= address - _stacks(worker) < (MAX_THREADS + 1) * STACK_BYTES and stack < 4096:
                return f"{where}: the thread's stack of {STACK_BYTES} bytes overflows"
            _, _, base = self.library.instance(worker)
            distance = address - (base + self.library.symbols["emulator_shared_memory"][0])
            if (
                -SHARED_GUARD <= distance < 8 * SHARED_STRIDE
            ):  # the guard behind a block's memory is the next one's
                byte = (distance + SHARED_GUARD) % SHARED_STRIDE - SHARED_GUARD
                return f"{where}: {verb} at byte {byte} of the dynamic shared memory, which is outside"
        if found := nearest(address):
            start, n_bytes = found
            gap = (
                f"{start - address} bytes before"
                if address < start
                else f"{address - start - n_bytes} bytes after"
            )
            return f"{where}: {verb} {gap} the {'start' if address < start else 'end'} of " + self._describe(
                start, n_bytes, arguments
            )
        return f"{where}: {verb} at {address:#x}, far from every array"


def _fits(dtype, kind, width):
    """Whether an array of `dtype` may go to a pointer to elements of this kind and width."""
    name, size = str(dtype), dtype.itemsize
    has = "b" if name == "bfloat16" else {"f": "f", "i": "i", "u": "u", "b": "o"}.get(dtype.kind, "s")
    if kind in "vs":  # bytes, void, and vectors such as float4: anything whose size divides theirs
        return True
    if kind == "b":
        return has == "b" or (has == "u" and size == 2)
    if kind == "u" and width == 2 and has == "b":
        return True
    return size == width and (has == kind or {has, kind} <= {"i", "u"})
