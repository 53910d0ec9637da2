// Twins of cuda/warpgroup_words.h: mbarriers, bulk copies, products of a warpgroup.
//
// A product is computed where its warp waits for it, every warp for itself (a warp's 16 rows are its own): before that
// the accumulators hold garbage, and an operand that was overwritten too early shows as a wrong result.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "warp_words.h"

namespace itm {

using Mbarrier = uint64_t;

namespace emulation {

// Dynamic shared memory begins at an address of no more than 16 bytes' alignment: a GPU promises nothing else.
constexpr uint32_t kSharedStart = 1024 + 16;

struct MbarrierState {
  uint32_t arrivals : 10, missing : 10, parity : 1, mark : 11;
  int32_t bytes;
};

constexpr unsigned kMbarrierMark = 0x2b5;

inline MbarrierState state_of(Mbarrier* barrier) {
  MbarrierState state = std::bit_cast<MbarrierState>(*barrier);
  if (state.mark != kMbarrierMark) fail("an mbarrier that was not initialised");
  return state;
}

inline void put_state(Mbarrier* barrier, MbarrierState state) {
  const bool ends = state.missing == 0 && state.bytes == 0;
  if (ends) {
    state.parity ^= 1;
    state.missing = state.arrivals;
  }
  *barrier = std::bit_cast<Mbarrier>(state);
  if (ends) wake(barrier);
}

inline void arrive_at(Mbarrier* barrier, int bytes) {
  MbarrierState state = state_of(barrier);
  if (state.missing == 0) fail("more arrivals at an mbarrier than it was initialised for");
  state.bytes += bytes;
  --state.missing;
  put_state(barrier, state);
}

}  // namespace emulation

inline uint32_t shared_address(const void* shared) {
  return emulation::kSharedStart + static_cast<uint32_t>(static_cast<const char*>(shared) - shared_memory());
}

inline void mbarrier_init(Mbarrier* barrier, int arrivals) {
  const auto count = static_cast<uint32_t>(arrivals);
  *barrier = std::bit_cast<Mbarrier>(emulation::MbarrierState{count, count, 0, emulation::kMbarrierMark, 0});
}

inline void mbarrier_fence_init() {}

inline void mbarrier_arrive(Mbarrier* barrier) { emulation::arrive_at(barrier, 0); }

inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) { emulation::arrive_at(barrier, bytes); }

inline void mbarrier_wait(Mbarrier* barrier, int parity, emulation::Site where = emulation::Site::current()) {
  while (static_cast<int>(emulation::state_of(barrier).parity) == parity) emulation::sleep_at(barrier, where);
}

inline void copy_bulk(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  emulation::need_aligned("copy_bulk", shared);
  emulation::need_aligned("copy_bulk", global);
  if (bytes % 16 != 0) emulation::fail("copy_bulk: not a multiple of 16 bytes");
  std::memcpy(shared, global, bytes);
  emulation::MbarrierState state = emulation::state_of(barrier);
  state.bytes -= bytes;
  emulation::put_state(barrier, state);
}

template <int kId>
void sync_warps(int threads, emulation::Site where = emulation::Site::current()) {
  emulation::wait_for_some(kId, threads, where);
}

template <int kRegisters>
void take_registers() {}

template <int kRegisters>
void give_registers() {}

namespace emulation {

struct Product {
  float* sums[kLanes];
  uint64_t left, right;
  bool add;
  void (*run)(const Product&, int warp_of_group);
};

// Of every warp: products since the last commit, and committed groups that were not waited for.
struct Products {
  int64_t block;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
};

inline Products& products_of(int warp) {
  static Products of_warps[32];
  if (of_warps[warp].block != block_number()) of_warps[warp] = {block_number(), {}, {}};
  return of_warps[warp];
}

// Byte of (row, k) of an operand with the 128-byte swizzle, by its descriptor (PTX manual, wgmma: matrix descriptor).
inline const char* operand_at(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + row / 8 * eight_rows + row % 8 * 128 + k * 2;
  return shared_memory() + ((address ^ (address >> 7 & 7) << 4) - kSharedStart);
}

template <class T>
float element_at(uint64_t descriptor, int row, int k) {
  T value;
  std::memcpy(&value, operand_at(descriptor, row, k), sizeof(T));
  return value;
}

template <class T>
void run_product(const Product& product, int warp_of_group) {
  constexpr int kColumns = 144;
  float right[16][kColumns], row[kColumns];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < kColumns; ++n) right[k][n] = element_at<T>(product.right, n, k);
  }
  for (int r = 0; r < 16; ++r) {
    const auto sum = [&](int n) -> float& {
      return product.sums[r % 8 * 4 + n % 8 / 2][n / 8 * 4 + r / 8 * 2 + n % 2];
    };
    for (int n = 0; n < kColumns; ++n) row[n] = product.add ? sum(n) : 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float left = element_at<T>(product.left, 16 * warp_of_group + r, k);
      for (int n = 0; n < kColumns; ++n) row[n] += left * right[k][n];
    }
    for (int n = 0; n < kColumns; ++n) sum(n) = row[n];
  }
}

inline void need_operand(uint64_t descriptor) {
  const bool swizzled = descriptor >> 62 == 1, from_start = (descriptor >> 49 & 7) == 0;
  if (!swizzled || !from_start)
    fail("wgmma_144: only operands with the 128-byte swizzle and base offset 0 are emulated");
}

}  // namespace emulation

inline void wgmma_fence(emulation::Site where = emulation::Site::current()) {
  emulation::vote("wgmma_fence", 0xffffffffu, true, where);
}

inline void wgmma_commit(emulation::Site where = emulation::Site::current()) {
  struct {
  } mine;
  emulation::together("wgmma_commit", mine, where, [](auto) {
    emulation::Products& products = emulation::products_of(emulation::warp());
    products.groups.push_back(std::exchange(products.open, {}));
  });
}

template <int N>
void wgmma_wait(emulation::Site where = emulation::Site::current()) {
  struct {
  } mine;
  emulation::together("wgmma_wait", mine, where, [](auto) {
    auto& groups = emulation::products_of(emulation::warp()).groups;
    while (static_cast<int>(groups.size()) > N) {
      for (const emulation::Product& product : groups.front()) product.run(product, emulation::warp() % 4);
      groups.erase(groups.begin());
    }
  });
}

inline void settle(float (&)[72]) {}

template <class T>
void wgmma_144(float (&sums)[72], uint64_t left, uint64_t right, bool add,
               emulation::Site where = emulation::Site::current()) {
  struct Brought {
    float* sums;
    uint64_t left, right;
    bool add;
  } mine{sums, left, right, add};
  emulation::need_operand(left);
  emulation::need_operand(right);
  if (!add) std::fill(sums, sums + 72, NAN);
  emulation::together("wgmma_144", mine, where, [](auto of) {
    emulation::Product product{{}, of(0).left, of(0).right, of(0).add, &emulation::run_product<T>};
    for (int l = 0; l < emulation::kLanes; ++l) {
      product.sums[l] = of(l).sums;
      if (of(l).left != product.left || of(l).right != product.right || of(l).add != product.add) {
        emulation::fail("wgmma_144: lanes of a warp name different operands");
      }
    }
    emulation::products_of(emulation::warp()).open.push_back(product);
  });
}

}  // namespace itm
