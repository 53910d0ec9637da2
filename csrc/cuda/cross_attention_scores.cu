// cross_attention_scores on CUDA: what happens between the library products of a block.
// The block loop is itm_kernels/native/cuda/cross_attention_scores.py, the mathematics in the headers beside this.

#include "arguments.h"
#include "cross_attention_scores_kernel.cuh"
#include "launch.h"
#include "registration.h"
#include "wide_scores_kernel.cuh"

namespace itm {
namespace {

constexpr const char* kOp = "cross_attention_scores";

template <class T>
Matrix<T> matrix_of(const Tensor& tensor) {
  auto* data = static_cast<T*>(tensor.data_ptr());
  const bool pairs = tensor.stride(1) == 1 && tensor.stride(0) % 2 == 0 && reinterpret_cast<uintptr_t>(data) % 8 == 0;
  return {data, tensor.stride(0), tensor.stride(1), pairs};
}

// How the host dealt out the work (common/scores_tiles.h).
struct Dealt {
  int64_t tiles, row_capacity, splits;
};

template <class T>
ScoresCall<T> make_call(const Tensor& products, const Tensor& gram, const MaybeTensor& key_offsets,
                        const MaybeTensor& key_counts, const MaybeTensor& query_offsets,
                        const MaybeTensor& query_counts, int64_t query_stride, const Tensor& query_norms,
                        const ScoreOptions& options, const Dealt& dealt, const Tensor& scores) {
  STD_TORCH_CHECK(products.dim() == 2 && scores.dim() == 2 && scores.scalar_type() == ScalarType::Float,
                  "cross_attention_scores: products must be [queries, keys], scores float32 [groups, segments]");
  STD_TORCH_CHECK(gram.dim() == 3 && gram.size(0) == scores.size(0) && gram.size(1) == gram.size(2),
                  "cross_attention_scores: gram must be [G, K, K]");
  ScoresCall<T> call{};
  call.options = options;
  call.feature = Feature::of(options.feature_norm);
  call.products = matrix_of<const T>(products);
  call.groups = scores.size(0);
  call.segments = scores.size(1);
  call.rows = products.size(0);
  call.most_keys = static_cast<int>(gram.size(1));
  call.keys = groups_of(kOp, key_offsets, key_counts, call.groups, gram.size(1));
  call.queries = groups_of(kOp, query_offsets, query_counts, call.segments, query_stride);
  STD_TORCH_CHECK(call.keys.offsets || products.size(1) == call.groups * call.most_keys,
                  "cross_attention_scores: products have ", products.size(1), " columns, not groups x keys");
  STD_TORCH_CHECK(call.queries.offsets || products.size(0) == call.segments * query_stride,
                  "cross_attention_scores: products have ", products.size(0), " rows, not segments x queries");
  call.gram = floats(kOp, gram, gram.numel(), "gram");
  call.query_norms = floats(kOp, query_norms, products.size(0), "query_norms");
  call.group_stride = scores.stride(0);
  call.segment_stride = scores.stride(1);
  call.span = (call.rows + dealt.splits - 1) / dealt.splits;
  call.row_capacity = static_cast<int>(dealt.row_capacity);
  return call;
}

template <class T>
using ArithmeticOf = std::conditional_t<std::is_same_v<T, float>, FloatArithmetic, HalfArithmetic>;

template <class T, int kTiles, bool kBackward>
void launch_tiles(const ScoresCall<T>& call, const Dealt& dealt, cudaStream_t stream) {
  using Arithmetic = ArithmeticOf<T>;
  using Kernel = ScoresOfTiles<T, Arithmetic, kTiles, kBackward>;
  STD_TORCH_CHECK(call.most_keys <= 8 * kTiles, "cross_attention_scores: ", call.most_keys, " keys for ", kTiles,
                  " tiles of 8");
  const TileBytes bytes = tile_bytes(kTiles, sizeof(typename Arithmetic::Weight), kBackward,
                                     call.feature.kind == NormKind::kSoftmax, call.row_capacity, call.most_keys);
  const dim3 grid(static_cast<unsigned>((call.groups + Kernel::kGroups - 1) / Kernel::kGroups),
                  static_cast<unsigned>(dealt.splits));
  launch(scores_of_tiles<T, Arithmetic, kTiles, kBackward>, grid, Kernel::kThreads, bytes.total, stream, call);
}

template <class T, bool kBackward>
void launch_scores(const ScoresCall<T>& call, const Dealt& dealt, float* scratch, int64_t all_keys,
                   cudaStream_t stream) {
  if (dealt.tiles == kFewTiles) return launch_tiles<T, kFewTiles, kBackward>(call, dealt, stream);
  if (dealt.tiles == kManyTiles) return launch_tiles<T, kManyTiles, kBackward>(call, dealt, stream);
  STD_TORCH_CHECK(dealt.tiles == 0, "cross_attention_scores: no kernel for ", dealt.tiles, " tiles");
  const size_t shared = sizeof(float) * (3 * call.most_keys + 6 * call.queries.stride + 64);
  const int64_t columns = kBackward ? 1 : (call.segments < 65535 ? call.segments : 65535);
  const dim3 grid(static_cast<unsigned>(call.groups), static_cast<unsigned>(columns));
  launch(scores_of_wide_groups<T, kBackward>, grid, kWideThreads, shared, stream, call, scratch, all_keys);
}

ScoreOptions options_of(int64_t feature_norm, int64_t focal, int64_t aggregation, double lambda_softmax,
                        double lambda_lse, double peak_weight) {
  return {static_cast<FeatureNorm>(feature_norm), static_cast<Focal>(focal),      static_cast<Aggregation>(aggregation),
          static_cast<float>(lambda_softmax),     static_cast<float>(lambda_lse), static_cast<float>(peak_weight)};
}

}  // namespace

void cross_attention_scores_tiles(Tensor products, Tensor gram, MaybeTensor key_offsets, MaybeTensor key_counts,
                                  MaybeTensor query_offsets, MaybeTensor query_counts, int64_t query_stride,
                                  Tensor query_norms, int64_t feature_norm, int64_t focal, int64_t aggregation,
                                  double lambda_softmax, double lambda_lse, double peak_weight, int64_t tiles,
                                  int64_t row_capacity, int64_t splits, bool accumulate, Tensor scores) {
  const DeviceGuard guard(products.get_device_index());
  const auto options = options_of(feature_norm, focal, aggregation, lambda_softmax, lambda_lse, peak_weight);
  const Dealt dealt{tiles, row_capacity, splits};
  for_type_of(kOp, products, [&](auto example) {
    using T = decltype(example);
    auto call = make_call<T>(products, gram, key_offsets, key_counts, query_offsets, query_counts, query_stride,
                             query_norms, options, dealt, scores);
    call.scores = static_cast<float*>(scores.data_ptr());
    call.accumulate = accumulate;
    launch_scores<T, false>(call, dealt, nullptr, products.size(1), current_stream(products.get_device_index()));
  });
}

void cross_attention_scores_tiles_backward(Tensor products, Tensor gram, MaybeTensor key_offsets,
                                           MaybeTensor key_counts, MaybeTensor query_offsets, MaybeTensor query_counts,
                                           int64_t query_stride, Tensor query_norms, int64_t feature_norm,
                                           int64_t focal, int64_t aggregation, double lambda_softmax, double lambda_lse,
                                           double peak_weight, int64_t tiles, int64_t row_capacity, int64_t splits,
                                           Tensor grad_scores, MaybeTensor addend, MaybeTensor scratch,
                                           Tensor grad_products, Tensor grad_gram, Tensor grad_norms) {
  const DeviceGuard guard(products.get_device_index());
  const auto options = options_of(feature_norm, focal, aggregation, lambda_softmax, lambda_lse, peak_weight);
  const Dealt dealt{tiles, row_capacity, splits};
  const int64_t groups = grad_scores.size(0), in_block = tiles == 0 ? 1 : groups_of_block(static_cast<int>(tiles));
  const auto fits = [&](const Tensor& tensor) {
    return tensor.dim() == 2 && tensor.size(0) == products.size(0) && tensor.size(1) == products.size(1) &&
           tensor.scalar_type() == products.scalar_type();
  };
  STD_TORCH_CHECK(fits(grad_products) && (!addend.has_value() || fits(*addend)),
                  "cross_attention_scores: grad_products and addend must be like products");
  STD_TORCH_CHECK(tiles > 0 || scratch.has_value(), "cross_attention_scores: wide groups need scratch");
  const int64_t parts = (groups + in_block - 1) / in_block;
  for_type_of(kOp, products, [&](auto example) {
    using T = decltype(example);
    auto call = make_call<T>(products, gram, key_offsets, key_counts, query_offsets, query_counts, query_stride,
                             query_norms, options, dealt, grad_scores);
    call.scores_in = grad_scores.const_data_ptr<float>();
    call.grad_products = matrix_of<T>(grad_products);
    if (addend.has_value()) call.addend = matrix_of<const T>(*addend);
    call.grad_gram = floats(kOp, grad_gram, splits * gram.numel(), "grad_gram");
    call.grad_norms = floats(kOp, grad_norms, parts * products.size(0), "grad_norms");
    float* memory = floats(kOp, scratch, 2 * products.numel(), "scratch");
    launch_scores<T, true>(call, dealt, memory, products.size(1), current_stream(products.get_device_index()));
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("cross_attention_scores_tiles", TORCH_BOX(&itm::cross_attention_scores_tiles));
  m.impl("cross_attention_scores_tiles_backward", TORCH_BOX(&itm::cross_attention_scores_tiles_backward));
}
