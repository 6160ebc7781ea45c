// The PTX instructions that the Hopper kernels use besides those of ptx.cuh, one small function each, and nothing
// else. Read ptx.cuh before, matmul_hopper.cu after. tests/emulator/ brings its own ptx_hopper.cuh, which
// explains them in C++. No kernel uses the functions for clusters, which did not help (RESULTS.md): they are
// kept for another attempt.
//
// A Hopper kernel is several programs that meet at barriers. The copy engine (TMA) moves whole tiles between
// global and shared memory; the tensor cores (wgmma) read their operands from shared memory; both run on their
// own while the threads do something else. So every function below either starts something, or waits for it:
//
//   barrier_*         an mbarrier in shared memory: counts arrivals of threads and bytes of copies
//   tma_*, bulk_*     copies of tiles, and waiting for those that leave
//   wgmma*            products of a warpgroup, which is four consecutive warps, 128 threads
//   the rest          fences, cluster barriers, registers

#pragma once
#include "ptx.cuh"

inline constexpr int WARPGROUP = 128;                       // threads of a warpgroup

// ---- mbarrier: threads wait for threads, and for bytes ---------------------------------------------------
//
// A barrier is in phase 0, 1, 0, ... A phase ends when `count` arrivals have been made and as many bytes have
// come as were expected; then the next begins with the same count. barrier_wait(b, parity) returns once the
// phase of that parity has ended: on a fresh barrier wait(b, 1) returns at once, and wait(b, 0) waits for the
// first phase. Whoever waits must not fall a whole phase behind, or parities would be confused.

using Barrier = unsigned long long;

__device__ inline void barrier_init(Barrier* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
}
// Makes fresh barriers visible to the copy engine and to the other block of the cluster. __syncthreads or
// cluster_sync comes after it.
__device__ inline void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
// Arrives at the barrier that lies at the same place in block `rank` of the cluster.
__device__ inline void barrier_arrive_cluster(Barrier* barrier, int rank) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
                 :: "r"(shared_address(barrier)), "r"(rank) : "memory");
}
// Arrives, and announces `bytes` that copies will bring in this phase.
__device__ inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ inline bool barrier_try_wait(Barrier* barrier, int parity) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
    return done != 0;
}
// A mistake would hang the card forever, so after about ten seconds the wait ends in an illegal access.
// (Not in __trap(), with which ptxas ignores setmaxnreg in the rest of the kernel, warns C7512, and spills.)
__device__ inline void barrier_wait(Barrier* barrier, int parity) {
    if (barrier_try_wait(barrier, parity)) return;
    const long long begin = clock64();
    while (!barrier_try_wait(barrier, parity))
        if (clock64() - begin > 20'000'000'000ll)
            asm volatile("st.global.u32 [%0], %1;" :: "l"(0ull), "r"(0) : "memory");
}

// ---- TMA: boxes of a tensor, to and from shared memory ---------------------------------------------------
//
// A tensor map, made on the host (gpu.py's tensor_map), says where a tensor lies, its sizes and strides, and
// the size of a box. One thread starts the copy of the box at (x, y, ..), x the innermost coordinate; what
// lies outside of the tensor arrives as zeros, and is not written. x is a multiple of 16 bytes. A box is 128
// bytes wide or less and aligned to 1024; 16-byte chunk c of its row r lies at chunk c ^ r % 8, the "128-byte
// swizzle": so eight rows of one chunk lie on all 32 banks. A load arrives, with its bytes, at a barrier.

struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};

