// How the all-pairs scores of a batch are cut into blocks on the CPU: pure arithmetic on shapes, no torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace itm {

struct ScoresShape {
  std::vector<int64_t> region_offsets;  // [I + 1] rows of the packed regions
  std::vector<int64_t> word_offsets;    // [C + 1] rows of the packed words
  int64_t width;                        // D
  int64_t element_bytes;                // of the products: 4, or 2 for bfloat16
  bool t2i, i2t;
  bool backward;
  bool copies_regions;  // regions have to be gathered or converted: a block's copy of them is workspace
  int64_t threads;
};

struct ScoresPlan {
  std::vector<int64_t> image_bounds;    // [blocks + 1]
  std::vector<int64_t> caption_bounds;  // [blocks + 1]
  int64_t workspace_bytes;              // of the largest block
  int64_t flops;                        // of the library products
  int64_t launches;                     // library products and kernels
};

// A block of products is written by the library and read back by the epilogue, so it should fit the second-level cache
// of a core (1 to 2 MiB on current servers) and its share of the third level (2 to 16 MiB). Chosen from those sizes, not
// by a sweep; the ratios in docs/performance-log.md were measured with it.
constexpr int64_t kBlockBytesPerThread = 4 << 20;
// With fewer words the product would repack its other operand more often for the same work.
constexpr int64_t kBlockWords = 2048;

struct BlockSize {
  int64_t rows;  // region rows
  int64_t words;
};

// Sizes of the groups of one side: the regions of images, or the words of captions.
struct GroupSizes {
  int64_t groups, rows, least, most;
};

inline GroupSizes sizes_of(const std::vector<int64_t>& offsets) {
  GroupSizes sizes{static_cast<int64_t>(offsets.size()) - 1, offsets.back(), offsets.back(), 0};
  for (size_t g = 0; g + 1 < offsets.size(); ++g) {
    sizes.least = std::min(sizes.least, offsets[g + 1] - offsets[g]);
    sizes.most = std::max(sizes.most, offsets[g + 1] - offsets[g]);
  }
  return sizes;
}

// Bytes that live beside inputs, gradients and scores while a block of `images` x `captions` is worked on, with
// `most_regions` and `most_words` in the largest image and caption of the batch.
inline int64_t block_workspace(const ScoresShape& shape, BlockSize size, int64_t images, int64_t captions,
                               int64_t most_regions, int64_t most_words) {
  const bool both = shape.t2i && shape.i2t;
  const bool half = shape.element_bytes < 4;
  int64_t bytes = size.rows * size.words * shape.element_bytes * (both ? 2 : 1);
  bytes += size.words * shape.width * shape.element_bytes;                           // packed words
  if (shape.copies_regions) bytes += size.rows * shape.width * shape.element_bytes;  // packed regions
  const int64_t copies = shape.backward ? 2 : 1;                                     // Gram matrices, their gradients
  if (shape.t2i) bytes += images * most_regions * most_regions * 4 * copies;
  if (shape.i2t) bytes += captions * most_words * most_words * 4 * copies;
  bytes += (size.rows + size.words) * 4;  // norms
  if (shape.backward) {
    bytes += size.words * shape.width * 4;                                   // gradient of the words
    if (shape.copies_regions || half) bytes += size.rows * shape.width * 4;  // and of the regions
    if (half) bytes += std::max(size.words, size.rows) * shape.width * (shape.element_bytes + 4);  // a product, widened
    if (shape.t2i) bytes += images * size.words * 4;  // gradient of the query norms
    if (shape.i2t) bytes += captions * size.rows * 4;
  }
  return bytes;
}

// Cuts whole groups greedily into runs of at most `most` rows (a longer group stands alone).
inline std::vector<int64_t> cut(const std::vector<int64_t>& offsets, int64_t most) {
  std::vector<int64_t> bounds{0};
  const int64_t groups = static_cast<int64_t>(offsets.size()) - 1;
  for (int64_t g = 1; g <= groups; ++g) {
    if (offsets[g] - offsets[bounds.back()] > most && g - 1 > bounds.back()) bounds.push_back(g - 1);
  }
  if (groups > 0) bounds.push_back(groups);
  return bounds;
}

// Size of equal parts of at most `most`: the last one is no remainder.
inline int64_t even_parts(int64_t total, int64_t most) {
  const int64_t parts = std::max<int64_t>((total + most - 1) / std::max<int64_t>(most, 1), 1);
  return (total + parts - 1) / parts;
}

inline ScoresPlan plan_scores(const ScoresShape& shape, int64_t workspace_bytes) {
  const GroupSizes images = sizes_of(shape.region_offsets), captions = sizes_of(shape.word_offsets);
  const int64_t most_regions = std::max<int64_t>(images.most, 1), most_words = std::max<int64_t>(captions.most, 1);

  int64_t words = std::max(even_parts(captions.rows, kBlockWords), most_words);
  int64_t rows =
      kBlockBytesPerThread * std::max<int64_t>(shape.threads, 1) / std::max<int64_t>(words * shape.element_bytes, 1);
  rows = std::max(even_parts(images.rows, std::max(rows, most_regions)), most_regions);
  const auto needed = [&](int64_t r, int64_t w) {
    // As if the block were made of the smallest groups: the most Gram matrices that it can hold.
    const int64_t i = std::min(images.groups, r / std::max<int64_t>(images.least, 1) + 1);
    const int64_t c = std::min(captions.groups, w / std::max<int64_t>(captions.least, 1) + 1);
    return block_workspace(shape, {r, w}, i, c, most_regions, most_words);
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
  const int64_t passes = shape.backward ? 3 : 1;  // products: S, then dV and dT
  plan.flops = 2 * passes * images.rows * captions.rows * shape.width;
  const int64_t directions = (shape.t2i ? 1 : 0) + (shape.i2t ? 1 : 0);
  for (size_t c = 0; c + 1 < plan.caption_bounds.size(); ++c) {
    for (size_t i = 0; i + 1 < plan.image_bounds.size(); ++i) {
      const int64_t i0 = plan.image_bounds[i], i1 = plan.image_bounds[i + 1];
      const int64_t c0 = plan.caption_bounds[c], c1 = plan.caption_bounds[c + 1];
      const BlockSize size{shape.region_offsets[i1] - shape.region_offsets[i0],
                           shape.word_offsets[c1] - shape.word_offsets[c0]};
      plan.workspace_bytes =
          std::max(plan.workspace_bytes, block_workspace(shape, size, i1 - i0, c1 - c0, most_regions, most_words));
      plan.launches += passes + directions * (shape.backward ? 3 : 2);
    }
  }
  return plan;
}

}  // namespace itm
