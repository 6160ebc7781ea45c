"""The emulator itself: each facility against NumPy, and each mistake that it must report, made on purpose."""

import ctypes
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import emulator
import hypothesis
import ml_dtypes
import numpy as np
import pytest
from emulator import KernelError, compiler
from hypothesis import strategies as st
from ml_dtypes import bfloat16 as bf16

cupy = emulator.install()
ROOT = Path(__file__).parents[1]

KERNELS = r"""
#include "ptx.cuh"

// ---- facilities

extern "C" __global__ void indices(int* out) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread + 1;
}

template <typename T> __device__ T block_sum(T value) {     // static shared memory in a template
    __shared__ T parts[32];
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    T total = 0;
    for (int w = 0; w < blockDim.x / 32; w++) total += parts[w];
    return total;
}
template <typename T> __global__ void __launch_bounds__(1024) sums(T* out, const T* inp) {
    T first = block_sum(inp[blockIdx.x * blockDim.x + threadIdx.x]);
    T second = block_sum(first);
    if (threadIdx.x == 0) out[blockIdx.x] = second;
}

template <typename T> __global__ void shuffles(T* out, const T* inp) {
    int lane = threadIdx.x;
    T x = inp[lane];
    out[lane] = __shfl_sync(0xffffffff, x, 3);
    out[32 + lane] = __shfl_sync(0xffffffff, x, 3, 8);
    out[64 + lane] = __shfl_up_sync(0xffffffff, x, 5);
    out[96 + lane] = __shfl_up_sync(0xffffffff, x, 3, 16);
    out[128 + lane] = __shfl_down_sync(0xffffffff, x, 5);
    out[160 + lane] = __shfl_down_sync(0xffffffff, x, 3, 16);
    out[192 + lane] = __shfl_xor_sync(0xffffffff, x, 5);
    // The halves of a warp, each for itself, at different speed
    if (lane < 16) out[224 + lane] = __shfl_xor_sync(0x0000ffff, __shfl_xor_sync(0x0000ffff, x, 1), 2);
    else out[224 + lane] = __shfl_down_sync(0xffff0000, x, 1);
}

extern "C" __global__ void votes(unsigned* out, const int* inp) {
    int lane = threadIdx.x;
    unsigned all = 0xffffffff;
    out[lane] = __ballot_sync(all, inp[lane] % 3 == 0);
    out[32 + lane] = __any_sync(all, inp[lane] > 1000) * 2 + __all_sync(all, inp[lane] < 1000);
    out[64 + lane] = __reduce_add_sync(all, inp[lane]);
    out[96 + lane] = __reduce_max_sync(all, inp[lane]);
    out[128 + lane] = __reduce_min_sync(all, inp[lane]);
    out[160 + lane] = __reduce_xor_sync(all, (unsigned)inp[lane]);
    out[192 + lane] = __syncthreads_or(lane == 5) * 4 + __syncthreads_and(lane != 5) * 2;
    out[224 + lane] = __syncthreads_count(inp[lane] % 3 == 0);
}

extern "C" __global__ void reverse(float* out, const float* inp) {     // dynamic shared memory
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* row = (float*)shared_memory;
    int at = blockIdx.x * blockDim.x;
    row[threadIdx.x] = inp[at + threadIdx.x];
    __syncthreads();
    out[at + threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void count(int* total, unsigned* most) {
    for (int i = 0; i < 100; i++) atomicAdd(total, 1);
    atomicMax(most, blockIdx.x * blockDim.x + threadIdx.x);
}

extern "C" __global__ void convert(__nv_bfloat16* out, float* back, const float* inp, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __float2bfloat16_rn(inp[i]), back[i] = __bfloat162float(out[i]);
}

extern "C" __global__ void copy_vectors(float4* out, const float4* inp) {
    out[threadIdx.x] = __ldg(&inp[threadIdx.x]);
}

extern "C" __global__ void mathematics(float* f, unsigned* u, float x, unsigned a, unsigned b) {
    f[0] = rsqrtf(x), f[1] = exp2f(x), f[2] = __expf(x), f[3] = tanhf(x), f[4] = __fdividef(1.0f, x);
    f[5] = fmaf(x, x, 1.0f), f[6] = __logf(x), f[7] = fmaxf(x, 3.0f), f[8] = erff(x), f[9] = max(x, 0.5f);
    u[0] = __umulhi(a, b), u[1] = __popc(a), u[2] = __clz(a), u[3] = __brev(a), u[4] = __float_as_uint(x);
    u[5] = __byte_perm(a, b, 0x3715), u[6] = __ffs(a), u[7] = __funnelshift_l(a, b, 5), u[8] = min(a, b);
}

// One warp: out (16, 8) = a (16, 16) b (16, 8), with b row-major in shared memory
extern "C" __global__ void tensor_core(float* out, const __nv_bfloat16* a, const __nv_bfloat16* b) {
    __shared__ __align__(16) __nv_bfloat16 as[16][16], bs[16][8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) as[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) bs[i / 8][i % 8] = b[i];
    __syncthreads();
    unsigned ra[4], rb[2];
    float d[4] = {1, 2, 3, 4};
    ldmatrix_x4(ra, &as[lane % 16][lane / 16 * 8]);
    ldmatrix_x2_trans(rb, &bs[lane % 16][0]);
    mma_m16n8k16(d, ra, rb);
    for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

extern "C" __global__ void fragments(unsigned* out, const __nv_bfloat16* inp) {     // of four 8 x 8 matrices
    __shared__ __align__(16) __nv_bfloat16 tile[32][8];
    int lane = threadIdx.x;
    for (int i = 0; i < 8; i++) tile[lane][i] = inp[lane * 8 + i];
    __syncthreads();
    unsigned r[4];
    ldmatrix_x4(r, tile[lane]);
    for (int i = 0; i < 4; i++) out[lane * 4 + i] = r[i];
    ldmatrix_x4_trans(r, tile[lane]);
    for (int i = 0; i < 4; i++) out[128 + lane * 4 + i] = r[i];
    unsigned s[2];
    ldmatrix_x2(s, tile[lane % 16]);
    for (int i = 0; i < 2; i++) out[256 + lane * 2 + i] = s[i];
}

// Rows of 4 floats through two stages; WAIT says how many groups may be on their way when a row is read
template <int WAIT> __global__ void pipeline(float* out, const float* inp, int rows, int last_bytes) {
    __shared__ __align__(16) float stages[2][4];
    auto load = [&](int row) {
        if (row < rows) cp_async_16(stages[row % 2], inp + 4 * row, row == rows - 1 ? last_bytes : 16);
        cp_async_commit();
    };
    load(0);
    for (int row = 0; row < rows; row++) {
        load(row + 1);
        cp_async_wait<WAIT>();
        for (int i = 0; i < 4; i++) out[4 * row + i] = stages[row % 2][i];
    }
}

extern "C" __global__ void uninitialised(float* out) {
    __shared__ float fixed[4];
    extern __shared__ __align__(16) unsigned char shared_memory[];
    out[2 * blockIdx.x] = fixed[1], out[2 * blockIdx.x + 1] = ((float*)shared_memory)[3];
    for (int i = 0; i < 4; i++) fixed[i] = 1, ((float*)shared_memory)[i] = 1;
}

// ---- mistakes

extern "C" __global__ void missed_barrier() {
    if (threadIdx.x == 3) return;
    __syncthreads();
}
extern "C" __global__ void divergent_barrier() {
    if (threadIdx.x < 8) __syncthreads();
    else
        __syncthreads();
}
extern "C" __global__ void missing_lanes(int* out) {
    if (threadIdx.x < 20) out[0] = __shfl_sync(0xffffffff, 1, 0);
    __syncthreads();
}
extern "C" __global__ void returned_lanes(int* out) {
    if (threadIdx.x < 20) out[0] = __shfl_sync(0xffffffff, 1, 0);
}
extern "C" __global__ void not_in_mask(int* out) { out[0] = __shfl_sync(0x0000ffff, 1, 0); }
extern "C" __global__ void reads_outside_mask(int* out) {
    if (threadIdx.x < 16) out[0] = __shfl_down_sync(0x0000ffff, 1, 1);
}
extern "C" __global__ void different_functions(int* out) {
    if (threadIdx.x < 16) out[0] = __shfl_sync(0xffffffff, 1, 0);
    else out[0] = __ballot_sync(0xffffffff, 1);
}
extern "C" __global__ void write_at(float* out, int i) { if (threadIdx.x == 7) out[i] = 1; }
extern "C" __global__ void read_at(float* out, const float* inp, int i) { out[0] = inp[i]; }
extern "C" __global__ void fixed_index(float* out, int i) {
    __shared__ float tile[4][8];
    tile[threadIdx.x][0] = i;
    out[0] = tile[1][i];
}
extern "C" __global__ void dynamic_index(int i) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    shared_memory[i] = 1;
}
extern "C" __global__ void divide(int* out, int by) { out[0] = 7 / by; }
extern "C" __global__ void vector_at(float* out, int i) { *(float4*)(out + i) = float4{1, 2, 3, 4}; }
extern "C" __global__ void copy_at(const float* inp, int to, int from) {
    __shared__ __align__(16) float tile[8];
    cp_async_16(tile + to, inp + from, 16);
}
extern "C" __global__ void matrix_at(int i) {
    __shared__ __align__(16) unsigned char tile[512 + 16];
    unsigned r[4];
    ldmatrix_x4(r, tile + threadIdx.x * 16 + i);
}
__device__ __noinline__ int deep(int n) {
    volatile int local[64];
    local[n % 64] = n;
    return n ? deep(n - 1) + local[n % 64] : 0;
}
extern "C" __global__ void recursion(int* out) { out[0] = deep(100000); }
extern "C" __global__ void big_static(float* out) {
    __shared__ float tile[12289];
    tile[threadIdx.x] = 0;
    out[0] = tile[0];
}
extern "C" __global__ void trap() { __trap(); }

// ---- races

extern "C" __global__ void race_between_blocks(int* out) { out[0] = blockIdx.x; }
extern "C" __global__ void race_in_block(float* out) {
    __shared__ float tile[64];
    tile[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = tile[threadIdx.x ^ 33];
}
extern "C" __global__ void warp_without_sync(float* out) {
    __shared__ float tile[64];
    tile[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = tile[threadIdx.x ^ 1];
}
extern "C" __global__ void no_race(float* out) {
    __shared__ float tile[64];
    tile[threadIdx.x] = threadIdx.x;
    __syncwarp();
    float neighbour = tile[threadIdx.x ^ 1];
    __syncthreads();
    tile[threadIdx.x ^ 33] = neighbour;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}
"""
TEMPLATES = ["sums<float>", "sums<double>", "sums<long long>", "pipeline<0>", "pipeline<1>", "pipeline<2>"]
TEMPLATES += [f"shuffles<{kind}>" for kind in ("int", "unsigned", "float", "double", "long long")]
NAMES = TEMPLATES + compiler.kernel_names(KERNELS)
MODULE = cupy.RawModule(code=KERNELS, name_expressions=NAMES)
I = np.int32


