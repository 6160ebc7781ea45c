"""The emulator itself: each facility against NumPy, and each mistake that it must report, made on purpose."""

import os
import subprocess
import sys
from pathlib import Path

import emulator
import ml_dtypes
import numpy as np
import pytest
from emulator import KernelError, compiler

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
    sent = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
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
        with pytest.raises(RuntimeError, match="captured"):
            cupy.empty(4)
        graph = stream.end_capture()
        graph.launch()
        graph.launch()
    stream.synchronize()
    np.testing.assert_array_equal(out.get(), 2 * np.arange(1, 31))


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
        losses = model.ops.to_host(model.forward(tokens, targets))
        model.backward()
        steps.append([*losses.ravel(), optimizer.step(1e-3), *model.ops.to_host(model.flat_params)])
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
    tiles = {name.partition("true, ")[2].rstrip(">") for name in kernels if name.startswith("matmul_bf16")}
    assert {tile.split("true, ")[-1] for tile in tiles} == {f"128, 128, 32, 64, 64, {stages}"}
    for HS in (64, 128):
        assert f"attention_forward_tensor<{HS}>" in kernels
        assert f"attention_backward_queries_tensor<{HS}>" in kernels
    assert "attention_backward_keys_flash<bf16, 64>" in kernels
