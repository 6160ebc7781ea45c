"""The GPU: memory, copies, recorded graphs, checking arguments, compiling and launching. Read cuda.py after.

CuPy brings memory, streams and the compiler, NVRTC: a kernel is compiled when it is first used, or side by
side with others before that (replay), and ~/.cupy keeps the result. CuPy computes nothing here.

A kernel cannot check its arguments, so every operation calls check() before it launches: a wrong type, shape
or layout is an error, not corrupted memory.
"""

import collections
import contextlib
import ctypes
import functools
import math
import os
import re
import shutil
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from common import UserError, size
from kernels import threads

NO_GPU = "" if shutil.which("nvidia-smi") else "no NVIDIA GPU was found, nvidia-smi is missing"
INSTALL = "make driver installs what this driver can run"
try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except ImportError as error:  # CuPy's own message is a page; the message of its cause is one line
    missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
    what = "CuPy is not installed" if missing else f"CuPy cannot be loaded: {error.__cause__ or error}"
    what = f"{NO_GPU}; if there is one, {what}" if NO_GPU else what
    raise ImportError(f"{what}; {INSTALL}") from None
except RuntimeError as error:  # CUDA says 'insufficient' of a missing driver, too
    what = "no NVIDIA GPU was found"
    if "InsufficientDriver" in str(error):
        what = f"the GPU's driver is too old for this CuPy; {INSTALL}"
    raise ImportError(f"{NO_GPU or what}: {error}") from None

HERE = Path(__file__).parent
# One GPU a rank (distributed.py). Where a launcher shows each rank its own GPU alone, that is GPU 0.
DEVICE = xp.cuda.Device(int(os.environ.get("LOCAL_RANK", "0")) % xp.cuda.runtime.getDeviceCount())
DEVICE.use()
CAPABILITY = int(DEVICE.compute_capability)  # 80: A100, 86: RTX 30, 89: RTX 40, L4, 90: H100, H200
SMS = DEVICE.attributes["MultiProcessorCount"]
SHARED = DEVICE.attributes["MaxSharedMemoryPerBlockOptin"]  # bytes: 227 KB on sm_90, 163 on sm_80, else 99
if CAPABILITY < 75:
    raise ImportError(f"the GPU is of compute capability {CAPABILITY / 10}, CUDA 13 begins at 7.5")


def card_name():
    """What the driver calls the card: "NVIDIA H200"."""
    return xp.cuda.runtime.getDeviceProperties(DEVICE.id)["name"].decode()


