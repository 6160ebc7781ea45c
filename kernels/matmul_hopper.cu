// Matrix multiplication on Hopper: bf16 operands, float32 sums, by wgmma and TMA. Read matmul.cu before, whose
// products, orientations and epilogues these are, and ptx_hopper.cuh and hopper.cuh; attention_hopper.cu after.
//
//   launch                 grid                       block  dynamic shared bytes
//   matmul_hopper_simple   ceil(M/128) ceil(N/128)    128    STAGES (32768 + 8)
//   matmul_hopper          at most one block per SM   384    STAGES ((BM + BN) 128 + 16) + 16
//                                                            + 2 RING (8192 + 8) + 8 BN
//
//   matmul_hopper_simple<A_T, B_T, STAGES>(map a, map b, bf16* out, bf16* bias or null, int M, int N, int K)
//   matmul_hopper<O, EPILOGUE, A_T, B_T, BM, BN, STAGES, PINGPONG, RING>
//       (map a, map b, map out, map extra, bf16* bias, int M, int N, int K, int slices)
//
// The maps (gpu.py makes them) have boxes of 128 bytes, 64 columns of bf16 or 32 of float, and these rows:
//   a             A (M, K): BM           A_T, (K, M): 64
//   b             B_T, (N, K): BN        (K, N): 64
//   out, extra    (M, N): 64             out of slices: (slices Mp, N), Mp = M rounded up to a multiple of 64
//
// N and the row lengths of A and B as they are stored (K or M of A, N or K of B) are multiples of 8; otherwise
// M and K are arbitrary. `slices` blocks share the inner dimension of an output: each stores its float32 partial
// sums, and matmul.cu's add_partials adds them up in their order, so that two runs give the same bits. RING
// boxes of 8 KB of each consumer hold outputs on their way.
//
// Versions, by qkv's forward product of GPT-2 124M, (65536, 768) @ (768, 2304), in TFLOP/s on an H200 on
// 2026-11-27, in bursts too short for the card to lower its clock (RESULTS.md has longer runs, in which all are
// slower); cuBLAS reached 589 there and matmul.cu's mma.sync 362:
//
//   1  a warpgroup loads a stage, waits, multiplies, waits; three blocks of a multiprocessor overlap     449
//   2  four stages, loads ahead: but now one block fills the shared memory, and its epilogue is alone    388
//   3  producer and consumers, persistent    128, 256, 4, false, 2   two consumers share a tile          562
//                                            128, 192, 4, false, 3                                       591
//                                            128, 192, 4, true, 3    ping-pong hides the epilogue        740
//
// The floor is 2 M N K FLOP at the tensor cores' peak, 989 TFLOP/s at 1.83 GHz (datasheet). The kernel stays
// below the peak because 700 W do not allow that clock: at 1.52 GHz Nsight Compute finds the tensor cores of
// version 3 busy for 93% of the time. With BIAS_GELU it is 74%: that epilogue executes more instructions than
// the other consumer's products hide, so its arithmetic is written to need few.

#include "hopper.cuh"
#include "matmul.cuh"

inline constexpr int BK = 64;                               // inner dimension of a stage: 128 bytes of bf16

// ---- Loads: a stage of A and of B, 64 wide in k ----------------------------------------------------------

// SIDE rows or columns, from mn on, 64 of k, to `tile`. As it is stored with k innermost that is one box;
// otherwise a box for each 64 of mn.
template <bool K_MAJOR, int SIDE>
__device__ inline void load_side(unsigned char* tile, const TensorMap& map, Barrier* full, int mn, int k) {
    if constexpr (K_MAJOR) {
        tma_load(tile, map, full, k, mn);
    } else {
#pragma unroll
        for (int c = 0; c < SIDE / 64; c++) tma_load(tile + c * BOX_BYTES, map, full, mn + c * 64, k);
    }
}

