// Hard assignment on the CPU: products -> scores and arg-max, and gradients by the arg-max.
//
//   z_q = max_k k . q        score[segment] = agg_q z_q
//   dk = sum_q [arg_q = k] dz_q q        dq = sum_groups dz_q k_arg
//
// Owner: one thread owns a key group (scores, arg-max, dz, dk) or some queries in a slice of the width (dq), and sums in
// one order: no atomics, same bits every run.
// Read: forward, the products once. Backward, no products: of K keys of a query one has a gradient, so a gathered
// multiply-add does 1/K of a library product's work. Never in memory: dS, anything of size [groups, queries, width].
// Accumulation: float32.
// The trick: the width is walked in slices, so that the rows which a group gathers from stay in the first-level cache.
// No include guard: compiled once per instruction set.

#include "aggregate.h"

constexpr int64_t kStrip = 4 * kLanes;

// Offers row `k` of the products to the maxima of `n` queries; the first of equal keys stays, a NaN beats all.
template <class Scalar>
ITM_INLINE void offer(const Scalar* row, int64_t n, int32_t k, Vec* best, IntVec* key) {
  float strip[kStrip] = {};
  n == kStrip ? widen(row, strip, kStrip) : widen(row, strip, n);
  for (int v = 0; v < 4; ++v) {
    const Vec x = load(strip + v * kLanes);
    const IntVec better = (x > best[v]) | ((x != x) & (best[v] == best[v]));
    best[v] = better ? x : best[v];
    key[v] = better ? IntVec{} + k : key[v];
  }
}

// The maxima of `lanes` queries over `keys` rows of products; arg_max may be null.
template <class Scalar, class Index>
ITM_INLINE void largest_keys(const Scalar* products, int64_t keys, int64_t lanes, float* maxima, Index* arg_max) {
  for (int64_t begin = 0; begin < lanes; begin += kStrip) {
    const int64_t n = lanes - begin < kStrip ? lanes - begin : kStrip;
    Vec best[4];
    IntVec key[4];
    for (int v = 0; v < 4; ++v) {
      best[v] = splat(-__builtin_inff());
      key[v] = IntVec{};
    }
    for (int64_t k = 0; k < keys; ++k) {
      offer(products + k * lanes + begin, n, static_cast<int32_t>(k), best, key);
    }
    for (int v = 0; v < 4; ++v) store(maxima + begin + v * kLanes, best[v]);  // the last one spills into slack
    if (arg_max == nullptr) continue;
    for (int64_t l = 0; l < n; ++l) arg_max[begin + l] = static_cast<Index>(key[l / kLanes][l % kLanes]);
  }
}

// Row of a query's key within its group; never outside it, whatever the arg-max was overwritten with.
template <class Index>
ITM_INLINE int64_t within(Index key, int64_t keys) {
  const int64_t k = static_cast<int64_t>(key);
  return k < 0 || k >= keys ? keys - 1 : k;
}

template <class Scalar, class Index>
void run_forward(const MaximaCall<Scalar, Index>& call) {
  run_groups(call, [&](int64_t g, float* maxima, float*) {
    const int64_t first = call.key_offsets[g];
    largest_keys(call.products + first * call.lanes, call.key_offsets[g + 1] - first, call.lanes, maxima,
                 call.arg_max == nullptr ? nullptr : call.arg_max + g * call.arg_stride);
    for (int64_t s = 0; s < call.segments; ++s) {
      const int64_t begin = call.query_offsets[s];
      call.scores[g * call.group_stride + s * call.segment_stride] =
          aggregate(maxima + begin, call.query_offsets[s + 1] - begin, call.aggregation, call.lambda);
    }
  });
}

// A slice of a row as floats: itself, or widened into `buffer`.
ITM_INLINE const float* widened(const float* row, int64_t, float*) { return row; }
ITM_INLINE const float* widened(const uint16_t* row, int64_t n, float* buffer) {
  widen(row, buffer, n);
  return buffer;
}

ITM_INLINE float dot(const float* x, const float* y, int64_t n) {
  Vec even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    even += load(x + i) * load(y + i);
    odd += load(x + i + kLanes) * load(y + i + kLanes);
  }
  float rest = 0.0f;
  for (; i < n; ++i) rest += x[i] * y[i];
  return sum_of_lanes(even + odd) + rest;
}

ITM_INLINE void add_scaled(float* out, float scale, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(out + i) + scale * load(x + i));
  for (; i < n; ++i) out[i] += scale * x[i];
}

