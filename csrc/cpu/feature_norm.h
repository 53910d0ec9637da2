// raw_feature_norm: products -> logits, and back. The norm of a key runs over the queries of one segment.
//
//   x = phi(s) or s      logit = lambda x / (norm_segment(x) + eps)      phi: LeakyReLU(0.1), the "clipped" norms
//
// Backward of the l2 norms, with d the gradient at x / (n + eps), n > 0:
//   dx = d / (n + eps) - x sum(d x) / (n (n + eps)^2)
// A key whose products are all zero has norm 0; its gradient here is 0 (the published l2 norm gives NaN, and the true
// slope 1 / eps would swamp every other gradient).
// No include guard: compiled once per instruction set.

template <bool kClipped>
ITM_INLINE Vec feature(Vec raw) {
  return kClipped ? (raw > 0.0f ? raw : raw * kNegativeSlope) : raw;
}

template <bool kClipped>
ITM_INLINE Vec feature_slope(Vec raw) {
  return kClipped ? (raw > 0.0f ? splat(1.0f) : splat(kNegativeSlope)) : splat(1.0f);
}

template <class Term>
ITM_INLINE float sum_over_segment(const Tile& tile, int64_t s, Term term) {
  Vec total{};
  const int64_t begin = tile.begin(s), n = tile.count(s);
  for (int64_t l = 0; l < n; l += kLanes) total += first_lanes(term(begin + l), n - l, 0.0f);
  return sum_of_lanes(total);
}

template <bool kClipped, bool kL1>
ITM_INLINE void normalise_by_norm(const Tile& tile, float lambda) {
  for (int64_t k = 0; k < tile.keys; ++k) {
    const float* raw = tile.raw + k * tile.width;
    for (int64_t s = 0; s < tile.segments; ++s) {
      tile.norms[k * tile.segments + s] = sum_over_segment(tile, s, [&](int64_t l) {
        const Vec x = feature<kClipped>(load(raw + l));
        return kL1 ? magnitude(x) : x * x;
      });
    }
  }
  const int64_t entries = tile.keys * tile.segments;
  for (int64_t i = 0; i < entries; ++i) {
    if (!kL1) tile.norms[i] = __builtin_sqrtf(tile.norms[i]);
    tile.scales[i] = 1.0f / (tile.norms[i] + kEps);
  }
  for (int64_t k = 0; k < tile.keys; ++k) {
    const float* raw = tile.raw + k * tile.width;
    float* logits = tile.weights + k * tile.width;
    store(logits + tile.width - kLanes, splat(0.0f));
    for (int64_t s = 0; s < tile.segments; ++s) {
      const Vec scale = splat(lambda * tile.scales[k * tile.segments + s]);
      const int64_t begin = tile.begin(s), n = tile.count(s);
      for (int64_t l = begin; l < begin + n; l += kLanes) store(logits + l, feature<kClipped>(load(raw + l)) * scale);
    }
  }
}

// The softmax over a segment has temperature 1; lambda enters the second softmax alone.
ITM_INLINE void normalise_by_softmax(const Tile& tile, float lambda) {
  for (int64_t k = 0; k < tile.keys; ++k) {
    const float* raw = tile.raw + k * tile.width;
    float* normed = tile.normed + k * tile.width;
    float* logits = tile.weights + k * tile.width;
    store(normed + tile.width - kLanes, splat(0.0f));
    store(logits + tile.width - kLanes, splat(0.0f));
    for (int64_t s = 0; s < tile.segments; ++s) {
      const int64_t begin = tile.begin(s), n = tile.count(s);
      Vec best = splat(-__builtin_inff());
      for (int64_t l = 0; l < n; l += kLanes) {
        best = larger(best, first_lanes(load(raw + begin + l), n - l, -__builtin_inff()));
      }
      const Vec top = splat(largest_of_lanes(best));
      for (int64_t l = begin; l < begin + n; l += kLanes) store(normed + l, exp_of_nonpositive(load(raw + l) - top));
      const Vec scale = splat(1.0f / sum_over_segment(tile, s, [&](int64_t l) { return load(normed + l); }));
      // The spill past the segment is made again by the next one, from raw.
      for (int64_t l = begin; l < begin + n; l += kLanes) {
        const Vec value = load(normed + l) * scale;
        store(normed + l, value);
        store(logits + l, value * lambda);
      }
    }
    // The last spill may hold exponentials of zeros in the padding lanes.
    for (int64_t l = tile.lanes; l < tile.width; ++l) normed[l] = logits[l] = 0.0f;
  }
}

template <bool kClipped>
ITM_INLINE void scale_only(const Tile& tile, float lambda) {
  for (int64_t i = 0; i < tile.keys * tile.width; i += kLanes) {
    store(tile.weights + i, feature<kClipped>(load(tile.raw + i)) * lambda);
  }
}