// acc (64 MI, BN) += a stage's A @ B, started and committed. A stage is BK / 16 = 4 steps of 16 k.
// Only the first USED_MI times 64 rows and USED_BN columns are computed.
template <bool A_T, bool B_T, int USED_MI, int USED_BN, int MI, int HALF>
__device__ inline void multiply_part(float (&acc)[MI][HALF], Descriptor a, Descriptor b, bool first) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BK / 16; k++)
#pragma unroll
        for (int i = 0; i < USED_MI; i++)
            wgmma<A_T, !B_T>(reinterpret_cast<float(&)[USED_BN / 2]>(acc[i]),
                             advance(a, i * BOX_BYTES + k * (A_T ? 2048 : 32)),
                             advance(b, k * (B_T ? 32 : 2048)), k > 0 || !first);
    wgmma_commit();
}
// The edge of out may leave a tile only so many rows and columns: 64 of 192 columns are a third of the work.
template <bool A_T, bool B_T, int MI, int HALF>
__device__ inline void multiply_stage(float (&acc)[MI][HALF], const unsigned char* a_tile,
                                      const unsigned char* b_tile, bool first, int rows, int columns) {
    const Descriptor a = describe(a_tile, A_T ? BOX_BYTES : 16), b = describe(b_tile, B_T ? 16 : BOX_BYTES);
    if (columns <= 64) multiply_part<A_T, B_T, MI, 64>(acc, a, b, first);
    else if (MI > 1 && rows <= 64) multiply_part<A_T, B_T, 1, 2 * HALF>(acc, a, b, first);
    else multiply_part<A_T, B_T, MI, 2 * HALF>(acc, a, b, first);
}

// ---- Versions 1 and 2: one warpgroup, one tile of 128 x 128 ----------------------------------------------

// Version 1, STAGES = 1: load a stage, wait, multiply, wait. Version 2, STAGES = 4: three stages are on their
// way while one is multiplied.
template <bool A_T, bool B_T, int STAGES>
__global__ void __launch_bounds__(WARPGROUP)
matmul_hopper_simple(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, bf16* out,
                     const bf16* bias, int M, int N, int K) {
    constexpr int SIDE_BYTES = 128 * 128;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    unsigned char* const a_tiles = shared_memory;                           // STAGES x (128, 64)
    unsigned char* const b_tiles = a_tiles + STAGES * SIDE_BYTES;           // STAGES x (128, 64)
    Barrier* const full = reinterpret_cast<Barrier*>(b_tiles + STAGES * SIDE_BYTES);  // STAGES
    const Tile tile = tile_of<128, 128>(blockIdx.x, M, N);
    const int blocks = ceil_div(K, BK);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full + s, 1);
        barrier_init_fence();
    }
    __syncthreads();
    auto load = [&](int block) {                            // thread 0 alone
        if (block >= blocks) return;
        const int s = block % STAGES;
        barrier_arrive_expect(full + s, 2 * SIDE_BYTES);
        load_side<!A_T, 128>(a_tiles + s * SIDE_BYTES, a, full + s, tile.m, block * BK);
        load_side<B_T, 128>(b_tiles + s * SIDE_BYTES, b, full + s, tile.n, block * BK);
    };
    if (threadIdx.x == 0)
        for (int s = 0; s < STAGES; s++) load(s);
    constexpr int BEHIND = STAGES > 1;                      // products that may still be under way
    float acc[2][64];
    RingPosition<STAGES> at;
    for (int block = 0; block < blocks; block++, at.next()) {
        barrier_wait(full + at.stage, at.parity);
        multiply_stage<A_T, B_T>(acc, a_tiles + at.stage * SIDE_BYTES, b_tiles + at.stage * SIDE_BYTES,
                                 block == 0, M - tile.m, N - tile.n);
        wgmma_wait<BEHIND>();                               // so block - BEHIND is through with its stage
        if (threadIdx.x == 0 && block >= BEHIND) load(block - BEHIND + STAGES);
    }
    wgmma_wait<0>();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        wgmma_results(acc[i]);
