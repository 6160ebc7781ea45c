// The encoder: a token and its position become one vector; backward, every row of the two tables collects the
// gradients of the places where it was used. Read common.cuh before.
//
//   tokens (B, T) int32, N = B * T    wte (V, C), wpe (P, C), out, dout (B, T, C) of S    dwte, dwpe float32
//
//   kernel                         grid                      block  shared  workspace
//   encoder_forward_naive<S>       ceil(N * C / 256)         256    0       none
//   encoder_forward<S>             ceil(N * packs / 256)     256    0       none
//   encoder_backward_naive<S>      (ceil(C / 256), V)        256    0       none
//   encoder_backward_wpe_naive<S>  ceil(T * C / 256)         256    0       none
//   encoder_backward_wpe<S>        ceil(T * packs / 256)     256    0       none
//   token_count                    ceil(N / 256)             256    0       count, place
//   token_starts                   1                         1024   0       count, starts
//   token_scatter                  ceil(N / 256)             256    0       starts, place, grouped
//   token_order                    ceil(N / 256)             256    0       starts, grouped, order
//   encoder_backward_wte<S>        (ceil(N / 8), strips)     256    0       starts, order, partials
//   encoder_backward_join<S>       (ceil(N / 256), strips)   256    0       starts, order, partials
//
// packs = ceil(C / (16/sizeof(S))), strips = ceil(C / (32 * 16/sizeof(S))). The last six, in this order, are
// the gradient of wte. Workspace: count (V,) int32, zero before the first use and left zero by every use;
// starts (V + 1,), place (N,), grouped (N,), order (N,) int32; partials (ceil(N / 32), C) float32. Token ids
// must lie in 0 .. V - 1: whoever brings them to the device has checked that.
//
// The floor is the memory's: 2 N C sizeof(S) bytes forward, with wpe in the L2 cache; backward dout once, and
// 8 C bytes for each row of dwte and dwpe that is used. Above it backward because both tables read dout, and
// by the seven launches, of which four sort: nothing beside a training step.

#include "common.cuh"

// ---- out = wte[tokens] + wpe[position] --------------------------------------------------------------------

// A row of tokens begins at position 0, or while decoding at its offset; padding behind a short row may run
// over the end of wpe, and reads its last row.
__device__ inline int position(int row, int T, int P, const int* offsets) {
    return min((offsets == nullptr ? 0 : offsets[row / T]) + row % T, P - 1);
}

// Rung 1: one thread per element. offsets (B,) int32 may be null.
template <typename S>
__global__ void encoder_forward_naive(S* out, const int* tokens, const S* wte, const S* wpe,
                                      const int* offsets, int N, int T, int C, int P) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int row = i / C, c = i % C;
    if (row < N)
        out[i] = from_float<S>(to_float(wte[size_t(tokens[row]) * C + c]) +
                               to_float(wpe[size_t(position(row, T, P, offsets)) * C + c]));
}

// Rung 2: 16 bytes per thread. Won: not measured yet.
template <typename S>
__global__ void __launch_bounds__(256)
encoder_forward(S* out, const int* tokens, const S* wte, const S* wpe, const int* offsets, int N, int T,
                int C, int P) {
    constexpr int SIZE = Pack<S>::size;
    const int packs = ceil_div(C, SIZE);                    // per row; the last one may be shorter
    const int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / packs, c = i % packs * SIZE;
    if (row >= N) return;
    const S* token = wte + size_t(tokens[row]) * C + c;
    const S* place = wpe + size_t(position(row, T, P, offsets)) * C + c;
    S* y = out + size_t(row) * C + c;
    if (aligned(out, C) && aligned(wte, C) && aligned(wpe, C)) {
        Pack<S> a = load_pack(token);
        const Pack<S> b = load_pack(place);
#pragma unroll
        for (int k = 0; k < SIZE; k++) a[k] = from_float<S>(to_float(a[k]) + to_float(b[k]));
        store_pack(y, a);
    } else {
        for (int k = 0; k < min(SIZE, C - c); k++)
            y[k] = from_float<S>(to_float(token[k]) + to_float(place[k]));
    }
}

// ---- Both gradients: sums over rows, in their order -------------------------------------------------------