def run(name, *arguments, grid=(1,), block=(32,), shared_mem=0, module=MODULE):
    """Launch with NumPy arrays sent to the device; returns the first array argument."""
    host = lambda a: isinstance(a, np.ndarray) and a.itemsize < 128  # a tensor map goes by value
    sent = [cupy.asarray(a) if host(a) else a for a in arguments]
    module.get_function(name)(grid, block, tuple(sent), shared_mem=shared_mem)
    return next((a.get() for a in sent if isinstance(a, cupy.ndarray)), None)


def empty(shape, dtype=np.float32):
    return cupy.empty(shape, dtype)


# ------------------------------------------------------------------------------------------------- facilities


def test_every_thread_of_every_block_runs_once():
    out = run("indices", np.zeros(2 * 3 * 4 * 30, I), grid=(2, 3, 4), block=(5, 3, 2))
    expected = np.arange(24)[:, None] * 1000 + np.arange(30) + 1
    np.testing.assert_array_equal(out.reshape(24, 30), expected)


@pytest.mark.parametrize("order", ["forward", "reverse", "1", "2", "77"])
@pytest.mark.parametrize("kind, dtype", [("float", "f4"), ("double", "f8"), ("long long", "i8")])
def test_block_reduction(kind, dtype, order, monkeypatch):
    monkeypatch.setenv("EMULATOR_ORDER", order)
    inp = np.random.default_rng(1).integers(0, 9, (7, 256)).astype(dtype)
    out = run(f"sums<{kind}>", empty(7, dtype), inp, grid=(7,), block=(256,))
    np.testing.assert_array_equal(out, inp.sum(1) * 256)


def shuffled(x):
    """What the kernel `shuffles` computes, after the CUDA guide's description."""
    lane = np.arange(32)
    half = np.where(lane < 16, x[lane ^ 3], x[np.minimum(lane + 1, 31)])
    up16, down16 = np.where(lane % 16 < 3, lane, lane - 3), np.where(lane % 16 > 12, lane, lane + 3)
    sources = [lane * 0 + 3, lane // 8 * 8 + 3, np.where(lane < 5, lane, lane - 5), up16]
    sources += [np.where(lane > 26, lane, lane + 5), down16, lane ^ 5]
    return np.concatenate([*(x[s] for s in sources), half])


@pytest.mark.parametrize(
    "kind, dtype", [("int", "i4"), ("unsigned", "u4"), ("float", "f4"), ("double", "f8"), ("long long", "i8")]
)
def test_shuffles(kind, dtype):
    inp = np.random.default_rng(2).integers(0, 2**30, 32).astype(dtype)
    np.testing.assert_array_equal(run(f"shuffles<{kind}>", empty(256, dtype), inp), shuffled(inp))


def test_votes_and_reductions():
    inp = np.random.default_rng(3).integers(-50, 999, 32).astype(I)
    out = run("votes", empty(256, np.uint32), inp).reshape(8, 32)
    assert (out == out[:, :1]).all()
    ballot = sum(1 << i for i in range(32) if inp[i] % 3 == 0)
    xor = np.bitwise_xor.reduce(inp.view(np.uint32))
    values = [ballot, 1, inp.sum(), inp.max(), inp.min(), xor, 4, (inp % 3 == 0).sum()]
    assert [int(v) for v in out[:, 0]] == [int(v) % 2**32 for v in values]


def test_dynamic_shared_memory():
    inp = np.random.default_rng(4).normal(size=(5, 96)).astype("f4")
    out = run("reverse", empty((5, 96)), inp, grid=(5,), block=(96,), shared_mem=96 * 4)
    np.testing.assert_array_equal(out, inp[:, ::-1])


def test_atomics_are_atomic_across_workers():
    total, most = cupy.asarray(np.zeros(1, I)), cupy.asarray(np.zeros(1, np.uint32))
    for _ in range(3):  # from the second launch on, several operating system threads share the blocks
        run("count", total, most, grid=(300,), block=(64,))
    assert total.get() == 3 * 300 * 64 * 100 and most.get() == 300 * 64 - 1


def test_bf16_rounds_as_ml_dtypes():
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    bits[:6] = [0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00012345]
    inp = bits.view(np.float32)
    out, back = cupy.empty(20000, ml_dtypes.bfloat16), empty(20000)
    run("convert", out, back, inp, I(20000), grid=(79,), block=(256,))
    with np.errstate(invalid="ignore"):
        expected = inp.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out.get().astype("f4"), expected.astype("f4"))
    np.testing.assert_array_equal(back.get(), expected.astype("f4"))


def test_vectors():
    inp = np.random.default_rng(6).normal(size=128).astype("f4")
    np.testing.assert_array_equal(run("copy_vectors", empty(128), inp), inp)


def test_mathematics():
    x, a, b = np.float32(1.37), 0x9ABCDEF1, 0x12345678
    f, u = empty(10), empty(9, np.uint32)
    run("mathematics", f, u, x, np.uint32(a), np.uint32(b), block=(1,))
    y = float(x)
    expected = [y**-0.5, 2**y, np.exp(y), np.tanh(y), 1 / y, y * y + 1, np.log(y), 3, 0.9473, y]
    np.testing.assert_allclose(f.get(), expected, rtol=1e-4)
    reversed_bits = int(f"{a:032b}"[::-1], 2)
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    permuted = int.from_bytes(bytes(data[i] for i in (5, 1, 7, 3)), "little")
    shifted = ((b << 32 | a) << 5 >> 32) % 2**32
    words = [
        a * b >> 32,
        bin(a).count("1"),
        0,
        reversed_bits,
        int(x.view(np.uint32)),
        permuted,
        1,
        shifted,
        b,
    ]
    assert [int(v) for v in u.get()] == words


def test_tensor_core_multiplies():
    rng = np.random.default_rng(7)
    a, b = (rng.normal(size=s).astype(ml_dtypes.bfloat16) for s in ((16, 16), (16, 8)))
    d = np.array([[1, 2], [3, 4]], "f4")  # what the accumulators hold before, by half and parity
    before = np.repeat(np.tile(d, (1, 4)), 8, 0)
    expected = before + a.astype("f8") @ b.astype("f8")
    np.testing.assert_allclose(run("tensor_core", empty((16, 8)), a, b), expected, rtol=1e-5, atol=1e-5)


def test_ldmatrix_gives_the_fragments_of_the_ptx_isa():
    inp = np.random.default_rng(8).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    out = run("fragments", empty(320, np.uint32), cupy.asarray(inp.view(ml_dtypes.bfloat16)))
    pairs = lambda m: (
        m.reshape(4, 32, 2).astype(np.uint32) @ np.array([1, 65536], np.uint32)
    )  # (matrix, lane)
    np.testing.assert_array_equal(out[:128].reshape(32, 4), pairs(inp).T)
    np.testing.assert_array_equal(out[128:256].reshape(32, 4), pairs(inp.transpose(0, 2, 1).copy()).T)
    np.testing.assert_array_equal(out[256:].reshape(32, 2), pairs(inp).T[:, :2])


