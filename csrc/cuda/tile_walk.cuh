// Which groups and segments a block of threads works on, tile after tile, and the tables it keeps for them.
#pragma once

#include "score_tile.cuh"

namespace itm {

// kKeys 0: products are those of a block of images x captions, with the groups' keys one after another. Otherwise every
// group has kKeys of them, and products are the tile's alone: its row 0 is the tile's first row.
template <class T, class Arithmetic, int kTiles, bool kBackward, int kKeys = 0>
struct TileWalk {
  using Memory = ScoreTile<Arithmetic, kTiles>;
  static constexpr int kGroups = groups_of_block(kTiles);
  static constexpr int kWarps = warps_of_group(kTiles);  // of a group
  static constexpr int kThreads = 32 * kGroups * kWarps;

  const ScoresCall<T>& call;
  const Matrix<const T>& products;
  Memory tile;
  // Rows, columns and groups of a block of products are fewer than 2^31; offsets into it are not, and are 64 bits wide.
  int first_group, groups;        // of this block
  int first_key[kGroups];         // of each group, column of products
  int first_column[kGroups + 1];  // of each group in the tile's tables, where groups stand without gaps
  // the tile's segments
  int segment, row;  // first of them, and its first query row
  int segments, rows;

  __device__ TileWalk(const ScoresCall<T>& the_call, const Matrix<const T>& the_products, char* memory)
      : call(the_call),
        products(the_products),
        tile(Memory::carve(memory, kBackward, the_call.feature.kind == NormKind::kSoftmax, the_call.row_capacity,
                           kKeys > 0 ? kKeys : the_call.most_keys)) {}

  __device__ void take_groups(int first) {
    first_group = first;
    groups = min(static_cast<int>(call.groups) - first_group, kGroups);
    first_column[0] = 0;
#pragma unroll
    for (int w = 0; w < kGroups; ++w) {
      if constexpr (kKeys > 0) {
        first_key[w] = w * kKeys;
        first_column[w + 1] = (w + 1) * kKeys;
      } else {
        const bool there = w < groups;
        first_key[w] = there ? static_cast<int>(call.keys.begin(first_group + w)) : 0;
        first_column[w + 1] = first_column[w] + (there ? call.keys.count(first_group + w) : 0);
      }
    }
  }

  __device__ int keys_of(int w) const { return kKeys > 0 ? kKeys : pick(first_column + 1, w) - pick(first_column, w); }
  __device__ int product_row(int r) const { return kKeys > 0 ? r : row + r; }
  __device__ int my_group() const { return threadIdx.x / 32 / kWarps; }
  __device__ int my_warp_of_group() const { return threadIdx.x / 32 % kWarps; }

  // Registers cannot be indexed by a number that is not known when compiling.
  template <class Array>
  __device__ static auto pick(const Array& array, int w) {
    auto value = array[0];
#pragma unroll
    for (int i = 1; i < kGroups; ++i) value = w == i ? array[i] : value;
    return value;
  }

  __device__ void load_gram() const {
    const int w = my_group(), member = threadIdx.x % (32 * kWarps);
    const int keys = keys_of(w);
    const float* from = call.gram + static_cast<int64_t>(first_group + w) * call.most_keys * call.most_keys;
    float largest = 0.0f, inverse = 1.0f;
    if constexpr (Arithmetic::kScaled) {
      for (int k = threadIdx.x % 32; k < keys; k += 32) largest = fmaxf(largest, from[k * (call.most_keys + 1)]);
      largest = warp_max(largest);
      inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
    } else {
      largest = 1.0f;
    }
    if (member == 0) tile.gram_scale[w] = largest;
    typename Memory::Weight* to = tile.gram + w * 8 * kTiles * Memory::kGramStride;
    for (int i = member; i < 8 * kTiles * Memory::kGramStride; i += 32 * kWarps) {
      const int r = i / Memory::kGramStride, k = i % Memory::kGramStride;
      const float value = r < keys && k < keys ? from[r * call.most_keys + k] * inverse : 0.0f;
      to[i] = from_float<typename Memory::Weight>(value);
    }
  }

  // The next whole segments before `end`.
  __device__ void take_segments(int first, int end) {
    take(first, groups_that_fit(call.queries, first, min(end, first + kTileSegments), tile.rows));
  }

  __device__ void take(int first, int count) {
    segment = first;
    segments = count;
    row = static_cast<int>(call.queries.begin(first));
    rows = begin_of(segments);
    for (int i = threadIdx.x / 32; i < segments; i += kThreads / 32) {
      const int begin = begin_of(i), end = begin_of(i + 1), n = call.queries.count(first + i);
      for (int r = threadIdx.x % 32; r < end - begin; r += 32) tile.segment[begin + r] = r < n ? i : -1;
    }
    for (int r = rows + threadIdx.x; r < tile.rows; r += kThreads) tile.segment[r] = -1;
  }

  __device__ int begin_of(int i) const { return static_cast<int>(call.queries.begin(segment + i) - row); }

  // For every column of every segment of the tile: visit(segment, its first row, its queries, column, group).
  template <class Visit>
  __device__ void for_each_column(const Visit& visit) const {
    const int columns = first_column[kGroups];
    for (int item = threadIdx.x; item < segments * columns; item += kThreads) {
      const int i = item / columns, column = item % columns;
      int w = 0;
#pragma unroll
      for (int g = 1; g < kGroups; ++g) w += column >= first_column[g] ? 1 : 0;
      visit(i, begin_of(i), call.queries.count(segment + i), column, w);
    }
  }
};

}  // namespace itm
