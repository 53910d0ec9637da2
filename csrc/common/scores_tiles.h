// How the CUDA epilogue of scores deals out its work: tiles, shared memory, splits. Pure arithmetic on shapes, the same
// numbers for plan(), for the launch and inside the kernel.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define ITM_HOST_DEVICE __host__ __device__
#else
#define ITM_HOST_DEVICE
#endif

namespace itm {

constexpr int kTileSegments = 12;  // mean 15.5 words a caption: 8 fit 128 rows; more only where captions are tiny
constexpr int kFewTiles = 5;       // of 8 keys: 36 regions, and captions of 40 words
constexpr int kManyTiles = 14;     // 112 keys: float32 has registers for no more

// Keys a group may have, in tiles of 8, and how warps are dealt out. With few tiles 4 groups share a block's tables and
// its walk over the segments; with many the registers and the Gram matrix leave room for one.
ITM_HOST_DEVICE constexpr int groups_of_block(int tiles) { return tiles <= kFewTiles ? 4 : 1; }
ITM_HOST_DEVICE constexpr int warps_of_group(int tiles) { return tiles <= kFewTiles ? 2 : 4; }
ITM_HOST_DEVICE constexpr int padded_keys(int tiles) { return (tiles + 1) / 2 * 16; }

// Of a row of the Gram matrix or of weights in shared memory, in elements: 16 bytes, so that the rows that a warp reads
// together start in different banks.
ITM_HOST_DEVICE constexpr int row_padding(int weight_bytes) { return 16 / weight_bytes; }

// Rows of a tile, unless one segment is longer. Forward 128: 0.94 of the chunks of 16 rows is queries on real captions.
// Backward keeps a tile's weights and gradients in shared memory; with 80 rows (0.91) two blocks of half precision share
// a multiprocessor of 227 KB.
constexpr int tile_rows(bool backward) { return backward ? 80 : 128; }

struct TileBytes {
  size_t gram, scales, tops, segments, gram_scale, per_row, weights, gradients, total;
};

ITM_HOST_DEVICE constexpr size_t align_16(size_t bytes) { return (bytes + 15) / 16 * 16; }

ITM_HOST_DEVICE constexpr TileBytes tile_bytes(int tiles, int weight_bytes, bool backward, bool with_tops, int rows,
                                               int most_keys) {
  const int groups = groups_of_block(tiles);
  const size_t columns = groups * most_keys;
  TileBytes bytes{};
  bytes.gram =
      static_cast<size_t>(groups) * 8 * tiles * (padded_keys(tiles) + row_padding(weight_bytes)) * weight_bytes;
  bytes.scales = align_16(kTileSegments * columns * sizeof(float));
  bytes.tops = with_tops ? bytes.scales : 0;
  bytes.segments = align_16(rows * sizeof(int));
  bytes.gram_scale = 16;
  // cosine and peak; backward also p and Q, then their gradients, and those of the query's norm and of the peak
  bytes.per_row = align_16((backward ? 6 : 2) * static_cast<size_t>(groups) * rows * sizeof(float));
  if (backward) {
    bytes.weights =
        align_16(static_cast<size_t>(rows) * (groups * padded_keys(tiles) + row_padding(weight_bytes)) * weight_bytes);
    bytes.gradients = align_16(rows * (columns + 1) * sizeof(float));
  }
  bytes.total = bytes.gram + bytes.scales + bytes.tops + bytes.segments + bytes.gram_scale + bytes.per_row +
                bytes.weights + bytes.gradients;
  return bytes;
}

// One launch of the epilogue. tiles 0: the wide kernel, for groups and segments of any size, one block a group.
struct ScoresLaunch {
  int64_t tiles;
  int64_t row_capacity;  // rows of a tile in shared memory
  int64_t splits;        // of the query rows
  int64_t span;          // rows of a split
  int64_t group_blocks;
  int64_t shared_bytes;
};

struct EpilogueShape {
  int64_t groups, most_keys;   // key groups, keys of the largest
  int64_t rows, most_queries;  // query rows, queries of the longest segment
  int64_t element_bytes;       // of the products
  bool uniform;                // every segment has most_queries
  bool backward, softmax;      // softmax: of the feature norm
  int64_t shared_limit;        // dynamic shared memory a block may have
  int64_t multiprocessors;
};

// A multiple of 16 that holds the longest segment. Segments of one length fill it or do not, tile after tile: 36 regions
// are 72 of 80 rows and 108 of 112, so the next sizes are looked at too.
inline int64_t row_capacity(const EpilogueShape& shape) {
  const int64_t least = std::max<int64_t>(tile_rows(shape.backward), (shape.most_queries + 15) / 16 * 16);
  if (!shape.uniform) return least;
  const auto unused = [&](int64_t rows) { return rows % shape.most_queries; };
  for (int64_t rows = least; rows <= least + 32; rows += 16) {
    if (unused(rows) * 16 <= rows) return rows;
  }
  return least;
}

inline ScoresLaunch scores_launch(const EpilogueShape& shape) {
  ScoresLaunch launch{};
  const int weight_bytes = shape.element_bytes == 2 ? 2 : 4;
  const int64_t least_rows = std::max<int64_t>((shape.most_queries + 15) / 16 * 16, 32);
  const auto fits = [&](int tiles, int64_t rows) {
    return shape.most_keys <= 8 * tiles &&
           static_cast<int64_t>(tile_bytes(tiles, weight_bytes, shape.backward, shape.softmax, static_cast<int>(rows),
                                           static_cast<int>(shape.most_keys))
                                    .total) <= shape.shared_limit;
  };
  // Fewer groups a block before fewer rows a tile: rows are what is padded.
  int64_t rows = row_capacity(shape);
  int tiles = 0;
  for (; rows >= least_rows; rows -= 16) {
    tiles = fits(kFewTiles, rows) ? kFewTiles : (fits(kManyTiles, rows) ? kManyTiles : 0);
    if (tiles != 0) break;
  }
  if (tiles != 0) {
    launch.tiles = tiles;
    launch.row_capacity = rows;
    launch.shared_bytes = static_cast<int64_t>(tile_bytes(tiles, weight_bytes, shape.backward, shape.softmax,
                                                          static_cast<int>(rows), static_cast<int>(shape.most_keys))
                                                   .total);
    launch.group_blocks = (shape.groups + groups_of_block(tiles) - 1) / groups_of_block(tiles);
    // Four blocks a multiprocessor even out the tail; a split of fewer than four tiles pays too much for its start.
    const int64_t wanted =
        (4 * shape.multiprocessors + launch.group_blocks - 1) / std::max<int64_t>(launch.group_blocks, 1);
    const int64_t most = std::max<int64_t>(shape.rows / (4 * rows), 1);
    launch.splits = std::clamp<int64_t>(wanted, 1, most);
    launch.span = std::max<int64_t>((shape.rows + launch.splits - 1) / launch.splits, 1);
    return launch;
  }
  launch.splits = 1;
  launch.span = std::max<int64_t>(shape.rows, 1);
  launch.group_blocks = shape.groups;
  // scales and tops of a group's keys, the weights of one query, six numbers a query
  launch.shared_bytes = 4 * (3 * shape.most_keys + 6 * shape.most_queries + 64);
  return launch;
}

// Share of the rows that the kernel computes which are queries: chunks of 16 rows, tiles of whole segments.
template <class Offsets>
double useful_rows(const Offsets& offsets, int64_t segments, int64_t row_capacity) {
  if (row_capacity == 0) return 1.0;  // the wide kernel takes query after query
  int64_t padded = 0;
  for (int64_t s = 0; s < segments;) {
    int64_t taken = 1;
    while (taken < kTileSegments && s + taken < segments && offsets[s + taken + 1] - offsets[s] <= row_capacity)
      ++taken;
    padded += (offsets[s + taken] - offsets[s] + 15) / 16 * 16;
    s += taken;
  }
  return padded == 0 ? 1.0 : static_cast<double>(offsets[segments] - offsets[0]) / static_cast<double>(padded);
}

}  // namespace itm
