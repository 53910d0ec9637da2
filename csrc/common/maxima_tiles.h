// How the CUDA kernels of hard assignment deal out their work: pure arithmetic on shapes, for plan() and for the launch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace itm {

constexpr int kMaximaGroups =
    8;  // of keys a block of threads: a query's row of 8 x 36 products is 9 cache lines of bf16

struct MaximaLaunch {
  int64_t row_capacity;  // query rows of a tile in shared memory
  int64_t splits;        // of the query rows
  int64_t shared_bytes;
};

inline int64_t maxima_shared_bytes(int64_t rows) { return rows * (kMaximaGroups * 12 + 4); }

// Tiles of 128 rows hold 8 captions of mean length; one longer segment makes a longer tile.
inline MaximaLaunch maxima_launch(int64_t groups, int64_t rows, int64_t most_queries, int64_t multiprocessors) {
  MaximaLaunch launch{};
  launch.row_capacity = std::max<int64_t>(128, (most_queries + 15) / 16 * 16);
  launch.shared_bytes = maxima_shared_bytes(launch.row_capacity);
  const int64_t blocks = std::max<int64_t>((groups + kMaximaGroups - 1) / kMaximaGroups, 1);
  // Eight blocks a multiprocessor even out the tail; a split of fewer than four tiles pays too much for its start.
  const int64_t wanted = (8 * multiprocessors + blocks - 1) / blocks;
  launch.splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(rows / (4 * launch.row_capacity), 1));
  return launch;
}

}  // namespace itm
