// The global norm of the gradients, and the factor that clips them. Both results stay in device memory, where
// adamw.cu reads the factor: the GPU never waits for Python. Read common.cuh before and adamw.cu after.
//
//   kernel              grid   block   shared  workspace
//   global_norm_naive   1      1024    0       none
//   square_sums         1024   256     0       partials: 1024 float32, one per block
//   global_norm_finish  1      1024    0       reads them; its argument `count` is the grid of square_sums
//   clip_scale          1      32      0       none
//
// The grid does not depend on the card, so neither does the order of the sum.
//
// The floor is the memory's: 4 n bytes, 2 FLOP each. Above it by the second launch, a few microseconds.

#include "common.cuh"

// ---- norm = sqrt(sum of squares of the n gradients, float32, n below 2^31) -------------------------------

// Version 1: one block walks everything, so 131 of 132 multiprocessors watch.
__global__ void global_norm_naive(float* norm, const float* grads, int n) {
    float sum = 0.0f;
    for (size_t i = threadIdx.x; i < n; i += blockDim.x) sum += grads[i] * grads[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) norm[0] = sqrtf(sum);
}

// Version 2: two stages. Every block sums its share, four 16-byte loads under way at once; then one block adds
// up the blocks. No atomics, so the order is always the same. 11 -> 4247 GB/s on an H200 (124 million).
__global__ void __launch_bounds__(256) square_sums(float* partials, const float* grads, int n) {
    constexpr int LOADS = 4;
    const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t threads = size_t(gridDim.x) * blockDim.x;
    const size_t packs = aligned(grads, 0) ? n / 4 : 0;
    float sum[4] = {};
    size_t i = thread;                                      // a pack; the thread's next is i + threads
    for (; i + (LOADS - 1) * threads < packs; i += LOADS * threads) {
        Pack<float> g[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) g[k] = load_pack(grads + (i + k * threads) * 4);
#pragma unroll
        for (int k = 0; k < LOADS; k++)
            for (int j = 0; j < 4; j++) sum[j] += g[k][j] * g[k][j];
    }
    for (; i < packs; i += threads) {                       // up to three packs are left
        const Pack<float> g = load_pack(grads + i * 4);
        for (int j = 0; j < 4; j++) sum[j] += g[j] * g[j];
    }
    for (i = packs * 4 + thread; i < n; i += threads) sum[0] += grads[i] * grads[i];
    const float total = block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}
__global__ void global_norm_finish(float* norm, const float* partials, int count) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) norm[0] = sqrtf(sum);
}

// ---- scale = what clips the gradients to max_norm, or -1, "leave this step out" --------------------------

// One thread, one version: the launch is all there is to win. A norm above `limit`, infinite or NaN (which no
// comparison lets through) leaves the step out.
__global__ void clip_scale(float* scale, const float* norm, float max_norm, float limit) {
    constexpr float LARGEST = 3.4028234e38f;
    if (threadIdx.x == 0)
        scale[0] = norm[0] <= fminf(limit, LARGEST) ? fminf(1.0f, max_norm / fmaxf(norm[0], 1e-30f)) : -1.0f;
}
