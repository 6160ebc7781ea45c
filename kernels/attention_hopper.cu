// Causal self-attention on Hopper, forward and backward, bf16, head sizes 64 and 128, any T: the third version
// of attention.cu and attention_backward.cu, which say what is computed, with wgmma and TMA. Read these and
// matmul_hopper.cu before.
//
//     kernel                                  grid                block     dynamic shared bytes, HS = 64; 128
//     attention_forward_hopper<HS>            at most one per SM  512; 384  139,360; 229,472
//     attention_backward_hopper<HS, KEYS>     the same            384       149,568; 164,912
//     attention_backward_hopper<HS, QUERIES>  the same            384       147,520; 163,888
//
//     forward(map q, map kv, map out, float* lse, int B, int T, int NH)
//     backward(map kv, map q, map dout, map dqkv, float2* rows, int B, int T, int Tp, int NH)
//
// The maps are head_map's of qkv (B, T, 3 NH, HS), out, dout (B, T, NH, HS) and dqkv: q and dout in boxes of
// QUERIES tokens, kv of KEYS, out and dqkv of 64. rows (B, NH, Tp) holds lse log2(e) and D of every query, made
// by attention_backward_prepare, with Tp = T rounded up to a multiple of 128.
//
// One producer warpgroup loads; two or three consumers own 64 rows each, of queries or of keys, and keep the
// scores, their exponentials and the sums in registers: the registers of a wgmma result, rounded to bf16, are laid
// out as wgmma expects a left operand in registers. A head of 128 channels lies in shared memory as two boxes of
// 64, one behind the other.
//
// The floor: forward 2, backward 5 products of 2 B T² C FLOP each, of which causality leaves half. What comes on
// top of it: backward, 7 products instead of 5, because one kernel owns keys and another queries, so that no sum
// leaves its registers and the same bits come out every time; in all three, the exponentials (16 a clock and
// SM), which with 64 channels take as many clocks as the two products of forward and with 128 half as many, and
// are hidden behind the other consumers' products in part; and the blocks of the diagonal, computed whole.
//
// On an H200 on 2026-11-27, 64 sequences of 12 heads of 64, T = 1024 (RESULTS.md): forward 288 us, 358 TFLOP/s
// of the causal half (cuDNN 314 us); backward 806 us, 320 TFLOP/s of five products (cuDNN 1,080 us), of which
// keys take some 430, queries 340, prepare 70. The mma.sync versions: 427 and 1,435 us.

#include "hopper.cuh"

// 1 / sqrt(HS). With FACTOR, for powers of two, exp2(FACTOR q·k - lse log2(e)) is a probability.
template <int HS> inline constexpr float SCALE = 1.0f / (HS == 64 ? 8.0f : 11.313708498984761f);

// ---- Tasks: a tile of one head, in an order that suits the L2 cache --------------------------------------

// 64 heads at a time, so that their keys and values stay in the L2 cache; of these first all first tiles, then
// all second ones. The kernel sees to it that tile 0 has most to do.
struct Task { int tile, head, b, h; };
__device__ inline Task task_of(int number, int tiles, int heads, int NH) {
    constexpr int GROUP = 64;
    const int group = number / (GROUP * tiles), inside = number % (GROUP * tiles);
    const int width = min(GROUP, heads - group * GROUP), head = group * GROUP + inside % width;
    return {inside / width, head, head / NH, head % NH};
}

// ---- Products of a warpgroup -----------------------------------------------------------------------------

// Starts scores (64, 2 HALF) = x (64, HS) @ yᵀ. x and y are rows of boxes that are X_ROWS and Y_ROWS high.
template <int HS, int X_ROWS, int Y_ROWS, int HALF>
__device__ inline void start_scores(float (&scores)[HALF], const bf16* x, const bf16* y) {
    const Descriptor a = describe(x), b = describe(y);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HS / 16; k++)
        wgmma<false, false>(scores, advance(a, k / 4 * X_ROWS * 128 + k % 4 * 32),
                            advance(b, k / 4 * Y_ROWS * 128 + k % 4 * 32), k > 0);
    wgmma_commit();
}

