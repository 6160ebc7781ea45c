// The emulator's own version of kernels/ptx_hopper.cuh: the same functions, in C++, after the PTX ISA
// ("mbarrier", "cp.async.bulk.tensor", "Asynchronous warpgroup level matrix instructions") and after what an
// H200 did where that says too little.
//
// Everything here that is asynchronous is late on purpose, and in an order of chance:
//
//   loads    fill their destination with NaN at once. The data land at some later switch of threads, at the
//            latest when all threads wait, and each load by itself
//   stores   read shared memory later, at the latest in bulk_wait_read, and write at the latest in bulk_wait
//   wgmma    only takes notes, and fills its accumulators with NaN. The products are computed in the
//            wgmma_wait that waits for them, from what is in shared memory then
//
// so that a kernel which does not wait reads NaN, and one that reuses a buffer too early spoils its results.
// Where a mistake can be known for certain it is an error instead. Now and then a whole warpgroup, or a block
// of a cluster, is held back, which shows what relies on their pace.
//
// Shared addresses are counted from the beginning of the dynamic shared memory, which is aligned to 64 KB.
#pragma once
#include "ptx.cuh"
#include "tensor_map.h"

#if __CUDA_ARCH__ != 900
#error "ptx_hopper.cuh is for sm_90a alone"
#endif

constexpr int WARPGROUP = 128;
using Barrier = unsigned long long;
using Descriptor = unsigned long long;
struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};

inline uint32_t shared_address(const void* p) {
    return (uint32_t)((const unsigned char*)p - emulator::dynamic_shared);
}

