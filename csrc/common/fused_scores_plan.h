// How the fused kernel of scores (product and epilogue in one, sm_90a) deals out its work: tiles, shared memory, order,
// blocks. Pure arithmetic on shapes, the same numbers for plan(), for the launch and inside the kernel.
#pragma once

#include "device_scores_plan.h"

namespace itm {

// A tile is 128 rows of words against 144 of regions: twice the 64 rows of an instruction, and whole images in the
// widths that it has. 216 columns (6 images) would need 216 accumulators a thread.
constexpr int kFusedRegions = 36;
constexpr int kFusedImages = 4;
constexpr int kFusedColumns = kFusedRegions * kFusedImages;
constexpr int kFusedWords = 128;
constexpr int kFusedSlice = 64;  // of D: 128 bytes, the widest swizzle
constexpr int kFusedStages = 4;  // as many as fit: two slices are on their way while two are multiplied
constexpr int kFusedStageBytes = (kFusedWords + kFusedColumns) * kFusedSlice * 2;
// Of a row of products in shared memory, in elements: rows 76 banks apart, so that the 8 rows that a warp writes or
// reads together start in different banks.
constexpr int kFusedProductStride = kFusedColumns + 8;
constexpr int kFusedGramColumns = padded_keys(kFewTiles) + row_padding(2);
constexpr int kFusedGramElements = 8 * kFewTiles * kFusedGramColumns;  // of one image, padded as the epilogue reads it
constexpr int kFusedBarriers = 2 * kFusedStages + 2;

// Epilogue warps come first, so that its code counts threads from 0; then the products, then the copies.
constexpr int kFusedEpilogueThreads = 32 * groups_of_block(kFewTiles) * warps_of_group(kFewTiles);
constexpr int kFusedProductThreads = 128;
constexpr int kFusedThreads = kFusedEpilogueThreads + kFusedProductThreads + 128;
// 512 threads start with 128 registers each; the copying warpgroup gives what products need: 144 accumulators a thread.
// (Two warpgroups of 72 would be 640 threads of 96 registers, and the instruction asks for 98.)
constexpr int kFusedEpilogueRegisters = 144;
constexpr int kFusedProductRegisters = 184;
constexpr int kFusedCopyRegisters = 24;
static_assert(2 * kFusedEpilogueRegisters + kFusedProductRegisters + kFusedCopyRegisters <= 4 * 128);

static_assert(groups_of_block(kFewTiles) == kFusedImages && kFusedRegions <= 8 * kFewTiles);

struct FusedBytes {
  size_t stages, products, tables, barriers, total;
};

ITM_HOST_DEVICE constexpr FusedBytes fused_bytes(bool with_tops) {
  FusedBytes bytes{};
  bytes.stages = kFusedStages * kFusedStageBytes;
  bytes.products = kFusedWords * kFusedProductStride * 2;
  bytes.tables = tile_bytes(kFewTiles, 2, false, with_tops, kFusedWords, kFusedRegions).total;
  bytes.barriers = kFusedBarriers * 8;
  // 1,024 more: the swizzle repeats every 1,024 bytes, and dynamic shared memory may begin anywhere.
  bytes.total = align_16(bytes.stages + bytes.products + bytes.tables + bytes.barriers + 1024);
  return bytes;
}

constexpr int64_t fused_slices(int64_t width) { return (width + kFusedSlice - 1) / kFusedSlice; }
constexpr int64_t fused_region_tiles(int64_t images) { return (images + kFusedImages - 1) / kFusedImages; }

// Whole captions from `first` on that share a tile, begin(c) being the row where caption c begins.
template <class Begin>
ITM_HOST_DEVICE int64_t captions_of_tile(int64_t first, int64_t captions, const Begin& begin) {
  int64_t taken = 1;
  while (taken < kTileSegments && first + taken < captions && begin(first + taken + 1) - begin(first) <= kFusedWords) {
    ++taken;
  }
  return taken;
}

// Tiles of captions `first` to `last`; the kernel makes the same ones from the offsets on the device.
inline int64_t fused_word_tiles(const std::vector<int64_t>& offsets, int64_t first, int64_t last) {
  int64_t tiles = 0;
  for (int64_t c = first; c < last; ++tiles) c += captions_of_tile(c, last, [&](int64_t g) { return offsets[g]; });
  return tiles;
}

// Order of the tiles: a panel of 16 tiles of words against all images, then the next. The blocks of threads of a GPU
// then work on about 16 x 8 tiles at a time, 7 MB at D = 1,024, which stay in L2 while all of them read them.
constexpr int kFusedPanel = 16;

struct FusedTile {
  int images, words;  // numbers of the tiles
};

ITM_HOST_DEVICE constexpr FusedTile fused_tile(int number, int region_tiles, int word_tiles) {
  const int panel = number / (kFusedPanel * region_tiles), first = panel * kFusedPanel;
  const int width = word_tiles - first < kFusedPanel ? word_tiles - first : kFusedPanel;
  const int within = number - panel * kFusedPanel * region_tiles;
  return {within / width, first + within % width};
}

struct FusedScoresShape {
  int64_t images;
  std::vector<int64_t> word_offsets;  // [C + 1]
  int64_t width;                      // D
  bool copies_regions, copies_words;  // gathered: a block's copy of them is workspace
};

struct FusedScoresPlan {
  std::vector<int64_t> image_bounds, caption_bounds;  // [blocks + 1]
  int64_t workspace_bytes, flops, launches;
  double useful_fraction;  // of the rows that are multiplied
};

// No block of products to hold: only its operands, twice, which at D = 1,024 are 134 MB. Larger blocks pack the regions
// less often: here 1 % of the product's time at B = 8,192.
constexpr int64_t kFusedBlockRows = 16384;

// Bytes that live beside inputs and scores while images are scored against captions `first` to `last`.
inline int64_t fused_block_workspace(const FusedScoresShape& shape, int64_t images, int64_t first, int64_t last) {
  const int64_t words = shape.word_offsets[last] - shape.word_offsets[first], rows = images * kFusedRegions;
  const int64_t word_tiles = fused_word_tiles(shape.word_offsets, first, last), tiles = fused_region_tiles(images);
  int64_t bytes = (word_tiles * kFusedWords + tiles * kFusedColumns) * fused_slices(shape.width) * kFusedSlice * 2;
  if (shape.copies_words) bytes += words * shape.width * 2;
  if (shape.copies_regions) bytes += rows * shape.width * 2;
  bytes += images * kFusedRegions * kFusedRegions * 4;           // Gram matrices
  bytes += tiles * kFusedImages * (kFusedGramElements * 2 + 4);  // as the epilogue reads them
  return bytes + words * 4 + (word_tiles + 1) * 4;               // norms, table of tiles
}

inline FusedScoresPlan cut_fused_scores(const FusedScoresShape& shape, int64_t images, int64_t words) {
  FusedScoresPlan plan{};
  for (int64_t i = 0; i < shape.images; i += images) plan.image_bounds.push_back(i);
  plan.image_bounds.push_back(shape.images);
  plan.caption_bounds = cut(shape.word_offsets, words);
  plan.flops = 2 * shape.images * kFusedRegions * shape.word_offsets.back() * shape.width;
  double computed = 0.0;
  for (size_t c = 0; c + 1 < plan.caption_bounds.size(); ++c) {
    const int64_t first = plan.caption_bounds[c], last = plan.caption_bounds[c + 1];
    plan.launches += 4;  // rows, norms, table and tiles of the words
    for (size_t i = 0; i + 1 < plan.image_bounds.size(); ++i) {
      const int64_t block = plan.image_bounds[i + 1] - plan.image_bounds[i];
      plan.workspace_bytes = std::max(plan.workspace_bytes, fused_block_workspace(shape, block, first, last));
      plan.launches += 5;  // rows, Gram matrices, those as they are read, and tiles of the regions; the kernel
      computed += static_cast<double>(fused_word_tiles(shape.word_offsets, first, last) * kFusedWords) *
                  static_cast<double>(fused_region_tiles(block) * kFusedColumns);
    }
  }
  const double useful =
      static_cast<double>(shape.word_offsets.back()) * static_cast<double>(shape.images * kFusedRegions);
  plan.useful_fraction = computed == 0.0 ? 1.0 : useful / computed;
  return plan;
}

inline FusedScoresPlan plan_fused_scores(const FusedScoresShape& shape, int64_t workspace_bytes) {
  const GroupSizes captions = sizes_of(shape.word_offsets);
  const int64_t most_words = std::max<int64_t>(captions.most, 1);
  int64_t words = std::max(even_parts(captions.rows, kFusedBlockRows), most_words);
  int64_t images = std::max<int64_t>(even_parts(shape.images, kFusedBlockRows / kFusedRegions), 1);
  for (;;) {
    // Whole tiles of images, and no image without a tile's worth of others where that can be.
    const int64_t whole = images > kFusedImages ? fused_region_tiles(images) * kFusedImages : images;
    FusedScoresPlan plan = cut_fused_scores(shape, whole, words);
    if (plan.workspace_bytes <= workspace_bytes || (images == 1 && words <= most_words)) return plan;
    if (images > 1 && (images * kFusedRegions >= words || words <= most_words)) {
      images = (images + 1) / 2;
    } else {
      words = std::max((words + 1) / 2, most_words);
    }
  }
}

}  // namespace itm
