// max_similarity_scores on the CPU: maxima and their aggregation after the library product of a block, and gradients.
// The block loop is itm_kernels/native/cpu/max_similarity_scores.py, the mathematics stands in the headers beside this.

#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../common/capability.h"
#include "../common/options.h"
#include "parallel.h"

namespace itm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSlice = 128;     // floats of a row in one pass: 36 keys are 18 KB of a 32 KB first-level cache
constexpr int64_t kQueries = 128;   // queries of a piece: their slice is 64 KB, and each gathered key serves several
constexpr int64_t kMostLanes = 64;  // slack behind a row of floats: a strip of four of the widest vectors

// A block: key groups against segments of queries. Index is what the arg-max is stored in.
template <class Scalar, class Index>
struct MaximaCall {
  Aggregation aggregation;
  float lambda;
  int64_t groups, segments, lanes, width;
  const int64_t* key_offsets;    // [groups + 1]
  const int64_t* query_offsets;  // [segments + 1]
  const Scalar* products;        // [keys of all groups, lanes] (forward)
  const Scalar* keys;            // [keys of all groups, width] (backward)
  const Scalar* queries;         // [lanes, width] (backward)
  float* scores;                 // backward: their gradient, read only
  int64_t group_stride, segment_stride;
  Index* arg_max;  // [groups, lanes], arg_stride apart; backward: read only
  int64_t arg_stride;
  bool accumulate;
  float* grad_maxima;   // [groups, lanes]
  float* grad_keys;     // like keys
  float* grad_queries;  // like queries
};

// Runs run(group, maxima, grad) with two rows of floats per thread.
template <class Call, class Run>
void run_groups(const Call& call, const Run& run) {
  const int64_t stride = call.lanes + kMostLanes;
  for_each_piece(call.groups, [&] {
    auto memory = std::vector<float>(static_cast<size_t>(2 * stride));
    return [&run, stride, memory = std::move(memory)](int64_t g) mutable {
      run(g, memory.data(), memory.data() + stride);
    };
  });
}

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "max_similarity_scores_kernel.h"
#include "isa.h"

namespace itm {
namespace {

// Offsets come from our own Python; these checks protect memory, they do not explain.
void check_offsets(const Tensor& offsets, int64_t end, const char* what) {
  STD_TORCH_CHECK(offsets.is_contiguous() && offsets.scalar_type() == ScalarType::Long && offsets.numel() >= 1,
                  "max_similarity_scores: ", what, " offsets must be contiguous int64");
  const int64_t* values = offsets.const_data_ptr<int64_t>();
  for (int64_t i = 1; i < offsets.numel(); ++i) {
    STD_TORCH_CHECK(values[i] > values[i - 1], "max_similarity_scores: ", what, " offsets must increase");
  }
  STD_TORCH_CHECK(values[0] == 0 && values[offsets.numel() - 1] == end, "max_similarity_scores: ", what,
                  " offsets must run from 0 to ", end);
}

bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
}

void check_rows(const Tensor& tensor, const char* what) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous() &&
                      (tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::BFloat16),
                  "max_similarity_scores: ", what, " must be a contiguous matrix, float32 or bfloat16");
}

void check_floats(const Tensor& tensor, int64_t rows, int64_t columns, const char* what) {
  STD_TORCH_CHECK(
      tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float && is_matrix(tensor, rows, columns),
      "max_similarity_scores: ", what, " must be contiguous float32 [", rows, ", ", columns, "]");
}

void check_scores(const Tensor& scores, int64_t groups, int64_t segments) {
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && is_matrix(scores, groups, segments),
                  "max_similarity_scores: scores must be float32 [groups, segments]");
}

void check_arg_max(const Tensor& arg_max, int64_t groups, int64_t lanes) {
  STD_TORCH_CHECK((arg_max.scalar_type() == ScalarType::Byte || arg_max.scalar_type() == ScalarType::Int) &&
                      is_matrix(arg_max, groups, lanes) && arg_max.stride(1) == 1,
                  "max_similarity_scores: arg_max must be uint8 or int32 [groups, queries] with queries side by side");
}

// Calls RUN with a call for the type of the rows and of the arg-max.
template <class Run>
void dispatch(const Tensor& rows, const Tensor& arg_max, const Run& run) {
  const bool wide = rows.scalar_type() == ScalarType::Float, byte = arg_max.scalar_type() == ScalarType::Byte;
  if (wide && byte) return run(MaximaCall<float, uint8_t>{});
  if (wide) return run(MaximaCall<float, int32_t>{});
  if (byte) return run(MaximaCall<uint16_t, uint8_t>{});
  return run(MaximaCall<uint16_t, int32_t>{});
}

template <class Scalar, class Index>
void take_groups(MaximaCall<Scalar, Index>& call, const Tensor& key_offsets, const Tensor& arg_max) {
  call.groups = key_offsets.numel() - 1;
  call.key_offsets = key_offsets.const_data_ptr<int64_t>();
  call.arg_max = arg_max.numel() ? static_cast<Index*>(arg_max.data_ptr()) : nullptr;
  call.arg_stride = arg_max.stride(0);
}

