// Layernorm, forward and backward. Read layernorm_forward and layernorm_backward in kernels/reference.py, and
// common.cuh, before.
//
//   inp, out, dinp, dout (N, C) of T     weight, bias (C,) of T       N = B * T rows
//   mean, rstd (N,) float32              dweight, dbias (C,) float32
//
//   kernel                          grid              block  shared  workspace
//   layernorm_forward_rows<T>       ceil(N / 4)       128    0       none
//   layernorm_forward<T, VECTORS>   F                 128    0       none
//   layernorm_backward_rows<T>      G                 128    0       partials: G * 2 * C float32
//   layernorm_backward<T, VECTORS>  G                 128    8 * C   partials: G * 2 * C float32
//   layernorm_backward_reduce       ceil(2 * C / 32)  1024   0       reads them; `count` is G
//
// The _rows kernels take any C. The others want rows aligned to 16 bytes, and hold a row in registers: VECTORS =
// ceil(C / (32 * 16/sizeof(T))) is the number of 16-byte packs per lane, at most 7 for bf16, enough for the 1600
// channels of the largest GPT-2; for float32 at most 13 forward, 10 backward. F = min(5 * SMs, ceil(N / 4)) and
// G = min(3 * SMs, ceil(N / 4)) blocks, though any number works.
//
// The floor is set by the memory: N C elements are read and written once forward (2 N C), and 4 N C backward (dout,
// inp, dinp read, dinp written); 10 to 20 FLOP each, and half the instructions that an H200 has time for. On top
// of it come, backward, the partials, 16 G C bytes that the L2 cache holds.

#include "common.cuh"
#include "ptx.cuh"

inline constexpr float EPSILON = 1e-5f;                     // GPT-2's

// ---- out = (inp - mean) * rstd * weight + bias -----------------------------------------------------------

// Version 1: one warp per row, so that neighbouring lanes read neighbouring channels. 1827 GB/s on an H200
// (16,384 rows of 768, bf16), where a thread per row would reach 147.
template <typename T>
__global__ void __launch_bounds__(128)
layernorm_forward_rows(T* out, float* mean, float* rstd, const T* inp, const T* weight, const T* bias, int N,
                       int C) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (row >= N) return;
    const T* x = inp + size_t(row) * C;
    T* y = out + size_t(row) * C;
    float sum = 0.0f, squares = 0.0f;
    for (int c = lane; c < C; c += WARP) sum += to_float(x[c]);
    const float m = warp_sum(sum) / C;
    for (int c = lane; c < C; c += WARP) squares += (to_float(x[c]) - m) * (to_float(x[c]) - m);
    const float r = rsqrtf(warp_sum(squares) / C + EPSILON);
    for (int c = lane; c < C; c += WARP)
        y[c] = from_float<T>((to_float(x[c]) - m) * r * to_float(weight[c]) + to_float(bias[c]));
    if (lane == 0) mean[row] = m, rstd[row] = r;
}

// Version 2: the row stays in registers between the passes, so `inp` is read once instead of three times, and 16
// bytes at a time. 1827 -> 3097 GB/s on an H200 (16,384 rows of 768, bf16).
//
// Version 3: a warp takes rows in turn, and asks for the next one before it computes with this one. A channel is
// taken out of its register once, and rounded into it in pairs. On an H200 on 2026-11-27: 16,384 rows 16.5 ->
// 16.2 us, but 65,536 rows 54.4 -> 55.6 us, 3622 GB/s; with 6 blocks on a multiprocessor instead of 5, 16.1
// and 57.1 us.
//
// weight and bias are not __restrict__, here and backward: the compiler would keep a row of both in registers, too,
// and fewer blocks would fit.
//
// A lane's pack k holds the channels column<T>(k) and following. The last packs may lie beyond C: they are
// loaded from inside the row all the same, because loads that depend on nothing are all under way at once,
// and left out of the sums.
template <typename T> __device__ inline int column(int k) {
    return (k * WARP + threadIdx.x % WARP) * Pack<T>::size;
}

template <typename T> __device__ inline Pack<T> load_column(const T* row, int k, int C) {
    return load_pack(row + min(column<T>(k), C - Pack<T>::size));
}

// The same as bits: bf16 that are carried from one row to the next would take a register each.
template <typename T> __device__ inline int4 load_bits(const T* row, int k, int C) {
    return *reinterpret_cast<const int4*>(row + min(column<T>(k), C - Pack<T>::size));
}
template <typename T> __device__ inline const Pack<T>& as_pack(const int4& bits) {
    return reinterpret_cast<const Pack<T>&>(bits);
}

template <typename T, int VECTORS>
__device__ inline void normalise(T* out, float* mean, float* rstd, float (&x)[VECTORS][Pack<T>::size],
                                 const T* weight, const T* bias, int C) {
    constexpr int SIZE = Pack<T>::size;
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < SIZE; i++) part += x[k][i];
        sum += column<T>(k) < C ? part : 0.0f;
    }
    const float m = warp_sum(sum) / C;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            x[k][i] -= m;
            part += x[k][i] * x[k][i];
        }
        squares += column<T>(k) < C ? part : 0.0f;
    }
    const float r = rsqrtf(warp_sum(squares) / C + EPSILON);
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        float w[SIZE], b[SIZE];
        to_floats<T>(w, load_column(weight, k, C));
        to_floats<T>(b, load_column(bias, k, C));
