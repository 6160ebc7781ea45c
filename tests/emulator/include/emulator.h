// CUDA on the CPU: enough of the language for the .cu files of this project, for any C++17 compiler.
//
// The driver (compiler.py) puts this file in front of a .cu file and the result into a shared library;
// launcher.py calls `emulator_run`. Blocks run one after another; only the blocks of a cluster run together.
// Every CUDA thread is a fiber with a stack of its own, and runs until it has to wait for others: at a
// barrier (all fibers of the block meet) or in a warp function (the lanes of the mask meet). Nothing is
// preempted, so a switch costs a few nanoseconds, and threads that never wait run one after another on one
// stack. What would be a hang or a wrong number on a GPU is an error: it names kernel, block, thread, line.
//
// Read first: __init__.py, which says what this finds and what it cannot find. Then: ptx.cuh, ptx_hopper.cuh.
#pragma once

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EMULATOR   1
#define __CUDACC__ 1

// ---- the language

#define __global__
#define __device__
#define __host__
#define __constant__    static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__    __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)  // compiler.py reads it
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n)   __attribute__((aligned(n)))
#define __restrict__ __restrict
// A block's variable: one static object, since blocks run one after another. Where a launch uses several
// operating system threads, each of them has loaded its own copy of the library. The driver finds these
// objects in the library's symbol table, and `run_blocks` fills them with NaN before each block. Of
// `extern __shared__` arrays the driver has made pointers: to emulator::dynamic_shared, see there.
#define __shared__ static

extern "C" __attribute__((visibility("hidden"))) unsigned char emulator_shared_memory[];

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATOR_VECTORS(T, name, align1, align2, align4)              \
    struct __attribute__((aligned(align1))) name##1 { T x; };          \
    struct __attribute__((aligned(align2))) name##2 { T x, y; };       \
    struct name##3_base { T x, y, z; };                                \
    struct __attribute__((aligned(align4))) name##4 { T x, y, z, w; }; \
    inline name##1 make_##name##1(T x) { return {x}; }                 \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(signed char, char, 1, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 1, 2, 4)
EMULATOR_VECTORS(short, short, 2, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 2, 4, 8)
EMULATOR_VECTORS(int, int, 4, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 4, 8, 16)
EMULATOR_VECTORS(float, float, 4, 8, 16)
EMULATOR_VECTORS(long long, longlong, 8, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
EMULATOR_VECTORS(double, double, 8, 16, 16)
#undef EMULATOR_VECTORS
struct int3 {
    int x, y, z;
};
struct float3 {
    float x, y, z;
};
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }

static uint3 threadIdx, blockIdx;  // of the running fiber: set at every switch
static dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

// ---- the runner

