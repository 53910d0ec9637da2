// max_similarity_scores on CUDA: what happens between the library products of a block.
// The block loop is itm_kernels/native/cuda/max_similarity_scores.py, the mathematics in the headers beside this.

#include "arguments.h"
#include "launch.h"
#include "max_similarity_scores_kernel.cuh"
#include "registration.h"

namespace itm {
namespace {

constexpr const char* kOp = "max_similarity_scores";

struct Dealt {
  int64_t row_capacity, splits;
};

template <class T>
Matrix<T> matrix_of(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1), false};
}

template <class T>
MaximaCall<T> make_call(const Tensor& products, const Groups& keys, const Groups& queries, int64_t aggregation,
                        double lambda, const Dealt& dealt, const Tensor& scores, const MaybeTensor& arg_max) {
  STD_TORCH_CHECK(products.dim() == 2 && scores.dim() == 2 && scores.scalar_type() == ScalarType::Float,
                  "max_similarity_scores: products must be [queries, keys], scores float32 [groups, segments]");
  STD_TORCH_CHECK(keys.offsets || products.size(1) == scores.size(0) * keys.stride,
                  "max_similarity_scores: products have ", products.size(1), " columns, not groups x keys");
  STD_TORCH_CHECK(queries.offsets || products.size(0) == scores.size(1) * queries.stride,
                  "max_similarity_scores: products have ", products.size(0), " rows, not segments x queries");
  MaximaCall<T> call{};
  call.products = matrix_of<const T>(products);
  call.keys = keys;
  call.queries = queries;
  call.groups = scores.size(0);
  call.segments = scores.size(1);
  call.rows = products.size(0);
  call.aggregation = static_cast<Aggregation>(aggregation);
  call.lambda = static_cast<float>(lambda);
  call.group_stride = scores.stride(0);
  call.segment_stride = scores.stride(1);
  call.span = std::max<int64_t>((call.rows + dealt.splits - 1) / dealt.splits, 1);
  call.row_capacity = static_cast<int>(dealt.row_capacity);
  if (arg_max.has_value()) {
    STD_TORCH_CHECK(arg_max->dim() == 2 && arg_max->size(0) == call.groups && arg_max->size(1) == call.rows &&
                        (call.rows == 1 || arg_max->stride(1) == 1),
                    "max_similarity_scores: arg_max must be [groups, queries]");
    call.arg_max = static_cast<uint8_t*>(arg_max->data_ptr());
    call.arg_stride = arg_max->stride(0);
  }
  return call;
}

template <class T, bool kBackward>
void launch_maxima(const MaximaCall<T>& call, const Dealt& dealt, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((call.groups + kMaximaGroups - 1) / kMaximaGroups),
                  static_cast<unsigned>(dealt.splits));
  launch(maxima_of_tiles<T, kBackward>, grid, kMaximaThreads,
         static_cast<size_t>(maxima_shared_bytes(dealt.row_capacity)), stream, call);
}

}  // namespace

void max_similarity_scores_tiles(Tensor products, MaybeTensor key_offsets, MaybeTensor key_counts, int64_t key_stride,
                                 MaybeTensor query_offsets, MaybeTensor query_counts, int64_t query_stride,
                                 int64_t aggregation, double lambda_lse, int64_t row_capacity, int64_t splits,
                                 MaybeTensor arg_max, Tensor scores) {
  const DeviceGuard guard(products.get_device_index());
  const Dealt dealt{row_capacity, splits};
  const Groups keys = groups_of(kOp, key_offsets, key_counts, scores.size(0), key_stride);
  const Groups queries = groups_of(kOp, query_offsets, query_counts, scores.size(1), query_stride);
  STD_TORCH_CHECK(!arg_max.has_value() || arg_max->scalar_type() == ScalarType::Byte,
                  "max_similarity_scores: arg_max must be uint8");
  for_type_of(kOp, products, [&](auto example) {
    using T = decltype(example);
    auto call = make_call<T>(products, keys, queries, aggregation, lambda_lse, dealt, scores, arg_max);
    call.scores = static_cast<float*>(scores.data_ptr());
    launch_maxima<T, false>(call, dealt, current_stream(products.get_device_index()));
  });
}

// Products are overwritten by their gradient; with a kept arg-max and a linear aggregation they are not read.
void max_similarity_scores_tiles_backward(Tensor products, MaybeTensor key_offsets, MaybeTensor key_counts,
                                          int64_t key_stride, MaybeTensor query_offsets, MaybeTensor query_counts,
                                          int64_t query_stride, int64_t aggregation, double lambda_lse,
                                          int64_t row_capacity, int64_t splits, MaybeTensor arg_max,
                                          Tensor grad_scores) {
  const DeviceGuard guard(products.get_device_index());
  const Dealt dealt{row_capacity, splits};
  const Groups keys = groups_of(kOp, key_offsets, key_counts, grad_scores.size(0), key_stride);
  const Groups queries = groups_of(kOp, query_offsets, query_counts, grad_scores.size(1), query_stride);
  STD_TORCH_CHECK(!arg_max.has_value() || arg_max->scalar_type() == ScalarType::Byte,
                  "max_similarity_scores: arg_max must be uint8");
  for_type_of(kOp, products, [&](auto example) {
    using T = decltype(example);
    auto call = make_call<T>(products, keys, queries, aggregation, lambda_lse, dealt, grad_scores, arg_max);
    call.scores_in = static_cast<const float*>(grad_scores.const_data_ptr());
    call.arg_is_known = arg_max.has_value();
    call.needs_maxima = call.aggregation != Aggregation::kSum && call.aggregation != Aggregation::kMean;
    call.grad_products = matrix_of<T>(products);
    launch_maxima<T, true>(call, dealt, current_stream(products.get_device_index()));
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("max_similarity_scores_tiles", TORCH_BOX(&itm::max_similarity_scores_tiles));
  m.impl("max_similarity_scores_tiles_backward", TORCH_BOX(&itm::max_similarity_scores_tiles_backward));
}