__device__ inline void tma_load(void* smem, const TensorMap& map, Barrier* barrier, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];"
                 :: "r"(shared_address(smem)), "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
                 : "memory");
}
__device__ inline void tma_load(void* smem, const TensorMap& map, Barrier* barrier, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                 :: "r"(shared_address(smem)), "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z),
                    "r"(w)
                 : "memory");
}
// To the same place, and the same barrier, in every block of the cluster whose bit is set in `blocks`.
__device__ inline void tma_load_multicast(void* smem, const TensorMap& map, Barrier* barrier, int x, int y,
                                          unsigned short blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 :: "r"(shared_address(smem)), "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y),
                    "h"(blocks)
                 : "memory");
}
// `bytes` as they lie, without a map: a multiple of 16, and so are both addresses.
__device__ inline void bulk_load(void* smem, const void* gmem, int bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(smem)), "l"(gmem), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// Stores belong to the thread that starts them, which commits them in groups. bulk_wait_read<N> waits until
// all but its N latest groups have been read from shared memory; bulk_wait<N> until they have been written.
__device__ inline void tma_store(const TensorMap& map, const void* smem, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
                 :: "l"(&map), "r"(shared_address(smem)), "r"(x), "r"(y) : "memory");
}
__device__ inline void tma_store(const TensorMap& map, const void* smem, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 :: "l"(&map), "r"(shared_address(smem)), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
// Adds the box to what is there, in the L2 cache.
__device__ inline void tma_add(const TensorMap& map, const void* smem, int x, int y) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];"
                 :: "l"(&map), "r"(shared_address(smem)), "r"(x), "r"(y) : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ inline void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(N) : "memory");
}
template <int N> __device__ inline void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" :: "n"(N) : "memory");
}

// What threads have written to shared memory becomes visible to the copy engine and the tensor cores: each
// writing thread calls this before the barrier that the reader waits at.
__device__ inline void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- wgmma: d (64, N) float32 += a (64, 16) bf16 @ b (16, N) bf16, by a warpgroup ------------------------
//
// Operands lie in shared memory, as TMA with the 128-byte swizzle puts them, and are named by a descriptor;
// `a` may be in registers instead. An operand is "K-major" if 64 neighbouring k of one row (of a) or column (of
// b) are 128 contiguous bytes, and "MN-major" if 64 neighbouring rows or columns of one k are. Nothing has to
// be transposed: the instruction is told which.
//
//   K-major    one box {64 k, any number of m or n}; the next 16 k are 32 bytes further on
//   MN-major   a box {64 m or n, 64 k}, 8 KB, for each 64 of m or n; the next 16 k are 2048 bytes further on
//
// With g = lane / 4 and t = lane % 4, warp w of the four holds rows 16 w .. 16 w + 15 of d: d[4 j + 0, 1] is row
// g, columns 8 j + 2t, 2t+1, and d[4 j + 2, 3] the same of row g + 8. An a in registers is as mma's in ptx.cuh:
// two neighbouring 8-column pieces of a d, rounded to bf16, are one.

using Descriptor = unsigned long long;

// Bits 0-13: the address. 16-29: the leading-dimension byte offset, from one 64-wide chunk to the next (MN-major
// only). 32-45: the stride-dimension byte offset, from 8 rows to the next 8. All three in units of 16 bytes.
// 62-63: swizzle of 128 bytes.
__device__ inline Descriptor describe(const void* tile, int chunk_bytes = 16) {
    return (shared_address(tile) & 0x3ffff) >> 4 | (Descriptor)(chunk_bytes >> 4) << 16 |
           (Descriptor)(1024 >> 4) << 32 | 1ull << 62;
}
__device__ inline Descriptor advance(Descriptor descriptor, int bytes) { return descriptor + (bytes >> 4); }

// The accumulators must not be touched between wgmma and the wait for it. wgmma_fence comes before the first
// product, and wherever registers that it uses were written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most the N latest groups are under way: then the whole warpgroup is through with their operands.
template <int N> __device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}
// Tells the compiler that the accumulators have changed: what reads them stays behind the wait before this.
template <int N> __device__ inline void wgmma_results(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

// The instruction names each of its N / 2 accumulators. REGISTERS_32 is "%0, %1, .. %31", and FLOATS_32(d) the
// list of operands that goes with it; the operands behind them begin at number N / 2.
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define REGISTERS_32 TEN() TEN(1) TEN(2) "%30, %31"
#define REGISTERS_64 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63"
#define REGISTERS_96 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) "%90, %91, %92, %93, %94, %95"
#define REGISTERS_128 \
    TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) \
    "%120, %121, %122, %123, %124, %125, %126, %127"
