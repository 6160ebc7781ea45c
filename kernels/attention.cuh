// The tiles that attention.cu and attention_backward.cu are made of: two products, each written twice, once
// for float arithmetic and once for tensor cores. Read common.cuh and tile.cuh before, attention.cu after.
//
// Attention is seven products of tiles, two forward and five backward, and they come in two forms only:
//
//     multiply_transposed     acc += X @ Yᵀ      two tiles of rows of a head give scores
//     multiply                acc += P @ Y       weights just computed and a tile of rows give sums of rows
//
// T is the length of the sequence here, so the storage type, float or bf16, is called Storage. A head's rows
// lie in qkv (B, T, 3C) with a stride of 3C and are read and written in place; rows from T on are zeros.

#pragma once
#include "tile.cuh"

// 1 / sqrt(HS), for powers of two: exp2(softmax_scale(HS) * q·k - lse * LOG2E) is a probability.
__device__ inline float softmax_scale(int HS) { return LOG2E / sqrtf(static_cast<float>(HS)); }

// Which head of which sequence a block works on, blockIdx.x of blockIdx.z, and where it begins.
struct Head {
    size_t qkv, out, number;                                // in qkv and dqkv; in out and dout; of all B NH
};
__device__ inline Head head_of_block(int T, int NH, int HS) {
    const size_t b = blockIdx.z, h = blockIdx.x, C = NH * HS;
    return {b * T * 3 * C + h * HS, b * T * C + h * HS, b * NH + h};
}

// ---- Float arithmetic: 256 threads, 16 x 16, TILE x TILE scores ------------------------------------------

// HP is the head size rounded up to 64 or 128, and decides the tile: what fits into 99 KB of shared memory,
// the least that a block may have from sm_80 on (sm_86 and sm_89); on sm_75, with 64 KB, half as many rows.
// Rows in shared memory have four floats of padding, which puts eight neighbouring rows on different banks.
template <int HP> struct FloatTile {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    static constexpr int ROWS = HP == 64 ? 32 : 16;         // queries or keys of a tile
#else
    static constexpr int ROWS = HP == 64 ? 64 : 32;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1000
    static constexpr int UNROLL = 8;                        // with 4, backward spills 12 bytes there
#else
    static constexpr int UNROLL = 4;                        // accesses of 4 channels in multiply_transposed
#endif
    static constexpr int EACH = ROWS / 16;                  // rows that one thread computes
    static constexpr int PITCH = HP + 4;                    // floats from one row of channels to the next
    static constexpr int SIZE = ROWS * PITCH;               // floats
    static constexpr int SCORES_PITCH = ROWS + 4;
    static constexpr int SCORES_SIZE = ROWS * SCORES_PITCH;
};

// Rows first .. first + ROWS of a head as float32, with zeros from T and from HS on.
template <int HP, typename Storage>
__device__ void load_floats(float* tile, const Storage* inp, int stride, int first, int T, int HS) {
    for (int i = threadIdx.x; i < FloatTile<HP>::ROWS * HP; i += blockDim.x) {
        const int row = i / HP, d = i % HP, t = first + row;
        tile[row * FloatTile<HP>::PITCH + d] =
            t < T && d < HS ? to_float(inp[static_cast<size_t>(t) * stride + d]) : 0.0f;
    }
}

// acc[i][j] += x[EACH * ty + i] · y[tx + 16 j]: rows of x are broadcast, those of y lie on different banks.
template <int HP, int E>
__device__ inline void multiply_transposed(float (&acc)[E][E], const float* x, const float* y) {
    constexpr int PITCH = FloatTile<HP>::PITCH;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll FloatTile<HP>::UNROLL
    for (int d = 0; d < HP; d += 4) {
        Pack<float> a[E], b[E];
#pragma unroll
        for (int i = 0; i < E; i++) a[i] = load_pack(x + (E * ty + i) * PITCH + d);
#pragma unroll
        for (int j = 0; j < E; j++) b[j] = load_pack(y + (tx + 16 * j) * PITCH + d);
#pragma unroll
        for (int i = 0; i < E; i++)
#pragma unroll
            for (int j = 0; j < E; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) acc[i][j] += a[i][c] * b[j][c];
    }
}

// acc[i][4 jj + c] += p[EACH * ty + i] · (column 4 tx + 64 jj + c of y). p is written by the 16 threads of
// one ty and read by the same, so a barrier of the warp is enough; it comes before and after.
template <int HP, int E>
__device__ inline void multiply(float (&acc)[E][HP / 16], float* scores, const float (&p)[E][E],
                                const float* y) {
    constexpr int PITCH = FloatTile<HP>::PITCH, SCORES_PITCH = FloatTile<HP>::SCORES_PITCH;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < E; i++)
#pragma unroll
        for (int j = 0; j < E; j++) scores[(E * ty + i) * SCORES_PITCH + tx + 16 * j] = p[i][j];
    __syncwarp();