ITM_INLINE void normalise(const Tile& tile, FeatureNorm norm, float lambda) {
  switch (norm) {
    case FeatureNorm::kSoftmax: return normalise_by_softmax(tile, lambda);
    case FeatureNorm::kL2: return normalise_by_norm<false, false>(tile, lambda);
    case FeatureNorm::kClippedL2: return normalise_by_norm<true, false>(tile, lambda);
    case FeatureNorm::kL1: return normalise_by_norm<false, true>(tile, lambda);
    case FeatureNorm::kClippedL1: return normalise_by_norm<true, true>(tile, lambda);
    case FeatureNorm::kClipped: return scale_only<true>(tile, lambda);
    case FeatureNorm::kNone: return scale_only<false>(tile, lambda);
  }
}

// Each of these turns one row of gradients at the normalised features (in `image`) into gradients at the products;
// what reaches a product through q . c, grad_dot times its weight, is added on the way out.
ITM_INLINE void add_dot_path(const Tile& tile, int64_t k, int64_t l, Vec grad) {
  const int64_t at = k * tile.width + l;
  store(tile.image + at, grad + load(tile.grad_dot + l) * load(tile.weights + at));
}

template <bool kClipped, bool kL1>
ITM_INLINE void norm_backward(const Tile& tile) {
  for (int64_t k = 0; k < tile.keys; ++k) {
    const float* raw = tile.raw + k * tile.width;
    const float* grad = tile.image + k * tile.width;
    store(tile.row + tile.width - kLanes, splat(0.0f));
    for (int64_t s = 0; s < tile.segments; ++s) {
      const float norm = tile.norms[k * tile.segments + s];
      const float scale = tile.scales[k * tile.segments + s];
      const float along =
          sum_over_segment(tile, s, [&](int64_t l) { return load(grad + l) * feature<kClipped>(load(raw + l)); });
      const int64_t begin = tile.begin(s), n = tile.count(s);
      // One query: x / (|x| + eps), where the general line would subtract two numbers that differ by eps alone.
      const bool alone = n == 1;
      const Vec pull = splat(norm > 0.0f && !alone ? along * scale * scale / (kL1 ? 1.0f : norm) : 0.0f);
      const Vec push = splat(norm > 0.0f ? (alone ? kEps * scale * scale : scale) : 0.0f);
      for (int64_t l = begin; l < begin + n; l += kLanes) {
        const Vec x = feature<kClipped>(load(raw + l));
        const Vec direction = kL1 ? (x > 0.0f ? splat(1.0f) : (x < 0.0f ? splat(-1.0f) : splat(0.0f))) : x;
        store(tile.row + l, load(grad + l) * push - direction * pull);
      }
    }
    for (int64_t l = 0; l < tile.width; l += kLanes) {
      add_dot_path(tile, k, l, load(tile.row + l) * feature_slope<kClipped>(load(raw + l)));
    }
  }
}

ITM_INLINE void softmax_norm_backward(const Tile& tile) {
  for (int64_t k = 0; k < tile.keys; ++k) {
    const float* normed = tile.normed + k * tile.width;
    const float* grad = tile.image + k * tile.width;
    store(tile.row + tile.width - kLanes, splat(0.0f));
    for (int64_t s = 0; s < tile.segments; ++s) {
      const Vec mean = splat(sum_over_segment(tile, s, [&](int64_t l) { return load(grad + l) * load(normed + l); }));
      const int64_t begin = tile.begin(s), n = tile.count(s);
      for (int64_t l = begin; l < begin + n; l += kLanes) {
        store(tile.row + l, load(normed + l) * (load(grad + l) - mean));
      }
    }
    for (int64_t l = 0; l < tile.width; l += kLanes) add_dot_path(tile, k, l, load(tile.row + l));
  }
}

template <bool kClipped>
ITM_INLINE void scale_only_backward(const Tile& tile) {
  for (int64_t k = 0; k < tile.keys; ++k) {
    for (int64_t l = 0; l < tile.width; l += kLanes) {
      const int64_t at = k * tile.width + l;
      add_dot_path(tile, k, l, load(tile.image + at) * feature_slope<kClipped>(load(tile.raw + at)));
    }
  }
}

ITM_INLINE void normalise_backward(const Tile& tile, FeatureNorm norm) {
  switch (norm) {
    case FeatureNorm::kSoftmax: return softmax_norm_backward(tile);
    case FeatureNorm::kL2: return norm_backward<false, false>(tile);
    case FeatureNorm::kClippedL2: return norm_backward<true, false>(tile);
    case FeatureNorm::kL1: return norm_backward<false, true>(tile);
    case FeatureNorm::kClippedL1: return norm_backward<true, true>(tile);
    case FeatureNorm::kClipped: return scale_only_backward<true>(tile);
    case FeatureNorm::kNone: return scale_only_backward<false>(tile);
  }
}
