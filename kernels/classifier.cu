// The classifier: softmax and cross entropy of every row of logits, and in the same launch the gradient of
// sum(weights * losses), which takes the place of the logits. Read common.cuh and ptx.cuh before.
//
//   losses (N,) float32    logits (N, Vp) of T    targets (N,) int32    weights (N,) float32
//
//   kernel                  grid           block  shared              workspace
//   classifier_naive<T>     ceil(N / 128)  128    0                   none
//   classifier_twice<T>     N              1024   0                   none
//   classifier<T>           N              768    Vp * sizeof(T)      none
//   cross_entropy_naive<T>  ceil(N / 128)  128    0                   none
//   cross_entropy<T>        N              512    0                   none
//   weighted_sum            1              1024   0                   none
//
// Columns V .. Vp - 1 are padding: they get no probability, and gradient 0. The block may be any multiple of
// 32 that is large enough; for a small Vp, ceil(Vp / (16/sizeof(T))) threads are. All but the naive versions
// demand rows aligned to 16 bytes. A target outside 0 .. V - 1 reads nothing outside the row: its loss is NaN,
// which every training log shows.
//
// `classifier` needs a row that fits the shared memory: 50304 columns of bf16 are 100,608 bytes, which every card
// from sm_80 on has (an H100 for two blocks), but of float32 201,216 bytes, which only sm_90 and sm_100 have. And
// it needs cp.async, which sm_75 does not have. Where one of them is missing, classifier_twice runs.
//
// The floor is set by the memory: 2 N Vp sizeof(T) bytes, each logit read once and its gradient written. Version 3
// has two exponentials for each, in bf16 65% of what an H200 computes in that time. What comes on top of the
// floor: one of two blocks on a multiprocessor waits for its row while the other computes, which hides the
// waiting only in part.

#include "common.cuh"
#include "ptx.cuh"

inline constexpr float LOWEST = -3.4028234e38f;             // finite, so that LOWEST - LOWEST is 0

__device__ inline float not_a_number() { return __int_as_float(0x7fffffff); }

struct Softmax {
    float highest, sum;                                     // max z, and sum of exp(z - highest)

    __device__ float loss(float target_logit) const { return logf(sum) - (target_logit - highest); }
};

// ---- Version 1: one thread per row -----------------------------------------------------------------------

template <typename T> __device__ inline Softmax softmax_naive(const T* z, int V) {
    Softmax row = {LOWEST, 0.0f};
    for (int c = 0; c < V; c++) row.highest = fmaxf(row.highest, to_float(z[c]));
    for (int c = 0; c < V; c++) row.sum += expf(to_float(z[c]) - row.highest);
    return row;
}

template <typename T>
__global__ void classifier_naive(float* losses, T* logits, const int* targets, const float* weights, int N,
                                 int V, int Vp) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    T* z = logits + size_t(n) * Vp;
    const int target = targets[n];
    const Softmax row = softmax_naive(z, V);
    losses[n] = row.loss(target >= 0 && target < V ? to_float(z[target]) : not_a_number());
    for (int c = 0; c < V; c++) {
        const float probability = expf(to_float(z[c]) - row.highest) / row.sum;
        z[c] = from_float<T>(weights[n] * (probability - (c == target ? 1.0f : 0.0f)));
    }
    for (int c = V; c < Vp; c++) z[c] = from_float<T>(0.0f);
}

// ---- Version 2: one block per row, which finds maximum and sum in one read -------------------------------
//
// Online softmax (Milakov and Gimelshein 2018): when the maximum grows, the sum so far shrinks to the new
// scale. Every thread does so for its columns, then the block combines the threads. The row is read twice
// instead of three times; the second time mostly from the L2 cache. 53 -> 3437 GB/s of the floor's bytes on
// an H200 (5,336 rows of 50,304, bf16).

// The maximum of a row's first V columns, and the sum of exp(z - maximum): every thread gets both.
template <typename T> __device__ inline Softmax row_softmax(const T* z, int V) {
    constexpr int SIZE = Pack<T>::size;
    Softmax own = {LOWEST, 0.0f};
    const int whole = V / SIZE * SIZE;                      // columns read 16 bytes at a time
#pragma unroll 4
    for (int c = threadIdx.x * SIZE; c < whole; c += blockDim.x * SIZE) {
        const Pack<T> pack = load_pack(z + c);
        float highest = own.highest, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SIZE; i++) highest = fmaxf(highest, to_float(pack[i]));
#pragma unroll
        for (int i = 0; i < SIZE; i++) sum += exp2f((to_float(pack[i]) - highest) * LOG2E);
        own = {highest, own.sum * exp2f((own.highest - highest) * LOG2E) + sum};
    }
    for (int c = whole + threadIdx.x; c < V; c += blockDim.x) {
        const float z_c = to_float(z[c]), highest = fmaxf(own.highest, z_c);
        own = {highest, own.sum * exp2f((own.highest - highest) * LOG2E) + exp2f((z_c - highest) * LOG2E)};
    }
    const float highest = block_max(own.highest);
    return {highest, block_sum(own.sum * exp2f((own.highest - highest) * LOG2E))};
}