#pragma unroll 2
    for (int k = 0; k < FloatTile<HP>::ROWS; k += 4) {
        Pack<float> a[E];
#pragma unroll
        for (int i = 0; i < E; i++) a[i] = load_pack(scores + (E * ty + i) * SCORES_PITCH + k);
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
#pragma unroll
            for (int jj = 0; jj < HP / 64; jj++) {
                const Pack<float> b = load_pack(y + (k + kk) * PITCH + 4 * tx + 64 * jj);
#pragma unroll
                for (int i = 0; i < E; i++)
#pragma unroll
                    for (int c = 0; c < 4; c++) acc[i][4 * jj + c] += a[i][kk] * b[c];
            }
    }
}

template <int HP, typename Storage, int E>
__device__ inline void store_floats(Storage* out, int stride, int first, int T, int HS,
                                  const float (&acc)[E][HP / 16]) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int i = 0; i < E; i++)
        for (int j = 0; j < HP / 16; j++) {
            const int t = first + E * ty + i, d = 4 * tx + 64 * (j / 4) + j % 4;
            if (t < T && d < HS) out[static_cast<size_t>(t) * stride + d] = from_float<Storage>(acc[i][j]);
        }
}

// ---- Tensor cores: 128 threads; every warp owns 16 M rows of the result ----------------------------------

inline constexpr int TENSOR_THREADS = 128;

// Starts the copy of rows first .. first + ROWS of a head into shared memory; the caller commits.
template <int ROWS, int HS>
__device__ inline void load_rows(bf16* tile, const bf16* inp, int stride, int first, int T) {
    load_tile<ROWS, HS, TENSOR_THREADS>(tile, inp, first, 0, T, HS, stride);
}

// A 16 x 16 block is one ldmatrix of four 8 x 8 matrices. For the left operand, and for Y in P @ Y, which is
// transposed on the way, they are taken down first, then right; for Y in X @ Yᵀ right first, then down.
template <int HS> __device__ inline bf16* down_then_right(bf16* tile, int row, int chunk) {
    const int lane = threadIdx.x % WARP;
    return tile + swizzle<HS>(row + lane % 16, chunk + lane / 16);
}
template <int HS> __device__ inline bf16* right_then_down(bf16* tile, int row, int chunk) {
    const int lane = threadIdx.x % WARP;
    return tile + swizzle<HS>(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2);
}

// Rows 0 .. 16 M of x (.., HS) as the left operand of a product, in registers.
template <int HS, int M> __device__ inline void load_left(uint32_t (&a)[M][HS / 16][4], bf16* x) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < HS / 16; k++) ldmatrix_x4(a[m][k], down_then_right<HS>(x, 16 * m, 2 * k));
}

// acc (16 M, 8 N) += a (16 M, HS) @ yᵀ, with y (8 N, HS) in shared memory.
template <int HS, int M, int N>
__device__ inline void multiply_transposed(float (&acc)[M][N][4], const uint32_t (&a)[M][HS / 16][4],
                                           bf16* y) {
#pragma unroll
    for (int k = 0; k < HS / 16; k++)
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, right_then_down<HS>(y, 8 * n, 2 * k));
            const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(acc[m][n], a[m][k], b0);
                mma_m16n8k16(acc[m][n + 1], a[m][k], b1);
            }
        }
}

// acc (16 M, HS) += p (16 M, 8 N) @ y (8 N, HS). What a lane holds of two neighbouring 16 x 8 results is what
// it must hold of a 16 x 16 left operand: p goes from one product into the next in registers.
template <int HS, int M, int N>
__device__ inline void multiply(float (&acc)[M][HS / 8][4], const float (&p)[M][N][4], bf16* y) {
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = pack_bf16(p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < HS / 8; n += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, down_then_right<HS>(y, 16 * k, n));
            const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(acc[m][n], a[m], b0);
                mma_m16n8k16(acc[m][n + 1], a[m], b1);
            }
        }
    }
}

// Writes a warp's 16 M rows, from `first` on, by way of 16 M rows of shared memory that only this warp reads:
// so 16 bytes at a time go to global memory, where the accumulators' layout would write 4.
template <int HS, int M>
__device__ inline void store_rows(bf16* out, int stride, int first, int T, const float (&acc)[M][HS / 8][4],
                                  bf16* tile) {
    constexpr int CHUNKS = HS / 8;
    const int lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < CHUNKS; n++)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                bf16* pair = tile + swizzle<HS>(16 * m + lane / 4 + 4 * i, n) + lane % 4 * 2;
                *reinterpret_cast<uint32_t*>(pair) = pack_bf16(acc[m][n][i], acc[m][n][i + 1]);
            }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < M * 16 * CHUNKS / WARP; i++) {
        const int row = (i * WARP + lane) / CHUNKS, chunk = (i * WARP + lane) % CHUNKS, t = first + row;
        if (t < T)
            store_pack(out + static_cast<size_t>(t) * stride + chunk * 8,
                       load_pack(tile + swizzle<HS>(row, chunk)));
    }
}
