// The encoder: a token and its position become one vector; backward, every row of the two tables sums the
// gradients of the tokens that used it. Read common.cuh before.
//
//   tokens (B, T) int32, N = B * T    wte (V, C), wpe (P, C), out, dout (B, T, C) of S    dwte, dwpe float32
//
//   kernel                             grid                            block  shared   workspace
//   encoder_forward_naive<S>           ceil(N C / 256)                 256    0        none
//   encoder_forward<S>                 ceil(N / 8)                     256    0        none
//   encoder_backward_naive<S>          (V, ceil(C / 256))              256    0        none
//   encoder_backward_wpe_naive<S>      ceil(T C / 256)                 256    0        none
//   token_groups                       2^bits                          1024   132 ceil(V / 2^bits)
//   encoder_backward<S, LANES, LOADS>  any, at best what fits at once  256    0
//   encoder_backward_join              (ceil(N / 256), ceil(C / 128))  256    0
//
// The last three, in this order, are both gradients; V <= 1024 * 2^bits. Their workspace: order (N,), chunks
// (min(N, V + N / 32), 4) and groups (ceil(N / 32), 2) int32; partials (ceil(N / 32), C) float32; chunk_count
// (1,) int32, zero before the first use and left zero by every use. All but the naive versions want rows aligned
// to 16 bytes. Token ids must lie in 0 .. V - 1: gpt2.py has checked that on the host.
//
// The floor is set by the memory: 2 N C sizeof(S) bytes forward, with wpe in the L2 cache; backward dout once,
// and 8 C bytes for each row of dwte and dwpe that is used. On top of it come, backward, the first and the last
// launch, about 48 and 14 us of 144 at N = 65,536, and strips of dout that the L2 cache does not keep.

#include "common.cuh"
#include "ptx.cuh"

// ---- out = wte[tokens] + wpe[position] -------------------------------------------------------------------

// A row of tokens begins at position 0, or while decoding at its offset; padding behind a short row may run
// over the end of wpe, and reads its last row.
__device__ inline int position(int row, int T, int P, const int* offsets) {
    return min((offsets == nullptr ? 0 : offsets[row / T]) + row % T, P - 1);
}

// Version 1: one thread per element. offsets (B,) int32 may be null.
template <typename S>
__global__ void encoder_forward_naive(S* out, const int* tokens, const S* wte, const S* wpe,
                                      const int* offsets, int N, int T, int C, int P) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int row = i / C, c = i % C;
    if (row < N)
        out[i] = from_float<S>(to_float(wte[size_t(tokens[row]) * C + c]) +
                               to_float(wpe[size_t(position(row, T, P, offsets)) * C + c]));
}

// Version 2 was a thread per 16 bytes: 781 -> 3060 GB/s on an H200 (16,384 rows of 768, bf16). Version 3: a warp
// per row, which finds token and position once a row instead of once a thread: half the instructions. Three
// packs of each table are under way at once; beyond the row the last one is loaded again. On 2026-11-27:
// 42.3 -> 37.1 us, 3315 GB/s with the tokens as frequent as in a text (Zipf's law; 65,536 rows), 56.3 -> 52.5
// us, 2988 GB/s with all equally frequent.
template <typename S>
__global__ void __launch_bounds__(256, 4)
encoder_forward(S* out, const int* tokens, const S* wte, const S* wpe, const int* offsets, int N, int T,
                int C, int P) {
    constexpr int SIZE = Pack<S>::size, LOADS = 3, STEP = WARP * SIZE;
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    griddepcontrol_launch_dependents();                     // programmatic dependent launch: see ptx.cuh
    if (row >= N) return;
    const S* token = wte + size_t(tokens[row]) * C;
    const S* place = wpe + size_t(position(row, T, P, offsets)) * C;
    S* y = out + size_t(row) * C;
    for (int first = lane * SIZE; first < C; first += LOADS * STEP) {
        Pack<S> a[LOADS], b[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            const int c = min(first + j * STEP, C - SIZE);
            a[j] = load_pack(token + c);
            b[j] = load_pack(place + c);
        }
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            float sum[SIZE];
#pragma unroll
            for (int k = 0; k < SIZE; k++) sum[k] = to_float(a[j][k]) + to_float(b[j][k]);
            if (first + j * STEP < C) store_pack(y + first + j * STEP, rounded_pack<S>(sum));
        }
    }
}

