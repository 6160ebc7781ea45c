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
// kernel                                grid                 block  shared  workspace
// attention_append<Storage>             (ceil(C/256), T, B)  256    0       -
// attention_decode_naive<Storage>       (ceil(C/256), T, B)  256    0       -
// attention_decode<Storage, HP, WIDTH>  (NH splits, T, B)    128    0       partial if splits > 1, else null
// attention_decode_async<Storage, HP>   (NH splits, T, B)    128    ring    partial if splits > 1, else null
// attention_decode_combine<Storage>     (ceil(B T NH / 4))   128    0       partial; only if splits > 1
//
// First attention_append, though with T = 1 the two attention_decode append by themselves; then naive, or one
// of the two and combine. HP: 64 for HS <= 64, 128 for HS <= 128. WIDTH: elements in one access, which is 16
// / sizeof(Storage) where HS is a multiple of that and the arrays are aligned to 16 bytes, or 1; _async is
// for the former, from sm_80 on. ring: max(32768, 128 HP sizeof(Storage)) bytes. partial: (B, T, NH, splits,
// HS + 2) float32. splits: as many as make 6 blocks for each multiprocessor, at most 32 and ceil(Tmax / 64).

#include "attention.cuh"

inline constexpr int DECODE_GROUPS = 16;                    // groups of 8 lanes in a block
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

// ---- What rungs 2 and 3 share -----------------------------------------------------------------------------

// A block per (head, split, token, row). Eight lanes hold a query between them, WIDTH neighbouring channels
// each, and read whole keys: a warp asks for four rows at once. Each group runs an online softmax of its own
// over every sixteenth key; at the end the block adds the groups up in their order.

// What a lane reads at once, as bits: 16 bytes, or one element.
template <typename Storage, int WIDTH> struct Access { int4 bits; };
template <typename Storage> struct Access<Storage, 1> { Storage bits; };

template <typename Storage, int WIDTH>
__device__ inline Access<Storage, WIDTH> load_access(const Storage* address) {
    return *reinterpret_cast<const Access<Storage, WIDTH>*>(address);
}
template <typename Storage, int WIDTH>
__device__ inline void to_floats(float (&x)[WIDTH], const Access<Storage, WIDTH>& access) {
    if constexpr (WIDTH == 1) x[0] = to_float(access.bits);
    else to_floats(x, reinterpret_cast<const Pack<Storage>&>(access));
}

