// Matrix multiplication, nine tenths of a training step. Read cpu.py's matmul_forward and matmul_backward,
// common.cuh and ptx.cuh before; attention.cu after. cuda.py launches what is here.
//
// Everything is out (M, N) = A (M, K) @ B (K, N), and the three products of a layer differ only in how A and
// B lie in memory. A_T says that A is stored transposed, as (K, M); B_T that B is stored as (N, K):
//
//   forward      out = inp @ weight           A = inp              B = weight (in, out)
//   tied head    logits = inp @ wte.T         A = inp              B = wte, B_T
//   dinp         dinp = dout @ weight.T       A = dout             B = weight, B_T;  the head: B = wte
//   dweight      dweight += inp.T @ dout      A = inp, A_T         B = dout;     the head: dout, A_T, and inp
//
// What happens to a finished tile on its way to memory is the EPILOGUE: see finish() below.
//
//   launch             grid x, y, z                      block               dynamic shared bytes
//   matmul_naive       ceil(M / 8) ceil(N / 32), 1, 1    32, 8               0
//   matmul_float       ceil(M / BM) ceil(N / BN), 1, S   (BM/TM) (BN/TN)     0
//   matmul_bf16        ceil(M / BM) ceil(N / BN), 1, S   (BM/WM) (BN/WN) 32  STAGES (BM + BN) BK 2
//   matmul_skinny      ceil(N / BN), ceil(M / 16 MI), S  256                 STAGES (16 MI + BN) 1024
//   add_partials       ceil(size / 1024), 1, 1           256                 0
//   column_sums_naive  ceil(N / 256), 1, 1               256                 0
//   column_partials    ceil(N / (512 / sizeof T)), S, 1  256                 0
//
//   matmul_naive<T, O, EPILOGUE, A_T, B_T>(O* out, O* extra, O* bias, T* a, T* b, int M, int N, int K)
//   matmul_float<EPILOGUE, A_T, B_T, BM, BN, BK, TM, TN> and
//   matmul_bf16<O, EPILOGUE, A_T, B_T, BM, BN, BK, WM, WN, STAGES>
//       (O* out, O* extra, O* bias, T* a, T* b, int M, int N, int K, int k_slice)     T = float = O; T = bf16
//   matmul_skinny<O, EPILOGUE, B_T, MI, BN, STAGES>
//       (O* out, O* extra, O* bias, bf16* a, bf16* b, float* partial, unsigned* finished, int M, int N, int K)
//   add_partials(float* out, float* partials, size_t size, size_t stride, int slices)
//   column_sums_naive<T>(float* dbias, T* dout, int rows, int N)
//   column_partials<T>(float* partials, T* dout, int rows, int N, int rows_per_slice)
//
//   tiles of matmul_float    128, 128, 8, 8, 8         256 threads, TM x TN outputs each
//                            64, 64, 16, 4, 4          256 threads, for small outputs
//   tiles of matmul_bf16     128, 256, 64, 64, 64, 3   256 threads, 147456 bytes: one block per SM
//     (WM x WN outputs       128, 128, 64, 64, 64, 3   128 threads,  98304 bytes: two blocks per SM on sm_90
//      per warp)             128, 128, 32, 64, 64, 4   128 threads,  65536 bytes: two blocks per SM on sm_80
//                            128, 128, 32, 64, 64, 3   128 threads,  49152 bytes: two on sm_86 and sm_89
//                            64, 64, 64, 32, 32, 3     128 threads,  49152 bytes: small outputs
//
// The naive versions take any size. All others move 16 bytes at a time: every pointer is a multiple of 16
// bytes, and N and the row lengths of A and B as they are stored are multiples of 8 (bf16) or 4 (float).
//
// S slices share the inner dimension, k_slice to each: a multiple of BK with S k_slice >= K. Forward and dinp
// have S = 1. dweight has few tiles and a long K, all the tokens: with S = 1 its EPILOGUE is ACCUMULATE, with
// S > 1 STORE to partials (S, M, N), which add_partials then adds to dweight in their order. A good S fills
// whole waves: the smallest ceil(tiles S / blocks the GPU holds at once) / S, as long as the 2 S M N 4 bytes
// of the partials cost little beside it. In matmul_skinny any S may share K, and it adds up by itself: the comment
// there says what partial and finished are. With S = 1 both may be null.
//
// The floor is 2 M N K FLOP at the tensor cores' rate: 989 TFLOP/s on an H100 (datasheet), of which mma.sync
// reaches 62-65% (arXiv 2402.13499). A block reads (BM + BN) 2 bytes per k for 2 BM BN FLOP: 64 FLOP/byte at
// 128 x 128, 85 at 128 x 256. At 450 TFLOP/s that is 7 or 5.3 TB/s, more than memory has (3.35) and as much
// as the L2 cache gives: hence large tiles, and the order of tile_of().

