// The emulator's own version of kernels/ptx.cuh: the same functions, after the tables of the PTX ISA
// ("Warp-level matrix instructions" for the fragments, "cp.async" for the groups), in C++.
//
// cp.async is late on purpose. The destination is filled with NaN at once and gets its data only in
// cp_async_wait: a kernel that forgets to wait, waits for the wrong group, or reads before the barrier sees
// NaN.
#pragma once
#include "cuda_bf16.h"

namespace emulator {

// A lane's part of one ldmatrix: the address of its row and where its registers are.
struct Rows {
    const void* row;
    uint32_t* registers;
    const char* file;
    int line;
};

// Lane l of matrix m gets elements 2 (l % 4) and the next of row l / 4; transposed, of column l / 4.
template <int COUNT, bool TRANSPOSED>
EMULATOR_UNWATCHED void load_matrices(void** operands, uint32_t) {
    for (int m = 0; m < COUNT; m++) {
        const uint16_t* rows[8];  // the addresses come from lanes 8 m .. 8 m + 7
        for (int r = 0; r < 8; r++) {
            const Rows& operand = *(const Rows*)operands[8 * m + r];
            if ((uintptr_t)operand.row % 16)
                fail("ldmatrix at %s:%d: lane %d gives address %p, not a multiple of 16", base(operand.file),
                     operand.line, 8 * m + r, operand.row);
            rows[r] = (const uint16_t*)operand.row;
        }
        for (int lane = 0; lane < 32; lane++) {
            int a = lane / 4, b = lane % 4 * 2;
            uint32_t low = TRANSPOSED ? rows[b][a] : rows[a][b];
            uint32_t high = TRANSPOSED ? rows[b + 1][a] : rows[a][b + 1];
            ((Rows*)operands[lane])->registers[m] = low | high << 16;
        }
    }
}

template <int COUNT, bool TRANSPOSED>
__attribute__((noinline)) void ldmatrix(uint32_t* registers, const void* row, const char* what,
                                        const char* file, int line) {
    check_shared(row, lane_id() < 8 * COUNT ? 16 : 0, what, file, line);
    if (lane_id() < 8 * COUNT) touch(row, 16, false, __builtin_return_address(0));
    Rows operand = {row, registers, file, line};
    meet(what, EMULATOR_ALL, &operand, load_matrices<COUNT, TRANSPOSED>, file, line);
    EMULATOR_FENCE;
}

struct Fragments {
    float* d;
    const uint32_t *a, *b;
};

// A is 16 × 16 by rows, B 16 × 8 by columns, D 16 × 8. With g = lane / 4 and t = lane % 4 a lane holds
//   a[0], a[1]: row g, g + 8, columns 2t, 2t + 1;  a[2], a[3]: the same rows, columns 2t + 8, 2t + 9
//   b[0], b[1]: rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g;  d[0..1], d[2..3]: rows g, g + 8, columns 2t,
//   2t + 1
inline void multiply_m16n8k16(void** operands, uint32_t) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Fragments& f = *(const Fragments*)operands[lane];
        int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            float* to = &a[g + i % 2 * 8][t + i / 2 * 8];
            to[0] = emulator_bf16_float(f.a[i]), to[1] = emulator_bf16_float(f.a[i] >> 16);
        }
        for (int i = 0; i < 2; i++) {
            b[t + 8 * i][g] = emulator_bf16_float(f.b[i]),
                      b[t + 8 * i + 1][g] = emulator_bf16_float(f.b[i] >> 16);
            d[g + 8 * i][t] = f.d[2 * i], d[g + 8 * i][t + 1] = f.d[2 * i + 1];
        }
    }
    typedef float Row __attribute__((vector_size(32), aligned(4), may_alias));
    for (int i = 0; i < 16; i++) {
        Row sum = *(Row*)d[i];
        for (int k = 0; k < 16; k++) sum += a[i][k] * *(Row*)b[k];
        *(Row*)d[i] = sum;
    }
    for (int lane = 0; lane < 32; lane++) {
        float* to = ((Fragments*)operands[lane])->d;
        int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 4; i++) to[i] = d[g + i / 2 * 8][t + i % 2];
    }
}

}  // namespace emulator

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem, EMULATOR_PLACE) {
    emulator::ldmatrix<4, false>(r, smem, "ldmatrix_x4", file, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem, EMULATOR_PLACE) {
    emulator::ldmatrix<4, true>(r, smem, "ldmatrix_x4_trans", file, line);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem, EMULATOR_PLACE) {
    emulator::ldmatrix<2, false>(r, smem, "ldmatrix_x2", file, line);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem, EMULATOR_PLACE) {
    emulator::ldmatrix<2, true>(r, smem, "ldmatrix_x2_trans", file, line);
}

// d += a b, bf16 times bf16 in float32.
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_PLACE) {
    emulator::Fragments operand = {d, a, b};
    emulator::meet("mma_m16n8k16", EMULATOR_ALL, &operand, emulator::multiply_m16n8k16, file, line);
    EMULATOR_FENCE;
}

