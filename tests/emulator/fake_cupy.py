"""As much of CuPy as kernels/cuda.py uses, with guarded CPU memory as the device's and C++ for kernels.

Names, arguments and errors are CuPy's; what is not here is not used. Device arrays do not turn into NumPy
arrays by themselves, and there is no arithmetic: the project computes with its own kernels only.

Time is CUDA's too: what goes to the null stream happens at once, what goes to another stream happens when
something waits for it (synchronize, an event, .get(), the null stream if the stream is a blocking one). Code
that forgets to wait reads old values, or NaN.
"""

import ctypes
import functools
import os
import sys
import time
import types
import weakref
from collections import deque

import numpy as np

from . import compiler, fake_nccl, launcher

__version__ = "emulator"
float16, float32, float64 = np.float16, np.float32, np.float64
int8, int16, int32, int64 = np.int8, np.int16, np.int32, np.int64
uint8, uint16, uint32, uint64, bool_ = np.uint8, np.uint16, np.uint32, np.uint64, np.bool_
newaxis = None


# ---------------------------------------------------------------------------------------------------- streams


class Stream:
    """A queue of work. The null stream's work is done at once."""

    null = None  # set below
    all = []  # noqa: RUF012

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.is_null, self.non_blocking = null, non_blocking
        self.queue = deque()  # functions to call
        self.recording = None  # a Graph while one is captured
        self.ptr = 0 if null else id(self)
        self.entered = []
        if not null:
            Stream.all.append(self)

    def submit(self, function, *arguments):
        """Call function(*arguments) in this stream's time."""
        if self.recording is not None:
            self.recording.add(function, arguments)
            return
        work = functools.partial(function, *arguments)
        if self.is_null:
            _no_capture("work on the null stream")
            for stream in Stream.all:
                if not stream.non_blocking:
                    stream.drain()
            work()
        else:
            self.queue.append(work)
            if launcher.setting("EMULATOR_EAGER", "0") != "0":
                self.drain()

    def drain(self):
        """Do everything that was submitted so far."""
        while self.queue:
            self.step()

    def step(self):
        """Do the next thing; if it fails, nothing that was to follow happens."""
        try:
            self.queue.popleft()()
        except BaseException:
            self.queue.clear()
            raise

    def synchronize(self):
        _no_capture("synchronize")
        self.drain()
        if self.is_null:
            for stream in Stream.all:
                if not stream.non_blocking:
                    stream.drain()

    @property
    def done(self):
        return not self.queue

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        other, marker = event.stream, event.marker
        if other is not None and other is not self:
            self.submit(lambda: event.reach(other, marker))

    def use(self):
        _state.current = self
        return self

    def __enter__(self):
        self.entered.append(_state.current)
        _state.current = self
        return self

    def __exit__(self, *_):
        _state.current = self.entered.pop()

    def begin_capture(self, mode=None):
        if self.is_null:
            raise RuntimeError("the null stream cannot be captured")
        if self.recording is not None:
            raise RuntimeError("this stream is being captured already")
        self.drain()
        self.recording = Graph()

    def end_capture(self):
        if self.recording is None:
            raise RuntimeError("no capture was begun on this stream")
        graph, self.recording = self.recording, None
        return graph

    def is_capturing(self):
        return self.recording is not None

    def launch_host_func(self, callback, arg):
        self.submit(lambda: callback(arg))


class Graph:
    """The launches and copies of a capture, with the arguments they had then.

    As on a card it keeps no memory alive. A launch after an array was freed is an error here, unless other
    memory has its address.
    """

    def __init__(self):
        self.work = []  # functions without arguments

    def add(self, function, arguments):
        places = [_Place(array) if isinstance(array, ndarray) else array for array in arguments]
        maps = [value for value in arguments if launcher.mapped(value)]

        def work():
            if not all(map(launcher.mapped, maps)):
                raise RuntimeError("a graph has the tensor map of an array that was freed")
            function(*[place.array() if isinstance(place, _Place) else place for place in places])

        self.work.append(work)

    def launch(self, stream=None):
        stream = stream or _state.current
        for work in self.work:
            stream.submit(work)

    def upload(self, stream=None):
        pass