#include "matmul.cuh"
#include "tile.cuh"

// ---- Version 1: one thread per output --------------------------------------------------------------------

// The definition, with every epilogue, for any size. Every element of A is read N times and every element of B
// M times, mostly from the caches. 5.2 TFLOP/s on an H200 (qkv's product of GPT-2 124M, 16,384 rows, bf16).
template <typename T, typename O, Epilogue EPILOGUE, bool A_T, bool B_T>
__global__ void matmul_naive(O* out, O* extra, const O* bias, const T* a, const T* b, int M, int N, int K) {
    const int across = ceil_div(N, blockDim.x);
    const int m = blockIdx.x / across * blockDim.y + threadIdx.y;
    const int n = blockIdx.x % across * blockDim.x + threadIdx.x;
    if (m >= M || n >= N) return;
    float x = 0.0f;
    for (int k = 0; k < K; k++)
        x += to_float(A_T ? a[(size_t)k * M + m] : a[(size_t)m * K + k]) *
             to_float(B_T ? b[(size_t)n * K + k] : b[(size_t)k * N + n]);
    const size_t at = (size_t)m * N + n;                // in out and in extra
    if constexpr (ADDS_BIAS<EPILOGUE>) x += to_float(bias[n]);
    if constexpr (EPILOGUE == BIAS_GELU) {              // out = gelu(pre) of pre as it is stored, so that
        extra[at] = from_float<O>(x);                   // recomputing it gives the same bits
        x = gelu(to_float(extra[at]));
    }
    if constexpr (EPILOGUE == BIAS_RESIDUAL) x += to_float(extra[at]);
    if constexpr (EPILOGUE == GELU_GRAD) x *= gelu_grad(to_float(extra[at]));
    if constexpr (EPILOGUE == ACCUMULATE) x += to_float(out[at]);
    out[at] = from_float<O>(x);
}

// ---- The epilogue of the faster versions -----------------------------------------------------------------

template <Epilogue EPILOGUE>
inline constexpr bool READS_EXTRA = EPILOGUE == BIAS_RESIDUAL || EPILOGUE == GELU_GRAD;

// 16 bytes of outputs, x, go to memory, where `at` counts elements from the first of out. `extra` (M, N) is the
// pre-activation that BIAS_GELU writes and GELU_GRAD reads, or the residual that BIAS_RESIDUAL reads. b and e are
// what the bias and `extra` hold for these outputs, if the epilogue reads them.
template <Epilogue EPILOGUE, typename O>
__device__ inline void finish(O* out, O* extra, const Pack<O>& b, const Pack<O>& e, float (&x)[Pack<O>::size],
                              size_t at) {
    constexpr int SIZE = Pack<O>::size;
    float y[SIZE];                                      // whole packs are waited for only where they are added
    if constexpr (ADDS_BIAS<EPILOGUE>) {
        to_floats<O>(y, b);
        for (int i = 0; i < SIZE; i++) x[i] += y[i];
    }
    if constexpr (EPILOGUE == BIAS_GELU) {
        const Pack<O> pre = rounded_pack<O>(x);
        store_pack(extra + at, pre);
        for (int i = 0; i < SIZE; i++) x[i] = gelu(to_float(pre[i]));
    }
    if constexpr (READS_EXTRA<EPILOGUE>) to_floats<O>(y, e);
    if constexpr (EPILOGUE == BIAS_RESIDUAL)            // out = residual + inp @ weight + bias
        for (int i = 0; i < SIZE; i++) x[i] += y[i];
    if constexpr (EPILOGUE == GELU_GRAD)                // dpre = (dout @ weight.T) * gelu'(pre)
        for (int i = 0; i < SIZE; i++) x[i] *= gelu_grad(y[i]);
    if constexpr (EPILOGUE == ACCUMULATE) {             // dweight += inp.T @ dout
        const Pack<O> before = load_pack(out + at);
        for (int i = 0; i < SIZE; i++) x[i] += to_float(before[i]);
    }
    store_pack(out + at, rounded_pack<O>(x));
}