// 16 bytes from global to shared memory, of which those beyond src_bytes are zeros.
inline void cp_async_16(void* smem, const void* gmem, int src_bytes, EMULATOR_PLACE) {
    using namespace emulator;
    if (src_bytes < 0 || src_bytes > 16)
        fail("cp_async_16 at %s:%d: src_bytes is %d", base(file), line, src_bytes);
    if ((uintptr_t)gmem % 16)
        fail("cp_async_16 at %s:%d: the global address %p is not a multiple of 16", base(file), line, gmem);
    if ((uintptr_t)smem % 16)
        fail("cp_async_16 at %s:%d: the shared address %p is not a multiple of 16", base(file), line, smem);
    check_shared(smem, 16, "cp_async_16", file, line);
    Thread& self = threads[current];
    for (int i = self.landed; i < self.copy_count; i++)
        if (self.copies[i].to == smem)
            fail("cp_async_16 at %s:%d: an earlier copy to the same place was not waited for", base(file),
                 line);
    if (self.copy_count == self.copy_capacity) {
        self.copy_capacity = self.copy_capacity ? 2 * self.copy_capacity : 16;
        self.copies = (Copy*)realloc(self.copies, self.copy_capacity * sizeof(Copy));
    }
    Copy& copy = self.copies[self.copy_count++];
    copy.to = (unsigned char*)smem;
    memset(copy.bytes, 0, 16);
    memcpy(copy.bytes, gmem, src_bytes);
    memset(smem, 0xff, 16);
    EMULATOR_FENCE;
}

inline void cp_async_commit(EMULATOR_PLACE) {
    using namespace emulator;
    Thread& self = threads[current];
    if (self.groups - self.groups_done == 64)
        fail("cp_async_commit at %s:%d: 64 groups are open and none was waited for", base(file), line);
    self.ends[self.groups++ % 64] = self.copy_count;
}

// Until at most the N youngest groups are still on their way.
template <int N>
inline void cp_async_wait(const char* = __builtin_FILE(), int = __builtin_LINE()) {
    using namespace emulator;
    Thread& self = threads[current];
    while (self.groups - self.groups_done > N) {
        int end = self.ends[self.groups_done++ % 64];
        for (; self.landed < end; self.landed++)
            memcpy(self.copies[self.landed].to, self.copies[self.landed].bytes, 16);
    }
    if (self.landed == self.copy_count || self.landed >= 64) {  // forget what has landed
        self.copy_count -= self.landed;
        memmove(self.copies, self.copies + self.landed, self.copy_count * sizeof(Copy));
        for (int g = self.groups_done; g < self.groups; g++) self.ends[g % 64] -= self.landed;
        self.landed = 0;
    }
    EMULATOR_FENCE;
}

// The hardware's is off by 2^-11 of its value at most; this one is exact.
inline float tanh_approx(float x) { return tanhf(x); }

// Kernels run one after the other here, so the one before has always ended.
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}
inline void prefetch_l2(const void*) {}