namespace emulator {

constexpr int MAX_THREADS = 1024;  // of a block, and of all blocks of a cluster together
constexpr int MAX_CLUSTER = 8;

// Where a failure happened, for launcher.py: it turns `address` and `instruction` into names.
struct Failure {
    int failed;
    int signal;  // 0: the message below says everything
    unsigned block[3], thread[3];
    void* address;  // of the access that faulted
    void* instruction;
    char message[2048];
};

// Some of the shared memory.
struct Range {
    unsigned char* start;
    uint64_t bytes;
};

// One call of emulator_run; the same fields in the same order as in launcher.py.
struct Launch {
    void* kernel;
    void (*invoke)(void* kernel, void** arguments);
    void** arguments;
    unsigned grid[3], block[3];
    uint64_t cluster;  // neighbouring blocks that run together and reach each other's barriers
    uint64_t dynamic_bytes;
    int64_t order;  // 0: threads and blocks in ascending order, -1: descending, otherwise the shuffle's seed
    uint64_t* next_block;   // counts up; shared by all operating system threads that work on this launch
    unsigned char* stacks;  // MAX_THREADS + 1, each with an untouchable page at its low end
    uint64_t stack_bytes;
    Range* shared;  // the static shared variables of this kernel
    int64_t shared_count;
    unsigned char *lowest, *highest;  // where the library's shared variables are, of all its kernels
    Failure* failure;
    void (*enter)(void (*escape)(int, void*, void*));  // the runtime's: signals of this thread go to `escape`
    void (*leave)();
    // The runtime's: whether `address` is in a live array, and where that begins and ends
    int (*find_array)(const void* address, unsigned char** start, unsigned char** end);
    uint32_t* adding;  // a lock for sums in global memory, of all operating system threads of this launch
    int64_t copies;  // EMULATOR_COPIES: 0 they arrive at some time, 1 at once, 2 as late as possible
};

enum State : uint8_t { FRESH, READY, AT_BARRIER, IN_WARP, WAITING, RETURNED };

// A cp.async on its way.
struct Copy {
    unsigned char* to;
    unsigned char bytes[16];
};

struct Thread {
    void* stack_pointer;
    int stack;
    State state;
    const char* what;  // the function it waits in, and where that was called
    const char* file;
    int line;
    uint32_t mask;
    const void* object;  // WAITING: what for, as Hooks::explain understands it
    int detail;
    // cp.async: copies in the order of issue; ends[g] = how many there were when group g was committed
    Copy* copies;
    int copy_count, copy_capacity, landed;
    int ends[64];
    int groups, groups_done;
};

// Lanes of one mask that wait for each other. `complete` moves the data once all are there.
struct Meeting {
    uint32_t mask, arrived;
    void (*complete)(void** operands, uint32_t mask);
    const char* what;
    void* operands[32];
};

struct Warp {
    uint32_t alive;  // lanes that exist and have not returned
    uint16_t epoch;  // counts the warp's __syncwarps
    int open;        // meetings in use
    Meeting meetings[32];
};

static Launch* launch;
static Thread threads[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static uint3 indices[MAX_THREADS];  // threadIdx of every thread
static int n_threads, n_returned, current;
static int block_threads;  // threads 0 .. block_threads - 1 are those of the cluster's first block, and so on
static uint3 block_indices[MAX_CLUSTER];
static uint64_t seed;  // of the block or cluster that runs, for everything that is left to chance
static void* runner;                 // the stack pointer of run_block
static uint16_t ready[MAX_THREADS];  // a ring: threads that can run
static unsigned ready_head, ready_tail;
static uint16_t order[MAX_THREADS];
static int free_stacks[MAX_THREADS + 1], n_free_stacks;

// A block's __syncthreads.
static struct Gathering {
    int arrived, any, all, count;     // of the barrier that is filling
    int was_any, was_all, was_count;  // of the one that was completed last
    int first;                        // the thread that came first
    bool backwards;                   // the next phase visits `order` from its end
} gatherings[MAX_CLUSTER];

// What ptx_hopper.cuh adds to the runner where a text includes it: copies and products that go on while
// threads run. All are null otherwise.
static struct Hooks {
    void (*begin)();              // before the threads of a block or cluster start
    bool (*progress)(bool idle);  // at every switch; idle: no thread can run. Whether anything has happened
    void (*returned)();           // the running thread has returned
    void (*explain)(const Thread&, char* text, size_t room);  // what a WAITING thread waits for
} hooks;

// The number of a thread's block in its cluster.
inline int rank_of(int thread) { return (unsigned)thread / (unsigned)block_threads; }

// Saves what a function call must keep, stores the stack pointer in *from, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
inline void* new_stack(unsigned char* top, void (*entry)()) {
    void** slot = (void**)top;
    *--slot = nullptr;       // entry's return address: it never returns
    *--slot = (void*)entry;  // where `ret` goes
    for (int i = 0; i < 6; i++) *--slot = nullptr;
    return slot;
}
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.type emulator_switch, %function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulator_switch, .-emulator_switch
)");
inline void* new_stack(unsigned char* top, void (*entry)()) {
    void** slot = (void**)(top - 160);
    memset(slot, 0, 160);
    slot[11] = (void*)entry;  // x30, the link register
    return slot;
}
#else
#error "emulator.h knows how to switch stacks on x86-64 and aarch64 only: write emulator_switch"
#endif

// The dynamic shared memory of the blocks of a cluster, between pages that must not be touched; see
// protect_shared_memory. A block has its own part of the array, of which it uses the beginning.
constexpr uint64_t SHARED_GUARD = 0x10000, SHARED_STRIDE = 0x60000;
asm(R"(
.pushsection .bss
.balign 65536
.zero 0x10000
.hidden emulator_shared_memory
.globl emulator_shared_memory
.type emulator_shared_memory, %object
emulator_shared_memory:
.zero 8 * 0x60000
.size emulator_shared_memory, 8 * 0x60000
.popsection
)");
inline unsigned char* shared_of(int rank) { return emulator_shared_memory + rank * SHARED_STRIDE; }

static unsigned char* dynamic_shared;  // of the running fiber's block

// Leaves the kernel for good: the fibers' frames are abandoned.
[[noreturn]] inline void abandon() {
    launch->failure->failed = 1;
    memcpy(launch->failure->block, &blockIdx, sizeof blockIdx);
    memcpy(launch->failure->thread, &threadIdx, sizeof threadIdx);
    void* nowhere;
    emulator_switch(&nowhere, runner);
    abort();
}

[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(launch->failure->message, sizeof launch->failure->message, format, values);
    va_end(values);
    abandon();
}

// Called by the runtime's signal handler, on the handler's stack.
inline void escape(int signal, void* address, void* instruction) {
    launch->failure->signal = signal;
    launch->failure->address = address;
    launch->failure->instruction = instruction;
    abandon();
}

struct Name {
    char text[80];
};
inline Name name(int thread) {
    Name result;
    uint3 i = indices[thread], b = block_indices[rank_of(thread)];
    int length = snprintf(result.text, sizeof result.text, "thread (%u, %u, %u)", i.x, i.y, i.z);
    if (launch->cluster > 1)
        snprintf(result.text + length, sizeof result.text - length, " of block (%u, %u, %u)", b.x, b.y, b.z);
    return result;
}
inline const char* base(const char* path) {
    const char* slash = path ? strrchr(path, '/') : nullptr;
    return slash ? slash + 1 : path ? path : "?";
}

inline void push(int thread) { ready[ready_tail++ % MAX_THREADS] = thread; }

// All that are left wait for each other: says who waits where.
[[noreturn]] __attribute__((noinline)) inline void deadlock() {
    char text[1900], object[300];
    int length = 0;
    bool told[MAX_THREADS] = {};
    for (int t = 0; t < n_threads && length < 1400; t++) {
        if (told[t]) continue;
        const Thread& a = threads[t];
        int alike = 0;
        for (int u = t; u < n_threads; u++) {
            const Thread& b = threads[u];
            if (a.state != b.state || (a.state != RETURNED && (a.line != b.line || a.what != b.what)))
                continue;
            if (a.state == WAITING && (a.object != b.object || a.detail != b.detail)) continue;
            told[u] = true, alike++;
        }
        const char* s = alike > 1 ? "s" : "";
        object[0] = 0;
        if (a.state == WAITING) hooks.explain(a, object, sizeof object);
        if (a.state == RETURNED)
            length += snprintf(text + length, sizeof text - length, "; %d thread%s returned, first %s", alike,
                               s, name(t).text);
        else
            length += snprintf(text + length, sizeof text - length,
                               "; %d thread%s waiting in %s%s at %s:%d, first %s", alike, s, a.what, object,
                               base(a.file), a.line, name(t).text);
    }
    fail("deadlock%s", text);
}

// From now on `thread` is the running one.
inline void become(int thread) {
    current = thread;
    threadIdx = indices[thread];
    if (launch->cluster > 1) {
        blockIdx = block_indices[rank_of(thread)];
        dynamic_shared = shared_of(rank_of(thread));
    }
}

void fiber();

// Runs `thread` on its stack, or on a free one if it has not begun. The caller's place goes to *from.
inline void go(int thread, void** from) {
    Thread& next = threads[thread];
    become(thread);
    if (next.state == FRESH) {
        next.stack = free_stacks[--n_free_stacks];
        // Staggered: a power of two apart, all stacks would fall into the same cache sets.
        unsigned char* top =
            launch->stacks + (next.stack + 1) * launch->stack_bytes - (next.stack * 37 % 128) * 64;
        next.stack_pointer = new_stack(top, fiber);
    }
    next.state = READY;
    emulator_switch(from, next.stack_pointer);
}

// ---- Races in shared memory. With EMULATOR_RACES the compiler calls __tsan_read4 and its like (see the end
// of this file) at every access; no library of its own is behind them, but `touch`. Two threads' accesses to
// a byte are in order if a __syncthreads lies between them, or a __syncwarp if they are of one warp. Each
// byte remembers its last write and two readers of this epoch.
#ifdef EMULATOR_RACES
#ifdef __clang__  // where no_sanitize leaves the calls for atomics in
#define EMULATOR_UNWATCHED __attribute__((noinline, disable_sanitizer_instrumentation))
#else
#define EMULATOR_UNWATCHED __attribute__((noinline, no_sanitize("thread")))
#endif

static uint32_t proxy_fences[MAX_THREADS];  // how often each thread has called async_proxy_fence

struct Access {
    uint32_t epoch, instruction;  // the latter as a distance from emulator_run
    uint32_t fences;              // the thread's proxy_fences
    uint16_t thread, warp_epoch;
};
struct Byte {
    Access write, reads[2];
};
static uint32_t epoch, first_epoch;  // counts barriers, of all blocks; when this block began
static bool watching;
static Byte* shadow;  // of all bytes from launch->lowest to launch->highest

extern "C" void emulator_run(Launch* given);

// The record of a byte of the kernel's shared memory, or null for any other address.
EMULATOR_UNWATCHED inline Byte* record(const unsigned char* p) {
    const unsigned char* start = emulator_shared_memory;
    uint64_t bytes = MAX_CLUSTER * SHARED_STRIDE;
    for (int i = 0; !(p >= start && p < start + bytes); i++) {
        if (i == launch->shared_count) return nullptr;
        start = launch->shared[i].start, bytes = launch->shared[i].bytes;
    }
    if (!shadow) shadow = (Byte*)calloc(launch->highest - launch->lowest, sizeof(Byte));
    return shadow + (p - launch->lowest);
}

EMULATOR_UNWATCHED inline void touch(const void* address, int bytes, bool writes, void* instruction) {
    if (!watching) return;
    Byte* cell = record((const unsigned char*)address);
    if (!cell) return;
    uint16_t me = current, warp_epoch = warps[me / 32].epoch;
    uint32_t place = (uint32_t)((char*)instruction - (char*)emulator_run);
    for (int i = 0; i < bytes; i++) {
        const Access* others[3] = {&cell[i].write, &cell[i].reads[0], &cell[i].reads[1]};
        for (int j = 0; j < (writes ? 3 : 1); j++) {
            const Access& other = *others[j];
            if (other.epoch != epoch || other.thread == me) continue;
            if (other.thread / 32 == me / 32 && other.warp_epoch != warp_epoch) continue;
            // launcher.py turns @number into file and line
            fail("race: it %s shared memory at @%d that %s %s at @%d, with no barrier between",
                 writes ? "writes" : "reads", (int)place - 1, name(other.thread).text, j ? "reads" : "writes",
                 (int)other.instruction - 1);
        }
        Access mine = {epoch, place, proxy_fences[me], me, warp_epoch};
        if (writes) {
            cell[i].write = mine;
        } else {
            if (cell[i].reads[0].thread != me) cell[i].reads[1] = cell[i].reads[0];
            cell[i].reads[0] = mine;
        }
    }
}
// The last write to one of these bytes after which its thread has called no async_proxy_fence, or null.
EMULATOR_UNWATCHED inline const Access* unfenced_write(const unsigned char* p, int bytes) {
    Byte* cell = record(p);
    for (int i = 0; cell && i < bytes; i++)
        if (cell[i].write.epoch >= first_epoch && cell[i].write.fences == proxy_fences[cell[i].write.thread])
            return &cell[i].write;
    return nullptr;
}
inline void new_epoch() { epoch++; }
inline void watch(bool on) {
    watching = on;
    if (on) first_epoch = epoch;
}
#else
#define EMULATOR_UNWATCHED
inline void touch(const void*, int, bool, void*) {}
inline void new_epoch() {}
inline void watch(bool) {}
#endif

// The thread that runs next, or -1 if all wait for each other.
inline int take() {
    if (hooks.progress) hooks.progress(false);
    while (ready_head == ready_tail)
        if (!hooks.progress || !hooks.progress(true)) return -1;
    return ready[ready_head++ % MAX_THREADS];
}

// The running thread waits; others go on. Returns when somebody has pushed it.
__attribute__((noinline)) inline void wait() {
    int me = current, next = take();
    if (next < 0) deadlock();
    if (next != me) go(next, &threads[me].stack_pointer);
    threads[me].state = READY;
}

// What a fiber does: its thread's kernel, then, on the same stack, every thread that has not begun yet.
inline void fiber() {
    for (;;) {
        launch->invoke(launch->kernel, launch->arguments);
        int me = current, lane = me % 32;
        Thread& self = threads[me];
        Warp& warp = warps[me / 32];
        self.state = RETURNED;
        n_returned++;
        warp.alive &= ~(1u << lane);
        for (int i = 0; i < warp.open; i++)
            if (warp.meetings[i].mask >> lane & 1)
                fail("%s returned, but lanes of its warp wait for it in %s (mask %08x)", name(me).text,
                     warp.meetings[i].what, warp.meetings[i].mask);
        if (hooks.returned) hooks.returned();
        void* nowhere;
        int next = take();
        if (next < 0) {
            if (n_returned < n_threads) deadlock();
            emulator_switch(&nowhere, runner);
        }
        if (threads[next].state != FRESH) {
            free_stacks[n_free_stacks++] = self.stack;
            go(next, &nowhere);
        }
        threads[next].stack = self.stack;
        threads[next].state = READY;
        become(next);
    }
}

__attribute__((noinline)) inline void barrier(const char* what, int predicate, const char* file, int line) {
    Thread& self = threads[current];
    int rank = rank_of(current);
    Gathering& g = gatherings[rank];
    self.state = AT_BARRIER, self.what = what, self.file = file, self.line = line;
    if (g.arrived == 0) g.first = current, g.any = 0, g.all = 1, g.count = 0;
    const Thread& first = threads[g.first];
    if (first.line != line || first.what != what)
        fail("divergent barrier: %s is in %s at %s:%d while %s is in %s at %s:%d", name(current).text, what,
             base(file), line, name(g.first).text, first.what, base(first.file), first.line);
    g.arrived++, g.any |= predicate != 0, g.all &= predicate != 0, g.count += predicate != 0;
    if (g.arrived == block_threads) {
        g.arrived = 0, g.was_any = g.any, g.was_all = g.all, g.was_count = g.count;
        new_epoch();
        // Every other phase runs in the opposite order: of two threads each comes first in one of them.
        g.backwards = !g.backwards;
        for (int i = 0; i < n_threads; i++) {
            int thread = order[g.backwards ? n_threads - 1 - i : i];
            if (rank_of(thread) == rank) push(thread);
        }
    }
    wait();
}

// What an instruction insists on: an address in the dynamic part or in a static shared variable.
inline void check_shared(const void* address, size_t bytes, const char* what, const char* file, int line) {
    const unsigned char* p = (const unsigned char*)address;
    if (p >= dynamic_shared && p + bytes <= dynamic_shared + launch->dynamic_bytes) return;
    for (int i = 0; i < launch->shared_count; i++) {
        const Range& range = launch->shared[i];
        if (p >= range.start && p + bytes <= range.start + range.bytes) return;
    }
    if (bytes == 0) return;
    fail("%s at %s:%d: %d bytes at %p are not inside the block's shared memory (%d bytes dynamic%s)", what,
         base(file), line, (int)bytes, address, (int)launch->dynamic_bytes,
         p >= dynamic_shared && p < dynamic_shared + SHARED_STRIDE ? ", this is beyond them" : "");
}

// Deposits `operand` and waits until all lanes of `mask` have done so; the last one runs `complete` on them.
__attribute__((noinline)) inline void meet(const char* what, uint32_t mask, void* operand,
                                           void (*complete)(void**, uint32_t), const char* file, int line) {
    int me = current, lane = me % 32;
    Warp& warp = warps[me / 32];
    if (!(mask >> lane & 1))
        fail("%s at %s:%d: lane %d calls with mask %08x, which leaves it out", what, base(file), line, lane,
             mask);
    if (mask & ~warp.alive)
        fail("%s at %s:%d: mask %08x names lanes that returned or do not exist (the warp's lanes are %08x)",
             what, base(file), line, mask, warp.alive);
    int slot = 0;
    while (slot < warp.open && warp.meetings[slot].mask != mask) slot++;
    Meeting& meeting = warp.meetings[slot];
    if (slot == warp.open) {
        warp.open++;
        meeting.mask = mask, meeting.arrived = 0, meeting.complete = complete, meeting.what = what;
    }
    if (meeting.complete != complete)
        fail("%s at %s:%d: other lanes of mask %08x are in %s", what, base(file), line, mask, meeting.what);
    meeting.operands[lane] = operand;
    meeting.arrived |= 1u << lane;
    if (meeting.arrived == mask) {
        complete(meeting.operands, mask);
        if (slot != --warp.open) warp.meetings[slot] = warp.meetings[warp.open];
        for (uint32_t rest = mask & ~(1u << lane); rest; rest &= rest - 1)
            push((me & ~31) + __builtin_ctz(rest));
        return;
    }
    Thread& self = threads[me];
    self.state = IN_WARP, self.what = what, self.file = file, self.line = line, self.mask = mask;
    wait();
}

// The thread's place in the shuffle, the same for a block whichever operating system thread runs it.
inline void shuffle_order() {
    for (int i = 0; i < n_threads; i++) order[i] = launch->order == -1 ? n_threads - 1 - i : i;
    if (launch->order <= 0) return;
    uint64_t seed = emulator::seed;
    for (int i = n_threads - 1; i > 0; i--) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        int j = (seed >> 33) % (i + 1);
        uint16_t swapped = order[i];
        order[i] = order[j], order[j] = swapped;
    }
}

