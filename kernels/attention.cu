// Causal self-attention, forward: out = softmax(mask(Q Kᵀ / sqrt(HS))) V for every head of every sequence.
// Read attention.cuh before, attention_backward.cu and decode.cu after.
//
//     qkv (B, T, 3C)   row t of head h: Q at h HS, K at C + h HS, V at 2C + h HS; C = NH HS; read in place
//     out (B, T, C)    row t of head h at h HS
//     lse (B, NH, T)   float32, log-sum-exp of a query's scaled scores: from it backward recomputes P
//
// Versions: three passes over a (T, T) array; one pass without it, in float arithmetic; that on tensor cores.
//
// kernel                                  grid                      block  dynamic shared bytes
// attention_scores<Storage>               (ceil(T/256), T, B NH)    256    0
// attention_softmax                       (ceil(T/8), B NH)         256    0
// attention_values<Storage>               (ceil(C/256), T, B)       256    0
// attention_forward_flash<Storage, 64>    (NH, ceil(T/64), B)       256    69,632
// attention_forward_flash<Storage, 128>   (NH, ceil(T/32), B)       256    55,296
// attention_forward_tensor<64>            (NH, ceil(T/128), B)      128    49,152
// attention_forward_tensor<128>           (NH, ceil(T/64), B)       128    81,920
//
// Storage: float or bf16. flash<.., 64> for HS <= 64, 128 for HS <= 128; on sm_75 with half the rows, 30,720
// and 26,624 bytes. Tensor: bf16, head size 64 or 128, qkv and out aligned to 16 bytes. Workspace: scores
// (B, NH, T, T) float32, for the three of the naive version.
//
// The floor: two products of 2 B T² C FLOP, of which causality leaves half, for 8 B T C bytes of bf16: T / 4
// FLOP a byte, so it is the tensor cores'. Above it, on an H100 at HS 64, because mma.sync reaches 62-65% of
// their rate; because each 256 FLOP need an exponential, at 16 a clock and multiprocessor 60% of the time of
// the mma themselves, which other warps must hide; and because tiles on the diagonal are computed whole: 32 x
// 64 scores, 9% at T = 1024. Occupancy: 253 registers, so two blocks, 8 warps, on a multiprocessor.

#include "attention.cuh"

// ---- Version 1: the definition. Three kernels, and B NH T² floats of memory between them. ----------------

// A thread per (query, key).
template <typename Storage>
__global__ void attention_scores(float* scores, const Storage* qkv, int T, int NH, int HS) {
    const int key = blockIdx.x * blockDim.x + threadIdx.x, query = blockIdx.y;
    const int b = blockIdx.z / NH, h = blockIdx.z % NH, C = NH * HS;
    if (key >= T) return;
    const Storage* q = qkv + (static_cast<size_t>(b) * T + query) * 3 * C + h * HS;  // (HS,)
    const Storage* k = qkv + (static_cast<size_t>(b) * T + key) * 3 * C + C + h * HS;  // (HS,)
    float score = 0.0f;
    for (int d = 0; d < HS; d++) score += to_float(q[d]) * to_float(k[d]);
    scores[(static_cast<size_t>(blockIdx.z) * T + query) * T + key] =
        key <= query ? score / sqrtf(static_cast<float>(HS)) : MINUS_INFINITY;
}

// A warp per query: maximum, sum of exponentials, division.
__global__ void attention_softmax(float* scores, float* lse, int T) {
    const int query = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (query >= T) return;
    float* row = scores + (static_cast<size_t>(blockIdx.y) * T + query) * T;  // (T,)
    float maximum = MINUS_INFINITY, sum = 0.0f;
    for (int key = lane; key <= query; key += WARP) maximum = fmaxf(maximum, row[key]);
    maximum = warp_max(maximum);
    for (int key = lane; key <= query; key += WARP) sum += expf(row[key] - maximum);
    sum = warp_sum(sum);
    for (int key = lane; key < T; key += WARP)
        row[key] = key <= query ? expf(row[key] - maximum) / sum : 0.0f;
    if (lane == 0) lse[static_cast<size_t>(blockIdx.y) * T + query] = maximum + logf(sum);
}

// A thread per channel of the output.
template <typename Storage>
__global__ void attention_values(Storage* out, const float* scores, const Storage* qkv, int T, int NH,
                                 int HS) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, query = blockIdx.y, b = blockIdx.z, C = NH * HS;
    if (c >= C) return;
    const float* p = scores + ((static_cast<size_t>(b) * NH + c / HS) * T + query) * T; // (T,)
    const Storage* v = qkv + static_cast<size_t>(b) * T * 3 * C + 2 * C + c;  // one column of V
    float sum = 0.0f;
    for (int key = 0; key <= query; key++) sum += p[key] * to_float(v[static_cast<size_t>(key) * 3 * C]);
    out[(static_cast<size_t>(b) * T + query) * C + c] = from_float<Storage>(sum);
}

