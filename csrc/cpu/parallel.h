// Independent pieces of work over torch's thread pool, each piece run by exactly one thread.
#pragma once

#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace itm {

// Hands out pieces one by one instead of in equal ranges: captions come sorted by length, so the first half of a range
// may be twice the work of the second. Which thread runs a piece does not change its result.
template <class Work>
void for_each_piece(int64_t pieces, const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t, int64_t) {
    auto piece = work();
    for (int64_t i = next.fetch_add(1); i < pieces; i = next.fetch_add(1)) piece(i);
  });
}

}  // namespace itm