// The same of the outputs at (row, col), with bias (N,) and `extra` in memory.
template <Epilogue EPILOGUE, typename O>
__device__ inline void finish(O* out, O* extra, const O* bias, float (&x)[Pack<O>::size], int row, int col,
                              int N) {
    const size_t at = (size_t)row * N + col;
    Pack<O> b, e;
    if constexpr (ADDS_BIAS<EPILOGUE>) b = load_pack(bias + col);
    if constexpr (READS_EXTRA<EPILOGUE>) e = load_pack(extra + at);
    finish<EPILOGUE>(out, extra, b, e, x, at);
}

// ---- Version 2, float32: tiles in shared memory, 8 x 8 outputs in the registers of a thread ------------------

// A block brings BM x BK of A and BK x BN of B to shared memory, once for its BM x BN outputs; a thread reads
// TM + TN values from there for TM TN multiplications. Both tiles lie as [k][m or n], so that a thread reads
// 4 neighbours at once; an operand stored along k is transposed on the way in. The next tile travels from
// global memory to registers while the present one is multiplied: 40 TFLOP/s on an H200, in float32.

// A thread's share of the tile that begins at (mn0, k0). K_MAJOR: stored (mn_size, K), else (K, mn_size).
template <bool K_MAJOR, int SIDE, int BK, int THREADS, int PACKS>
__device__ inline void fetch(Pack<float> (&packs)[PACKS], const float* matrix, int mn0, int k0, int mn_size,
                             int K) {
    for (int p = 0; p < PACKS; p++) {
        const int i = (threadIdx.x + p * THREADS) * 4;
        const int row = K_MAJOR ? mn0 + i / BK : k0 + i / SIDE, rows = K_MAJOR ? mn_size : K;
        const int col = K_MAJOR ? k0 + i % BK : mn0 + i % SIDE, cols = K_MAJOR ? K : mn_size;
        packs[p] = {};
        if (row < rows && col < cols) packs[p] = load_pack(matrix + (size_t)row * cols + col);
    }
}
// The padding of 4 lets the transposing stores of a warp fall into different banks.
template <bool K_MAJOR, int SIDE, int BK, int THREADS, int PACKS>
__device__ inline void put(float (&tile)[BK][SIDE + 4], const Pack<float> (&packs)[PACKS]) {
    for (int p = 0; p < PACKS; p++) {
        const int i = (threadIdx.x + p * THREADS) * 4;
        if constexpr (!K_MAJOR) store_pack(&tile[i / SIDE][i % SIDE], packs[p]);
        else for (int j = 0; j < 4; j++) tile[i % BK + j][i / BK] = packs[p][j];
    }
}

template <Epilogue EPILOGUE, bool A_T, bool B_T, int BM, int BN, int BK, int TM, int TN>
__global__ void __launch_bounds__(BM / TM * (BN / TN), 2)       // two blocks per SM: at most 128 registers
matmul_float(float* out, float* extra, const float* bias, const float* a, const float* b, int M, int N, int K,
             int k_slice) {
    constexpr int THREADS = BM / TM * (BN / TN);
    constexpr int A_PACKS = BM * BK / 4 / THREADS, B_PACKS = BN * BK / 4 / THREADS;
    static_assert(BM * BK % (4 * THREADS) == 0 && BN * BK % (4 * THREADS) == 0, "whole packs per thread");
    __shared__ __align__(16) float a_tile[2][BK][BM + 4], b_tile[2][BK][BN + 4];

    const Tile tile = tile_of<BM, BN>(blockIdx.x, M, N);
    const int k_begin = blockIdx.z * k_slice, k_end = min(K, k_begin + k_slice);
    out += (size_t)blockIdx.z * M * N;
    // A thread's rows are TM / 4 groups of 4, ROW_GAP apart, its columns likewise: 16 lanes side by side read
    // 256 bytes without a gap, and no two of them meet in a bank.
    const int row = threadIdx.x / (BN / TN) * 4, col = threadIdx.x % (BN / TN) * 4;
    constexpr int ROW_GAP = BM / (TM / 4), COL_GAP = BN / (TN / 4);
    Pack<float> a_packs[A_PACKS], b_packs[B_PACKS];
    float sums[TM][TN] = {};
    fetch<!A_T, BM, BK, THREADS>(a_packs, a, tile.m, k_begin, M, K);
    fetch<B_T, BN, BK, THREADS>(b_packs, b, tile.n, k_begin, N, K);
    for (int k0 = k_begin, now = 0; k0 < k_end; k0 += BK, now ^= 1) {
        put<!A_T, BM, BK, THREADS>(a_tile[now], a_packs);
        put<B_T, BN, BK, THREADS>(b_tile[now], b_packs);
        __syncthreads();                            // one barrier: the other buffer was read before it
        fetch<!A_T, BM, BK, THREADS>(a_packs, a, tile.m, k0 + BK, M, K);
        fetch<B_T, BN, BK, THREADS>(b_packs, b, tile.n, k0 + BK, N, K);
#pragma unroll 2                                      // unrolled further, it would spill
        for (int k = 0; k < BK; k++) {
            Pack<float> x[TM / 4], y[TN / 4];
            for (int i = 0; i < TM / 4; i++) x[i] = load_pack(&a_tile[now][k][row + i * ROW_GAP]);
            for (int j = 0; j < TN / 4; j++) y[j] = load_pack(&b_tile[now][k][col + j * COL_GAP]);
            for (int i = 0; i < TM; i++)
                for (int j = 0; j < TN; j++) sums[i][j] += x[i / 4][i % 4] * y[j / 4][j % 4];
        }
    }
#pragma unroll
    for (int i = 0; i < TM; i++) {
        const int m = tile.m + row + i / 4 * ROW_GAP + i % 4;
#pragma unroll
        for (int j = 0; j < TN; j += 4) {
            const int n = tile.n + col + j / 4 * COL_GAP;
            float x[4] = {sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]};
            if (m < M && n < N) finish<EPILOGUE>(out, extra, bias, x, m, n, N);
        }
    }
}