// ---- Backward, version 1: a thread per element of dwte, which looks through all N tokens for its own -----

template <typename S>
__global__ void encoder_backward_naive(float* dwte, const S* dout, const int* tokens, int N, int C) {
    const int c = blockIdx.y * blockDim.x + threadIdx.x, token = blockIdx.x;
    if (c >= C) return;
    float sum = 0.0f;
    for (int row = 0; row < N; row++)
        if (tokens[row] == token) sum += to_float(dout[size_t(row) * C + c]);
    dwte[size_t(token) * C + c] += sum;
}

// And one thread per element of dwpe, which adds up the B rows of its position.
template <typename S>
__global__ void encoder_backward_wpe_naive(float* dwpe, const S* dout, int B, int T, int C) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;    // over (T, C)
    if (i >= T * C) return;
    float sum = 0.0f;
    for (int b = 0; b < B; b++) sum += to_float(dout[size_t(b) * T * C + i]);
    dwpe[i] += sum;
}

// ---- Version 2, first launch: the rows of each token side by side ----------------------------------------
//
// order (N,) lists the rows of a token next to each other, ascending, so that the sum over a token has one
// owner and one order. A few tokens make up a large part of any text, so a group of rows is cut into chunks:
// each has 32 rows, the last one takes the remainder too (32 .. 63), and a group below 64 is one chunk.
//
//   token 7 stands in rows 3, 20, 41     order = .. | 3 20 41 | ..     one chunk: {7, begin, begin + 3, -1}
//   token 8 stands in 70 rows            order = .. | 70 rows | ..     {8, begin, begin + 32, slot} and
//                                                                      {8, begin + 32, begin + 70, slot + 1}
//
// The sums of a group of several chunks wait in the rows `slot` of partials, and groups[slot] of its first
// chunk holds the token and the number of chunks. An atomic counter decides which block's chunks come first in
// the list: that changes which worker computes a sum, not the sum.
//
// It is a counting sort. Block `bucket` sorts the tokens whose lowest bits are `bucket`, because the frequent
// tokens, whose numbers are close together, are then dealt out. Every block reads all the tokens, twice, and
// picks out its own: they are 256 KB, which come from the L2 cache. A warp owns a stretch of the rows and
// counts for itself: count[key][warp]. Sums over the warps before it, and over the keys before, turn the
// counts into places, and in the second reading the warp hands its places out in order. The work is the same
// for any text. (The sort before this one took four launches, and the square of a token's frequency.)

inline constexpr int CHUNK = 32;

// The sum of x over the threads before this one; total: over all. Every thread of the block must call it.
__device__ inline int block_scan(int x, int& total) {
    __shared__ int sums[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int sum = x;                                            // of this lane and the lanes before
    for (int offset = 1; offset < WARP; offset *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, sum, offset);
        if (lane >= offset) sum += before;
    }
    __syncthreads();                                        // the previous call has been read
    if (lane == WARP - 1) sums[warp] = sum;
    __syncthreads();
    sum -= x;
    total = 0;
    for (int w = 0; w < warps; w++) {
        if (w < warp) sum += sums[w];
        total += sums[w];
    }
    return sum;
}

// A warp walks the rows begin .. end - 1, 32 at a time, and calls f(token, lanes, row) for each token of the
// bucket among the 32; `lanes` are those whose rows have it. Returns how many of this lane's rows belong to
// lower buckets.
template <typename F>
__device__ inline int each_token(const int* tokens, int begin, int end, int V, int bits, const F& f) {
    constexpr int LOADS = 8;                                // under way at once
    const int bucket = blockIdx.x, mask = (1 << bits) - 1;
    int lower = 0;
    for (int first = begin; first < end; first += LOADS * WARP) {
        int token[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            const int row = first + j * WARP + threadIdx.x % WARP;
            token[j] = row < end ? tokens[row] : V;
        }
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            const bool inside = token[j] < V;
            lower += inside && (token[j] & mask) < bucket;
            unsigned left = __ballot_sync(ALL_LANES, inside && (token[j] & mask) == bucket);
            while (left) {                                  // seldom more than one token: they are dealt out
                const int other = __shfl_sync(ALL_LANES, token[j], __ffs(left) - 1);
                const unsigned lanes = __ballot_sync(ALL_LANES, token[j] == other);
                f(other, lanes, first + j * WARP + int(threadIdx.x % WARP));
                left &= ~lanes;
            }
        }
    }
    return lower;
}