// sum = the rows row(0) up to row(count - 1) of dout (., C), in the columns from c on. Four loads are under
// way at once (two blocks per multiprocessor in __launch_bounds__ give the compiler the registers for that);
// where fewer rows are left, the last one is loaded again, and not added.
template <typename S, typename Row>
__device__ inline void sum_rows(float (&sum)[Pack<S>::size], const S* dout, int c, int C, int count,
                                const Row& row) {
    constexpr int SIZE = Pack<S>::size, LOADS = 4;
    for (int k = 0; k < SIZE; k++) sum[k] = 0.0f;
    if (!aligned(dout, C)) {
        for (int i = 0; i < count; i++)
            for (int k = 0; k < min(SIZE, C - c); k++) sum[k] += to_float(dout[size_t(row(i)) * C + c + k]);
        return;
    }
    for (int i = 0; i < count; i += LOADS) {
        const S* address[LOADS];
        Pack<S> dy[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) address[j] = dout + size_t(row(min(i + j, count - 1))) * C + c;
#pragma unroll
        for (int j = 0; j < LOADS; j++) dy[j] = load_pack(address[j]);
#pragma unroll
        for (int j = 0; j < LOADS; j++)
#pragma unroll
            for (int k = 0; k < SIZE; k++) sum[k] += i + j < count ? to_float(dy[j][k]) : 0.0f;
    }
}

// address[0 .. n) += sum, 16 bytes at a time if rows are aligned.
template <int SIZE>
__device__ inline void accumulate(float* address, const float (&sum)[SIZE], int n, bool packed) {
#pragma unroll
    for (int k = 0; k < SIZE; k += 4)
        if (packed) {
            Pack<float> total = load_pack(address + k);
            for (int j = 0; j < 4; j++) total[j] += sum[k + j];
            store_pack(address + k, total);
        } else {
            for (int j = k; j < min(k + 4, n); j++) address[j] += sum[j];
        }
}

// ---- dwte[token] += dout wherever the token stands --------------------------------------------------------

// Rung 1: one thread per element of dwte, which looks through all N tokens for its own.
template <typename S>
__global__ void encoder_backward_naive(float* dwte, const S* dout, const int* tokens, int N, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (c >= C) return;
    float sum = 0.0f;
    for (int row = 0; row < N; row++)
        if (tokens[row] == token) sum += to_float(dout[size_t(row) * C + c]);
    dwte[size_t(token) * C + c] += sum;
}

// Rung 2: sort the rows by token first (a counting sort, stable), so that whoever owns a token finds its rows
// side by side: order[starts[token]] up to order[starts[token + 1] - 1]. Won: not measured yet.
//
// Counting needs atomics, on integers, which add up to the same in any order. But the number that a row draws
// depends on who came first, so the groups come out of token_scatter unordered; token_order puts a row behind
// those of its group with a lower number. That looks at the square of a group's length, but every row at
// once.

__global__ void token_count(int* place, int* count, const int* tokens, int N) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < N) place[row] = atomicAdd(count + tokens[row], 1);
}

// starts[token] = how many rows have a lower token: each of 1024 threads adds up its stretch of the counts,
// the block adds up the stretches before each, and the threads walk their stretches again.
__global__ void __launch_bounds__(1024) token_starts(int* starts, int* count, int V) {
    __shared__ int total[WARP];                             // of each warp
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int length = ceil_div(V, blockDim.x);
    const int first = min(int(threadIdx.x) * length, V), last = min(first + length, V);
    int own = 0;
    for (int token = first; token < last; token++) own += count[token];
    int sum = own;                                          // of this lane and the lanes before
    for (int offset = 1; offset < WARP; offset *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, sum, offset);
        if (lane >= offset) sum += before;
    }
    if (lane == WARP - 1) total[warp] = sum;
    __syncthreads();
    int start = sum - own;
    for (int w = 0; w < warp; w++) start += total[w];
    for (int token = first; token < last; token++) {
        starts[token] = start;
        start += count[token];
        count[token] = 0;                                   // for the next batch
    }
    if (threadIdx.x == blockDim.x - 1) starts[V] = start;   // N
}

__global__ void token_scatter(int* grouped, const int* starts, const int* place, const int* tokens, int N) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < N) grouped[starts[tokens[row]] + place[row]] = row;
}

__global__ void token_order(int* order, const int* starts, const int* grouped, const int* tokens, int N) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= N) return;
    const int first = starts[tokens[row]], last = starts[tokens[row] + 1];
    int rank = 0;
    for (int i = first; i < last; i++) rank += grouped[i] < row;
    order[first + rank] = row;
}

