// The global norm of the gradients, and the plan of the update: whether it is made at all, how much the
// gradients are clipped, and AdamW's bias corrections. Everything stays in device memory, where adamw.cu reads
// it, so the host waits for nothing. Read common.cuh before and adamw.cu after.
//
//   kernel              grid   block   shared  workspace
//   global_norm_naive   1      1024    0       none
//   square_sums         1024   256     0       partials: 1024 float32, one per block
//   global_norm_finish  1      1024    0       reads them; its argument `count` is the grid of square_sums
//   plan_update         1      32      0       none
//
// The grid does not depend on the card, so neither does the order of the sum.
//
// The floor is set by the memory: 4 n bytes, 2 FLOP each. The second launch adds a few microseconds.

#include "common.cuh"

// ---- norm = sqrt(sum of squares of the n gradients, float32, n below 2^31) -------------------------------

// Version 1: one block walks everything, so 131 of an H200's 132 multiprocessors are idle.
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
    const size_t packs = n / 4;                             // n is a multiple of 4
    float sum[4] = {};
    size_t i = thread;                                      // a pack; the thread's next is i + threads
    for (; i + LOADS * threads <= packs; i += LOADS * threads) {
        Pack<float> g[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) g[k] = load_pack(grads + (i + k * threads) * 4);
#pragma unroll
        for (int k = 0; k < LOADS; k++)
            for (int j = 0; j < 4; j++) sum[j] += g[k][j] * g[k][j];
    }
    for (; i < packs; i += threads) {                       // up to four packs are left
        const Pack<float> g = load_pack(grads + i * 4);
        for (int j = 0; j < 4; j++) sum[j] += g[j] * g[j];
    }
    const float total = block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}
__global__ void global_norm_finish(float* norm, const float* partials, int count) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) norm[0] = sqrtf(sum);
}

// ---- update (4,) = [clip, learning rate, 1 - beta1^steps, 1 - beta2^steps] -------------------------------
//
//   settings (4,) = [learning rate, max_norm, norm_limit, loss_limit]    norm, loss (1,)    steps (1,) int32
//
// clip = min(1, max_norm / norm), or -1, "leave this step out", if norm or loss is not finite or above its
// limit. `steps` counts the steps that are taken. One thread and one version: the time is that of a launch. NaN
// fails every comparison, and so leaves the step out. The powers are computed in double: with beta2 = 0.999,
// 1 - beta2^1 in float32 would have four digits instead of seven.
__global__ void plan_update(float* update, int* steps, const float* norm, const float* loss,
                            const float* settings, double beta1, double beta2) {
    constexpr float LARGEST = 3.4028234e38f;
    if (threadIdx.x > 0) return;
    const float lr = settings[0], max_norm = settings[1], norm_limit = settings[2], loss_limit = settings[3];
    const bool norm_is_good = norm[0] <= fminf(norm_limit, LARGEST);
    const bool loss_is_good = fabsf(loss[0]) <= LARGEST && loss[0] <= loss_limit;
    const bool taken = norm_is_good && loss_is_good;
    const int count = steps[0] + (taken ? 1 : 0);
    steps[0] = count;
    update[0] = taken ? fminf(1.0f, max_norm / fmaxf(norm[0], 1e-30f)) : -1.0f;
    update[1] = lr;
    update[2] = 1.0 - pow(beta1, double(count));
    update[3] = 1.0 - pow(beta2, double(count));
}
