// Attention while a text grows: T new tokens of each row look back at a cache of keys and values. Read
// attention.cu before.
//
//     keys, values (B, NH, Tmax, HS)    the cache; lengths[b] (int32) positions of row b are taken and stay
//     qkv (B, T, 3C)                    the new tokens: token t of row b gets position lengths[b] + t
//     out (B, T, C)                     token t of row b attends to positions 0 .. lengths[b] + t
//
// T = 1 is a step of generation, T > 1 a prompt (for one onto an empty cache cuda.py takes attention.cu). The
// lengths are in device memory, and nothing else about a launch depends on them, so that a CUDA graph of it
// can be replayed while the text grows. The work is to read the cache once: 4 HS bytes of bf16 for 4 HS FLOP,
// so tensor cores would have nothing to do, and all that counts is loads in flight: 4.1 TB/s for 1 us are 31
// KB on each of an H200's 132 multiprocessors.
//
// kernel                           grid                 block  shared  workspace
// attention_append<Storage>        (ceil(C/256), T, B)  256    0       none
// attention_decode_naive<Storage>  (ceil(C/256), T, B)  256    0       none
// attention_decode<Storage, HP>    (NH splits, T, B)    128    0       if splits > 1: partial, finished
//
// First attention_append, though with T = 1 attention_decode appends by itself, which attention_decode_naive
// does not. HP: 64 for HS <= 64, 128 for HS <= 128; HS is a multiple of 16 bytes except in the naive version.
// splits <= 8. partial: (B, T, NH, splits, HS + 2) float32. finished: (B, T, NH) unsigned, zero before the first
// launch and left zero by every launch. Without splits both may be null.

#include "attention.cuh"

inline constexpr int DECODE_GROUPS = 16;                    // groups of 8 lanes in a block
inline constexpr int MOST_SPLITS = 8;
inline constexpr float NO_SCORE = -1e30f;                   // below any score, and finite: inf - inf is NaN

// Copies the new keys and values to their places in the cache. A thread per channel. What does not fit is
// padding, because the host has checked that real tokens fit, and is dropped.
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

// ---- Version 1: a thread per channel of the output -------------------------------------------------------

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

// ---- Version 2: the cache is read once, 16 bytes at a time -----------------------------------------------

// A block per (head, split, token, row). Eight lanes hold a query between them, 16 bytes of neighbouring channels
// each, and read whole keys: a warp asks for four rows at once, and for KEYS times as many before it waits.
// Each group runs an online softmax of its own over every sixteenth key; at the end the block adds the groups
// up in their order.
//
// 46 -> 2319 GB/s on an H200 (64 rows of 1024 positions, 12 heads of 64, bf16). Then what is loaded stayed
// packed until it is used, and a lane beyond the end reads the last key again instead of asking each time: 78
// registers instead of 112, so that 6 blocks share a multiprocessor instead of 4, and the 768 of that size
// run at once: 3856 GB/s, 52.2 us; with 64 registers 3921 GB/s, 51.3 us. Tried, 2026-11-27: cp.async into a ring
// of 4 stages, where loads under way need no registers. It was the same: 51.9 us, and 8.7 us instead of 8.6 for
// one row.
//
// With T = 1 no other kernel of a recorded step writes this layer's cache, none writes lengths, and the new key
// is taken from qkv. So a block asks for its first keys while the kernel before it computes qkv: programmatic
// dependent launch (griddepcontrol in ptx.cuh).

// 16 bytes that stay bits until they are used.
template <typename Storage> __device__ inline int4 load_bits(const Storage* address) {
    return *reinterpret_cast<const int4*>(address);
}
template <typename Storage>
__device__ inline void unpack_bits(float (&x)[Pack<Storage>::size], const int4& bits) {
    to_floats(x, reinterpret_cast<const Pack<Storage>&>(bits));
}

// ---- splits > 1: several blocks share a head's keys, so that few rows fill the card ----------------------

