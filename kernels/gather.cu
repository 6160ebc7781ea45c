// Rows of an array, picked by number: the last token of every prompt, a cache whose finished rows are
// dropped. Read common.cuh before.
//
//   out (R, C) of S = inp[rows]    inp (N, .) of S, its rows `stride` elements apart    rows (R,) int32, below N
//
//   kernel        grid                                    block  shared  workspace
//   take_rows<S>  (R, ceil(C / (256 * 16/sizeof(S))))     256    0       none
//
// R may be all the tokens of a batch, and only the first of a grid's sizes may exceed 65535. Bandwidth alone:
// 2 R C sizeof(S) bytes.

#include "common.cuh"

// 16 bytes per thread, or element by element where rows are not aligned. One version: each byte moves once, the
// floor, and the naive one is the last line below.
template <typename S>
__global__ void __launch_bounds__(256)
take_rows(S* out, const S* inp, const int* rows, int C, int stride) {
    constexpr int SIZE = Pack<S>::size;
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * SIZE;
    if (c >= C) return;
    const S* from = inp + size_t(rows[blockIdx.x]) * stride + c;
    S* to = out + size_t(blockIdx.x) * C + c;
    if (aligned(out, C) && aligned(inp, stride)) store_pack(to, load_pack(from));
    else for (int i = 0; i < min(SIZE, C - c); i++) to[i] = from[i];
}
