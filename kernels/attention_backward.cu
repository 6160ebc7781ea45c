// Causal self-attention, backward, and from version 2 on without a (T, T) array. Read attention.cu before.
//
// Forward, for one head:  S = Q Kᵀ / sqrt(HS),  P = exp(S - lse) below the diagonal, else 0,  out = P V.  So
//
//     dV = Pᵀ dOut     dP = dOut Vᵀ     dS = P ∘ (dP - D)     dQ = dS K / sqrt(HS)     dK = dSᵀ Q / sqrt(HS)
//
// with D = rowsum(P ∘ dP) = rowsum(out ∘ dOut), one number for each query. dK and dV are sums over queries,
// dQ is a sum over keys. Whoever owns a tile of keys can add up dK and dV in registers but would have to
// share dQ with the others; that needs atomics, whose order nobody fixes. So there are two passes, one that
// owns keys and one that owns queries. Both compute S and dP: seven products instead of five, and the same
// bits every time.
//
// Versions: the formulas, over two (T, T) arrays; two passes without them, in float arithmetic; those on tensor
// cores.
//
// kernel                                          grid                     block  dynamic shared bytes
// attention_backward_scores<Storage>              (ceil(T/256), T, B NH)   256    0
// attention_backward_sums<Storage>                (ceil(C/256), T, B)      256    0
// attention_backward_prepare<Storage>             (ceil(B Tp NH / 32))     256    0
// attention_backward_keys_flash<Storage, HP>      (NH, ceil(T/ROWS), B)    256    HP 64: 87,040; 128: 72,192
// attention_backward_queries_flash<Storage, HP>   (NH, ceil(T/ROWS), B)    256    HP 64: 87,040; 128: 72,192
// attention_backward_keys_tensor<HS>              (NH, ceil(T/64), B)      128    HS 64: 50,176; 128: 49,408
// attention_backward_queries_tensor<HS>           (NH, ceil(T/64), B)      128    HS 64: 49,152; 128: 65,536
//
// The naive version is scores and sums; the others are always all three: prepare, then keys and queries in any
// order. Storage, HP, HS and alignment as in attention.cu; ROWS is 64 for HP 64 and 32 for HP 128; on sm_75
// it is half of that, and 39,424 and 35,072 bytes. All of dqkv is overwritten.
//
// The floor: five products, 5 B T² C FLOP with causality, for 16 B T C bytes of bf16. Above it by 7/5, the
// price of no atomics, and by what attention.cu says.
//
// Workspace: rows (B, NH, Tp) float2, aligned to 16 bytes, with Tp = T rounded up to a multiple of 64 (of 128
// for attention_hopper.cu). Of the naive version: p and ds (B, NH, T, T) float32.

#include "attention.cuh"

// ---- Version 1: the formulas. Two kernels, and 2 B NH T² floats of memory between them. ------------------

// A thread per (query, key): one element of P and one of dS, for three products of rows. D is a number of the
// query, but every thread computes it again.
template <typename Storage>
__global__ void attention_backward_scores(float* p, float* ds, const Storage* dout, const Storage* out,
                                          const float* lse, const Storage* qkv, int T, int NH, int HS) {
    const int key = blockIdx.x * blockDim.x + threadIdx.x, query = blockIdx.y;
    const int b = blockIdx.z / NH, h = blockIdx.z % NH, C = NH * HS;
    if (key >= T) return;
    const size_t first = static_cast<size_t>(b) * T, row = static_cast<size_t>(blockIdx.z) * T + query;
    const Storage* q = qkv + (first + query) * 3 * C + h * HS;              // (HS,)
    const Storage* k = qkv + (first + key) * 3 * C + C + h * HS;            // (HS,)
    const Storage* v = k + C;                                               // (HS,)
    const Storage* o = out + (first + query) * C + h * HS;                  // (HS,)
    const Storage* dy = dout + (first + query) * C + h * HS;                // (HS,)
    float score = 0.0f, dp = 0.0f, D = 0.0f;
    for (int d = 0; d < HS; d++) {
        score += to_float(q[d]) * to_float(k[d]);
        dp += to_float(dy[d]) * to_float(v[d]);
        D += to_float(dy[d]) * to_float(o[d]);
    }
    const float weight = key <= query ? expf(score / sqrtf(static_cast<float>(HS)) - lse[row]) : 0.0f;
    p[row * T + key] = weight;
    ds[row * T + key] = weight * (dp - D);
}