// ---- Version 3, bf16: tensor cores -----------------------------------------------------------------------

// Two pipelines, one inside the other: cp.async fills the stages ahead while the tensor cores multiply the
// present one; and while mma works on 16 of a stage's BK, ldmatrix brings the next 16 to registers. A tile
// lies in shared memory as it lies in global memory; ldmatrix.trans turns what lies across, so that the three
// products are one kernel. 40 -> 313 TFLOP/s. On Hopper matmul_hopper.cu is the next version.

// Four 8 x 8 tiles, 16 (m or n) x 16 (k), from (mn, k) of a shared tile: one fragment of A, or two of B. A
// wants the second tile 8 further in m (see mma in ptx.cuh), B 8 further in k.
template <bool FOR_A, bool K_MAJOR, int SIDE, int BK>
__device__ inline void load_fragment(uint32_t (&r)[4], const bf16* tile, int mn, int k) {
    const int lane = threadIdx.x % WARP, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    mn += FOR_A ? second : third;
    k += FOR_A ? third : second;
    if constexpr (K_MAJOR) ldmatrix_x4(r, tile + swizzle<BK>(mn + lane % 8, k / 8));
    else ldmatrix_x4_trans(r, tile + swizzle<SIDE>(k + lane % 8, mn / 8));
}

template <typename O, Epilogue EPILOGUE, bool A_T, bool B_T, int BM, int BN, int BK, int WM, int WN,
          int STAGES>
