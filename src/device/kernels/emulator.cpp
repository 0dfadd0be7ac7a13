// The emulator's scheduler: the threads of a block as fibers (see emulator.h), and what
// farm's device layer calls to run a kernel by its name.
#include "emulator.h"

#include <map>
#include <mutex>
#include <string>
#include <vector>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

__thread uint3 thread_index, block_index;
__thread dim3 block_shape, grid_shape;
__thread unsigned lane;
__thread unsigned char* dynamic_shared;

// ---------------------------------------------------------------- switching stacks

constexpr size_t STACK_BYTES = 256 << 10;

#if defined(__x86_64__)
struct Context { void* stack_pointer = nullptr; };
extern "C" void farm_emulator_switch(void** from, void* to);
// Saves what the System V ABI has a callee save, changes stacks, restores.
asm(R"(
.text
.globl farm_emulator_switch
.hidden farm_emulator_switch
farm_emulator_switch:
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
)");
void switch_to(Context& from, Context& to) { farm_emulator_switch(&from.stack_pointer, to.stack_pointer); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
    // After `ret` the stack is as after a call: 8 bytes off a multiple of 16.
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES) - 2;
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    context.stack_pointer = top;
}
#else
struct Context { ucontext_t ucontext; };
void switch_to(Context& from, Context& to) { swapcontext(&from.ucontext, &to.ucontext); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
    getcontext(&context.ucontext);
    context.ucontext.uc_stack.ss_sp = stack;
    context.ucontext.uc_stack.ss_size = STACK_BYTES;
    context.ucontext.uc_link = nullptr;
    makecontext(&context.ucontext, entry, 0);
}
#endif

// ---------------------------------------------------------------- a block

// Threads that meet: all that are still there must arrive.
struct Barrier {
    unsigned members = 0, alive = 0, arrived = 0;
    uint64_t passed = 0;
    void meet() {
        if (alive > 0 && arrived == alive) {
            arrived = 0;
            passed++;
        }
    }
};

struct Warp {
    Barrier barrier;
    // In turn, so that a lane that is ahead leaves what the others have yet to read.
    uint64_t slots[2][32];
};

struct Fiber {
    Context context;
    unsigned char* stack = nullptr;
    uint3 thread;
    unsigned lane;
    Warp* warp;
    Barrier* waits_for;
    uint64_t waits_until;
    bool done;
};

struct Block {
    Barrier barrier;
    int count;
    std::vector<Warp> warps;
    std::vector<Fiber> fibers;
    std::vector<unsigned> order;
    Context scheduler;
    Fiber* running = nullptr;
    const char* kernel = "";
    void* function;
    Invoke invoke;
    void** arguments;
    std::vector<unsigned char> shared;
    unsigned char* shared_start;
    ~Block() {
        for (auto& fiber : fibers) munmap(fiber.stack, STACK_BYTES);
    }
};

// This OS thread's; by a plain pointer, which costs no check at each access.
static __thread Block* own_block;
#define block (*own_block)
static void make_block() {
    static thread_local Block made;
    own_block = &made;
}

void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel %s: %s (block %u,%u,%u thread %u,%u,%u)\n", block.kernel, what, block_index.x,
                 block_index.y, block_index.z, thread_index.x, thread_index.y, thread_index.z);
    std::abort();
}

static void wait(Barrier& barrier) {
    Fiber& self = *block.running;
    self.waits_for = &barrier;
    self.waits_until = barrier.passed + 1;
    barrier.arrived++;
    barrier.meet();
    if (barrier.passed < self.waits_until) switch_to(self.context, block.scheduler);
    self.waits_for = nullptr;
}

static void whole_warp(const Warp& warp) {
    if (warp.barrier.alive != warp.barrier.members) fail("lanes of the warp have left before a shuffle or vote");
}

void block_barrier() { wait(block.barrier); }

int block_count(int predicate) {
    block.count += predicate != 0;
    wait(block.barrier);
    const int count = block.count;
    wait(block.barrier);
    block.count = 0;
    wait(block.barrier);
    return count;
}

void warp_barrier() { wait(block.running->warp->barrier); }

uint64_t exchange(uint64_t own, unsigned from) {
    Warp& warp = *block.running->warp;
    whole_warp(warp);
    if (from >= warp.barrier.members) fail("a shuffle from a lane that is not there");
    uint64_t* const slots = warp.slots[warp.barrier.passed & 1];
    slots[lane] = own;
    wait(warp.barrier);
    return slots[from];
}

