// What every kernel file shares: 16-byte loads and stores, reductions over a warp and over a block,
// conversions between storage type and float32, and GELU. Read this first; ptx.cuh has the instructions that
// C++ cannot express.
//
// House rules. Storage is `T`, float or bf16; arithmetic is float32. A kernel takes its sizes as int and
// computes offsets in size_t where they may pass 2^31. Nothing is added atomically: every sum has a fixed
// order, so that the same launch gives the same bits. Only cuda_bf16.h is included: NVRTC has no host
// headers. Constants of a file are inline, because NVRTC warns of any other constant that no kernel uses.

#pragma once
#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;
using uint32_t = unsigned int;

inline constexpr int WARP = 32;           // threads per warp
inline constexpr unsigned ALL_LANES = 0xffffffffu;
#define MINUS_INFINITY __int_as_float(0xff800000)          // INFINITY is a host header's
inline constexpr float LOG2E = 1.4426950408889634f;         // e^x = 2^(x log2(e)), and 2^x is one instruction
inline constexpr float LN2 = 0.6931471805599453f;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- Storage and arithmetic ------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// Two floats as bf16 in the two halves of a register, and back: what tensor cores and ldmatrix handle.
__device__ inline uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline float2 unpack_bf16(uint32_t pair) {
    return make_float2(__int_as_float(pair << 16), __int_as_float(pair & 0xffff0000u));
}

// ---- 16 bytes at a time: 4 floats or 8 bf16 --------------------------------------------------------------

// A warp that loads packs asks for 512 contiguous bytes in one instruction, which is what it takes to keep
// the memory busy. The address must be a multiple of 16: where the rows of an array are not, cuda.py launches
// the first version of a kernel, which moves elements.
template <typename T> struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T value[size];
    __device__ T& operator[](int i) { return value[i]; }
    __device__ const T& operator[](int i) const { return value[i]; }
};

template <typename T> __device__ inline Pack<T> load_pack(const T* address) {
    union { int4 bits; Pack<T> pack; } u = {*reinterpret_cast<const int4*>(address)};
    return u.pack;
}
template <typename T> __device__ inline void store_pack(T* address, const Pack<T>& pack) {
    *reinterpret_cast<int4*>(address) = *reinterpret_cast<const int4*>(&pack);
}
// The floats of a pack. Two bf16 come out of a register by a shift and a mask.
template <typename T> __device__ inline void to_floats(float (&x)[Pack<T>::size], const Pack<T>& pack) {
    if constexpr (sizeof(T) == 2) {
        for (int i = 0; i < Pack<T>::size; i += 2) {
            const float2 pair = unpack_bf16(reinterpret_cast<const uint32_t*>(&pack)[i / 2]);
            x[i] = pair.x, x[i + 1] = pair.y;
        }
    } else {
        for (int i = 0; i < Pack<T>::size; i++) x[i] = pack[i];
    }
}
// The pack of these floats. Two are rounded to bf16 by one fast instruction; the one that rounds a single float
// has an eighth of its rate.
template <typename T> __device__ inline Pack<T> rounded_pack(const float (&x)[Pack<T>::size]) {
    Pack<T> pack;
    if constexpr (sizeof(T) == 2) {
        for (int i = 0; i < Pack<T>::size; i += 2) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], x[i + 1]);
            pack[i] = pair.x, pack[i + 1] = pair.y;
        }
    } else {
        for (int i = 0; i < Pack<T>::size; i++) pack[i] = x[i];
    }
    return pack;
}

// ---- Reductions: every lane, or every thread, gets the result --------------------------------------------

__device__ inline float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// Over a block of one dimension, whose size is a multiple of 32: first inside each warp, then every warp
// reduces the (at most 32) results of the warps. All threads of the block must call it.
__device__ inline float block_sum(float x) {
    __shared__ float partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();                                        // the previous call has been read
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? partial[lane] : 0.0f);
}
__device__ inline float block_max(float x) {
    __shared__ float partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? partial[lane] : MINUS_INFINITY);
}

// ---- Several blocks that work on one result --------------------------------------------------------------

// Whether this is the last of n blocks that have left their parts in global memory, and may read those of all. The
// counter is zero before, and afterwards. All threads of the block must call it.
__device__ inline bool is_last_block(unsigned* finished, int n) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();                                    // this part is there before it is counted,
        last = atomicInc(finished, n - 1) == n - 1;         // which leaves 0 for the next launch,
        __threadfence();                                    // and no part is read before
    }
    __syncthreads();
    return last;
}

// ---- Which of attention's two backward passes a kernel is: attention_backward.cu says more ---------------

enum Owner { KEYS, QUERIES };

// ---- GELU, the tanh form that GPT-2 was trained with -----------------------------------------------------

// gelu(x) = 0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3). Since 0.5 (1 + tanh(u)) =
// sigmoid(2u), one exponential does it, and nothing cancels: gelu(x) = x / (1 + exp(-2u)). For u -> -inf the
// quotient is 0, as it should. __fdividef is two instructions where `/`, exact to the last bit, is ten: at
// the memory's rate an H200 has 24 for an element of bf16. (One tanh.approx would do for exponential and
// quotient, but is off by 2^-11: a fifth of gelu(-3).)
inline constexpr float GELU_SCALE = 0.7978845608028654f;    // sqrt(2 / pi)
inline constexpr float GELU_CUBE = 0.044715f;

__device__ inline float gelu_sigmoid(float x) {             // sigmoid(2u)
    constexpr float A = -2.0f * GELU_SCALE * LOG2E;         // exp(-2u) is 2^(A (x + 0.044715 x^3))
    return __fdividef(1.0f, 1.0f + exp2f(x * (A + A * GELU_CUBE * x * x)));
}
__device__ inline float gelu(float x) { return x * gelu_sigmoid(x); }

// d gelu / dx = s + x s (1 - s) 2 du/dx, with s = sigmoid(2u).
__device__ inline float gelu_grad(float x) {
    const float s = gelu_sigmoid(x);
    return s + x * s * (1.0f - s) * 2.0f * GELU_SCALE * (1.0f + 3.0f * GELU_CUBE * x * x);
}