__global__ void __launch_bounds__(BM / WM * (BN / WN) * WARP)
matmul_bf16(O* out, O* extra, const O* bias, const bf16* a, const bf16* b, int M, int N, int K, int k_slice) {
    constexpr int THREADS = BM / WM * (BN / WN) * WARP, MI = WM / 16, NI = WN / 8, STEPS = BK / 16;
    static_assert(WM % 16 == 0 && WN % 16 == 0 && BK % 32 == 0 && STAGES >= 2, "whole fragments");
    static_assert(STAGES * (BM + BN) * BK * 2 >= THREADS / WARP * 16 * (WN + 8) * 4, "room for the strips");
    extern __shared__ __align__(16) unsigned char shared_memory[];
    bf16* const a_tiles = reinterpret_cast<bf16*>(shared_memory);   // STAGES x (BM, BK), or (BK, BM) if A_T
    bf16* const b_tiles = a_tiles + STAGES * BM * BK;               // STAGES x (BK, BN), or (BN, BK) if B_T
    const Tile tile = tile_of<BM, BN>(blockIdx.x, M, N);
    const int k_begin = blockIdx.z * k_slice;
    const int blocks = max(0, ceil_div(min(K - k_begin, k_slice), BK)); // along K, each BK long
    out += (size_t)blockIdx.z * M * N;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int warp_m = warp / (BN / WN) * WM, warp_n = warp % (BN / WN) * WN;   // the warp's part of the tile

    auto load_stage = [&](int block, int stage, int part, int parts) {
        bf16* const a_tile = a_tiles + stage * BM * BK;
        bf16* const b_tile = b_tiles + stage * BN * BK;
        const int k = k_begin + block * BK;
        if (block < blocks) {       // else an empty group: the count of groups stays the count of blocks
            if constexpr (A_T) load_tile<BK, BM, THREADS>(a_tile, a, k, tile.m, K, M, M, part, parts);
            else load_tile<BM, BK, THREADS>(a_tile, a, tile.m, k, M, K, K, part, parts);
            if constexpr (B_T) load_tile<BN, BK, THREADS>(b_tile, b, tile.n, k, N, K, K, part, parts);
            else load_tile<BK, BN, THREADS>(b_tile, b, k, tile.n, K, N, N, part, parts);
        }
        if (part == parts - 1) cp_async_commit();
    };
    // a_frags[i] is done with after its row of mma, and the next step's is loaded in its place; b_frags is
    // used until the step ends, and needs two buffers.
    uint32_t a_frags[MI][4], b_frags[2][NI][2];
    auto load_a = [&](int stage, int step, int i) {
        load_fragment<true, !A_T, BM, BK>(a_frags[i], a_tiles + stage * BM * BK, warp_m + i * 16, step * 16);
    };
    auto load_b = [&](int stage, int step) {
#pragma unroll
        for (int j = 0; j < NI; j += 2) {
            uint32_t r[4];
            load_fragment<false, B_T, BN, BK>(r, b_tiles + stage * BN * BK, warp_n + j * 8, step * 16);
            for (int c = 0; c < 4; c++) b_frags[step % 2][j + c / 2][c % 2] = r[c];
        }
    };

    float sums[MI][NI][4] = {};
    for (int block = 0; block < STAGES - 1; block++) load_stage(block, block, 0, 1);
    cp_async_wait<STAGES - 2>();                    // block 0 is there
    __syncthreads();
    for (int i = 0; i < MI; i++) load_a(0, 0, i);
    load_b(0, 0);
    int last = STAGES - 1, now = 0;                 // the stages of block - 1 and block
    for (int block = 0; block < blocks; block++) {
        const int next = now + 1 < STAGES ? now + 1 : 0;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step == STEPS - 1) {                // every fragment of this block is in registers
                cp_async_wait<STAGES - 2>();        // the next block is there,
                __syncthreads();                    // everybody's part of it, and nobody reads this one again
            }
            const int stage = step + 1 < STEPS ? now : next, ahead = (step + 1) % STEPS;    // the next step's
            load_b(stage, ahead);
            if (step < STEPS - 1) load_stage(block + STAGES - 1, last, step, STEPS - 1);
#pragma unroll
            for (int i = 0; i < MI; i++) {
#pragma unroll
                for (int j = 0; j < NI; j++) mma_m16n8k16(sums[i][j], a_frags[i], b_frags[step % 2][j]);
                load_a(stage, ahead, i);
            }
        }
        last = now, now = next;
    }

    // A lane holds 2 neighbours here and 2 there. Through its own strip of shared memory each warp turns 16
    // rows at a time into whole lines, and every access to global memory is 16 bytes a lane. Two things keep
    // the banks apart: rows of WN + 8 floats for the writes; for the reads, from column 32 on, neighbouring
    // groups of 4 floats change places.
    __syncthreads();                                // the stages are free, and no copy is under way
    constexpr int SIZE = Pack<O>::size, PER_ROW = WN / SIZE;
    float* const strip = reinterpret_cast<float*>(shared_memory) + warp * 16 * (WN + 8);
    auto place = [&](int row, int col) { return strip + row * (WN + 8) + (col ^ (col & 32) / 8); };
#pragma unroll
    for (int i = 0; i < MI; i++) {
        for (int j = 0; j < 2 * NI; j++) {          // mma by mma, row lane / 4 and then row lane / 4 + 8
            const float* const pair = &sums[i][j / 2][j % 2 * 2];
            float* const to = place(lane / 4 + j % 2 * 8, j / 2 * 8 + lane % 4 * 2);
            *reinterpret_cast<float2*>(to) = make_float2(pair[0], pair[1]);
        }
        __syncwarp();
        for (int p = lane; p < 16 * PER_ROW; p += WARP) {
            const int row = p / PER_ROW, col = p % PER_ROW * SIZE;
            float x[SIZE];
            for (int c = 0; c < SIZE; c += 4) {
                const Pack<float> four = load_pack<float>(place(row, col + c));
                for (int e = 0; e < 4; e++) x[c + e] = four[e];
            }
            const int m = tile.m + warp_m + i * 16 + row, n = tile.n + warp_n + col;
            if (m < M && n < N) finish<EPILOGUE>(out, extra, bias, x, m, n, N);
        }
        __syncwarp();                               // the strip may be written again
    }
}

