// Every PTX instruction we use, one small function each, and nothing else. Read common.cuh before, matmul.cu
// after. tests/emulator/ brings its own ptx.cuh: the same functions in plain C++, which explain them too.
//
// PTX addresses shared memory by 32-bit numbers, so every function converts its generic pointer first.

#pragma once

using uint32_t = unsigned int;

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- ldmatrix: 8 x 8 tiles of 16-bit values from shared memory into the registers of a warp ---------------
//
// Lane i gives the address of row i % 8 of tile i / 8: 8 values, 16 bytes, aligned to 16. (x2 reads the
// addresses of lanes 0..15 alone.) Afterwards, with g = i / 4 and t = i % 4, r[j] of lane i holds two values
// of tile j: row g, columns 2t and 2t+1. With _trans the tile is transposed on the way: r[j] then holds
// column g, rows 2t and 2t+1.

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(smem)) : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(smem)) : "memory");
}
__device__ inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(smem)) : "memory");
}
__device__ inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(smem)) : "memory");
}

// ---- mma: d (16, 8) float32 += a (16, 16) bf16 @ b (16, 8) bf16, by one warp -----------------------------
//
// With g = lane / 4 and t = lane % 4, a lane holds, two to a register, the lower row or column first:
//   a[0] row g,   columns 2t, 2t+1      a[2] row g,   columns 2t+8, 2t+9      b[0] column g, rows 2t, 2t+1
//   a[1] row g+8, the same              a[3] row g+8, the same                b[1] column g, rows 2t+8, 2t+9
//   d[0], d[1] row g, columns 2t, 2t+1  d[2], d[3] row g+8, the same
// so a fragment of A is one ldmatrix_x4 of four tiles: top left, bottom left, top right, bottom right.

__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- cp.async: global to shared memory without passing through registers ---------------------------------
//
// 16 bytes, both addresses aligned to 16. Bytes beyond src_bytes (0 .. 16) are not read, and arrive as zeros:
// the tails of a matrix. A thread commits what it started as one group; cp_async_wait<N> waits until at most
// its N latest groups are still under way. Other threads see the data only after the next barrier.

__device__ inline void cp_async_16(void* smem, const void* gmem, int src_bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(shared_address(smem)), "l"(gmem), "r"(src_bytes) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// ---- griddepcontrol: a kernel begins before the kernel before it has ended --------------------------------
//
// Programmatic dependent launch, CUDA programming guide; since sm_90. When every block of a kernel has called
// launch_dependents or has ended, the blocks of the next kernel may begin, if gpu.py launches it with
// overlap=True. The next kernel's wait returns when the kernel before it has ended and its writes are visible; in
// a kernel that was launched in any other way it returns at once.
//
// Until it has waited a block writes nothing, and reads nothing that a kernel of the same recording writes. And
// every block of a kernel that is launched with overlap waits. Then no kernel can overtake the one before the
// last: kernel 3 waits until kernel 2 has ended, and kernel 2 cannot end before its blocks have waited for the
// end of kernel 1. So launch_dependents may stand at the beginning of a kernel.

__device__ inline void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings the 128 bytes around an address into the L2 cache, without waiting. Any valid address is fine.
__device__ inline void prefetch_l2(const void* gmem) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(gmem));
}

// ---- tanh in one instruction -----------------------------------------------------------------------------

// Off by 2^-11 of its value at most.
__device__ inline float tanh_approx(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
