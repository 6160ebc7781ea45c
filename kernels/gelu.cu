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
// n, the number of elements, is below 2^31. Arrays that begin on 16-byte boundaries are fast, others work.

#include "common.cuh"

constexpr int PACKS = 2;                                    // per thread, all loaded before the first is used

// The elements of a block: `first` up to `last`. If the block is `whole`, thread i takes the i-th pack and
// the one that lies blockDim.x packs further on, so that neighbours in a warp read neighbouring packs. The
// block at the end, and misaligned arrays, are walked element by element.
struct Share {
    size_t first, last;
    bool whole;
};
template <typename T> __device__ inline Share block_share(int n, bool packed) {
    const size_t length = size_t(blockDim.x) * PACKS * Pack<T>::size, first = blockIdx.x * length;
    const bool whole = packed && first + length <= n;
    return {first, whole ? first + length : n, whole};
}

// ---- out = gelu(inp) --------------------------------------------------------------------------------------

// Rung 1: one element per thread.
template <typename T> __global__ void gelu_forward_naive(T* out, const T* inp, int n) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) out[i] = from_float<T>(gelu(to_float(inp[i])));
}

// Rung 2: 16 bytes per access, and two loads under way at once. Won: not measured yet.
template <typename T> __global__ void __launch_bounds__(256) gelu_forward(T* out, const T* inp, int n) {
    const Share share = block_share<T>(n, aligned(out, 0) && aligned(inp, 0));
    if (!share.whole) {
        for (size_t i = share.first + threadIdx.x; i < share.last; i += blockDim.x)
            out[i] = from_float<T>(gelu(to_float(inp[i])));
        return;
    }
    const size_t start = share.first + threadIdx.x * Pack<T>::size, step = blockDim.x * Pack<T>::size;
    Pack<T> x[PACKS];
#pragma unroll
    for (int j = 0; j < PACKS; j++) x[j] = load_pack(inp + start + j * step);
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
#pragma unroll
        for (int i = 0; i < Pack<T>::size; i++) x[j][i] = from_float<T>(gelu(to_float(x[j][i])));
        store_pack(out + start + j * step, x[j]);
    }
}

// ---- dinp = dout * gelu'(inp), overwritten; dinp may be dout ----------------------------------------------

// Rung 1: one element per thread.
template <typename T> __global__ void gelu_backward_naive(T* dinp, const T* dout, const T* inp, int n) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) dinp[i] = from_float<T>(to_float(dout[i]) * gelu_grad(to_float(inp[i])));
}

// Rung 2: 16 bytes per access, and four loads under way at once. Won: not measured yet.
template <typename T>
__global__ void __launch_bounds__(256) gelu_backward(T* dinp, const T* dout, const T* inp, int n) {
    const Share share = block_share<T>(n, aligned(dinp, 0) && aligned(dout, 0) && aligned(inp, 0));
    if (!share.whole) {
        for (size_t i = share.first + threadIdx.x; i < share.last; i += blockDim.x)
            dinp[i] = from_float<T>(to_float(dout[i]) * gelu_grad(to_float(inp[i])));
        return;
    }
    const size_t start = share.first + threadIdx.x * Pack<T>::size, step = blockDim.x * Pack<T>::size;
    Pack<T> x[PACKS], dy[PACKS];
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        x[j] = load_pack(inp + start + j * step);
        dy[j] = load_pack(dout + start + j * step);
    }
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
#pragma unroll
        for (int i = 0; i < Pack<T>::size; i++)
            dy[j][i] = from_float<T>(to_float(dy[j][i]) * gelu_grad(to_float(x[j][i])));
        store_pack(dinp + start + j * step, dy[j]);
    }
}

// ---- out = inp1 + inp2; out may be inp1 -------------------------------------------------------------------

// Rung 1: one element per thread.
template <typename T> __global__ void residual_forward_naive(T* out, const T* inp1, const T* inp2, int n) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) out[i] = from_float<T>(to_float(inp1[i]) + to_float(inp2[i]));
}

// Rung 2: 16 bytes per access, and four loads under way at once. Won: not measured yet.
template <typename T>
__global__ void __launch_bounds__(256) residual_forward(T* out, const T* inp1, const T* inp2, int n) {
    const Share share = block_share<T>(n, aligned(out, 0) && aligned(inp1, 0) && aligned(inp2, 0));
    if (!share.whole) {
        for (size_t i = share.first + threadIdx.x; i < share.last; i += blockDim.x)
            out[i] = from_float<T>(to_float(inp1[i]) + to_float(inp2[i]));
        return;
    }
    const size_t start = share.first + threadIdx.x * Pack<T>::size, step = blockDim.x * Pack<T>::size;
    Pack<T> x[PACKS], y[PACKS];
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        x[j] = load_pack(inp1 + start + j * step);
        y[j] = load_pack(inp2 + start + j * step);
    }
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
#pragma unroll
        for (int i = 0; i < Pack<T>::size; i++)
            x[j][i] = from_float<T>(to_float(x[j][i]) + to_float(y[j][i]));
        store_pack(out + start + j * step, x[j]);
    }
}