namespace emulator {

// ---- Chance, and what this file remembers of a thread -----------------------------------------------------

static uint64_t chance_state;

inline uint32_t chance(uint32_t n) {  // one of 0 .. n - 1
    chance_state ^= chance_state << 13, chance_state ^= chance_state >> 7, chance_state ^= chance_state << 17;
    return (uint32_t)(chance_state >> 33) % n;
}

static struct HopperThread {
    int next;  // in the list of those that wait for the same barrier
    // wgmma: how many products this thread has issued and how many groups it has committed
    int64_t issued, committed;
    bool fenced;
    // bulk stores: groups committed; those up to `waited` have been waited for; the last one that has a store
    int64_t groups, waited, used;
    int registers;  // what setmaxnreg has set, or 0
    // Rows that stmatrix has written since async_proxy_fence, as far as there is room
    const unsigned char* unfenced[32];
    int unfenced_count;
} hopper[MAX_THREADS];

#ifdef EMULATOR_RACES
// Copies and products are not accesses of the thread that happens to run.
struct Unwatched {
    bool before = watching;
    Unwatched() { watching = false; }
    ~Unwatched() { watching = before; }
};
#else
struct Unwatched {
    Unwatched() {}
};
#endif

// From here on failures are `thread`'s, not the running one's.
inline void blame(int thread) {
    current = thread, threadIdx = indices[thread], blockIdx = block_indices[rank_of(thread)];
}

// Where an address is, for messages.
inline Name place(const void* address) {
    Name result;
    int64_t at = (const unsigned char*)address - emulator_shared_memory;
    if (at >= 0 && at < (int64_t)(MAX_CLUSTER * SHARED_STRIDE)) {
        int length =
            snprintf(result.text, sizeof result.text, "byte %d of shared memory", (int)(at % SHARED_STRIDE));
        if (launch->cluster > 1)
            snprintf(result.text + length, sizeof result.text - length, " of block %u",
                     block_indices[at / SHARED_STRIDE].x);
    } else {
        snprintf(result.text, sizeof result.text, "%p", address);
    }
    return result;
}

inline void switch_to_others(const char* what, const void* object, int detail, const char* file, int line) {
    Thread& self = threads[current];
    self.state = WAITING, self.what = what, self.file = file, self.line = line;
    self.object = object, self.detail = detail;
    wait();
}

inline void let_others_run() {
    push(current);
    wait();
}

// Whether all threads of a block have returned.
static int returned_threads[MAX_CLUSTER];
inline bool has_ended(int rank) { return returned_threads[rank] == block_threads; }

// ---- mbarriers --------------------------------------------------------------------------------------------

// The eight bytes hold a word that says so and a number in this table.
constexpr uint64_t BARRIER_MAGIC = 0x626172726965;
constexpr int MAX_BARRIERS = 2048;
struct Mbarrier {
    const unsigned char* address;
    int count, pending;  // arrivals of a phase, and how many are missing
    int64_t bytes;       // expected and not yet arrived, or, negative, arrived before they were expected
    int64_t phase;
    int waiting;     // the first thread of the list, or -1
    int64_t seen;    // phases before this one have ended, and a thread of the block has seen it
    int64_t remote;  // the last phase to which another block has sent something since cluster_sync, or -1
};
static Mbarrier mbarriers[MAX_BARRIERS];
static int barrier_count;

inline uint64_t barrier_word(int number) { return BARRIER_MAGIC << 16 | number; }

inline Mbarrier* find_barrier(const void* address) {
    uint64_t word;
    memcpy(&word, address, 8);
    int number = word & 0xffff;
    if (word >> 16 != BARRIER_MAGIC || number >= barrier_count) return nullptr;
    return mbarriers[number].address == address ? &mbarriers[number] : nullptr;
}

inline Mbarrier& the_barrier(const void* address, const char* what, const char* file, int line) {
    if ((uintptr_t)address % 8)
        fail("%s at %s:%d: the barrier at %s is not aligned to 8 bytes", what, base(file), line,
             place(address).text);
    Mbarrier* found = find_barrier(address);
    if (!found)
        fail("%s at %s:%d: the barrier at %s was not initialised, or was overwritten", what, base(file), line,
             place(address).text);
    return *found;
}

// The next phase begins if nothing is missing from this one.
inline void settle(Mbarrier& barrier, const char* what, const char* file, int line) {
    if (barrier.pending > 0 || barrier.bytes > 0) return;
    if (barrier.bytes < 0)
        fail("%s at %s:%d: phase %lld of the barrier at %s got %lld bytes more than were expected", what,
             base(file), line, (long long)barrier.phase, place(barrier.address).text,
             -(long long)barrier.bytes);
    barrier.phase++, barrier.pending = barrier.count;
    new_epoch();
    for (int thread = barrier.waiting; thread >= 0; thread = hopper[thread].next) push(thread);
    barrier.waiting = -1;
}

inline void arrive(Mbarrier& barrier, int bytes, const char* what, const char* file, int line) {
    if (barrier.pending == 0)
        fail("%s at %s:%d: more arrivals than the %d of the barrier at %s, whose phase %lld lacks %lld bytes",
             what, base(file), line, barrier.count, place(barrier.address).text, (long long)barrier.phase,
             (long long)barrier.bytes);
    barrier.pending--, barrier.bytes += bytes;
    settle(barrier, what, file, line);
}

__attribute__((noinline)) inline void barrier_wait(const void* address, int parity, const char* file,
                                                   int line) {
    check_shared(address, 8, "barrier_wait", file, line);
    Mbarrier& barrier = the_barrier(address, "barrier_wait", file, line);
    if (parity >> 1) fail("barrier_wait at %s:%d: a parity is 0 or 1, not %d", base(file), line, parity);
    if ((barrier.phase & 1) != parity) {
        barrier.seen = barrier.phase;
        return;
    }
    int64_t phase = barrier.phase;
    hopper[current].next = barrier.waiting, barrier.waiting = current;
    switch_to_others("barrier_wait", &barrier, parity, file, line);
    if (barrier.phase != phase + 1)
        fail("barrier_wait at %s:%d: the barrier at %s was in phase %lld before this thread saw the end of "
             "phase %lld: on a card it might wait for ever",
             base(file), line, place(address).text, (long long)barrier.phase, (long long)phase);
    barrier.seen = barrier.phase;
}

// ---- Named barriers and the barrier of the cluster --------------------------------------------------------

struct NamedBarrier {
    int arrived, wanted;
    bool backwards;
    uint16_t threads[MAX_THREADS];
};
static NamedBarrier named_barriers[MAX_CLUSTER][16];

__attribute__((noinline)) inline void named_barrier(int number, int wanted, const char* file, int line) {
    if (number < 1 || number > 15)
        fail("named_barrier_sync at %s:%d: the number %d is not one of 1 .. 15", base(file), line, number);
    NamedBarrier& barrier = named_barriers[rank_of(current)][number];
    if (barrier.arrived == 0) barrier.wanted = wanted;
    if (barrier.wanted != wanted)
        fail("named_barrier_sync<%d>(%d) at %s:%d: %s waits for %d threads there", wanted, number, base(file),
             line, name(barrier.threads[0]).text, barrier.wanted);
    barrier.threads[barrier.arrived++] = current;
    if (barrier.arrived < wanted) {
        switch_to_others("named_barrier_sync", &barrier, number, file, line);
        return;
    }
    uint8_t lanes[MAX_THREADS / 32] = {};
    for (int i = 0; i < wanted; i++) lanes[barrier.threads[i] / 32]++;
    for (int i = 0; i < wanted; i++)
        if (lanes[barrier.threads[i] / 32] != 32)
            fail("named_barrier_sync<%d>(%d) at %s:%d: only %d lanes of the warp of %s are among its threads",
                 wanted, number, base(file), line, lanes[barrier.threads[i] / 32],
                 name(barrier.threads[i]).text);
    new_epoch();
    barrier.arrived = 0, barrier.backwards = !barrier.backwards;
    for (int i = 0; i < wanted - 1; i++) push(barrier.threads[barrier.backwards ? wanted - 2 - i : i]);
}

static uint16_t cluster_waiting[MAX_THREADS];
static int cluster_arrived;

// All threads that have not returned meet.
inline bool cluster_is_complete() {
    if (cluster_arrived == 0 || cluster_arrived + n_returned < n_threads) return false;
    new_epoch();
    for (int i = 0; i < barrier_count; i++) mbarriers[i].remote = -1;
    while (cluster_arrived) push(cluster_waiting[--cluster_arrived]);
    return true;
}

// ---- TMA: what is under way -------------------------------------------------------------------------------

enum Kind : uint8_t { LOAD, STORE, ADD };

// The copy of a box, or, map.rank == 0, of bytes as they lie.
struct Bulk {
    Kind kind;
    bool read;  // a store: its box is in `box` already
    int rank;   // of the block whose shared memory it is
    int thread;
    EncodedMap map;
    int at[5];
    unsigned char* shared;
    int bytes;
    Mbarrier* barrier;
    unsigned char* box;
    int64_t group;
    uint64_t due;  // the time when it makes its next step, or NEVER: when it must
    const char *what, *file;
    int line;
};
constexpr uint64_t NEVER = ~0ull;
static Bulk* bulks;
static int bulk_count, bulk_capacity;
static uint64_t now, next_due;

inline unsigned char* swizzled(unsigned char* p, int span) {
    uintptr_t a = (uintptr_t)p;
    return (unsigned char*)(a ^ (a >> 7 & (span / 16 - 1)) << 4);
}

// Calls f(number, where the row begins in global memory or null if it is outside) for each row of a box.
template <typename F>
inline void each_row(const Bulk& bulk, F f) {
    const EncodedMap& map = bulk.map;
    int index[5] = {}, rows = map.rows();
    for (int row = 0; row < rows; row++) {
        unsigned char* global = map.address + (int64_t)bulk.at[0] * map.element_bytes;
        bool inside = true;
        for (int i = 1; i < map.rank; i++) {
            int64_t coordinate = (int64_t)bulk.at[i] + index[i];
            inside &= coordinate >= 0 && coordinate < (int64_t)map.sizes[i];
            global += coordinate * (int64_t)map.strides[i - 1];
        }
        f(row, inside ? global : nullptr);
        for (int i = 1; i < map.rank && ++index[i] == map.box[i]; i++) index[i] = 0;
    }
}

// The bytes of each row that lie inside of the tensor: from `first` to before `last`.
struct Span {
    int first, last;
};
inline Span inside(const Bulk& bulk) {
    int64_t first = -(int64_t)bulk.at[0], last = (int64_t)bulk.map.sizes[0] - bulk.at[0];
    int64_t width = bulk.map.box[0];
    first = first < 0 ? 0 : first, last = last > width ? width : last;
    return {(int)first * bulk.map.element_bytes, last < first ? 0 : (int)last * bulk.map.element_bytes};
}

EMULATOR_UNWATCHED inline void fill_box(const Bulk& bulk) {
    if (!bulk.map.rank) {
        memcpy(bulk.shared, bulk.map.address, bulk.bytes);
        return;
    }
    int width = bulk.map.row_bytes(), span = bulk.map.swizzle_span();
    Span part = inside(bulk);
    each_row(bulk, [&](int row, const unsigned char* global) {
        __attribute__((aligned(16))) unsigned char zeros[2048];
        const unsigned char* from = global;
        if (!global || part.first > 0 || part.last < width) {
            memset(zeros, 0, width);
            if (global && part.last > part.first)
                memcpy(zeros + part.first, global + part.first, part.last - part.first);
            from = zeros;
        }
        unsigned char* to = bulk.shared + row * width;
        for (int i = 0; i < width; i += 16) memcpy(swizzled(to + i, span), from + i, 16);
    });
}

// A store's box, taken out of the swizzle.
EMULATOR_UNWATCHED inline void read_box(Bulk& bulk) {
    bulk.box = (unsigned char*)malloc(bulk.bytes);
    bulk.read = true;
    int span = bulk.map.swizzle_span();
    for (int i = 0; i < bulk.bytes; i += 16) memcpy(bulk.box + i, swizzled(bulk.shared + i, span), 16);
}

template <typename T, typename F>
inline void add_elements(unsigned char* to, const unsigned char* from, int bytes, F sum) {
    for (int i = 0; i < bytes; i += sizeof(T)) {
        T a, b;
        memcpy(&a, to + i, sizeof(T)), memcpy(&b, from + i, sizeof(T));
        a = sum(a, b);
        memcpy(to + i, &a, sizeof(T));
    }
}

EMULATOR_UNWATCHED inline void write_box(const Bulk& bulk) {
    int width = bulk.map.row_bytes();
    Span part = inside(bulk);
    if (bulk.kind == ADD)
        while (__atomic_exchange_n(launch->adding, 1, __ATOMIC_ACQUIRE)) continue;
    each_row(bulk, [&](int row, unsigned char* global) {
        if (!global || part.last <= part.first) return;
        const unsigned char* from = bulk.box + row * width + part.first;
        unsigned char* to = global + part.first;
        int bytes = part.last - part.first;
        if (bulk.kind == STORE) memcpy(to, from, bytes);
        else if (bulk.map.type == 7)
            add_elements<float>(to, from, bytes, [](float a, float b) { return a + b; });
        else
            add_elements<uint16_t>(to, from, bytes, [](uint16_t a, uint16_t b) {
                return emulator_bf16_bits(emulator_bf16_float(a) + emulator_bf16_float(b));
            });
    });
    if (bulk.kind == ADD) __atomic_store_n(launch->adding, 0, __ATOMIC_RELEASE);
}

// When the next step happens, by chance; late loads show missing waits, early ones a reuse too early.
inline uint64_t draw_due(Kind kind) {
    if (launch->copies) return launch->copies == 1 ? now : NEVER;
    switch (chance(4)) {
        case 0: return now + chance(16);
        case 1: return now + chance(kind == LOAD ? 400 : 2000);
        case 2: return kind == LOAD ? now + chance(3000) : NEVER;
        default: return NEVER;
    }
}

inline void forget(int i) {
    free(bulks[i].box);
    bulks[i] = bulks[--bulk_count];
}

// A load that has landed, until a thread of its block has waited for the phase of the barrier.
struct Unseen {
    const Mbarrier* barrier;
    int64_t phase;
    const unsigned char* shared;
    int bytes;
};
static Unseen unseen[64];
static int unseen_count;

// A load lands and is forgotten.
inline void land(int i) {
    Unwatched unwatched;
    Bulk& bulk = bulks[i];
    fill_box(bulk);
    unseen[unseen_count++ % 64] = {bulk.barrier, bulk.barrier->phase, bulk.shared, bulk.bytes};
    bulk.barrier->bytes -= bulk.bytes;
    if (rank_of(bulk.thread) != bulk.rank) bulk.barrier->remote = bulk.barrier->phase;
    int was = current;
    blame(bulk.thread);
    settle(*bulk.barrier, bulk.what, bulk.file, bulk.line);
    become(was);
    forget(i);
}

// A store makes one step; after the second it is forgotten.
inline void step(int i) {
    Unwatched unwatched;
    if (!bulks[i].read) {
        read_box(bulks[i]);
        bulks[i].due = draw_due(STORE);
        return;
    }
    write_box(bulks[i]);
    forget(i);
}

inline void find_next_due() {
    next_due = NEVER;
    for (int i = 0; i < bulk_count; i++)
        if (bulks[i].due < next_due) next_due = bulks[i].due;
}

inline bool overlaps(const unsigned char* a, int64_t a_bytes, const unsigned char* b, int64_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

static int unfenced_threads;

// What threads have written must be fenced before the copy engine or the tensor cores read it. Of writes
// those by stmatrix are known; with EMULATOR_RACES all are.
inline void check_fenced(const unsigned char* p, int bytes, const char* what, const char* file, int line) {
    for (int thread = 0; thread < n_threads && unfenced_threads; thread++)
        for (int i = 0; i < hopper[thread].unfenced_count; i++)
            if (overlaps(hopper[thread].unfenced[i], 16, p, bytes))
                fail("%s at %s:%d: it reads %s, to which %s wrote by stmatrix_x4 without async_proxy_fence",
                     what, base(file), line, place(hopper[thread].unfenced[i]).text, name(thread).text);
#ifdef EMULATOR_RACES
    if (const Access* write = unfenced_write(p, bytes))
        fail("%s at %s:%d: it reads what %s wrote at @%d without async_proxy_fence", what, base(file),
             line, name(write->thread).text, (int)write->instruction - 1);
#endif
}

// ---- TMA: what begins -------------------------------------------------------------------------------------

static unsigned char *array_start, *array_end;  // of the array that was found last in this block

// Every byte that a box touches is in the array where it begins.
inline void check_global(const unsigned char* first, const unsigned char* last, const char* what,
                         const char* file, int line) {
    bool found = first >= array_start && first < array_end;
    if (!found && !launch->find_array(first, &array_start, &array_end))
        fail("%s at %s:%d: at %p there is no array: it was freed, or the map is wrong", what, base(file),
             line, first);
    if (last > array_end)
        fail("%s at %s:%d: goes %lld bytes beyond the end of $%llu", what, base(file), line,
             (long long)(last - array_end), (unsigned long long)array_start);
}

inline void check_in_flight(const Bulk& bulk, const char* what, const char* file, int line);

// Notes a copy that has been checked for itself.
inline void begin_bulk(const Bulk& given) {
    Bulk bulk = given;
    for (int i = 0; i < bulk_count; i++) {
        const Bulk& other = bulks[i];
        if (other.rank != bulk.rank || other.read || (other.kind != LOAD && bulk.kind != LOAD)) continue;
        if (overlaps(other.shared, other.bytes, bulk.shared, bulk.bytes))
            fail("%s at %s:%d: the %d bytes at %s %s by the %s at %s:%d", bulk.what, base(bulk.file),
                 bulk.line, bulk.bytes, place(bulk.shared).text,
                 other.kind == LOAD ? "are still being filled" : "have not been read yet", other.what,
                 base(other.file), other.line);
    }
    if (bulk.kind == LOAD) {
        check_in_flight(bulk, bulk.what, bulk.file, bulk.line);
        Unwatched unwatched;
        memset(bulk.shared, 0xff, bulk.bytes);
    }
    bulk.due = draw_due(bulk.kind);
    if (bulk_count == bulk_capacity) {
        bulk_capacity = bulk_capacity ? 2 * bulk_capacity : 64;
        bulks = (Bulk*)realloc(bulks, bulk_capacity * sizeof(Bulk));
    }
    bulks[bulk_count++] = bulk;
    if (bulk.due < next_due) next_due = bulk.due;
    if (launch->copies == 1) {
        if (bulk.kind != LOAD) step(bulk_count - 1), step(bulk_count - 1);
        else
            land(bulk_count - 1);
    }
}

__attribute__((noinline)) inline void tma(Kind kind, const void* shared, const TensorMap& tensor_map,
                                          const void* barrier, int rank_of_map, const int* at,
                                          uint32_t blocks, const char* what, const char* file, int line) {
    Bulk bulk = {};
    bulk.kind = kind, bulk.what = what, bulk.file = file, bulk.line = line, bulk.thread = current;
    memcpy(&bulk.map, &tensor_map, sizeof bulk.map);
    const EncodedMap& map = bulk.map;
    if ((uintptr_t)&tensor_map % 64 || map.magic != MAP_MAGIC || map.sum != checksum(map))
        fail("%s at %s:%d: this is no tensor map: cuTensorMapEncodeTiled did not write it, or it was changed",
             what, base(file), line);
    if (map.rank != rank_of_map)
        fail("%s at %s:%d: %d coordinates for a tensor map of %d dimensions", what, base(file), line,
             rank_of_map, map.rank);
    memcpy(bulk.at, at, rank_of_map * sizeof(int));
    if ((int64_t)at[0] * map.element_bytes % 16)
        fail("%s at %s:%d: the innermost coordinate %d, %lld bytes, is not a multiple of 16 bytes", what,
             base(file), line, at[0], (long long)at[0] * map.element_bytes);
    for (int i = 0; i < map.rank; i++)
        if (kind != LOAD && at[i] < 0)
            fail("%s at %s:%d: coordinate %d is %d: only loads may begin outside of the tensor", what,
                 base(file), line, i, at[i]);
    if (kind == ADD && map.type != 7 && map.type != 9)
        fail("%s at %s:%d: a tensor of float32 or bfloat16 is wanted, the map's type is %d", what, base(file),
             line, map.type);
    int width = map.row_bytes();
    bulk.bytes = width * map.rows();
    if (map.swizzle && width != map.swizzle_span())
        fail("%s at %s:%d: a box %d bytes wide with a swizzle of %d: nobody has tried where that puts them",
             what, base(file), line, width, map.swizzle_span());
    // The swizzle follows the address, so a box begins where its pattern does.
    int alignment = map.swizzle == 0 ? 128 : 8 * map.swizzle_span();
    bulk.shared = (unsigned char*)shared;
    if ((bulk.shared - dynamic_shared) % alignment)
        fail("%s at %s:%d: %s is not aligned to %d bytes", what, base(file), line, place(shared).text,
             alignment);
    if (bulk.shared < dynamic_shared || bulk.shared + bulk.bytes > dynamic_shared + launch->dynamic_bytes)
        fail("%s at %s:%d: a box of %d bytes at %s is not inside the %d bytes of dynamic shared memory", what,
             base(file), line, bulk.bytes, place(shared).text, (int)launch->dynamic_bytes);

    // The first and the last byte of the part that is inside of the tensor
    unsigned char *first = map.address, *last = map.address;
    bool any = true;
    for (int i = 0; i < map.rank; i++) {
        int64_t low = at[i] < 0 ? 0 : at[i], high = (int64_t)at[i] + map.box[i];
        if (high > (int64_t)map.sizes[i]) high = map.sizes[i];
        any &= low < high;
        int64_t stride = i == 0 ? map.element_bytes : map.strides[i - 1];
        first += low * stride, last += (high - 1) * stride;
    }
    if (any) check_global(first, last + map.element_bytes, what, file, line);

    if (kind != LOAD) {
        check_fenced(bulk.shared, bulk.bytes, what, file, line);
        bulk.rank = rank_of(current);
        bulk.group = hopper[current].groups, hopper[current].used = bulk.group + 1;
        begin_bulk(bulk);
        return;
    }
    if (blocks == 0 || blocks >> launch->cluster)
        fail("%s at %s:%d: the blocks %#x are not blocks of a cluster of %d", what, base(file), line, blocks,
             (int)launch->cluster);
    check_shared(barrier, 8, what, file, line);
    int64_t own = rank_of(current) * SHARED_STRIDE;
    for (int rank = 0; blocks >> rank; rank++) {
        if (!(blocks >> rank & 1)) continue;
        int64_t distance = (int64_t)(rank * SHARED_STRIDE) - own;
        if (has_ended(rank))
            fail("%s at %s:%d: block %u of the cluster has ended", what, base(file), line,
                 block_indices[rank].x);
        bulk.rank = rank, bulk.shared = (unsigned char*)shared + distance;
        bulk.barrier = &the_barrier((const unsigned char*)barrier + distance, what, file, line);
        begin_bulk(bulk);
    }
}

__attribute__((noinline)) inline void load_bytes(void* shared, const void* global, int bytes,
                                                 const void* barrier, const char* file, int line) {
    const char* what = "bulk_load";
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16 || bytes % 16 || bytes <= 0)
        fail("bulk_load at %s:%d: %d bytes from %p to %s: all must be multiples of 16", base(file), line,
             bytes, global, place(shared).text);
    check_shared(shared, bytes, what, file, line);
    check_shared(barrier, 8, what, file, line);
    check_global((const unsigned char*)global, (const unsigned char*)global + bytes, what, file, line);
    Bulk bulk = {};
    bulk.kind = LOAD, bulk.rank = rank_of(current), bulk.thread = current;
    bulk.map.address = (unsigned char*)global, bulk.shared = (unsigned char*)shared, bulk.bytes = bytes;
    bulk.barrier = &the_barrier(barrier, what, file, line);
    bulk.what = what, bulk.file = file, bulk.line = line;
    begin_bulk(bulk);
}

// All but the `keep` latest groups of this thread are read, or read and written.
__attribute__((noinline)) inline void wait_for_bulk(int keep, bool written) {
    HopperThread& self = hopper[current];
    for (int i = 0; i < bulk_count; i++)
        if (bulks[i].kind != LOAD && bulks[i].thread == current && !bulks[i].read) {
            let_others_run();  // who writes too early does so now
            break;
        }
    for (int i = bulk_count - 1; i >= 0; i--) {
        if (bulks[i].kind == LOAD || bulks[i].thread != current || bulks[i].group >= self.groups - keep)
            continue;
        if (!bulks[i].read) step(i);
        if (written) step(i);
    }
    if (written && self.groups - keep > self.waited) self.waited = self.groups - keep;
}

// ---- wgmma ------------------------------------------------------------------------------------------------

constexpr int MAX_PRODUCTS = 256, MAX_ACCUMULATORS = 16, MAX_GROUPS = 64, MAX_N = 256;

// What is known of one wgmma, the same in all 128 threads.
struct Product {
    Descriptor a, b;
    bool a_in_registers, a_mn, b_mn, accumulate;
    int n, accumulator;
    bool first;  // nothing was under way into its accumulators
    const char* file;
    int line;
    uint16_t registers[64][16];  // a, if it comes from there
};

// Accumulators of a warpgroup while products into them are under way: the threads' arrays hold NaN.
struct Accumulator {
    int under_way, n;
    float* arrays[WARPGROUP];
    float values[64 * MAX_N];  // row by row
};

struct Warpgroup {
    Product products[MAX_PRODUCTS];  // number i is products[i % MAX_PRODUCTS]
    int64_t issued, done;            // by the thread that is furthest
    int64_t ends[MAX_GROUPS];        // of group i: how many products had been issued
    int64_t committed;
    Accumulator accumulators[MAX_ACCUMULATORS];
    int waiting, keep, line;  // in wgmma_wait
    const char* file;
    uint16_t threads[WARPGROUP];
};
static Warpgroup* warpgroups[MAX_THREADS / WARPGROUP];

inline Warpgroup& my_warpgroup(const char* what, const char* file, int line) {
    int number = current / WARPGROUP;
    if ((number + 1) * WARPGROUP > n_threads)
        fail("%s at %s:%d: the block has no whole warpgroup here", what, base(file), line);
    if (!warpgroups[number]) warpgroups[number] = (Warpgroup*)calloc(1, sizeof(Warpgroup));
    return *warpgroups[number];
}

// An operand, `side` rows or columns and 16 of k, at its place in shared memory.
struct Operand {
    unsigned char* start;
    int side, chunk_bytes;
    bool mn_major;