#pragma unroll
        for (int i = 0; i < SIZE; i++) x[k][i] = x[k][i] * r * w[i] + b[i];
    }
#pragma unroll
    for (int k = 0; k < VECTORS; k++)                       // no load above waits for a store
        if (column<T>(k) < C) store_pack(out + column<T>(k), rounded_pack<T>(x[k]));
    if (threadIdx.x % WARP == 0) *mean = m, *rstd = r;
}

template <typename T, int VECTORS>
__global__ void __launch_bounds__(128, VECTORS * Pack<T>::size <= 32 ? 3 : 2)
layernorm_forward(T* out, float* mean, float* rstd, const T* inp, const T* weight,
                  const T* bias, int N, int C) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int step = gridDim.x * (blockDim.x / WARP);
    int4 next[VECTORS];
    const auto load = [&](int row) {
#pragma unroll
        for (int k = 0; k < VECTORS; k++) next[k] = load_bits(inp + size_t(row) * C, k, C);
    };
    // Programmatic dependent launch (griddepcontrol in ptx.cuh): no kernel of a recorded step writes the
    // weights, so they come from memory while the kernel before is still at work.
    griddepcontrol_launch_dependents();
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        prefetch_l2(weight + min(column<T>(k), C - 1));
        prefetch_l2(bias + min(column<T>(k), C - 1));
    }
    griddepcontrol_wait();
    if (row < N) load(row);
    for (; row < N; row += step) {
        float x[VECTORS][Pack<T>::size];
#pragma unroll
        for (int k = 0; k < VECTORS; k++) to_floats<T>(x[k], as_pack<T>(next[k]));
        load(min(row + step, N - 1));                       // at the end the last row again
        normalise(out + size_t(row) * C, mean + row, rstd + row, x, weight, bias, C);
    }
}

// ---- Backward --------------------------------------------------------------------------------------------
//
// With norm = (inp - mean) * rstd and dnorm = dout * weight:
//   dinp    += rstd * (dnorm - mean(dnorm) - norm * mean(dnorm * norm))      along the row
//   dweight += sum of dout * norm,  dbias += sum of dout                     down the columns
//
// Version 1: a warp per row for dinp, then, over the same rows again, a thread per column for the sums. A block
// owns rows: those of its warps, each `warps of the grid` further on than the one before. It leaves the sums
// of its rows in partials (grid, 2, C); layernorm_backward_reduce adds up the blocks, in their order. (A thread
// per row and then per column, while the rest of the card waits, reaches 25 GB/s on an H200.)
template <typename T>
__global__ void __launch_bounds__(128)
layernorm_backward_rows(T* dinp, float* partials, const T* dout, const T* inp, const T* weight,
                        const float* mean, const float* rstd, int N, int C) {
    const int warps = blockDim.x / WARP, first = blockIdx.x * warps, step = gridDim.x * warps;
    for (int row = first + threadIdx.x / WARP; row < N; row += step) {
        const T *dy = dout + size_t(row) * C, *x = inp + size_t(row) * C;
        T* dx = dinp + size_t(row) * C;
        const float m = mean[row], r = rstd[row];
        float sum = 0.0f, sum_norm = 0.0f;
        for (int c = threadIdx.x % WARP; c < C; c += WARP) {
            const float dnorm = to_float(dy[c]) * to_float(weight[c]);
            sum += dnorm;
            sum_norm += dnorm * (to_float(x[c]) - m) * r;
        }
        sum = warp_sum(sum) / C;
        sum_norm = warp_sum(sum_norm) / C;
        for (int c = threadIdx.x % WARP; c < C; c += WARP) {
            const float norm = (to_float(x[c]) - m) * r, dnorm = to_float(dy[c]) * to_float(weight[c]);
            dx[c] = from_float<T>(to_float(dx[c]) + r * (dnorm - sum - norm * sum_norm));
        }
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float dw = 0.0f, db = 0.0f;
        for (int block_row = first; block_row < N; block_row += step)
            for (int row = block_row; row < min(block_row + warps, N); row++) {
                const float dy = to_float(dout[size_t(row) * C + c]);
                dw += dy * (to_float(inp[size_t(row) * C + c]) - mean[row]) * rstd[row];
                db += dy;
            }
        partials[size_t(blockIdx.x) * 2 * C + c] = dw;
        partials[size_t(blockIdx.x) * 2 * C + C + c] = db;
    }
}

