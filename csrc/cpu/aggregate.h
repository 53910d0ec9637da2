// agg_func: one number per segment from one number per query, and back. 1/keys of all the work, so written plainly.
//
//   LogSumExp log(sum exp(lambda x)) / lambda (shifted by its maximum), Max (gradient to the first arg-max), Sum, Mean,
//   Softmax sum softmax(lambda x) x.
// No include guard: compiled once per instruction set.

// A NaN is the largest of all, as in torch: it must reach the score. (Nothing beats it: every comparison fails.)
ITM_INLINE bool beats(float x, float best) { return x > best || (x != x && best == best); }

ITM_INLINE float aggregate(const float* x, int64_t n, Aggregation aggregation, float lambda) {
  if (aggregation == Aggregation::kSum || aggregation == Aggregation::kMean) {
    float total = 0.0f;
    for (int64_t i = 0; i < n; ++i) total += x[i];
    return aggregation == Aggregation::kSum ? total : total / static_cast<float>(n);
  }
  float best = x[0];
  for (int64_t i = 1; i < n; ++i) best = beats(x[i], best) ? x[i] : best;
  if (aggregation == Aggregation::kMax) return best;
  Vec total{}, weighted{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec below = load(x + i) - best;
    const Vec e = first_lanes(exp_of_nonpositive(below * lambda), n - i, 0.0f);
    total += e;
    weighted += first_lanes(e * below, n - i, 0.0f);
  }
  if (aggregation == Aggregation::kSoftmax) return best + sum_of_lanes(weighted) / sum_of_lanes(total);
  return best + __builtin_logf(sum_of_lanes(total)) / lambda;
}

ITM_INLINE void aggregate_backward(const float* x, int64_t n, Aggregation aggregation, float lambda, float grad,
                                   float* grad_x) {
  if (aggregation == Aggregation::kSum || aggregation == Aggregation::kMean) {
    const float share = aggregation == Aggregation::kSum ? grad : grad / static_cast<float>(n);
    for (int64_t i = 0; i < n; ++i) grad_x[i] = share;
    return;
  }
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i) best = beats(x[i], x[best]) ? i : best;
  if (aggregation == Aggregation::kMax) {
    for (int64_t i = 0; i < n; ++i) grad_x[i] = i == best ? grad : 0.0f;
    return;
  }
  Vec total{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec e = exp_of_nonpositive((load(x + i) - x[best]) * lambda);
    total += first_lanes(e, n - i, 0.0f);
    store(grad_x + i, e);  // spills into the next segment, which comes later
  }
  const float scale = grad / sum_of_lanes(total);
  if (aggregation == Aggregation::kSoftmax) {
    const float score = aggregate(x, n, aggregation, lambda);
    for (int64_t i = 0; i < n; ++i) grad_x[i] *= scale * (1.0f + lambda * (x[i] - score));
    return;
  }
  for (int64_t i = 0; i < n; ++i) grad_x[i] *= scale;
}
