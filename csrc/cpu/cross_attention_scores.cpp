// cross_attention_scores on the CPU: what happens between the two library products of a block.
// The block loop is itm_kernels/native/cpu/cross_attention_scores.py, the mathematics stands in the headers beside this.

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
#include "../common/tile_choice.h"
#include "parallel.h"

namespace itm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The keys of one group and all queries of the block.
template <class Scalar>
struct KeyGroup {
  const Scalar* products;  // [keys, lanes]
  int64_t keys;
  int64_t stride;     // between rows of products
  const float* gram;  // [keys, gram_stride]
  int64_t gram_stride;
  const int64_t* offsets;  // [segments + 1]
  int64_t segments;
  const float* query_norms;  // [lanes]
};

template <class Scalar>
struct ScoresCall {
  ScoreOptions options;
  TileBounds bounds;
  int64_t groups, segments, lanes, most_keys, longest;
  const Scalar* products;        // [keys of all groups, lanes]
  const float* gram;             // [groups, most_keys, most_keys]
  const int64_t* key_offsets;    // [groups + 1]
  const int64_t* query_offsets;  // [segments + 1]
  const float* query_norms;      // [lanes]
  float* scores;                 // backward: their gradient, read only
  int64_t group_stride, segment_stride;
  bool accumulate;
  Scalar* grad_products;  // backward: the same memory as products
  float* grad_gram;
  float* grad_norms;  // [groups, lanes]

  KeyGroup<Scalar> group(int64_t g) const {
    const int64_t begin = key_offsets[g];
    return {products + begin * lanes,
            key_offsets[g + 1] - begin,
            lanes,
            gram + g * most_keys * most_keys,
            most_keys,
            query_offsets,
            segments,
            query_norms};
  }
};

template <class Scalar, class Run>
void run_groups(const ScoresCall<Scalar>& call, int64_t scratch_floats, const Run& run) {
  for_each_piece(call.groups, [&] {
    // 64-byte alignment: a row of a tile then starts on a cache line.
    auto memory = std::vector<float>(static_cast<size_t>(scratch_floats) + 16);
    return [&run, memory = std::move(memory)](int64_t g) mutable {
      const auto address = reinterpret_cast<uintptr_t>(memory.data());
      run(g, reinterpret_cast<float*>((address + 63) / 64 * 64));
    };
  });
}

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "cross_attention_scores_kernel.h"
#include "isa.h"

namespace itm {
namespace {

int64_t longest_segment(const int64_t* offsets, int64_t segments) {
  int64_t longest = 0;
  for (int64_t s = 0; s < segments; ++s) longest = std::max(longest, offsets[s + 1] - offsets[s]);
  return longest;
}

// Offsets come from our own Python; this protects memory, it does not explain.
void check_offsets(const Tensor& offsets, int64_t end, const char* what) {
  STD_TORCH_CHECK(offsets.is_contiguous() && offsets.scalar_type() == ScalarType::Long && offsets.numel() >= 1,
                  "cross_attention_scores: ", what, " offsets must be contiguous int64");
  const int64_t* values = offsets.const_data_ptr<int64_t>();
  for (int64_t i = 1; i < offsets.numel(); ++i) {
    STD_TORCH_CHECK(values[i] > values[i - 1], "cross_attention_scores: ", what, " offsets must increase");
  }
  STD_TORCH_CHECK(values[0] == 0 && values[offsets.numel() - 1] == end, "cross_attention_scores: ", what,
                  " offsets must run from 0 to ", end);
}

void check_float(const Tensor& tensor, int64_t numel, const char* what) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float && tensor.numel() == numel,
                  "cross_attention_scores: ", what, " must be contiguous float32 with ", numel, " elements");
}

template <class Scalar>
ScoresCall<Scalar> make_call(const Tensor& products, const Tensor& gram, const Tensor& key_offsets,
                             const Tensor& query_offsets, const Tensor& query_norms, const Tensor& scores,
                             const ScoreOptions& options) {
  ScoresCall<Scalar> call{};
  call.options = options;
  call.groups = key_offsets.numel() - 1;
  call.segments = query_offsets.numel() - 1;
  call.lanes = products.size(1);
  call.most_keys = gram.size(1);
  call.products = static_cast<const Scalar*>(products.const_data_ptr());
  call.gram = gram.const_data_ptr<float>();
  call.key_offsets = key_offsets.const_data_ptr<int64_t>();
  call.query_offsets = query_offsets.const_data_ptr<int64_t>();
  call.query_norms = query_norms.const_data_ptr<float>();
  call.scores = static_cast<float*>(scores.data_ptr());
  call.group_stride = scores.stride(0);
  call.segment_stride = scores.stride(1);
  call.longest = longest_segment(call.query_offsets, call.segments);
  call.bounds = tile_bounds(call.most_keys);
  return call;
}