__global__ void __launch_bounds__(1024, 1)
token_groups(int* order, int* chunks, int* chunk_count, int* groups, const int* tokens, int N, int V,
             int bits) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    __shared__ int list;                                    // where the chunks of this block begin
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int bucket = blockIdx.x, keys = ceil_div(V, 1 << bits);
    int* count = reinterpret_cast<int*>(shared_memory);     // (keys, warps), of token key << bits | bucket
    int* start = count + keys * warps;                      // (keys,)
    const int stretch = ceil_div(N, blockDim.x) * WARP;
    const int begin = min(warp * stretch, N), end = min(begin + stretch, N);

    for (int i = threadIdx.x; i < keys * warps; i += blockDim.x) count[i] = 0;
    __syncthreads();
    const int lower = each_token(tokens, begin, end, V, bits, [&](int token, unsigned lanes, int) {
        const int key = token >> bits;                      // a key's counts are always the same lane's
        if (lane == key % WARP) count[key * warps + warp] += __popc(lanes);
    });
    __syncthreads();
    for (int key = warp; key < keys; key += warps) {        // over the warps, each lane one
        const int own = lane < warps ? count[key * warps + lane] : 0;
        int sum = own;
        for (int offset = 1; offset < WARP; offset *= 2) {
            const int before = __shfl_up_sync(ALL_LANES, sum, offset);
            if (lane >= offset) sum += before;
        }
        if (lane < warps) count[key * warps + lane] = sum - own;
        if (lane == WARP - 1) start[key] = sum;
    }
    int base, rows, n_chunks;                               // where this bucket begins, its rows and chunks
    block_scan(lower, base);                                // its barriers are for start[] too
    const int key = threadIdx.x, n = key < keys ? start[key] : 0, token = key << bits | bucket;
    const int first = base + block_scan(n, rows);
    if (key < keys) start[key] = first;
    const int pieces = min(n, max(1, n / CHUNK)), mine = block_scan(pieces, n_chunks);
    if (threadIdx.x == 0) list = atomicAdd(chunk_count, n_chunks);
    const int slot = ceil_div(first, CHUNK);                // a chunk of several has 32 rows: it has it alone
    for (int s = ceil_div(base, CHUNK) + threadIdx.x; s < ceil_div(base + rows, CHUNK); s += blockDim.x)
        groups[2 * s + 1] = 0;
    __syncthreads();
    for (int i = 0; i < pieces; i++) {
        const int at = first + i * CHUNK;
        Pack<int> chunk;
        chunk[0] = token, chunk[1] = at, chunk[2] = i == pieces - 1 ? first + n : at + CHUNK;
        chunk[3] = pieces == 1 ? -1 : slot + i;
        store_pack(chunks + 4 * (list + mine + i), chunk);
    }
    if (pieces > 1) groups[2 * slot] = token, groups[2 * slot + 1] = pieces;

    each_token(tokens, begin, end, V, bits, [&](int token, unsigned lanes, int row) {
        const int key = token >> bits;
        int place = 0;
        if (lane == key % WARP) {
            place = start[key] + count[key * warps + warp];
            count[key * warps + warp] += __popc(lanes);
        }
        place = __shfl_sync(ALL_LANES, place, key % WARP);
        if (lanes >> lane & 1) order[place + __popc(lanes & ((1u << lane) - 1))] = row;
    });
}

// ---- Version 2, second launch: both gradients ------------------------------------------------------------

