// Causal self-attention, backward, and from version 2 on without a (T, T) array. Read attention.cu before.
//
// Forward, for one head:  S = Q Kᵀ / sqrt(HS),  P = exp(S - lse) below the diagonal, else 0,  out = P V.  So
//
//     dV = Pᵀ dOut     dP = dOut Vᵀ     dS = P ∘ (dP - D)     dQ = dS K / sqrt(HS)     dK = dSᵀ Q / sqrt(HS)
//
// with D = rowsum(P ∘ dP) = rowsum(out ∘ dOut), one number for each query. dK and dV are sums over queries,
// dQ is a sum over keys. A block that owns a tile of keys can add up dK and dV in registers but would have to
// share dQ with the others; that needs atomics, whose order is not fixed. So there are two passes, one that
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
// attention_backward_flash<Storage, HP, OWNER>    (NH, ceil(T/ROWS), B)    256    HP 64: 87,040; 128: 72,192
// attention_backward_tensor<HS, KEYS>             (NH, ceil(T/64), B)      128    HS 64: 50,176; 128: 49,408
// attention_backward_tensor<HS, QUERIES>          (NH, ceil(T/64), B)      128    HS 64: 49,152; 128: 65,536
//
// The naive version is scores and sums; the others are always all three: prepare, then the passes for the owners
// KEYS and QUERIES in any order. Storage, HP, HS and alignment as in attention.cu; ROWS is 64 for HP 64 and 32 for
// HP 128; on sm_75 it is half of that, and 39,424 and 35,072 bytes. All of dqkv is overwritten.
//
// The floor: five products, 5 B T² C FLOP with causality, for 16 B T C bytes of bf16. On top of it come the two
// further products, the price of no atomics, and what attention.cu says.
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

// ---- The two passes --------------------------------------------------------------------------------------

// A block owns a tile of keys or of queries and walks the tiles of the others that causality leaves. Both passes
// are products of the same four operands, x, y, u and w, with a row for each row that the block owns:
//
//                owns x, u     walks y, w    x yᵀ makes    u wᵀ makes     sums
//     KEYS       K, V          Q, dOut       Pᵀ            dPᵀ            dV += Pᵀ w,  dK += dSᵀ y
//     QUERIES    Q, dOut       K, V          P             dP             dQ += dS y
//
// So one kernel is both. The first blocks to start have most to do.
// Where a head's rows of the four begin, and how far apart they are; those of x and y are 3C apart.
template <typename Storage> struct Operands {
    const Storage *x, *y, *u, *w;
    int u_stride, w_stride;                                 // 3C, or C if it is dOut
};
template <Owner OWNER, typename Storage>
__device__ inline Operands<Storage> operands(const Storage* qkv, const Storage* dout, const Head& head, int C) {
    const Storage *q = qkv + head.qkv, *k = q + C, *v = q + 2 * C, *dy = dout + head.out;   // (T, HS)
    if (OWNER == KEYS) return {k, q, v, dy, 3 * C, C};
    return {q, k, dy, v, C, 3 * C};
}

// ---- Version 2: float arithmetic -------------------------------------------------------------------------

