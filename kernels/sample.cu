// From logits to a token, on the device: temperature, top-k, top-p, min-p, and random numbers that can be
// reproduced. The definitions are in kernels/sampling.py: read it before, and common.cuh.
//
//   out (B,) int32    logprobs (2, B) float32 or null    logits (B, stride) of T, the first V columns of it
//   streams, counters (B,) int64, seed an unsigned 64-bit number
//
//   kernel           grid  block   shared  workspace
//   sample_naive<T>  B     1024    0       weights: (B, V) float32
//   sample<T>        B     1024    0       none
//
// The block may be any multiple of 32. temperature 0: the largest logit, the lowest id of equals; top_k 0,
// top_p 1, min_p 0: off. V is below 2^24. logprobs, if not null, get the log-probability of the token drawn,
// [0] under the distribution that was sampled and [1] under the model's own, the full softmax at temperature
// 1. Sums are float32, so a token may differ from the CPU's where the uniform number falls on a border to
// within rounding.
//
// The floor is to read a row once, 4 V bytes. The kernel takes far longer, because one multiprocessor works on
// a row and reads it 4 times, and 16 times more for each of top-k and top-p: a fraction of a millisecond, in
// which all rows of a batch are served.

#include "common.cuh"

inline constexpr float COLDEST = 1e-30f;                    // a temperature below is as good as 0

// ---- Random numbers --------------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al. 2011): counter and key become random bits. The upper 24 bits of the first word,
// as many as float32 has room for, make a number in [0, 1).
__device__ inline float uniform(unsigned long long seed, unsigned long long stream,
                                unsigned long long counter) {
    unsigned c0 = counter, c1 = counter >> 32, c2 = stream, c3 = stream >> 32, k0 = seed, k1 = seed >> 32;
    for (int round = 0; round < 10; round++) {
        const unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;                                  // the golden ratio
        k1 += 0xBB67AE85u;                                  // sqrt(3) - 1
    }
    return (c0 >> 8) * (1.0f / 16777216.0f);
}

// Draw from weights 0 .. V - 1, `weight` of a token being a function: the first token, in the order of the
// vocabulary, at which the running sum passes u times the total. Each warp adds up a stretch; the warp in
// whose stretch the sum passes walks it again, 32 tokens at a time. *out is written by one thread, or, if no
// weight is a positive number, by none. Every thread gets the total.
template <typename Weight> __device__ inline float draw(int* out, const Weight& weight, int V, float u) {
    __shared__ float stretch[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int length = ceil_div(V, warps), first = warp * length, last = min(first + length, V);
    float sum = 0.0f;
    for (int c = first + lane; c < last; c += WARP) sum += weight(c);
    sum = warp_sum(sum);
    if (lane == 0) stretch[warp] = sum;
    __syncthreads();
    float total = 0.0f, before = 0.0f;
    for (int w = 0; w < warps; w++) total += stretch[w];
    for (int w = 0; w < warp; w++) before += stretch[w];
    const float threshold = u * total;                      // below total, because u is at most 1 - 2^-24
    if (!(before <= threshold && before + sum > threshold)) return total;

    int token = -1;
    for (int start = first; start < last && token < 0; start += WARP) {
        const float own = start + lane < last ? weight(start + lane) : 0.0f;
        float upto = own;                                   // of this lane and the lanes before
        for (int offset = 1; offset < WARP; offset *= 2) {
            const float left = __shfl_up_sync(ALL_LANES, upto, offset);
            if (lane >= offset) upto += left;
        }
        const unsigned passed = __ballot_sync(ALL_LANES, own > 0.0f && before + upto > threshold);
        const unsigned possible = __ballot_sync(ALL_LANES, own > 0.0f);
        if (passed != 0) token = start + __ffs(passed) - 1;
        else if (lane == 0 && possible != 0)                // if rounding keeps the sum below
            *out = start + WARP - 1 - __clz(possible);
        before += __shfl_sync(ALL_LANES, upto, WARP - 1);
    }
    if (lane == 0 && token >= 0) *out = token;
    return total;
}

// ---- What both versions know of a row --------------------------------------------------------------------

struct Peak {
    float logit;
    int token;                                              // the lowest of those with this logit
};
template <typename T> __device__ inline Peak find_peak(const T* logits, int V) {
    float highest = MINUS_INFINITY;
    for (int c = threadIdx.x; c < V; c += blockDim.x) highest = fmaxf(highest, to_float(logits[c]));
    highest = block_max(highest);
    float lowest = V - 1;                                   // a token id; exact in float32 below 2^24
    for (int c = threadIdx.x; c < V; c += blockDim.x)
        if (to_float(logits[c]) == highest) lowest = fminf(lowest, c);
    return {highest, int(-block_max(-lowest))};
}

// The log-probabilities of the token drawn; `part` is its weight as a part of the total.
template <typename T>
__device__ inline void write_logprobs(float* logprobs, const T* logits, int V, int token, float highest,
                                      float part) {
    if (logprobs == nullptr) return;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < V; c += blockDim.x) sum += exp2f((to_float(logits[c]) - highest) * LOG2E);
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    logprobs[blockIdx.x] = logf(part);
    logprobs[gridDim.x + blockIdx.x] = to_float(logits[token]) - highest - logf(sum);
}

// ---- Version 1: every token is compared with every other, as the definitions say -------------------------