// ---- Version 2: flash attention on float arithmetic ------------------------------------------------------

// 55.4 -> 1.57 ms on an H200 (B 16, T 1024, 12 heads of 64, bf16).
//
// The (T, T) array never exists. A block keeps ROWS queries and walks the keys up to the diagonal, tile by
// tile. For each query it carries the maximum score so far, the sum of exp(score - maximum), and the sum of
// the values weighted by it; when a tile brings a larger maximum, both sums are rescaled. Dividing comes
// last. Blocks start in the order x, y, z: all heads of a sequence, their longest rows first.
template <typename Storage, int HP>
__global__ void __launch_bounds__(256)
attention_forward_flash(Storage* out, float* lse, const Storage* qkv, int T, int NH, int HS) {
    using Tile = FloatTile<HP>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* q_tile = reinterpret_cast<float*>(shared_memory);                // (ROWS, PITCH)
    float* k_tile = q_tile + Tile::SIZE;                                    // (ROWS, PITCH)
    float* v_tile = k_tile + Tile::SIZE;                                    // (ROWS, PITCH)
    float* scores = v_tile + Tile::SIZE;                                    // (ROWS, SCORES_PITCH)
    const int C = NH * HS, stride = 3 * C;
    const Head head = head_of_block(T, NH, HS);
    const int first_query = (gridDim.y - 1 - blockIdx.y) * Tile::ROWS;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const Storage* q = qkv + head.qkv;                                      // (T, HS), rows stride apart
    const float scale = softmax_scale(HS);

    constexpr int E = Tile::EACH;
    float acc[E][HP / 16] = {}, maximum[E], sum[E] = {};                    // E queries of this thread
    for (int i = 0; i < E; i++) maximum[i] = MINUS_INFINITY;
    load_floats<HP>(q_tile, q, stride, first_query, T, HS);
    for (int first_key = 0; first_key <= first_query; first_key += Tile::ROWS) {
        __syncthreads();                                    // nobody reads the previous tile any more
        load_floats<HP>(k_tile, q + C, stride, first_key, T, HS);
        load_floats<HP>(v_tile, q + 2 * C, stride, first_key, T, HS);
        __syncthreads();
        float s[E][E] = {};                                 // queries E ty + i, keys tx + 16 j
        multiply_transposed<HP>(s, q_tile, k_tile);
#pragma unroll
        for (int i = 0; i < E; i++) {
            const int query = first_query + E * ty + i;
            float new_maximum = maximum[i];
#pragma unroll
            for (int j = 0; j < E; j++) {
                s[i][j] = first_key + tx + 16 * j <= query ? s[i][j] * scale : MINUS_INFINITY;
                new_maximum = fmaxf(new_maximum, s[i][j]);
            }
            for (int offset = 8; offset > 0; offset /= 2)   // the 16 threads of one ty are half a warp
                new_maximum = fmaxf(new_maximum, __shfl_xor_sync(ALL_LANES, new_maximum, offset));
            const float rescale = exp2f(maximum[i] - new_maximum);  // 0 for the first tile, which holds key 0
            maximum[i] = new_maximum;
            sum[i] *= rescale;
#pragma unroll
            for (int j = 0; j < E; j++) sum[i] += s[i][j] = exp2f(s[i][j] - new_maximum);
#pragma unroll
            for (int j = 0; j < HP / 16; j++) acc[i][j] *= rescale;
        }
        multiply<HP>(acc, scores, s, v_tile);
    }
#pragma unroll
    for (int i = 0; i < E; i++) {
        for (int offset = 8; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], offset);
        for (int j = 0; j < HP / 16; j++) acc[i][j] /= sum[i];
        const int query = first_query + E * ty + i;
        if (tx == 0 && query < T)
            lse[head.number * T + query] = maximum[i] * LN2 + logf(sum[i]);
    }
    store_floats<HP>(out + head.out, C, first_query, T, HS, acc);
}

// ---- Version 3: flash attention on tensor cores, bf16 ----------------------------------------------------