// 116 -> 4.60 ms on an H200 (B 16, T 1024, 12 heads of 64, bf16). P and dS live for one tile, in registers and
// shared memory: nothing is written but the result.
template <typename Storage, int HP, Owner OWNER>
__global__ void __launch_bounds__(256)
attention_backward_flash(Storage* dqkv, const Storage* dout, const Storage* qkv, const float2* rows, int T,
                         int NH, int HS) {
    using Tile = FloatTile<HP>;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* x_tile = reinterpret_cast<float*>(shared_memory);                // (ROWS, PITCH)
    float* u_tile = x_tile + Tile::SIZE;                                   // (ROWS, PITCH)
    float* y_tile = u_tile + Tile::SIZE;                                   // (ROWS, PITCH)
    float* w_tile = y_tile + Tile::SIZE;                                   // (ROWS, PITCH)
    float* scores = w_tile + Tile::SIZE;                                   // (ROWS, SCORES_PITCH)
    const int C = NH * HS, stride = 3 * C;
    const Head head = head_of_block(T, NH, HS);
    const Operands<Storage> of = operands<OWNER>(qkv, dout, head, C);
    const float2* head_rows = rows + head.number * (ceil_div(T, 64) * 64);  // (Tp,)
    const float scale = softmax_scale(HS);
    const int own = (OWNER == KEYS ? blockIdx.y : gridDim.y - 1 - blockIdx.y) * Tile::ROWS;     // the first row
    const int begin = OWNER == KEYS ? own : 0, end = OWNER == KEYS ? T : own + 1;   // from or to the diagonal
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;

    constexpr int E = Tile::EACH;
    float sum[E][HP / 16] = {}, sum_dv[E][HP / 16] = {};                    // dK or dQ, and dV, of E rows
    load_floats<HP>(x_tile, of.x, stride, own, T, HS);
    load_floats<HP>(u_tile, of.u, of.u_stride, own, T, HS);
    for (int walked = begin; walked < end; walked += Tile::ROWS) {
        __syncthreads();                                    // nobody reads the previous tile any more
        load_floats<HP>(y_tile, of.y, stride, walked, T, HS);
        load_floats<HP>(w_tile, of.w, of.w_stride, walked, T, HS);
        __syncthreads();
        float p[E][E] = {}, ds[E][E] = {};                  // own rows E ty + i, walked rows tx + 16 j
        multiply_transposed<HP>(p, x_tile, y_tile);
        multiply_transposed<HP>(ds, u_tile, w_tile);
#pragma unroll
        for (int q = 0; q < E; q++) {
            const int query = OWNER == KEYS ? walked + tx + 16 * q : own + E * ty + q;
            const float2 row = head_rows[query];
#pragma unroll
            for (int k = 0; k < E; k++) {
                const int key = OWNER == KEYS ? own + E * ty + k : walked + tx + 16 * k;
                const int i = OWNER == KEYS ? k : q, j = OWNER == KEYS ? q : k;
                p[i][j] = key <= query ? exp2f(p[i][j] * scale - row.x) : 0.0f;
                ds[i][j] = p[i][j] * (ds[i][j] - row.y);
            }
        }
        if (OWNER == KEYS) multiply<HP>(sum_dv, scores, p, w_tile);
        multiply<HP>(sum, scores, ds, y_tile);
    }
    for (int i = 0; i < E; i++)
        for (int j = 0; j < HP / 16; j++) sum[i][j] *= scale * LN2;
    Storage* result = dqkv + head.qkv + (OWNER == KEYS ? C : 0);
    store_floats<HP>(result, stride, own, T, HS, sum);
    if (OWNER == KEYS) store_floats<HP>(result + C, stride, own, T, HS, sum_dv);
}

// ---- Version 3: tensor cores, bf16 -----------------------------------------------------------------------

