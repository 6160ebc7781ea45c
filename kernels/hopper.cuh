// What matmul_hopper.cu and attention_hopper.cu share. Read ptx_hopper.cuh before.

#pragma once
#include "common.cuh"
#include "ptx_hopper.cuh"

inline constexpr int BOX_COLUMNS = 64;                      // bf16 in the 128 bytes of a swizzled row
inline constexpr int BOX_BYTES = 64 * 128;                  // a box of 64 rows

// Where a producer or a consumer is in a ring of STAGES buffers: the buffer, and the parity of the phase of
// `full` that the present filling of it completes. The producer waits for `empty` with the other parity, which a
// fresh barrier lets pass.
template <int STAGES> struct RingPosition {
    int stage = 0, parity = 0;
    __device__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    __device__ void skip(int steps) {
        stage += steps;
        parity ^= stage / STAGES & 1;
        stage %= STAGES;
    }
};

// The barriers of a ring of N buffers: `full` waits for the producer and its bytes, `empty` for so many arrivals.
template <int N> __device__ inline void ring_init(Barrier* full, Barrier* empty, int arrivals) {
    for (int i = 0; i < N; i++) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, arrivals);
    }
}

// The address that this lane gives to ldmatrix_x4 and stmatrix_x4 for the rows of its warp and 16 columns of a
// 64 x 64 box: then r[0] holds row g, columns 2t, 2t+1 of the first 8 columns, r[1] row g + 8; r[2], r[3] the
// same of the next 8: the order of wgmma's accumulators. The box is swizzled as TMA does it.
__device__ inline bf16* fragment(bf16* box, int column) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x % WARPGROUP / WARP;
    const int row = warp * 16 + lane % 16;
    return box + row * BOX_COLUMNS + ((lane / 16 ^ row % 8) ^ column / 8) * 8;
}
