// Ragged groups of rows on the device, and which of them a block of threads takes next.
//
// A side of a batch is a run of groups: the regions of images, or the words of captions. Where a group begins is known
// from offsets (packed rows) or from a stride (every group as long as the longest); in the second case counts may say
// how many of its rows are valid. Counts that live on the device alone are never read by the host: they are clamped here.
#pragma once

#include "words.h"

namespace itm {

struct Groups {
  const int64_t* offsets;  // [groups + 1] of packed rows, from any origin; null: every group has `stride` rows
  const int64_t* counts;   // [groups] valid rows of a group of `stride` rows; null: all of them
  int64_t stride;          // rows of a group without offsets; with offsets, rows of the longest group

  __device__ int64_t begin(int64_t g) const { return offsets ? offsets[g] - offsets[0] : g * stride; }

  __device__ int count(int64_t g) const {
    if (offsets) return static_cast<int>(offsets[g + 1] - offsets[g]);
    if (!counts) return static_cast<int>(stride);
    const int64_t n = counts[g];
    return static_cast<int>(n < 1 ? 1 : (n > stride ? stride : n));
  }
};

// The first of `n` groups that begins at `row` or later; all lanes of a warp together, log32(n) dependent loads.
__device__ __forceinline__ int64_t first_group_from(const Groups& groups, int64_t n, int64_t row) {
  if (!groups.offsets) {
    const int64_t g = (row + groups.stride - 1) / groups.stride;
    return g < n ? g : n;
  }
  const int lane = threadIdx.x % 32;
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t step = (high - low + 31) / 32;
    const int64_t probe = low + lane * step;
    const bool before = probe < high && groups.begin(probe) < row;
    const int64_t passed = __popc(__ballot_sync(kWholeWarp, before));
    if (passed == 0) break;
    high = low + passed * step < high ? low + passed * step : high;
    low += (passed - 1) * step + 1;
  }
  return low;
}

// Whole groups from `first` on that fit `rows` rows together: at least one, at most 32. All lanes of a warp together.
__device__ __forceinline__ int groups_that_fit(const Groups& groups, int64_t first, int64_t end, int rows) {
  const int64_t g = first + threadIdx.x % 32;
  const bool fits = g < end && groups.begin(g + 1) - groups.begin(first) <= rows;
  const int taken = __popc(__ballot_sync(kWholeWarp, fits));
  return taken > 0 ? taken : 1;
}

}  // namespace itm
