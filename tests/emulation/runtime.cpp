// Fibers and their scheduler. One launch at a time; a switch between fibers saves six registers and the stack pointer,
// because the system's own (swapcontext) makes two calls into the kernel and a warp-wide word needs 32 switches.

#include "runtime.h"

#include <sys/mman.h>

#include <bit>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

dim3 gridDim, blockDim;
uint3 blockIdx, threadIdx;

extern "C" void itm_switch_stacks(void** left, void* entered) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden itm_switch_stacks
.globl itm_switch_stacks
.type itm_switch_stacks, @function
itm_switch_stacks:
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
.size itm_switch_stacks, .-itm_switch_stacks
)");

namespace itm::emulation {
namespace {

constexpr size_t kStack = 128 * 1024, kPage = 4096;
constexpr int kMostThreads = 1024;
constexpr size_t kMostShared = 227 * 1024, kGuard = 1024;
// NaN as float32, float16 and bfloat16 (signalling in the last), and far outside any array as an index.
constexpr uint32_t kGarbage = 0x7fa07fa0, kGuardWord = 0x5afe5afe;

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

struct Thread {
  void* stack_pointer;
  Site waits_at;
  const void* sleeps_at;
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copies;
};

struct Warp {
  unsigned ready;     // lanes that can go on
  int arrived, left;  // lanes at `word`; lanes that returned
  int first;          // thread that came to `word` first
  const char* word;
  void* brought[kLanes];
};

struct SomeWait {
  int arrived, threads;
};

struct Block {
  int warps, arrived, left;
  bool backwards;
  SomeWait waits[16];  // by the number of a barrier
};

std::mutex one_launch;
std::vector<Thread> threads;
std::vector<Warp> warps;
Block block;
int64_t blocks_run;
int current;  // running thread
bool inside;  // a kernel, not the scheduler
void* scheduler;
std::string failure;
const std::function<void()>* body;

char* stacks() {
  static char* const memory = [] {
    void* got = mmap(nullptr, kMostThreads * (kStack + kPage), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
    // A stack that overflows ends the program at once instead of writing over its neighbour.
    for (int i = 0; i < kMostThreads; ++i) mprotect(static_cast<char*>(got) + i * (kStack + kPage), kPage, PROT_NONE);
    return static_cast<char*>(got);
  }();
  return memory;
}

char* shared_with_guards() {
  alignas(1024) static char memory[kGuard + kMostShared + kGuard];
  return memory;
}

std::string place(int thread, const Site& where) {
  return "thread " + std::to_string(thread) + " at " + where.file_name() + ":" + std::to_string(where.line());
}

void enter(int thread) {
  const int from = current;
  if (thread == from) return;
  current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  itm_switch_stacks(&threads[from].stack_pointer, threads[thread].stack_pointer);
}

// The next set bit after `from`, round and round, in the order of the block.
int next_ready(unsigned ready, int from) {
  if (block.backwards) return (from + 31 - std::countl_zero(std::rotr(ready, from))) % kLanes;
  return (from + 1 + std::countr_zero(std::rotr(ready, (from + 1) % kLanes))) % kLanes;
}

// Leaves a thread that cannot go on.
void go_elsewhere() {
  const int warp = current / kLanes;
  if (warps[warp].ready != 0) return enter(warp * kLanes + next_ready(warps[warp].ready, current % kLanes));
  if (warps[warp].arrived > 0) {
    fail(std::string("lanes of a warp wait at different words: one is here, others at ") + warps[warp].word);
  }
  for (int i = 1; i <= block.warps; ++i) {
    const int other = (warp + (block.backwards ? block.warps - i : i)) % block.warps;
    if (warps[other].ready != 0) {
      return enter(other * kLanes + next_ready(warps[other].ready, block.backwards ? 0 : kLanes - 1));
    }
  }
  itm_switch_stacks(&threads[current].stack_pointer, scheduler);
}

void leave() {
  Warp& warp = warps[current / kLanes];
  if (warp.arrived > 0) fail(std::string("a lane returns while others of its warp wait at ") + warp.word);
  if (block.arrived > 0) fail("a thread returns while others of its block wait at __syncthreads");
  warp.ready &= ~(1u << (current % kLanes));
  ++warp.left;
  ++block.left;
}

[[noreturn]] void run_thread() {
  threads[current].waits_at = Site::current();
  (*body)();
  leave();
  go_elsewhere();
  std::abort();
}

void prepare_thread(int thread) {
  // Equal places on all stacks would share a few lines of the cache; the multiple of 128 bytes spreads them.
  char* top = stacks() + (thread + 1) * (kStack + kPage) - (thread % kLanes) * 128;
  void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, an empty return address
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&run_thread);
  threads[thread].stack_pointer = frame;
  threads[thread].sleeps_at = nullptr;
  threads[thread].open_copies.clear();
  threads[thread].copies.clear();
}

void fill(char* memory, size_t bytes, uint32_t word) {
  for (size_t i = 0; i < bytes; i += 4) std::memcpy(memory + i, &word, 4);
}

bool filled(const char* memory, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) {
    if (std::memcmp(memory + i, &kGuardWord, 4) != 0) return false;
  }
  return true;
}

void run_block(int thread_count, size_t shared_bytes) {
  ++blocks_run;
  block.arrived = block.left = 0;
  std::memset(block.waits, 0, sizeof(block.waits));
  block.backwards = (blockIdx.x + blockIdx.y + blockIdx.z) % 2 == 1;
  for (Warp& warp : warps) warp = {0xffffffffu, 0, 0, 0, nullptr, {}};
  for (int i = 0; i < thread_count; ++i) prepare_thread(i);
  char* shared = shared_with_guards() + kGuard;
  fill(shared - kGuard, kGuard, kGuardWord);
  fill(shared, shared_bytes, kGarbage);
  fill(shared + shared_bytes, kGuard, kGuardWord);

  failure.clear();
  current = block.backwards ? thread_count - 1 : 0;
  threadIdx = {static_cast<unsigned>(current), 0, 0};
  inside = true;
  itm_switch_stacks(&scheduler, threads[current].stack_pointer);
  inside = false;

  if (failure.empty() && block.left < thread_count) {
    for (int i = 0; i < thread_count && failure.empty(); ++i) {
      if (threads[i].sleeps_at != nullptr)
        failure = "threads wait for ever, one of them is " + place(i, threads[i].waits_at);
    }
  }
  if (failure.empty() && !filled(shared - kGuard, kGuard)) failure = "a write below dynamic shared memory";
  if (failure.empty() && !filled(shared + shared_bytes, kGuard)) {
    failure = "a write past the " + std::to_string(shared_bytes) + " bytes of dynamic shared memory";
  }
  if (!failure.empty()) {
    throw std::runtime_error("emulated kernel, block (" + std::to_string(blockIdx.x) + ", " +
                             std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + "): " + failure);
  }
}

}  // namespace

