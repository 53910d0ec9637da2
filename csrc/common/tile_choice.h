// Sizes of the CPU epilogue's tiles: pure functions of shape, with the reason beside each number.
#pragma once

#include <algorithm>
#include <cstdint>

namespace itm {

struct TileBounds {
  int64_t width;     // queries a tile holds, unless a single segment is longer
  int64_t segments;  // segments it holds
};

// Three arrays of [keys, width] floats should stay in a first-level cache of 32 KB: 36 keys leave room for 64 queries.
// Fewer than 32 queries would leave most of a tile's last vector empty; more than 256 gain nothing.
inline TileBounds tile_bounds(int64_t keys) {
  const int64_t fits = 32 * 1024 / (3 * 4 * std::max<int64_t>(keys, 1));
  const int64_t width = std::clamp<int64_t>(fits / 16 * 16, 32, 256);
  return {width, width};  // a segment has at least one query
}

}  // namespace itm
