// How the all-pairs scores of a batch are cut into blocks on a GPU: pure arithmetic on shapes, no torch, no CUDA.
//
// Images are rows of one length (fewer valid regions are marked by counts), captions are packed or rows of one length.
#pragma once

#include "maxima_tiles.h"
#include "scores_plan.h"
#include "scores_tiles.h"

namespace itm {

struct DeviceScoresShape {
  int64_t images, regions;            // I, R
  std::vector<int64_t> word_offsets;  // [C + 1]
  int64_t width;                      // D
  int64_t element_bytes;              // of the products
  bool t2i, i2t, backward;
  bool copies_regions, copies_words;  // gathered: a block's copy of them is workspace
  bool softmax;                       // of the feature norm
  int64_t shared_limit, multiprocessors;
};

struct DeviceScoresPlan {
  std::vector<int64_t> image_bounds, caption_bounds;  // [blocks + 1]
  int64_t workspace_bytes, flops, launches;
  ScoresLaunch t2i, i2t;   // of the largest block
  double useful_fraction;  // of the rows that the epilogue computes
};

// A product of 10,500 x 10,500 in two bytes, its packed inputs and their gradients fill 256 MiB; there the accumulation
// of both gradients costs 2 % of the products, where blocks of images alone would cost 13 % at B = 8,192.
constexpr int64_t kDeviceBlockRows = 10752;

// Rows of products begin at multiples of 16 bytes, for the library's sake (itm_kernels/native/cuda/products.py).
inline int64_t aligned_row(int64_t keys) { return (keys + 7) / 8 * 8; }

inline EpilogueShape epilogue_shape(const DeviceScoresShape& shape, bool t2i, int64_t images, int64_t captions,
                                    int64_t words, int64_t most_words) {
  EpilogueShape made{};
  made.groups = t2i ? images : captions;
  made.most_keys = t2i ? shape.regions : most_words;
  made.rows = t2i ? words : images * shape.regions;
  made.most_queries = t2i ? most_words : shape.regions;
  made.uniform = !t2i;  // images have rows of one length, captions may
  made.element_bytes = shape.element_bytes;
  made.backward = shape.backward;
  made.softmax = shape.softmax;
  made.shared_limit = shape.shared_limit;
  made.multiprocessors = shape.multiprocessors;
  return made;
}

// Bytes that live beside inputs, gradients and scores while a block is worked on.
inline int64_t device_block_workspace(const DeviceScoresShape& shape, int64_t images, int64_t captions, int64_t words,
                                      int64_t most_words) {
  const int64_t rows = images * shape.regions;
  const int64_t products = shape.t2i ? words * aligned_row(rows) : rows * aligned_row(words);
  int64_t bytes = products * shape.element_bytes * (shape.backward && shape.t2i && shape.i2t ? 2 : 1);
  if (shape.copies_words) bytes += words * shape.width * shape.element_bytes;
  if (shape.copies_regions) bytes += rows * shape.width * shape.element_bytes;
  if (shape.backward) bytes += words * shape.width * 4;  // gradient of the words, in float32
  bytes += (rows + words) * 4;                           // norms
  int64_t scratch = 0;
  for (const bool t2i : {true, false}) {
    if (!(t2i ? shape.t2i : shape.i2t)) continue;
    const EpilogueShape epilogue = epilogue_shape(shape, t2i, images, captions, words, most_words);
    const ScoresLaunch launch = scores_launch(epilogue);
    const int64_t gram = epilogue.groups * epilogue.most_keys * epilogue.most_keys * 4;
    bytes += gram;
    if (!shape.backward) continue;
    bytes += gram * launch.splits + launch.group_blocks * epilogue.rows * 4;
    if (launch.tiles == 0) scratch = 2 * products * 4;
  }
  return bytes + scratch;
}

inline DeviceScoresPlan plan_device_scores(const DeviceScoresShape& shape, int64_t workspace_bytes) {
  const GroupSizes captions = sizes_of(shape.word_offsets);
  const int64_t most_words = std::max<int64_t>(captions.most, 1), regions = std::max<int64_t>(shape.regions, 1);
  int64_t words = std::max(even_parts(captions.rows, kDeviceBlockRows), most_words);
  int64_t images = std::max<int64_t>(even_parts(shape.images, std::max<int64_t>(kDeviceBlockRows / regions, 1)), 1);
  const auto needed = [&](int64_t i, int64_t w) {
    // As if the block were made of the shortest captions: the most Gram matrices that it can hold.
    const int64_t c = std::min(captions.groups, w / std::max<int64_t>(captions.least, 1) + 1);
    return device_block_workspace(shape, i, c, w, most_words);
  };
  while (needed(images, words) > workspace_bytes && (images > 1 || words > most_words)) {
    if (images > 1 && (images * regions >= words || words <= most_words)) {
      images = (images + 1) / 2;
    } else {
      words = std::max((words + 1) / 2, most_words);
    }
  }

  DeviceScoresPlan plan{};
  for (int64_t i = 0; i < shape.images; i += images) plan.image_bounds.push_back(i);
  plan.image_bounds.push_back(shape.images);
  plan.caption_bounds = cut(shape.word_offsets, words);
  const int64_t passes = shape.backward ? 3 : 1;  // products: S, then dV and dT
  plan.flops = 2 * passes * shape.images * shape.regions * captions.rows * shape.width;
  const int64_t directions = (shape.t2i ? 1 : 0) + (shape.i2t ? 1 : 0);
  double useful = 0.0, computed = 0.0;
  int64_t largest = -1;
  for (size_t c = 0; c + 1 < plan.caption_bounds.size(); ++c) {
    const int64_t c0 = plan.caption_bounds[c], c1 = plan.caption_bounds[c + 1];
    const int64_t block_words = shape.word_offsets[c1] - shape.word_offsets[c0];
    plan.launches += shape.backward ? 3 : 2;  // pack, Gram matrices and norms of the words; their gradient goes back
    for (size_t i = 0; i + 1 < plan.image_bounds.size(); ++i) {
      const int64_t block_images = plan.image_bounds[i + 1] - plan.image_bounds[i];
      const int64_t bytes = device_block_workspace(shape, block_images, c1 - c0, block_words, most_words);
      plan.workspace_bytes = std::max(plan.workspace_bytes, bytes);
      // pack and Gram matrices of the regions, products, epilogues; backward also the gradients through Gram matrices
      plan.launches += 2 + passes + directions + (shape.backward ? 2 : 0);
      const ScoresLaunch t2i =
          scores_launch(epilogue_shape(shape, true, block_images, c1 - c0, block_words, most_words));
      const ScoresLaunch i2t =
          scores_launch(epilogue_shape(shape, false, block_images, c1 - c0, block_words, most_words));
      if (bytes > largest) {
        largest = bytes;
        plan.t2i = t2i;
        plan.i2t = i2t;
      }
      if (shape.t2i) {
        const double share = useful_rows(shape.word_offsets.data() + c0, c1 - c0, t2i.row_capacity);
        useful += static_cast<double>(block_words * block_images);
        computed += static_cast<double>(block_words * block_images) / share;
      }
      if (shape.i2t) {
        std::vector<int64_t> offsets(static_cast<size_t>(block_images) + 1);
        for (int64_t k = 0; k <= block_images; ++k) offsets[k] = k * regions;
        const double share = useful_rows(offsets, block_images, i2t.row_capacity);
        useful += static_cast<double>(offsets.back() * (c1 - c0));
        computed += static_cast<double>(offsets.back() * (c1 - c0)) / share;
      }
    }
  }
  plan.launches += shape.backward ? 1 : 0;  // the regions' gradient in their own dtype
  plan.useful_fraction = computed == 0.0 ? 1.0 : useful / computed;
  return plan;
}

// Hard assignment: no Gram matrices, no norms, one kernel a block; `linear`: an aggregation whose gradient needs no maxima.
struct DeviceMaximaShape {
  int64_t images, regions;            // I, R
  std::vector<int64_t> word_offsets;  // [C + 1]
  int64_t width;                      // D
  int64_t element_bytes;              // of the products
  bool t2i, backward;
  bool arg_max_kept, linear;
  bool copies_regions, copies_words;
  int64_t multiprocessors;