// 4.60 ms -> 374 us on an H200, 172 TFLOP/s (the same). Version 4 is attention_hopper.cu.
//
// A block owns 64 rows, a warp 16 of them: their sums stay in its registers while the tiles pass by, each one
// arriving by cp.async while the one before is computed. The accumulators of dP start at -D instead of 0, which
// subtracts D at no cost. lse and D belong to queries: those that a block owns stay in registers, those that it
// walks arrive with their tile. (Tiles are smaller for HS 128, where the accumulators of dK and dV alone take 128
// registers.)
template <int HS, Owner OWNER>
__global__ void __launch_bounds__(TENSOR_THREADS, 2)
attention_backward_tensor(bf16* dqkv, const bf16* dout, const bf16* qkv, const float2* rows, int T, int NH) {
    constexpr int OWN = 64, WALKED = HS == 64 ? 64 : OWNER == KEYS ? 16 : 32, N = WALKED / 8;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    bf16* x_tile = reinterpret_cast<bf16*>(shared_memory);                  // (OWN, HS)
    bf16* u_tile = x_tile + OWN * HS;                                      // (OWN, HS)
    bf16* y_tiles = u_tile + OWN * HS;                                     // 2 x (WALKED, HS)
    bf16* w_tiles = y_tiles + 2 * WALKED * HS;                             // 2 x (WALKED, HS)
    float2* rows_tiles = reinterpret_cast<float2*>(w_tiles + 2 * WALKED * HS);     // of KEYS: 2 x (WALKED,)
    const int C = NH * HS, stride = 3 * C;
    const Head head = head_of_block(T, NH, HS);
    const Operands<bf16> of = operands<OWNER>(qkv, dout, head, C);
    const float2* head_rows = rows + head.number * (ceil_div(T, 64) * 64);  // (Tp,)
    const float scale = softmax_scale(HS);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int own = (OWNER == KEYS ? blockIdx.y : gridDim.y - 1 - blockIdx.y) * OWN, warp_row = own + 16 * warp;
    const int begin = OWNER == KEYS ? own : 0, end = OWNER == KEYS ? T : min(own + OWN, T);

    auto load_walked = [&](int first, int buffer) {
        load_rows<WALKED, HS>(y_tiles + buffer * WALKED * HS, of.y, stride, first, T);
        load_rows<WALKED, HS>(w_tiles + buffer * WALKED * HS, of.w, of.w_stride, first, T);
        const int pair = 2 * threadIdx.x;                   // two rows in 16 bytes
        if (OWNER == KEYS && pair < WALKED)
            cp_async_16(rows_tiles + buffer * WALKED + pair, head_rows + first + pair, 16);
        cp_async_commit();
    };
    float sum[1][HS / 8][4] = {}, sum_dv[1][HS / 8][4] = {};    // dK or dQ, and dV: rows lane / 4, lane / 4 + 8
    float2 own_row[2] = {};                                 // lse and D of these rows, if they are queries
    if (OWNER == QUERIES)
        for (int i = 0; i < 2; i++) own_row[i] = head_rows[warp_row + lane / 4 + 8 * i];
    load_rows<OWN, HS>(x_tile, of.x, stride, own, T);
    load_rows<OWN, HS>(u_tile, of.u, of.u_stride, own, T);
    load_walked(begin, 0);
    uint32_t x_left[1][HS / 16][4], u_left[1][HS / 16][4];
    int buffer = 0;
    for (int walked = begin; walked < end; walked += WALKED, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();                                    // this tile is here, nobody reads the previous
        if (walked + WALKED < end) load_walked(walked + WALKED, buffer ^ 1);
        // A tile all of whose queries come before all of whose keys has nothing for this warp.
        if (OWNER == KEYS ? walked + WALKED - 1 < warp_row : walked > warp_row + 15) continue;
        bf16 *y_tile = y_tiles + buffer * WALKED * HS, *w_tile = w_tiles + buffer * WALKED * HS;
        const float2* rows_tile = rows_tiles + buffer * WALKED + lane % 4 * 2;  // walked rows 8 n + {0, 1}
        const auto row = [&](int n, int i) {                // the query of result i of the n-th 8
            return OWNER == KEYS ? rows_tile[8 * n + i % 2] : own_row[i / 2];
        };
        const bool load = HS > 64 || walked == begin;       // x and u of HS 64 stay in registers
        if (load) load_left<HS>(x_left, x_tile + 16 * warp * HS);
        float p[1][N][4] = {}, ds[1][N][4];                 // (16 own rows, 8 N walked rows)
        multiply_transposed<HS>(p, x_left, y_tile);
        const bool diagonal = OWNER == KEYS ? walked < warp_row + 15 : walked + WALKED - 1 > warp_row;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int x_row = warp_row + lane / 4 + i / 2 * 8;
                const int y_row = walked + 8 * n + lane % 4 * 2 + i % 2;
                const bool hidden = OWNER == KEYS ? y_row < x_row : x_row < y_row;      // query < key
                p[0][n][i] = diagonal && hidden ? 0.0f : exp2f(p[0][n][i] * scale - row(n, i).x);
            }
        if (OWNER == KEYS) multiply<HS>(sum_dv, p, w_tile);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) ds[0][n][i] = -row(n, i).y;
        if (load) load_left<HS>(u_left, u_tile + 16 * warp * HS);
        multiply_transposed<HS>(ds, u_left, w_tile);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) ds[0][n][i] *= p[0][n][i];
        multiply<HS>(sum, ds, y_tile);
    }
#pragma unroll
    for (int n = 0; n < HS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[0][n][i] *= scale * LN2;
    // Each warp stores its results through its own rows of x_tile.
    bf16 *result = dqkv + head.qkv + (OWNER == KEYS ? C : 0), *warp_tile = x_tile + 16 * warp * HS;
    store_rows<HS>(result, stride, warp_row, T, sum, warp_tile);
    if (OWNER == KEYS) store_rows<HS>(result + C, stride, warp_row, T, sum_dv, warp_tile);
}
