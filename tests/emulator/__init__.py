"""Runs the project's .cu files, unchanged, on the CPU: a CUDA emulator for tests, and a stand-in for CuPy.

    import emulator
    cupy = emulator.install()           # from now on `import cupy` gives the stand-in

Read in this order: include/emulator.h (blocks, fibers, barriers, warp functions), include/ptx.cuh (ldmatrix,
mma, cp.async), include/ptx_hopper.cuh (mbarriers, TMA, wgmma, clusters), include/cuda_bf16.h, runtime.cpp
(guarded memory, faults, tensor maps), compiler.py, launcher.py, fake_cupy.py, fake_nccl.py.

What it finds, each an error that names the kernel and, where there is one, block, thread and line:

- a barrier that not all threads reach, or that they reach at different lines; a thread that has returned
  while others wait; a warp function that not all lanes of its mask reach, or whose mask names absent lanes
- access outside of an array: each ends where its memory ends, and the next page faults; the bytes left over
  for alignment, and those in front, are NaN and are checked after every launch. Access outside of the
  dynamic shared memory. An index outside of an array of known size (registers, static shared memory)
- misaligned vectors, cp.async and ldmatrix; integer division by zero; a shift by too much; a stack overflow
- uninitialised memory: arrays from `empty`, and all shared memory before each block, hold NaN (bytes 0xff)
- cp.async that is not waited for: the data land at the wait, until then there is NaN
- on Hopper, copies and products that are not waited for, or whose memory is taken too early. TMA's loads
  land at a time of chance, and NaN is there until then; stores read and write late; wgmma computes in
  wgmma_wait, from what is in shared memory then, and its accumulators are NaN until then. Errors at once: a
  load to where another load, a store or a product is still at work, a product of what is still being
  loaded or that nobody has waited for, stmatrix onto what a store has not read, accumulators written too
  early, a thread that ends before its stores or products, and a missing async_proxy_fence between stmatrix
  and what reads it
- mbarriers that were not initialised, or overwritten; arrivals and bytes that are too many; who waits and
  falls a whole phase behind. A deadlock says which barrier lacks how many arrivals and bytes
- TMA and wgmma that a card would refuse: coordinates, alignment, descriptors, tensor maps that are none or
  reach beyond their array; products without wgmma_fence; threads of a warpgroup that disagree
- in clusters: a block that ends, or has not begun, while the other sends to it
- too much shared memory, too many threads, a grid over the limits
- arguments of the wrong number, kind, size or element type
- asynchrony of the host: work on any stream but the null stream runs when something waits for it, not
  earlier
- in the recording of a graph: an allocation, loading a kernel, waiting, a copy from pageable memory. A graph
  that is launched after an array of its was freed
- races, in three ways. Threads and blocks run in a shuffled order, reversed after every barrier, so that a
  missing barrier usually gives wrong numbers; on Hopper whole warpgroups and blocks of a cluster are held
  back for a while. EMULATOR_TWICE=1 runs each launch forwards and backwards and compares the bits.
  EMULATOR_RACES=1 watches every access to shared memory, and names both lines; there any phase of an
  mbarrier, named barrier, cluster_sync or wgmma_wait that ends puts all accesses before it in order with
  all after it, and copies and products are not watched, so it finds less in kernels with these. But it finds
  every missing async_proxy_fence

What it cannot find: mistakes of memory order (every write is seen at once by all), barrier_init_fence among
them, and without EMULATOR_RACES a missing async_proxy_fence after an ordinary write; an ordinary write to
shared memory that a store has not read yet, or an ordinary read of what has landed by luck before it was
waited for, unless the numbers show it (try several EMULATOR_ORDER); one warpgroup that does not wait where
another has; registers of a wgmma's left operand that change before the wait; races in global memory whose
orders happen to agree; bank conflicts, uncoalesced access, registers and all else about speed; an endless
loop (give pytest a timeout); access outside of a view that stays inside of the array behind it; variables
of device functions in the limit of shared memory; differences in the GPU's fast mathematics (__expf is
exact here, and tensor cores round a little differently).

Not there: static shared memory in clusters, more than 1024 threads in a cluster, wgmma of other types than
bf16 and other swizzles than 128 bytes, tensor maps with interleaving or element strides, and boxes that are
narrower than their swizzle.

It runs on Linux, on x86-64 and (never tried) aarch64. Settings, environment variables all:
    EMULATOR_ORDER      forward, reverse, or a seed for the shuffle (1)
    EMULATOR_TWICE      1: compare two orders, see above
    EMULATOR_RACES      1: watch shared memory, see above; ten times slower, and compiled anew
    EMULATOR_THREADS    operating system threads for the blocks of one launch (all cores, 4 at most)
    EMULATOR_COPIES     when TMA's copies arrive: by chance (mixed, the default), at once (eager), or when all
                        threads wait (late)
    EMULATOR_EAGER      1: work on streams runs at once, so that an error's traceback shows the launch
    EMULATOR_SANITIZE   1: compile with -fsanitize=address,undefined; from tests/, start Python with
                        env EMULATOR_SANITIZE=1 $(python -m emulator) python -m pytest ...
    CXX                 the compiler; by default g++, clang++, c++ or PyPI's ziglang wheel
    HANDMADE_CACHE      compiled kernels are in $HANDMADE_CACHE/emulator, otherwise in tests/emulator/.cache
"""

import sys

from . import fake_cupy, launcher
from .compiler import CompileError
from .launcher import KernelError

__all__ = ["CompileError", "KernelError", "install"]


def install(capability=90):
    """Put the stand-in at the place of CuPy, as a card of this compute capability, and return it."""
    launcher.runtime()  # it is libcuda.so.1 for whoever asks from now on
    fake_cupy.cuda.set_capability(capability)
    sys.modules.update(fake_cupy.modules())
    return fake_cupy
