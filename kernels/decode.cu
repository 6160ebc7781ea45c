// Attention while a text grows: T new tokens of each row look back at a cache of keys and values. Read
// attention.cu before.
//
//     keys, values (B, NH, Tmax, HS)    the cache; lengths[b] (int32) positions of row b are taken and stay
//     qkv (B, T, 3C)                    the new tokens: token t of row b gets position lengths[b] + t
//     out (B, T, C)                     token t of row b attends to positions 0 .. lengths[b] + t
//
// T = 1 is a step of generation, T > 1 a prompt. The lengths are in device memory, and nothing else about a
// launch depends on them, so that a CUDA graph of it can be replayed while the text grows. The work is to
// read the cache once: 4 HS bytes of bf16 for 4 HS FLOP, so tensor cores would have nothing to do, and all
// that counts is loads in flight.
//
// kernel                                 grid                    block  workspace; no dynamic shared memory
// attention_append<Storage>              (ceil(C/256), T, B)     256    -
// attention_decode_naive<Storage>        (ceil(C/256), T, B)     256    -
// attention_decode<Storage, HP, WIDTH>   (NH splits, T, B)       128    partial if splits > 1, else null
// attention_decode_combine<Storage>      (ceil(B T NH / 4))      128    partial; only if splits > 1
//
// In this order; naive in place of the last two. HP: 64 for HS <= 64, 128 for HS <= 128. WIDTH: elements in
// one access, 16 / sizeof(Storage) where HS is a multiple of it and the arrays are aligned to 16 bytes, or 1.
// partial: (B, T, NH, splits, HS + 2) float32.
// splits: 1 when B T NH blocks fill the card, else as many as fill it, and at most ceil(Tmax / 64).

#include "attention.cuh"

inline constexpr int DECODE_GROUPS = 16;                    // groups of 8 lanes in a block
inline constexpr int DECODE_KEYS = 4;                       // keys that a group has in flight
inline constexpr float NO_SCORE = -1e30f;                   // below any score, and finite: inf - inf is NaN

// Copies the new keys and values to their places in the cache. A thread per channel; what does not fit is
// dropped: padding, for the host has seen to it that real tokens fit.
template <typename Storage>
__global__ void attention_append(Storage* keys, Storage* values, const Storage* qkv, const int* lengths,
                                 int T, int NH, int HS, int Tmax) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y, b = blockIdx.z, C = NH * HS;
    const int position = lengths[b] + t;
    if (c >= C || position >= Tmax) return;
    const Storage* row = qkv + (static_cast<size_t>(b) * T + t) * 3 * C;    // (3C,)
    const size_t place = ((static_cast<size_t>(b) * NH + c / HS) * Tmax + position) * HS + c % HS;
    keys[place] = row[C + c];
    values[place] = row[2 * C + c];
}

// ---- Rung 1: a thread per channel of the output -----------------------------------------------------------

// It scans its head's cache twice, for the maximum and for the sums, and computes every score each time. So
// do the other HS - 1 threads of the head: every product is made 2 HS times.
template <typename Storage>
__global__ void attention_decode_naive(Storage* out, const Storage* qkv, const Storage* keys,
                                       const Storage* values, const int* lengths, int T, int NH, int HS,
                                       int Tmax) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y, b = blockIdx.z, C = NH * HS;
    if (c >= C) return;
    const size_t token = static_cast<size_t>(b) * T + t;
    const size_t cache = (static_cast<size_t>(b) * NH + c / HS) * Tmax * HS;  // this head's (Tmax, HS)
    const Storage* q = qkv + token * 3 * C + c / HS * HS;                   // (HS,)
    const int n_keys = min(lengths[b] + t + 1, Tmax);
    const auto score = [&](int key) {
        const Storage* k = keys + cache + static_cast<size_t>(key) * HS;    // (HS,)
        float sum = 0.0f;
        for (int d = 0; d < HS; d++) sum += to_float(q[d]) * to_float(k[d]);
        return sum / sqrtf(static_cast<float>(HS));
    };
    float maximum = MINUS_INFINITY, sum = 0.0f, result = 0.0f;
    for (int key = 0; key < n_keys; key++) maximum = fmaxf(maximum, score(key));
    for (int key = 0; key < n_keys; key++) {
        const float weight = expf(score(key) - maximum);
        sum += weight;
        result += weight * to_float(values[cache + static_cast<size_t>(key) * HS + c % HS]);
    }
    out[token * C + c] = from_float<Storage>(result / sum);
}

// ---- Rung 2, splits = 1: the cache is read once, 16 bytes at a time. Won: not measured yet. ---------------

template <int WIDTH, typename Storage> __device__ inline void load_floats(float* x, const Storage* address) {
    if constexpr (WIDTH == 1) {
        x[0] = to_float(*address);
    } else {
        const Pack<Storage> pack = load_pack(address);
#pragma unroll
        for (int w = 0; w < WIDTH; w++) x[w] = to_float(pack[w]);
    }
}

