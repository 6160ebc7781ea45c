// One AdamW step over the flat buffers: master parameters, gradients and both moments, all float32. One pass:
// it updates, writes the bf16 copy that the forward pass reads, and clears the gradients for the next step.
// Read kernels/cpu.py's adamw before; norm.cu makes the clip scale.
//
//   kernel       grid                 block   shared  workspace
//   adamw_naive  ceil(n / 256)        256     0       none
//   adamw        ceil(n / (256 * 8))  256     0       none
//
// The host passes what is the same for all parameters, computed in float64:
//   decay = 1 - lr * weight_decay    step_size = lr * sqrt(1 - beta2^step) / (1 - beta1^step)
//   epsilon = eps * sqrt(1 - beta2^step)
// copy, bf16, may be null. n is below 2^31. Groups of parameters that begin on multiples of 8 elements are
// fast.
//
// The floor is the memory's: 34 bytes a parameter (params, grads, m and v read and written, copy written) for
// 15 FLOP, one root and one division: 0.9 ms for GPT-2 small on an H200. Nothing is touched twice.

#include "common.cuh"

// With g = scale * grad, both moments move towards g and g^2, and the parameter follows; the corrections of
// the moments' bias are inside step_size and epsilon.
__device__ inline float adamw_update(float p, float g, float& m, float& v, float beta1, float beta2,
                                     float decay, float step_size, float epsilon) {
    m = beta1 * m + (1.0f - beta1) * g;
    v = beta2 * v + (1.0f - beta2) * g * g;
    return decay * p - step_size * (m / (sqrtf(v) + epsilon));
}

// Version 1: one parameter per thread. A scale below zero leaves params, m and v as they are.
__device__ inline void adamw_one(float* params, float* grads, float* m, float* v, bf16* copy, float scale,
                                 float beta1, float beta2, float decay, float step_size, float epsilon,
                                 size_t i) {
    if (scale >= 0.0f) {
        params[i] = adamw_update(params[i], scale * grads[i], m[i], v[i], beta1, beta2, decay, step_size,
                                 epsilon);
    }
    if (copy != nullptr) copy[i] = from_float<bf16>(params[i]);
    grads[i] = 0.0f;
}
__global__ void adamw_naive(float* params, float* grads, float* m, float* v, bf16* copy, const float* scale,
                            float beta1, float beta2, float decay, float step_size, float epsilon, int n) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) adamw_one(params, grads, m, v, copy, scale[0], beta1, beta2, decay, step_size, epsilon, i);
}

// Version 2: eight parameters per thread, as two packs of four; eight 16-byte loads are under way at once. (Two
// blocks per multiprocessor in __launch_bounds__ give the compiler the registers for that.) 3702 -> 3988 GB/s
// on an H200 (124 million parameters).
__global__ void __launch_bounds__(256, 2)
adamw(float* params, float* grads, float* m, float* v, bf16* copy, const float* scale, float beta1,
      float beta2, float decay, float step_size, float epsilon, int n) {
    constexpr int PACKS = 2;
    const float clip = scale[0];
    const size_t step = blockDim.x * 4, first = blockIdx.x * PACKS * step, last = first + PACKS * step;
    if (last > n || !aligned(params, 0) || !aligned(grads, 0) || !aligned(m, 0) || !aligned(v, 0) ||
        !aligned(copy, 0)) {
        for (size_t i = first + threadIdx.x; i < n && i < last; i += blockDim.x)
            adamw_one(params, grads, m, v, copy, clip, beta1, beta2, decay, step_size, epsilon, i);
        return;
    }
    const size_t start = first + threadIdx.x * 4;
    Pack<float> p4[PACKS], g4[PACKS], m4[PACKS], v4[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {                       // before clip is looked at: nothing waits for it
        p4[k] = load_pack(params + start + k * step);
        g4[k] = load_pack(grads + start + k * step);
        m4[k] = load_pack(m + start + k * step);
        v4[k] = load_pack(v + start + k * step);
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const size_t i = start + k * step;
        if (clip >= 0.0f) {
#pragma unroll
            for (int j = 0; j < 4; j++)
                p4[k][j] = adamw_update(p4[k][j], clip * g4[k][j], m4[k][j], v4[k][j], beta1, beta2, decay,
                                        step_size, epsilon);
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