// Version 2: everything is read once. A warp holds its row in registers, and in further registers the column
// sums of the channels that its lanes see in every row. At the end the warps of the block add theirs up in
// shared memory, one after the other. 25 -> 2540 GB/s on an H200 (16,384 rows of 768, bf16).
//
// Version 3: the next row of dout and inp is asked for before this one is computed with, and this row of dinp,
// which only the second pass needs, before the first pass. Fewer instructions a channel, too: norm by one
// fused multiplication and addition, bf16 out of a register in pairs. On an H200 on 2026-11-27: 16,384 rows
// 40.5 -> 39.1 us, 65,536 rows 113.6 -> 109.9 us, 3662 GB/s; without asking ahead 112.6 us.
template <typename T, int VECTORS>
__global__ void __launch_bounds__(128, VECTORS * Pack<T>::size <= 24 ? 3 : 2)
layernorm_backward(T* dinp, float* partials, const T* dout, const T* inp, const T* weight,
                   const float* mean, const float* rstd, int N, int C) {
    constexpr int SIZE = Pack<T>::size;
    constexpr bool AHEAD = VECTORS <= (sizeof(T) == 2 ? 4 : 3);  // there are registers for the next row
    constexpr bool LATE = VECTORS > 9;                      // and none for dinp before the second pass
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP, step = gridDim.x * warps;
    const float share = 1.0f / C;
    float dw[VECTORS][SIZE] = {}, db[VECTORS][SIZE] = {};
    int4 dy[VECTORS], x[VECTORS], dx[VECTORS], next_dy[VECTORS], next_x[VECTORS];
    const auto load = [&](int4 (&bits)[VECTORS], const T* rows, int row) {
#pragma unroll
        for (int k = 0; k < VECTORS; k++) bits[k] = load_bits(rows + size_t(row) * C, k, C);
    };
    int row = blockIdx.x * warps + warp;
    if (AHEAD && row < N) load(next_dy, dout, row), load(next_x, inp, row);
    for (; row < N; row += step) {
        if constexpr (AHEAD) {
#pragma unroll
            for (int k = 0; k < VECTORS; k++) dy[k] = next_dy[k], x[k] = next_x[k];
            load(dx, dinp, row);
            const int next = min(row + step, N - 1);        // at the end the last row again
            load(next_dy, dout, next), load(next_x, inp, next);
        } else {
            load(dy, dout, row), load(x, inp, row);
            if constexpr (!LATE) load(dx, dinp, row);
        }
        const float r = rstd[row], shift = -mean[row] * r;
        float sum = 0.0f, sum_norm = 0.0f, dy_k[SIZE], x_k[SIZE], w[SIZE];
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            to_floats<T>(w, load_column(weight, k, C));
            to_floats<T>(dy_k, as_pack<T>(dy[k]));
            to_floats<T>(x_k, as_pack<T>(x[k]));
            if (column<T>(k) >= C) continue;                // a pack beyond the row
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                const float norm = x_k[i] * r + shift, dnorm = dy_k[i] * w[i];
                sum += dnorm;
                sum_norm += dnorm * norm;
                dw[k][i] += dy_k[i] * norm;
                db[k][i] += dy_k[i];
            }
        }
        sum = warp_sum(sum) * share;
        sum_norm = warp_sum(sum_norm) * share;
#pragma unroll
        for (int k = 0; k < VECTORS; k++) {
            float dx_k[SIZE];
            to_floats<T>(w, load_column(weight, k, C));
            to_floats<T>(dy_k, as_pack<T>(dy[k]));
            to_floats<T>(x_k, as_pack<T>(x[k]));
            if constexpr (LATE) dx[k] = load_bits(dinp + size_t(row) * C, k, C);
            to_floats<T>(dx_k, as_pack<T>(dx[k]));
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                const float norm = x_k[i] * r + shift, dnorm = dy_k[i] * w[i];
                dx_k[i] += r * (dnorm - sum - norm * sum_norm);
            }
            if (column<T>(k) < C) store_pack(dinp + size_t(row) * C + column<T>(k), rounded_pack<T>(dx_k));
        }
    }
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float* total = reinterpret_cast<float*>(shared_memory); // (2, C): dweight, dbias
    for (int turn = 0; turn < warps; turn++) {
        if (warp == turn)
#pragma unroll
            for (int k = 0; k < VECTORS; k++)
#pragma unroll
                for (int i = 0; i < SIZE; i++)
                    if (const int c = column<T>(k) + i; c < C) {
                        total[c] = turn == 0 ? dw[k][i] : total[c] + dw[k][i];
                        total[C + c] = turn == 0 ? db[k][i] : total[C + c] + db[k][i];
                    }
        __syncthreads();
    }
    for (int c = threadIdx.x; c < 2 * C; c += blockDim.x) partials[size_t(blockIdx.x) * 2 * C + c] = total[c];
}

// The second stage. A warp reads 32 neighbouring columns of one block's partial sums; warp w takes the blocks
// w, w + 32, ..., and the first warp adds up the 32 shares.
__global__ void __launch_bounds__(1024)
layernorm_backward_reduce(float* dweight, float* dbias, const float* partials, int count, int C) {
    __shared__ float shares[WARP][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, c = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (c < 2 * C)
        for (int block = warp; block < count; block += WARP) sum += partials[size_t(block) * 2 * C + c];
    shares[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= 2 * C) return;
    for (int i = 1; i < WARP; i++) sum += shares[i][lane];
    if (c < C) dweight[c] += sum;
    else dbias[c - C] += sum;
}