// ---- Version 4, bf16: few rows, as in decoding -----------------------------------------------------------

// For few rows the work is to read B once, and what counts is how much of it is asked for at a time. A block
// owns 16 MI rows, BN columns and all of K: each of its 8 warps takes every eighth 64 of k, through a ring of
// STAGES of its own, so that nobody waits for anybody until the 8 sums are added, in their order. With 6 stages
// and K = 3072 a block asks for all that it will ever read at once. A token of GPT-2 124M, by this and all
// other kernels, took 556 us on an H200 with the version before (tiles of 16 x 32, K walked by one pipeline),
// and 429 us with this one and decode.cu's single launch. Its tiles for more than 16 rows
// took a step of 64 sequences from 708 to 652 us of the GPU.
//
// Where few columns are left of a long K, 768 of 3072 in a token's last product of a layer, 48 blocks would have
// rings of 192 KB, on a third of the multiprocessors, and only where no block of the kernel before is left. Then S
// blocks share the K of a tile: each leaves its sums in `partial` (tiles, S, 16 MI, BN), and the last of them adds
// up those of all, in the order of the slices. `finished` (tiles,) counts, is zero before the first launch, and is
// left zero by every launch. S > 1 is for 16 rows, and 3 at most. (Without the second launch bound ptxas spills.)
//
// B is a weight, which no kernel of a recorded step writes. So a block fills its ring with B while the kernel
// before it is still at work: programmatic dependent launch (griddepcontrol in ptx.cuh). The GPU's 300 us of a
// token became 229, the 652 us of 64 became 598. Room in the ring for 4 of A's 16 rows, so that more of the
// next kernel's rings fit beside this one's, changed nothing: 231 us.
inline constexpr int MOST_SLICES = 3;                       // S