@pytest.mark.parametrize("rows, last_bytes", [(1, 16), (7, 16), (300, 12), (4, 0)])
def test_cp_async_delivers_at_the_wait(rows, last_bytes):
    inp = np.random.default_rng(9).normal(size=(rows, 4)).astype("f4")
    expected = inp.copy()
    expected[-1, last_bytes // 4 :] = 0
    for wait in (0, 1):
        out = run(f"pipeline<{wait}>", empty((rows, 4)), inp, I(rows), I(last_bytes), block=(1,))
        np.testing.assert_array_equal(out, expected)


def test_cp_async_without_its_wait_is_nan():
    inp = np.ones((7, 4), "f4")
    assert np.isnan(run("pipeline<2>", empty((2, 4)), inp[:2], I(2), I(16), block=(1,))).all()
    with pytest.raises(KernelError, match="an earlier copy to the same place was not waited for"):
        run("pipeline<2>", empty((7, 4)), inp, I(7), I(16), block=(1,))


def test_uninitialised_memory_is_nan():
    assert np.isnan(empty((3, 5)).get()).all()
    assert np.isnan(cupy.empty(5, ml_dtypes.bfloat16).get().astype("f4")).all()
    assert np.isnan(run("uninitialised", empty(20), grid=(10,), block=(1,), shared_mem=16)).all()


# --------------------------------------------------------------------------------------------------- mistakes


def line_of(text):
    return 1 + KERNELS[: KERNELS.index(text)].count("\n")


@pytest.mark.parametrize("name, message", [
    ("missed_barrier", r"deadlock; 31 threads waiting in __syncthreads .*; 1 thread returned, .*\(3, 0, 0\)"),
    ("divergent_barrier", r"divergent barrier: thread \(\d+, 0, 0\) is in __syncthreads at .*:\d+ while"),
])  # fmt: skip
def test_barriers(name, message):
    with pytest.raises(KernelError, match=f"{name}: block .0, 0, 0., thread .*{message}"):
        run(name)
    assert run("indices", np.zeros(30, I), block=(30,))[0] == 1  # the emulator is none the worse for it


@pytest.mark.parametrize("name, message", [
    ("missing_lanes", "deadlock.*20 threads waiting in __shfl_sync"),
    ("returned_lanes", r"returned, but lanes of its warp wait|names lanes that returned"),
    ("not_in_mask", "which leaves it out"),
    ("reads_outside_mask", "lane 15 reads lane 16, which is not in the mask"),
    ("different_functions", "other lanes of mask ffffffff are in"),
])  # fmt: skip
def test_warp_functions(name, message):
    with pytest.raises(KernelError, match=message):
        run(name, empty(1, I))


def test_a_mask_must_not_name_lanes_that_do_not_exist():
    with pytest.raises(KernelError, match="names lanes that returned or do not exist"):
        run("not_in_mask", empty(1, I), block=(8,))


@pytest.mark.parametrize("n", [1, 3, 4, 100, 4096, 100_000])
@pytest.mark.parametrize("beyond", [0, 1, 5, 1000, 300_000])
def test_access_beyond_an_array(n, beyond):
    where = (
        r"write_at: .*(thread \(7, 0, 0\).* writes \d+ bytes after the end of|wrote outside of) argument 0 "
    )
    with pytest.raises(KernelError, match=where + rf"\(float32 \({n},\)\)"):
        run("write_at", empty(n), I(n + beyond))
    with pytest.raises(
        KernelError, match=r"(writes \d+ bytes before the start of|wrote outside of) argument 0 "
    ):
        run("write_at", empty(n), I(-1 - beyond))
    run("write_at", empty(n), I(n - 1))
    try:
        assert np.isnan(run("read_at", empty(1), np.ones(n, "f4"), I(n + beyond), block=(1,)))
    except KernelError as error:
        assert f"of argument 1 (float32 ({n},))" in str(error) and "reads" in str(error)


def test_faults_are_told_with_their_line():
    with pytest.raises(KernelError) as caught:
        run("write_at", empty(4), I(4))
    if compiler.shutil.which("addr2line"):
        assert f"kernel.cu:{line_of('void write_at')}" in str(caught.value)
    with pytest.raises(KernelError, match=r"null pointer|far from every array"):
        run("write_at", np.uint64(0), I(0))


def test_static_and_dynamic_shared_memory_have_ends():
    with pytest.raises(KernelError, match=r"fixed_index.*index outside of an array of known size"):
        run("fixed_index", empty(1), I(8), block=(4,))
    for i in (100, 110, 4096, 50_000):
        with pytest.raises(
            KernelError, match=r"dynamic_index.*(beyond the 100 bytes|at byte .* which is outside)"
        ):
            run("dynamic_index", I(i), shared_mem=100)
    with pytest.raises(KernelError, match=r"writes at byte -1 of the dynamic shared memory"):
        run("dynamic_index", I(-1), shared_mem=100)
    run("dynamic_index", I(99), shared_mem=100)


@pytest.mark.parametrize("name, arguments, message", [
    ("divide", (np.zeros(1, I), I(0)), "division by zero"),
    ("vector_at", (np.zeros(8, "f4"), I(1)), "misaligned"),
    ("vector_at", (np.zeros(8, "f4"), I(2)), "misaligned"),
    ("copy_at", (np.zeros(8, "f4"), I(0), I(1)), "global address .* is not a multiple of 16"),
    ("copy_at", (np.zeros(8, "f4"), I(2), I(0)), "shared address .* is not a multiple of 16"),
    ("copy_at", (np.zeros(8, "f4"), I(8), I(0)), "not inside the block's shared memory"),
    ("matrix_at", (I(8),), "ldmatrix.*not a multiple of 16"),
    ("matrix_at", (I(32),), "not inside the block's shared memory"),
    ("recursion", (np.zeros(1, I),), "stack of .* bytes overflows"),
    ("big_static", (np.zeros(1, "f4"),), "49156 bytes of static shared memory, 49152 are allowed"),
    ("trap", (), "__trap"),
])  # fmt: skip
def test_other_mistakes(name, arguments, message):
    with pytest.raises(KernelError, match=message):
        run(name, *arguments)


@pytest.mark.parametrize("grid, block, message", [
    ((1,), (1025,), "over the limit"),
    ((1,), (32, 33), "more than 1024 threads"),
    ((1,), (1, 1, 65), "over the limit"),
    ((1, 65536), (32,), "over the limit"),
    ((0,), (32,), "at least 1"),
])  # fmt: skip
def test_shapes_of_launches(grid, block, message):
    with pytest.raises(KernelError, match=message):
        run("indices", empty(1, I), grid=grid, block=block)
    with pytest.raises(TypeError, match="must be tuples"):
        run("indices", empty(1, I), grid=1)


def test_dynamic_shared_memory_needs_permission():
    kernel = cupy.RawModule(code=KERNELS, name_expressions=NAMES).get_function("dynamic_index")
    with pytest.raises(KernelError, match=r"49153 bytes of dynamic shared memory.*set max_dynamic"):
        kernel((1,), (32,), (I(49152),), shared_mem=49153)
    kernel.max_dynamic_shared_size_bytes = 227 * 1024
    kernel((1,), (32,), (I(227 * 1024 - 1),), shared_mem=227 * 1024)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="232449"):
        kernel.max_dynamic_shared_size_bytes = 232449
    emulator.install(capability=80)
    try:
        small = cupy.RawModule(code=KERNELS, name_expressions=NAMES).get_function("dynamic_index")
        with pytest.raises(cupy.cuda.driver.CUDADriverError, match="166912 are possible on sm_80"):
            small.max_dynamic_shared_size_bytes = 227 * 1024
    finally:
        emulator.install()


@pytest.mark.parametrize("arguments, message", [
    ((), r"read_at takes 3 arguments \(float\*, const float\*, int32\), not 0"),
    (("out", "inp", I(0), I(0)), "not 4"),
    (("out", "inp", 0), r"argument 2 is the Python int 0, which goes as 8 bytes .wrap it in np.int32."),
    (("out", "inp", np.float32(0)), "argument 2 .* the kernel wants int32"),
    (("out", "inp", np.int64(0)), "argument 2 .* the kernel wants int32"),
    (("out", I(0), "inp"), "argument 1 .* the kernel wants const float"),
    (("out", "half", I(0)), "argument 1 is an array of bfloat16, the kernel wants const float"),
    (("out", "double", I(0)), "argument 1 is an array of float64, the kernel wants const float"),
    (("out", np.zeros(3, "f4"), I(0)), "argument 1 .* the kernel wants const float"),
    (("out", None, I(0)), "argument 1 is None, of which CuPy makes 0xffffffff"),
])  # fmt: skip
def test_arguments_are_checked(arguments, message):
    arrays = {
        "out": empty(1),
        "inp": empty(3),
        "half": empty(3, ml_dtypes.bfloat16),
        "double": empty(3, "f8"),
    }
    arguments = tuple(arrays[a] if isinstance(a, str) else a for a in arguments)
    with pytest.raises(TypeError, match=message):
        MODULE.get_function("read_at")((1,), (1,), arguments)


def test_programs_that_do_not_compile(tmp_path):
    (tmp_path / "broken.cuh").write_text("#pragma once\n\nint f() { return undeclared; }\n")
    code = '#include "broken.cuh"\nextern "C" __global__ void k() {}\n'
    with pytest.raises(cupy.cuda.compiler.CompileException, match=r"broken.cuh:3:.*undeclared"):
        cupy.RawModule(code=code, options=(f"-I{tmp_path}",)).get_function("k")
    with pytest.raises(cupy.cuda.compiler.CompileException, match=r"inline assembly belongs in ptx.cuh"):
        cupy.RawModule(code='extern "C" __global__ void k() { asm volatile("nop"); }').get_function("k")
    with pytest.raises(cupy.cuda.compiler.CompileException, match=r"atomicAdd"):
        cupy.RawModule(code='extern "C" __global__ void k(float* x) { atomicAdd(x, 1.0f); }').get_function(
            "k"
        )
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="not found: absent"):
        MODULE.get_function("absent")