ITM_INLINE void fill_rows(float* rows, int64_t count, int64_t stride, int64_t n) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < n; ++d) rows[r * stride + d] = 0.0f;
  }
}

// Calls visit(first element, elements) for each slice of the width.
template <class Visit>
ITM_INLINE void for_each_slice(int64_t width, Visit visit) {
  for (int64_t d = 0; d < width; d += kSlice) visit(d, width - d < kSlice ? width - d : kSlice);
}

// The maxima of a group again, as the inner products of queries and their keys.
template <class Scalar, class Index>
ITM_INLINE void gathered_maxima(const MaximaCall<Scalar, Index>& call, const Scalar* rows, int64_t keys,
                                const Index* arg_max, float* maxima) {
  for (int64_t l = 0; l < call.lanes; ++l) maxima[l] = 0.0f;
  for_each_slice(call.width, [&](int64_t d, int64_t n) {
    float of_query[kSlice], of_key[kSlice];
    for (int64_t l = 0; l < call.lanes; ++l) {
      const float* q = widened(call.queries + l * call.width + d, n, of_query);
      const float* k = widened(rows + within(arg_max[l], keys) * call.width + d, n, of_key);
      maxima[l] += dot(q, k, n);
    }
  });
}

template <class Scalar, class Index>
void run_keys_backward(const MaximaCall<Scalar, Index>& call) {
  run_groups(call, [&](int64_t g, float* maxima, float* grad) {
    const int64_t first = call.key_offsets[g], keys = call.key_offsets[g + 1] - first;
    const Index* arg_max = call.arg_max + g * call.arg_stride;
    const bool linear = call.aggregation == Aggregation::kSum || call.aggregation == Aggregation::kMean;
    if (!linear) gathered_maxima(call, call.keys + first * call.width, keys, arg_max, maxima);
    for (int64_t s = 0; s < call.segments; ++s) {
      const int64_t begin = call.query_offsets[s];
      aggregate_backward(maxima + begin, call.query_offsets[s + 1] - begin, call.aggregation, call.lambda,
                         call.scores[g * call.group_stride + s * call.segment_stride], grad + begin);
    }
    for (int64_t l = 0; l < call.lanes; ++l) call.grad_maxima[g * call.lanes + l] = grad[l];
    float* grad_keys = call.grad_keys + first * call.width;
    for_each_slice(call.width, [&](int64_t d, int64_t n) {
      if (!call.accumulate) fill_rows(grad_keys + d, keys, call.width, n);
      float of_query[kSlice];
      for (int64_t l = 0; l < call.lanes; ++l) {
        if (grad[l] == 0.0f) continue;  // agg Max: most of them
        const float* q = widened(call.queries + l * call.width + d, n, of_query);
        add_scaled(grad_keys + within(arg_max[l], keys) * call.width + d, grad[l], q, n);
      }
    });
  });
}

// One piece: queries `begin` to `end` in one slice of the width, all groups in order.
template <class Scalar, class Index>
ITM_INLINE void queries_of_slice(const MaximaCall<Scalar, Index>& call, int64_t begin, int64_t end, int64_t d,
                                 int64_t n) {
  if (!call.accumulate) fill_rows(call.grad_queries + begin * call.width + d, end - begin, call.width, n);
  float of_key[kSlice];
  for (int64_t g = 0; g < call.groups; ++g) {
    const int64_t first = call.key_offsets[g], keys = call.key_offsets[g + 1] - first;
    const Scalar* rows = call.keys + first * call.width + d;
    const Index* arg_max = call.arg_max + g * call.arg_stride;
    for (int64_t l = begin; l < end; ++l) {
      const float grad = call.grad_maxima[g * call.lanes + l];
      if (grad == 0.0f) continue;
      const float* k = widened(rows + within(arg_max[l], keys) * call.width, n, of_key);
      add_scaled(call.grad_queries + l * call.width + d, grad, k, n);
    }
  }
}

template <class Scalar, class Index>
void run_queries_backward(const MaximaCall<Scalar, Index>& call) {
  const int64_t slices = (call.width + kSlice - 1) / kSlice, chunks = (call.lanes + kQueries - 1) / kQueries;
  for_each_piece(chunks * slices, [&] {
    return [&call, slices](int64_t piece) {
      const int64_t begin = piece / slices * kQueries, d = piece % slices * kSlice;
      const int64_t end = call.lanes - begin < kQueries ? call.lanes : begin + kQueries;
      queries_of_slice(call, begin, end, d, call.width - d < kSlice ? call.width - d : kSlice);
    };
  });
}