template <class Scalar, class Index>
void take_segments(MaximaCall<Scalar, Index>& call, const Tensor& query_offsets, const Tensor& scores,
                   int64_t aggregation, double lambda) {
  call.segments = query_offsets.numel() - 1;
  call.query_offsets = query_offsets.const_data_ptr<int64_t>();
  call.scores = static_cast<float*>(scores.data_ptr());
  call.group_stride = scores.stride(0);
  call.segment_stride = scores.stride(1);
  call.aggregation = static_cast<Aggregation>(aggregation);
  call.lambda = static_cast<float>(lambda);
}

}  // namespace

void max_similarity_scores_epilogue(Tensor products, Tensor key_offsets, Tensor query_offsets, int64_t aggregation,
                                    double lambda_lse, Tensor scores, Tensor arg_max) {
  check_rows(products, "products");
  check_offsets(key_offsets, products.size(0), "key");
  check_offsets(query_offsets, products.size(1), "query");
  const int64_t groups = key_offsets.numel() - 1;
  check_scores(scores, groups, query_offsets.numel() - 1);
  check_arg_max(arg_max, arg_max.numel() ? groups : 0, products.size(1));
  dispatch(products, arg_max, [&](auto call) {
    using Call = decltype(call);
    call.products = static_cast<decltype(Call::products)>(products.const_data_ptr());
    call.lanes = products.size(1);
    take_groups(call, key_offsets, arg_max);
    take_segments(call, query_offsets, scores, aggregation, lambda_lse);
    ITM_DISPATCH(run_forward, call);
  });
}

void max_similarity_scores_keys_backward(Tensor keys, Tensor queries, Tensor key_offsets, Tensor query_offsets,
                                         Tensor arg_max, int64_t aggregation, double lambda_lse, Tensor grad_scores,
                                         bool accumulate, Tensor grad_maxima, Tensor grad_keys) {
  check_rows(keys, "keys");
  check_rows(queries, "queries");
  STD_TORCH_CHECK(keys.size(1) == queries.size(1) && keys.scalar_type() == queries.scalar_type(),
                  "max_similarity_scores: keys and queries must have one width and dtype");
  const int64_t groups = key_offsets.numel() - 1, lanes = queries.size(0);
  check_offsets(key_offsets, keys.size(0), "key");
  check_offsets(query_offsets, lanes, "query");
  check_scores(grad_scores, groups, query_offsets.numel() - 1);
  check_arg_max(arg_max, groups, lanes);
  check_floats(grad_maxima, groups, lanes, "grad_maxima");
  check_floats(grad_keys, keys.size(0), keys.size(1), "grad_keys");
  dispatch(keys, arg_max, [&](auto call) {
    using Call = decltype(call);
    call.keys = static_cast<decltype(Call::keys)>(keys.const_data_ptr());
    call.queries = static_cast<decltype(Call::queries)>(queries.const_data_ptr());
    call.lanes = lanes;
    call.width = keys.size(1);
    call.accumulate = accumulate;
    call.grad_maxima = static_cast<float*>(grad_maxima.data_ptr());
    call.grad_keys = static_cast<float*>(grad_keys.data_ptr());
    take_groups(call, key_offsets, arg_max);
    take_segments(call, query_offsets, grad_scores, aggregation, lambda_lse);
    ITM_DISPATCH(run_keys_backward, call);
  });
}

void max_similarity_scores_queries_backward(Tensor keys, Tensor key_offsets, Tensor arg_max, Tensor grad_maxima,
                                            bool accumulate, Tensor grad_queries) {
  check_rows(keys, "keys");
  const int64_t groups = key_offsets.numel() - 1, lanes = grad_maxima.size(1);
  check_offsets(key_offsets, keys.size(0), "key");
  check_arg_max(arg_max, groups, lanes);
  check_floats(grad_maxima, groups, lanes, "grad_maxima");
  check_floats(grad_queries, lanes, keys.size(1), "grad_queries");
  dispatch(keys, arg_max, [&](auto call) {
    using Call = decltype(call);
    call.keys = static_cast<decltype(Call::keys)>(keys.const_data_ptr());
    call.lanes = lanes;
    call.width = keys.size(1);
    call.accumulate = accumulate;
    call.grad_maxima = static_cast<float*>(grad_maxima.data_ptr());
    call.grad_queries = static_cast<float*>(grad_queries.data_ptr());
    take_groups(call, key_offsets, arg_max);
    ITM_DISPATCH(run_queries_backward, call);
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("max_similarity_scores_epilogue", TORCH_BOX(&itm::max_similarity_scores_epilogue));
  m.impl("max_similarity_scores_keys_backward", TORCH_BOX(&itm::max_similarity_scores_keys_backward));
  m.impl("max_similarity_scores_queries_backward", TORCH_BOX(&itm::max_similarity_scores_queries_backward));
}
