"""NumPy on all cores: blocks of an operation, shared out over threads. Nothing here is about GPT-2.

NumPy's matmul calls the BLAS library, which is limited here to one thread. An operation's rows, or the tiles
of a product, are cut into blocks that fit the cache, and our own threads take them in turn (`parallel`).
NumPy releases the interpreter lock while it computes, so the threads really run side by side, and a block is
still in the cache when its bias and its GELU are added.

The blocks of a sum depend on the sizes alone, not on the number of threads. The tiles of a product do depend
on it, because small tiles cost time, and a BLAS library may round the last rows and columns of a tile
differently: the bits are the same on the same number of threads.
"""

import ctypes
import math
import os
import queue
import threading
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

threadpool_limits(1, user_api="blas")  # a BLAS call uses one thread: `parallel` makes calls side by side
libc = ctypes.CDLL(None)
if hasattr(libc, "mallopt"):  # glibc. Keep freed memory: page faults were a tenth of a small step's CPU time
    libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, in bytes
    libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD

GRAIN = 1 << 17  # elements of a block of rows: 512 KB in float32, about what an L2 cache holds
TILE = 1 << 20  # elements of a tile of a matrix product
SMALLEST = 1 << 13  # elements of a matrix product that is worth cutting


def thread_count():
    """OMP_NUM_THREADS if set, as for other numeric programs; else the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else cores


THREADS = thread_count()
_work = queue.SimpleQueue()
_workers = []
os.register_at_fork(after_in_child=_workers.clear)  # a child has none of its parent's threads


def _worker():
    while True:
        task, done = _work.get()
        try:
            done.put(task())
        except BaseException as error:
            done.put(error)


def parallel(body, blocks):
    """Call body(*block) for every block, shared out over the threads; return when all are done."""
    blocks = list(blocks)
    helpers = min(THREADS, len(blocks)) - 1
    if helpers <= 0:
        for block in blocks:
            body(*block)
        return
    while len(_workers) < helpers:
        _workers.append(threading.Thread(target=_worker, daemon=True))
        _workers[-1].start()
    remaining = iter(blocks)  # next() on it is atomic: whoever is free takes the next block

    def task():
        for block in remaining:
            body(*block)

    done = queue.SimpleQueue()
    for _ in range(helpers):
        _work.put((task, done))
    try:
        task()
    finally:
        errors = [done.get() for _ in range(helpers)]
    for error in filter(None, errors):
        raise error


def free_memory():
    """Bytes that this process can still allocate, or None where the system does not say.

    That is the machine's free memory, or what the limit of a container leaves of it (Linux control groups,
    version 2 and 1). Cached files count as free, because the system drops them when it needs the memory.
    """
    free = [1024 * fields_of("/proc/meminfo").get("MemAvailable:", math.inf)]
    for line in text_of("/proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":  # version 2
            root, limit, used, files = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif kinds == "memory":
            root, limit = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, files = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = Path(root + path)
        while str(group).startswith(root):  # a group has the limits of those around it, too
            if text_of(group / limit).strip().isdigit():  # not "max"
                cache = fields_of(group / "memory.stat").get(files, 0)
                free.append(int(text_of(group / limit)) - int(text_of(group / used)) + cache)
            group = group.parent
    return None if min(free) == math.inf else max(0, min(free))


def fields_of(path):
    """{first word: the number after it} of a file's lines."""
    lines = [line.split() for line in text_of(path).splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def text_of(path):
    """The text of a file of the system, "" if there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def pieces(n, length):
    """Slices of at most `length`, which is at least 1, that cover range(n)."""
    return [slice(i, min(i + length, n)) for i in range(0, n, length)]


def by_rows(body, rows, width):
    """Call body(slice) for blocks of rows of `width` elements; a small array is one block."""
    length = min(max(1, GRAIN // width), -(-rows // 2)) if rows * width > GRAIN else rows
    parallel(body, [(block,) for block in pieces(rows, length)])


def tiles(rows, columns):
    """(row slice, column slice) of the tiles of a matrix product, cut along its longer side."""
    n = max(THREADS, rows * columns // TILE) if rows * columns >= SMALLEST else 1
    if columns >= rows:
        return [(slice(0, rows), block) for block in pieces(columns, -(-columns // n))]
    return [(block, slice(0, columns)) for block in pieces(rows, -(-rows // n))]


_local = threading.local()


def scratch(i, shape, dtype):
    """Scratch array i of this thread. A new array for every block would take as long as the block itself."""
    arrays = _local.__dict__.setdefault("arrays", {})
    needed = math.prod(shape)
    if (i, dtype) not in arrays or arrays[i, dtype].size < needed:
        arrays[i, dtype] = np.empty(needed, dtype)
    return arrays[i, dtype][:needed].reshape(shape)
