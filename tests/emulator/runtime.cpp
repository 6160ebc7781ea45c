// What all compiled kernels share: guarded memory, the handler that makes errors of faults, and tensor maps.
//
// An array lies at the end of its pages, and the pages before and behind cannot be touched: an access beyond
// the end faults at once, at the cost of nothing. The bytes that are left over on the array's own pages are
// 0xff, which reads as NaN, and `emulator_intact` tells whether they still are.
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "tensor_map.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

static const uint64_t PAGE = 65536;      // a multiple of every page size in use
static const uint64_t GUARD = 16 << 20;  // on either side; address space, not memory
static const uint64_t ALIGNMENT = 16;    // the GPU's allocator gives 256; with less, less slack is left

static uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

static unsigned char* first_page(unsigned char* array, uint64_t bytes) {
    return array + round_up(bytes, ALIGNMENT) - round_up(bytes ? bytes : 1, PAGE);
}

// All arrays that live. Threads of launches look here while Python's may add and remove.
struct Array {
    unsigned char *start, *end;
};
static Array* arrays;
static uint64_t array_count, array_capacity;
static int arrays_locked;

static void lock_arrays() {
    while (__atomic_exchange_n(&arrays_locked, 1, __ATOMIC_ACQUIRE)) continue;
}
static void unlock_arrays() { __atomic_store_n(&arrays_locked, 0, __ATOMIC_RELEASE); }

static void add_array(unsigned char* start, uint64_t bytes) {
    lock_arrays();
    if (array_count == array_capacity) {
        array_capacity = array_capacity ? 2 * array_capacity : 256;
        arrays = (Array*)realloc(arrays, array_capacity * sizeof(Array));
    }
    arrays[array_count++] = {start, start + bytes};
    unlock_arrays();
}

static void remove_array(unsigned char* start) {
    lock_arrays();
    for (uint64_t i = 0; i < array_count; i++)
        if (arrays[i].start == start) {
            arrays[i] = arrays[--array_count];
            break;
        }
    unlock_arrays();
}

// Whether `address` is in an array that lives, and where that begins and ends.
EXPORT int emulator_find(const void* address, unsigned char** start, unsigned char** end) {
    int found = 0;
    lock_arrays();
    for (uint64_t i = 0; i < array_count && !found; i++)
        if (address >= arrays[i].start && address < arrays[i].end)
            *start = arrays[i].start, *end = arrays[i].end, found = 1;
    unlock_arrays();
    return found;
}

// Null when there is no memory left.
EXPORT unsigned char* emulator_allocate(uint64_t bytes) {
    uint64_t pages = round_up(bytes ? bytes : 1, PAGE);
    void* all =
        mmap(nullptr, GUARD + pages + GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    unsigned char* first = (unsigned char*)all + GUARD;
    if (mprotect(first, pages, PROT_READ | PROT_WRITE)) {
        munmap(all, GUARD + pages + GUARD);
        return nullptr;
    }
    unsigned char* array = first + pages - round_up(bytes, ALIGNMENT);
    unsigned char* from = array - first > 4096 ? array - 4096 : first;  // the slack in front that is watched
    memset(from, 0xff, first + pages - from);
    add_array(array, bytes);
    return array;
}

EXPORT void emulator_release(unsigned char* array, uint64_t bytes) {
    remove_array(array);
    munmap(first_page(array, bytes) - GUARD, GUARD + round_up(bytes ? bytes : 1, PAGE) + GUARD);
}

// 0, or the distance of a damaged byte: negative before the array, from +1 behind its last byte.
EXPORT int64_t emulator_intact(unsigned char* array, uint64_t bytes) {
    unsigned char* first = first_page(array, bytes);
    for (unsigned char* p = array - first > 4096 ? array - 4096 : first; p < array; p++)
        if (*p != 0xff) return p - array;
    for (unsigned char* p = array + bytes; p < array + round_up(bytes, ALIGNMENT); p++)
        if (*p != 0xff) return p - (array + bytes) + 1;
    return 0;
}

// `count` stacks, each with a page at its low end that cannot be touched.
EXPORT unsigned char* emulator_stacks(uint64_t count, uint64_t bytes) {
    void* all = mmap(nullptr, count * bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    for (uint64_t i = 0; i < count; i++) mprotect((unsigned char*)all + i * bytes, 4096, PROT_NONE);
    return (unsigned char*)all;
}

// ---- faults

static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
static struct sigaction before[5];
static int running;  // launches' threads between enter and leave, all told

static thread_local void (*escape_of_thread)(int, void*, void*);
static thread_local stack_t stack_before;
static thread_local unsigned char* handler_stack;

static void handle(int signal, siginfo_t* info, void* context) {
    if (escape_of_thread) {
        const mcontext_t& machine = ((ucontext_t*)context)->uc_mcontext;
#if defined(__x86_64__)
        void* instruction = (void*)machine.gregs[REG_RIP];
        bool writes = signal == SIGSEGV && machine.gregs[REG_ERR] & 2;
#elif defined(__aarch64__)
        void* instruction = (void*)machine.pc;
        bool writes = false;
#endif
        void* address = info->si_addr;
        if (signal == SIGSEGV && info->si_code == SI_KERNEL) address = nullptr;  // no address is known
        escape_of_thread(signal | writes << 8, address, instruction);
    }
    for (int i = 0; i < 5;
         i++)  // not ours: whoever was there before gets it, when the instruction runs again
        if (SIGNALS[i] == signal) sigaction(signal, &before[i], nullptr);
}

// From here to leave(), a fault of this operating system thread is the kernel's: `escape` does not return.
EXPORT void emulator_enter(void (*escape)(int, void*, void*)) {
    if (!handler_stack) handler_stack = new unsigned char[65536];
    stack_t mine = {};
    mine.ss_sp = handler_stack, mine.ss_size = 65536;
    sigaltstack(&mine, &stack_before);
    escape_of_thread = escape;
}

EXPORT void emulator_leave() {
    escape_of_thread = nullptr;
    sigaltstack(&stack_before, nullptr);
}

// Called once around each launch, before its threads start and after they have ended.
EXPORT void emulator_watch() {
    if (running++) return;
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // `escape` leaves the handler by a stack switch
    for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &action, &before[i]);
}

EXPORT void emulator_unwatch() {
    if (--running) return;
    for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &before[i], nullptr);
}