// A block per (head, split, token, row). Eight lanes hold a query between them, WIDTH neighbouring channels
// each, and read whole keys: a warp asks for four rows at once, and for DECODE_KEYS of those before it waits.
// Each group runs an online softmax of its own over every sixteenth key; at the end the block adds the groups
// up in their order.
template <typename Storage, int HP, int WIDTH>
__global__ void __launch_bounds__(8 * DECODE_GROUPS, 2)
attention_decode(Storage* out, float* partial, const Storage* qkv, const Storage* keys, const Storage* values,
                 const int* lengths, int T, int NH, int HS, int Tmax, int splits) {
    constexpr int EACH = HP / 8;                            // channels of a lane: WIDTH, then WIDTH more, ..
    __shared__ float group_acc[DECODE_GROUPS][HP], group_maximum[DECODE_GROUPS], group_sum[DECODE_GROUPS];
    const int h = blockIdx.x % NH, split = blockIdx.x / NH, t = blockIdx.y, b = blockIdx.z;
    const int group = threadIdx.x / 8, lane = threadIdx.x % 8;
    const size_t token = static_cast<size_t>(b) * T + t;
    const int n_keys = min(lengths[b] + t + 1, Tmax), share = ceil_div(n_keys, splits);
    const int begin = split * share, end = min(begin + share, n_keys);
    const Storage* q_row = qkv + token * 3 * NH * HS + h * HS;              // (HS,)
    const size_t cache = (static_cast<size_t>(b) * NH + h) * Tmax * HS;     // this head's (Tmax, HS)
    const float scale = softmax_scale(HS);

    float q[EACH] = {}, acc[EACH] = {}, maximum = NO_SCORE, sum = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; e += WIDTH)
        if (8 * e + lane * WIDTH < HS) load_floats<WIDTH>(q + e, q_row + 8 * e + lane * WIDTH);
    for (int first = begin; first < end; first += DECODE_GROUPS * DECODE_KEYS) {
        float k[DECODE_KEYS][EACH] = {}, v[DECODE_KEYS][EACH] = {};
#pragma unroll
        for (int i = 0; i < DECODE_KEYS; i++)
#pragma unroll
            for (int e = 0; e < EACH; e += WIDTH) {
                const int key = first + i * DECODE_GROUPS + group, d = 8 * e + lane * WIDTH;
                if (key < end && d < HS) {
                    load_floats<WIDTH>(k[i] + e, keys + cache + static_cast<size_t>(key) * HS + d);
                    load_floats<WIDTH>(v[i] + e, values + cache + static_cast<size_t>(key) * HS + d);
                }
            }
        float scores[DECODE_KEYS], new_maximum = maximum;
#pragma unroll
        for (int i = 0; i < DECODE_KEYS; i++) {
            float score = 0.0f;
#pragma unroll
            for (int e = 0; e < EACH; e++) score += q[e] * k[i][e];
            for (int offset = 4; offset > 0; offset /= 2) score += __shfl_xor_sync(ALL_LANES, score, offset);
            scores[i] = first + i * DECODE_GROUPS + group < end ? score * scale : MINUS_INFINITY;
            new_maximum = fmaxf(new_maximum, scores[i]);
        }
        const float rescale = exp2f(maximum - new_maximum);
        maximum = new_maximum;
        sum *= rescale;
#pragma unroll
        for (int e = 0; e < EACH; e++) acc[e] *= rescale;
#pragma unroll
        for (int i = 0; i < DECODE_KEYS; i++) {
            const float weight = exp2f(scores[i] - maximum);
            sum += weight;
#pragma unroll
            for (int e = 0; e < EACH; e++) acc[e] += weight * v[i][e];
        }
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) group_acc[group][8 * (e - e % WIDTH) + lane * WIDTH + e % WIDTH] = acc[e];
    if (lane == 0) {
        group_maximum[group] = maximum;
        group_sum[group] = sum;
    }
    __syncthreads();
    for (int g = 0; g < DECODE_GROUPS; g++) maximum = fmaxf(maximum, group_maximum[g]);
    const int d = threadIdx.x;
    if (d >= HS) return;
    float total = 0.0f, result = 0.0f;
    for (int g = 0; g < DECODE_GROUPS; g++) {
        const float weight = exp2f(group_maximum[g] - maximum);
        total += weight * group_sum[g];
        result += weight * group_acc[g][d];
    }
    if (splits == 1) {
        out[(token * NH + h) * HS + d] = from_float<Storage>(result / total);
        return;
    }
    float* mine = partial + ((token * NH + h) * splits + split) * (HS + 2);  // (HS + 2,)
    mine[d] = result;
    if (d == 0) {
        mine[HS] = maximum;
        mine[HS + 1] = total;
    }
}

// ---- Rung 3, splits > 1: several blocks share a head's keys, so that few rows fill the card ---------------

// Each leaves its maximum and sums in `partial`; here a warp per (token, head) adds them up, in their order.
// Won: not measured yet.
template <typename Storage>
__global__ void attention_decode_combine(Storage* out, const float* partial, int rows, int HS, int splits) {
    const int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const float* parts = partial + static_cast<size_t>(row) * splits * (HS + 2);  // (splits, HS + 2)
    float maximum = NO_SCORE, total = 0.0f;
    for (int s = 0; s < splits; s++) maximum = fmaxf(maximum, parts[s * (HS + 2) + HS]);
    for (int s = 0; s < splits; s++)
        total += exp2f(parts[s * (HS + 2) + HS] - maximum) * parts[s * (HS + 2) + HS + 1];
    for (int d = lane; d < HS; d += WARP) {
        float result = 0.0f;
        for (int s = 0; s < splits; s++)
            result += exp2f(parts[s * (HS + 2) + HS] - maximum) * parts[s * (HS + 2) + d];
        out[static_cast<size_t>(row) * HS + d] = from_float<Storage>(result / total);
    }
}
