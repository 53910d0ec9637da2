// How the emulator runs a grid: fibers, the points where they meet, and launch() with the signature of cuda/launch.h.
#pragma once

#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

#include "cuda_language.h"

extern dim3 gridDim, blockDim;
extern uint3 blockIdx, threadIdx;

namespace itm::emulation {

using Site = std::source_location;
constexpr int kLanes = 32;

void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);

// Ends the launch; its caller receives an exception with this message and the place of the running thread.
[[noreturn]] void fail(const std::string& message);

// One lane's arrival at a warp-wide word. The last of the 32 receives what all brought and goes on; the others sleep until
// it calls release_warp(), and receive null.
void** arrive(const char* word, void* mine, const Site& where);
void release_warp();

// All 32 lanes bring a T; the last to come fills in everybody's results.
template <class T, class Complete>
void together(const char* word, T& mine, const Site& where, const Complete& complete) {
  if (void** all = arrive(word, &mine, where)) {
    complete([all](int lane) -> T& { return *static_cast<T*>(all[lane]); });
    release_warp();
  }
}

// The running thread sleeps until another calls wake() with this key.
void sleep_at(const void* key, const Site& where);
void wake(const void* key);

// Threads that come to barrier `id` sleep until there are as many as all of them name.
void wait_for_some(int id, int threads, const Site& where);

bool inside_kernel();
void wait_for_block(const Site& where);
int lane();
int warp();
int64_t block_number();  // of all that ran
char* shared_memory();

void copy_later(void* shared, const void* global, bool valid);
void close_group_of_copies();
void finish_copies(int groups_left);

}  // namespace itm::emulation

inline void __syncthreads(itm::emulation::Site where = itm::emulation::Site::current()) {
  itm::emulation::wait_for_block(where);
}

namespace itm {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline cudaStream_t current_stream(int) { return nullptr; }

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulation::run(grid, threads, shared_bytes, [&] { kernel(static_cast<P>(args)...); });
}

}  // namespace itm