    // The bytes it spans are `pieces()` times `piece_bytes()`, chunk_bytes apart.
    int pieces() const { return mn_major ? (side + 63) / 64 : 1; }
    int piece_bytes() const { return mn_major ? 2048 : side * 128; }
    unsigned char* piece(int i) const {
        return (unsigned char*)((uintptr_t)start & ~1023ull) + i * chunk_bytes;
    }
};

// The fields of "Matrix descriptor format" in the PTX ISA, as ptx_hopper.cuh's describe() fills them.
inline Operand decode(Descriptor descriptor, int side, bool mn_major, int rank) {
    int start = (descriptor & 0x3fff) << 4, chunk = (descriptor >> 16 & 0x3fff) << 4;
    return {shared_of(rank) + start, side, chunk, mn_major};
}

inline void check_operand(const Operand& operand, Descriptor descriptor, const char* name, const char* file,
                          int line) {
    int start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1 || (descriptor & 0x3fffc000c000c000) || stride != 1024)
        fail("wgmma at %s:%d: the descriptor %#llx of %s is not describe()'s: 128-byte swizzle, 1024 bytes "
             "from 8 rows to the next",
             base(file), line, descriptor, name);
    if (start % 1024 > (operand.mn_major ? 0 : 96) || start % 32)
        fail("wgmma at %s:%d: %s, %s-major, begins at byte %d of shared memory: %s", base(file), line, name,
             operand.mn_major ? "MN" : "K", start,
             operand.mn_major ? "not a multiple of 1024"
                              : "not 0, 32, 64 or 96 bytes after a multiple of 1024");
    if (operand.pieces() > 1 && (operand.chunk_bytes < 2048 || operand.chunk_bytes % 1024))
        fail("wgmma at %s:%d: %s has its 64-wide chunks %d bytes apart: it must be a multiple of 1024, and "
             "2048 at least",
             base(file), line, name, operand.chunk_bytes);
    const unsigned char* end = operand.piece(operand.pieces() - 1) + operand.piece_bytes();
    if (end > dynamic_shared + launch->dynamic_bytes)
        fail("wgmma at %s:%d: %s, from byte %d on, ends at byte %d: the block has %d bytes of dynamic shared "
             "memory",
             base(file), line, name, start, (int)(end - dynamic_shared), (int)launch->dynamic_bytes);
    for (int j = 0; j < operand.pieces(); j++)
        check_fenced(operand.piece(j), operand.piece_bytes(), "wgmma", file, line);
    for (int i = 0; i < bulk_count; i++) {
        const Bulk& bulk = bulks[i];
        if (bulk.kind != LOAD || bulk.rank != rank_of(current)) continue;
        for (int j = 0; j < operand.pieces(); j++)
            if (overlaps(operand.piece(j), operand.piece_bytes(), bulk.shared, bulk.bytes))
                fail("wgmma at %s:%d: %s at byte %d of shared memory is still being filled by the %s at "
                     "%s:%d: a barrier_wait is missing",
                     base(file), line, name, start, bulk.what, base(bulk.file), bulk.line);
    }
    for (int i = 0; i < unseen_count && i < 64; i++) {
        const Unseen& load = unseen[i];
        if (load.barrier->seen > load.phase) continue;
        for (int j = 0; j < operand.pieces(); j++)
            if (overlaps(operand.piece(j), operand.piece_bytes(), load.shared, load.bytes))
                fail("wgmma at %s:%d: %s at byte %d of shared memory has been filled, but no thread has "
                     "waited for the barrier at %s",
                     base(file), line, name, start, place(load.barrier->address).text);
    }
}

