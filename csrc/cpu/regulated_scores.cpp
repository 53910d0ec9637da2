// regulated_scores on the CPU: the cosine in which a scorer without aggregation ends. The stages before it stand in
// alignment_vectors.cpp, correspondence_regulator.cpp and aggregation_regulator.cpp, the loop over chunks in
// itm_kernels/native/cpu/regulated_scores.py.

#include <cmath>
#include <cstdint>

#include <torch/csrc/stable/library.h>

#include "../common/capability.h"
#include "../common/options.h"
#include "row_arguments.h"

namespace itm {
namespace {

// Matrices [groups, keys, lanes]; lanes are segments of queries one after another.
struct CosineCall {
  int64_t groups, keys, lanes, segments;
  const int64_t* offsets;    // [segments + 1]
  const float* plain;        // products of keys and queries
  const float* weights;      // zero where a group has no more keys
  float* images;             // Gram matrix times weights; backward: overwritten by the gradient of the weights
  const float* query_norms;  // [lanes]
  float* scores;             // [groups, segments]; backward: their gradient, read only
  float* cosines;            // [groups, lanes]; backward: gradient of the norms of the queries
  float* grad_plain;
  float* scaled;  // weights times the gradient at |c|^2
};

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "regulated_scores_kernel.h"
#include "isa.h"

namespace itm {
namespace {

CosineCall cosine_call(const Tensor& plain, const Tensor& weights, const Tensor& images, const Tensor& query_norms,
                       const Tensor& offsets, const Tensor& scores, const Tensor& cosines) {
  STD_TORCH_CHECK(plain.dim() == 3, "mean_cosines: plain must be [G, K, L]");
  CosineCall call{};
  call.groups = plain.size(0);
  call.keys = plain.size(1);
  call.lanes = plain.size(2);
  call.offsets = segment_offsets(offsets, call.lanes);
  call.segments = offsets.numel() - 1;
  call.plain = elements<float>(plain, plain.numel(), "mean_cosines: plain");
  call.weights = elements<float>(weights, plain.numel(), "mean_cosines: weights");
  call.images = elements<float>(images, plain.numel(), "mean_cosines: images");
  call.query_norms = elements<float>(query_norms, call.lanes, "mean_cosines: query_norms");
  call.scores = elements<float>(scores, call.groups * call.segments, "mean_cosines: scores");
  call.cosines = elements<float>(cosines, call.groups * call.lanes, "mean_cosines: cosines");
  return call;
}

}  // namespace

void mean_cosines(Tensor plain, Tensor weights, Tensor images, Tensor query_norms, Tensor offsets, Tensor cosines,
                  Tensor scores) {
  const auto call = cosine_call(plain, weights, images, query_norms, offsets, scores, cosines);
  ITM_DISPATCH(run_cosines, call);
}

void mean_cosines_backward(Tensor plain, Tensor weights, Tensor query_norms, Tensor offsets, Tensor grad_scores,
                           Tensor images, Tensor grad_query_norms, Tensor grad_plain, Tensor scaled) {
  auto call = cosine_call(plain, weights, images, query_norms, offsets, grad_scores, grad_query_norms);
  call.grad_plain = elements<float>(grad_plain, plain.numel(), "mean_cosines: grad_plain");
  call.scaled = elements<float>(scaled, plain.numel(), "mean_cosines: scaled");
  ITM_DISPATCH(run_cosines_backward, call);
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("mean_cosines", TORCH_BOX(&itm::mean_cosines));
  m.impl("mean_cosines_backward", TORCH_BOX(&itm::mean_cosines_backward));
}