// Starts acc (64, HS) += weights (64, 4 COUNT) @ y (4 COUNT, HS), the weights in registers.
template <int HS, int Y_ROWS, int COUNT>
__device__ inline void start_sums(float (&acc)[HS / 2], const uint32_t (&weights)[COUNT], const bf16* y,
                                  bool accumulate) {
    const Descriptor b = describe(y, Y_ROWS * 128);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < COUNT / 4; k++)
        wgmma<true>(acc, weights + 4 * k, advance(b, k * 2048), accumulate || k > 0);
    wgmma_commit();
}

// Stores acc (64, HS) times f0 (rows g) and f1 (rows g + 8) as bf16 through boxes of 64 columns. Rows from T on
// are clipped by TMA.
template <int HS>
__device__ inline void store_rows(const TensorMap& map, bf16* boxes, const float (&acc)[HS / 2], float f0,
                                  float f1, int head, int row, int b, int barrier) {
    const int thread = threadIdx.x % WARPGROUP;
    if (thread == 0) bulk_wait_read<0>();
    named_barrier_sync<WARPGROUP>(barrier);
#pragma unroll
    for (int c = 0; c < HS; c += 16) {
        const float* x = acc + c / 2;
        stmatrix_x4(fragment(boxes + c / 64 * (BOX_BYTES / 2), c % 64), pack_bf16(x[0] * f0, x[1] * f0),
                    pack_bf16(x[2] * f1, x[3] * f1), pack_bf16(x[4] * f0, x[5] * f0),
                    pack_bf16(x[6] * f1, x[7] * f1));
    }
    async_proxy_fence();
    named_barrier_sync<WARPGROUP>(barrier);
    if (thread == 0) {
#pragma unroll
        for (int half = 0; half < HS / 64; half++)
            tma_store(map, boxes + half * (BOX_BYTES / 2), half * 64, head, row, b);
        bulk_commit();
    }
}

// Starts the load of a box of 64 or 128 channels.
template <int HS, int ROWS>
__device__ inline void load_rows(bf16* tile, const TensorMap& map, Barrier* full, int head, int row, int b) {
#pragma unroll
    for (int half = 0; half < HS / 64; half++)
        tma_load(tile + half * ROWS * 64, map, full, half * 64, head, row, b);
}

// ---- Forward ---------------------------------------------------------------------------------------------

template <int HS> struct Forward {
    static constexpr int CONSUMERS = HS == 64 ? 3 : 2, QUERIES = 64 * CONSUMERS, KEYS = 128, STAGES = 2;
    static constexpr int REGISTERS = CONSUMERS == 3 ? 160 : 232, Q_BUFFERS = 2;
    static constexpr int Q = QUERIES * HS, KV = KEYS * HS, OUT = 64 * HS;   // elements of a tile
    static constexpr int SHARED = 2 * (Q_BUFFERS * Q + 2 * STAGES * KV + CONSUMERS * OUT) +
                                  8 * (2 * Q_BUFFERS + 4 * STAGES);
};