  // Backward, products are read for the maxima or for the arg-max; dS is written in either case.
  bool makes_products() const { return !backward || !arg_max_kept || !linear; }
};

struct DeviceMaximaPlan {
  std::vector<int64_t> image_bounds, caption_bounds;  // [blocks + 1]
  int64_t workspace_bytes, flops, launches;
  MaximaLaunch launch;  // of the largest block
};

inline int64_t device_block_workspace(const DeviceMaximaShape& shape, int64_t images, int64_t words) {
  const int64_t rows = images * shape.regions;
  int64_t bytes = (shape.t2i ? words * aligned_row(rows) : rows * aligned_row(words)) * shape.element_bytes;
  if (shape.copies_words) bytes += words * shape.width * shape.element_bytes;
  if (shape.copies_regions) bytes += rows * shape.width * shape.element_bytes;
  if (shape.backward) bytes += words * shape.width * 4;  // gradient of the words, in float32
  return bytes;
}

inline DeviceMaximaPlan plan_device_maxima(const DeviceMaximaShape& shape, int64_t workspace_bytes) {
  const GroupSizes captions = sizes_of(shape.word_offsets);
  const int64_t most_words = std::max<int64_t>(captions.most, 1), regions = std::max<int64_t>(shape.regions, 1);
  int64_t words = std::max(even_parts(captions.rows, kDeviceBlockRows), most_words);
  int64_t images = std::max<int64_t>(even_parts(shape.images, std::max<int64_t>(kDeviceBlockRows / regions, 1)), 1);
  while (device_block_workspace(shape, images, words) > workspace_bytes && (images > 1 || words > most_words)) {
    if (images > 1 && (images * regions >= words || words <= most_words)) {
      images = (images + 1) / 2;
    } else {
      words = std::max((words + 1) / 2, most_words);
    }
  }
  DeviceMaximaPlan plan{};
  for (int64_t i = 0; i < shape.images; i += images) plan.image_bounds.push_back(i);
  plan.image_bounds.push_back(shape.images);
  plan.caption_bounds = cut(shape.word_offsets, words);
  const int64_t products = (shape.makes_products() ? 1 : 0) + (shape.backward ? 2 : 0);
  plan.flops = 2 * products * shape.images * shape.regions * captions.rows * shape.width;
  for (size_t c = 0; c + 1 < plan.caption_bounds.size(); ++c) {
    const int64_t c0 = plan.caption_bounds[c], c1 = plan.caption_bounds[c + 1];
    const int64_t block_words = shape.word_offsets[c1] - shape.word_offsets[c0];
    plan.launches += shape.backward ? 2 : 1;  // pack the words; their gradient goes back
    for (size_t i = 0; i + 1 < plan.image_bounds.size(); ++i) {
      const int64_t block_images = plan.image_bounds[i + 1] - plan.image_bounds[i];
      const int64_t bytes = device_block_workspace(shape, block_images, block_words);
      plan.launches += 2 + products;  // pack the regions, the kernel
      if (bytes <= plan.workspace_bytes) continue;
      plan.workspace_bytes = bytes;
      const int64_t rows = block_images * shape.regions;
      plan.launch = shape.t2i ? maxima_launch(block_images, block_words, most_words, shape.multiprocessors)
                              : maxima_launch(c1 - c0, rows, shape.regions, shape.multiprocessors);
    }
  }
  plan.launches += shape.backward ? 1 : 0;  // the regions' gradient in their own dtype
  return plan;
}

}  // namespace itm