class _Place:
    """Where a device array lies, for a graph."""

    def __init__(self, array):
        self.address, self.bytes = array.data.ptr, array.nbytes
        self.layout = dict(shape=array.shape, strides=array.strides, dtype=array.dtype)

    def array(self):
        start, n_bytes = launcher.nearest(self.address) or (0, 0)
        offset = self.address - start
        if not 0 <= offset <= n_bytes - self.bytes:
            raise RuntimeError(f"a graph uses an array that was freed: {self.layout}")
        memory = launcher.Memory.objects[start]
        host = np.ndarray(**self.layout, buffer=memory.bytes_array(), offset=offset)
        return ndarray(None, host=host, memory=memory)


class Event:
    """A place in a stream's queue."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.stream, self.marker, self.time = None, None, None

    def record(self, stream=None):
        self.stream = stream or _state.current
        self.time = None
        self.marker = marker = object()

        def passed():
            if self.marker is marker:  # not recorded anew since then
                self.time = time.perf_counter()

        self.stream.submit(passed)

    def reach(self, stream, marker):
        """Let `stream` do its work up to this recording."""
        while stream.queue and self.marker is marker and self.time is None:
            stream.step()

    @property
    def done(self):
        return self.stream is None or self.time is not None

    def synchronize(self):
        _no_capture("Event.synchronize")
        if self.stream is not None:
            self.reach(self.stream, self.marker)


def get_elapsed_time(start, end):
    if start.time is None or end.time is None:
        raise RuntimeError("an event was not reached yet: synchronize it first")
    return (end.time - start.time) * 1e3


class _State:
    current = None
    capability = 90
    memory = 8 << 30


_state = _State()
Stream.null = Stream(null=True)
_state.current = Stream.null


def _no_capture(what):
    if any(stream.recording is not None for stream in Stream.all):
        raise RuntimeError(f"{what} while a stream is captured: not permitted")


# ----------------------------------------------------------------------------------------------------- memory


class MemoryPointer:
    """An address on the device, and the allocation that it points into."""

    def __init__(self, memory, ptr):
        self.mem, self.ptr, self.memory = memory, ptr, memory

    def __add__(self, n_bytes):
        return MemoryPointer(self.memory, self.ptr + n_bytes)

    def __int__(self):
        return self.ptr


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


def alloc(n_bytes):
    """`n_bytes` of guarded memory, NaN all over."""
    _no_capture("an allocation")
    if launcher.Memory.in_use + n_bytes > _state.memory:
        raise OutOfMemoryError(
            f"Out of memory allocating {n_bytes:,} bytes "
            f"(allocated so far: {launcher.Memory.in_use:,} bytes)."
        )
    return launcher.Memory(n_bytes)


class ndarray:
    """A device array: `host` is NumPy's view of it, for this file only."""

    __array_priority__ = 100

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C", host=None, memory=None):
        if host is None:
            shape = (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(int(n) for n in shape)
            dtype = np.dtype(dtype)
            n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            memory = memptr.memory if memptr is not None else alloc(n_bytes)
            offset = memptr.ptr - memory.address if memptr is not None else 0
            host = memory.bytes_array()[offset : offset + n_bytes].view(dtype).reshape(shape, order=order)
        self.host, self.memory = host, memory

    # ---- what it is

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    size = property(lambda self: self.host.size)
    ndim = property(lambda self: self.host.ndim)
    nbytes = property(lambda self: self.host.nbytes)
    itemsize = property(lambda self: self.host.itemsize)
    strides = property(lambda self: self.host.strides)
    device = property(lambda self: Device(0))
    T = property(lambda self: self._view(self.host.T))

    @property
    def data(self):
        return MemoryPointer(self.memory, self.host.__array_interface__["data"][0])

    @property
    def flags(self):
        flags = self.host.flags
        return types.SimpleNamespace(
            c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata
        )

    def __len__(self):
        return len(self.host)

    def __repr__(self):
        return f"<device array {self.dtype} {self.shape}>"

    def __array__(self, *_, **__):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    __array_ufunc__ = None

    def __bool__(self):
        return bool(self.item())

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def item(self):
        return self.get().item()

    # ---- views: the same memory

    def _view(self, host):
        return ndarray(None, host=host, memory=self.memory)

    def reshape(self, *shape, order="C"):
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        view = self.host.view()
        try:
            view.shape = shape
        except (AttributeError, ValueError):
            view = self.host.reshape(shape)
            if view.size and not np.shares_memory(view, self.host):
                raise ValueError(
                    "the stand-in does not reshape by a copy: make the array contiguous"
                ) from None
        return self._view(view)

    def ravel(self):
        return self.reshape(-1)

    def view(self, dtype=None):
        return self._view(self.host.view() if dtype is None else self.host.view(dtype))

    def transpose(self, *axes):
        return self._view(self.host.transpose(*axes))

    def swapaxes(self, a, b):
        return self._view(self.host.swapaxes(a, b))

    def squeeze(self, axis=None):
        return self._view(self.host.squeeze(axis))

    def __getitem__(self, key):
        keys = key if isinstance(key, tuple) else (key,)
        if not all(k is None or k is Ellipsis or isinstance(k, (int, np.integer, slice)) for k in keys):
            raise TypeError("the stand-in slices device arrays, it does not gather: write a kernel")
        view = self.host[(*keys, Ellipsis)] if Ellipsis not in keys else self.host[keys]
        return self._view(view)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    # ---- work on the stream

    def __setitem__(self, key, value):
        copyto(self[key], value)

    def fill(self, value):
        _state.current.submit(lambda array: array.host.fill(value), self)

    def copy(self):
        result = ndarray(self.shape, self.dtype)
        copyto(result, self)
        return result

    def astype(self, dtype, copy=True):
        if not copy and self.dtype == np.dtype(dtype):
            return self
        result = ndarray(self.shape, dtype)
        copyto(result, self)
        return result

    def set(self, array, stream=None):
        """From a NumPy array. A pinned one must not be changed before the stream is through."""
        if not isinstance(array, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if array.dtype != self.dtype or array.shape != self.shape:
            raise ValueError(
                f"Shape or dtype mismatch: {array.dtype} {array.shape} to {self.dtype} {self.shape}"
            )
        stream = stream or _state.current
        if not _pinned(array):
            if stream.recording is not None:
                raise RuntimeError("a copy from pageable memory while a stream is captured: not permitted")
            array = array.copy()
        stream.submit(lambda to: np.copyto(to.host, array), self)

    def get(self, stream=None, order="C", out=None, blocking=True):
        """To a NumPy array, waiting for the stream unless blocking=False."""
        _no_capture(".get()")
        stream = stream or _state.current
        result = np.empty(self.shape, self.dtype, order) if out is None else out
        if out is not None and (out.shape != self.shape or out.dtype != self.dtype):
            raise ValueError(f"Shape or dtype mismatch: {self.dtype} {self.shape} to {out.dtype} {out.shape}")
        stream.submit(lambda source: np.copyto(result, source.host), self)
        if blocking:
            stream.synchronize()
        return result


def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype, order=order)


def full(shape, value, dtype=None, order="C"):
    result = empty(shape, np.asarray(value).dtype if dtype is None else dtype, order)
    result.fill(value)
    return result


def zeros(shape, dtype=float, order="C"):
    return full(shape, 0, dtype, order)


def ones(shape, dtype=float, order="C"):
    return full(shape, 1, dtype, order)


def empty_like(array, dtype=None):
    return empty(array.shape, dtype or array.dtype)


def zeros_like(array, dtype=None):
    return zeros(array.shape, dtype or array.dtype)


def ones_like(array, dtype=None):
    return ones(array.shape, dtype or array.dtype)


def full_like(array, value, dtype=None):
    return full(array.shape, value, dtype or array.dtype)


def asarray(array, dtype=None, order=None, blocking=False):
    if isinstance(array, ndarray) and (dtype is None or array.dtype == np.dtype(dtype)):
        return array
    if isinstance(array, ndarray):
        return array.astype(dtype)
    array = np.asarray(array, dtype)
    f_order = array.ndim > 1 and array.flags.f_contiguous and not array.flags.c_contiguous
    result = empty(array.shape, array.dtype, "F" if f_order and order != "C" else "C")
    result.set(array)
    return result


def array(array, dtype=None, copy=True):
    return asarray(array, dtype).copy() if isinstance(array, ndarray) and copy else asarray(array, dtype)


def ascontiguousarray(array, dtype=None):
    array = asarray(array, dtype)
    return array if array.flags.c_contiguous else array.copy()


def asnumpy(array, stream=None, order="C", out=None, blocking=True):
    if isinstance(array, ndarray):
        return array.get(stream=stream, order=order, out=out, blocking=blocking)
    return np.asarray(array)


def arange(*arguments, dtype=None):
    return asarray(np.arange(*arguments, dtype=dtype))


def copyto(to, value):
    """Device array or scalar to device array, converting."""
    if isinstance(value, np.ndarray) and value.ndim:
        to.set(value.astype(to.dtype, copy=False))
        return
    _state.current.submit(_copy, to, value)


def _copy(to, value):
    """copyto() at the time of the stream, also to and from arrays of the host."""
    to, value = (array.host if isinstance(array, ndarray) else array for array in (to, value))
    np.copyto(to, value, casting="unsafe")


def get_array_module(*arrays):
    return sys.modules[__name__] if any(isinstance(a, ndarray) for a in arrays) else np


def _no_numbers(name):
    def refuse(*_):
        raise TypeError(f"device arrays have no {name} here: the project computes with its own kernels only")

    return refuse


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lt", "le", "gt", "ge"):
    for _prefix in ("__", "__r", "__i"):
        setattr(ndarray, f"{_prefix}{_name}__", _no_numbers(_name))


class PinnedMemory(np.ndarray):
    """Host memory for copies that do not wait. A buffer, which before 3.12 only NumPy can make."""

    live = {}  # address: bytes  # noqa: RUF012

    ptr = property(lambda self: self.ctypes.data)
    mem = property(lambda self: self)


def alloc_pinned_memory(n_bytes):
    _no_capture("an allocation of pinned memory")
    memory = np.full(int(n_bytes), 0xFF, np.uint8)
    address = memory.ctypes.data
    PinnedMemory.live[address] = memory.nbytes
    weakref.finalize(memory, PinnedMemory.live.pop, address)
    return memory.view(PinnedMemory)


def _pinned(array):
    start = array.__array_interface__["data"][0]
    return any(at <= start < at + n for at, n in PinnedMemory.live.items())


class MemoryPool:
    """The allocator's books; nothing is pooled, so that every array keeps its guards."""

    def used_bytes(self):
        return launcher.Memory.in_use

    total_bytes = used_bytes

    def free_bytes(self):
        return 0

    def free_all_blocks(self, stream=None):
        pass

    def set_limit(self, size=None, fraction=None):
        _state.memory = size if size is not None else int(fraction * (8 << 30))

    def malloc(self, n_bytes):
        memory = alloc(n_bytes)
        return MemoryPointer(memory, memory.address)


_pool = MemoryPool()


def get_default_memory_pool():
    return _pool


def get_default_pinned_memory_pool():
    return types.SimpleNamespace(free_all_blocks=lambda: None)


# ---------------------------------------------------------------------------------------------------- kernels


class CompileException(Exception):
    """As cupy.cuda.compiler's."""

    def __init__(self, message="", source="", name="", options=(), backend="nvrtc"):
        super().__init__(message)
        self.source, self.name, self.options = source, name, options

    def get_message(self):
        return str(self)


class RawModule:
    """A .cu text, compiled at the first get_function. Equal modules are one, and share their functions, with
    what was allowed to these: as in CuPy."""

    known = {}  # noqa: RUF012

    def __init__(self, *, code, options=(), name_expressions=None, backend="nvrtc", jitify=False):
        self.code, self.options = code, tuple(options)
        self.names = list(name_expressions or compiler.kernel_names(code))
        self.library = None
        key = code, self.options, tuple(self.names), _state.capability
        self.functions = self.known.setdefault(key, {})

    def compile(self, log_stream=None):
        if self.library is not None:
            return
        try:
            path = compiler.compile_module(self.code, self.options, self.names, _state.capability)
            clusters = compiler.cluster_sizes(self.code)
        except compiler.CompileError as error:
            raise CompileException(str(error), self.code, options=self.options) from None
        kernels = {*compiler.kernel_names(self.code, plain=False), *compiler.kernel_names(self.code)}
        self.library = launcher.Library(path, self.names, kernels, clusters)

    def get_function(self, name):
        if name not in self.functions:
            _no_capture("loading a kernel")
            if name not in self.names:
                raise cuda.driver.CUDADriverError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
            self.compile()
            self.functions[name] = RawKernel._of(launcher.Kernel(self.library, name, _state.capability))
        return self.functions[name]


class RawKernel:
    """One function: kernel(grid, block, arguments, shared_mem=0)."""

    def __init__(self, code, name, options=(), backend="nvrtc", **_):
        self.kernel = RawModule(code=code, options=options, name_expressions=[name]).get_function(name).kernel

    @classmethod
    def _of(cls, kernel):
        self = cls.__new__(cls)
        self.kernel = kernel
        return self

    name = property(lambda self: self.kernel.name)
    shared_size_bytes = property(lambda self: self.kernel.static_bytes)
    num_regs = property(lambda self: 0)  # only a real compiler knows
    local_size_bytes = property(lambda self: 0)
    const_size_bytes = property(lambda self: 0)
    max_threads_per_block = property(lambda self: 1024)
    preferred_shared_memory_carveout = -1

    @property
    def max_dynamic_shared_size_bytes(self):
        return self.kernel.max_dynamic_shared_size_bytes

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, n_bytes):
        allowed = (
            launcher.OPTIN_SHARED_LIMIT.get(self.kernel.capability, 99) * 1024 - self.kernel.static_bytes
        )
        if n_bytes > allowed:
            raise cuda.driver.CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name}: {n_bytes} bytes of dynamic shared memory, "
                f"{allowed} are possible on sm_{self.kernel.capability}"
            )
        self.kernel.max_dynamic_shared_size_bytes = n_bytes

    def __call__(self, grid, block, args, *, shared_mem=0, enable_cooperative_groups=False, stream=None):
        kernel, arguments = self.kernel, tuple(args)
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError(f"{self.name}: grid and block must be tuples")
        grid, block = kernel.check_shape(grid, block, int(shared_mem))
        packed = kernel.pack(arguments)

        def run(*arguments):
            kernel.run(grid, block, arguments, packed, int(shared_mem))

        (stream or _state.current).submit(run, *arguments)