// Runs a block, or the blocks of a cluster.
inline bool run_blocks() {
    n_returned = 0, ready_head = ready_tail = 0;
    for (int i = 0; i < launch->shared_count; i++)
        memset(launch->shared[i].start, 0xff, launch->shared[i].bytes);
    uint64_t slack = (launch->dynamic_bytes + 65535) / 4096 * 4096;  // to the next page's end, at least
    if (slack > launch->dynamic_bytes + 4096) slack = (launch->dynamic_bytes + 4095) / 4096 * 4096;
    for (uint64_t rank = 0; rank < launch->cluster; rank++) {
        memset(shared_of(rank), 0xff, slack);
        gatherings[rank].arrived = 0, gatherings[rank].backwards = false;
    }
    for (int t = 0; t < n_threads; t++) {
        threads[t].state = FRESH;
        threads[t].copy_count = threads[t].landed = threads[t].groups = threads[t].groups_done = 0;
        push(order[t]);
    }
    for (int w = 0; w * 32 < n_threads; w++) {
        warps[w].open = 0;
        warps[w].alive = n_threads - w * 32 >= 32 ? ~0u : (1u << (n_threads - w * 32)) - 1;
    }
    n_free_stacks = 0;
    for (int s = MAX_THREADS - 1; s >= 0; s--) free_stacks[n_free_stacks++] = s;
    if (hooks.begin) hooks.begin();
    new_epoch();
    watch(true);
    go(ready[ready_head++ % MAX_THREADS], &runner);
    watch(false);
    if (launch->failure->failed) return false;
    for (uint64_t rank = 0; rank < launch->cluster; rank++)
        for (uint64_t i = launch->dynamic_bytes; i < slack; i++)
            if (shared_of(rank)[i] != 0xff) {
                launch->failure->failed = 1;
                memcpy(launch->failure->block, &block_indices[rank], sizeof block_indices[rank]);
                memcpy(launch->failure->thread, &threadIdx, sizeof threadIdx);
                snprintf(launch->failure->message, sizeof launch->failure->message,
                         "a thread of the block wrote %d bytes beyond the %d bytes of dynamic shared memory",
                         (int)(i - launch->dynamic_bytes), (int)launch->dynamic_bytes);
                return false;
            }
    return true;
}

}  // namespace emulator