// A block owns QUERIES queries and walks the keys from the diagonal down to 0, in tiles of KEYS. Scores, online
// softmax and sums as in attention.cu. The product with V goes on while the next scores are started: 305 us
// instead of 316, and 157 instead of 176 for 16 x 16 heads of 128.
template <int HS>
__global__ void __launch_bounds__(WARPGROUP * (Forward<HS>::CONSUMERS + 1), 1)
attention_forward_hopper(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap kv_map,
                         const __grid_constant__ TensorMap out_map, float* lse, int B, int T, int NH) {
    using Tile = Forward<HS>;
    constexpr int CONSUMERS = Tile::CONSUMERS, QUERIES = Tile::QUERIES, KEYS = Tile::KEYS;
    constexpr int STAGES = Tile::STAGES, Q_BUFFERS = Tile::Q_BUFFERS;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    bf16* const q_tiles = reinterpret_cast<bf16*>(shared_memory);           // Q_BUFFERS x (QUERIES, HS)
    bf16* const k_tiles = q_tiles + Q_BUFFERS * Tile::Q;                    // STAGES x (KEYS, HS)
    bf16* const v_tiles = k_tiles + STAGES * Tile::KV;                      // STAGES x (KEYS, HS)
    bf16* const boxes = v_tiles + STAGES * Tile::KV;                        // CONSUMERS x (64, HS)
    Barrier* const q_full = reinterpret_cast<Barrier*>(boxes + CONSUMERS * Tile::OUT);
    Barrier* const q_empty = q_full + Q_BUFFERS;
    Barrier* const k_full = q_empty + Q_BUFFERS;
    Barrier* const k_empty = k_full + STAGES;
    Barrier* const v_full = k_empty + STAGES;
    Barrier* const v_empty = v_full + STAGES;
    if (threadIdx.x == 0) {
        ring_init<Q_BUFFERS>(q_full, q_empty, CONSUMERS);
        ring_init<STAGES>(k_full, k_empty, CONSUMERS);
        ring_init<STAGES>(v_full, v_empty, CONSUMERS);
        barrier_init_fence();
    }
    __syncthreads();
    const int tiles = ceil_div(T, QUERIES), heads = B * NH, last = tiles * heads;
    // The compiler knows that a number is the same in all lanes of a warp only if it comes from a shuffle.
    // Otherwise it may serialize wgmma, and computes descriptors lane by lane.
    const int warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    const int thread = threadIdx.x % WARPGROUP;
    RingPosition<STAGES> at;
    RingPosition<Q_BUFFERS> q_at;

    if (warpgroup == 0) {                                   // the producer
        registers_decrease<(CONSUMERS == 3 ? 32 : 40)>();
        if (thread == 0)
            for (int number = blockIdx.x; number < last; number += gridDim.x, q_at.next()) {
                const Task task = task_of(number, tiles, heads, NH);
                const int first_query = (tiles - 1 - task.tile) * QUERIES;
                barrier_wait(q_empty + q_at.stage, q_at.parity ^ 1);
                barrier_arrive_expect(q_full + q_at.stage, Tile::Q * 2);
                load_rows<HS, QUERIES>(q_tiles + q_at.stage * Tile::Q, q_map, q_full + q_at.stage, task.h,
                                       first_query, task.b);
                const int last_key = min(first_query + QUERIES, T) - 1;
                for (int block = last_key / KEYS; block >= 0; block--, at.next()) {
                    barrier_wait(k_empty + at.stage, at.parity ^ 1);
                    barrier_arrive_expect(k_full + at.stage, Tile::KV * 2);
                    load_rows<HS, KEYS>(k_tiles + at.stage * Tile::KV, kv_map, k_full + at.stage, NH + task.h,
                                        block * KEYS, task.b);
                    barrier_wait(v_empty + at.stage, at.parity ^ 1);
                    barrier_arrive_expect(v_full + at.stage, Tile::KV * 2);
                    load_rows<HS, KEYS>(v_tiles + at.stage * Tile::KV, kv_map, v_full + at.stage, 2 * NH + task.h,
                                        block * KEYS, task.b);
                }
            }
        return;
    }
    registers_increase<Tile::REGISTERS>();                  // a consumer
    const int consumer = warpgroup - 1, lane = thread % WARP, warp = thread / WARP;
    constexpr float FACTOR = SCALE<HS> * LOG2E;
    for (int number = blockIdx.x; number < last; number += gridDim.x, q_at.next()) {
        const Task task = task_of(number, tiles, heads, NH);
        const int first_query = (tiles - 1 - task.tile) * QUERIES, first_row = first_query + 64 * consumer;
        const int row = first_row + warp * 16 + lane / 4;   // this lane's rows are row and row + 8
        const int loaded = ceil_div(min(first_query + QUERIES, T), KEYS);   // blocks of keys
        const int used = first_row < T ? min(loaded, ceil_div(first_row + 64, KEYS)) : 0;
        const bf16* const q_tile = q_tiles + q_at.stage * Tile::Q + consumer * 64 * 64;
        float acc[HS / 2] = {}, scores[KEYS / 2];
        float maximum[2] = {MINUS_INFINITY, MINUS_INFINITY};                // of row and row + 8
        float sum[2] = {};                                                  // the same, of this lane's keys
        barrier_wait(q_full + q_at.stage, q_at.parity);
        for (int block = loaded - 1; block >= used; block--, at.next()) {   // above this consumer's diagonal
            barrier_wait(k_full + at.stage, at.parity);
            barrier_wait(v_full + at.stage, at.parity);
            named_barrier_sync<WARPGROUP>(1 + consumer);    // or a late warp could miss a phase
            if (thread == 0) barrier_arrive(k_empty + at.stage), barrier_arrive(v_empty + at.stage);
        }
        int before = 0;                                     // the stage whose values are being added up
        for (int block = used - 1; block >= 0; block--, at.next()) {
            barrier_wait(k_full + at.stage, at.parity);
            start_scores<HS, QUERIES, KEYS>(scores, q_tile, k_tiles + at.stage * Tile::KV);
            wgmma_wait<0>();
            wgmma_results(scores);
            wgmma_results(acc);
            if (thread == 0) {
                barrier_arrive(k_empty + at.stage);
                if (block < used - 1) barrier_arrive(v_empty + before);
            }

            const int key = block * KEYS + lane % 4 * 2;    // this lane's keys are key + 8 j and its neighbour
            if (block * KEYS + KEYS - 1 > first_row) {      // the diagonal
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++)
                    if (key + i / 4 * 8 + i % 2 > row + i % 4 / 2 * 8) scores[i] = MINUS_INFINITY;
            }
            float rescale[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float highest = maximum[r];
#pragma unroll
                for (int i = 2 * r; i < KEYS / 2; i += 4)
                    highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
                highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
                highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2));
                rescale[r] = exp2f((maximum[r] - highest) * FACTOR);
                maximum[r] = highest;
                const float offset = highest * FACTOR;
                float block_sum = 0.0f;
#pragma unroll
                for (int i = 2 * r; i < KEYS / 2; i += 4) {
                    scores[i] = exp2f(scores[i] * FACTOR - offset);
                    scores[i + 1] = exp2f(scores[i + 1] * FACTOR - offset);
                    block_sum += scores[i] + scores[i + 1];
                }
                sum[r] = sum[r] * rescale[r] + block_sum;
            }
            uint32_t weights[KEYS / 4];
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) weights[i] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
#pragma unroll
            for (int i = 0; i < HS / 2; i++) acc[i] *= rescale[i % 4 / 2];
            barrier_wait(v_full + at.stage, at.parity);
            start_sums<HS, KEYS>(acc, weights, v_tiles + at.stage * Tile::KV, true);
            before = at.stage;
        }
        wgmma_wait<0>();
        wgmma_results(acc);
        if (thread == 0) {
            if (used > 0) barrier_arrive(v_empty + before);
            barrier_arrive(q_empty + q_at.stage);
        }
        if (used == 0) continue;                            // all rows lie beyond T
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 1);
            sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 2);
            if (lane % 4 == 0 && row + 8 * r < T)
                lse[static_cast<size_t>(task.head) * T + row + 8 * r] = maximum[r] * FACTOR * LN2 + logf(sum[r]);
        }
        store_rows<HS>(out_map, boxes + consumer * Tile::OUT, acc, 1.0f / sum[0], 1.0f / sum[1], task.h, first_row,
                       task.b, 1 + consumer);
    }
    if (thread == 0) bulk_wait<0>();
}