// ---- tensor maps: the driver's functions, by their names

static const int INVALID_VALUE = 1, NOT_SUPPORTED = 801;

// Refuses what the driver refuses. NOT_SUPPORTED is what the emulator does not know.
EXPORT int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                                  const uint64_t* strides, const uint32_t* box,
                                  const uint32_t* element_strides, int interleave, int swizzle, int promotion,
                                  int outside) {
    static const uint8_t ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // uint8 .. tfloat32_ftz
    if (!map || (uintptr_t)map % 64 || !address || (uintptr_t)address % 16) return INVALID_VALUE;
    if (type < 0 || type >= (int)sizeof ELEMENT_BYTES || rank < 1 || rank > 5) return INVALID_VALUE;
    if (!sizes || !box || !element_strides || (rank > 1 && !strides)) return INVALID_VALUE;
    if (interleave < 0 || interleave > 2 || swizzle < 0 || swizzle > 3) return INVALID_VALUE;
    if (promotion < 0 || promotion > 3 || outside < 0 || outside > 1) return INVALID_VALUE;
    emulator::EncodedMap encoded = {};
    encoded.magic = emulator::MAP_MAGIC;
    encoded.address = (unsigned char*)address;
    encoded.rank = rank, encoded.type = type, encoded.swizzle = swizzle;
    encoded.element_bytes = ELEMENT_BYTES[type];
    for (uint32_t i = 0; i < rank; i++) {
        if (sizes[i] == 0 || sizes[i] > 1ull << 32 || box[i] == 0 || box[i] > 256) return INVALID_VALUE;
        if (element_strides[i] == 0 || element_strides[i] > 8) return INVALID_VALUE;
        if (i > 0 && (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40)) return INVALID_VALUE;
        encoded.sizes[i] = sizes[i], encoded.box[i] = box[i];
        if (i > 0) encoded.strides[i - 1] = strides[i - 1];
    }
    if (encoded.row_bytes() % 16) return INVALID_VALUE;
    if (swizzle && encoded.row_bytes() > encoded.swizzle_span()) return INVALID_VALUE;
    for (uint32_t i = 0; i < rank; i++)
        if (element_strides[i] != 1) return NOT_SUPPORTED;
    if (interleave || outside) return NOT_SUPPORTED;
    encoded.sum = emulator::checksum(encoded);
    memset(map, 0, 128);
    memcpy(map, &encoded, sizeof encoded);
    return 0;
}

EXPORT int cuGetErrorName(int error, const char** name) {
    *name = error == 0               ? "CUDA_SUCCESS"
            : error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
            : error == NOT_SUPPORTED ? "CUDA_ERROR_NOT_SUPPORTED"
                                     : nullptr;
    return *name ? 0 : INVALID_VALUE;
}