// A thread per channel of a token: dQ is a sum over the keys up to it, dK and dV over the queries from it on.
template <typename Storage>
__global__ void attention_backward_sums(Storage* dqkv, const float* p, const float* ds, const Storage* dout,
                                        const Storage* qkv, int T, int NH, int HS) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y, b = blockIdx.z, C = NH * HS;
    if (c >= C) return;
    const size_t first = static_cast<size_t>(b) * T;                        // the sequence's first token
    const size_t scores = (static_cast<size_t>(b) * NH + c / HS) * T * T;   // the head's (T, T)
    float dq = 0.0f, dk = 0.0f, dv = 0.0f;
    for (int key = 0; key <= t; key++)
        dq += ds[scores + static_cast<size_t>(t) * T + key] * to_float(qkv[(first + key) * 3 * C + C + c]);
    for (int query = t; query < T; query++) {
        const size_t i = scores + static_cast<size_t>(query) * T + t;       // column t of P and dS
        dk += ds[i] * to_float(qkv[(first + query) * 3 * C + c]);
        dv += p[i] * to_float(dout[(first + query) * C + c]);
    }
    const float scale = 1.0f / sqrtf(static_cast<float>(HS));
    Storage* row = dqkv + (first + t) * 3 * C + c;
    row[0] = from_float<Storage>(dq * scale);
    row[C] = from_float<Storage>(dk * scale);
    row[2 * C] = from_float<Storage>(dv);
}

// ---- What versions 2 and 3 need to know of a query: lse and D --------------------------------------------

// rows[b, h, t] = {lse * LOG2E, D}; from T on {inf, 0}, for which P = exp2(S - inf) = 0: tails need no mask.
// Eight lanes share a row: 8 lanes x 16 bytes are a head of 64 bf16. (A head of any other size is read element
// by element, because the version in float arithmetic, which needs these rows too, takes every size.)
template <typename Storage>
__global__ void attention_backward_prepare(float2* rows, const Storage* dout, const Storage* out,
                                           const float* lse, int B, int T, int Tp, int NH, int HS) {
    const int lane = threadIdx.x % 8;
    const int index = blockIdx.x * (blockDim.x / 8) + threadIdx.x / 8;      // over (B, Tp, NH)
    const int h = index % NH, t = index / NH % Tp, b = index / NH / Tp;
    const bool real = b < B && t < T;
    float D = 0.0f;
    if (real) {
        const size_t offset = (static_cast<size_t>(b) * T + t) * NH * HS + h * HS;
        if (HS % Pack<Storage>::size == 0) {
            for (int d = lane * Pack<Storage>::size; d < HS; d += 8 * Pack<Storage>::size) {
                const Pack<Storage> x = load_pack(out + offset + d), dx = load_pack(dout + offset + d);
                for (int i = 0; i < Pack<Storage>::size; i++) D += to_float(x[i]) * to_float(dx[i]);
            }
        } else {
            for (int d = lane; d < HS; d += 8) D += to_float(out[offset + d]) * to_float(dout[offset + d]);
        }
    }
    for (int offset = 4; offset > 0; offset /= 2) D += __shfl_xor_sync(ALL_LANES, D, offset);
    if (lane == 0 && b < B) {
        const size_t row = static_cast<size_t>(b) * NH + h;
        rows[row * Tp + t] = make_float2(real ? lse[row * T + t] * LOG2E : -MINUS_INFINITY, D);
    }
}

// ---- Version 2: two passes, float arithmetic -------------------------------------------------------------