// With the other two launches 344 -> 144 us on an H200 on 2026-11-27 (65,536 rows of 768, bf16, tokens as
// frequent as in a text), against seven launches before. Of it token_groups 48 us, this one 97, the last 14.
// Tokens equally frequent: 271 -> 141 us, 16,384 rows of them 171 -> 55 us; a single token: 192 us. With 8
// lanes 154 us, with 32 lanes 142, with 8 loads 155.
//
// LANES lanes are a worker. It takes items in turn: a position of dwpe, or a chunk of dwte, in a strip of the
// channels, as many as its lanes read in one access. All items of a strip come before the next strip: both
// gradients read all of dout, but the strip (N LANES 16 bytes, 17 MB for 16 lanes and 65,536 rows) comes from
// memory once, and the second time from the L2 cache. A sum starts from what it is added to, so that this and
// LOADS rows are under way at once.
template <typename S, int LANES, int LOADS>
__global__ void __launch_bounds__(256, LOADS <= 4 ? 4 : 2)
encoder_backward(float* dwte, float* dwpe, float* partials, const S* dout, const int* order,
                 const int* chunks, const int* chunk_count, int B, int T, int C) {
    constexpr int SIZE = Pack<S>::size;
    const int workers = gridDim.x * blockDim.x / LANES, items = T + chunk_count[0];
    const int worker = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, lane = threadIdx.x % LANES;
    for (int strip = 0, c = lane * SIZE; c < C; strip++, c += LANES * SIZE) {
        // A position has B rows, more than most chunks: each strip deals the positions to other workers.
        const int turn = (worker + strip * (workers - T % workers)) % workers;
        for (int item = turn; item < items; item += workers) {
            const int* rows = nullptr;                      // of a position: item, T + item, 2 T + item, ..
            float* total = dwpe + size_t(item) * C + c;
            int n = B;
            bool accumulate = true;
            if (item >= T) {
                const Pack<int> chunk = load_pack(chunks + 4 * (item - T));
                const int token = chunk[0], begin = chunk[1], end = chunk[2], slot = chunk[3];
                accumulate = slot < 0;                      // this chunk is the whole group
                total = (accumulate ? dwte + size_t(token) * C : partials + size_t(slot) * C) + c;
                rows = order + begin;
                n = end - begin;
            }
            const auto row = [&](int i) { return rows == nullptr ? i * T + item : rows[i]; };
            Pack<float> sum[SIZE / 4] = {};
            if (accumulate)
                for (int k = 0; k < SIZE / 4; k++) sum[k] = load_pack(total + 4 * k);
            for (int i = 0; i < n; i += LOADS) {
                const S* address[LOADS];
                int4 dy[LOADS];                             // bits: bf16 in a condition would be moved singly
#pragma unroll
                for (int j = 0; j < LOADS; j++) address[j] = dout + size_t(row(min(i + j, n - 1))) * C + c;
#pragma unroll
                for (int j = 0; j < LOADS; j++)
                    if (i + j < n) dy[j] = *reinterpret_cast<const int4*>(address[j]);
#pragma unroll
                for (int j = 0; j < LOADS; j++)
                    if (i + j < n)
#pragma unroll
                        for (int k = 0; k < SIZE; k++)
                            sum[k / 4][k % 4] += to_float(reinterpret_cast<const Pack<S>&>(dy[j])[k]);
            }
            for (int k = 0; k < SIZE / 4; k++) store_pack(total + 4 * k, sum[k]);
        }
    }
}

// ---- Version 2, third launch: the tokens of several chunks -----------------------------------------------

// A block looks at eight slots. Where a group begins, its warps share the chunks, 128 channels of each, and
// the first warp adds up the eight shares.
__global__ void __launch_bounds__(256)
encoder_backward_join(float* dwte, const float* partials, const int* groups, int* chunk_count, int N, int C) {
    constexpr int WARPS = 8;
    __shared__ float shares[WARPS][4 * WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, c = (blockIdx.y * WARP + lane) * 4;
    if (blockIdx.x + blockIdx.y + threadIdx.x == 0) chunk_count[0] = 0;  // for the next batch
    int token[WARPS], pieces[WARPS];
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        const int slot = blockIdx.x * WARPS + i;
        token[i] = slot < ceil_div(N, CHUNK) ? groups[2 * slot] : 0;
        pieces[i] = slot < ceil_div(N, CHUNK) ? groups[2 * slot + 1] : 0;
    }
    for (int i = 0; i < WARPS; i++) {
        if (pieces[i] == 0) continue;
        const int share = ceil_div(pieces[i], WARPS), begin = min(warp * share, pieces[i]);
        const float* rows = partials + size_t(blockIdx.x * WARPS + i) * C;
        float sum[4] = {};
#pragma unroll 4
        for (int p = begin; p < min(begin + share, pieces[i]); p++)
            for (int k = 0; k < 4; k++) sum[k] += c + k < C ? rows[size_t(p) * C + c + k] : 0.0f;
        for (int k = 0; k < 4; k++) shares[warp][4 * lane + k] = sum[k];
        __syncthreads();
        if (warp == 0)
            for (int k = 0; k < min(4, C - c); k++) {
                for (int w = 1; w < WARPS; w++) sum[k] += shares[w][4 * lane + k];
                dwte[size_t(token[i]) * C + c + k] += sum[k];
            }
        __syncthreads();
    }
}