// Each leaves its sums, maximum and total in its row of parts (splits, HS + 2). The block that finishes last
// adds them up, in the order of the splits whichever block it is; its loads do not wait for each other.
// On an H200 with 1 row of 1024 positions 37 -> 13 us, and 7.3 us since the loads above wait for less and 8
// splits, not 16, are enough (2026-11-27; 7.8 us with 4 splits, 12.0 with 32; 4 rows: 9.4 us with 8, 9.6 with
// 4; 16 rows: 16.3 us without, 18.4 with 2). Until then a second launch joined them, 9 us by itself with cold
// caches; in the same launch 5.3 us.
template <typename Storage>
__device__ inline void join_splits(Storage* out, float* parts, unsigned* finished, float result,
                                   float maximum, float total, int HS, int split, int splits) {
    const int d = threadIdx.x;
    if (d < HS) parts[split * (HS + 2) + d] = result;
    if (d == 0) {
        parts[split * (HS + 2) + HS] = maximum;
        parts[split * (HS + 2) + HS + 1] = total;
    }
    if (!is_last_block(finished, splits) || d >= HS) return;
    float results[MOST_SPLITS], maxima[MOST_SPLITS], totals[MOST_SPLITS];
#pragma unroll
    for (int s = 0; s < MOST_SPLITS; s++) {
        const float* part = parts + min(s, splits - 1) * (HS + 2);          // (HS + 2,)
        results[s] = part[d];
        maxima[s] = part[HS];
        totals[s] = part[HS + 1];
    }
#pragma unroll
    for (int s = 0; s < MOST_SPLITS; s++) maximum = fmaxf(maximum, maxima[s]);
    result = total = 0.0f;
#pragma unroll
    for (int s = 0; s < MOST_SPLITS; s++) {
        const float weight = s < splits ? exp2f(maxima[s] - maximum) : 0.0f;
        total += weight * totals[s];
        result += weight * results[s];
    }
    out[d] = from_float<Storage>(result / total);
}

template <typename Storage, int HP>
__global__ void __launch_bounds__(8 * DECODE_GROUPS, HP * sizeof(Storage) == 128 ? 6 : 2)
attention_decode(Storage* out, float* partial, unsigned* finished, const Storage* qkv, Storage* keys,
                 Storage* values, const int* lengths, int T, int NH, int HS, int Tmax, int splits) {
    constexpr int WIDTH = Pack<Storage>::size, ACCESSES = HP / 8 / WIDTH;   // of a lane in a key
    constexpr int KEYS = 4, STEP = KEYS * DECODE_GROUPS;    // keys under way at once: of a group, of the block
    __shared__ float group_acc[DECODE_GROUPS][HP], group_maximum[DECODE_GROUPS], group_sum[DECODE_GROUPS];
    const int h = blockIdx.x % NH, split = blockIdx.x / NH, t = blockIdx.y, b = blockIdx.z, C = NH * HS;
    const int group = threadIdx.x / 8, lane = threadIdx.x % 8;
    const int old = lengths[b], n_keys = min(old + t + 1, Tmax), share = ceil_div(n_keys, splits);
    const int begin = split * share, end = min(begin + share, n_keys);
    const int fresh = T == 1 && old < Tmax ? old : -1;      // the key that this launch appends
    const size_t row = (static_cast<size_t>(b) * T + t) * NH + h;
    const Storage* token = qkv + (static_cast<size_t>(b) * T + t) * 3 * C + h * HS;  // q; C on k, 2C on v
    const size_t cache = (static_cast<size_t>(b) * NH + h) * Tmax * HS;     // this head's (Tmax, HS)
    keys += cache, values += cache;

    int4 k[KEYS][ACCESSES], v[KEYS][ACCESSES];
    const auto channel = [&](int a) { return min((8 * a + lane) * WIDTH, HS - WIDTH); };
    const auto load = [&](int first) {                      // from the cache, where the new key is not yet
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const int key = min(first + i * DECODE_GROUPS + group, end - 1);
#pragma unroll
            for (int a = 0; a < ACCESSES; a++) {
                k[i][a] = load_bits(keys + key * HS + channel(a));
                v[i][a] = load_bits(values + key * HS + channel(a));
            }
        }
    };
    griddepcontrol_launch_dependents();
    if (T > 1) griddepcontrol_wait();                       // attention_append has written to the cache
    load(begin);
    griddepcontrol_wait();

    const float scale = softmax_scale(HS);
    float q[ACCESSES][WIDTH], acc[ACCESSES][WIDTH], maximum = NO_SCORE, sum = 0.0f, x[WIDTH];