// 116 -> 4.60 ms on an H200 (B 16, T 1024, 12 heads of 64, bf16).
//
// P and dS live for one tile, in registers and shared memory: nothing is written but the result.
//
// A block owns ROWS keys and walks the queries from the diagonal on. Scores lie transposed, a row for each
// key, ready to be multiplied by dOut and Q. The first blocks to start have most to do.
template <typename Storage, int HP>
__global__ void __launch_bounds__(256)
attention_backward_keys_flash(Storage* dqkv, const Storage* dout, const Storage* qkv, const float2* rows,
                              int T, int NH, int HS) {
    using Tile = FloatTile<HP>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* k_tile = reinterpret_cast<float*>(shared_memory);                // (ROWS, PITCH)
    float* v_tile = k_tile + Tile::SIZE;                                    // (ROWS, PITCH)
    float* q_tile = v_tile + Tile::SIZE;                                    // (ROWS, PITCH)
    float* dout_tile = q_tile + Tile::SIZE;                                 // (ROWS, PITCH)
    float* scores = dout_tile + Tile::SIZE;                                 // (ROWS, SCORES_PITCH)
    const int C = NH * HS, stride = 3 * C;
    const Head head = head_of_block(T, NH, HS);
    const int first_key = blockIdx.y * Tile::ROWS;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const Storage* q = qkv + head.qkv;                                      // (T, HS), rows stride apart
    const Storage* head_dout = dout + head.out;                             // (T, HS), rows C apart
    const float2* head_rows = rows + head.number * (ceil_div(T, 64) * 64);  // (Tp,)
    const float scale = softmax_scale(HS);

    constexpr int E = Tile::EACH;
    float dk[E][HP / 16] = {}, dv[E][HP / 16] = {};                         // E keys of this thread
    load_floats<HP>(k_tile, q + C, stride, first_key, T, HS);
    load_floats<HP>(v_tile, q + 2 * C, stride, first_key, T, HS);
    for (int first_query = first_key; first_query < T; first_query += Tile::ROWS) {
        __syncthreads();                                    // nobody reads the previous tile any more
        load_floats<HP>(q_tile, q, stride, first_query, T, HS);
        load_floats<HP>(dout_tile, head_dout, C, first_query, T, HS);
        __syncthreads();
        float p[E][E] = {}, ds[E][E] = {};                  // keys E ty + i, queries tx + 16 j
        multiply_transposed<HP>(p, k_tile, q_tile);
        multiply_transposed<HP>(ds, v_tile, dout_tile);
#pragma unroll
        for (int j = 0; j < E; j++) {
            const int query = first_query + tx + 16 * j;
            const float2 row = head_rows[query];
#pragma unroll
            for (int i = 0; i < E; i++) {
                p[i][j] = first_key + E * ty + i <= query ? exp2f(p[i][j] * scale - row.x) : 0.0f;
                ds[i][j] = p[i][j] * (ds[i][j] - row.y);
            }
        }
        multiply<HP>(dv, scores, p, dout_tile);
        multiply<HP>(dk, scores, ds, q_tile);
    }
    for (int i = 0; i < E; i++)
        for (int j = 0; j < HP / 16; j++) dk[i][j] *= scale * LN2;
    store_floats<HP>(dqkv + head.qkv + C, stride, first_key, T, HS, dk);
    store_floats<HP>(dqkv + head.qkv + 2 * C, stride, first_key, T, HS, dv);
}