template <typename O, Epilogue EPILOGUE, bool B_T, int MI, int BN, int STAGES>
__global__ void __launch_bounds__(256, MI == 1 ? 3 : MI == 2 ? 2 : 1)
matmul_skinny(O* out, O* extra, const O* bias, const bf16* a, const bf16* b, float* partial, unsigned* finished,
              int M, int N, int K) {
    constexpr int WARPS = 8, BK = 64, ROWS = 16 * MI, NI = BN / 16, CHUNKS = BK / 8;
    constexpr int B_COLS = B_T ? BK : BN, B_CHUNKS = B_COLS / 8;
    constexpr int RING = STAGES * (ROWS + BN) * BK * 2;     // bytes of a warp
    constexpr int ROW = BN + 8;                             // floats from one row of sums to the next
    static_assert(ROWS * ROW * 4 <= RING, "room for the sums of a warp");
    extern __shared__ __align__(16) unsigned char shared_memory[];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int m0 = blockIdx.y * ROWS, n0 = blockIdx.x * BN;
    bf16* const a_tiles = reinterpret_cast<bf16*>(shared_memory + warp * RING);
    bf16* const b_tiles = a_tiles + STAGES * ROWS * BK;     // STAGES x (64, BN), or (BN, 64) if B_T
    const int slices = gridDim.z;
    const int sharers = WARPS * slices, sharer = blockIdx.z * WARPS + warp;         // the warps of all slices
    const int blocks = ceil_div(ceil_div(K, BK) - sharer, sharers);                 // of this warp, each 64 of k

    auto load_a = [&](int block) {                          // rows of A from M on stay as they are
        bf16* const tile = a_tiles + block % STAGES * ROWS * BK;
        const int k0 = (block * sharers + sharer) * BK;
        if (block >= blocks) return;
#pragma unroll
        for (int i = 0; i < ROWS * CHUNKS / WARP; i++) {
            const int row = (i * WARP + lane) / CHUNKS, chunk = (i * WARP + lane) % CHUNKS;
            const int k = k0 + chunk * 8, count = max(0, min(8, K - k));
            const bf16* const from = a + (size_t)(m0 + row) * K + min(k, K - 8);
            if (m0 + row < M) cp_async_16(tile + swizzle<BK>(row, chunk), from, count * 2);
        }
    };
    auto load_b = [&](int block) {
        bf16* const tile = b_tiles + block % STAGES * BN * BK;
        const int k0 = (block * sharers + sharer) * BK;
        if (block >= blocks) return;
#pragma unroll
        for (int i = 0; i < BN * BK / 8 / WARP; i++) {
            const int row = (i * WARP + lane) / B_CHUNKS, chunk = (i * WARP + lane) % B_CHUNKS;
            const int n = n0 + (B_T ? row : chunk * 8), k = k0 + (B_T ? chunk * 8 : row);
            const bool there = n < N && k < K;
            const bf16* const from = !there ? b : B_T ? b + (size_t)n * K + k : b + (size_t)k * N + n;
            cp_async_16(tile + swizzle<B_COLS>(row, chunk), from, there ? 16 : 0);
        }
    };

    // The outputs are in places of 16 bytes, and thread p finishes place p. What it adds there is asked for now:
    // it comes as slowly as the last products.
    constexpr int SIZE = Pack<O>::size, PER_ROW = BN / SIZE, PLACES = ROWS * PER_ROW;
    static_assert(PLACES <= WARPS * WARP || EPILOGUE == STORE, "one place for a thread");
    const int row = threadIdx.x / PER_ROW, col = threadIdx.x % PER_ROW * SIZE;
    const bool inside = threadIdx.x < PLACES && m0 + row < M && n0 + col < N;
    Pack<O> b_pack, extra_pack;

    griddepcontrol_launch_dependents();
    for (int block = 0; block < STAGES; block++) load_b(block);
    if (ADDS_BIAS<EPILOGUE> && inside) b_pack = load_pack(bias + n0 + col);
    griddepcontrol_wait();
    if (READS_EXTRA<EPILOGUE> && inside) extra_pack = load_pack(extra + (size_t)(m0 + row) * N + n0 + col);
    for (int block = 0; block < STAGES; block++) {
        load_a(block);
        cp_async_commit();                                  // the first group has the B of all stages, too
    }
    float sums[MI][2 * NI][4] = {};
    for (int block = 0; block < blocks; block++) {
        cp_async_wait<STAGES - 1>();
        __syncwarp();                                       // every lane's part of the stage is there
        const bf16* const a_tile = a_tiles + block % STAGES * ROWS * BK;
        const bf16* const b_tile = b_tiles + block % STAGES * BN * BK;
#pragma unroll
        for (int step = 0; step < BK / 16; step++) {
            uint32_t b_frags[NI][4], a_frags[4];
#pragma unroll
            for (int j = 0; j < NI; j++)
                load_fragment<false, B_T, BN, BK>(b_frags[j], b_tile, j * 16, step * 16);
#pragma unroll
            for (int i = 0; i < MI; i++) {
                load_fragment<true, true, ROWS, BK>(a_frags, a_tile, i * 16, step * 16);
#pragma unroll
                for (int j = 0; j < 2 * NI; j++) {
                    const uint32_t half[2] = {b_frags[j / 2][j % 2 * 2], b_frags[j / 2][j % 2 * 2 + 1]};
                    mma_m16n8k16(sums[i][j], a_frags, half);
                }
            }
        }
        __syncwarp();                                       // nobody reads this stage again
        load_a(block + STAGES);
        load_b(block + STAGES);
        cp_async_commit();
    }

    // Each warp leaves its sums (ROWS, BN) where its ring was. Rows of BN + 8 floats keep the banks apart.
    float* const own = reinterpret_cast<float*>(shared_memory + warp * RING);
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < 4 * NI; j++) {                  // mma by mma, row lane / 4 and then lane / 4 + 8
            const float* const pair = &sums[i][j / 2][j % 2 * 2];
            float* const to = own + (i * 16 + lane / 4 + j % 2 * 8) * ROW + j / 2 * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(to) = make_float2(pair[0], pair[1]);
        }
    __syncthreads();
    float* const of_slices = partial + (size_t)blockIdx.x * slices * ROWS * BN;      // (S, 16 MI, BN)
    for (int p = threadIdx.x; p < PLACES; p += WARPS * WARP) {
        const int row = p / PER_ROW, col = p % PER_ROW * SIZE;
        if (m0 + row >= M || n0 + col >= N) continue;
        float x[SIZE] = {};
        for (int w = 0; w < WARPS; w++) {
            const float* const part = reinterpret_cast<const float*>(shared_memory + w * RING);
            for (int e = 0; e < SIZE; e += 4) {
                const Pack<float> four = load_pack(part + row * ROW + col + e);
                for (int c = 0; c < 4; c++) x[e + c] += four[c];
            }
        }
        if (slices == 1) {
            finish<EPILOGUE>(out, extra, b_pack, extra_pack, x, (size_t)(m0 + row) * N + n0 + col);
            continue;
        }
        for (int e = 0; e < SIZE; e += 4) {
            Pack<float> four;
            for (int c = 0; c < 4; c++) four[c] = x[e + c];
            store_pack(of_slices + (blockIdx.z * ROWS + row) * BN + col + e, four);
        }
    }
    if (slices == 1 || !is_last_block(finished + blockIdx.x, slices) || !inside) return;
    Pack<float> parts[MOST_SLICES][SIZE / 4];               // all loads are under way at once