// The part of a head's work that a lane has: its share of the query, of the sums, and of each key.
template <typename Storage, int HP, int WIDTH> struct Decode {
    static constexpr int ACCESSES = HP / 8 / WIDTH;         // of a lane in a key, WIDTH elements each
    int group = threadIdx.x / 8, lane = threadIdx.x % 8;
    int C, HS, begin, end, fresh;                           // keys begin .. end - 1; the one to append, or -1
    size_t row;                                             // (b T + t) NH + h
    const Storage* token;                                   // this head's (HS,) of q; C on of k, 2C on of v
    Storage *keys, *values;                                 // this head's (Tmax, HS)
    int channel[ACCESSES];                                  // beyond the head the last ones, and q is 0
    float q[ACCESSES][WIDTH], acc[ACCESSES][WIDTH], maximum = NO_SCORE, sum = 0.0f;

    __device__ Decode(const Storage* qkv, Storage* all_keys, Storage* all_values, const int* lengths, int T,
                      int NH, int HS, int Tmax, int splits) : C(NH * HS), HS(HS) {
        const int h = blockIdx.x % NH, split = blockIdx.x / NH, t = blockIdx.y, b = blockIdx.z;
        const int old = lengths[b], n_keys = min(old + t + 1, Tmax), share = ceil_div(n_keys, splits);
        const size_t cache = (static_cast<size_t>(b) * NH + h) * Tmax * HS;
        begin = split * share, end = min(begin + share, n_keys);
        fresh = T == 1 && old < Tmax ? old : -1;
        row = (static_cast<size_t>(b) * T + t) * NH + h;
        token = qkv + (static_cast<size_t>(b) * T + t) * 3 * C + h * HS;
        keys = all_keys + cache, values = all_values + cache;
        const float scale = softmax_scale(HS);
#pragma unroll
        for (int a = 0; a < ACCESSES; a++) {
            const int d = (8 * a + lane) * WIDTH;
            channel[a] = min(d, HS - WIDTH);
            to_floats(q[a], load_access<Storage, WIDTH>(token + channel[a]));
            for (int w = 0; w < WIDTH; w++) q[a][w] = d < HS ? q[a][w] * scale : 0.0f, acc[a][w] = 0.0f;
        }
    }

    // Where this lane's a-th access of its group's key, and value, begins. The groups have the keys from
    // `first` on in turn, and beyond the end they read the last one again.
    __device__ const Storage* key(int first, int a) const {
        const int key = min(first + group, end - 1);
        return (key == fresh ? token + C : keys + key * HS) + channel[a];
    }
    __device__ const Storage* value(int first, int a) const {
        const int key = min(first + group, end - 1);
        return (key == fresh ? token + 2 * C : values + key * HS) + channel[a];
    }

    // KEYS keys more for each group: from `first` on, then from 16 further on, ..
    template <int KEYS>
    __device__ void attend(int first, const Access<Storage, WIDTH> (&k)[KEYS][ACCESSES],
                           const Access<Storage, WIDTH> (&v)[KEYS][ACCESSES]) {
        float scores[KEYS], new_maximum = maximum, x[WIDTH];
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            float score = 0.0f;
#pragma unroll
            for (int a = 0; a < ACCESSES; a++) {
                to_floats(x, k[i][a]);
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
                to_floats(x, v[i][a]);
#pragma unroll
                for (int w = 0; w < WIDTH; w++) acc[a][w] += weight * x[w];
            }
        }
    }

    // The groups together, to out, or to this split's row of partial (B, T, NH, splits, HS + 2). The block
    // that had the new key appends it.
    __device__ void finish(Storage* out, float* partial, int split, int splits) {
        __shared__ float group_acc[DECODE_GROUPS][HP], group_maximum[DECODE_GROUPS], group_sum[DECODE_GROUPS];
#pragma unroll
        for (int a = 0; a < ACCESSES; a++)
#pragma unroll
            for (int w = 0; w < WIDTH; w++) group_acc[group][(8 * a + lane) * WIDTH + w] = acc[a][w];
        if (lane == 0) {
            group_maximum[group] = maximum;
            group_sum[group] = sum;
        }
        __syncthreads();
        for (int g = 0; g < DECODE_GROUPS; g++) maximum = fmaxf(maximum, group_maximum[g]);
        const int d = threadIdx.x;
        if (d >= HS) return;
        if (begin <= fresh && fresh < end) {
            keys[fresh * HS + d] = token[C + d];
            values[fresh * HS + d] = token[2 * C + d];
        }
        float total = 0.0f, result = 0.0f;
        for (int g = 0; g < DECODE_GROUPS; g++) {
            const float weight = exp2f(group_maximum[g] - maximum);
            total += weight * group_sum[g];
            result += weight * group_acc[g][d];
        }
        if (splits == 1) {
            out[row * HS + d] = from_float<Storage>(result / total);
            return;
        }
        float* mine = partial + (row * splits + split) * (HS + 2);          // (HS + 2,)
        mine[d] = result;
        if (d == 0) {
            mine[HS] = maximum;
            mine[HS + 1] = total;
        }
    }
};

// ---- Rung 2: the cache is read once, 16 bytes at a time ---------------------------------------------------

// Four keys per group: all their loads, then the wait for them. 46 -> 2316 GB/s on an H200 (64 rows of 1024
// positions, 12 heads of 64, bf16).
template <typename Storage, int HP, int WIDTH>
__global__ void __launch_bounds__(8 * DECODE_GROUPS, 2)
attention_decode(Storage* out, float* partial, const Storage* qkv, Storage* keys, Storage* values,
                 const int* lengths, int T, int NH, int HS, int Tmax, int splits) {
    constexpr int KEYS = WIDTH == 1 ? 2 : 4;
    Decode<Storage, HP, WIDTH> work(qkv, keys, values, lengths, T, NH, HS, Tmax, splits);
    for (int first = work.begin; first < work.end; first += KEYS * DECODE_GROUPS) {
        Access<Storage, WIDTH> k[KEYS][work.ACCESSES], v[KEYS][work.ACCESSES];
#pragma unroll
        for (int i = 0; i < KEYS; i++)
#pragma unroll
            for (int a = 0; a < work.ACCESSES; a++) {
                k[i][a] = load_access<Storage, WIDTH>(work.key(first + i * DECODE_GROUPS, a));
                v[i][a] = load_access<Storage, WIDTH>(work.value(first + i * DECODE_GROUPS, a));
            }
        work.attend(first, k, v);
    }
    work.finish(out, partial, blockIdx.x / NH, splits);
}

// ---- Rung 3: while a group computes, its next keys are on their way to shared memory ----------------------