// A load must not go where a product that is under way still reads.
inline void check_in_flight(const Bulk& bulk, const char* what, const char* file, int line) {
    int first = bulk.rank * block_threads / WARPGROUP, last = (bulk.rank + 1) * block_threads / WARPGROUP;
    for (int w = first; w < last; w++) {
        if (!warpgroups[w]) continue;
        for (int64_t i = warpgroups[w]->done; i < warpgroups[w]->issued; i++) {
            const Product& product = warpgroups[w]->products[i % MAX_PRODUCTS];
            for (int side = product.a_in_registers; side < 2; side++) {
                Operand operand = side ? decode(product.b, product.n, product.b_mn, bulk.rank)
                                       : decode(product.a, 64, product.a_mn, bulk.rank);
                for (int j = 0; j < operand.pieces(); j++)
                    if (overlaps(operand.piece(j), operand.piece_bytes(), bulk.shared, bulk.bytes))
                        fail("%s at %s:%d: %s is an operand of the wgmma at %s:%d, which has not been waited "
                             "for",
                             what, base(file), line, place(bulk.shared).text, base(product.file),
                             product.line);
            }
        }
    }
}

// Calls f(value, row, column) for each of a thread's accumulators, see the table in kernels/ptx_hopper.cuh.
template <typename F>
inline void each_accumulator(int thread, int n, F f) {
    int lane = thread % 32, row = thread / 32 % 4 * 16 + lane / 4, column = lane % 4 * 2;
    for (int j = 0; j < n / 8; j++)
        for (int i = 0; i < 4; i++) f(4 * j + i, row + i / 2 * 8, 8 * j + column + i % 2);
}