#define FLOATS_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
                       "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS_32(d, i) FLOATS_8(d, i), FLOATS_8(d, i + 8), FLOATS_8(d, i + 16), FLOATS_8(d, i + 24)
#define FLOATS_64(d) FLOATS_32(d, 0), FLOATS_32(d, 32)
#define FLOATS_96(d) FLOATS_64(d), FLOATS_32(d, 64)
#define FLOATS_128(d) FLOATS_96(d), FLOATS_32(d, 96)

// One product of a warpgroup. Without `accumulate` d is overwritten. A_MN and B_MN: the operand is MN-major.
template <int N, bool A_MN, bool B_MN> struct Wgmma;
template <int N, bool B_MN> struct WgmmaRegisters;

#define DEFINE_WGMMA(N, HALF, REGISTERS, FLOATS, O0, O1, O2, O3, O4, O5, O6)                                   \
    template <bool A_MN, bool B_MN> struct Wgmma<N, A_MN, B_MN> {                                              \
        static __device__ inline void run(float (&d)[HALF], Descriptor a, Descriptor b, bool accumulate) {     \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" O2 ", 0;\n"                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, %" O0      \
                         ", %" O1 ", p, 1, 1, %" O3 ", %" O4 ";\n}"                                            \
                         : FLOATS : "l"(a), "l"(b), "r"((int)accumulate), "n"((int)A_MN), "n"((int)B_MN));     \
        }                                                                                                      \
    };                                                                                                         \
    template <bool B_MN> struct WgmmaRegisters<N, B_MN> {                                                      \
        static __device__ inline void run(float (&d)[HALF], const uint32_t* a, Descriptor b, bool accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" O5 ", 0;\n"                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, {%" O0     \
                         ", %" O1 ", %" O2 ", %" O3 "}, %" O4 ", p, 1, 1, %" O6 ";\n}"                         \
                         : FLOATS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate),  \
                           "n"((int)B_MN));                                                                    \
        }                                                                                                      \
    };
DEFINE_WGMMA(64, 32, REGISTERS_32, FLOATS_32(d, 0), "32", "33", "34", "35", "36", "37", "38")
DEFINE_WGMMA(128, 64, REGISTERS_64, FLOATS_64(d), "64", "65", "66", "67", "68", "69", "70")
DEFINE_WGMMA(192, 96, REGISTERS_96, FLOATS_96(d), "96", "97", "98", "99", "100", "101", "102")
DEFINE_WGMMA(256, 128, REGISTERS_128, FLOATS_128(d), "128", "129", "130", "131", "132", "133", "134")

template <bool A_MN, bool B_MN, int HALF>
__device__ inline void wgmma(float (&d)[HALF], Descriptor a, Descriptor b, bool accumulate) {
    Wgmma<2 * HALF, A_MN, B_MN>::run(d, a, b, accumulate);
}
// With a (64, 16) in registers, four of them: a[0] .. a[3].
template <bool B_MN, int HALF>
__device__ inline void wgmma(float (&d)[HALF], const uint32_t* a, Descriptor b, bool accumulate) {
    WgmmaRegisters<2 * HALF, B_MN>::run(d, a, b, accumulate);
}

// ---- stmatrix: the opposite of ldmatrix_x4 ---------------------------------------------------------------

// Lane i gives the address of row i % 8 of tile i / 8; r[j] of each lane goes to tile j, as ldmatrix has it.
__device__ inline void stmatrix_x4(void* smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(shared_address(smem)), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

// ---- Threads of a block, blocks of a cluster, registers --------------------------------------------------

// A barrier of THREADS threads; each of the numbers 1 .. 15 is a barrier of its own, __syncthreads is 0.
template <int THREADS> __device__ inline void named_barrier_sync(int number) {
    asm volatile("bar.sync %0, %1;" :: "r"(number), "n"(THREADS) : "memory");
}
// Waits for all threads of all blocks of the cluster.
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ inline int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// A warpgroup gives registers back, or takes more: N for each thread from now on. It needs __launch_bounds__
// with a second argument, or ptxas ignores it (C7508).
template <int N> __device__ inline void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}
template <int N> __device__ inline void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}
