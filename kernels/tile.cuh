// A tile of bf16 in shared memory, for matmul.cu and the attention kernels: how its rows are swizzled, and how it
// gets there. Read common.cuh and ptx.cuh before, matmul.cu after.

#pragma once
#include "common.cuh"
#include "ptx.cuh"

// Where the 16-byte chunk `chunk` of row `row` lies in a tile with rows of COLS bf16. ldmatrix reads the same
// chunk of 8 rows, which would all lie in the same banks: xor with the row number spreads them over all 32.
// (At COLS = 32 two rows lie side by side in the banks, so every second row counts.)
template <int COLS> __device__ inline int swizzle(int row, int chunk) {
    return row * COLS + (COLS >= 64 ? chunk ^ row % 8 : chunk ^ row / (64 / COLS) % (COLS / 8)) * 8;
}

// Starts the copy of part `part` of `parts` of the tile (ROWS, COLS) that begins at (row0, col0) of matrix
// (rows, cols), whose rows are `stride` elements apart; what lies outside of the matrix becomes zero. The caller
// commits. A thread stays in its column of chunks and goes down the tile in steps of a multiple of 8 rows, after
// which the swizzle repeats: one address is computed, the others are a constant away.
template <int ROWS, int COLS, int THREADS>
__device__ inline void load_tile(bf16* tile, const bf16* matrix, int row0, int col0, int rows, int cols,
                                 int stride, int part = 0, int parts = 1) {
    constexpr int CHUNKS = COLS / 8, STEP = THREADS / CHUNKS;
    static_assert(ROWS % STEP == 0 && STEP % 8 == 0, "whole steps");
    const int row = threadIdx.x / CHUNKS, col = col0 + threadIdx.x % CHUNKS * 8;
    const int rows_left = col < cols ? rows - row0 - row : 0;
    const bf16* from = matrix + (size_t)(row0 + row) * stride + col;    // read where rows_left is > 0
    bf16* to = tile + swizzle<COLS>(row, threadIdx.x % CHUNKS);
#pragma unroll
    for (int down = 0; down < ROWS; down += STEP)
        if (down / STEP % parts == part)
            cp_async_16(to + down * COLS, from + down * stride, down < rows_left ? 16 : 0);
}