// A block owns ROWS queries and walks the keys up to the diagonal, longest rows first, as in forward.
template <typename Storage, int HP>
__global__ void __launch_bounds__(256)
attention_backward_queries_flash(Storage* dqkv, const Storage* dout, const Storage* qkv, const float2* rows,
                                 int T, int NH, int HS) {
    using Tile = FloatTile<HP>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* q_tile = reinterpret_cast<float*>(shared_memory);                // (ROWS, PITCH)
    float* dout_tile = q_tile + Tile::SIZE;                                 // (ROWS, PITCH)
    float* k_tile = dout_tile + Tile::SIZE;                                 // (ROWS, PITCH)
    float* v_tile = k_tile + Tile::SIZE;                                    // (ROWS, PITCH)
    float* scores = v_tile + Tile::SIZE;                                    // (ROWS, SCORES_PITCH)
    const int C = NH * HS, stride = 3 * C;
    const Head head = head_of_block(T, NH, HS);
    const int first_query = (gridDim.y - 1 - blockIdx.y) * Tile::ROWS;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const Storage* q = qkv + head.qkv;                                      // (T, HS), rows stride apart
    const Storage* head_dout = dout + head.out;                             // (T, HS), rows C apart
    const float2* head_rows = rows + head.number * (ceil_div(T, 64) * 64);  // (Tp,)
    const float scale = softmax_scale(HS);

    constexpr int E = Tile::EACH;
    float dq[E][HP / 16] = {};                                              // E queries of this thread
    load_floats<HP>(q_tile, q, stride, first_query, T, HS);
    load_floats<HP>(dout_tile, head_dout, C, first_query, T, HS);
    for (int first_key = 0; first_key <= first_query; first_key += Tile::ROWS) {
        __syncthreads();                                    // nobody reads the previous tile any more
        load_floats<HP>(k_tile, q + C, stride, first_key, T, HS);
        load_floats<HP>(v_tile, q + 2 * C, stride, first_key, T, HS);
        __syncthreads();
        float p[E][E] = {}, ds[E][E] = {};                  // queries E ty + i, keys tx + 16 j
        multiply_transposed<HP>(p, q_tile, k_tile);
        multiply_transposed<HP>(ds, dout_tile, v_tile);
#pragma unroll
        for (int i = 0; i < E; i++) {
            const int query = first_query + E * ty + i;
            const float2 row = head_rows[query];
#pragma unroll
            for (int j = 0; j < E; j++) {
                p[i][j] = first_key + tx + 16 * j <= query ? exp2f(p[i][j] * scale - row.x) : 0.0f;
                ds[i][j] = p[i][j] * (ds[i][j] - row.y);
            }
        }
        multiply<HP>(dq, scores, ds, k_tile);
    }
    for (int i = 0; i < E; i++)
        for (int j = 0; j < HP / 16; j++) dq[i][j] *= scale * LN2;
    store_floats<HP>(dqkv + head.qkv, stride, first_query, T, HS, dq);
}

// ---- Version 3: tensor cores, bf16 -----------------------------------------------------------------------