#pragma unroll
        for (int j = 0; j < 64; j += 2) {                   // two neighbouring columns of row g or g + 8
            const int m = tile.m + i * 64 + warp * 16 + lane / 4 + j / 2 % 2 * 8;
            const int n = tile.n + j / 4 * 8 + lane % 4 * 2;
            if (m >= M || n >= N) continue;
            const float2 add = unpack_bf16(bias ? *reinterpret_cast<const uint32_t*>(bias + n) : 0u);
            *reinterpret_cast<uint32_t*>(out + (size_t)m * N + n) =
                pack_bf16(acc[i][j] + add.x, acc[i][j + 1] + add.y);
        }
    }
}

// ---- Epilogues: 64 x 64 outputs at a time, through a ring of boxes in shared memory ----------------------

// d gelu / dx in 10 instructions instead of 16, for an epilogue whose instructions outlast the products that
// hide it: with t = tanh(u), 0.5 (1 + t) + 0.5 x (1 - t²) du/dx. tanh_approx is off by 2^-11 of t at most, and
// this by |0.5 - t x du/dx| times as much: 0.0009 at |x| = 2, 0.0023 at 3, 0.0047 at 4, in absolute terms, where
// bf16 rounds a slope just above 1 by up to 0.0039. (gelu() keeps its exponential: its values near x = -3 are so
// small that the same error would be a fifth of them.)
__device__ inline float gelu_grad_approx(float x) {
    const float square = x * x;
    const float t = tanh_approx(x * (GELU_SCALE + GELU_SCALE * GELU_CUBE * square));
    const float slope = x * (GELU_SCALE + 3.0f * GELU_SCALE * GELU_CUBE * square);      // x du/dx
    return 0.5f + 0.5f * (t + (1.0f - t * t) * slope);
}

// What a consumer keeps of its ring of RING boxes, between tiles too.
template <int RING> struct Outbox {
    unsigned char* boxes;                                   // RING x 8 KB
    Barrier* arrived;                                       // RING; of the boxes of `extra` that are read
    float* bias;                                            // of the tile's columns
    int barrier;                                            // the number of the consumer's own named barrier
    int rounds = 0;                                         // how often each box of `extra` has been filled
};

// Waits until the next box of the ring may be overwritten: all stores of thread 0 but those of the latest GROUPS
// groups have read their boxes.
template <int GROUPS> __device__ inline void wait_for_box(int barrier) {
    if (threadIdx.x % WARPGROUP == 0) bulk_wait_read<GROUPS>();
    named_barrier_sync<WARPGROUP>(barrier);
}
// All threads have written their part of a box: thread 0 may store it now.
__device__ inline void box_is_written(int barrier) {
    async_proxy_fence();
    named_barrier_sync<WARPGROUP>(barrier);
}

// Thread 0 starts the load of box `number` of `extra`, in the order in which the tile's boxes will be finished.
template <int BOXES_ACROSS, int RING>
__device__ inline void load_extra(const Outbox<RING>& outbox, const TensorMap& extra, int number, int m,
                                  int n) {
    Barrier* const arrived = outbox.arrived + number % RING;
    barrier_arrive_expect(arrived, BOX_BYTES);
    tma_load(outbox.boxes + number % RING * BOX_BYTES, extra, arrived, n + number % BOXES_ACROSS * 64,
             m + number / BOXES_ACROSS * 64);
}