__attribute__((noinline)) inline void issue(float* d, int n, Descriptor a, const uint32_t* registers,
                                            Descriptor b, bool a_mn, bool b_mn, bool accumulate,
                                            const char* file, int line) {
    Warpgroup& group = my_warpgroup("wgmma", file, line);
    HopperThread& self = hopper[current];
    int thread = current % WARPGROUP;
    if (!self.fenced) fail("wgmma at %s:%d: no wgmma_fence since the last wgmma_commit", base(file), line);
    if (self.issued == group.issued) {  // the first thread to come here speaks for all
        if (group.issued - group.done == MAX_PRODUCTS)
            fail("wgmma at %s:%d: %d products are under way, and none was waited for", base(file), line,
                 MAX_PRODUCTS);
        int slot = 0, rank = rank_of(current);
        while (slot < MAX_ACCUMULATORS &&
               !(group.accumulators[slot].under_way && group.accumulators[slot].arrays[thread] == d))
            slot++;
        bool first = slot == MAX_ACCUMULATORS;
        if (first)
            for (slot = 0; slot < MAX_ACCUMULATORS && group.accumulators[slot].under_way;) slot++;
        if (slot == MAX_ACCUMULATORS)
            fail("wgmma at %s:%d: products into %d arrays are under way", base(file), line, slot);
        if (!registers) check_operand(decode(a, 64, a_mn, rank), a, "a", file, line);
        check_operand(decode(b, n, b_mn, rank), b, "b", file, line);
        Product& product = group.products[group.issued++ % MAX_PRODUCTS];
        product.a = a, product.b = b, product.a_in_registers = registers != nullptr;
        product.a_mn = a_mn, product.b_mn = b_mn, product.accumulate = accumulate;
        product.n = n, product.accumulator = slot, product.first = first;
        product.file = file, product.line = line;
        group.accumulators[slot].under_way++;
        if (first) group.accumulators[slot].n = n;
    }
    Product& product = group.products[self.issued++ % MAX_PRODUCTS];
    Accumulator& accumulator = group.accumulators[product.accumulator];
    if (product.line != line || product.n != n || (!registers && product.a != a) || product.b != b ||
        product.accumulate != accumulate)
        fail("wgmma at %s:%d: another thread of the warpgroup is at %s:%d, or has other operands", base(file),
             line, base(product.file), product.line);
    if (product.first) {
        accumulator.arrays[thread] = d;
        if (accumulate)
            each_accumulator(
                thread, n, [&](int i, int row, int column) { accumulator.values[row * n + column] = d[i]; });
        memset(d, 0xff, n / 2 * sizeof(float));
    } else if (accumulator.arrays[thread] != d || accumulator.n != n) {
        fail("wgmma at %s:%d: these are the accumulators of another wgmma that is under way", base(file),
             line);
    }
    if (registers) {
        int lane = thread % 32, row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            uint16_t* to = &product.registers[row + i % 2 * 8][column + i / 2 * 8];
            to[0] = registers[i], to[1] = registers[i] >> 16;
        }
    }
    EMULATOR_FENCE;
}

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(32), may_alias));

// 8 bf16 are the upper halves of 8 floats.
inline Floats widen(const void* p) {
    Words words = __builtin_convertvector(*(const Halves*)p, Words) << 16;
    return (Floats)words;
}

// Element (mn, k) of an operand, before the swizzle, is at
//   K-major     mn / 8 * 1024 + mn % 8 * 128 + k * 2
//   MN-major    mn / 64 * chunk_bytes + k / 8 * 1024 + k % 8 * 128 + mn % 64 * 2
// Eight that are neighbours, in k or in mn, are 16 bytes that the swizzle leaves together. `rows_of_k`: the
// result is [16][side], otherwise [side][16].
EMULATOR_UNWATCHED inline void gather(float* to, const Operand& operand, bool rows_of_k) {
    int mn_step = rows_of_k ? 1 : 16, k_step = rows_of_k ? operand.side : 1;
    auto put = [&](const unsigned char* from, float* at, int step) {
        Floats eight = widen(swizzled((unsigned char*)from, 128));
        if (step == 1) *(Floats*)at = eight;
        else
            for (int i = 0; i < 8; i++) at[i * step] = eight[i];
    };
    if (operand.mn_major)
        for (int k = 0; k < 16; k++)
            for (int mn = 0; mn < operand.side; mn += 8)
                put(operand.start + mn / 64 * operand.chunk_bytes + k * 128 + mn % 64 * 2,
                    to + mn * mn_step + k * k_step, mn_step);
    else
        for (int mn = 0; mn < operand.side; mn++)
            for (int k = 0; k < 16; k += 8)
                put(operand.start + mn * 128 + k * 2, to + mn * mn_step + k * k_step, k_step);
}