// 4.60 ms -> 374 us on an H200, 172 TFLOP/s (the same). Version 4 is attention_hopper.cu.
//
// A block owns 64 keys, a warp 16 of them: dK and dV of these stay in its registers while the queries pass
// by, from the diagonal on, each tile of Q, dOut and rows arriving by cp.async while the one before is
// computed. The accumulators of dP start at -D instead of 0, which is the subtraction for nothing. (Tiles are
// smaller for HS 128, where the accumulators of dK and dV alone take 128 registers.)
template <int HS>
__global__ void __launch_bounds__(TENSOR_THREADS, 2)
attention_backward_keys_tensor(bf16* dqkv, const bf16* dout, const bf16* qkv, const float2* rows, int T,
                               int NH) {
    constexpr int KEYS = 64, QUERIES = HS == 64 ? 64 : 16, N = QUERIES / 8; // a warp's scores: (16, 8 N)
    extern __shared__ __align__(16) unsigned char shared_memory[];
    bf16* k_tile = reinterpret_cast<bf16*>(shared_memory);                  // (KEYS, HS)
    bf16* v_tile = k_tile + KEYS * HS;                                      // (KEYS, HS)
    bf16* q_tiles = v_tile + KEYS * HS;                                     // 2 x (QUERIES, HS)
    bf16* dout_tiles = q_tiles + 2 * QUERIES * HS;                          // 2 x (QUERIES, HS)
    float2* rows_tiles = reinterpret_cast<float2*>(dout_tiles + 2 * QUERIES * HS);  // 2 x (QUERIES,)
    const int C = NH * HS, stride = 3 * C;
    const Head head = head_of_block(T, NH, HS);
    const int first_key = blockIdx.y * KEYS;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int warp_key = first_key + 16 * warp;             // this warp's first key
    const bf16* q = qkv + head.qkv;                                         // (T, HS), rows stride apart
    const bf16* head_dout = dout + head.out;                                // (T, HS), rows C apart
    const float2* head_rows = rows + head.number * (ceil_div(T, 64) * 64);  // (Tp,)
    const float scale = softmax_scale(HS);

    auto load_queries = [&](int first_query, int buffer) {
        load_rows<QUERIES, HS>(q_tiles + buffer * QUERIES * HS, q, stride, first_query, T);
        load_rows<QUERIES, HS>(dout_tiles + buffer * QUERIES * HS, head_dout, C, first_query, T);
        const int pair = 2 * threadIdx.x;                   // two rows in 16 bytes
        if (pair < QUERIES)
            cp_async_16(rows_tiles + buffer * QUERIES + pair, head_rows + first_query + pair, 16);
        cp_async_commit();
    };
    float dk[1][HS / 8][4] = {}, dv[1][HS / 8][4] = {};     // keys lane / 4 and lane / 4 + 8 of 16
    load_rows<KEYS, HS>(k_tile, q + C, stride, first_key, T);
    load_rows<KEYS, HS>(v_tile, q + 2 * C, stride, first_key, T);
    load_queries(first_key, 0);
    uint32_t k_left[1][HS / 16][4], v_left[1][HS / 16][4];
    int buffer = 0;
    for (int first_query = first_key; first_query < T; first_query += QUERIES, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();                                    // this tile is here, nobody reads the previous
        if (first_query + QUERIES < T) load_queries(first_query + QUERIES, buffer ^ 1);
        if (first_query + QUERIES - 1 < warp_key) continue; // all of it before this warp's keys
        bf16* q_tile = q_tiles + buffer * QUERIES * HS;
        bf16* dout_tile = dout_tiles + buffer * QUERIES * HS;
        const float2* rows_tile = rows_tiles + buffer * QUERIES + lane % 4 * 2;  // queries 8 n + {0, 1}
        const bool load = HS > 64 || first_query == first_key;  // K and V of HS 64 stay in registers
        if (load) load_left<HS>(k_left, k_tile + 16 * warp * HS);
        float p[1][N][4] = {}, ds[1][N][4];                 // (16 keys, 8 N queries)
        multiply_transposed<HS>(p, k_left, q_tile);
        const bool diagonal = first_query < warp_key + 15;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = warp_key + lane / 4 + i / 2 * 8;
                const int query = first_query + 8 * n + lane % 4 * 2 + i % 2;
                const float lse = rows_tile[8 * n + i % 2].x;
                p[0][n][i] = diagonal && query < key ? 0.0f : exp2f(p[0][n][i] * scale - lse);
            }
        multiply<HS>(dv, p, dout_tile);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) ds[0][n][i] = -rows_tile[8 * n + i % 2].y;
        if (load) load_left<HS>(v_left, v_tile + 16 * warp * HS);
        multiply_transposed<HS>(ds, v_left, dout_tile);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) ds[0][n][i] *= p[0][n][i];
        multiply<HS>(dk, ds, q_tile);
    }
#pragma unroll
    for (int n = 0; n < HS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) dk[0][n][i] *= scale * LN2;
    // Each warp leaves through the rows of k_tile that were its own.
    store_rows<HS>(dqkv + head.qkv + C, stride, warp_key, T, dk, k_tile + 16 * warp * HS);
    store_rows<HS>(dqkv + head.qkv + 2 * C, stride, warp_key, T, dv, k_tile + 16 * warp * HS);
}