def test_without_a_compiler_ziglang_is_one(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: object())
    assert compiler.compiler.__wrapped__()[1:] == ["-m", "ziglang", "c++"]
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(compiler.CompileError, match=r"no C.. compiler: install .*pip install ziglang"):
        compiler.compiler.__wrapped__()


# ----------------------------------------------------------------------------------------------------- Hopper

HOPPER = r"""
#include "ptx_hopper.cuh"

#define SHARED extern __shared__ __align__(1024) unsigned char shared_memory[]

__device__ Barrier* one_barrier(unsigned char* at, int count) {     // made by thread 0, for all
    Barrier* barrier = (Barrier*)at;
    if (threadIdx.x == 0) barrier_init(barrier, count), barrier_init_fence();
    __syncthreads();
    return barrier;
}

// ---- TMA: `bytes` of a box, and the barrier behind them

__device__ void dump(unsigned char* out, const unsigned char* shared, int bytes) {
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = shared[i];
}
extern "C" __global__ void load_2d(const __grid_constant__ TensorMap map, unsigned char* out, int bytes,
                                   int x, int y, int shift) {
    SHARED;
    Barrier* full = one_barrier(shared_memory + bytes, 1);
    if (threadIdx.x == 0) {
        barrier_arrive_expect(full, bytes);
        tma_load(shared_memory + shift, map, full, x, y);
    }
    barrier_wait(full, 0);
    dump(out, shared_memory, bytes);
}
extern "C" __global__ void load_4d(const __grid_constant__ TensorMap map, unsigned char* out, int bytes,
                                   int x, int y, int z, int w) {
    SHARED;
    Barrier* full = one_barrier(shared_memory + bytes, 1);
    if (threadIdx.x == 0) {
        barrier_arrive_expect(full, bytes);
        tma_load(shared_memory, map, full, x, y, z, w);
    }
    barrier_wait(full, 0);
    dump(out, shared_memory, bytes);
}
extern "C" __global__ void load_bulk(unsigned char* out, const unsigned char* inp, int bytes) {
    SHARED;
    Barrier* full = one_barrier(shared_memory + bytes, 1);
    if (threadIdx.x == 0) {
        barrier_arrive_expect(full, bytes);
        bulk_load(shared_memory, inp, bytes, full);
    }
    barrier_wait(full, 0);
    dump(out, shared_memory, bytes);
}
extern "C" __global__ void store_2d(const __grid_constant__ TensorMap map, const unsigned char* inp,
                                    int bytes, int x, int y, int add) {
    SHARED;
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) shared_memory[i] = inp[i];
    async_proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (add) tma_add(map, shared_memory, x, y);
        else tma_store(map, shared_memory, x, y);
        bulk_commit();
        bulk_wait<0>();
    }
}
extern "C" __global__ void store_4d(const __grid_constant__ TensorMap map, const unsigned char* inp,
                                    int bytes, int x, int y, int z, int w) {
    SHARED;
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) shared_memory[i] = inp[i];
    async_proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store(map, shared_memory, x, y, z, w);
        bulk_commit();
        bulk_wait<0>();
    }
}
extern "C" __global__ void write_and_store(const __grid_constant__ TensorMap map, int stmatrix, int fenced) {
    SHARED;
    if (stmatrix) stmatrix_x4(shared_memory + threadIdx.x * 16, 0, 0, 0, 0);
    else *(int4*)(shared_memory + threadIdx.x * 16) = int4{0, 0, 0, 0};
    if (fenced || threadIdx.x != 9) async_proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store(map, shared_memory, 0, 0);
        bulk_commit();
        bulk_wait<0>();
    }
}

// ---- wgmma: out (64, N) = a (64, 64) @ b (64, N), as TMA lays them, plus 1

template <int N, bool A_MN, bool B_MN, bool REGISTERS>
__global__ void product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                        float* out, const __nv_bfloat16* a) {
    SHARED;
    unsigned char *a_tile = shared_memory, *b_tile = shared_memory + 8192;
    constexpr int BOXES = B_MN ? (N + 63) / 64 : 1, BYTES = B_MN ? BOXES * 8192 : N * 128;
    Barrier* full = one_barrier(b_tile + BYTES, 1);
    if (threadIdx.x == 0) {
        barrier_arrive_expect(full, 8192 + BYTES);
        tma_load(a_tile, a_map, full, 0, 0);
        for (int c = 0; c < BOXES; c++) tma_load(b_tile + c * 8192, b_map, full, c * 64, 0);
    }
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
    float d[N / 2];
    for (int i = 0; i < N / 2; i++) d[i] = 1;
    barrier_wait(full, 0);
    wgmma_fence();
    for (int k = 0; k < 4; k++) {
        Descriptor right = advance(describe(b_tile, B_MN ? 8192 : 16), k * (B_MN ? 2048 : 32));
        if constexpr (REGISTERS) {
            uint32_t left[4];
            for (int i = 0; i < 4; i++)
                left[i] = *(const uint32_t*)(a + (row + i % 2 * 8) * 64 + k * 16 + column + i / 2 * 8);
            wgmma<B_MN>(d, left, right, true);
        } else {
            wgmma<A_MN, B_MN>(d, advance(describe(a_tile), k * (A_MN ? 2048 : 32)), right, true);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_results(d);
    for (int i = 0; i < N / 2; i++)
        out[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
}

// ---- A pipeline: out (64, 64) += the sum over blocks of a (64, 64) @ b (64, 64), and its mistakes

enum Mistake { NONE, NO_FULL_WAIT, NO_EMPTY_WAIT, EARLY_RELEASE, NO_RELEASE, MORE_BYTES,
               FEWER_BYTES, NO_FENCE, TOUCHED, NO_LAST_WAIT, NO_COMMIT, NO_BULK_WAIT,
               NO_BULK_COMMIT, NO_READ_WAIT, TWO_ARRIVALS, OVERWRITTEN, OTHER_LINE, PRODUCER_STAYS
               };

extern "C" __global__ void __launch_bounds__(256, 1) pipeline(
    const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
    const __grid_constant__ TensorMap out_map, int blocks, int mistake) {
    SHARED;
    unsigned char* box = shared_memory + 2 * 16384;
    Barrier *full = (Barrier*)(box + 8192), *empty = full + 2;
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2; s++) barrier_init(full + s, 1), barrier_init(empty + s, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        registers_decrease<40>();
        for (int i = 0; i < blocks && threadIdx.x == 128; i++) {
            unsigned char* stage = shared_memory + i % 2 * 16384;
            if (mistake != NO_EMPTY_WAIT) barrier_wait(empty + i % 2, i / 2 % 2 ^ 1);
            int bytes = mistake == MORE_BYTES ? 16384 + 128 : mistake == FEWER_BYTES ? 16384 - 128 : 16384;
            barrier_arrive_expect(full + i % 2, bytes);
            tma_load(stage, a_map, full + i % 2, i * 64, 0);
            tma_load(stage + 8192, b_map, full + i % 2, 0, i * 64);
        }
        if (mistake == PRODUCER_STAYS) named_barrier_sync<256>(1);
        return;
    }
    registers_increase<232>();
    float d[32];
    for (int i = 0; i < blocks; i++) {
        unsigned char* stage = shared_memory + i % 2 * 16384;
        if (mistake != NO_FULL_WAIT) barrier_wait(full + i % 2, i / 2 % 2);
        if (mistake != NO_FENCE || i == 0) wgmma_fence();
        Descriptor a = describe(stage), b = describe(stage + 8192);
        for (int k = 0; k < 4; k++)
            if (mistake == OTHER_LINE && threadIdx.x == 77)
                wgmma<false, true>(d, advance(a, k * 32), advance(b, k * 2048), i + k > 0);
            else wgmma<false, true>(d, advance(a, k * 32), advance(b, k * 2048), i + k > 0);
        if (mistake != NO_COMMIT) wgmma_commit();
        if (mistake == TOUCHED && threadIdx.x == 5) d[7] = 0;
        if (mistake == EARLY_RELEASE && threadIdx.x == 0) barrier_arrive(empty + i % 2);
        if (mistake != NO_LAST_WAIT || i < blocks - 1) wgmma_wait<0>();
        if (mistake == TWO_ARRIVALS && threadIdx.x == 1) barrier_arrive(empty + i % 2);
        if (mistake == OVERWRITTEN && threadIdx.x == 1) empty[1] = 0;
        if (mistake != EARLY_RELEASE && mistake != NO_RELEASE && threadIdx.x == 0)
            barrier_arrive(empty + i % 2);
    }
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    for (int half = 0; half < 2; half++) {                  // 64 rows of 32 floats
        if (threadIdx.x == 0 && mistake != NO_READ_WAIT) bulk_wait_read<0>();
        named_barrier_sync<128>(1);
        for (int i = 0; i < 16; i++) {
            int m = row + lane / 4 + i % 4 / 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
            ((float*)box)[m * 32 + (n / 4 ^ m % 8) * 4 + n % 4] = d[16 * half + i];
        }
        async_proxy_fence();
        named_barrier_sync<128>(1);
        if (threadIdx.x == 0) {
            tma_add(out_map, box, half * 32, 0);
            if (mistake != NO_BULK_COMMIT) bulk_commit();
        }
    }
    if (threadIdx.x == 0 && mistake != NO_BULK_WAIT) bulk_wait<0>();
}

// ---- Barriers and their mistakes

extern "C" __global__ void barriers(float* out, int mistake) {
    __shared__ Barrier barrier[3];
    if (threadIdx.x == 0) {
        if (mistake != 1) barrier_init(barrier, 64);
        if (mistake == 2) barrier_init(barrier, 64);
        if (mistake == 3) barrier_init((Barrier*)((char*)barrier + 4), 64);
        if (mistake == 4) barrier_init((Barrier*)out, 64);
        if (mistake == 5) barrier_init(barrier + 1, 0);
        barrier_init_fence();
    }
    __syncthreads();
    barrier_arrive(barrier);                                // the first phase has ended when all have arrived
    barrier_wait(barrier, 0);
    if (mistake == 6) barrier_wait(barrier, 2);
    for (int i = 0; i < (mistake == 7 && threadIdx.x == 3 ? 2 : 1); i++) barrier_arrive(barrier);
    while (!barrier_try_wait(barrier, 1)) {}
    if (mistake == 8 && threadIdx.x < 32) barrier_wait(barrier, 0);         // no third phase ever ends
    out[threadIdx.x] = 1;
}
// The last of two warps sees phase 0 end when phase 1 has ended too.
extern "C" __global__ void falls_behind(int* out) {
    __shared__ Barrier barrier;
    if (threadIdx.x == 0) barrier_init(&barrier, 1);
    __syncthreads();
    if (threadIdx.x < 32) barrier_wait(&barrier, 0);
    else if (threadIdx.x == 32) barrier_arrive(&barrier), barrier_arrive(&barrier);
}
extern "C" __global__ void named(float* out, int number, int mistake) {
    __shared__ float values[256];
    values[threadIdx.x] = threadIdx.x;
    if (mistake == 1 && threadIdx.x < 128) named_barrier_sync<256>(number);
    else if (mistake == 2 && threadIdx.x == 200) return;
    else if (mistake == 3 && threadIdx.x % 4 == 0) named_barrier_sync<64>(number);  // lanes of all warps
    else if (mistake != 3) named_barrier_sync<128>(number + threadIdx.x / 128);
    out[threadIdx.x] = values[threadIdx.x ^ 127];
}
extern "C" __global__ void many_registers() {
    if (threadIdx.x < 128) registers_decrease<40>();
    else registers_increase<240>();
}
extern "C" __global__ void through_registers(unsigned* out, const unsigned* inp) {   // through shared memory
    SHARED;
    for (int i = threadIdx.x; i < 128; i += 32) ((unsigned*)shared_memory)[i] = inp[i];
    __syncwarp();
    unsigned r[4];
    ldmatrix_x4(r, shared_memory + threadIdx.x * 16);
    stmatrix_x4(shared_memory + 512 + threadIdx.x * 16, r[0], r[1], r[2], r[3]);
    __syncwarp();
    for (int i = threadIdx.x; i < 128; i += 32) out[i] = ((unsigned*)shared_memory)[128 + i];
}

// ---- A cluster: each block loads a half of 64 rows for both, three times, and says when it has read them

extern "C" __global__ void __launch_bounds__(128, 1) __cluster_dims__(2, 1, 1)
share(const __grid_constant__ TensorMap map, unsigned char* out, int mistake) {
    SHARED;
    Barrier *full = (Barrier*)(shared_memory + 8192), *empty = full + 1;
    int rank = cluster_rank(), cluster = blockIdx.x / 2;
    if (threadIdx.x == 0) {
        barrier_init(full, 1), barrier_init(empty, mistake == 1 ? 1 : 2);
        barrier_init_fence();
    }
    __syncthreads();
    if (mistake != 2) cluster_sync();
    for (int i = 0; i < 3; i++) {
        if (threadIdx.x == 0) {
            barrier_wait(empty, i % 2 ^ 1);
            barrier_arrive_expect(full, 8192);
            tma_load_multicast(shared_memory + rank * 4096, map, full, i * 64, cluster * 64 + rank * 32,
                               mistake == 3 ? 4 : 3);
        }
        barrier_wait(full, i % 2);
        dump(out + (blockIdx.x * 3 + i) * 8192, shared_memory, 8192);
        __syncthreads();
        int other = mistake == 4 ? 2 : mistake == 5 ? rank : threadIdx.x;
        if (threadIdx.x < 2) barrier_arrive_cluster(empty, other);
    }
    if (mistake != 6) cluster_sync();
}
"""
CUDA_TYPE = {"uint8": 0, "float32": 7, "bfloat16": 9}
MISTAKES = re.findall(r"\w+", re.search(r"Mistake {(.*?)}", HOPPER, re.DOTALL)[1])
BOOLS = "false", "true"
PRODUCTS = [f"product<{N}, {a}, {b}, false>" for N in (64, 128, 192) for a in BOOLS for b in BOOLS]
PRODUCTS += [f"product<{N}, false, {b}, true>" for N in (64, 160, 256) for b in BOOLS]