template <typename T>
__global__ void __launch_bounds__(1024)
sample_naive(int* out, float* logprobs, const T* logits, float* weights, unsigned long long seed,
             const long long* streams, const long long* counters, float temperature, int top_k, float top_p,
             float min_p, int V, int stride) {
    const T* z = logits + size_t(blockIdx.x) * stride;
    float* w = weights + size_t(blockIdx.x) * V;
    const Peak peak = find_peak(z, V);
    if (threadIdx.x == 0) out[blockIdx.x] = peak.token;
    if (temperature < COLDEST) return write_logprobs(logprobs, z, V, peak.token, peak.logit, 1.0f);

    const float scale = LOG2E / temperature;
    for (int c = threadIdx.x; c < V; c += blockDim.x) {
        int above = 0;                                      // tokens more probable than this one
        for (int i = 0; i < V && top_k > 0; i++) above += to_float(z[i]) > to_float(z[c]);
        w[c] = top_k == 0 || above < top_k ? exp2f((to_float(z[c]) - peak.logit) * scale) : 0.0f;
    }
    __syncthreads();
    float total = 0.0f, cut = 1.0f;                         // the least weight that top-p keeps
    for (int i = 0; i < V; i++) total += w[i];
    for (int c = threadIdx.x; c < V && top_p < 1.0f; c += blockDim.x) {
        float above = 0.0f;                                 // held by tokens more probable than this
        for (int i = 0; i < V; i++) above += w[i] > w[c] ? w[i] : 0.0f;
        if (above < top_p * total) cut = fminf(cut, w[c]);
    }
    cut = top_p < 1.0f ? -block_max(-cut) : 0.0f;
    const auto weight = [&](int c) { return w[c] < cut || w[c] < min_p ? 0.0f : w[c]; };
    const float u = uniform(seed, streams[blockIdx.x], counters[blockIdx.x]);
    total = draw(out + blockIdx.x, weight, V, u);
    __syncthreads();                                        // the token has been written
    write_logprobs(logprobs, z, V, out[blockIdx.x], peak.logit, weight(out[blockIdx.x]) / total);
}

// ---- Version 2: thresholds bit by bit --------------------------------------------------------------------
//
// Both filters keep the tokens from some logit on. That logit is found without sorting: as an unsigned number
// that orders like the floats, two bits at a time from the top, by asking how much the tokens above each
// candidate hold: 16 passes over the row, which stays in the L1 cache, where a comparison of all pairs takes
// V passes. 245 us on an H200 for 64 rows of 50,304 with top-k 50 and top-p 0.9, 43 us without them.

// Unsigned numbers in the order of the floats: positive ones above, negative ones turned round. (-0 becomes
// 0.)
__device__ inline unsigned float_key(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The highest key such that the tokens from it on hold at least `goal`, where `measure` is what a logit
// counts. `above` is held by keys beyond the range that is being cut into four.
template <typename T, typename Measure>
__device__ inline unsigned find_cut(const T* z, int V, float goal, const Measure& measure) {
    unsigned cut = 0;
    float above = 0.0f;
    for (int shift = 30; shift >= 0; shift -= 2) {
        float sum[3] = {};                                  // held by the upper 3, 2, 1 quarters
#pragma unroll 4
        for (int c = threadIdx.x; c < V; c += blockDim.x) {
            const float x = to_float(z[c]);
            const unsigned key = float_key(x), quarter = (key - cut) >> shift;
            if (key < cut || quarter == 0 || quarter > 3) continue;
            const float amount = measure(x);
            sum[0] += amount;
            if (quarter > 1) sum[1] += amount;
            if (quarter > 2) sum[2] += amount;
        }
        unsigned quarter = 0;
        float beyond = above;
        for (int j = 2; j >= 0 && quarter == 0; j--) {
            const float held = above + block_sum(sum[j]);   // all threads have it, and stop at the same j
            if (held >= goal) quarter = j + 1;
            else beyond = held;
        }
        above = beyond;
        cut += quarter << shift;
    }
    return cut;
}

template <typename T>
__global__ void __launch_bounds__(1024)
sample(int* out, float* logprobs, const T* __restrict__ logits, unsigned long long seed,
       const long long* streams, const long long* counters, float temperature, int top_k, float top_p,
       float min_p, int V, int stride) {
    const T* z = logits + size_t(blockIdx.x) * stride;
    const Peak peak = find_peak(z, V);
    if (threadIdx.x == 0) out[blockIdx.x] = peak.token;
    if (temperature < COLDEST) return write_logprobs(logprobs, z, V, peak.token, peak.logit, 1.0f);

    const float scale = LOG2E / temperature;
    unsigned cut = 0;                                       // tokens below are not drawn
    if (top_k > 0 && top_k < V) cut = find_cut(z, V, top_k, [](float) { return 1.0f; });
    if (top_p < 1.0f) {
        const auto kept = [&](float x) {
            return float_key(x) < cut ? 0.0f : exp2f((x - peak.logit) * scale);
        };
        float total = 0.0f;
        for (int c = threadIdx.x; c < V; c += blockDim.x) total += kept(to_float(z[c]));
        total = block_sum(total);
        const unsigned found = find_cut(z, V, top_p * total, kept);
        cut = max(cut, min(found, float_key(peak.logit)));  // the peak always stays
    }
    const auto weight = [&](int c) {
        const float x = to_float(z[c]), w = exp2f((x - peak.logit) * scale);
        return float_key(x) < cut || w < min_p ? 0.0f : w;
    };
    const float u = uniform(seed, streams[blockIdx.x], counters[blockIdx.x]);
    const float total = draw(out + blockIdx.x, weight, V, u);
    __syncthreads();                                        // the token has been written
    write_logprobs(logprobs, z, V, out[blockIdx.x], peak.logit, weight(out[blockIdx.x]) / total);
}
