// How hard-assignment scores are cut into blocks on the CPU: pure arithmetic on shapes, no torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "scores_plan.h"

namespace itm {

struct SimilarityShape {
  std::vector<int64_t> region_offsets;  // [I + 1] rows of the packed regions
  std::vector<int64_t> word_offsets;    // [C + 1] rows of the packed words
  int64_t width;                        // D
  int64_t element_bytes;                // of the products: 4, or 2 for bfloat16
  bool t2i;
  bool backward;
  bool arg_max_kept;    // backward: the arg-max of the forward is there
  bool copies_regions;  // regions have to be gathered or converted: a block's copy of them is workspace
  int64_t threads;

  // The backward needs products for nothing but the arg-max.
  bool makes_products() const { return !backward || !arg_max_kept; }
};

// Bytes that live beside inputs, gradients and scores while a block of `images` x `captions` is worked on.
inline int64_t block_workspace(const SimilarityShape& shape, BlockSize size, int64_t images, int64_t captions) {
  const int64_t groups = shape.t2i ? images : captions, segments = shape.t2i ? captions : images;
  const int64_t lanes = shape.t2i ? size.words : size.rows;
  int64_t bytes = size.words * shape.width * shape.element_bytes;                    // packed words
  if (shape.copies_regions) bytes += size.rows * shape.width * shape.element_bytes;  // packed regions
  bytes += shape.threads * 2 * (lanes + 64) * 4;  // a row of maxima, and its gradient
  if (shape.makes_products()) bytes += size.rows * size.words * shape.element_bytes;
  if (shape.backward) {
    bytes += groups * lanes * 4;                                           // gradient of the maxima
    if (shape.makes_products()) bytes += groups * (lanes + segments) * 4;  // arg-max, scores
    bytes += size.words * shape.width * 4;                                 // gradient of the words
    if (shape.copies_regions) bytes += size.rows * shape.width * 4;        // and of the regions
  }
  return bytes;
}

inline ScoresPlan plan_max_similarity(const SimilarityShape& shape, int64_t workspace_bytes) {
  const GroupSizes images = sizes_of(shape.region_offsets), captions = sizes_of(shape.word_offsets);
  const int64_t most_regions = std::max<int64_t>(images.most, 1), most_words = std::max<int64_t>(captions.most, 1);
  const int64_t threads = std::max<int64_t>(shape.threads, 1);

  int64_t words = std::max(even_parts(captions.rows, kBlockWords), most_words);
  // Without products a block is as large as the bound lets it be: each costs a pass over its words.
  int64_t rows = images.rows;
  if (shape.makes_products()) rows = kBlockBytesPerThread * threads / (words * shape.element_bytes);
  rows = std::max(even_parts(images.rows, std::max(rows, most_regions)), most_regions);
  const auto needed = [&](int64_t r, int64_t w) {
    // As if the block were made of the smallest groups: the most rows of scores that it can hold.
    const int64_t i = std::min(images.groups, r / std::max<int64_t>(images.least, 1) + 1);
    const int64_t c = std::min(captions.groups, w / std::max<int64_t>(captions.least, 1) + 1);
    return block_workspace(shape, {r, w}, i, c);
  };
  while (needed(rows, words) > workspace_bytes && (rows > most_regions || words > most_words)) {
    if (rows > most_regions && (rows >= words || words <= most_words)) {
      rows = std::max(rows / 2, most_regions);
    } else {
      words = std::max(words / 2, most_words);
    }
  }

  ScoresPlan plan{};
  plan.image_bounds = cut(shape.region_offsets, rows);
  plan.caption_bounds = cut(shape.word_offsets, words);
  const int64_t product = 2 * images.rows * captions.rows * shape.width;
  // The gathered gradients: three multiply-adds a query and group of keys (the maximum again, dk, dq).
  const int64_t pairs = shape.t2i ? images.groups * captions.rows : captions.groups * images.rows;
  plan.flops = (shape.makes_products() ? product : 0) + (shape.backward ? 3 * 2 * pairs * shape.width : 0);
  for (size_t c = 0; c + 1 < plan.caption_bounds.size(); ++c) {
    for (size_t i = 0; i + 1 < plan.image_bounds.size(); ++i) {
      const int64_t i0 = plan.image_bounds[i], i1 = plan.image_bounds[i + 1];
      const int64_t c0 = plan.caption_bounds[c], c1 = plan.caption_bounds[c + 1];
      const BlockSize size{shape.region_offsets[i1] - shape.region_offsets[i0],
                           shape.word_offsets[c1] - shape.word_offsets[c0]};
      plan.workspace_bytes = std::max(plan.workspace_bytes, block_workspace(shape, size, i1 - i0, c1 - c0));
      plan.launches += (shape.makes_products() ? 2 : 0) + (shape.backward ? 2 : 0);
    }
  }
  return plan;
}

}  // namespace itm