def cdiv(a, b):
    return -(-a // b)


# ------------------------------------------------------------------------------------------------------------
# Memory


@contextlib.contextmanager
def _needing(what):
    """Turn the "out of memory" errors of CuPy, the runtime and the driver into one UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "out of memory" not in str(error).lower():
            raise
        free, total = DEVICE.mem_info
        raise UserError(
            f"the GPU's memory is full: {what} needed, {size(free)} of {size(total)} are free; lower "
            "--batch-size or use --recompute (train.py), lower --batch-tokens (sft.py, rl.py) or "
            "--num-samples (sample.py), or take a smaller model"
        ) from None


_recording = False  # True while replay() records
_overlapping = False  # True while it records launches that may overlap


def _n_bytes(shape, dtype):
    """The bytes of an array that is about to be allocated; RuntimeError inside of a recording."""
    if _recording:  # a replay would use this memory when it belongs to other arrays
        what = "the first call, which is not recorded, must bring everything to its size"
        raise RuntimeError(f"{np.dtype(dtype)} {shape} would be allocated inside of a recording; {what}")
    return math.prod(shape if isinstance(shape, tuple) else (shape,)) * np.dtype(dtype).itemsize


def _allocate(make, shape, dtype):
    with _needing(f"{size(_n_bytes(shape, dtype))} more are"):
        return make(shape, dtype)


def zeros(shape, dtype=np.float32):
    return _allocate(xp.zeros, shape, dtype)


def empty(shape, dtype=np.float32):
    return _allocate(xp.empty, shape, dtype)


_uploads = collections.deque()  # (event, pinned array, its address) of copies to the GPU, the oldest first
_free = collections.defaultdict(list)  # {bytes: the same three of copies that are done}
KEPT = 1 << 20  # bytes: pinned arrays up to this size are kept for later copies
HOST_TO_DEVICE, DEVICE_TO_DEVICE = 1, 3  # cudaMemcpyKind


def to_device(array):
    """A copy on the GPU of a NumPy array, on the current stream, without waiting; a CuPy array as it is."""
    if isinstance(array, xp.ndarray):
        return array
    array = np.asarray(array)
    out = empty(array.shape, array.dtype)
    assign(out, array)
    return out


def assign(out, array):
    """Copy an array of NumPy's or of the GPU to out, which has its shape and type, without waiting."""
    arrays = (out, array) if isinstance(array, xp.ndarray) else (out,)
    if out.shape != array.shape or out.dtype != array.dtype or not all(x.flags.c_contiguous for x in arrays):
        raise ValueError(f"assign: {array.dtype} {array.shape} to {out.dtype} {out.shape}, or not contiguous")
    if len(arrays) == 1:
        _upload(out.reshape(-1).view(np.uint8), [array], [slice(0, array.nbytes)])
    else:
        stream = xp.cuda.get_current_stream()
        xp.cuda.runtime.memcpyAsync(out.data.ptr, array.data.ptr, array.nbytes, DEVICE_TO_DEVICE, stream.ptr)


def _upload(buffer, arrays, slices):
    """Copy NumPy arrays into slices of a buffer of bytes on the GPU, without waiting.

    They are copied into pinned memory, from which the GPU fetches them by itself, so the caller may change
    them at once. An event says when the GPU has fetched them. Then event and memory serve a later copy of as
    many bytes: making both anew takes as long as everything else that Python does for a decode step.
    """
    n_bytes, stream = _n_bytes(buffer.shape, np.uint8), xp.cuda.get_current_stream()
    while _uploads and _uploads[0][0].done:
        done = _uploads.popleft()
        if done[1].size <= KEPT:
            _free[done[1].size].append(done)
    if _free[n_bytes]:
        fetched, pinned, address = _free[n_bytes].pop()
    else:
        fetched, pinned = xp.cuda.Event(), _pinned(buffer.shape, np.uint8)
        address = pinned.ctypes.data
    for part, array in zip(slices, arrays):
        pinned[part].view(array.dtype).reshape(array.shape)[...] = array
    xp.cuda.runtime.memcpyAsync(buffer.data.ptr, address, n_bytes, HOST_TO_DEVICE, stream.ptr)
    fetched.record(stream)
    _uploads.append((fetched, pinned, address))


def _byte_slices(wanted):
    """Slices of a buffer of bytes with room for each (elements, type), from multiples of 256 on."""
    slices, end = [], 0
    for n, dtype in wanted:
        start = cdiv(end, 256) * 256
        end = start + n * np.dtype(dtype).itemsize
        slices.append(slice(start, end))
    return slices


def to_host(array):
    """A NumPy array. Waits until all work that was queued before is done."""
    return xp.asnumpy(array)


def _pinned(shape, dtype):
    """An array in pinned host memory, which asynchronous copies need."""
    n_bytes = _n_bytes(shape, dtype)
    with _needing(f"{size(n_bytes)} of the computer's own, pinned for copies, are"):
        memory = xp.cuda.alloc_pinned_memory(n_bytes)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


def read_later(array):
    """Start an asynchronous copy to the host; call the result to wait for it and get the NumPy array."""
    host, arrived = _pinned(array.shape, array.dtype), xp.cuda.Event()
    array.get(out=host, blocking=False)
    arrived.record()

    def read():
        arrived.synchronize()
        return host

    weakref.finalize(read, arrived.synchronize).atexit = False  # if nobody reads: keep the memory until then
    return read


def synchronize():
    """Wait until all queued work is done."""
    DEVICE.synchronize()


def now():
    """An event behind the work that is queued so far, for elapsed()."""
    event = xp.cuda.Event()
    event.record()
    return event


def elapsed(start, end):
    """Seconds that the GPU spent between two events of now(). Waits for the second."""
    end.synchronize()
    return xp.cuda.get_elapsed_time(start, end) / 1e3


def free_memory():
    """Bytes that can still be allocated: free memory of the GPU, and free blocks of CuPy's pool."""
    return DEVICE.mem_info[0] + xp.get_default_memory_pool().free_bytes()


_scratch = SimpleNamespace(buffer=None)


def scratch(*wanted):
    """Workspace for an operation, an array for each (elements, type); valid until the next operation.

    One buffer serves all operations, because they follow each other on one stream. It only grows.
    """
    slices = _byte_slices(wanted)
    if _scratch.buffer is None or _scratch.buffer.size < slices[-1].stop:
        if not _recording:
            _scratch.buffer = None  # freed first, so that its memory can be part of the new one
        _scratch.buffer = empty(slices[-1].stop, np.uint8)
    return [_scratch.buffer[part].view(dtype) for part, (_, dtype) in zip(slices, wanted)]


# ------------------------------------------------------------------------------------------------------------
# Recording

RECORD = True  # False: launch every kernel from Python, every time, to debug
# Whether the kernels of a recorded decode step begin before the ones before them have ended.
OVERLAP = True
RECORDINGS = 384  # that a dictionary holds at most; beyond it the one used least recently is dropped


def replay(recordings, function, *arguments, overlap=False):
    """function(*arguments), which returns nothing, as a CUDA graph: one launch instead of hundreds.

    The first call runs the function, so that kernels are compiled and all memory has its size; the second
    records its launches; later ones replay the recording, and Python does not run the function at all. So
    what changes from call to call must be in arrays:

    - NumPy arrays are copied to the GPU, to a place that all calls with arguments of the same shapes share,
      and there the function finds them.
    - Everything else goes to the function as it is: numbers, None, arrays on the GPU. Another number or array
      makes another recording.

    recordings is a dictionary of the caller's. It must be cleared when an array is replaced that the function
    uses and that is no argument. The function may launch kernels and fill arrays that it overwrites; it may
    neither wait nor, after its first call, allocate.

    With overlap, a kernel that launch() also gets with overlap=True may begin before the preceding kernel has
    ended. The function must then launch kernels only, and none of them may write parameters, which the next
    kernel may be reading already.
    """
    arrays = [x for x in arguments if isinstance(x, np.ndarray)]
    key = function.__name__, *map(_identity, arguments)
    recording = recordings.pop(key, None)
    if recording is None:
        slices = _byte_slices([(x.size, x.dtype) for x in arrays])
        buffer = empty(slices[-1].stop if slices else 0, np.uint8)
        views = (buffer[part].view(x.dtype).reshape(x.shape) for part, x in zip(slices, arrays))
        inputs = [next(views) if isinstance(x, np.ndarray) else x for x in arguments]
        recording = SimpleNamespace(buffer=buffer, slices=slices, inputs=inputs, graph=None, workspace=None)
        recording.ran = False
        if not any(name == function.__name__ for name, *_ in recordings):
            _compile_side_by_side(function, inputs)

    if arrays:
        _upload(recording.buffer, arrays, recording.slices)
    if RECORD and recording.ran:
        with _needing("memory for a recording is"):
            if recording.graph is None or recording.workspace is not _scratch.buffer:  # which has grown
                recording.graph = _recorded(function, recording.inputs, overlap)
                recording.workspace = _scratch.buffer
            recording.graph.launch()
    else:
        function(*recording.inputs)
        recording.ran = True
    recordings[key] = recording  # at the end: a dictionary keeps the order
    if len(recordings) > RECORDINGS:
        del recordings[next(iter(recordings))]


def _identity(argument):
    """What an argument of replay() adds to the key of its recording."""
    if isinstance(argument, np.ndarray):
        return argument.shape, argument.dtype.str
    if isinstance(argument, xp.ndarray):
        return argument.data.ptr, argument.shape, argument.dtype.str
    return argument


def _recorded(function, inputs, overlap):
    """The launches of function(*inputs) as a CUDA graph; none of them is made."""
    global _recording, _overlapping  # noqa: PLW0603
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            _recording, _overlapping = True, overlap and OVERLAP and _can_overlap()
            function(*inputs)
        finally:
            _recording = _overlapping = False
            graph = stream.end_capture()
    return graph


_planned = None  # {(file, kernel): shared} of launches that are noted, in _compile_side_by_side()


def _compile_side_by_side(function, inputs):
    """Compile the kernels that function(*inputs) will launch, on all cores: NVRTC holds no lock of Python's.

    To find them the function is called while launch() only notes what it would launch.
    """
    global _planned  # noqa: PLW0603
    _planned = {}
    try:
        function(*inputs)
    finally:
        kernels, _planned = _planned, None

    def compile_one(kernel):
        DEVICE.use()  # a thread begins with device 0
        load(*kernel, kernels[kernel])

    with ThreadPoolExecutor(threads.THREADS) as pool:
        list(pool.map(compile_one, kernels))


# ------------------------------------------------------------------------------------------------------------
# Launching

NAMES = {np.dtype(np.float32): "float", np.dtype(np.int32): "int", np.dtype(np.int64): "long"}
NAMES[np.dtype(ml_dtypes.bfloat16)] = "bf16"
WIDTH = {"float": 4, "bf16": 8}  # elements in 16 bytes, the most that a thread reads at once
MOST = 2**31 - 1  # elements of an array, because kernels take sizes as int


@functools.cache
def _parsed(what):
    operation, _, arrays = what.partition(": ")
    entries = []
    for entry in arrays.split(", "):
        name, kind, *dims = entry.split()
        dims = [re.fullmatch(r"(\d*)(\w?)", dim).groups() for dim in dims]
        dims = [(int(factor or 1), letter) for factor, letter in dims]
        entries.append((name.rstrip("?~"), name, kind, dims))
    return operation, entries


def check(what, *arrays):
    """Check arrays against "operation: name type sizes, ..."; return the sizes, and S, by their letters.

    A letter stands for the same number everywhere, and 3C for three times C. N as the first size stands for
    all leading dimensions together. A type is S, W (S or float), float, bf16, int or long. name? may be None;
    the rows of name~ may be further apart than they are long.
    """
    operation, entries = _parsed(what)
    found = {}
    for (name, marks, kind, dims), array in zip(entries, arrays, strict=True):
        if array is None and "?" in marks:
            continue
        if not isinstance(array, xp.ndarray):
            raise TypeError(f"{operation}: {name} is {type(array).__name__}, not an array on the GPU")
        element, shape, fits = NAMES.get(array.dtype), array.shape, array.device.id == DEVICE.id
        if kind == "S":
            fits &= element in WIDTH and found.setdefault("S", element) == element
        else:
            fits &= element == kind or (kind == "W" and element in ("float", found["S"]))
        if array.size > MOST:
            what = f"{operation}: {name} {shape} has {array.size:,} elements, a kernel counts to {MOST:,}"
            raise UserError(f"{what}; lower --batch-size, or choose a smaller --model")
        if dims[0][1] == "N" and len(shape) >= len(dims) - 1:
            leading = len(shape) - len(dims) + 1
            shape = math.prod(shape[:leading]), *shape[leading:]
        fits &= len(shape) == len(dims) and 0 not in shape
        fits &= (array[0] if "~" in marks and array.ndim else array).flags.c_contiguous
        for (factor, letter), length in zip(dims, shape):
            size_of_letter = found.setdefault(letter, length // factor) if letter else 1
            fits &= length == factor * size_of_letter
        if not fits:
            wanted = ", ".join(f"{f if f > 1 or not x else ''}{x}" for f, x in dims)
            known = ", ".join(f"{letter} = {value}" for letter, value in found.items())
            layout = "" if array.flags.c_contiguous else ", not contiguous,"
            is_a = f"{array.dtype} {array.shape}{layout} on GPU {array.device.id}"
            must_be = f"{kind} ({wanted}) on GPU {DEVICE.id}, with {known}"
            raise ValueError(f"{operation}: {name} is {is_a}; it must be {must_be}")
    return SimpleNamespace(**found)


def aligned(*arrays):
    """Whether the rows of these arrays, of which some may be None, begin on 16-byte boundaries.

    Where they do, kernels move 16 bytes at a time; where they do not, the first version of a kernel runs,
    which takes any size. Whole arrays begin on such a boundary: gpt2.py begins every view at a multiple of 64
    elements and pads the vocabulary to a multiple of 128. So the length of the rows, mostly C, decides.
    """
    for array in arrays:
        if array is not None and (array.data.ptr % 16 or array.shape[-1] * array.itemsize % 16):
            return False
    return True


# ------------------------------------------------------------------------------------------------------------
# Tensor maps


def tensor_map(array, box_rows):
    """The TMA map of a matrix (rows, columns): boxes of 128 bytes by box_rows rows, with 128-byte swizzle.

    A kernel takes it by value, as a `const __grid_constant__ TensorMap`. The row length in bytes and the
    address must be multiples of 16.
    """
    rows, columns = array.shape
    return _encoded(array.data.ptr, array.dtype, (columns, rows), (box_rows,))


def head_map(array, n_parts, n_head, box_rows):
    """The TMA map of (B, T, n_parts * n_head * HS): boxes of 64 channels of one head by box_rows tokens.

    Coordinates in the kernel are channel, head (of all parts), token, row of the batch.
    """
    B, T, C = array.shape
    heads = n_parts * n_head
    return _encoded(array.data.ptr, array.dtype, (C // heads, heads, T, B), (1, box_rows, 1))


@functools.lru_cache(8192)
def _encoded(address, dtype, sizes, box):
    """The 128 bytes of a map, from the driver's cuTensorMapEncodeTiled, which CuPy does not offer.

    sizes are those of a contiguous array, innermost first; the box is 128 bytes wide and then as given. The
    constants are those of cuda.h: float32 is type 7, bfloat16 type 9; swizzle 3 is 128 bytes; promotion 2
    fetches 128 bytes at once into L2.
    """
    types = {"float": 7, "bf16": 9}
    modes = 0, 3, 2, 0  # no interleaving, swizzle, promotion, zeros outside the array
    itemsize, rank = dtype.itemsize, len(sizes)
    strides = [itemsize * math.prod(sizes[: i + 1]) for i in range(rank - 1)]
    memory = np.zeros(192, np.uint8)
    start = -memory.ctypes.data % 64
    encoded = memory[start : start + 128]
    arguments = [
        ctypes.c_void_p(encoded.ctypes.data),
        ctypes.c_int(types[NAMES[dtype]]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(128 // itemsize, *box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        *map(ctypes.c_int, modes),
    ]
    status = _driver().cuTensorMapEncodeTiled(*arguments)
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled refuses {dtype} {sizes} at {address:#x}: error {status}")
    return encoded.view("V128")


@functools.cache
def _driver():
    return ctypes.CDLL("libcuda.so.1")


# ------------------------------------------------------------------------------------------------------------
# Compiling and loading


@functools.cache
def _options(file=""):
    """NVRTC's options. CuPy's cache depends on them and on the .cu file, so a checksum of the headers is one.

    -ftz=true: denormal numbers become 0, so exp2f, rsqrtf and division need no extra steps for them.
    """
    headers = b"".join(path.read_bytes() for path in sorted(HERE.glob("*.cuh")))
    common = "-std=c++17", "-ftz=true", f"-I{HERE}", f"-UHEADERS_{zlib.crc32(headers)}"
    return (*common, "-arch=sm_90a") if file.endswith("_hopper") else common


_allowed = {}  # (file, kernel): bytes of dynamic shared memory, the most that a launch has asked for


@functools.cache
def load(file, kernel, shared=0):
    """A kernel of a .cu file, compiled for this GPU; it may use `shared` bytes of dynamic shared memory."""
    if shared > SHARED:
        needs = f"{kernel} needs {shared:,} bytes of shared memory"
        has = f"a block of this GPU (sm_{CAPABILITY}) has {SHARED:,}"
        raise UserError(f"kernels/{file}.cu: {needs}, {has}; use a GPU of sm_80 or newer, or --device cpu")
    try:
        code = (HERE / f"{file}.cu").read_text()
        with _needing(f"memory to load kernels/{file}.cu is"):
            module = xp.RawModule(code=code, options=_options(file), name_expressions=[kernel])
            function = module.get_function(kernel)
    except xp.cuda.compiler.CompileException as error:
        what = f"kernels/{file}.cu does not compile ({kernel}, sm_{CAPABILITY})"
        raise UserError(f"{what}; this is a bug, please report it with the log:\n{error}") from None
    except (ImportError, OSError, RuntimeError) as error:
        remedy = f"NVRTC may be missing: {INSTALL}"
        raise UserError(f"kernels/{file}.cu cannot be compiled or loaded ({error}); {remedy}") from None
    if shared:  # without this 48 KB are the most; CuPy returns the same function for every size
        _allowed[file, kernel] = most = max(shared, _allowed.get((file, kernel), 0))
        function.max_dynamic_shared_size_bytes = most
    return function


def launch(file, kernel, grid, block, *arguments, shared=0, overlap=False):
    """Launch a kernel. grid and block are numbers or tuples; Python's numbers become int and float.

    None becomes a null pointer: CuPy itself would make 0xffffffff of it (its issue 9046).

    overlap is for kernels in whose source every block calls griddepcontrol_wait() (ptx.cuh). In a recording
    of replay(..., overlap=True) their blocks may begin before the preceding kernel has ended; until they wait
    they do what does not depend on it.
    """
    grid, block = (shape if isinstance(shape, tuple) else (shape,) for shape in (grid, block))
    plain = {int: np.int32, float: np.float32, type(None): lambda _: np.uint64(0)}
    arguments = tuple(plain.get(type(argument), lambda x: x)(argument) for argument in arguments)
    if _planned is not None:
        _planned[file, kernel] = shared
        return
    function = load(file, kernel, shared)
    with _needing(f"memory to run {kernel} is"):
        if overlap and _overlapping:
            _launch_overlapping(function, grid, block, arguments, shared)
        else:
            function(grid, block, arguments, shared_mem=shared)


class _Attribute(ctypes.Structure):
    """cuda.h's CUlaunchAttribute, with an int as the value."""

    _fields_ = [("id", ctypes.c_uint64), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):
    """cuda.h's CUlaunchConfig. sizes are those of the grid and of the block."""

    _fields_ = [
        ("sizes", ctypes.c_uint * 6),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    ]


def _can_overlap():
    """Programmatic dependent launch is of compute capability 9.0, and of drivers since CUDA 11.8's."""
    return CAPABILITY >= 90 and hasattr(_driver(), "cuLaunchKernelEx")


def _launch_overlapping(function, grid, block, arguments, shared):
    """Programmatic dependent launch (CUDA programming guide) by the driver: CuPy's own launch has no
    attributes. Number 6 is programmatic stream serialization, which capture makes an edge of the graph."""
    attribute = _Attribute(id=6, value=1)
    sizes = [*grid, *(1,) * (3 - len(grid)), *block, *(1,) * (3 - len(block))]
    stream = xp.cuda.get_current_stream().ptr
    config = _Launch((ctypes.c_uint * 6)(*sizes), shared, stream, ctypes.pointer(attribute), 1)
    # Each argument as a NumPy number, which has the width of the kernel's parameter, and pointers to them.
    values = [np.uint64(x.data.ptr) if isinstance(x, xp.ndarray) else x for x in arguments]
    values = [np.array(value) for value in values]
    pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
    handle = ctypes.c_void_p(function.kernel.ptr)
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), handle, pointers, None)
    if status:
        raise RuntimeError(f"cuLaunchKernelEx refuses {function.name}: error {status}")
