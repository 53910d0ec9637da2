// Softmax over the keys, BFAN's focal step, and their backward. Columns of a tile: a lane is a query.
//
//   a_k = exp(z_k - max z) / sum       dz_k = a_k (da_k - sum_j a_j da_j)
//
// The focal step keeps the keys above a threshold and renormalises, which is the softmax over the kept keys: its
// backward is the same line with the renormalised weights. No include guard: compiled once per instruction set.

ITM_INLINE void softmax_over_keys(const Tile& tile) {
  for (int64_t l = 0; l < tile.width; l += kLanes) {
    float* column = tile.weights + l;
    Vec best = load(column);
    for (int64_t k = 1; k < tile.keys; ++k) best = larger(best, load(column + k * tile.width));
    Vec total{};
    for (int64_t k = 0; k < tile.keys; ++k) {
      const Vec e = exp_of_nonpositive(load(column + k * tile.width) - best);
      store(column + k * tile.width, e);
      total += e;
    }
    const Vec scale = 1.0f / total;
    for (int64_t k = 0; k < tile.keys; ++k) store(column + k * tile.width, load(column + k * tile.width) * scale);
  }
}

// BFAN. equal: keep a_k > mean(a). prob: keep a_k sum_j sqrt(a_j) > sum_j a_j sqrt(a_j). Strict; where nothing passes
// (all equal) everything is kept, where the published code divides zero by zero.
ITM_INLINE Vec vector_sqrt(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) lanes[i] = __builtin_sqrtf(lanes[i]);
  return load(lanes);
}

template <bool kProb>
ITM_INLINE void keep_focal(const Tile& tile) {
  for (int64_t l = 0; l < tile.width; l += kLanes) {
    float* column = tile.weights + l;
    Vec factor{}, threshold{};
    for (int64_t k = 0; k < tile.keys; ++k) {
      const Vec a = load(column + k * tile.width);
      const Vec share = kProb ? vector_sqrt(a) : splat(1.0f);
      factor += share;
      threshold += a * share;
    }
    Vec total{};
    for (int64_t k = 0; k < tile.keys; ++k) {
      const Vec a = load(column + k * tile.width);
      total += a * factor - threshold > 0.0f ? a : 0.0f;
    }
    // total is zero where no key passed; a kept weight is above the mean, hence never zero.
    const Vec scale = total > 0.0f ? 1.0f / total : splat(1.0f);
    for (int64_t k = 0; k < tile.keys; ++k) {
      const Vec a = load(column + k * tile.width);
      const Vec kept = a * factor - threshold > 0.0f ? a * scale : splat(0.0f);
      store(column + k * tile.width, total > 0.0f ? kept : a);
    }
  }
}

ITM_INLINE void attend(const Tile& tile, Focal focal) {
  softmax_over_keys(tile);
  if (focal == Focal::kEqual) keep_focal<false>(tile);
  if (focal == Focal::kProb) keep_focal<true>(tile);
}

// q . c and the largest weight of every query.
ITM_INLINE void dot_and_peak(const Tile& tile) {
  for (int64_t l = 0; l < tile.width; l += kLanes) {
    Vec dot{}, peak{};
    for (int64_t k = 0; k < tile.keys; ++k) {
      const Vec a = load(tile.weights + k * tile.width + l);
      dot += a * load(tile.raw + k * tile.width + l);
      peak = larger(peak, a);
    }
    store(tile.dot + l, dot);
    store(tile.peak + l, peak);
  }
}

// From the gradients of q . c, ||c||^2 and the peak to the gradient at the normalised features (lambda times that at
// the logits), written over `image`, which holds Gram times weights on the way in:
//   da_k = grad_dot s_k + 2 grad_quadratic (G a)_k + [k is the first arg-max] grad_peak
ITM_INLINE void attend_backward(const Tile& tile, float lambda, bool with_peak) {
  for (int64_t l = 0; l < tile.width; l += kLanes) {
    const Vec grad_dot = load(tile.grad_dot + l), twice = load(tile.grad_quadratic + l) * 2.0f;
    const Vec peak = load(tile.peak + l);
    Vec grad_peak = with_peak ? load(tile.grad_peak + l) : splat(0.0f);
    const Vec mean = grad_dot * load(tile.dot + l) + twice * load(tile.quadratic + l) + grad_peak * peak;
    for (int64_t k = 0; k < tile.keys; ++k) {
      const int64_t at = k * tile.width + l;
      const Vec a = load(tile.weights + at);
      Vec grad = grad_dot * load(tile.raw + at) + twice * load(tile.image + at) - mean;
      if (with_peak) {
        const Vec here = a == peak ? grad_peak : splat(0.0f);
        grad += here;
        grad_peak -= here;  // the first arg-max takes it all
      }
      store(tile.image + at, a * grad * lambda);
    }
  }
}
