// The fused route of cross_attention_scores on sm_90a: operands packed, then product and epilogue in one kernel.
// The block loop is itm_kernels/native/cuda/fused_scores.py.

#include "arguments.h"
#include "fused_scores_kernel.cuh"
#include "launch.h"
#include "registration.h"

namespace itm {
namespace {

constexpr const char* kOp = "fused_scores";

template <class Run>
void for_half_type_of(const Tensor& tensor, const Run& run) {
  if (tensor.scalar_type() == ScalarType::Half) return run(__half{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, "fused_scores: must be float16 or bfloat16");
  run(__nv_bfloat16{});
}

int* table_of(const Tensor& table) {
  STD_TORCH_CHECK(
      table.dim() == 1 && table.size(0) > 0 && table.is_contiguous() && table.scalar_type() == ScalarType::Int,
      "fused_scores: table must be contiguous int32 [tiles + 1]");
  return static_cast<int*>(table.data_ptr());
}

// [tiles, slices, rows, 64], aligned for copies of 16 bytes.
void check_tiles(const Tensor& tiles, int64_t rows) {
  STD_TORCH_CHECK(tiles.dim() == 4 && tiles.is_contiguous() && tiles.size(2) == rows && tiles.size(3) == kFusedSlice &&
                      reinterpret_cast<uintptr_t>(tiles.data_ptr()) % 16 == 0,
                  "fused_scores: tiles must be contiguous [tiles, slices, ", rows, ", 64], aligned to 16 bytes");
}

}  // namespace

void fused_scores_captions(MaybeTensor offsets, int64_t captions, int64_t stride, Tensor table) {
  const DeviceGuard guard(table.get_device_index());
  const Groups groups = groups_of(kOp, offsets, std::nullopt, captions, stride);
  const auto tiles = static_cast<int>(table.size(0) - 1);
  launch(caption_tiles_kernel, dim3(tiles > 0 ? 1 : 0), kPackTileThreads, static_cast<size_t>(captions) * sizeof(int),
         current_stream(table.get_device_index()), groups, static_cast<int>(captions), table_of(table), tiles);
}

void fused_scores_tiles(Tensor rows, MaybeTensor offsets, int64_t captions, int64_t stride, MaybeTensor table,
                        Tensor tiles) {
  const DeviceGuard guard(rows.get_device_index());
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == tiles.scalar_type(),
                  "fused_scores: rows must be contiguous [n, D] like tiles");
  check_tiles(tiles, table.has_value() ? kFusedWords : kFusedColumns);
  STD_TORCH_CHECK(tiles.size(1) == fused_slices(rows.size(1)), "fused_scores: tiles have ", tiles.size(1),
                  " slices for a width of ", rows.size(1));
  STD_TORCH_CHECK(
      table.has_value() ? table->size(0) == tiles.size(0) + 1 : tiles.size(0) * kFusedColumns >= rows.size(0),
      "fused_scores: ", tiles.size(0), " tiles do not hold ", rows.size(0), " rows");
  const Groups groups = groups_of(kOp, offsets, std::nullopt, captions, stride);
  for_half_type_of(rows, [&](auto example) {
    using T = decltype(example);
    const bool wide = rows.size(1) % 8 == 0 && reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0;
    const dim3 grid(static_cast<unsigned>(tiles.size(0)), static_cast<unsigned>(tiles.size(1)));
    auto* kernel = table.has_value() ? pack_tiles_kernel<T, kFusedWords> : pack_tiles_kernel<T, kFusedColumns>;
    launch(kernel, grid, kPackTileThreads, 0, current_stream(rows.get_device_index()),
           static_cast<const T*>(rows.data_ptr()), rows.size(0), rows.size(1), wide, groups,
           table.has_value() ? table_of(*table) : nullptr, static_cast<T*>(tiles.data_ptr()));
  });
}

void fused_scores_gram(Tensor gram, Tensor packed, Tensor scale) {
  const DeviceGuard guard(gram.get_device_index());
  const int64_t images = gram.size(0), padded = fused_region_tiles(images) * kFusedImages;
  STD_TORCH_CHECK(gram.numel() == images * kFusedRegions * kFusedRegions && packed.is_contiguous() &&
                      packed.scalar_type() == ScalarType::Half && packed.numel() == padded * kFusedGramElements,
                  "fused_scores: gram must be [I, 36, 36], packed float16 for whole tiles of images");
  launch(pack_gram_kernel, dim3(static_cast<unsigned>(padded)), kPackTileThreads, 0,
         current_stream(gram.get_device_index()), floats(kOp, gram, gram.numel(), "gram"), static_cast<int>(images),
         static_cast<__half*>(packed.data_ptr()), floats(kOp, scale, padded, "scale"));
}

void fused_scores_of_tiles(Tensor word_tiles, Tensor region_tiles, Tensor table, Tensor gram, Tensor gram_scale,
                           MaybeTensor query_offsets, MaybeTensor query_counts, int64_t query_stride,
                           Tensor query_norms, int64_t feature_norm, int64_t focal, int64_t aggregation,
                           double lambda_softmax, double lambda_lse, double peak_weight, int64_t multiprocessors,
                           Tensor scores) {
  const DeviceGuard guard(word_tiles.get_device_index());
  check_tiles(word_tiles, kFusedWords);
  check_tiles(region_tiles, kFusedColumns);
  STD_TORCH_CHECK(scores.dim() == 2 && scores.scalar_type() == ScalarType::Float,
                  "fused_scores: scores must be float32 [images, captions]");
  const int64_t images = scores.size(0), captions = scores.size(1), padded = region_tiles.size(0) * kFusedImages;
  STD_TORCH_CHECK(region_tiles.size(0) == fused_region_tiles(images) && table.size(0) == word_tiles.size(0) + 1 &&
                      word_tiles.size(1) == region_tiles.size(1) &&
                      word_tiles.scalar_type() == region_tiles.scalar_type(),
                  "fused_scores: tiles do not fit each other");
  STD_TORCH_CHECK(
      gram.is_contiguous() && gram.scalar_type() == ScalarType::Half && gram.numel() == padded * kFusedGramElements,
      "fused_scores: gram must be what fused_scores_gram makes");
  const int64_t tiles = word_tiles.size(0) * region_tiles.size(0);
  STD_TORCH_CHECK(tiles < (int64_t{1} << 31) - multiprocessors, "fused_scores: too many tiles in a block");
  for_half_type_of(word_tiles, [&](auto example) {
    using T = decltype(example);
    ScoresCall<T> call{};
    call.options = {static_cast<FeatureNorm>(feature_norm), static_cast<Focal>(focal),
                    static_cast<Aggregation>(aggregation),  static_cast<float>(lambda_softmax),
                    static_cast<float>(lambda_lse),         static_cast<float>(peak_weight)};
    call.feature = Feature::of(call.options.feature_norm);
    call.queries = groups_of(kOp, query_offsets, query_counts, captions, query_stride);
    call.groups = images;
    call.segments = captions;
    call.rows = query_norms.numel();
    call.query_norms = floats(kOp, query_norms, call.rows, "query_norms");
    call.most_keys = kFusedRegions;
    call.row_capacity = kFusedWords;
    call.scores = static_cast<float*>(scores.data_ptr());
    call.group_stride = scores.stride(0);
    call.segment_stride = scores.stride(1);
    const FusedOperands<T> operands{static_cast<const T*>(word_tiles.data_ptr()),
                                    static_cast<const T*>(region_tiles.data_ptr()),
                                    table_of(table),
                                    static_cast<const __half*>(gram.data_ptr()),
                                    floats(kOp, gram_scale, padded, "gram_scale"),
                                    static_cast<int>(word_tiles.size(1)),
                                    static_cast<int>(word_tiles.size(0)),
                                    static_cast<int>(region_tiles.size(0))};
    const auto blocks = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
    launch(fused_scores<T>, dim3(blocks), kFusedThreads, fused_bytes(call.feature.kind == NormKind::kSoftmax).total,
           current_stream(word_tiles.get_device_index()), call, operands);
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("fused_scores_captions", TORCH_BOX(&itm::fused_scores_captions));
  m.impl("fused_scores_tiles", TORCH_BOX(&itm::fused_scores_tiles));
  m.impl("fused_scores_gram", TORCH_BOX(&itm::fused_scores_gram));
  m.impl("fused_scores_of_tiles", TORCH_BOX(&itm::fused_scores_of_tiles));
}