#pragma unroll
    for (int s = 0; s < MOST_SLICES; s++)
#pragma unroll
        for (int e = 0; e < SIZE / 4; e++)
            parts[s][e] = load_pack(of_slices + (min(s, slices - 1) * ROWS + row) * BN + col + 4 * e);
    float x[SIZE] = {};
#pragma unroll
    for (int s = 0; s < MOST_SLICES; s++)
#pragma unroll
        for (int e = 0; e < SIZE / 4; e++)
            for (int c = 0; c < 4; c++) x[4 * e + c] += s < slices ? parts[s][e][c] : 0.0f;
    finish<EPILOGUE>(out, extra, b_pack, extra_pack, x, (size_t)(m0 + row) * N + n0 + col);
}

// ---- Sums in a fixed order -------------------------------------------------------------------------------

// out[i] += partials[0][i] + partials[1][i] + ..., `stride` elements from one slice to the next: the second half
// of the split dweight, here and in matmul_hopper.cu, and of the bias gradient. Four elements a thread: size
// and stride are multiples of 4. Bandwidth alone: (slices + 2) size 4 bytes, which the L2 cache holds in part.
__global__ void __launch_bounds__(256)
add_partials(float* out, const float* partials, size_t size, size_t stride, int slices) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= size) return;
    Pack<float> sum = {};
#pragma unroll 4
    for (int s = 0; s < slices; s++) {
        const Pack<float> part = load_pack(partials + s * stride + i);
        for (int j = 0; j < 4; j++) sum[j] += part[j];
    }
    Pack<float> total = load_pack(out + i);
    for (int j = 0; j < 4; j++) total[j] += sum[j];
    store_pack(out + i, total);
}

// The bias gradient, version 1: dbias (N,) += the column sums of dout (rows, N), a thread for each column.
template <typename T>
__global__ void column_sums_naive(float* dbias, const T* dout, int rows, int N) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    float sum = 0.0f;
    for (int row = 0; row < rows; row++) sum += to_float(dout[(size_t)row * N + n]);
    dbias[n] += sum;
}

// Version 2: partials (S, N), the column sums of each slice of the rows, for add_partials. A lane owns 16 bytes
// of columns, so a warp reads 512 contiguous bytes of a row; the 8 warps of a block take rows in turn and meet
// at the end. Bandwidth alone: dout is read once.
template <typename T>
__global__ void __launch_bounds__(256)
column_partials(float* partials, const T* dout, int rows, int N, int rows_per_slice) {
    constexpr int SIZE = Pack<T>::size, COLS = WARP * SIZE, WARPS = 8;
    __shared__ float sums[WARPS][COLS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int col = blockIdx.x * COLS + lane * SIZE;
    const int begin = blockIdx.y * rows_per_slice, end = min(rows, begin + rows_per_slice);
    float sum[SIZE] = {};
    if (col < N) {
#pragma unroll 4
        for (int row = begin + warp; row < end; row += WARPS) {
            const Pack<T> pack = load_pack(dout + (size_t)row * N + col);
            for (int i = 0; i < SIZE; i++) sum[i] += to_float(pack[i]);
        }
    }
    for (int i = 0; i < SIZE; i++) sums[warp][lane * SIZE + i] = sum[i];
    __syncthreads();
    const int mine = blockIdx.x * COLS + threadIdx.x;
    if (threadIdx.x < COLS && mine < N) {
        float total = 0.0f;
        for (int w = 0; w < WARPS; w++) total += sums[w][threadIdx.x];
        partials[(size_t)blockIdx.y * N + mine] = total;
    }
}
