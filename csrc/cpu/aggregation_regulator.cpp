// The aggregation regulator on the CPU (RCAR's RAR): what happens between the library products of a chunk.
// The chain is itm_kernels/native/cpu/aggregation.py, the mathematics stands in the header beside this.

#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/capability.h"
#include "../common/options.h"
#include "../common/philox.h"
#include "parallel.h"
#include "row_arguments.h"

namespace itm {
namespace {

constexpr int64_t kPairGrain = 8;  // pairs of a piece: at least some microseconds of work

struct Dropout {
  uint32_t threshold;  // 0: none
  float scale;         // of what is kept
  uint64_t seed;
  int64_t step;
};

// Rows [groups, lanes, width]; lanes are segments of queries one after another; a pair is a group and a segment.
struct PoolCall {
  int64_t groups, segments, lanes, width;
  const int64_t* offsets;                          // [segments + 1]
  const int64_t *group_numbers, *segment_numbers;  // in the whole batch
  bool groups_are_images;
  Dropout dropout;
  const float* vectors;  // [groups * lanes, width]
  float* keys;           // like vectors: product, overwritten by tanh; backward: by its gradient
  const float* key_bias;
  float* asked;  // [pairs, width]: likewise
  const float* asked_bias;
  const float* value;        // [width]
  float* weights;            // [groups * lanes]; backward: overwritten by the gradient of the logits
  float* pooled;             // [pairs, width]
  float* norms;              // [pairs]
  const float* grad_pooled;  // [pairs, width]
  float* grad_vectors;       // like vectors, added to
  float* grad_key_bias;      // [pairs, width]
  float* grad_value;         // [pairs, width]
};

struct MeanCall {
  int64_t pairs, segments, lanes, width;
  const int64_t* offsets;  // [segments + 1]
  const float* vectors;    // [groups * lanes, width]
  float* means;            // [pairs, width]; backward: their gradient
  float* grad_vectors;     // added to
};

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "aggregation_regulator_kernel.h"
#include "isa.h"

namespace itm {
namespace {

PoolCall pool_call(const Tensor& vectors, const Tensor& offsets, const Tensor& group_numbers,
                   const Tensor& segment_numbers, bool groups_are_images, double dropout, int64_t seed, int64_t step,
                   const Tensor& value, const Tensor& keys, const Tensor& asked, const Tensor& weights,
                   const Tensor& pooled, const Tensor& norms) {
  PoolCall call{};
  call.width = width_of(vectors);
  call.groups = group_numbers.numel();
  call.segments = segment_numbers.numel();
  call.lanes = times(vectors.size(0), call.groups);
  call.offsets = segment_offsets(offsets, call.lanes);
  STD_TORCH_CHECK(offsets.numel() == call.segments + 1, "pool_rows: offsets must be one more than segments");
  call.group_numbers = indices(group_numbers, call.groups, "pool_rows: group_numbers");
  call.segment_numbers = indices(segment_numbers, call.segments, "pool_rows: segment_numbers");
  call.groups_are_images = groups_are_images;
  call.dropout = {dropout_threshold(dropout), static_cast<float>(1.0 / (1.0 - dropout)), static_cast<uint64_t>(seed),
                  step};
  const int64_t numel = vectors.numel(), pairs = call.groups * call.segments;
  call.vectors = elements<float>(vectors, numel, "pool_rows: vectors");
  call.keys = elements<float>(keys, numel, "pool_rows: keys");
  call.value = elements<float>(value, call.width, "pool_rows: value");
  call.asked = elements<float>(asked, pairs * call.width, "pool_rows: asked");
  call.weights = elements<float>(weights, vectors.size(0), "pool_rows: weights");
  call.pooled = elements<float>(pooled, pairs * call.width, "pool_rows: pooled");
  call.norms = elements<float>(norms, pairs, "pool_rows: norms");
  return call;
}

MeanCall mean_call(int64_t rows, int64_t width, const Tensor& offsets, const Tensor& means) {
  MeanCall call{};
  call.width = width;
  call.segments = offsets.numel() - 1;
  call.pairs = means.size(0);
  call.lanes = times(rows, times(call.pairs, call.segments));
  call.offsets = segment_offsets(offsets, call.lanes);
  call.means = elements<float>(means, call.pairs * width, "mean_of_segments: means");
  return call;
}

}  // namespace

void pool_rows(Tensor vectors, Tensor offsets, Tensor group_numbers, Tensor segment_numbers, bool groups_are_images,
               double dropout, int64_t seed, int64_t step, Tensor key_bias, Tensor asked_bias, Tensor value,
               Tensor keys, Tensor asked, Tensor weights, Tensor pooled, Tensor norms) {
  auto call = pool_call(vectors, offsets, group_numbers, segment_numbers, groups_are_images, dropout, seed, step, value,
                        keys, asked, weights, pooled, norms);
  call.key_bias = elements<float>(key_bias, call.width, "pool_rows: key_bias");
  call.asked_bias = elements<float>(asked_bias, call.width, "pool_rows: asked_bias");
  ITM_DISPATCH(run_pool, call);
}

void pool_rows_backward(Tensor vectors, Tensor offsets, Tensor group_numbers, Tensor segment_numbers,
                        bool groups_are_images, double dropout, int64_t seed, int64_t step, Tensor value, Tensor pooled,
                        Tensor norms, Tensor grad_pooled, Tensor weights, Tensor keys, Tensor asked,
                        Tensor grad_vectors, Tensor grad_key_bias, Tensor grad_value) {
  auto call = pool_call(vectors, offsets, group_numbers, segment_numbers, groups_are_images, dropout, seed, step, value,
                        keys, asked, weights, pooled, norms);
  const int64_t pooled_numel = call.groups * call.segments * call.width;
  call.grad_pooled = elements<float>(grad_pooled, pooled_numel, "pool_rows: grad_pooled");
  call.grad_vectors = elements<float>(grad_vectors, vectors.numel(), "pool_rows: grad_vectors");
  call.grad_key_bias = elements<float>(grad_key_bias, pooled_numel, "pool_rows: grad_key_bias");
  call.grad_value = elements<float>(grad_value, pooled_numel, "pool_rows: grad_value");
  ITM_DISPATCH(run_pool_backward, call);
}

void mean_of_segments(Tensor vectors, Tensor offsets, Tensor means) {
  auto call = mean_call(vectors.size(0), width_of(vectors), offsets, means);
  call.vectors = elements<float>(vectors, vectors.numel(), "mean_of_segments: vectors");
  ITM_DISPATCH(run_mean, call);
}

void mean_of_segments_backward(Tensor grad_means, Tensor offsets, Tensor grad_vectors) {
  auto call = mean_call(grad_vectors.size(0), width_of(grad_vectors), offsets, grad_means);
  call.grad_vectors = elements<float>(grad_vectors, grad_vectors.numel(), "mean_of_segments: grad_vectors");
  ITM_DISPATCH(run_mean_backward, call);
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("pool_rows", TORCH_BOX(&itm::pool_rows));
  m.impl("pool_rows_backward", TORCH_BOX(&itm::pool_rows_backward));
  m.impl("mean_of_segments", TORCH_BOX(&itm::mean_of_segments));
  m.impl("mean_of_segments_backward", TORCH_BOX(&itm::mean_of_segments_backward));
}
