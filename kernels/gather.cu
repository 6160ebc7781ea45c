// Rows of an array, picked by number: the last token of every prompt, a cache whose finished rows are
// dropped. Read common.cuh before.
//
//   out (R, C) of S = inp[rows]    inp (N, .) of S, its rows `stride` elements apart    rows (R,) int32, below N
//
//   kernel              grid                                  block  shared  workspace
//   take_rows_naive<S>  (R, ceil(C / 256))                    256    0       none
//   take_rows<S>        (R, ceil(C / (256 * 16/sizeof(S))))   256    0       none
//
// R may be all the tokens of a batch, and only the first of a grid's sizes may exceed 65535. Bandwidth alone:
// 2 R C sizeof(S) bytes.

#include "common.cuh"

// Version 1: one element per thread.
template <typename S>
__global__ void take_rows_naive(S* out, const S* inp, const int* rows, int C, int stride) {
    const int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c < C) out[size_t(blockIdx.x) * C + c] = inp[size_t(rows[blockIdx.x]) * stride + c];
}

// Version 2: 16 bytes per thread. C and stride are multiples of that. Each byte moves once, the floor.
template <typename S>
__global__ void __launch_bounds__(256)
take_rows(S* out, const S* inp, const int* rows, int C, int stride) {
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * Pack<S>::size;
    if (c >= C) return;
    store_pack(out + size_t(blockIdx.x) * C + c, load_pack(inp + size_t(rows[blockIdx.x]) * stride + c));
}
