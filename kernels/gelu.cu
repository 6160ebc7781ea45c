// Elementwise: GELU forward and backward, and the sum of two residual branches. Training fuses them into the
// matmuls and the layernorms; these are the reference of the fused ones, and what recomputation uses.
// Read common.cuh (which defines gelu and gelu_grad) before.
//
//   kernel                     grid                                block   shared  workspace
//   gelu_forward_naive<T>      ceil(n / 256)                       256     0       none
//   gelu_forward<T>            ceil(n / (256 * 2 * 16/sizeof(T)))  256     0       none
//   gelu_backward_naive<T>     ceil(n / 256)                       256     0       none
//   gelu_backward<T>           as gelu_forward                     256     0       none
//   residual_forward_naive<T>  ceil(n / 256)                       256     0       none
//   residual_forward<T>        as gelu_forward                     256     0       none
//
// n, the number of elements, is below 2^31. Version 2 wants arrays that begin on 16-byte boundaries.
//
// The floor is set by the memory: 2 n sizeof(T) bytes for gelu_forward, 3 n sizeof(T) for the others. About 11
// instructions an element, 21 with the slope, are hidden behind that, in bf16 only just. On top of the floor
// comes what the first and the last blocks of a launch leave idle.

#include "common.cuh"

// ---- What all three share: out[i] = f(a[i], b[i]); out may be a or b -------------------------------------

// An operation of one array gives it twice; its f ignores y, and the compiler leaves those loads out.

// Version 1: one element per thread.
template <typename T, typename F>
__device__ inline void each_naive(T* out, const T* a, const T* b, int n, const F& f) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) out[i] = from_float<T>(f(to_float(a[i]), to_float(b[i])));
}

// Version 2: 16 bytes per access, and PACKS of each array under way at once: thread i takes the block's i-th
// pack and the one blockDim.x packs further on, so that neighbours in a warp read neighbouring packs. The last
// block walks its elements one by one. On an H200 (16,384 rows of 3,072, bf16) gelu_forward 1464 -> 3875 GB/s,
// gelu_backward 1964 -> 4052, residual_forward 2070 -> 4078.
inline constexpr int PACKS = 2;

template <typename T, typename F>
__device__ inline void each(T* out, const T* a, const T* b, int n, const F& f) {
    constexpr int SIZE = Pack<T>::size;
    const size_t step = blockDim.x * SIZE, first = blockIdx.x * PACKS * step, last = first + PACKS * step;
    if (last > n) {
        for (unsigned i = first + threadIdx.x; i < n; i += blockDim.x)
            out[i] = from_float<T>(f(to_float(a[i]), to_float(b[i])));
        return;
    }
    const size_t start = first + threadIdx.x * SIZE;
    Pack<T> x[PACKS], y[PACKS];
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        x[j] = load_pack(a + start + j * step);
        y[j] = load_pack(b + start + j * step);
    }
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
#pragma unroll
        for (int i = 0; i < SIZE; i++) x[j][i] = from_float<T>(f(to_float(x[j][i]), to_float(y[j][i])));
        store_pack(out + start + j * step, x[j]);
    }
}

// ---- out = gelu(inp) -------------------------------------------------------------------------------------

struct Gelu {
    __device__ float operator()(float x, float) const { return gelu(x); }
};
template <typename T> __global__ void gelu_forward_naive(T* out, const T* inp, int n) {
    each_naive(out, inp, inp, n, Gelu());
}
template <typename T> __global__ void __launch_bounds__(256) gelu_forward(T* out, const T* inp, int n) {
    each(out, inp, inp, n, Gelu());
}

// ---- dinp = dout * gelu'(inp), overwritten; dinp may be dout ---------------------------------------------

struct GeluGrad {
    __device__ float operator()(float dy, float x) const { return dy * gelu_grad(x); }
};
template <typename T> __global__ void gelu_backward_naive(T* dinp, const T* dout, const T* inp, int n) {
    each_naive(dinp, dout, inp, n, GeluGrad());
}
template <typename T>
__global__ void __launch_bounds__(256) gelu_backward(T* dinp, const T* dout, const T* inp, int n) {
    each(dinp, dout, inp, n, GeluGrad());
}

// ---- out = inp1 + inp2; out may be inp1 ------------------------------------------------------------------

struct Sum {
    __device__ float operator()(float x, float y) const { return x + y; }
};
template <typename T> __global__ void residual_forward_naive(T* out, const T* inp1, const T* inp2, int n) {
    each_naive(out, inp1, inp2, n, Sum());
}
template <typename T>
__global__ void __launch_bounds__(256) residual_forward(T* out, const T* inp1, const T* inp2, int n) {
    each(out, inp1, inp2, n, Sum());
}