unsigned ballot(int predicate) {
    Warp& warp = *block.running->warp;
    whole_warp(warp);
    uint64_t* const slots = warp.slots[warp.barrier.passed & 1];
    slots[lane] = predicate != 0;
    wait(warp.barrier);
    unsigned bits = 0;
    for (unsigned i = 0; i < warp.barrier.members; i++) bits |= static_cast<unsigned>(slots[i]) << i;
    return bits;
}

static void leave(Barrier& barrier) {
    barrier.alive--;
    barrier.meet();
}

static void fiber_main() {
    block.invoke(block.function, block.arguments);
    Fiber& self = *block.running;
    self.done = true;
    leave(self.warp->barrier);
    leave(block.barrier);
    switch_to(self.context, block.scheduler);
}

static void shape_block(dim3 shape) {
    const unsigned threads = shape.x * shape.y * shape.z, warps = (threads + 31) / 32;
    block.barrier = {threads, threads, 0, 0};
    block.count = 0;
    block.warps.resize(warps);
    for (unsigned w = 0; w < warps; w++) {
        const unsigned members = std::min(32u, threads - w * 32);
        block.warps[w].barrier = {members, members, 0, 0};
    }
    while (block.fibers.size() < threads) {
        Fiber fiber{};
        void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) fail("no memory for a thread's stack");
        fiber.stack = static_cast<unsigned char*>(stack);
        block.fibers.push_back(fiber);
    }
    for (unsigned t = 0; t < threads; t++) {
        Fiber& fiber = block.fibers[t];
        fiber.thread = {t % shape.x, t / shape.x % shape.y, t / shape.x / shape.y};
        fiber.lane = t % 32;
        fiber.warp = &block.warps[t / 32];
        fiber.waits_for = nullptr;
        fiber.done = false;
        prepare(fiber.context, fiber.stack, fiber_main);
    }
}

static void run_block(unsigned threads) {
    unsigned left = threads;
    while (left > 0) {
        bool ran = false;
        for (const unsigned t : block.order) {
            Fiber& fiber = block.fibers[t];
            if (fiber.done || (fiber.waits_for && fiber.waits_for->passed < fiber.waits_until)) continue;
            ran = true;
            block.running = &fiber;
            thread_index = fiber.thread;
            lane = fiber.lane;
            switch_to(block.scheduler, fiber.context);
            left -= fiber.done;
        }
        if (!ran) fail("threads wait for each other: a barrier that not all reach");
    }
}

// 0: rising; 1: falling; else a shuffle with this seed.
static void order_threads(unsigned threads, unsigned order) {
    block.order.resize(threads);
    for (unsigned t = 0; t < threads; t++) block.order[t] = order == 1 ? threads - 1 - t : t;
    uint64_t state = order;
    for (unsigned t = threads; order > 1 && t > 1; t--) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        std::swap(block.order[t - 1], block.order[(state >> 33) % t]);
    }
}

struct Kernel { void* function; Invoke invoke; };
static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}
Registration::Registration(const char* name, void* kernel, Invoke invoke) { kernels()[name] = {kernel, invoke}; }

}  // namespace emulator

// Runs a kernel; 0, or 1 where there is none of that name, 2 where the grid, the block or the shared memory is larger
// than a device's.
extern "C" int farm_emulator_launch(const char* name, const unsigned* grid, const unsigned* shape, size_t shared_bytes,
                                    void** arguments, unsigned order) {
    using namespace emulator;
    const auto found = kernels().find(name);
    if (found == kernels().end()) return 1;
    const unsigned threads = shape[0] * shape[1] * shape[2];
    const bool fits = grid[1] <= 65535 && grid[2] <= 65535 && shape[2] <= 64;
    if (threads == 0 || threads > 1024 || !fits || shared_bytes > (227 << 10)) return 2;
    static std::mutex shared_memory;
    const std::lock_guard<std::mutex> alone(shared_memory);
    make_block();
    block.kernel = found->first.c_str();
    block.function = found->second.function;
    block.invoke = found->second.invoke;
    block.arguments = arguments;
    // NaN to its very end, so that what was never written shows.
    block.shared.assign(shared_bytes + 256, 0xff);
    block.shared_start = block.shared.data() + (128 - reinterpret_cast<uintptr_t>(block.shared.data()) % 128) % 128;
    dynamic_shared = block.shared_start;
    grid_shape = {grid[0], grid[1], grid[2]};
    block_shape = {shape[0], shape[1], shape[2]};
    order_threads(threads, order);
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                block_index = {x, y, z};
                shape_block(block_shape);
                std::memset(block.shared_start, 0xff, shared_bytes);
                run_block(threads);
            }
    return 0;
}
