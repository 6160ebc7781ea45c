// What matmul.cu and matmul_hopper.cu share: the names of the epilogues, and the order of the tiles.

#pragma once
#include "common.cuh"

// What happens to a product x = A @ B on its way to memory. `extra` has the shape of out.
//   STORE           out = x                        ACCUMULATE      out += x
//   BIAS            out = x + bias                 BIAS_RESIDUAL   out = x + bias + extra
//   BIAS_GELU       extra = x + bias, out = gelu(extra)            GELU_GRAD       out = x * gelu'(extra)
enum Epilogue { STORE, BIAS, BIAS_GELU, BIAS_RESIDUAL, GELU_GRAD, ACCUMULATE };
template <Epilogue E> inline constexpr bool ADDS_BIAS = E == BIAS || E == BIAS_GELU || E == BIAS_RESIDUAL;

// Which tile of BM x BN outputs is number `index`. Tiles are computed in the order of their numbers, so
// neighbours in number should share rows of A and columns of B in the L2 cache: 16 tiles down, then one
// column to the right.
struct Tile { int m, n; };
template <int BM, int BN>
__device__ inline Tile tile_of(int index, int M, int N) {
    constexpr int DOWN = 16;
    const int band_size = DOWN * ceil_div(N, BN), band = index / band_size, inside = index % band_size;
    const int height = min(DOWN, ceil_div(M, BM) - band * DOWN);
    return {(band * DOWN + inside % height) * BM, inside / height * BN};
}
