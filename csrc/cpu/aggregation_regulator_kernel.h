// The aggregation regulator on the CPU: attention over the alignment vectors x_i of a pair, asked by its pooled vector.
//
//   K_i = D tanh(k_i + bk)    P = D tanh(p + bp)    w = softmax_i(v . (K_i P))    out = l2norm(sum_i w_i x_i)
//   dr = gradient before the norm        dw_i = dr . x_i        dx_i += w_i dr        dl_i = w_i (dw_i - sum_j w_j dw_j)
//   dK_i = dl_i v P        dP = v sum_i dl_i K_i        dv = P sum_i dl_i K_i        then through D and tanh
//
// D is dropout by counters (../common/philox.h). The value's bias moves no weight, so it is no argument.
//
// Owner: one thread a pair, its queries in order; dv and dbk come back per pair. No atomics; same bits every run.
// Read: each row once or twice, the second time from the first-level cache. Never in memory: masks, made again in the
// backward. Accumulation: float32, and so are the rows: over the queries of a pair nearly all of a gradient cancels.
// The trick: v P is one vector a pair, so a logit is one inner product of a row that has just been made.
// No include guard: compiled once per instruction set.

#include "row_words.h"

constexpr int64_t kCounters = 16;  // made side by side: one vector of 32-bit words

// 0 or 1 / (1 - p) for each channel of a row; `scale` has room for whole runs of counters.
ITM_INLINE void dropout_scale(const Dropout& dropout, int64_t image, int64_t caption, int64_t query,
                              DropoutBranch branch, int64_t channels, float* scale) {
  for (int64_t first = 0; 4 * first < channels; first += kCounters) {
    uint32_t words[4][kCounters];
    for (int64_t i = 0; i < kCounters; ++i) {
      const auto x = philox(dropout_counter(image, caption, query, dropout.step, branch, first + i), dropout.seed);
      words[0][i] = x.a;
      words[1][i] = x.b;
      words[2][i] = x.c;
      words[3][i] = x.d;
    }
    float* out = scale + 4 * first;
    for (int64_t i = 0; i < 4 * kCounters; ++i) {
      out[i] = (words[i % 4][i / 4] >> 8) >= dropout.threshold ? dropout.scale : 0.0f;
    }
  }
}

ITM_INLINE float dot_rows(const float* x, const float* y, int64_t n) {
  Vec total{};
  for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR { total += load(x + i, part) * load(y + i, part); });
  return sum_of_lanes(total);
}

ITM_INLINE void multiply_rows(float* x, const float* y, int64_t n) {
  for_each_vector(n,
                  [&](int64_t i, auto part) ITM_VISITOR { store(x + i, load(x + i, part) * load(y + i, part), part); });
}

// Weights of `n` logits, in place.
ITM_INLINE void softmax_of_row(float* logits, int64_t n) {
  float best = logits[0];
  for (int64_t i = 1; i < n; ++i) best = logits[i] > best ? logits[i] : best;
  Vec total{};
  for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
    const Vec e = exp_of_nonpositive(load(logits + i, part) - best);
    store(logits + i, e, part);
  });
  for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR { total += load(logits + i, part); });
  const Vec scale = splat(1.0f / sum_of_lanes(total));
  for_each_vector(n,
                  [&](int64_t i, auto part) ITM_VISITOR { store(logits + i, load(logits + i, part) * scale, part); });
}

// The rows of one pair.
struct PairRows {
  int64_t pair, first, count, image, caption;
};

// Calls visit(rows, memory) for every pair; memory: `vectors` rows of floats, each with room for whole runs of counters.
template <class Visit>
ITM_INLINE void for_each_pair(const PoolCall& call, int64_t vectors, const Visit& visit) {
  const int64_t stride = (call.width + 4 * kCounters - 1) / (4 * kCounters) * 4 * kCounters;
  for_each_piece(call.groups * call.segments, [&, stride] {
    return [&, stride, memory = std::vector<float>(static_cast<size_t>(vectors * stride))](int64_t pair) mutable {
      const int64_t g = pair / call.segments, s = pair % call.segments;
      const int64_t group = call.group_numbers[g], segment = call.segment_numbers[s];
      visit(PairRows{pair, g * call.lanes + call.offsets[s], call.offsets[s + 1] - call.offsets[s],
                     call.groups_are_images ? group : segment, call.groups_are_images ? segment : group},
            memory.data(), stride);
    };
  });
}

inline void run_pool(const PoolCall& call) {
  const int64_t n = call.width;
  for_each_pair(call, 2, [&](const PairRows& rows, float* memory, int64_t stride) {
    float *asked = memory, *mask = memory + stride;  // asked: v P
    float* p = call.asked + rows.pair * n;
    for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec t = tanh_of(load(p + i, part) + load(call.asked_bias + i, part));
      store(p + i, t, part);
      store(asked + i, t * load(call.value + i, part), part);
    });
    if (call.dropout.threshold) {
      dropout_scale(call.dropout, rows.image, rows.caption, 0, DropoutBranch::kPooled, n, mask);
      multiply_rows(asked, mask, n);
    }
    float* weights = call.weights + rows.first;
    for (int64_t q = 0; q < rows.count; ++q) {
      float* k = call.keys + (rows.first + q) * n;
      const bool drops = call.dropout.threshold != 0;
      if (drops) dropout_scale(call.dropout, rows.image, rows.caption, q, DropoutBranch::kKeys, n, mask);
      Vec logit{};
      for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
        const Vec t = tanh_of(load(k + i, part) + load(call.key_bias + i, part));
        store(k + i, t, part);
        logit += (drops ? t * load(mask + i, part) : t) * load(asked + i, part);
      });
      weights[q] = sum_of_lanes(logit);
    }
    softmax_of_row(weights, rows.count);
    float* out = call.pooled + rows.pair * n;
    __builtin_memset(out, 0, static_cast<size_t>(n) * sizeof(float));
    for (int64_t q = 0; q < rows.count; ++q) {
      const float* x = call.vectors + (rows.first + q) * n;
      for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
        store(out + i, load(out + i, part) + weights[q] * load(x + i, part), part);
      });
    }
    const float norm = __builtin_sqrtf(dot_rows(out, out, n));
    const Vec scale = splat(1.0f / (norm + kEps));
    for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR { store(out + i, load(out + i, part) * scale, part); });
    call.norms[rows.pair] = norm;
  });
}