// Rung 2 waits, computes, and asks again; registers for more keys in flight would leave room for fewer
// blocks. cp.async needs none: it copies into a ring of four stages in shared memory, three of them under
// way. Each lane reads back what it asked for itself, so that it waits for nobody else. 6 blocks fit on a
// multiprocessor of an H200, with 144 KB in flight, and the 768 of 64 rows and 12 heads are one wave. Won:
// not measured yet.
template <typename Storage, int HP>
__global__ void __launch_bounds__(8 * DECODE_GROUPS, HP * sizeof(Storage) <= 256 ? 6 : 3)
attention_decode_async(Storage* out, float* partial, const Storage* qkv, Storage* keys, Storage* values,
                       const int* lengths, int T, int NH, int HS, int Tmax, int splits) {
    constexpr int WIDTH = Pack<Storage>::size, STAGES = 4, KEYS = HP * sizeof(Storage) <= 128 ? 2 : 1;
    constexpr int STEP = KEYS * DECODE_GROUPS, THREADS = 8 * DECODE_GROUPS;
    Decode<Storage, HP, WIDTH> work(qkv, keys, values, lengths, T, NH, HS, Tmax, splits);
    constexpr int ACCESSES = work.ACCESSES;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    int4* ring = reinterpret_cast<int4*>(shared_memory) + threadIdx.x;  // (stage, i, a, key or value, thread)
    const auto slot = [](int stage, int i, int a) {
        return ((stage * KEYS + i) * ACCESSES + a) * 2 * THREADS;
    };
    const int cached = work.fresh < 0 ? work.end : min(work.end, work.fresh);  // keys that are in the cache
    const Storage *key = work.keys + (work.begin + work.group) * HS, *value = key + (values - keys);
    const auto ask = [&](int stage, int first) {
        const auto each = [&](const auto& copy) {
#pragma unroll
            for (int i = 0; i < KEYS; i++)
#pragma unroll
                for (int a = 0; a < ACCESSES; a++) copy(ring + slot(stage, i, a), i * DECODE_GROUPS, a);
        };
        if (first + STEP <= cached)                         // the plain case, which takes few instructions
            each([&](int4* to, int i, int a) {
                cp_async_16(to, key + (i * HS + work.channel[a]), 16);
                cp_async_16(to + THREADS, value + (i * HS + work.channel[a]), 16);
            });
        else if (first < work.end)
            each([&](int4* to, int i, int a) {
                cp_async_16(to, work.key(first + i, a), 16);
                cp_async_16(to + THREADS, work.value(first + i, a), 16);
            });
        key += STEP * HS, value += STEP * HS;
        cp_async_commit();
    };
    for (int s = 0; s < STAGES - 1; s++) ask(s, work.begin + s * STEP);
    for (int first = work.begin, stage = 0; first < work.end; first += STEP, stage = (stage + 1) % STAGES) {
        Access<Storage, WIDTH> k[KEYS][ACCESSES], v[KEYS][ACCESSES];
        cp_async_wait<STAGES - 2>();
#pragma unroll
        for (int i = 0; i < KEYS; i++)
#pragma unroll
            for (int a = 0; a < ACCESSES; a++) {
                k[i][a].bits = ring[slot(stage, i, a)];
                v[i][a].bits = ring[slot(stage, i, a) + THREADS];
            }
        ask((stage + STAGES - 1) % STAGES, first + (STAGES - 1) * STEP);
        work.attend(first, k, v);
    }
    work.finish(out, partial, blockIdx.x / NH, splits);
}

// ---- splits > 1: several blocks share a head's keys, so that few rows fill the card -----------------------

// Each leaves its maximum and sums in `partial`; here a warp per (token, head) adds them up, in their order:
// 37 -> 13 us on an H200 (1 row of 1024 positions). A lane per split: all their maxima and sums come at once.
template <typename Storage>
__global__ void attention_decode_combine(Storage* out, const float* partial, int rows, int HS, int splits) {
    const int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const float* parts = partial + static_cast<size_t>(row) * splits * (HS + 2);  // (splits, HS + 2)
    const float* mine = parts + min(lane, splits - 1) * (HS + 2);
    const float own = lane < splits ? mine[HS] : NO_SCORE, weight = exp2f(own - warp_max(own));
    const float total = warp_sum(lane < splits ? weight * mine[HS + 1] : 0.0f);
    for (int first = 0; first < HS; first += WARP) {
        const int d = min(first + lane, HS - 1);
        float result = 0.0f;
#pragma unroll 8
        for (int s = 0; s < splits; s++)
            result += __shfl_sync(ALL_LANES, weight, s) * parts[s * (HS + 2) + d];
        if (first + lane < HS) out[static_cast<size_t>(row) * HS + d] = from_float<Storage>(result / total);
    }
}