extern "C" int mprotect(void*, size_t, int) noexcept(true);

// The pages before the dynamic shared memory of each block and behind its last byte's page fault if touched.
static uint64_t open_shared_bytes = ~0ull;
static void protect_shared_memory(uint64_t bytes) {
    using namespace emulator;
    if (bytes == open_shared_bytes) return;
    open_shared_bytes = bytes;
    uint64_t open = (bytes + 4095) / 4096 * 4096;
    mprotect(shared_of(0) - SHARED_GUARD, SHARED_GUARD, 0);
    for (int rank = 0; rank < MAX_CLUSTER; rank++) {
        mprotect(shared_of(rank), open, 3);
        mprotect(shared_of(rank) + open, SHARED_STRIDE - open, 0);
    }
}

// Runs blocks of one launch until none is left or one has failed.
extern "C" EMULATOR_UNWATCHED __attribute__((visibility("default"))) void emulator_run(
    emulator::Launch* given) {
    using namespace emulator;
    launch = given;
    gridDim = dim3(launch->grid[0], launch->grid[1], launch->grid[2]);
    blockDim = dim3(launch->block[0], launch->block[1], launch->block[2]);
    block_threads = blockDim.x * blockDim.y * blockDim.z;
    n_threads = block_threads * launch->cluster;
    for (int i = 0; i < n_threads; i++) {
        unsigned t = i % block_threads;
        indices[i] = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    }
    protect_shared_memory(launch->dynamic_bytes);
#if defined(__x86_64__)
    unsigned rounding = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(rounding | 0x8040);  // denormals are zero, as with CuPy's default -ftz=true
#endif
    launch->enter(escape);
    uint64_t total = (uint64_t)gridDim.x * gridDim.y * gridDim.z / launch->cluster;
    for (;;) {
        uint64_t turn = __atomic_fetch_add(launch->next_block, 1, __ATOMIC_RELAXED);
        if (turn >= total || __atomic_load_n(&launch->failure->failed, __ATOMIC_RELAXED)) break;
        uint64_t first =
            launch->order == -1 || (launch->order > 0 && launch->order & 1) ? total - 1 - turn : turn;
        for (uint64_t rank = 0; rank < launch->cluster; rank++) {
            uint64_t block = first * launch->cluster + rank;
            block_indices[rank] = {(unsigned)(block % gridDim.x), (unsigned)(block / gridDim.x % gridDim.y),
                                   (unsigned)(block / gridDim.x / gridDim.y)};
        }
        blockIdx = block_indices[0], dynamic_shared = shared_of(0);
        seed = launch->order * 0x9e3779b97f4a7c15ull + first;
        shuffle_order();
        if (!run_blocks()) break;
    }
    launch->leave();
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(rounding);
#endif
}