template <typename T>
__global__ void __launch_bounds__(1024)
classifier_twice(float* losses, T* logits, const int* targets, const float* weights, int V, int Vp) {
    constexpr int SIZE = Pack<T>::size;
    T* z = logits + size_t(blockIdx.x) * Vp;
    const int target = targets[blockIdx.x];
    const bool valid = target >= 0 && target < V;
    const float target_logit = valid ? to_float(z[target]) : not_a_number();
    const Softmax row = row_softmax(z, V);                  // its barriers divide reading from writing
    const float weight = weights[blockIdx.x], scale = weight / row.sum;
    if (threadIdx.x == 0) losses[blockIdx.x] = row.loss(target_logit);

    const int whole = V / SIZE * SIZE;
#pragma unroll 4
    for (int c = threadIdx.x * SIZE; c < whole; c += blockDim.x * SIZE) {
        Pack<T> pack = load_pack(z + c);
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            pack[i] = from_float<T>(scale * exp2f((to_float(pack[i]) - row.highest) * LOG2E));
        store_pack(z + c, pack);
    }
    for (int c = whole + threadIdx.x; c < Vp; c += blockDim.x)
        z[c] = from_float<T>(c < V ? scale * exp2f((to_float(z[c]) - row.highest) * LOG2E) : 0.0f);
    __syncthreads();
    if (threadIdx.x == 0 && valid)                          // the one column where onehot is not 0
        z[target] = from_float<T>(scale * exp2f((target_logit - row.highest) * LOG2E) - weight);
}

// ---- Version 3: the row stays in shared memory between the passes ----------------------------------------
//
// So it is read from memory once. cp.async brings all of it in, without registers; every thread then works on
// the packs that it asked for itself. The padding becomes -inf there, whose probability and gradient are 0 in
// the same formulas. Two blocks on a multiprocessor: one computes while the other waits for memory. 3437 ->
// 4053 GB/s.

template <typename T>
__global__ void __launch_bounds__(768, 2)
classifier(float* losses, T* logits, const int* targets, const float* weights, int V, int Vp) {
    constexpr int SIZE = Pack<T>::size;
    extern __shared__ __align__(16) unsigned char shared_memory[];
    T* z = reinterpret_cast<T*>(shared_memory);             // (Vp,)
    T* out = logits + size_t(blockIdx.x) * Vp;
    const int first = threadIdx.x * SIZE, step = blockDim.x * SIZE;
    for (int c = first; c < Vp; c += step) cp_async_16(z + c, out + c, 16);
    cp_async_commit();
    const int target = targets[blockIdx.x];
    const float weight = weights[blockIdx.x];
    cp_async_wait<0>();

    Softmax row = {LOWEST, 0.0f};
    for (int c = first; c < Vp; c += step) {
        Pack<T> pack = load_pack(z + c);
        if (c + SIZE > V) {
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                if (c + i >= V) pack[i] = from_float<T>(MINUS_INFINITY);
            store_pack(z + c, pack);
        }
#pragma unroll
        for (int i = 0; i < SIZE; i++) row.highest = fmaxf(row.highest, to_float(pack[i]));
    }
    row.highest = block_max(row.highest);
    for (int c = first; c < Vp; c += step) {
        const Pack<T> pack = load_pack(z + c);
#pragma unroll
        for (int i = 0; i < SIZE; i++) row.sum += exp2f((to_float(pack[i]) - row.highest) * LOG2E);
    }
    row.sum = block_sum(row.sum);

    const bool valid = target >= 0 && target < V;
    const float logit = valid ? to_float(z[target]) : not_a_number();
    const float scale = weight / row.sum;
    if (threadIdx.x == 0) losses[blockIdx.x] = row.loss(logit);
    for (int c = first; c < Vp; c += step) {
        Pack<T> pack = load_pack(z + c);
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            pack[i] = from_float<T>(scale * exp2f((to_float(pack[i]) - row.highest) * LOG2E));
        if (valid && target >= c && target < c + SIZE)      // the one column where onehot is not 0
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                if (c + i == target)
                    pack[i] = from_float<T>(scale * exp2f((logit - row.highest) * LOG2E) - weight);
        store_pack(out + c, pack);
    }
}

// ---- Evaluation: the losses alone, logits stay as they are -----------------------------------------------

template <typename T>
__global__ void cross_entropy_naive(float* losses, const T* logits, const int* targets, int N, int V, int Vp) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const T* z = logits + size_t(n) * Vp;
    const int target = targets[n];
    const float logit = target >= 0 && target < V ? to_float(z[target]) : not_a_number();
    losses[n] = softmax_naive(z, V).loss(logit);
}

// Version 2 reads each row once, which is the floor: N V sizeof(T) bytes. Nothing is read again, so keeping the
// row in shared memory would win nothing. On an H200 on 2026-11-27 (5,336 rows of 50,304, bf16): 135 us, 3976
// GB/s, with 512 threads as with 256; 149.5 us with 1024.
template <typename T>
__global__ void __launch_bounds__(1024)
cross_entropy(float* losses, const T* logits, const int* targets, int V, int Vp) {
    const T* z = logits + size_t(blockIdx.x) * Vp;
    const int target = targets[blockIdx.x];
    const Softmax row = row_softmax(z, V);
    if (threadIdx.x == 0)
        losses[blockIdx.x] = row.loss(target >= 0 && target < V ? to_float(z[target]) : not_a_number());
}

// ---- total (1,) += sum of values (N,) * weights (N,): the loss of a micro-batch --------------------------

// One version: one block, so that the order of the sum is always the same. Of 64 x 1024 tokens a thread adds up
// 64, a few microseconds, once in a micro-batch.
__global__ void __launch_bounds__(1024)
weighted_sum(float* total, const float* values, const float* weights, int N) {
    float sum = 0.0f;
#pragma unroll 8
    for (int i = threadIdx.x; i < N; i += blockDim.x) sum += values[i] * weights[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) total[0] += sum;
}
