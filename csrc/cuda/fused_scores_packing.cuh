// What the fused kernel of scores reads: operands in the order the tensor cores want, and Gram matrices in half
// precision.
//
//   tiles[t][s][r] = 64 elements s of row r of tile t, 16 bytes c at place c ^ (r % 8)      zeros where there is no row
//
// A stage of the kernel's pipeline is then one contiguous copy of an operand: no tensor maps, and widths that are no
// multiple of 64, captions that do not fill a tile and the last images cost zeros here instead of cases there.
// Everything is read and written once; the work grows with I + C, not with I x C.
#pragma once

#include "../common/fused_scores_plan.h"
#include "groups.cuh"

namespace itm {

constexpr int kPackTileThreads = 256;

// table[t] = first caption of tile t, table[tiles] = captions. One block of threads: where each caption's tile would
// end is found by all, the chain through it by one, in shared memory.
__global__ void __launch_bounds__(kPackTileThreads, 1)
    caption_tiles_kernel(const Groups captions, int count, int* table, int tiles) {
  int* next = reinterpret_cast<int*>(shared_memory());
  for (int c = threadIdx.x; c < count; c += kPackTileThreads) {
    next[c] = c + static_cast<int>(captions_of_tile(c, count, [&](int64_t g) { return captions.begin(g); }));
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int first = 0;
  for (int t = 0; t < tiles; ++t) {
    table[t] = first;
    first = first < count ? next[first] : count;
  }
  table[tiles] = count;
}

// Rows [n, width] of a side to tiles of kRows. With a table, tile t holds captions table[t] to table[t + 1]; without,
// rows stand one after another.
template <class T, int kRows>
__global__ void __launch_bounds__(kPackTileThreads, 4)
    pack_tiles_kernel(const T* rows, int64_t count, int64_t width, bool wide, const Groups captions, const int* table,
                      T* tiles) {
  const int64_t tile = blockIdx.x, first_element = blockIdx.y * kFusedSlice;
  int64_t first = tile * kRows, last = count;
  if (table != nullptr) {
    first = captions.begin(table[tile]);
    last = captions.begin(table[tile + 1]);
  }
  T* out = tiles + (tile * gridDim.y + blockIdx.y) * kRows * kFusedSlice;
  for (int item = threadIdx.x; item < kRows * 8; item += kPackTileThreads) {
    const int r = item / 8, chunk = item % 8;
    const int64_t element = first_element + 8 * chunk;
    const T* from = rows + (first + r) * width + element;
    uint32_t four[4] = {0, 0, 0, 0};
    if (first + r < last) {
      if (wide && element < width) {
        const int4 whole = *reinterpret_cast<const int4*>(from);
        memcpy(four, &whole, 16);
      } else if (!wide) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          uint16_t bits = 0;
          if (element + e < width) memcpy(&bits, from + e, 2);
          four[e / 2] |= static_cast<uint32_t>(bits) << 16 * (e % 2);
        }
      }
    }
    *reinterpret_cast<int4*>(out + r * kFusedSlice + (chunk ^ r % 8) * 8) = int4{
        static_cast<int>(four[0]), static_cast<int>(four[1]), static_cast<int>(four[2]), static_cast<int>(four[3])};
  }
}

// Gram matrices [images, 36, 36] to [8 kFewTiles, kFusedGramColumns] of float16, divided by their largest diagonal
// entry, which no entry exceeds; zeros past the regions, and for the images that the last tile lacks.
__global__ void __launch_bounds__(kPackTileThreads, 4)
    pack_gram_kernel(const float* gram, int images, __half* packed, float* scale) {
  const int image = static_cast<int>(blockIdx.x);
  const float* from = gram + static_cast<int64_t>(image) * kFusedRegions * kFusedRegions;
  float largest = 0.0f;
  if (image < images) {
    for (int k = threadIdx.x % 32; k < kFusedRegions; k += 32) largest = fmaxf(largest, from[k * (kFusedRegions + 1)]);
  }
  largest = warp_max(largest);
  const float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
  if (threadIdx.x == 0) scale[image] = largest;
  __half* to = packed + static_cast<int64_t>(image) * kFusedGramElements;
  for (int item = threadIdx.x; item < kFusedGramElements; item += kPackTileThreads) {
    const int r = item / kFusedGramColumns, k = item % kFusedGramColumns;
    const bool there = image < images && r < kFusedRegions && k < kFusedRegions;
    to[item] = from_float<__half>(there ? from[r * kFusedRegions + k] * inverse : 0.0f);
  }
}

}  // namespace itm