// ---- Backward: a pass that owns keys and makes dK and dV, and one that owns queries and makes dQ ----------

// Operands x, y, u and w as in attention_backward.cu:
//
//                owns x, u     walks y, w    x yᵀ makes    u wᵀ makes     sums
//     KEYS       K, V          Q, dOut       Pᵀ            dPᵀ            dV += Pᵀ w,  dK += dSᵀ y
//     QUERIES    Q, dOut       K, V          P             dP             dQ += dS y
template <int HS, Owner OWNER> struct Backward {
    static constexpr int CONSUMERS = 2, OWN = 64 * CONSUMERS, WALKED = HS == 64 ? 128 : 64, STAGES = 2;
    static constexpr int BUFFERS = HS == 64 ? 2 : 1;                        // of x and of u
    static constexpr int X = OWN * HS, Y = WALKED * HS, OUT = 64 * HS;      // elements of a tile
    static constexpr int ROWS = OWNER == KEYS ? WALKED * 8 : 0;             // bytes of lse and D of walked queries
    static constexpr int SHARED = 2 * (2 * BUFFERS * X + 2 * STAGES * Y + CONSUMERS * OUT) + STAGES * ROWS +
                                  8 * (2 * BUFFERS + 2 * STAGES);
};

// A block owns OWN rows and walks the others from the last block to the first, of those that causality leaves.
template <int HS, Owner OWNER>
__global__ void __launch_bounds__(WARPGROUP * 3, 1)
attention_backward_hopper(const __grid_constant__ TensorMap kv_map, const __grid_constant__ TensorMap q_map,
                          const __grid_constant__ TensorMap dout_map,
                          const __grid_constant__ TensorMap dqkv_map, const float2* rows, int B, int T,
                          int Tp, int NH) {
    using Tile = Backward<HS, OWNER>;
    constexpr int CONSUMERS = Tile::CONSUMERS, OWN = Tile::OWN, WALKED = Tile::WALKED;
    constexpr int STAGES = Tile::STAGES, BUFFERS = Tile::BUFFERS;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    bf16* const x_tiles = reinterpret_cast<bf16*>(shared_memory);           // BUFFERS x (OWN, HS)
    bf16* const u_tiles = x_tiles + BUFFERS * Tile::X;                      // BUFFERS x (OWN, HS)
    bf16* const y_tiles = u_tiles + BUFFERS * Tile::X;                      // STAGES x (WALKED, HS)
    bf16* const w_tiles = y_tiles + STAGES * Tile::Y;                       // STAGES x (WALKED, HS)
    bf16* const boxes = w_tiles + STAGES * Tile::Y;                         // CONSUMERS x (64, HS)
    float2* const rows_tiles = reinterpret_cast<float2*>(boxes + CONSUMERS * Tile::OUT);    // STAGES x (WALKED,)
    Barrier* const own_full = reinterpret_cast<Barrier*>(rows_tiles + STAGES * Tile::ROWS / 8);
    Barrier* const own_empty = own_full + BUFFERS;
    Barrier* const full = own_empty + BUFFERS;
    Barrier* const empty = full + STAGES;
    if (threadIdx.x == 0) {
        ring_init<BUFFERS>(own_full, own_empty, CONSUMERS);
        ring_init<STAGES>(full, empty, OWNER == KEYS ? CONSUMERS * WARPGROUP / WARP : CONSUMERS);
        barrier_init_fence();
    }
    __syncthreads();
    const int tiles = ceil_div(T, OWN), heads = B * NH, last = tiles * heads;
    const int warpgroup = __shfl_sync(ALL_LANES, threadIdx.x / WARPGROUP, 0);
    const int thread = threadIdx.x % WARPGROUP;
    RingPosition<STAGES> at;
    RingPosition<BUFFERS> own_at;
    const auto first_own = [&](const Task& task) {          // tile 0 has most to do
        return (OWNER == KEYS ? task.tile : tiles - 1 - task.tile) * OWN;
    };
    const auto first_block = [&](int own) { return OWNER == KEYS ? own / WALKED : 0; };
    const auto end_block = [&](int own) { return ceil_div(OWNER == KEYS ? T : min(own + OWN, T), WALKED); };

    if (warpgroup == 0) {                                   // the producer
        registers_decrease<24>();
        const TensorMap &x_map = OWNER == KEYS ? kv_map : q_map, &u_map = OWNER == KEYS ? kv_map : dout_map;
        const TensorMap &y_map = OWNER == KEYS ? q_map : kv_map, &w_map = OWNER == KEYS ? dout_map : kv_map;
        if (thread == 0)
            for (int number = blockIdx.x; number < last; number += gridDim.x, own_at.next()) {
                const Task task = task_of(number, tiles, heads, NH);
                const int own = first_own(task), begin = first_block(own);
                const int q = task.h, dout = task.h, k = NH + task.h, v = 2 * NH + task.h;  // heads of the maps
                barrier_wait(own_empty + own_at.stage, own_at.parity ^ 1);
                barrier_arrive_expect(own_full + own_at.stage, 2 * Tile::X * 2);
                load_rows<HS, OWN>(x_tiles + own_at.stage * Tile::X, x_map, own_full + own_at.stage,
                                   OWNER == KEYS ? k : q, own, task.b);
                load_rows<HS, OWN>(u_tiles + own_at.stage * Tile::X, u_map, own_full + own_at.stage,
                                   OWNER == KEYS ? v : dout, own, task.b);
                for (int block = end_block(own) - 1; block >= begin; block--, at.next()) {
                    barrier_wait(empty + at.stage, at.parity ^ 1);
                    barrier_arrive_expect(full + at.stage, 2 * Tile::Y * 2 + Tile::ROWS);
                    load_rows<HS, WALKED>(y_tiles + at.stage * Tile::Y, y_map, full + at.stage,
                                          OWNER == KEYS ? q : k, block * WALKED, task.b);
                    load_rows<HS, WALKED>(w_tiles + at.stage * Tile::Y, w_map, full + at.stage,
                                          OWNER == KEYS ? dout : v, block * WALKED, task.b);
                    if constexpr (OWNER == KEYS)
                        bulk_load(rows_tiles + at.stage * WALKED,
                                  rows + static_cast<size_t>(task.head) * Tp + block * WALKED, Tile::ROWS,
                                  full + at.stage);
                }
            }
        return;
    }
    registers_increase<240>();                              // a consumer
    const int consumer = warpgroup - 1, lane = thread % WARP, warp = thread / WARP;
    constexpr float FACTOR = SCALE<HS> * LOG2E;
    float p[WALKED / 2], ds[WALKED / 2], sum[HS / 2], sum_dv[HS / 2];   // p and ds: (64 own rows, WALKED)
    for (int number = blockIdx.x; number < last; number += gridDim.x, own_at.next()) {
        const Task task = task_of(number, tiles, heads, NH);
        const int own = first_own(task), first_row = own + 64 * consumer;
        const int row = first_row + warp * 16 + lane / 4;   // this lane's rows are row and row + 8
        const int begin = first_block(own), end = end_block(own);
        // Of queries, those from T on have nothing to do, and the others nothing above their diagonal.
        const int used = OWNER == KEYS ? end : first_row < T ? min(end, ceil_div(first_row + 64, WALKED)) : 0;
        const bf16* const x_tile = x_tiles + own_at.stage * Tile::X + consumer * 64 * 64;
        const bf16* const u_tile = u_tiles + own_at.stage * Tile::X + consumer * 64 * 64;
        float2 own_rows[2];                                 // {lse, D} of row and row + 8, if they are queries
        if constexpr (OWNER == QUERIES) {
            const float2* const from = rows + static_cast<size_t>(task.head) * Tp + row;    // Tp covers all OWN
            own_rows[0] = from[0], own_rows[1] = from[8];
        }
        barrier_wait(own_full + own_at.stage, own_at.parity);
        if constexpr (OWNER == QUERIES)
            for (int block = end - 1; block >= used; block--, at.next()) {  // above this consumer's diagonal
                barrier_wait(full + at.stage, at.parity);
                named_barrier_sync<WARPGROUP>(1 + consumer);    // or a late warp could miss a phase
                if (thread == 0) barrier_arrive(empty + at.stage);
            }
        for (int block = used - 1; block >= begin; block--, at.next()) {
            const bf16* const y_tile = y_tiles + at.stage * Tile::Y;
            const bf16* const w_tile = w_tiles + at.stage * Tile::Y;
            // This lane's walked rows are 8 j + lane % 4 * 2 and its neighbour: {lse, D} of both in 16 bytes.
            const float4* const pairs = reinterpret_cast<const float4*>(rows_tiles + at.stage * WALKED) + lane % 4;
            barrier_wait(full + at.stage, at.parity);
            start_scores<HS, OWN, WALKED>(p, x_tile, y_tile);
            start_scores<HS, OWN, WALKED>(ds, u_tile, w_tile);
            wgmma_wait<1>();
            wgmma_results(p);
            const bool diagonal = OWNER == KEYS ? block * WALKED < first_row + 63
                                                : block * WALKED + WALKED - 1 > first_row;
            if (diagonal) {
                const int before = row - block * WALKED - lane % 4 * 2;
#pragma unroll
                for (int i = 0; i < WALKED / 2; i++) {
                    const int x_row = before + i % 4 / 2 * 8, y_row = i / 4 * 8 + i % 2;
                    if (OWNER == KEYS ? x_row > y_row : y_row > x_row) p[i] = MINUS_INFINITY;   // key > query
                }
            }
#pragma unroll
            for (int i = 0; i < WALKED / 2; i += 4) {
                if constexpr (OWNER == KEYS) {
                    const float4 pair = pairs[i];           // (lse, D) of two queries; float4 number i is 2 i
                    p[i] = exp2f(p[i] * FACTOR - pair.x), p[i + 1] = exp2f(p[i + 1] * FACTOR - pair.z);
                    p[i + 2] = exp2f(p[i + 2] * FACTOR - pair.x), p[i + 3] = exp2f(p[i + 3] * FACTOR - pair.z);
                } else {
                    for (int j = i; j < i + 4; j++) p[j] = exp2f(p[j] * FACTOR - own_rows[j % 4 / 2].x);
                }
            }
            wgmma_wait<0>();
            wgmma_results(ds);
            uint32_t p_left[WALKED / 4], ds_left[WALKED / 4];
#pragma unroll
            for (int i = 0; i < WALKED / 2; i += 4) {
                if constexpr (OWNER == KEYS) {
                    const float4 pair = pairs[i];
                    p_left[i / 2] = pack_bf16(p[i], p[i + 1]);
                    p_left[i / 2 + 1] = pack_bf16(p[i + 2], p[i + 3]);
                    ds_left[i / 2] = pack_bf16(p[i] * (ds[i] - pair.y), p[i + 1] * (ds[i + 1] - pair.w));
                    ds_left[i / 2 + 1] =
                        pack_bf16(p[i + 2] * (ds[i + 2] - pair.y), p[i + 3] * (ds[i + 3] - pair.w));
                } else {
                    for (int j = i; j < i + 4; j += 2) {
                        const float D = own_rows[j % 4 / 2].y;
                        ds_left[j / 2] = pack_bf16(p[j] * (ds[j] - D), p[j + 1] * (ds[j + 1] - D));
                    }
                }
            }
            if constexpr (OWNER == KEYS) start_sums<HS, WALKED>(sum_dv, p_left, w_tile, block < used - 1);
            start_sums<HS, WALKED>(sum, ds_left, y_tile, block < used - 1);
            wgmma_wait<0>();
            if constexpr (OWNER == KEYS) wgmma_results(sum_dv);
            wgmma_results(sum);
            if constexpr (OWNER == KEYS) {
                __syncwarp();                               // each warp: its lanes have read rows_tiles themselves
                if (lane == 0) barrier_arrive(empty + at.stage);
            } else {
                if (thread == 0) barrier_arrive(empty + at.stage);
            }
        }
        if (thread == 0) barrier_arrive(own_empty + own_at.stage);
        bf16* const box = boxes + consumer * Tile::OUT;
        const int head = OWNER == KEYS ? NH + task.h : task.h;  // of dqkv: dK or dQ
        if constexpr (OWNER == KEYS)
            store_rows<HS>(dqkv_map, box, sum_dv, 1.0f, 1.0f, NH + head, first_row, task.b, 1 + consumer);
        if (OWNER == KEYS || used > 0)
            store_rows<HS>(dqkv_map, box, sum, SCALE<HS>, SCALE<HS>, head, first_row, task.b, 1 + consumer);
    }
    if (thread == 0) bulk_wait<0>();
}