extern "C" __attribute__((visibility("default"))) unsigned char emulator_anchor[1] = {1};

// ---- barriers and warps

#define EMULATOR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATOR_FENCE asm volatile("" ::: "memory")
constexpr uint32_t EMULATOR_ALL = 0xffffffffu;

inline void __syncthreads(EMULATOR_PLACE) {
    emulator::barrier("__syncthreads", 0, file, line);
    EMULATOR_FENCE;
}
inline int __syncthreads_or(int predicate, EMULATOR_PLACE) {
    emulator::barrier("__syncthreads_or", predicate, file, line);
    EMULATOR_FENCE;
    return emulator::gatherings[emulator::rank_of(emulator::current)].was_any;
}
inline int __syncthreads_and(int predicate, EMULATOR_PLACE) {
    emulator::barrier("__syncthreads_and", predicate, file, line);
    EMULATOR_FENCE;
    return emulator::gatherings[emulator::rank_of(emulator::current)].was_all;
}
inline int __syncthreads_count(int predicate, EMULATOR_PLACE) {
    emulator::barrier("__syncthreads_count", predicate, file, line);
    EMULATOR_FENCE;
    return emulator::gatherings[emulator::rank_of(emulator::current)].was_count;
}

namespace emulator {

inline void sync_warp(void** operands, uint32_t mask) { (*(Warp**)operands[__builtin_ctz(mask)])->epoch++; }

template <typename F>
inline void each(uint32_t mask, F f) {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

// A shuffle's operand: the lane's value, the lane it wants to read (-1: its own), and the answer.
template <typename T>
struct Shuffle {
    T value, answer;
    int source;
};

template <typename T>
void shuffle(void** operands, uint32_t mask) {
    each(mask, [&](int lane) {
        auto* to = (Shuffle<T>*)operands[lane];
        int source = to->source < 0 ? lane : to->source;
        if (!(mask >> source & 1))
            fail("a shuffle: lane %d reads lane %d, which is not in the mask %08x", lane, source, mask);
        to->answer = ((Shuffle<T>*)operands[source])->value;
    });
}

template <typename T>
T exchange(const char* what, uint32_t mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "shuffles move 2, 4 or 8 bytes");
    Shuffle<T> operand = {value, value, source};
    meet(what, mask, &operand, shuffle<T>, file, line);
    EMULATOR_FENCE;
    return operand.answer;
}

struct Vote {
    int predicate;
    uint32_t answer;
};
inline void vote(void** operands, uint32_t mask) {
    uint32_t ballot = 0;
    each(mask, [&](int lane) { ballot |= (uint32_t)(((Vote*)operands[lane])->predicate != 0) << lane; });
    each(mask, [&](int lane) { ((Vote*)operands[lane])->answer = ballot; });
}
inline uint32_t poll(const char* what, uint32_t mask, int predicate, const char* file, int line) {
    Vote operand = {predicate, 0};
    meet(what, mask, &operand, vote, file, line);
    EMULATOR_FENCE;
    return operand.answer;
}

template <typename T, typename F>
struct Reduction {
    static void complete(void** operands, uint32_t mask) {
        T total = *(T*)operands[__builtin_ctz(mask)];
        each(mask & (mask - 1), [&](int lane) { total = F()(total, *(T*)operands[lane]); });
        each(mask, [&](int lane) { *(T*)operands[lane] = total; });
    }
};
template <typename F, typename T>
T reduce(const char* what, uint32_t mask, T value, F, const char* file, int line) {
    meet(what, mask, &value, Reduction<T, F>::complete, file, line);
    EMULATOR_FENCE;
    return value;
}
#define EMULATOR_OPERATION(name, result)          \
    template <typename T>                         \
    struct name {                                 \
        T operator()(T a, T b) { return result; } \
    };
EMULATOR_OPERATION(Sum, a + b)
EMULATOR_OPERATION(Least, a < b ? a : b)
EMULATOR_OPERATION(Most, a > b ? a : b)
EMULATOR_OPERATION(BitAnd, a& b)
EMULATOR_OPERATION(BitOr, a | b)
EMULATOR_OPERATION(BitXor, a ^ b)
#undef EMULATOR_OPERATION

inline int lane_id() { return current % 32; }

}  // namespace emulator