// d (64, n) = a (64, 16) @ b (16, n), or added to it: 4 rows and 16 columns at a time stay in registers.
inline void multiply(float* d, const float* a, const float* b, int n, bool accumulate) {
    for (int j = 0; j < n; j += 16)
        for (int i = 0; i < 64; i += 4) {
            Floats sums[4][2] = {};
            if (accumulate)
                for (int r = 0; r < 4; r++)
                    for (int c = 0; c < 2; c++) sums[r][c] = *(Floats*)(d + (i + r) * n + j + 8 * c);
            for (int k = 0; k < 16; k++) {
                Floats left = *(Floats*)(b + k * n + j), right = *(Floats*)(b + k * n + j + 8);
                for (int r = 0; r < 4; r++) {
                    float x = a[(i + r) * 16 + k];
                    sums[r][0] += x * left, sums[r][1] += x * right;
                }
            }
            for (int r = 0; r < 4; r++)
                for (int c = 0; c < 2; c++) *(Floats*)(d + (i + r) * n + j + 8 * c) = sums[r][c];
        }
}

// The products up to number `end` are computed. Where no later one is under way the threads get the results.
inline void complete_products(Warpgroup& group, int first_thread, int64_t end) {
    Unwatched unwatched;
    static __attribute__((aligned(32))) float a[64 * 16], b[16 * MAX_N];
    int rank = rank_of(first_thread);
    const Product* gathered = nullptr;  // whose b this is
    for (; group.done < end; group.done++) {
        const Product& product = group.products[group.done % MAX_PRODUCTS];
        Accumulator& accumulator = group.accumulators[product.accumulator];
        int n = product.n;
        if (!product.a_in_registers) {
            gather(a, decode(product.a, 64, product.a_mn, rank), false);
        } else {
            for (int row = 0; row < 64; row++)
                for (int k = 0; k < 16; k += 8)
                    *(Floats*)(a + row * 16 + k) = widen(&product.registers[row][k]);
        }
        if (!gathered || gathered->b != product.b || gathered->n != n || gathered->b_mn != product.b_mn)
            gather(b, decode(product.b, n, product.b_mn, rank), true);
        gathered = &product;
        multiply(accumulator.values, a, b, n, product.accumulate);
        if (--accumulator.under_way) continue;
        for (int thread = 0; thread < WARPGROUP; thread++) {
            float* d = accumulator.arrays[thread];
            each_accumulator(thread, n, [&](int i, int row, int column) {
                uint32_t bits;
                memcpy(&bits, d + i, 4);
                if (bits != 0xffffffff) {
                    blame(first_thread + thread);
                    fail("wgmma at %s:%d: d[%d] was written before wgmma_wait had waited for it",
                         base(product.file), product.line, i);
                }
                d[i] = accumulator.values[row * n + column];
            });
        }
    }
}

__attribute__((noinline)) inline void commit(const char* file, int line) {
    Warpgroup& group = my_warpgroup("wgmma_commit", file, line);
    HopperThread& self = hopper[current];
    if (self.committed == group.committed) {
        group.ends[group.committed++ % MAX_GROUPS] = self.issued;
        int64_t oldest = group.committed - MAX_GROUPS;
        if (oldest >= 0 && group.ends[oldest % MAX_GROUPS] > group.done)
            fail("wgmma_commit at %s:%d: %d groups are under way, and none was waited for", base(file), line,
                 MAX_GROUPS);
    }
    if (group.ends[self.committed % MAX_GROUPS] != self.issued)
        fail("wgmma_commit at %s:%d: another thread of the warpgroup has committed other products",
             base(file), line);
    self.committed++, self.fenced = false;
}

// The four warps meet, on a card too: when one thread goes on, all products it waited for are through.
__attribute__((noinline)) inline void wgmma_wait(int keep, const char* file, int line) {
    Warpgroup& group = my_warpgroup("wgmma_wait", file, line);
    int first = current / WARPGROUP * WARPGROUP;
    if (group.waiting == 0) group.keep = keep, group.file = file, group.line = line;
    const HopperThread &self = hopper[current], &other = hopper[group.waiting ? group.threads[0] : current];
    if (group.line != line || group.keep != keep || self.issued != other.issued ||
        self.committed != other.committed)
        fail("wgmma_wait<%d> at %s:%d: %s is in wgmma_wait<%d> at %s:%d, or has issued or committed other "
             "products",
             keep, base(file), line, name(group.threads[0]).text, group.keep, base(group.file), group.line);
    group.threads[group.waiting++] = current;
    if (group.waiting < WARPGROUP) {
        switch_to_others("wgmma_wait", &group, 0, file, line);
        return;
    }
    let_others_run();  // who goes on too early does so now
    if (self.committed > keep)
        complete_products(group, first, group.ends[(self.committed - keep - 1) % MAX_GROUPS]);
    new_epoch();
    group.waiting = 0;
    for (int i = 0; i < WARPGROUP - 1; i++) push(group.threads[i]);
    EMULATOR_FENCE;
}

// ---- What the runner calls --------------------------------------------------------------------------------

// Threads lag_first .. lag_last - 1 are held back until `lag_ends`, or until nobody else can run: half a warp, a
// warp, a warpgroup or a block of a cluster. The card does not promise that the lanes of a warp keep together.
static int lag_first, lag_last;
static uint64_t lag_ends;
static uint16_t parked[MAX_THREADS];
static int n_parked;

inline void draw_lag() {
    const int sizes[] = {16, 32, WARPGROUP, WARPGROUP, WARPGROUP, block_threads};
    int group = sizes[chance(launch->cluster == 1 ? 5 : 6)];
    int groups = (n_threads + group - 1) / group, which = chance(groups + 1);
    lag_first = which * group, lag_last = lag_first + group;  // which == groups: nobody
    lag_ends = now + 64 + chance(1024);
}

inline void begin_hopper() {
    while (bulk_count) forget(bulk_count - 1);
    barrier_count = cluster_arrived = n_parked = 0;
    unseen_count = unfenced_threads = 0;
    array_start = array_end = nullptr;
    now = 0, next_due = NEVER;
    chance_state = seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d;
    if (!chance_state) chance_state = 1;
    // The first of a cluster's blocks begins when the second has to wait for it, or the other way round.
    lag_first = lag_last = 0, lag_ends = 0;
    if (launch->cluster > 1) {
        lag_first = chance(launch->cluster) * block_threads, lag_last = lag_first + block_threads;
        lag_ends = NEVER;
    }
    memset(hopper, 0, n_threads * sizeof hopper[0]);
    memset(returned_threads, 0, sizeof returned_threads);
    for (auto& of_block : named_barriers)
        for (NamedBarrier& barrier : of_block) barrier.arrived = 0;
    for (Warpgroup* group : warpgroups)
        if (group) {
            group->issued = group->done = group->committed = 0, group->waiting = 0;
            for (Accumulator& accumulator : group->accumulators) accumulator.under_way = 0;
        }
}

inline bool progress(bool idle) {
    now++;
    bool happened = false;
    if (now >= next_due) {
        for (int i = bulk_count - 1; i >= 0; i--)
            if (i < bulk_count && bulks[i].due <= now) bulks[i].kind == LOAD ? land(i) : step(i);
        find_next_due();
        happened = true;
    }
    if (idle && !happened) {  // one of the loads lands
        int loads = 0;
        for (int i = 0; i < bulk_count; i++) loads += bulks[i].kind == LOAD;
        if (!loads) return false;
        int which = chance(loads), i = 0;
        while (bulks[i].kind != LOAD || which--) i++;
        land(i);
        find_next_due();
        happened = true;
    }
    if (barrier_count || launch->cluster > 1) {  // threads need not keep pace
        if (now >= lag_ends) {
            while (n_parked) push(parked[--n_parked]);
            draw_lag();
        }
        while (ready_head != ready_tail) {
            int next = ready[ready_head % MAX_THREADS];
            if (next < lag_first || next >= lag_last) break;
            parked[n_parked++] = next, ready_head++;
        }
        if (ready_head == ready_tail && n_parked) {
            lag_last = lag_first, lag_ends = now + 64;
            while (n_parked) push(parked[--n_parked]);
            happened = true;
        }
    }
    return happened;
}