# -------------------------------------------------------------------------------------------------- cupy.cuda


class Device:
    """The one device."""

    def __init__(self, device=None):
        self.id = int(device or 0)
        if self.id != 0:
            raise cuda.runtime.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def __int__(self):
        return self.id

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def use(self):
        return self

    def synchronize(self):
        _device_synchronize()

    @property
    def compute_capability(self):
        return str(_state.capability)

    @property
    def attributes(self):
        return {
            "MultiProcessorCount": 132 if _state.capability == 90 else 108,
            "MaxSharedMemoryPerBlock": launcher.STATIC_SHARED_LIMIT,
            "MaxSharedMemoryPerBlockOptin": launcher.OPTIN_SHARED_LIMIT.get(_state.capability, 99) * 1024,
            "MaxSharedMemoryPerMultiprocessor": (launcher.OPTIN_SHARED_LIMIT.get(_state.capability, 99) + 1)
            * 1024,
            "MaxThreadsPerBlock": 1024,
            "WarpSize": 32,
            "ClockRate": 1_000_000,
            "L2CacheSize": 50 << 20,
            "ComputeCapabilityMajor": _state.capability // 10,
            "ComputeCapabilityMinor": _state.capability % 10,
        }

    @property
    def pci_bus_id(self):
        """A card of its own for every process; EMULATOR_BUS lets two have the same."""
        return launcher.setting("EMULATOR_BUS", str(os.getpid()))

    @property
    def mem_info(self):
        return _state.memory - launcher.Memory.in_use, _state.memory