inline void __syncwarp(uint32_t mask = EMULATOR_ALL, EMULATOR_PLACE) {
    emulator::Warp* warp = &emulator::warps[emulator::current / 32];
    // Without a mask the lanes that exist are meant.
    emulator::meet("__syncwarp", mask == EMULATOR_ALL ? warp->alive : mask, &warp, emulator::sync_warp, file,
                   line);
    EMULATOR_FENCE;
}

// Sources as in the CUDA guide, "Warp shuffle functions": within sections of `width` lanes; out of range:
// one's own.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, EMULATOR_PLACE) {
    int lane = emulator::lane_id();
    return emulator::exchange("__shfl_sync", mask, value, (lane & ~(width - 1)) + (source & (width - 1)),
                              file, line);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMULATOR_PLACE) {
    int lane = emulator::lane_id(), source = lane - (int)delta;
    return emulator::exchange("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? -1 : source,
                              file, line);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMULATOR_PLACE) {
    int lane = emulator::lane_id(), source = lane + (int)delta;
    return emulator::exchange("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? -1 : source,
                              file, line);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, EMULATOR_PLACE) {
    int lane = emulator::lane_id(), source = lane ^ lanes;
    return emulator::exchange("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? -1 : source,
                              file, line);
}

inline unsigned __ballot_sync(uint32_t mask, int predicate, EMULATOR_PLACE) {
    return emulator::poll("__ballot_sync", mask, predicate, file, line);
}
inline int __any_sync(uint32_t mask, int predicate, EMULATOR_PLACE) {
    return emulator::poll("__any_sync", mask, predicate, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, EMULATOR_PLACE) {
    return emulator::poll("__all_sync", mask, predicate, file, line) == mask;
}
// Which lanes run together is the hardware's choice; a kernel must be right for the smallest answer, and this
// is it.
inline unsigned __activemask() { return 1u << emulator::lane_id(); }

#define EMULATOR_REDUCE(name, F)                                                          \
    inline unsigned name(uint32_t mask, unsigned value, EMULATOR_PLACE) {                 \
        return emulator::reduce(#name, mask, value, emulator::F<unsigned>(), file, line); \
    }                                                                                     \
    inline int name(uint32_t mask, int value, EMULATOR_PLACE) {                           \
        return emulator::reduce(#name, mask, value, emulator::F<int>(), file, line);      \
    }
EMULATOR_REDUCE(__reduce_add_sync, Sum)
EMULATOR_REDUCE(__reduce_min_sync, Least)
EMULATOR_REDUCE(__reduce_max_sync, Most)
EMULATOR_REDUCE(__reduce_and_sync, BitAnd)
EMULATOR_REDUCE(__reduce_or_sync, BitOr)
EMULATOR_REDUCE(__reduce_xor_sync, BitXor)
#undef EMULATOR_REDUCE

EMULATOR_UNWATCHED inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
EMULATOR_UNWATCHED inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
EMULATOR_UNWATCHED inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- memory and atomics

// Reads and writes of 4, 8 and 16 bytes go through the type, so that -fsanitize=alignment sees a misaligned
// one.
#define EMULATOR_LOAD(name, kind)                \
    template <typename T>                        \
    inline T name(const T* p) {                  \
        return *(const kind T*)p;                \
    }
EMULATOR_LOAD(__ldg, )
EMULATOR_LOAD(__ldcs, )
EMULATOR_LOAD(__ldcg, )
EMULATOR_LOAD(__ldca, )
EMULATOR_LOAD(__ldlu, )
EMULATOR_LOAD(__ldcv, volatile)
#undef EMULATOR_LOAD
#define EMULATOR_STORE(name)                     \
    template <typename T>                        \
    inline void name(T* p, T value) {            \
        *p = value;                              \
    }
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE

// Integers only: sums of floats in the order of arrival are not deterministic, and this project has none.
#define EMULATOR_ATOMICS(T)                                                                               \
    EMULATOR_UNWATCHED inline T atomicAdd(T* p, T value) {                                                \
        return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);                                            \
    }                                                                                                     \
    EMULATOR_UNWATCHED inline T atomicSub(T* p, T value) {                                                \
        return __atomic_fetch_sub(p, value, __ATOMIC_RELAXED);                                            \
    }                                                                                                     \
    EMULATOR_UNWATCHED inline T atomicAnd(T* p, T value) {                                                \
        return __atomic_fetch_and(p, value, __ATOMIC_RELAXED);                                            \
    }                                                                                                     \
    EMULATOR_UNWATCHED inline T atomicOr(T* p, T value) {                                                 \
        return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);                                             \
    }                                                                                                     \
    EMULATOR_UNWATCHED inline T atomicXor(T* p, T value) {                                                \
        return __atomic_fetch_xor(p, value, __ATOMIC_RELAXED);                                            \
    }                                                                                                     \
    EMULATOR_UNWATCHED inline T atomicExch(T* p, T value) {                                               \
        return __atomic_exchange_n(p, value, __ATOMIC_RELAXED);                                           \
    }                                                                                                     \
    EMULATOR_UNWATCHED inline T atomicCAS(T* p, T expected, T value) {                                    \
        __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);      \
        return expected;                                                                                  \
    }                                                                                                     \
    EMULATOR_UNWATCHED inline T atomicMax(T* p, T value) {                                                \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                     \
        while (old < value &&                                                                             \
               !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} \
        return old;                                                                                       \
    }                                                                                                     \
    EMULATOR_UNWATCHED inline T atomicMin(T* p, T value) {                                                \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                     \
        while (value < old &&                                                                             \
               !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} \
        return old;                                                                                       \
    }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