#pragma unroll
    for (int a = 0; a < ACCESSES; a++) {
        const bool inside = (8 * a + lane) * WIDTH < HS;    // else the last channels, and q is 0
        unpack_bits<Storage>(q[a], load_bits(token + channel(a)));
        for (int w = 0; w < WIDTH; w++) q[a][w] = inside ? q[a][w] * scale : 0.0f, acc[a][w] = 0.0f;
    }
    for (int first = begin; first < end; first += STEP) {
        if (first > begin) load(first);
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            if (min(first + i * DECODE_GROUPS + group, end - 1) != fresh) continue;
#pragma unroll
            for (int a = 0; a < ACCESSES; a++) {
                k[i][a] = load_bits(token + C + channel(a));
                v[i][a] = load_bits(token + 2 * C + channel(a));
            }
        }
        float scores[KEYS], new_maximum = maximum;
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            float score = 0.0f;
#pragma unroll
            for (int a = 0; a < ACCESSES; a++) {
                unpack_bits<Storage>(x, k[i][a]);
#pragma unroll
                for (int w = 0; w < WIDTH; w++) score += q[a][w] * x[w];
            }
            for (int offset = 4; offset > 0; offset /= 2) score += __shfl_xor_sync(ALL_LANES, score, offset);
            scores[i] = first + i * DECODE_GROUPS + group < end ? score : MINUS_INFINITY;
            new_maximum = fmaxf(new_maximum, scores[i]);
        }
        const float rescale = exp2f(maximum - new_maximum);
        maximum = new_maximum;
        sum *= rescale;
#pragma unroll
        for (int a = 0; a < ACCESSES; a++)
#pragma unroll
            for (int w = 0; w < WIDTH; w++) acc[a][w] *= rescale;
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const float weight = exp2f(scores[i] - maximum);
            sum += weight;
#pragma unroll
            for (int a = 0; a < ACCESSES; a++) {
                unpack_bits<Storage>(x, v[i][a]);
#pragma unroll
                for (int w = 0; w < WIDTH; w++) acc[a][w] += weight * x[w];
            }
        }
    }

    // The groups together: thread d gets channel d. The block that had the new key appends it.
#pragma unroll
    for (int a = 0; a < ACCESSES; a++)
#pragma unroll
        for (int w = 0; w < WIDTH; w++) group_acc[group][(8 * a + lane) * WIDTH + w] = acc[a][w];
    if (lane == 0) group_maximum[group] = maximum, group_sum[group] = sum;
    __syncthreads();
    for (int g = 0; g < DECODE_GROUPS; g++) maximum = fmaxf(maximum, group_maximum[g]);
    const int d = threadIdx.x;
    float total = 0.0f, result = 0.0f;
    for (int g = 0; g < DECODE_GROUPS && d < HS; g++) {
        const float weight = exp2f(group_maximum[g] - maximum);
        total += weight * group_sum[g];
        result += weight * group_acc[g][d];
    }
    if (d < HS && begin <= fresh && fresh < end) {
        keys[fresh * HS + d] = token[C + d];
        values[fresh * HS + d] = token[2 * C + d];
    }
    out += row * HS;                                        // this head's (HS,)
    if (splits > 1) {
        float* parts = partial + row * splits * (HS + 2);
        join_splits(out, parts, finished + row, result, maximum, total, HS, split, splits);
    } else if (d < HS) {
        out[d] = from_float<Storage>(result / total);
    }
}
