// One AdamW step over the flat buffers: master parameters, gradients and both moments, all float32. One pass:
// it updates, writes the bf16 copy that the forward pass reads, and clears the gradients for the next step.
// Read adamw in kernels/reference.py before; norm.cu's plan_update makes `update`.
//
//   kernel       grid                 block   shared  workspace
//   adamw_naive  ceil(n / 256)        256     0       none
//   adamw        ceil(n / (256 * 8))  256     0       none
//
// update (4,) float32 = [clip, lr, 1 - beta1^steps, 1 - beta2^steps] lies in device memory. Where clip is
// negative the step is left out: params, m and v stay as they are. copy, bf16, may be null. n is below 2^31;
// in the second version it is a multiple of 8, and all arrays begin on 16-byte boundaries.
//
// The floor is set by the memory: 34 bytes a parameter (params, grads, m and v read and written, copy written) for
// 15 FLOP, one root and one division: 0.9 ms for GPT-2 small on an H200. Nothing is touched twice.

#include "common.cuh"

// What is the same for all parameters:
//   decay = 1 - lr * weight_decay    step_size = lr * sqrt(1 - beta2^steps) / (1 - beta1^steps)
//   epsilon = eps * sqrt(1 - beta2^steps)
struct Rule { float clip, beta1, beta2, decay, step_size, epsilon; };
__device__ inline Rule rule_of(const float* update, float beta1, float beta2, float eps, float weight_decay) {
    const float clip = update[0], lr = update[1], correction1 = update[2], root = sqrtf(update[3]);
    return {clip, beta1, beta2, 1.0f - lr * weight_decay, lr * root / correction1, eps * root};
}

// With g = clip * grad, both moments move towards g and g^2, and the parameter follows; the corrections of
// the moments' bias are inside step_size and epsilon.
__device__ inline float updated(const Rule& rule, float p, float g, float& m, float& v) {
    m = rule.beta1 * m + (1.0f - rule.beta1) * g;
    v = rule.beta2 * v + (1.0f - rule.beta2) * g * g;
    return rule.decay * p - rule.step_size * (m / (sqrtf(v) + rule.epsilon));
}

// Version 1: one parameter per thread.
__device__ inline void adamw_one(const Rule& rule, float* params, float* grads, float* m, float* v,
                                 bf16* copy, size_t i) {
    if (rule.clip >= 0.0f) params[i] = updated(rule, params[i], rule.clip * grads[i], m[i], v[i]);
    if (copy != nullptr) copy[i] = from_float<bf16>(params[i]);
    grads[i] = 0.0f;
}
__global__ void adamw_naive(float* params, float* grads, float* m, float* v, bf16* copy, const float* update,
                            float beta1, float beta2, float eps, float weight_decay, int n) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) adamw_one(rule_of(update, beta1, beta2, eps, weight_decay), params, grads, m, v, copy, i);
}

// Version 2: eight parameters per thread, as two packs of four; eight 16-byte loads are under way at once. (Two
// blocks per multiprocessor in __launch_bounds__ give the compiler the registers for that.) 3702 -> 3988 GB/s
// on an H200 (124 million parameters).
__global__ void __launch_bounds__(256, 2)
adamw(float* params, float* grads, float* m, float* v, bf16* copy, const float* update, float beta1,
      float beta2, float eps, float weight_decay, int n) {
    constexpr int PACKS = 2;
    const Rule rule = rule_of(update, beta1, beta2, eps, weight_decay);
    const size_t step = blockDim.x * 4, first = blockIdx.x * PACKS * step, last = first + PACKS * step;
    if (last > n) {                                         // the last block
        for (size_t i = first + threadIdx.x; i < n; i += blockDim.x)
            adamw_one(rule, params, grads, m, v, copy, i);
        return;
    }
    const size_t start = first + threadIdx.x * 4;
    Pack<float> p4[PACKS], g4[PACKS], m4[PACKS], v4[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {                       // before clip is known: these loads wait for nothing
        p4[k] = load_pack(params + start + k * step);
        g4[k] = load_pack(grads + start + k * step);
        m4[k] = load_pack(m + start + k * step);
        v4[k] = load_pack(v + start + k * step);
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const size_t i = start + k * step;
        if (rule.clip >= 0.0f) {
#pragma unroll
            for (int j = 0; j < 4; j++)
                p4[k][j] = updated(rule, p4[k][j], rule.clip * g4[k][j], m4[k][j], v4[k][j]);
            store_pack(params + i, p4[k]);
            store_pack(m + i, m4[k]);
            store_pack(v + i, v4[k]);
        }
        if (copy != nullptr) {
            union { uint2 bits; bf16 value[4]; } rounded = {};
#pragma unroll
            for (int j = 0; j < 4; j++) rounded.value[j] = from_float<bf16>(p4[k][j]);
            *reinterpret_cast<uint2*>(copy + i) = rounded.bits;
        }
        store_pack(grads + i, Pack<float>{});               // zeros
    }
}