// bf16: 16 columns of a box are one stmatrix. `extra` comes into the box by TMA and is replaced in place; an
// `extra` that is written takes every second box.
template <Epilogue EPILOGUE, int MI, int HALF, int RING>
__device__ inline void finish(float (&acc)[MI][HALF], Outbox<RING>& outbox, const TensorMap& out,
                              const TensorMap& extra, int m, int n) {
    constexpr bool READS = EPILOGUE == BIAS_RESIDUAL || EPILOGUE == GELU_GRAD;
    constexpr int ACROSS = HALF / 32, BOXES = MI * ACROSS, EACH = EPILOGUE == BIAS_GELU ? 2 : 1;
    static_assert(BOXES * EACH % RING == 0 && RING % EACH == 0, "every tile begins with box 0");
    const int thread = threadIdx.x % WARPGROUP, lane = thread % WARP;
#pragma unroll
    for (int number = 0; number < BOXES; number++) {
        const int row = m + number / ACROSS * 64, column = n + number % ACROSS * 64;
        bf16* const box = reinterpret_cast<bf16*>(outbox.boxes + number * EACH % RING * BOX_BYTES);
        bf16* const second = box + BOX_BYTES / 2;
        if constexpr (READS) barrier_wait(outbox.arrived + number % RING, (outbox.rounds + number / RING) & 1);
        else wait_for_box<RING / EACH - 1>(outbox.barrier);
#pragma unroll
        for (int half = 0; half < 64; half += 32) {         // more at a time than 32 columns would spill
            uint32_t y[2][4], pre[2][4];                    // of each 16 columns: rows g, g + 8 of 8; of the next 8
            if constexpr (READS) {
                ldmatrix_x4(y[0], fragment(box, half));
                ldmatrix_x4(y[1], fragment(box, half + 16));
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int column = number % ACROSS * 64 + half + i / 2 * 8;     // of the tile
                const float* const pair = &acc[number / ACROSS][column / 2 + i % 2 * 2];
                uint32_t& stored = y[i / 4][i % 4];
                float2 x = make_float2(pair[0], pair[1]);
                if constexpr (ADDS_BIAS<EPILOGUE>) {
                    const float2 bias = *reinterpret_cast<const float2*>(outbox.bias + column + lane % 4 * 2);
                    x.x += bias.x, x.y += bias.y;
                }
                if constexpr (EPILOGUE == BIAS_RESIDUAL) {
                    const float2 residual = unpack_bf16(stored);
                    x.x += residual.x, x.y += residual.y;
                }
                if constexpr (EPILOGUE == GELU_GRAD) {
                    const float2 at = unpack_bf16(stored);
                    x.x *= gelu_grad_approx(at.x), x.y *= gelu_grad_approx(at.y);
                }
                if constexpr (EPILOGUE == BIAS_GELU) {      // of the sum as it is stored, as in matmul.cu
                    const float2 at = unpack_bf16(pre[i / 4][i % 4] = pack_bf16(x.x, x.y));
                    x.x = gelu(at.x), x.y = gelu(at.y);
                }
                stored = pack_bf16(x.x, x.y);
            }
#pragma unroll
            for (int c = 0; c < 2; c++) {
                stmatrix_x4(fragment(box, half + 16 * c), y[c][0], y[c][1], y[c][2], y[c][3]);
                if constexpr (EPILOGUE == BIAS_GELU)
                    stmatrix_x4(fragment(second, half + 16 * c), pre[c][0], pre[c][1], pre[c][2], pre[c][3]);
            }
        }
        box_is_written(outbox.barrier);
        if (thread == 0) {
            tma_store(out, box, column, row);
            if constexpr (EPILOGUE == BIAS_GELU) tma_store(extra, second, column, row);
            bulk_commit();
            if constexpr (READS) {                          // the box before this one has left: fill it again
                constexpr int AHEAD = RING - 1;
                if (number > 0 && number + AHEAD < BOXES) {
                    bulk_wait_read<1>();
                    load_extra<ACROSS>(outbox, extra, number + AHEAD, m, n);
                }
            }
        }
    }
    if constexpr (READS) outbox.rounds += BOXES / RING;
}