// 1569 -> 119 us on an H200, 216 TFLOP/s (B 16, T 1024, 12 heads of 64). Version 4 is attention_hopper.cu.
//
// The same walk with mma.sync. A warp owns 32 queries, so that each 16 x 16 block of K or V that it reads
// from shared memory feeds four mma (16 queries for HS 128, where registers run out); Q, scores and weights
// stay in its registers throughout. The next tile of K and V arrives by cp.async while this one is computed.
// Only tiles that cross the diagonal are masked. Keys from T on lie beyond it for every query that is stored.
template <int HS>
__global__ void __launch_bounds__(TENSOR_THREADS, 2)
attention_forward_tensor(bf16* out, float* lse, const bf16* qkv, int T, int NH) {
    constexpr int M = HS == 64 ? 2 : 1, N = 8;              // a warp's scores: (16 M, 8 N)
    constexpr int QUERIES = 4 * 16 * M, KEYS = 8 * N;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    bf16* q_tile = reinterpret_cast<bf16*>(shared_memory);                  // (QUERIES, HS)
    bf16* k_tiles = q_tile + QUERIES * HS;                                  // 2 x (KEYS, HS)
    bf16* v_tiles = k_tiles + 2 * KEYS * HS;                                // 2 x (KEYS, HS)
    const int C = NH * HS, stride = 3 * C;
    const Head head = head_of_block(T, NH, HS);
    const int first_query = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int warp_query = first_query + 16 * M * warp;     // this warp's first query
    const bf16* q = qkv + head.qkv;                                         // (T, HS), rows stride apart
    const float scale = softmax_scale(HS);

    float acc[M][HS / 8][4] = {}, maximum[M][2], sum[M][2] = {};  // rows lane / 4 and lane / 4 + 8 of each 16
#pragma unroll
    for (int m = 0; m < M; m++) maximum[m][0] = maximum[m][1] = MINUS_INFINITY;
    uint32_t left[M][HS / 16][4];                           // the queries as left operand, kept in registers
    auto load_keys = [&](int first_key, int buffer) {
        load_rows<KEYS, HS>(k_tiles + buffer * KEYS * HS, q + C, stride, first_key, T);
        load_rows<KEYS, HS>(v_tiles + buffer * KEYS * HS, q + 2 * C, stride, first_key, T);
        cp_async_commit();
    };
    load_rows<QUERIES, HS>(q_tile, q, stride, first_query, T);
    load_keys(0, 0);
    const int end = min(first_query + QUERIES, T);
    int buffer = 0;
    for (int first_key = 0; first_key < end; first_key += KEYS, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();                                    // this tile is here, nobody reads the previous
        if (first_key + KEYS < end) load_keys(first_key + KEYS, buffer ^ 1);
        if (first_key > warp_query + 16 * M - 1) continue;  // all of it beyond this warp's queries
        if (first_key == 0) load_left<HS>(left, q_tile + 16 * M * warp * HS);
        float s[M][N][4] = {};
        multiply_transposed<HS>(s, left, k_tiles + buffer * KEYS * HS);
        if (first_key + KEYS - 1 > warp_query) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int query = warp_query + 16 * m + lane / 4 + i / 2 * 8;
                        const int key = first_key + 8 * n + lane % 4 * 2 + i % 2;
                        if (key > query) s[m][n][i] = MINUS_INFINITY;
                    }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {                   // row r of the two holds results 2 r and 2 r + 1
                float new_maximum = maximum[m][r];
#pragma unroll
                for (int n = 0; n < N; n++)
                    new_maximum = fmaxf(new_maximum, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                new_maximum = fmaxf(new_maximum, __shfl_xor_sync(ALL_LANES, new_maximum, 1));
                new_maximum = fmaxf(new_maximum, __shfl_xor_sync(ALL_LANES, new_maximum, 2));
                const float rescale = exp2f((maximum[m][r] - new_maximum) * scale);
                maximum[m][r] = new_maximum;
                sum[m][r] *= rescale;                       // of this lane's keys; the lanes meet at the end
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 2 * r; i < 2 * r + 2; i++)
                        sum[m][r] += s[m][n][i] = exp2f(s[m][n][i] * scale - new_maximum * scale);
#pragma unroll
                for (int n = 0; n < HS / 8; n++) {
                    acc[m][n][2 * r] *= rescale;
                    acc[m][n][2 * r + 1] *= rescale;
                }
            }
        multiply<HS>(acc, s, v_tiles + buffer * KEYS * HS);
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[m][r] += __shfl_xor_sync(ALL_LANES, sum[m][r], 1);
            sum[m][r] += __shfl_xor_sync(ALL_LANES, sum[m][r], 2);
#pragma unroll
            for (int n = 0; n < HS / 8; n++) {
                acc[m][n][2 * r] *= 1.0f / sum[m][r];
                acc[m][n][2 * r + 1] *= 1.0f / sum[m][r];
            }
            const int query = warp_query + 16 * m + lane / 4 + r * 8;
            if (lane % 4 == 0 && query < T)
                lse[head.number * T + query] = maximum[m][r] * scale * LN2 + logf(sum[m][r]);
        }
    // Each warp leaves through the rows of q_tile that were its own.
    store_rows<HS>(out + head.out, C, warp_query, T, acc, q_tile + 16 * M * warp * HS);
}