inline void check_registers(int rank) {
    int total = 0, groups = block_threads / WARPGROUP;
    for (int w = 0; w < groups; w++) {
        int set = hopper[rank * block_threads + w * WARPGROUP].registers;
        if (!set) return;  // what the compiler gave it is not known here
        total += set * WARPGROUP;
    }
    if (total > 65536)
        fail("registers_increase and registers_decrease leave the block %d registers, an SM has 65536",
             total);
}

inline void thread_returned() {
    const HopperThread& self = hopper[current];
    int rank = rank_of(current);
    Warpgroup* group = warpgroups[current / WARPGROUP];
    if (group && self.issued > group->done)
        fail("%s returned, but no wgmma_wait has waited for its wgmma at %s:%d", name(current).text,
             base(group->products[group->done % MAX_PRODUCTS].file),
             group->products[group->done % MAX_PRODUCTS].line);
    if (self.used > self.groups)
        fail("%s returned without bulk_commit after its last store", name(current).text);
    if (self.used > self.waited) fail("%s returned without bulk_wait<0> for its stores", name(current).text);
    returned_threads[rank]++;
    cluster_is_complete();
    if (!has_ended(rank)) return;
    for (int i = 0; i < bulk_count; i++)
        if (bulks[i].kind == LOAD && bulks[i].rank == rank)
            fail("the block has ended, but the %s at %s:%d is still filling its shared memory", bulks[i].what,
                 base(bulks[i].file), bulks[i].line);
    for (int i = 0; i < barrier_count; i++)
        if (mbarriers[i].remote >= mbarriers[i].seen &&
            mbarriers[i].address - shared_of(rank) < (int64_t)SHARED_STRIDE &&
            mbarriers[i].address >= shared_of(rank))
            fail("the block has ended without waiting for what another block has sent to its barrier at %s: "
                 "that could come too late, a cluster_sync is missing",
                 place(mbarriers[i].address).text);
    check_registers(rank);
}

inline void explain(const Thread& thread, char* text, size_t room) {
    if (thread.object >= mbarriers && thread.object < mbarriers + MAX_BARRIERS) {
        const Mbarrier& barrier = *(const Mbarrier*)thread.object;
        int length = snprintf(text, room, "(barrier at %s, parity %d; its phase %lld lacks %d arrival%s",
                              place(barrier.address).text, thread.detail, (long long)barrier.phase,
                              barrier.pending, barrier.pending == 1 ? "" : "s");
        const char* rest = barrier.bytes > 0 ? " and %lld bytes)" : ", and %lld bytes came unexpected)";
        long long bytes = barrier.bytes < 0 ? -barrier.bytes : barrier.bytes;
        snprintf(text + length, room - length, bytes ? rest : ")", bytes);
        return;
    }
    if (thread.object == &cluster_arrived) {
        snprintf(text, room, " (%d of %d threads are there)", cluster_arrived, n_threads - n_returned);
        return;
    }
    for (auto& of_block : named_barriers)
        for (NamedBarrier& barrier : of_block)
            if (thread.object == &barrier) {
                snprintf(text, room, "(%d) (%d of %d threads are there)", thread.detail, barrier.arrived,
                         barrier.wanted);
                return;
            }
    for (Warpgroup* group : warpgroups)
        if (thread.object == group)
            snprintf(text, room, " (%d of the warpgroup's threads are there)", group->waiting);
}

static const bool hopper_is_there = (hooks = {begin_hopper, progress, thread_returned, explain}, true);

// ---- stmatrix ---------------------------------------------------------------------------------------------

struct StoredRows {
    void* row;
    uint32_t registers[4];
    const char* file;
    int line;
};

// As load_matrices in ptx.cuh, the other way.
EMULATOR_UNWATCHED inline void store_matrices(void** operands, uint32_t) {
    for (int m = 0; m < 4; m++)
        for (int r = 0; r < 8; r++) {
            const StoredRows& operand = *(const StoredRows*)operands[8 * m + r];
            unsigned char* row = (unsigned char*)operand.row;
            for (int i = 0; i < bulk_count; i++)
                if (bulks[i].kind != LOAD && !bulks[i].read &&
                    overlaps(row, 16, bulks[i].shared, bulks[i].bytes))
                    fail("stmatrix_x4 at %s:%d: %s has not been read yet by the %s at %s:%d: a "
                         "bulk_wait_read is missing",
                         base(operand.file), operand.line, place(row).text, bulks[i].what,
                         base(bulks[i].file), bulks[i].line);
            for (int q = 0; q < 4; q++)
                memcpy(row + 4 * q, &((StoredRows*)operands[4 * r + q])->registers[m], 4);
        }
}

}  // namespace emulator

// ---- mbarrier ---------------------------------------------------------------------------------------------