// Rung 3: a warp per 32 rows of a token instead of one per token, because a few tokens make up a large part
// of any text. Warp i looks at the sorted row i. It has work if a chunk begins there: the chunks of a group
// are 32 rows long, only the last takes the remainder too (32 .. 63), and a group below 64 is one chunk. The
// owner of a whole group adds to dwte, others leave partial sums, to be joined in order. Won: not measured
// yet.
inline constexpr int CHUNK = 32;

// A chunk's row in `partials`: it has at least 32 rows, so it holds a multiple of 32, and holds it alone.
__device__ inline int chunk_slot(int first) { return ceil_div(first, CHUNK); }

template <typename S>
__global__ void __launch_bounds__(256, 2)
encoder_backward_wte(float* dwte, float* partials, const S* dout, const int* tokens, const int* starts,
                     const int* order, int N, int C) {
    constexpr int SIZE = Pack<S>::size;
    const int begin = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int c = (blockIdx.y * WARP + threadIdx.x % WARP) * SIZE;
    if (begin >= N || c >= C) return;
    const int token = tokens[order[begin]], first = starts[token], last = starts[token + 1];
    const bool remainder = last - begin < CHUNK && begin > first;
    if ((begin - first) % CHUNK != 0 || remainder) return;
    const int end = last - begin < 2 * CHUNK ? last : begin + CHUNK;

    float sum[SIZE];
    sum_rows(sum, dout, c, C, end - begin, [&](int i) { return order[begin + i]; });
    if (begin == first && end == last)
        return accumulate(dwte + size_t(token) * C + c, sum, C - c, aligned(dwte, C) && C % SIZE == 0);
    float* partial = partials + size_t(chunk_slot(begin)) * C + c;
    for (int k = 0; k < min(SIZE, C - c); k++) partial[k] = sum[k];
}

// Warp i looks at the sorted row 32 i, which lies in the chunk of slot i, if any. It has work if that chunk
// is the first one of a group of several.
template <typename S>
__global__ void __launch_bounds__(256)
encoder_backward_join(float* dwte, const float* partials, const int* tokens, const int* starts,
                      const int* order, int N, int C) {
    constexpr int SIZE = Pack<S>::size;
    const int slot = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    const int c = (blockIdx.y * WARP + threadIdx.x % WARP) * SIZE;
    if (slot >= ceil_div(N, CHUNK) || c >= C) return;
    const int token = tokens[order[slot * CHUNK]], first = starts[token], last = starts[token + 1];
    if (last - first < 2 * CHUNK || chunk_slot(first) != slot) return;
    float sum[SIZE] = {};
#pragma unroll 4
    for (int i = 0; i < (last - first) / CHUNK; i++)        // chunks
#pragma unroll
        for (int k = 0; k < SIZE; k++) sum[k] += c + k < C ? partials[size_t(slot + i) * C + c + k] : 0.0f;
    accumulate(dwte + size_t(token) * C + c, sum, C - c, aligned(dwte, C) && C % SIZE == 0);
}

// ---- dwpe[t] += the sum of dout over the batch ------------------------------------------------------------

// Rung 1: one thread per element.
template <typename S>
__global__ void encoder_backward_wpe_naive(float* dwpe, const S* dout, int B, int T, int C) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;    // over (T, C)
    if (i >= T * C) return;
    float sum = 0.0f;
    for (int b = 0; b < B; b++) sum += to_float(dout[size_t(b) * T * C + i]);
    dwpe[i] += sum;
}

// Rung 2: one thread per 16 bytes of a position, which adds up the B rows in order, four of them under way at
// once. dout is read once and dwpe passes once: no faster rung is needed. Won: not measured yet.
template <typename S>
__global__ void __launch_bounds__(256, 2)
encoder_backward_wpe(float* dwpe, const S* dout, int B, int T, int C) {
    constexpr int SIZE = Pack<S>::size;
    const int packs = ceil_div(C, SIZE);
    const int i = blockIdx.x * blockDim.x + threadIdx.x, t = i / packs, c = i % packs * SIZE;
    if (t >= T) return;
    float sum[SIZE];
    sum_rows(sum, dout, c, C, B, [&](int b) { return b * T + t; });
    accumulate(dwpe + size_t(t) * C + c, sum, C - c, aligned(dwpe, C) && C % SIZE == 0);
}