SM_90A = cupy.RawModule(
    code=HOPPER, options=("-arch=sm_90a",), name_expressions=[*PRODUCTS, *compiler.kernel_names(HOPPER)]
)


def launch(name, *arguments, bytes=0, grid=1, block=128, module=SM_90A):
    return run(name, *arguments, grid=(grid,), block=(block,), shared_mem=bytes, module=module)


def encode(array, box, swizzle=3, /, **changes):
    """(the driver's answer, a tensor map of the array): sizes and box as in NumPy, the outermost first."""
    memory = np.zeros(192, np.uint8)
    encoded = memory[-memory.ctypes.data % 64 :][:128]
    sizes, strides = array.shape[::-1], array.strides[:-1][::-1]
    words = dict(
        map=encoded.ctypes.data, type=CUDA_TYPE[str(array.dtype)], rank=len(sizes), address=array.data.ptr,
        sizes=sizes, strides=strides, box=box[::-1], steps=[1] * len(sizes), interleave=0, swizzle=swizzle,
        promotion=2, outside=0,
    ) | changes  # fmt: skip
    kinds = dict(map=ctypes.c_void_p, address=ctypes.c_void_p, sizes=ctypes.c_uint64, strides=ctypes.c_uint64)
    values = [
        (kinds.get(name, ctypes.c_uint32) * len(value))(*value)
        if isinstance(value, (list, tuple))
        else kinds.get(name, ctypes.c_int)(value)
        for name, value in words.items()
    ]
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(*values), encoded.view("V128")


def map_of(array, box, swizzle=3):
    status, encoded = encode(array, box, swizzle)
    assert status == 0
    return encoded


def swizzled(rows, swizzle=3):
    """Rows of a box as TMA lays them into shared memory: 16-byte chunks change places by their address."""
    data = np.ascontiguousarray(rows).view(np.uint8).reshape(-1, 16)
    address = np.arange(len(data)) * 16
    return data[(address ^ (address >> 7 & (1 << swizzle) - 1) << 4) // 16].ravel()


def clipped(array, start, box):
    """What lies in a box of an array: zeros outside."""
    result = np.zeros(box, array.dtype)
    inside = [(max(s, 0), min(s + b, n)) for s, b, n in zip(start, box, array.shape)]
    if all(low < high for low, high in inside):
        to = tuple(slice(low - s, high - s) for (low, high), s in zip(inside, start))
        result[to] = array[tuple(slice(low, high) for low, high in inside)]
    return result


@hypothesis.settings(max_examples=60)
@hypothesis.given(data=st.data(), swizzle=st.integers(0, 3), dtype=st.sampled_from([np.float32, bf16]))
def test_tma_loads_boxes_and_clips_them(data, swizzle, dtype):
    n, each = np.dtype(dtype).itemsize, 16 // np.dtype(dtype).itemsize
    width = (16 << swizzle if swizzle else 16 * data.draw(st.integers(1, 16))) // n
    rows = data.draw(st.integers(1, 64))
    shape = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 40)))
    shape = shape[0], shape[1] * each  # rows are multiples of 16 bytes
    y = data.draw(st.integers(-rows - 2, shape[0] + 2))
    x = data.draw(st.integers(-width // each - 1, shape[1] // each + 1)) * each
    inp = np.random.default_rng(0).normal(size=shape).astype(dtype)
    source, box = cupy.asarray(inp), (rows, width)
    out = cupy.empty(rows * width * n, np.uint8)
    total = -(-out.size // 8) * 8
    launch("load_2d", map_of(source, box, swizzle), out, I(out.size), I(x), I(y), I(0), bytes=total + 8)
    np.testing.assert_array_equal(out.get(), swizzled(clipped(inp, (y, x), box), swizzle))


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 70, 4, 3)]),
    start=st.tuples(*[st.integers(low, high) for low, high in ((-1, 3), (-40, 70), (-1, 4), (-1, 3))]),
    box=st.sampled_from([(1, 32, 1, 64), (2, 8, 3, 64), (1, 64, 1, 64)]),
)
def test_tma_in_four_dimensions(shape, start, box):
    shape, start = (*shape[:3], 32 * shape[3]), (*start[:3], 8 * start[3])
    inp = np.random.default_rng(1).normal(size=shape).astype(bf16)
    source, out = cupy.asarray(inp), cupy.empty(2 * math.prod(box), np.uint8)
    place = [I(i) for i in start[::-1]]
    launch("load_4d", map_of(source, box), out, I(out.size), *place, bytes=out.size + 8)
    expected = swizzled(clipped(inp, start, box).reshape(-1, 64))
    np.testing.assert_array_equal(out.get(), expected)
    if min(start) < 0:
        return
    target = cupy.zeros(shape, bf16)
    launch("store_4d", map_of(target, box), expected, I(out.size), *place, bytes=out.size)
    inside = clipped(np.ones(box, bool), [-s for s in start], shape)
    np.testing.assert_array_equal(target.get(), np.where(inside, inp, 0))