// A block owns 64 queries, a warp 16 of them, and the keys pass by up to the diagonal.
template <int HS>
__global__ void __launch_bounds__(TENSOR_THREADS, 2)
attention_backward_queries_tensor(bf16* dqkv, const bf16* dout, const bf16* qkv, const float2* rows, int T,
                                  int NH) {
    constexpr int QUERIES = 64, KEYS = HS == 64 ? 64 : 32, N = KEYS / 8;    // a warp's scores: (16, 8 N)
    extern __shared__ __align__(16) unsigned char shared_memory[];
    bf16* q_tile = reinterpret_cast<bf16*>(shared_memory);                  // (QUERIES, HS)
    bf16* dout_tile = q_tile + QUERIES * HS;                                // (QUERIES, HS)
    bf16* k_tiles = dout_tile + QUERIES * HS;                               // 2 x (KEYS, HS)
    bf16* v_tiles = k_tiles + 2 * KEYS * HS;                                // 2 x (KEYS, HS)
    const int C = NH * HS, stride = 3 * C;
    const Head head = head_of_block(T, NH, HS);
    const int first_query = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int warp_query = first_query + 16 * warp;         // this warp's first query
    const bf16* q = qkv + head.qkv;                                         // (T, HS), rows stride apart
    const bf16* head_dout = dout + head.out;                                // (T, HS), rows C apart
    const float2* head_rows = rows + head.number * (ceil_div(T, 64) * 64);  // (Tp,)
    const float scale = softmax_scale(HS);

    auto load_keys = [&](int first_key, int buffer) {
        load_rows<KEYS, HS>(k_tiles + buffer * KEYS * HS, q + C, stride, first_key, T);
        load_rows<KEYS, HS>(v_tiles + buffer * KEYS * HS, q + 2 * C, stride, first_key, T);
        cp_async_commit();
    };
    float dq[1][HS / 8][4] = {};                            // queries lane / 4 and lane / 4 + 8 of 16
    const float2 row[2] = {head_rows[warp_query + lane / 4], head_rows[warp_query + lane / 4 + 8]};
    load_rows<QUERIES, HS>(q_tile, q, stride, first_query, T);
    load_rows<QUERIES, HS>(dout_tile, head_dout, C, first_query, T);
    load_keys(0, 0);
    const int end = min(first_query + QUERIES, T);
    uint32_t q_left[1][HS / 16][4], dout_left[1][HS / 16][4];
    int buffer = 0;
    for (int first_key = 0; first_key < end; first_key += KEYS, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();                                    // this tile is here, nobody reads the previous
        if (first_key + KEYS < end) load_keys(first_key + KEYS, buffer ^ 1);
        if (first_key > warp_query + 15) continue;          // all of it beyond this warp's queries
        bf16* k_tile = k_tiles + buffer * KEYS * HS;
        bf16* v_tile = v_tiles + buffer * KEYS * HS;
        const bool load = HS > 64 || first_key == 0;        // Q and dOut of HS 64 stay in registers
        if (load) load_left<HS>(q_left, q_tile + 16 * warp * HS);
        float p[1][N][4] = {}, ds[1][N][4];                 // (16 queries, 8 N keys)
        multiply_transposed<HS>(p, q_left, k_tile);
        const bool diagonal = first_key + KEYS - 1 > warp_query;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int query = warp_query + lane / 4 + i / 2 * 8;
                const int key = first_key + 8 * n + lane % 4 * 2 + i % 2;
                p[0][n][i] = diagonal && query < key ? 0.0f : exp2f(p[0][n][i] * scale - row[i / 2].x);
                ds[0][n][i] = -row[i / 2].y;
            }
        if (load) load_left<HS>(dout_left, dout_tile + 16 * warp * HS);
        multiply_transposed<HS>(ds, dout_left, v_tile);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) ds[0][n][i] *= p[0][n][i];
        multiply<HS>(dq, ds, k_tile);
    }
#pragma unroll
    for (int n = 0; n < HS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) dq[0][n][i] *= scale * LN2;
    store_rows<HS>(dqkv + head.qkv, stride, warp_query, T, dq, q_tile + 16 * warp * HS);
}