// float: boxes of 64 x 32, stored or added to what is there. Boxes from row M on would be another slice's.
template <Epilogue EPILOGUE, int MI, int HALF, int RING>
__device__ inline void finish_float(float (&acc)[MI][HALF], Outbox<RING>& outbox, const TensorMap& out, int m,
                                    int n, int M, int slice) {
    constexpr int ACROSS = HALF / 16, BOXES = MI * ACROSS;
    static_assert(BOXES % RING == 0, "every tile begins with box 0");
    const int thread = threadIdx.x % WARPGROUP, lane = thread % WARP, warp = thread / WARP;
#pragma unroll
    for (int number = 0; number < BOXES; number++) {
        unsigned char* const box = outbox.boxes + number % RING * BOX_BYTES;
        wait_for_box<RING - 1>(outbox.barrier);
#pragma unroll
        for (int c = 0; c < 32; c += 8) {
            const float* const x = &acc[number / ACROSS][(number % ACROSS * 32 + c) / 2];
            const int row = warp * 16 + lane / 4, chunk = c / 4 + lane % 4 / 2;     // 4 floats are a chunk
            float* const to = reinterpret_cast<float*>(box + row * 128 + (chunk ^ row % 8) * 16) + lane % 2 * 2;
            *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
            *reinterpret_cast<float2*>(to + 8 * 32) = make_float2(x[2], x[3]);      // row + 8 swizzles alike
        }
        box_is_written(outbox.barrier);
        if (thread == 0) {
            const int row = m + number / ACROSS * 64, column = n + number % ACROSS * 32;
            const int above = slice * ceil_div(M, 64) * 64; // rows of the slices before
            if (row < M) {
                if constexpr (EPILOGUE == ACCUMULATE) tma_add(out, box, column, row);
                else tma_store(out, box, column, above + row);
            }
            bulk_commit();
        }
    }
}

// ---- Version 3: a producer and two consumers, persistent -------------------------------------------------

// Blocks stay and take tile after tile, so the loads of the next begin while this one is finished. One thread
// of the first warpgroup, the producer, does nothing but start loads, and the warpgroup gives its registers to
// the other two, the consumers, which multiply. They either share a tile, half the rows each; or, PINGPONG,
// take turns: one multiplies its tile while the other finishes and stores its own, so that the tensor cores
// never wait for an epilogue.
struct Work {
    int m, n, begin, end, slice;                            // outputs from (m, n) on; blocks of k
};
template <int BM, int BN>
__device__ inline Work work_of(int number, int tiles, int M, int N, int K, int slices) {
    const int slice = number / tiles;
    const long long blocks = ceil_div(K, BK);
    const Tile tile = tile_of<BM, BN>(number % tiles, M, N);
    return {tile.m, tile.n, static_cast<int>(blocks * slice / slices),
            static_cast<int>(blocks * (slice + 1) / slices), slice};
}

template <typename O, Epilogue EPILOGUE, bool A_T, bool B_T, int BM, int BN, int STAGES, bool PINGPONG,
          int RING>