def _device_synchronize():
    _no_capture("a device synchronize")
    for stream in [*Stream.all, Stream.null]:
        stream.drain()


def _bytes_at(address, n_bytes):
    """An array of the bytes at an address of the device or of the host."""
    address, n_bytes = int(address), int(n_bytes)
    start, size = launcher.nearest(address) or (0, 0)
    if start <= address and address + n_bytes <= start + size:
        return ndarray(n_bytes, np.uint8, MemoryPointer(launcher.Memory.objects[start], address))
    return np.frombuffer((ctypes.c_ubyte * n_bytes).from_address(address), np.uint8)


def _memcpy_async(to, source, n_bytes, kind, stream):
    _stream_of(stream).submit(_copy, _bytes_at(to, n_bytes), _bytes_at(source, n_bytes))


def _memset_async(to, value, n_bytes, stream):
    _stream_of(stream).submit(_copy, _bytes_at(to, n_bytes), value & 255)


def _stream_of(pointer):
    return next((stream for stream in Stream.all if stream.ptr == pointer), Stream.null)


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime's."""

    status = 0


class CUDADriverError(RuntimeError):
    """As cupy.cuda.driver's."""


def _module(name, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


def _set_capability(capability):
    _state.capability = int(capability)


cuda = _module(
    "cupy.cuda",
    Stream=Stream,
    ExternalStream=Stream,
    Event=Event,
    Graph=Graph,
    Device=Device,
    MemoryPointer=MemoryPointer,
    MemoryPool=MemoryPool,
    alloc=_pool.malloc,
    alloc_pinned_memory=alloc_pinned_memory,
    get_elapsed_time=get_elapsed_time,
    get_current_stream=lambda: _state.current,
    is_available=lambda: True,
    set_capability=_set_capability,  # the emulator's own
    runtime=_module(
        "cupy.cuda.runtime",
        CUDARuntimeError=CUDARuntimeError,
        memcpyHostToHost=0,
        memcpyHostToDevice=1,
        memcpyDeviceToHost=2,
        memcpyDeviceToDevice=3,
        memcpyDefault=4,
        memcpyAsync=_memcpy_async,
        memcpy=lambda to, source, n, kind: _memcpy_async(to, source, n, kind, 0),
        memsetAsync=_memset_async,
        memset=lambda to, value, n: _memset_async(to, value, n, 0),
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        setDevice=lambda device: Device(device) and None,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        deviceSynchronize=_device_synchronize,
        streamSynchronize=lambda pointer: _stream_of(pointer).synchronize(),
        memGetInfo=lambda: Device().mem_info,
        getDeviceProperties=lambda device: {
            "name": b"the emulator",
            "multiProcessorCount": 132,
            "totalGlobalMem": _state.memory,
            "major": _state.capability // 10,
            "minor": _state.capability % 10,
        },
    ),
    driver=_module("cupy.cuda.driver", CUDADriverError=CUDADriverError, get_build_version=lambda: 13000),
    compiler=_module("cupy.cuda.compiler", CompileException=CompileException),
    memory=_module("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError, MemoryPointer=MemoryPointer),
    stream=_module("cupy.cuda.stream", Stream=Stream, Event=Event, get_elapsed_time=get_elapsed_time),
    nccl=fake_nccl,
    nvtx=_module("cupy.cuda.nvtx", RangePush=lambda *_: None, RangePop=lambda: None),
)


def modules():
    """{name: module} to put into sys.modules."""
    found = {"cupy": sys.modules[__name__], "cupy.cuda": cuda}
    for name, member in vars(cuda).items():
        if isinstance(member, types.ModuleType):
            found[f"cupy.cuda.{name}" if name == "nccl" else member.__name__] = member
    return found