void fail(const std::string& message) {
  failure = message + "; " + place(current, threads[current].waits_at);
  // The other fibers are dropped where they stand.
  itm_switch_stacks(&threads[current].stack_pointer, scheduler);
  std::abort();
}

void** arrive(const char* word, void* mine, const Site& where) {
  Warp& warp = warps[current / kLanes];
  threads[current].waits_at = where;
  if (warp.left > 0) fail(std::string("lanes of this warp have returned before ") + word);
  if (warp.arrived == 0) {
    warp.word = word;
    warp.first = current;
  } else {
    const Site& there = threads[warp.first].waits_at;
    if (std::strcmp(word, warp.word) != 0 || where.line() != there.line() || where.column() != there.column() ||
        std::strcmp(where.file_name(), there.file_name()) != 0) {
      fail(std::string("lanes of a warp meet at different words: ") + warp.word + ", " + place(warp.first, there) +
           ", and " + word);
    }
  }
  warp.brought[current % kLanes] = mine;
  if (++warp.arrived == kLanes) return warp.brought;
  warp.ready &= ~(1u << (current % kLanes));
  go_elsewhere();
  return nullptr;
}

void release_warp() {
  Warp& warp = warps[current / kLanes];
  warp.arrived = 0;
  warp.ready = 0xffffffffu;
}

void wait_for_block(const Site& where) {
  threads[current].waits_at = where;
  Warp& warp = warps[current / kLanes];
  if (block.left > 0) fail("threads of this block have returned before __syncthreads");
  if (warp.arrived > 0) {
    fail(std::string("lanes of a warp wait at different words: __syncthreads, and others at ") + warp.word);
  }
  if (++block.arrived < block.warps * kLanes) {
    warp.ready &= ~(1u << (current % kLanes));
    return go_elsewhere();
  }
  block.arrived = 0;
  for (Warp& each : warps) each.ready = 0xffffffffu;
}

void sleep_at(const void* key, const Site& where) {
  threads[current].waits_at = where;
  threads[current].sleeps_at = key;
  warps[current / kLanes].ready &= ~(1u << (current % kLanes));
  go_elsewhere();
}

void wake(const void* key) {
  for (size_t i = 0; i < threads.size(); ++i) {
    if (threads[i].sleeps_at != key) continue;
    threads[i].sleeps_at = nullptr;
    warps[i / kLanes].ready |= 1u << (i % kLanes);
  }
}

void wait_for_some(int id, int thread_count, const Site& where) {
  SomeWait& wait = block.waits[id];
  if (wait.arrived > 0 && wait.threads != thread_count) fail("threads name different numbers at one barrier");
  wait.threads = thread_count;
  if (++wait.arrived < thread_count) return sleep_at(&wait, where);
  wait.arrived = 0;
  wake(&wait);
}

bool inside_kernel() { return inside; }

int lane() { return current % kLanes; }

int warp() { return current / kLanes; }

int64_t block_number() { return blocks_run; }

char* shared_memory() { return shared_with_guards() + kGuard; }

// What arrives before it is waited for is not to be relied on: the target holds garbage until then.
void copy_later(void* shared, const void* global, bool valid) {
  fill(static_cast<char*>(shared), 16, kGarbage);
  threads[current].open_copies.push_back({shared, global, valid});
}

void close_group_of_copies() {
  threads[current].copies.push_back(std::move(threads[current].open_copies));
  threads[current].open_copies.clear();
}

void finish_copies(int groups_left) {
  auto& copies = threads[current].copies;
  while (static_cast<int>(copies.size()) > groups_left) {
    for (const Copy& copy : copies.front()) {
      copy.valid ? std::memcpy(copy.shared, copy.global, 16) : std::memset(copy.shared, 0, 16);
    }
    copies.erase(copies.begin());
  }
}

void run(dim3 grid, int thread_count, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard lock(one_launch);
  if (thread_count < kLanes || thread_count > kMostThreads || thread_count % kLanes != 0) {
    throw std::runtime_error("emulated launch: threads must be whole warps, at most 1024, got " +
                             std::to_string(thread_count));
  }
  if (shared_bytes > kMostShared || shared_bytes % 4 != 0) {
    throw std::runtime_error("emulated launch: dynamic shared memory must be at most 227 KB in words of 4 bytes, got " +
                             std::to_string(shared_bytes));
  }
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(thread_count));
  body = &kernel;
  block.warps = thread_count / kLanes;
  threads.resize(thread_count);
  warps.resize(block.warps);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(thread_count, shared_bytes);
    }
  }
}

}  // namespace itm::emulation