// dl over the weights, dx added, dr in `grad`.
ITM_INLINE void weights_backward(const PoolCall& call, const PairRows& rows, float* grad) {
  const int64_t n = call.width;
  const float* out = call.pooled + rows.pair * n;
  const float* grad_out = call.grad_pooled + rows.pair * n;
  const float norm = call.norms[rows.pair], whole = norm + kEps;
  const NormSlope slope = slope_of_l2norm(norm, dot_rows(grad_out, out, n) * whole);
  for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
    store(grad + i, slope.scale * (load(grad_out + i, part) - slope.along * whole * load(out + i, part)), part);
  });
  float* weights = call.weights + rows.first;
  float mean = 0.0f;
  for (int64_t q = 0; q < rows.count; ++q) {
    mean += weights[q] * dot_rows(grad, call.vectors + (rows.first + q) * n, n);
  }
  for (int64_t q = 0; q < rows.count; ++q) {
    const float weight = weights[q];
    weights[q] = weight * (dot_rows(grad, call.vectors + (rows.first + q) * n, n) - mean);
    float* grad_x = call.grad_vectors + (rows.first + q) * n;
    for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
      store(grad_x + i, load(grad_x + i, part) + weight * load(grad + i, part), part);
    });
  }
}

inline void run_pool_backward(const PoolCall& call) {
  const int64_t n = call.width;
  const bool drops = call.dropout.threshold != 0;
  for_each_pair(call, 4, [&](const PairRows& rows, float* memory, int64_t stride) {
    float *asked = memory, *mask = memory + stride, *sum = memory + 2 * stride, *asked_mask = memory + 3 * stride;
    weights_backward(call, rows, sum);
    float* p = call.asked + rows.pair * n;
    for (int64_t i = 0; i < stride; ++i) sum[i] = 0.0f, asked_mask[i] = 1.0f;  // sum: of dl_i K_i from here on
    if (drops) dropout_scale(call.dropout, rows.image, rows.caption, 0, DropoutBranch::kPooled, n, asked_mask);
    for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
      store(asked + i, load(p + i, part) * load(asked_mask + i, part) * load(call.value + i, part), part);
    });
    float* grad_bias = call.grad_key_bias + rows.pair * n;
    __builtin_memset(grad_bias, 0, static_cast<size_t>(n) * sizeof(float));
    for (int64_t q = 0; q < rows.count; ++q) {
      float* k = call.keys + (rows.first + q) * n;
      const float grad_logit = call.weights[rows.first + q];
      if (drops) dropout_scale(call.dropout, rows.image, rows.caption, q, DropoutBranch::kKeys, n, mask);
      for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
        const Vec t = load(k + i, part), scale = drops ? load(mask + i, part) : splat(1.0f);
        store(sum + i, load(sum + i, part) + grad_logit * t * scale, part);
        const Vec dk = grad_logit * load(asked + i, part) * scale * (1.0f - t * t);
        store(k + i, dk, part);
        store(grad_bias + i, load(grad_bias + i, part) + dk, part);
      });
    }
    float* grad_value = call.grad_value + rows.pair * n;
    for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec t = load(p + i, part), scale = load(asked_mask + i, part), s = load(sum + i, part);
      store(grad_value + i, s * t * scale, part);
      store(p + i, s * load(call.value + i, part) * scale * (1.0f - t * t), part);
    });
  });
}

inline void run_mean(const MeanCall& call) {
  for_each_row(call.pairs, kPairGrain, [&](int64_t pair) {
    const int64_t g = pair / call.segments, s = pair % call.segments;
    const int64_t begin = call.offsets[s], count = call.offsets[s + 1] - begin;
    const float* rows = call.vectors + (g * call.lanes + begin) * call.width;
    const Vec scale = splat(1.0f / static_cast<float>(count));
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      Vec total{};
      for (int64_t q = 0; q < count; ++q) total += load(rows + q * call.width + i, part);
      store(call.means + pair * call.width + i, total * scale, part);
    });
  });
}

inline void run_mean_backward(const MeanCall& call) {
  for_each_row(call.pairs, kPairGrain, [&](int64_t pair) {
    const int64_t g = pair / call.segments, s = pair % call.segments;
    const int64_t begin = call.offsets[s], count = call.offsets[s + 1] - begin;
    float* rows = call.grad_vectors + (g * call.lanes + begin) * call.width;
    const Vec scale = splat(1.0f / static_cast<float>(count));
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec grad = load(call.means + pair * call.width + i, part) * scale;
      for (int64_t q = 0; q < count; ++q) {
        float* row = rows + q * call.width + i;
        store(row, load(row, part) + grad, part);
      }
    });
  });
}
