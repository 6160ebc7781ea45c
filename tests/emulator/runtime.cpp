// What all compiled kernels share: guarded memory and the handler that turns a fault into an error.
//
// An array lies at the end of its pages, and the pages before and behind cannot be touched: an access beyond
// the end faults at once, at the cost of nothing. The bytes that are left over on the array's own pages are
// 0xff, which reads as NaN, and `emulator_intact` tells whether they still are.
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

static const uint64_t PAGE = 65536;      // a multiple of every page size in use
static const uint64_t GUARD = 16 << 20;  // on either side; address space, not memory
static const uint64_t ALIGNMENT = 16;    // the GPU's allocator gives 256; with less, less slack is left

static uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

static unsigned char* first_page(unsigned char* array, uint64_t bytes) {
    return array + round_up(bytes, ALIGNMENT) - round_up(bytes ? bytes : 1, PAGE);
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
    return array;
}

EXPORT void emulator_release(unsigned char* array, uint64_t bytes) {
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