@pytest.mark.parametrize("dtype", [np.float32, bf16])
@pytest.mark.parametrize(
    "y, x, add", [(0, 0, 0), (8, 64, 0), (60, 96, 0), (60, 96, 1), (0, 0, 1), (70, 0, 1)]
)
def test_tma_stores_and_adds_what_is_inside(dtype, y, x, add):
    width = 128 // np.dtype(dtype).itemsize
    box, before = np.random.default_rng(2).normal(size=(2, 70, 112)).astype(dtype)
    box = box[:16, :width]
    target = cupy.asarray(before)
    launch("store_2d", map_of(target, box.shape), swizzled(box), I(2048), I(x), I(y), I(add), bytes=2048)
    expected, part = before.copy(), box[: max(70 - y, 0), : 112 - x]
    expected[y : y + 16, x : x + width] = part + expected[y : y + 16, x : x + width] if add else part
    np.testing.assert_array_equal(target.get(), expected)


def test_what_threads_wrote_is_fenced_before_it_is_stored(monkeypatch):
    target = cupy.zeros((4, 64), bf16)

    def store(stmatrix, fenced, module=SM_90A):
        arguments = map_of(target, (4, 64)), I(stmatrix), I(fenced)
        launch("write_and_store", *arguments, bytes=512, block=32, module=module)

    store(1, 1)
    message = (
        r"reads byte 144 of shared memory, to which thread \(9, 0, 0\) wrote by stmatrix_x4 without async"
    )
    with pytest.raises(KernelError, match=message):
        store(1, 0)
    store(0, 0)  # this goes unseen
    monkeypatch.setenv("EMULATOR_RACES", "1")
    code = HOPPER[: HOPPER.index("// ---- wgmma")]
    watched = cupy.RawModule(code=code, options=("-arch=sm_90a",))
    store(0, 1, watched)
    with pytest.raises(KernelError, match=r"what thread \(9, 0, 0\) wrote at .* without async_proxy_fence"):
        store(0, 0, watched)


def test_bulk_loads_are_bytes():
    inp, out = np.random.default_rng(3).integers(0, 256, 4096).astype(np.uint8), cupy.empty(4096, np.uint8)
    np.testing.assert_array_equal(launch("load_bulk", out, inp, I(4096), bytes=4104), inp)
    with pytest.raises(KernelError, match=r"bulk_load at .*:\d+: goes 16 bytes beyond the end of argument 1"):
        launch("load_bulk", out, inp[:4080], I(4096), bytes=4104)


@pytest.mark.parametrize("arguments, message", [
    ((0, 4, 0), r"tma_load at kernel.cu:\d+: the innermost coordinate 4, 8 bytes, is not a multiple of 16"),
    ((16, 0, 0), "byte 16 of shared memory is not aligned to 1024"),
    ((1024, 0, 0), "is not inside the .* bytes of dynamic shared memory"),
])  # fmt: skip
def test_loads_that_the_card_refuses(arguments, message):
    source, (shift, x, y) = cupy.zeros((64, 64), bf16), map(I, arguments)
    with pytest.raises(KernelError, match=message):
        launch("load_2d", map_of(source, (64, 64)), empty(8192, np.uint8), I(8192), x, y, shift, bytes=8200)


def test_stores_that_the_card_refuses():
    inp, target = np.zeros(2048, np.uint8), cupy.zeros((64, 64), bf16)
    for y, x in ((-1, 0), (0, -8)):
        with pytest.raises(KernelError, match="only loads may begin outside"):
            launch("store_2d", map_of(target, (16, 64)), inp, I(2048), I(x), I(y), I(0), bytes=2048)


def test_maps_that_are_none():
    out, source = cupy.empty(8192, np.uint8), cupy.zeros((64, 64), bf16)
    good = map_of(source, (64, 64))

    def load(encoded):
        launch("load_2d", encoded, out, I(8192), I(0), I(0), I(0), bytes=8200)

    load(good)
    changed = good.view(np.uint8).copy()
    changed[20] ^= 1
    with pytest.raises(KernelError, match="this is no tensor map"):
        load(changed.view("V128"))
    _, longer = encode(source, (64, 64), sizes=(64, 65), box=(64, 65))
    with pytest.raises(
        KernelError, match="goes 128 bytes beyond the end of the array of argument 0, a tensor map"
    ):
        launch("load_2d", longer, out, I(8320), I(0), I(0), I(0), bytes=8328)
    del source
    with pytest.raises(KernelError, match="there is no array: it was freed"):
        load(good)
    with pytest.raises(KernelError, match="4 coordinates for a tensor map of 2 dimensions"):
        launch("load_4d", good, out, I(8192), *[I(0)] * 4, bytes=8200)