__global__ void __launch_bounds__(3 * WARPGROUP, 1)
matmul_hopper(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
              const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap extra,
              const bf16* bias, int M, int N, int K, int slices) {
    constexpr int CONSUMERS = 2, ROWS = PINGPONG ? BM : BM / CONSUMERS, MI = ROWS / 64;
    constexpr int A_BYTES = BM * 128, B_BYTES = BN * 128;
    constexpr bool READS = EPILOGUE == BIAS_RESIDUAL || EPILOGUE == GELU_GRAD;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    unsigned char* const a_tiles = shared_memory;                           // STAGES x (BM, 64)
    unsigned char* const b_tiles = a_tiles + STAGES * A_BYTES;              // STAGES x (BN, 64)
    unsigned char* const boxes = b_tiles + STAGES * B_BYTES;                // 2 x RING x 8 KB
    Barrier* const full = reinterpret_cast<Barrier*>(boxes + CONSUMERS * RING * BOX_BYTES);  // STAGES
    Barrier* const empty = full + STAGES;                                   // STAGES
    Barrier* const turn = empty + STAGES;                                   // of each consumer
    Barrier* const arrived = turn + CONSUMERS;                              // 2 x RING
    float* const biases = reinterpret_cast<float*>(arrived + CONSUMERS * RING);     // 2 x BN

    if (threadIdx.x == 0) {
        ring_init<STAGES>(full, empty, PINGPONG ? 1 : CONSUMERS);
        for (int c = 0; c < CONSUMERS; c++) barrier_init(turn + c, WARPGROUP / WARP);
        for (int i = 0; i < CONSUMERS * RING; i++) barrier_init(arrived + i, 1);
        barrier_init_fence();
    }
    __syncthreads();
    const int tiles = ceil_div(M, BM) * ceil_div(N, BN), last = tiles * slices;
    // The compiler may serialize wgmma where it cannot see that a whole warp takes the same branch.
    const int warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    const int thread = threadIdx.x % WARPGROUP;
    RingPosition<STAGES> at;

    if (warpgroup == 0) {                                   // the producer
        registers_decrease<24>();
        if (thread == 0)
            for (int number = blockIdx.x; number < last; number += gridDim.x) {
                const Work work = work_of<BM, BN>(number, tiles, M, N, K, slices);
                for (int block = work.begin; block < work.end; block++, at.next()) {
                    barrier_wait(empty + at.stage, at.parity ^ 1);
                    barrier_arrive_expect(full + at.stage, A_BYTES + B_BYTES);
                    load_side<!A_T, BM>(a_tiles + at.stage * A_BYTES, a, full + at.stage, work.m, block * BK);
                    load_side<B_T, BN>(b_tiles + at.stage * B_BYTES, b, full + at.stage, work.n, block * BK);
                }
            }
        return;
    }
    registers_increase<240>();                              // a consumer
    const int consumer = warpgroup - 1;
    Outbox<RING> outbox = {boxes + consumer * RING * BOX_BYTES, arrived + consumer * RING,
                           biases + consumer * BN, 1 + consumer};
    float acc[MI][BN / 2];
    int round = 0;                                          // tiles of this block so far, of both consumers
    for (int number = blockIdx.x; number < last; number += gridDim.x, round++) {
        const Work work = work_of<BM, BN>(number, tiles, M, N, K, slices);
        if (PINGPONG && round % CONSUMERS != consumer) {
            at.skip(work.end - work.begin);
            continue;
        }
        const int m = work.m + (PINGPONG ? 0 : consumer * ROWS);
        const unsigned char* const own_rows = a_tiles + (PINGPONG ? 0 : consumer * MI * BOX_BYTES);
        if constexpr (ADDS_BIAS<EPILOGUE>) {
            for (int c = thread; c < BN; c += WARPGROUP)
                outbox.bias[c] = work.n + c < N ? to_float(bias[work.n + c]) : 0.0f;
            named_barrier_sync<WARPGROUP>(outbox.barrier);
        }
        if constexpr (READS) {
            if (thread == 0) {
                bulk_wait_read<0>();                        // the boxes of the tile before have left
                for (int i = 0; i < RING; i++) load_extra<BN / 64>(outbox, extra, i, m, work.n);
            }
        }
        // Wait until the other consumer has passed its last wait on `full`: one parity bit cannot tell this pass
        // through the ring from the one two passes earlier.
        if (PINGPONG && round > 0) barrier_wait(turn + consumer, (round - 1) / CONSUMERS & 1);
        int before = 0;
        for (int block = work.begin; block < work.end; block++) {
            barrier_wait(full + at.stage, at.parity);
            if (PINGPONG && block == work.end - 1) {        // every warp, with all its lanes past this wait
                __syncwarp();
                if (thread % WARP == 0) barrier_arrive(turn + (consumer ^ 1));
            }
            multiply_stage<A_T, B_T>(acc, own_rows + at.stage * A_BYTES, b_tiles + at.stage * B_BYTES,
                                     block == work.begin, M - m, N - work.n);
            if (block > work.begin) {                       // one product stays under way
                wgmma_wait<1>();
                if (thread == 0) barrier_arrive(empty + before);
            }
            before = at.stage;
            at.next();
        }
        wgmma_wait<0>();                                    // of the whole warpgroup: one thread may release it
        if (thread == 0) barrier_arrive(empty + before);
#pragma unroll
        for (int i = 0; i < MI; i++) wgmma_results(acc[i]);
        if constexpr (sizeof(O) == 2) finish<EPILOGUE>(acc, outbox, out, extra, m, work.n);
        else finish_float<EPILOGUE>(acc, outbox, out, m, work.n, M, work.slice);
    }
    if (thread == 0) bulk_wait<0>();                        // the last boxes are in global memory
}