#undef EMULATOR_ATOMICS
EMULATOR_UNWATCHED inline unsigned atomicInc(unsigned* p, unsigned limit) {
    unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {}
    return old;
}
template <typename T>
void atomicAdd(float*, T) = delete;  // see above
template <typename T>
void atomicAdd(double*, T) = delete;

// ---- mathematics

namespace emulator {
template <typename To, typename From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
}  // namespace emulator

inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits<double>(x); }

// glibc declares some of these names itself, hence macros. The GPU's are less exact: a few units in the last
// place.
#define __expf(x)      expf(x)
#define __exp2f(x)     exp2f(x)
#define __exp10f(x)    exp2f((x) * 3.3219280948873623f)
#define __logf(x)      logf(x)
#define __log2f(x)     log2f(x)
#define __log10f(x)    log10f(x)
#define __powf(x, y)   powf(x, y)
#define __sinf(x)      sinf(x)
#define __cosf(x)      cosf(x)
#define __tanf(x)      tanf(x)
#define __tanhf(x)     tanhf(x)
#define __saturatef(x) fminf(fmaxf(x, 0.0f), 1.0f)
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) {
    volatile float sum = x + y;
    return sum;
}  // never part of an fma
inline float __fsub_rn(float x, float y) {
    volatile float sum = x - y;
    return sum;
}
inline float __fmul_rn(float x, float y) {
    volatile float product = x * y;
    return product;
}
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline int __float2int_ru(float x) { return (int)ceilf(x); }
inline unsigned __float2uint_rn(float x) { return (unsigned)rintf(x); }
inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }

inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
#define EMULATOR_MIN_MAX(A, B, R)                                   \
    constexpr R min(A a, B b) { return (R)a < (R)b ? (R)a : (R)b; } \
    constexpr R max(A a, B b) { return (R)a > (R)b ? (R)a : (R)b; }
EMULATOR_MIN_MAX(int, int, int)
EMULATOR_MIN_MAX(unsigned, unsigned, unsigned)
EMULATOR_MIN_MAX(int, unsigned, unsigned)
EMULATOR_MIN_MAX(unsigned, int, unsigned)
EMULATOR_MIN_MAX(long, long, long)
EMULATOR_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMULATOR_MIN_MAX(long, unsigned long, unsigned long)
EMULATOR_MIN_MAX(unsigned long, long, unsigned long)
EMULATOR_MIN_MAX(long long, long long, long long)
EMULATOR_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
EMULATOR_MIN_MAX(long long, unsigned long long, unsigned long long)
EMULATOR_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef EMULATOR_MIN_MAX

inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
inline int __mulhi(int a, int b) { return (int64_t)a * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned __int128)a * b >> 64;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
    x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
    x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
    return __builtin_bswap32(x);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return ((uint64_t)high << 32 | low) << (shift & 31) >> 32;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return ((uint64_t)high << 32 | low) >> (shift & 31);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned code = selector >> 4 * i & 15, byte = both >> 8 * (code & 7) & 255;
        result |= (code & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
static long long emulator_clock;
inline long long clock64() { return emulator_clock += 100; }
inline void __nanosleep(unsigned) {}
inline void __trap() { emulator::fail("__trap() was called"); }
#undef assert
#define assert(condition) \
    ((condition)          \
         ? (void)0        \
         : emulator::fail("assert(%s) failed at %s:%d", #condition, emulator::base(__FILE__), __LINE__))

// ---- a kernel's signature, for Python

namespace emulator {

template <typename T>
struct Element {
    // 'f' a float, 'i' and 'u' integers, 'b' bf16, 'v' void or bytes, 's' a struct: int4, float2, ...
    static constexpr char kind = __is_enum(T) ? 'i' : 's';
    static constexpr int bytes = sizeof(T);
};
#define EMULATOR_ELEMENT(T, k, n)       \
    template <>                         \
    struct Element<T> {                 \
        static constexpr char kind = k; \
        static constexpr int bytes = n; \
    };
EMULATOR_ELEMENT(void, 'v', 1)
EMULATOR_ELEMENT(bool, 'o', 1)
EMULATOR_ELEMENT(char, 'v', 1)
EMULATOR_ELEMENT(signed char, 'i', 1)
EMULATOR_ELEMENT(unsigned char, 'v', 1)
EMULATOR_ELEMENT(short, 'i', 2)
EMULATOR_ELEMENT(unsigned short, 'u', 2)
EMULATOR_ELEMENT(int, 'i', 4)
EMULATOR_ELEMENT(unsigned, 'u', 4)
EMULATOR_ELEMENT(long, 'i', 8)
EMULATOR_ELEMENT(unsigned long, 'u', 8)
EMULATOR_ELEMENT(long long, 'i', 8)
EMULATOR_ELEMENT(unsigned long long, 'u', 8)
EMULATOR_ELEMENT(float, 'f', 4)
EMULATOR_ELEMENT(double, 'f', 8)
#undef EMULATOR_ELEMENT

template <typename T>
struct Bare {
    using type = T;
};
template <typename T>
struct Bare<const T> {
    using type = T;
};
template <typename T>
struct Bare<volatile T> {
    using type = T;
};
template <typename T>
struct Bare<const volatile T> {
    using type = T;
};

struct Parameter {
    char pointer, constant, kind, padding;
    int bytes;
};
template <typename T>
struct Describe {
    using U = typename Bare<T>::type;
    static constexpr Parameter value = {0, 0, Element<U>::kind, 0, Element<U>::bytes};
};
template <typename T>
struct Describe<T*> {
    using U = typename Bare<T>::type;
    static constexpr Parameter value = {1, 0, Element<U>::kind, 0, Element<U>::bytes};
};
template <typename T>
struct Describe<const T*> {
    using U = typename Bare<T>::type;
    static constexpr Parameter value = {1, 1, Element<U>::kind, 0, Element<U>::bytes};
};

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
    using type = Indices<I...>;
};

struct Kernel {
    void* function;
    void (*invoke)(void*, void**);
    int64_t count;
    Parameter parameters[64];
};

template <typename... A, int... I>
void invoke(void* function, void** arguments, Indices<I...>) {
    ((void (*)(A...))function)(*(A*)arguments[I]...);
}
template <typename... A>
void invoke_all(void* function, void** arguments) {
    invoke<A...>(function, arguments, typename Count<sizeof...(A)>::type());
}
template <typename... A>
Kernel describe(void (*function)(A...)) {
    return {(void*)function, invoke_all<A...>, sizeof...(A), {Describe<A>::value...}};
}

}  // namespace emulator

// ---- what -fsanitize=thread calls, see `touch`

#ifdef EMULATOR_RACES
#define EMULATOR_HOOK(name, n, writes)                                             \
    extern "C" EMULATOR_UNWATCHED __attribute__((used)) void name(const void* p) { \
        emulator::touch(p, n, writes, __builtin_return_address(0));                \
    }
#define EMULATOR_HOOKS(n)                             \
    EMULATOR_HOOK(__tsan_read##n, n, false)           \
    EMULATOR_HOOK(__tsan_write##n, n, true)           \
    EMULATOR_HOOK(__tsan_unaligned_read##n, n, false) \
    EMULATOR_HOOK(__tsan_unaligned_write##n, n, true) \
    EMULATOR_HOOK(__tsan_volatile_read##n, n, false)  \
    EMULATOR_HOOK(__tsan_volatile_write##n, n, true)
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
#undef EMULATOR_HOOKS
#undef EMULATOR_HOOK
extern "C" {
EMULATOR_UNWATCHED __attribute__((used)) void __tsan_read_range(const void* p, size_t n) {
    emulator::touch(p, (int)n, false, __builtin_return_address(0));
}
EMULATOR_UNWATCHED __attribute__((used)) void __tsan_write_range(const void* p, size_t n) {
    emulator::touch(p, (int)n, true, __builtin_return_address(0));
}
EMULATOR_UNWATCHED __attribute__((used)) void* __tsan_memcpy(void* to, const void* from, size_t n) {
    emulator::touch(from, (int)n, false, __builtin_return_address(0));
    emulator::touch(to, (int)n, true, __builtin_return_address(0));
    return memcpy(to, from, n);
}
EMULATOR_UNWATCHED __attribute__((used)) void* __tsan_memmove(void* to, const void* from, size_t n) {
    emulator::touch(from, (int)n, false, __builtin_return_address(0));
    emulator::touch(to, (int)n, true, __builtin_return_address(0));
    return memmove(to, from, n);
}
EMULATOR_UNWATCHED __attribute__((used)) void* __tsan_memset(void* to, int value, size_t n) {
    emulator::touch(to, (int)n, true, __builtin_return_address(0));
    return memset(to, value, n);
}
EMULATOR_UNWATCHED __attribute__((used)) void __tsan_init() {}
EMULATOR_UNWATCHED __attribute__((used)) void __tsan_func_entry(void*) {}
EMULATOR_UNWATCHED __attribute__((used)) void __tsan_func_exit() {}
}
#endif