@pytest.mark.parametrize("changes", [
    dict(strides=(24,)), dict(box=(64, 0)), dict(box=(64, 257)), dict(box=(4, 64)), dict(box=(128, 64)),
    dict(sizes=(0, 64)), dict(rank=6), dict(rank=0), dict(type=20), dict(address=0), dict(swizzle=4),
])  # fmt: skip
def test_maps_that_the_driver_refuses(changes):
    array = cupy.zeros((64, 64), bf16)
    assert encode(array, (64, 64))[0] == 0 and encode(array, (64, 64), **changes)[0] == 1
    for name, distance in (("address", 8), ("map", 32)):
        there = dict(address=array.data.ptr, map=array.data.ptr // 64 * 64)[name]
        assert encode(array, (64, 64), **{name: there + distance})[0] == 1


@pytest.mark.parametrize("name", PRODUCTS)
def test_wgmma(name):
    N, a_mn, b_mn, _ = re.findall(r"\d+|true|false", name)
    rng = np.random.default_rng(4)
    a, b = (rng.normal(size=s).astype(bf16) for s in ((64, 64), (64, int(N))))
    expected = 1 + a.astype("f8") @ b.astype("f8")
    stored = a.T if a_mn == "true" else a, b if b_mn == "true" else b.T
    left, right = (cupy.asarray(np.ascontiguousarray(matrix)) for matrix in stored)
    maps = map_of(left, (64, 64)), map_of(right, (64 if b_mn == "true" else int(N), 64))
    out = launch(name, *maps, empty((64, int(N))), a, bytes=6 * 8192)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


def run_pipeline(mistake="NONE", blocks=5):
    """The result and what it should be."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(64, 64 * blocks)).astype(bf16), rng.normal(size=(64 * blocks, 64)).astype(bf16)
    left, right, out = cupy.asarray(a), cupy.asarray(b), cupy.zeros((64, 64), np.float32)
    maps = map_of(left, (64, 64)), map_of(right, (64, 64)), map_of(out, (64, 32))
    launch("pipeline", *maps, I(blocks), I(MISTAKES.index(mistake)), bytes=5 * 8192 + 32, block=256)
    return out.get(), a.astype("f8") @ b.astype("f8")


@pytest.mark.parametrize("name, value", [
    ("EMULATOR_COPIES", "mixed"), ("EMULATOR_COPIES", "eager"), ("EMULATOR_COPIES", "late"),
    ("EMULATOR_ORDER", "reverse"), ("EMULATOR_ORDER", "9"), ("EMULATOR_TWICE", "1"),
])  # fmt: skip
def test_a_pipeline_of_copies_and_products(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    np.testing.assert_allclose(*run_pipeline(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mistake, message", [
    ("NO_FULL_WAIT", r"wgmma at .*: (a|b) at byte \d+ of shared memory (is still being filled by the tma_load"
                     r"|has been filled, but no thread has waited for the barrier at byte 40960)|an operand"
                     "|deadlock"),
    ("NO_EMPTY_WAIT", "more arrivals than|still being filled|has not been waited for|before this thread"),
    ("EARLY_RELEASE", r"tma_load at .*: byte \d+ of shared memory is an operand of the wgmma at .*, which"),
    ("NO_RELEASE", r"deadlock; 128 threads waiting in barrier_wait\(barrier at byte 40960 of shared memory, "
                   r"parity 1; its phase 1 lacks 1 arrival\) at kernel.cu:\d+, first thread \(0, 0, 0\); "
                   r"1 thread waiting in barrier_wait\(barrier at byte 40976"),
    ("MORE_BYTES", r"deadlock; 128 threads waiting in barrier_wait\(barrier at byte 40960 of shared memory, "
                   r"parity 0; its phase 0 lacks 0 arrivals and 128 bytes\)"),
    ("FEWER_BYTES", r"phase 0 of the barrier at byte 409\d\d of shared memory got 128 bytes more than were "
                    r"expected|still being filled"),
    ("NO_FENCE", "no wgmma_fence since the last wgmma_commit"),
    ("TOUCHED", r"thread \(5, 0, 0\): wgmma at .*: d\[7\] was written before wgmma_wait had waited for it"),
    ("NO_LAST_WAIT", "returned, but no wgmma_wait has waited for its wgmma|is an operand of"),
    ("NO_COMMIT", "is an operand of the wgmma at .*, which has not been waited for|no wgmma_fence"),
    ("NO_BULK_WAIT", r"thread \(0, 0, 0\) returned without bulk_wait<0>"),
    ("NO_BULK_COMMIT", r"thread \(0, 0, 0\) returned without bulk_commit"),
    ("TWO_ARRIVALS", "more arrivals than|before this thread saw|deadlock|still being filled|is an operand"),
    ("OVERWRITTEN", "the barrier at byte 40984 of shared memory was not initialised, or was overwritten"),
    ("OTHER_LINE", "another thread of the warpgroup is at .*, or has other operands"),
    ("PRODUCER_STAYS", r"named_barrier_sync<\d+>\(1\) at .* waits for \d+ threads there"),
])  # fmt: skip
def test_mistakes_in_a_pipeline(mistake, message):
    with pytest.raises(KernelError, match=message):
        run_pipeline(mistake)


def test_a_buffer_that_is_written_before_its_store_has_read_it(monkeypatch):
    monkeypatch.setenv("EMULATOR_COPIES", "late")
    out, expected = run_pipeline("NO_READ_WAIT")
    assert np.abs(out[:, :32] - expected[:, :32]).max() > 1  # these rows are the other half's
    np.testing.assert_allclose(out[:, 32:], expected[:, 32:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mistake, message", [
    (1, "barrier_arrive at .*: the barrier at 0x.* was not initialised"),
    (2, "is in use"),
    (3, "is not aligned to 8 bytes"),
    (4, "not inside the block's shared memory"),
    (5, "a count of 0 arrivals"),
    (6, "a parity is 0 or 1, not 2"),
    (7, r"barrier_arrive at .*: more arrivals|deadlock|before this thread saw"),
    (8, r"deadlock; 32 threads waiting in barrier_wait\(barrier at 0x.*, parity 0; its phase 2 lacks 64"),
])  # fmt: skip
def test_mistakes_with_barriers(mistake, message):
    assert (launch("barriers", empty(64), I(0), block=64) == 1).all()
    with pytest.raises(KernelError, match=message):
        launch("barriers", empty(64), I(mistake), block=64)


def test_who_waits_must_not_fall_a_phase_behind():
    with pytest.raises(
        KernelError, match="in phase 2 before this thread saw the end of phase 0: on a card it might"
    ):
        launch("falls_behind", empty(1, I), block=64)


@pytest.mark.parametrize("number, mistake, message", [
    (15, 0, "the number 16 is not one of 1 .. 15"),
    (0, 0, "the number 0 is not one of"),
    (1, 1, r"deadlock.*named_barrier_sync\(1\) \(128 of 256 threads are there\)"),
    (1, 2, r"deadlock; .*127 threads waiting in named_barrier_sync\(2\) \(127 of 128 threads are there\)"),
    (1, 3, r"only \d+ lanes of the warp of thread .* are among its threads"),
])  # fmt: skip
def test_named_barriers(number, mistake, message):
    out = launch("named", empty(256), I(3), I(0), block=256)
    np.testing.assert_array_equal(out, np.arange(256) ^ 127)
    with pytest.raises(KernelError, match=message):
        launch("named", empty(256), I(number), I(mistake), block=256)


def test_an_sm_has_65536_registers():
    with pytest.raises(KernelError, match="leave the block 66560 registers"):
        launch("many_registers", block=384)


def test_stmatrix_is_the_inverse_of_ldmatrix():
    inp = np.random.default_rng(6).integers(0, 2**32, 128).astype(np.uint32)
    out = launch("through_registers", empty(128, np.uint32), inp, bytes=1024, block=32)
    np.testing.assert_array_equal(out, inp)


def shared_by_clusters(mistake=0, blocks=4):
    inp = np.random.default_rng(7).normal(size=(blocks * 32, 192)).astype(bf16)
    source, out = cupy.asarray(inp), cupy.empty((blocks, 3, 8192), np.uint8)
    launch("share", map_of(source, (32, 64)), out, I(mistake), bytes=8208, grid=blocks)
    return inp, out.get()


@pytest.mark.parametrize("order", ["forward", "1", "2"])
def test_clusters_share_loads(order, monkeypatch):
    monkeypatch.setenv("EMULATOR_ORDER", order)
    inp, out = shared_by_clusters()
    for block in range(4):
        for i in range(3):
            box = inp[block // 2 * 64 :][:64, 64 * i : 64 * i + 64]
            np.testing.assert_array_equal(out[block, i], swizzled(box))


@pytest.mark.parametrize("mistake, message", [
    (1, "are still being filled|more arrivals than|has ended|could come too late|deadlock"),
    (2, r"the barrier at byte 8192 of shared memory of block \d was not initialised"),
    (3, "the blocks 0x4 are not blocks of a cluster of 2"),
    (4, "a cluster of 2 has no block 2"),
    (5, "more arrivals than|deadlock|are still being filled"),
    (6, "could come too late, a cluster_sync is missing|has ended"),
])  # fmt: skip
def test_mistakes_in_clusters(mistake, message):
    with pytest.raises(KernelError, match=message):
        shared_by_clusters(mistake)


def test_launches_of_clusters():
    with pytest.raises(KernelError, match=r"grid \(3, 1, 1\) does not divide into clusters of 2"):
        shared_by_clusters(blocks=3)
    code = """extern "C" __global__ void __cluster_dims__({}) k(int* x) {{
        __shared__ int y[9];
        y[x[0]] = 1, x[0] = y[x[1]];
    }}"""
    module = cupy.RawModule(code=code.format("2, 1, 1"))
    with pytest.raises(KernelError, match="no static shared variables for clusters"):
        run("k", empty(2, I), grid=(2,), block=(128,), module=module)
    with pytest.raises(
        cupy.cuda.compiler.CompileException, match=r"k: __cluster_dims__\(SIZE\) is not of the form"
    ):
        cupy.RawModule(code=code.format("SIZE")).get_function("k")


@pytest.mark.parametrize("code, message", [
    ("void k(const TensorMap map) {}", "map must be a `const __grid_constant__ TensorMap`"),
    ("void k() { extern __shared__ float a[4]; }", "write it as extern __shared__"),
    ("void k() { float d[36]; wgmma<false, false>(d, 0, 0, true); }", "wgmma for N = 64, 128, 160, 192 and"),
])  # fmt: skip
def test_hopper_programs_that_do_not_compile(code, message):
    code = f'#include "ptx_hopper.cuh"\nextern "C" __global__ {code}'
    with pytest.raises(cupy.cuda.compiler.CompileException, match=message):
        cupy.RawModule(code=code, options=("-arch=sm_90a",)).get_function("k")
    with pytest.raises(cupy.cuda.compiler.CompileException, match="needs the option -arch=sm_90a"):
        cupy.RawModule(code=code).get_function("k")


# ------------------------------------------------------------------------------------------------------ races


def test_two_orders_show_a_race_between_blocks(monkeypatch):
    monkeypatch.setenv("EMULATOR_TWICE", "1")
    with pytest.raises(KernelError, match=r"depends on the order of threads .*: a race. First at byte 0"):
        run("race_between_blocks", empty(1, I), grid=(4,))
    with pytest.raises(KernelError, match="a race"):
        run("race_in_block", empty(64), block=(64,))
    np.testing.assert_array_equal(run("no_race", empty(64), block=(64,)), np.arange(64) ^ 32)


def test_races_in_shared_memory_are_named(monkeypatch):
    monkeypatch.setenv("EMULATOR_RACES", "1")
    names = ["race_in_block", "warp_without_sync", "no_race", "sums<float>", "tensor_core", "pipeline<1>"]
    watched = cupy.RawModule(code=KERNELS, name_expressions=names)
    both = r"race: it (reads|writes) shared memory at .* that thread .* (reads|writes) at .*, with no barrier"
    for name in names[:2]:
        with pytest.raises(KernelError, match=both):
            run(name, empty(64), block=(64,), module=watched)
    run("no_race", empty(64), block=(64,), module=watched)
    run("sums<float>", empty(7), np.ones((7, 256), "f4"), grid=(7,), block=(256,), module=watched)
    a, b = np.ones((16, 16), ml_dtypes.bfloat16), np.ones((16, 8), ml_dtypes.bfloat16)
    run("tensor_core", empty((16, 8)), a, b, module=watched)
    with pytest.raises(KernelError, match=both):  # 32 threads in a pipeline for one
        run("pipeline<1>", empty((7, 4)), np.ones((7, 4), "f4"), I(7), I(16), module=watched)


# -------------------------------------------------------------------------------------------- CuPy's stand-in


def test_transfers_are_explicit():
    array = cupy.asarray(np.arange(6, dtype="f4").reshape(2, 3))
    for convert in (np.asarray, np.array, lambda a: np.add(a, 1), lambda a: a + 1, lambda a: 1.0 * a):
        with pytest.raises(TypeError):
            convert(array)
    np.testing.assert_array_equal(array.get(), cupy.asnumpy(array))
    array.set(np.ones((2, 3), "f4"))
    array[1, :2] = 5
    np.testing.assert_array_equal(array.get(), [[1, 1, 1], [5, 5, 1]])
    with pytest.raises(ValueError, match="mismatch"):
        array.set(np.ones((2, 3)))


def test_views_share_memory():
    array = cupy.zeros((4, 6), np.float32)
    assert array[1:].data.ptr == array.data.ptr + 24 and array[:, 2].strides == (24,)
    assert array.T.shape == (6, 4) and array.T.flags.f_contiguous and not array.T.flags.c_contiguous
    array.reshape(2, 12)[1].fill(3)
    assert array.get().sum() == 36 and array.ravel().view(np.int32).dtype == np.int32
    with pytest.raises(ValueError):
        array.T.reshape(24)
    assert array.astype(ml_dtypes.bfloat16).get().sum() == 36


def test_work_on_a_stream_waits_until_it_is_waited_for():
    stream, other = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(16), np.float32, 4)
    pinned[:] = 1
    array = cupy.zeros(4, np.float32)
    with stream:
        array.set(pinned)
        pinned[:] = 2  # too early: the copy has not happened yet
        done = stream.record()
    assert not done.done and array.get().sum() == 0  # the null stream does not wait for a non-blocking one
    other.wait_event(done)
    with other:
        run_on = cupy.empty(4, np.float32)
        cupy.copyto(run_on, array)
    other.synchronize()
    assert done.done and run_on.get().sum() == 8
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(), end.record()
    assert cupy.cuda.get_elapsed_time(start, end) >= 0


def test_graphs_replay_what_was_captured():
    stream = cupy.cuda.Stream(non_blocking=True)
    out, step = cupy.zeros(30, np.int32), MODULE.get_function("indices")
    with stream:
        stream.begin_capture()
        step((1,), (30,), (out,))
        with pytest.raises(RuntimeError, match="captured"):
            stream.synchronize()
        for forbidden in (
            lambda: cupy.empty(4),
            lambda: cupy.cuda.alloc_pinned_memory(4),
            functools.partial(out.set, np.zeros(30, np.int32)),  # which is pageable memory
            lambda: MODULE.get_function("late"),
        ):
            with pytest.raises(RuntimeError, match="captured"):
                forbidden()
        graph = stream.end_capture()
        graph.launch()
        graph.launch()
    stream.synchronize()
    np.testing.assert_array_equal(out.get(), 2 * np.arange(1, 31))
    del out
    with stream, pytest.raises(RuntimeError, match="freed"):
        graph.launch()
        stream.synchronize()


def test_raw_copies_and_the_memory_pool():
    pool, runtime = cupy.get_default_memory_pool(), cupy.cuda.runtime
    before = pool.used_bytes()
    array, host = cupy.empty(8, np.float32), np.arange(8, dtype="f4")
    assert pool.used_bytes() == before + 32
    stream = cupy.cuda.Stream()
    runtime.memcpyAsync(array.data.ptr, host.ctypes.data, 32, runtime.memcpyHostToDevice, stream.ptr)
    stream.synchronize()
    assert array.get().sum() == 28
    runtime.memsetAsync(array.data.ptr, 0, 16, 0)
    assert array.get().sum() == 4 + 5 + 6 + 7
    del array
    assert pool.used_bytes() == before
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(1 << 40)
    free, total = cupy.cuda.Device().mem_info
    assert free <= total


# ------------------------------------------------------------------------------------------- the sanitizers


def alone(program, *arguments, **environment):
    """A Python program in a process of its own: what subprocess.run returns."""
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | path | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


BEYOND = r"""
import emulator
import numpy as np

code = '''
__device__ __noinline__ float element(const float* numbers, int i) { return numbers[i]; }
extern "C" __global__ void beyond(float* out, int i) {
    float numbers[4] = {5, 6, 7, 8};
    out[threadIdx.x] = element(numbers, i);
}
'''
cupy = emulator.install()
kernel, out = cupy.RawModule(code=code).get_function("beyond"), cupy.zeros(32, np.float32)
for i in 3, 4:
    kernel((1,), (32,), (out, np.int32(i)))
    print(i, out.get()[0], flush=True)
"""


def test_the_sanitizers_see_what_the_guards_cannot():
    """A thread that reads beyond its own array, through a pointer: in memory that is there."""
    assert alone(BEYOND).stdout.startswith("3 8.0\n4 ")
    environment = compiler.sanitizer_environment()
    if not all(map(os.path.isabs, environment["LD_PRELOAD"].split(":"))):
        pytest.skip(f"{compiler.compiler()[0]} has no library for -fsanitize=address on this machine")
    done = alone(BEYOND, EMULATOR_SANITIZE="1", **environment)
    assert done.returncode and done.stdout == "3 8.0\n", done.stderr
    assert "AddressSanitizer: stack-buffer-overflow" in done.stderr
    assert "in element(float const*, int)" in done.stderr and "in beyond" in done.stderr


# ------------------------------------------------------------------------------------------- smaller cards

TURING = """
import numpy as np
import emulator
emulator.install(75)
import gpt2
import kernels

device, dtype = kernels.choose("cuda", "bfloat16")
for heads in 2, 1:  # of 64 and of 128 channels
    config = gpt2.GPT2Config(n_layer=1, n_head=heads, n_embd=128, n_positions=70, vocab_size=50)
    rng, steps = np.random.default_rng(1), []
    tokens, targets = rng.integers(0, 50, (2, 1, 70)).astype(np.int32)
    for place in device, "cpu":
        model = gpt2.GPT2(config, place, dtype, seed=3)
        optimizer = gpt2.AdamW(model)
        loss = model.forward(tokens, targets)
        model.backward()
        results = loss, optimizer.step(1e-3), model.flat_params
        steps.append(np.concatenate([model.ops.to_host(result) for result in results]))
    np.testing.assert_allclose(*steps, rtol=1e-4, atol=1e-4)
print(device, dtype)
"""


def test_a_card_below_sm_80_trains_in_float32():
    """Turing has 64 KB of shared memory for a block: attention's float tiles are smaller there."""
    done = alone(TURING)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cuda float32\n" and "computing in float32" in done.stderr


AMPERE = """
import sys
import emulator
emulator.install(int(sys.argv[1]))
import test_cuda
from emulator.launcher import launched
from test_kernels import attention, case, matmul, matmul_transposed

test_cuda.cuda.SMS = 1  # then large tiles are for small matrices too
for one in (
    case(matmul, "weight bias", inp=(2, 67, 72), weight=(72, 136), bias=(136,)),
    case(matmul_transposed, "wte", inp=(2, 67, 72), wte=(136, 72)),
    case(attention, qkv=(1, 130, 3 * 64), n_head=1),
    case(attention, qkv=(1, 70, 3 * 128), n_head=1),
    case(attention, qkv=(1, 70, 3 * 40), n_head=2),
):
    test_cuda.test_operation(*one.values, "bfloat16")
print(*(name for file, name in launched), sep="\\n")
"""


@pytest.mark.parametrize("capability, stages", [(80, 4), (86, 3)])
def test_cards_with_less_shared_memory_have_tiles_that_fit(capability, stages):
    """A100 and RTX 30: 163 and 99 KB for a block, which the tiles of sm_90 would exceed."""
    done = alone(AMPERE, capability, HANDMADE_EMULATOR="0", HANDMADE_GPU="0")
    assert done.returncode == 0, done.stderr
    kernels = done.stdout.splitlines()
    tiles = {name.rstrip(">").split(", ", 4)[4] for name in kernels if name.startswith("matmul_bf16")}
    assert tiles == {f"128, 128, 32, 64, 64, {stages}"}
    for HS in (64, 128):
        assert f"attention_forward_tensor<{HS}>" in kernels
        assert f"attention_backward_tensor<{HS}, QUERIES>" in kernels
    assert "attention_backward_flash<bf16, 64, KEYS>" in kernels


def test_the_cache_forgets_what_an_earlier_text_left(tmp_path, monkeypatch):
    """After an hour, of the same kernels and options; other kernels of the source stay, for a week."""
    monkeypatch.setattr(compiler, "cache_directory", lambda: tmp_path)
    source = 'extern "C" __global__ void one(int* x) {{ x[0] = {}; }}\n'
    source += "template <int N> __global__ void two(int*) {{}}"
    first, other = (compiler.compile_module(source.format(1), names=[name]) for name in ("one", "two<3>"))
    assert compiler.compile_module(source.format(1), names=["one"]) == first
    second = compiler.compile_module(source.format(2), names=["one"])
    assert set(tmp_path.glob("*.so")) == {first, second, other}  # they were used just now
    for path in (first, second, other):
        os.utime(path, (0, path.stat().st_mtime - 3700))
    third = compiler.compile_module(source.format(3), names=["one"])
    assert set(tmp_path.glob("*.so")) == {third, other}
    os.utime(other, (0, other.stat().st_mtime - 7 * 86400))
    compiler.compile_module(source.format(4), names=["one"])
    assert other not in set(tmp_path.glob("*.so"))
