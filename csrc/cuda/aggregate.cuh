// agg_func: one number per segment from one number per query, and back. One thread a segment: 1 / keys of all the work.
//
//   LogSumExp log(sum exp(lambda x)) / lambda (shifted by its maximum), Max (gradient to the first arg-max), Sum, Mean,
//   Softmax sum softmax(lambda x) x.
//
// x and grad_x stand in shared memory, one number a query of the segment.
#pragma once

#include "../common/options.h"
#include "words.h"

namespace itm {

// A NaN is the largest of all, as in torch: it must reach the score. (Nothing beats it: every comparison fails.)
__device__ __forceinline__ bool beats(float x, float best) { return x > best || (x != x && best == best); }

__device__ __forceinline__ float aggregate(const float* x, int n, Aggregation aggregation, float lambda) {
  if (aggregation == Aggregation::kSum || aggregation == Aggregation::kMean) {
    float total = 0.0f;
    for (int i = 0; i < n; ++i) total += x[i];
    return aggregation == Aggregation::kSum ? total : total / static_cast<float>(n);
  }
  float best = x[0];
  for (int i = 1; i < n; ++i) best = beats(x[i], best) ? x[i] : best;
  if (aggregation == Aggregation::kMax) return best;
  float total = 0.0f, weighted = 0.0f;
  for (int i = 0; i < n; ++i) {
    const float e = expf((x[i] - best) * lambda);
    total += e;
    weighted += e * (x[i] - best);
  }
  return best + (aggregation == Aggregation::kSoftmax ? weighted / total : logf(total) / lambda);
}

__device__ __forceinline__ void aggregate_backward(const float* x, int n, Aggregation aggregation, float lambda,
                                                   float grad, float* grad_x) {
  if (aggregation == Aggregation::kSum || aggregation == Aggregation::kMean) {
    const float share = aggregation == Aggregation::kSum ? grad : grad / static_cast<float>(n);
    for (int i = 0; i < n; ++i) grad_x[i] = share;
    return;
  }
  int best = 0;
  for (int i = 1; i < n; ++i) best = beats(x[i], x[best]) ? i : best;
  if (aggregation == Aggregation::kMax) {
    for (int i = 0; i < n; ++i) grad_x[i] = i == best ? grad : 0.0f;
    return;
  }
  const float top = x[best];
  float total = 0.0f;
  for (int i = 0; i < n; ++i) total += expf((x[i] - top) * lambda);
  const float scale = grad / total;
  const float score = aggregation == Aggregation::kSoftmax ? aggregate(x, n, aggregation, lambda) : 0.0f;
  for (int i = 0; i < n; ++i) {
    const float share = expf((x[i] - top) * lambda) * scale;
    grad_x[i] = aggregation == Aggregation::kSoftmax ? share * (1.0f + lambda * (x[i] - score)) : share;
  }
}

}  // namespace itm
