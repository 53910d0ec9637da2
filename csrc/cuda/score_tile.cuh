// Shared memory of one tile: some whole segments of queries against the key groups of a block of threads.
// Its sizes are those of common/scores_tiles.h, by which the host asked for the memory.
#pragma once

#include "../common/scores_tiles.h"
#include "arithmetic.cuh"
#include "scores_call.cuh"

namespace itm {

template <class Arithmetic, int kTiles>
struct ScoreTile {
  using Weight = typename Arithmetic::Weight;
  static constexpr int kGroups = groups_of_block(kTiles);
  static constexpr int kPadding = row_padding(sizeof(Weight));
  static constexpr int kGramStride = padded_keys(kTiles) + kPadding;
  static constexpr int kWeightStride = kGroups * padded_keys(kTiles) + kPadding;

  Weight* gram;       // [groups, 8 kTiles, kGramStride], zero past the keys
  float* scales;      // [kTileSegments, columns]: column c is key c of the block, groups one after another
  float* tops;        // likewise
  int* segment;       // [rows] segment of a row within the tile, or -1
  float* gram_scale;  // [groups] what the Gram matrix was divided by
  // [groups, rows] each; only the first two forward
  float *cosine, *peak;
  float *dot, *quadratic;  // become the gradients of both
  float *grad_norm, *grad_peak;
  Weight* weights;   // [rows, kWeightStride], zero where there is no key or no query; backward
  float* gradients;  // [rows, columns + 1], at the normalised features; backward
  int rows, columns;

  static __device__ ScoreTile carve(char* memory, bool backward, bool with_tops, int rows, int most_keys) {
    const TileBytes bytes = tile_bytes(kTiles, sizeof(Weight), backward, with_tops, rows, most_keys);
    ScoreTile tile{};
    tile.rows = rows;
    tile.columns = kGroups * most_keys;
    tile.gram = reinterpret_cast<Weight*>(memory);
    memory += bytes.gram;
    tile.scales = reinterpret_cast<float*>(memory);
    memory += bytes.scales;
    tile.tops = reinterpret_cast<float*>(memory);
    memory += bytes.tops;
    tile.segment = reinterpret_cast<int*>(memory);
    memory += bytes.segments;
    tile.gram_scale = reinterpret_cast<float*>(memory);
    memory += bytes.gram_scale;
    tile.cosine = reinterpret_cast<float*>(memory);
    tile.peak = tile.cosine + kGroups * rows;
    tile.dot = tile.peak + kGroups * rows;
    tile.quadratic = tile.dot + kGroups * rows;
    tile.grad_norm = tile.quadratic + kGroups * rows;
    tile.grad_peak = tile.grad_norm + kGroups * rows;
    memory += bytes.per_row;
    tile.weights = reinterpret_cast<Weight*>(memory);
    memory += bytes.weights;
    tile.gradients = reinterpret_cast<float*>(memory);
    return tile;
  }
};

}  // namespace itm