void check(const Tensor& products, const Tensor& gram, const Tensor& key_offsets, const Tensor& query_offsets,
           const Tensor& query_norms, const Tensor& scores) {
  STD_TORCH_CHECK(products.dim() == 2 && products.is_contiguous(), "cross_attention_scores: products must be [K, L]");
  STD_TORCH_CHECK(products.scalar_type() == ScalarType::Float || products.scalar_type() == ScalarType::BFloat16,
                  "cross_attention_scores: products must be float32 or bfloat16");
  const int64_t groups = key_offsets.numel() - 1;
  check_offsets(key_offsets, products.size(0), "key");
  check_offsets(query_offsets, products.size(1), "query");
  STD_TORCH_CHECK(gram.dim() == 3 && gram.size(1) == gram.size(2), "cross_attention_scores: gram must be [G, K, K]");
  STD_TORCH_CHECK(longest_segment(key_offsets.const_data_ptr<int64_t>(), groups) <= gram.size(1),
                  "cross_attention_scores: a key group is larger than its Gram matrix");
  check_float(gram, groups * gram.size(1) * gram.size(1), "gram");
  check_float(query_norms, products.size(1), "query_norms");
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && scores.dim() == 2 && scores.size(0) == groups &&
                      scores.size(1) == query_offsets.numel() - 1,
                  "cross_attention_scores: scores must be float32 [groups, segments]");
}

ScoreOptions options_of(int64_t feature_norm, int64_t focal, int64_t aggregation, double lambda_softmax,
                        double lambda_lse, double peak_weight) {
  return {static_cast<FeatureNorm>(feature_norm), static_cast<Focal>(focal),      static_cast<Aggregation>(aggregation),
          static_cast<float>(lambda_softmax),     static_cast<float>(lambda_lse), static_cast<float>(peak_weight)};
}

template <class Scalar>
void forward(const Tensor& products, const Tensor& gram, const Tensor& key_offsets, const Tensor& query_offsets,
             const Tensor& query_norms, const ScoreOptions& options, bool accumulate, const Tensor& scores) {
  auto call = make_call<Scalar>(products, gram, key_offsets, query_offsets, query_norms, scores, options);
  call.accumulate = accumulate;
  ITM_DISPATCH(run_forward, call);
}

template <class Scalar>
void backward(const Tensor& products, const Tensor& gram, const Tensor& key_offsets, const Tensor& query_offsets,
              const Tensor& query_norms, const ScoreOptions& options, const Tensor& grad_scores,
              const Tensor& grad_gram, const Tensor& grad_norms) {
  auto call = make_call<Scalar>(products, gram, key_offsets, query_offsets, query_norms, grad_scores, options);
  call.grad_products = static_cast<Scalar*>(products.data_ptr());
  call.grad_gram = static_cast<float*>(grad_gram.data_ptr());
  call.grad_norms = static_cast<float*>(grad_norms.data_ptr());
  ITM_DISPATCH(run_backward, call);
}

}  // namespace

void cross_attention_scores_epilogue(Tensor products, Tensor gram, Tensor key_offsets, Tensor query_offsets,
                                     Tensor query_norms, int64_t feature_norm, int64_t focal, int64_t aggregation,
                                     double lambda_softmax, double lambda_lse, double peak_weight, bool accumulate,
                                     Tensor scores) {
  check(products, gram, key_offsets, query_offsets, query_norms, scores);
  const auto options = options_of(feature_norm, focal, aggregation, lambda_softmax, lambda_lse, peak_weight);
  const auto run = products.scalar_type() == ScalarType::Float ? forward<float> : forward<uint16_t>;
  run(products, gram, key_offsets, query_offsets, query_norms, options, accumulate, scores);
}

void cross_attention_scores_epilogue_backward(Tensor products, Tensor gram, Tensor key_offsets, Tensor query_offsets,
                                              Tensor query_norms, int64_t feature_norm, int64_t focal,
                                              int64_t aggregation, double lambda_softmax, double lambda_lse,
                                              double peak_weight, Tensor grad_scores, Tensor grad_gram,
                                              Tensor grad_norms) {
  check(products, gram, key_offsets, query_offsets, query_norms, grad_scores);
  check_float(grad_gram, gram.numel(), "grad_gram");
  check_float(grad_norms, grad_scores.size(0) * products.size(1), "grad_norms");
  const auto options = options_of(feature_norm, focal, aggregation, lambda_softmax, lambda_lse, peak_weight);
  const auto run = products.scalar_type() == ScalarType::Float ? backward<float> : backward<uint16_t>;
  run(products, gram, key_offsets, query_offsets, query_norms, options, grad_scores, grad_gram, grad_norms);
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("cross_attention_scores_epilogue", TORCH_BOX(&itm::cross_attention_scores_epilogue));
  m.impl("cross_attention_scores_epilogue_backward", TORCH_BOX(&itm::cross_attention_scores_epilogue_backward));
}