inline void barrier_init(Barrier* barrier, int count, EMULATOR_PLACE) {
    using namespace emulator;
    check_shared(barrier, 8, "barrier_init", file, line);
    if ((uintptr_t)barrier % 8)
        fail("barrier_init at %s:%d: %s is not aligned to 8 bytes", base(file), line, place(barrier).text);
    if (count < 1 || count >= 1 << 20)
        fail("barrier_init at %s:%d: a count of %d arrivals", base(file), line, count);
    if (find_barrier(barrier))
        fail("barrier_init at %s:%d: the barrier at %s is in use", base(file), line, place(barrier).text);
    if (barrier_count == MAX_BARRIERS) fail("barrier_init at %s:%d: too many barriers", base(file), line);
    mbarriers[barrier_count] = {(unsigned char*)barrier, count, count, 0, 0, -1, 0, -1};
    *barrier = barrier_word(barrier_count++);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(Barrier* barrier, EMULATOR_PLACE) {
    using namespace emulator;
    check_shared(barrier, 8, "barrier_arrive", file, line);
    arrive(the_barrier(barrier, "barrier_arrive", file, line), 0, "barrier_arrive", file, line);
}
inline void barrier_arrive_cluster(Barrier* barrier, int rank, EMULATOR_PLACE) {
    using namespace emulator;
    const char* what = "barrier_arrive_cluster";
    check_shared(barrier, 8, what, file, line);
    if (rank < 0 || rank >= (int)launch->cluster)
        fail("%s at %s:%d: a cluster of %d has no block %d", what, base(file), line, (int)launch->cluster,
             rank);
    if (has_ended(rank))
        fail("%s at %s:%d: block %u of the cluster has ended", what, base(file), line, block_indices[rank].x);
    int64_t distance = (rank - rank_of(current)) * (int64_t)SHARED_STRIDE;
    Mbarrier& there = the_barrier((unsigned char*)barrier + distance, what, file, line);
    if (distance) there.remote = there.phase;
    arrive(there, 0, what, file, line);
}
inline void barrier_arrive_expect(Barrier* barrier, int bytes, EMULATOR_PLACE) {
    using namespace emulator;
    const char* what = "barrier_arrive_expect";
    check_shared(barrier, 8, what, file, line);
    if (bytes < 0 || bytes >= 1 << 20)
        fail("%s at %s:%d: %d bytes are over the limit of 2^20 - 1", what, base(file), line, bytes);
    arrive(the_barrier(barrier, what, file, line), bytes, what, file, line);
}
// Lets others run, and tells whether the phase has ended then.
inline bool barrier_try_wait(Barrier* barrier, int parity, EMULATOR_PLACE) {
    using namespace emulator;
    check_shared(barrier, 8, "barrier_try_wait", file, line);
    Mbarrier& state = the_barrier(barrier, "barrier_try_wait", file, line);
    if ((state.phase & 1) != parity) {
        state.seen = state.phase;
        return true;
    }
    Thread& self = threads[current];
    self.state = WAITING, self.what = "barrier_try_wait", self.file = file, self.line = line;
    self.object = &state, self.detail = parity;
    if (ready_head == ready_tail && !n_parked && !progress(true)) deadlock();
    let_others_run();
    if ((state.phase & 1) == parity) return false;
    state.seen = state.phase;
    return true;
}
inline void barrier_wait(Barrier* barrier, int parity, EMULATOR_PLACE) {
    emulator::barrier_wait(barrier, parity, file, line);
    EMULATOR_FENCE;
}

// ---- TMA --------------------------------------------------------------------------------------------------

inline void tma_load(void* smem, const TensorMap& map, Barrier* barrier, int x, int y, EMULATOR_PLACE) {
    int at[] = {x, y};
    emulator::tma(emulator::LOAD, smem, map, barrier, 2, at, 1u << emulator::rank_of(emulator::current),
                  "tma_load", file, line);
    EMULATOR_FENCE;
}
inline void tma_load(void* smem, const TensorMap& map, Barrier* barrier, int x, int y, int z, int w,
                     EMULATOR_PLACE) {
    int at[] = {x, y, z, w};
    emulator::tma(emulator::LOAD, smem, map, barrier, 4, at, 1u << emulator::rank_of(emulator::current),
                  "tma_load", file, line);
    EMULATOR_FENCE;
}
inline void tma_load_multicast(void* smem, const TensorMap& map, Barrier* barrier, int x, int y,
                               unsigned short blocks, EMULATOR_PLACE) {
    int at[] = {x, y};
    emulator::tma(emulator::LOAD, smem, map, barrier, 2, at, blocks, "tma_load_multicast", file, line);
    EMULATOR_FENCE;
}
inline void bulk_load(void* smem, const void* gmem, int bytes, Barrier* barrier, EMULATOR_PLACE) {
    emulator::load_bytes(smem, gmem, bytes, barrier, file, line);
    EMULATOR_FENCE;
}
inline void tma_store(const TensorMap& map, const void* smem, int x, int y, EMULATOR_PLACE) {
    int at[] = {x, y};
    EMULATOR_FENCE;
    emulator::tma(emulator::STORE, smem, map, nullptr, 2, at, 0, "tma_store", file, line);
}
inline void tma_store(const TensorMap& map, const void* smem, int x, int y, int z, int w, EMULATOR_PLACE) {
    int at[] = {x, y, z, w};
    EMULATOR_FENCE;
    emulator::tma(emulator::STORE, smem, map, nullptr, 4, at, 0, "tma_store", file, line);
}
inline void tma_add(const TensorMap& map, const void* smem, int x, int y, EMULATOR_PLACE) {
    int at[] = {x, y};
    EMULATOR_FENCE;
    emulator::tma(emulator::ADD, smem, map, nullptr, 2, at, 0, "tma_add", file, line);
}
inline void bulk_commit() { emulator::hopper[emulator::current].groups++; }
template <int N>
inline void bulk_wait_read() {
    emulator::wait_for_bulk(N, false);
    EMULATOR_FENCE;
}
template <int N>
inline void bulk_wait() {
    emulator::wait_for_bulk(N, true);
    EMULATOR_FENCE;
}
inline void async_proxy_fence() {  // every write is seen at once here: see check_fenced
    emulator::HopperThread& self = emulator::hopper[emulator::current];
    if (self.unfenced_count) emulator::unfenced_threads--;
    self.unfenced_count = 0;
#ifdef EMULATOR_RACES
    emulator::proxy_fences[emulator::current]++;
#endif
    EMULATOR_FENCE;
}

// ---- wgmma ------------------------------------------------------------------------------------------------

inline Descriptor describe(const void* tile, int chunk_bytes = 16) {
    return (shared_address(tile) & 0x3ffff) >> 4 | (Descriptor)(chunk_bytes >> 4) << 16 |
           (Descriptor)(1024 >> 4) << 32 | 1ull << 62;
}
inline Descriptor advance(Descriptor descriptor, int bytes) { return descriptor + (bytes >> 4); }

inline void wgmma_fence() {
    emulator::hopper[emulator::current].fenced = true;
    EMULATOR_FENCE;
}
inline void wgmma_commit(EMULATOR_PLACE) { emulator::commit(file, line); }
template <int N>
inline void wgmma_wait(EMULATOR_PLACE) {
    EMULATOR_FENCE;
    emulator::wgmma_wait(N, file, line);
}
template <int N>
inline void wgmma_results(float (&d)[N], EMULATOR_PLACE) {
    using namespace emulator;
    const Warpgroup* group = warpgroups[current / WARPGROUP];
    for (int64_t i = group ? group->done : 0; i < hopper[current].issued; i++) {  // by this thread
        int slot = group->products[i % MAX_PRODUCTS].accumulator;
        if (group->accumulators[slot].arrays[current % WARPGROUP] == d)
            fail("wgmma_results at %s:%d: products into these accumulators are under way", base(file), line);
    }
    EMULATOR_FENCE;
}

template <bool A_MN, bool B_MN, int HALF>
inline void wgmma(float (&d)[HALF], Descriptor a, Descriptor b, bool accumulate, EMULATOR_PLACE) {
    static_assert(HALF == 32 || HALF == 64 || HALF == 80 || HALF == 96 || HALF == 128,
                  "ptx_hopper.cuh has wgmma for N = 64, 128, 160, 192 and 256");
    emulator::issue(d, 2 * HALF, a, nullptr, b, A_MN, B_MN, accumulate, file, line);
}
template <bool B_MN, int HALF>
inline void wgmma(float (&d)[HALF], const uint32_t* a, Descriptor b, bool accumulate, EMULATOR_PLACE) {
    static_assert(HALF == 32 || HALF == 64 || HALF == 80 || HALF == 96 || HALF == 128,
                  "ptx_hopper.cuh has wgmma for N = 64, 128, 160, 192 and 256");
    emulator::issue(d, 2 * HALF, 0, a, b, false, B_MN, accumulate, file, line);
}

// ---- stmatrix, barriers of threads, registers -------------------------------------------------------------

inline void stmatrix_x4(void* smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3, EMULATOR_PLACE) {
    using namespace emulator;
    if ((uintptr_t)smem % 16)
        fail("stmatrix_x4 at %s:%d: %s is not a multiple of 16", base(file), line, place(smem).text);
    check_shared(smem, 16, "stmatrix_x4", file, line);
    touch(smem, 16, true, __builtin_return_address(0));
    HopperThread& self = hopper[current];
    if (self.unfenced_count == 0) unfenced_threads++;
    if (self.unfenced_count < 32) self.unfenced[self.unfenced_count++] = (unsigned char*)smem;
    StoredRows operand = {smem, {r0, r1, r2, r3}, file, line};
    meet("stmatrix_x4", EMULATOR_ALL, &operand, store_matrices, file, line);
    EMULATOR_FENCE;
}

template <int THREADS>
inline void named_barrier_sync(int number, EMULATOR_PLACE) {
    static_assert(THREADS > 0 && THREADS <= 1024 && THREADS % 32 == 0, "whole warps");
    EMULATOR_FENCE;
    emulator::named_barrier(number, THREADS, file, line);
    EMULATOR_FENCE;
}
inline void cluster_sync(EMULATOR_PLACE) {
    using namespace emulator;
    EMULATOR_FENCE;
    cluster_waiting[cluster_arrived++] = current;
    cluster_is_complete();
    switch_to_others("cluster_sync", &cluster_arrived, 0, file, line);
    EMULATOR_FENCE;
}
inline int cluster_rank() { return emulator::rank_of(emulator::current); }

template <int N>
inline void registers_increase() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
    emulator::hopper[emulator::current].registers = N;
}
template <int N>
inline void registers_decrease() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
    emulator::hopper[emulator::current].registers = N;
}
