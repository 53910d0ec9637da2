// Cosine of each query with what it attends to, and the way back: the score of RCR alone, before its mean.
//
//   out = q . c s / max(|q| |c| s, eps),  s = 1 / (|c| + eps), 0 at c = 0      dq += a c + b q      dc = a q + d c
//
// Row g L + l is query l facing key group g. Owner: forward a warp has one row; backward a thread has one query and a
// chunk of the width, and walks the groups, where the gradients of a query meet: one order, no atomics. Read: each
// array once. Never in memory: c over its norm. Float32 inside. The trick: a, b and d are three numbers a row that the
// recomputed forward leaves, so that no sum over the width is needed twice; above the floor the norm of c cancels
// against s.
#pragma once

#include "row_words.cuh"

namespace itm {

// `slopes [3, rows]`, or null.
template <class T, bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    cosine_rows_kernel(const T* queries, const T* attended, float* cosines, float* slopes, int64_t rows,
                       int64_t num_queries, int width) {
  constexpr int kEach = kChunk<T>;
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const T* query = queries + row % num_queries * width;
  float dot = 0.0f, square = 0.0f, of_query = 0.0f;
  for (int column = kEach * lane; column < width; column += 32 * kEach) {
    float q[kEach], c[kEach];
    load<kWide>(query + column, width - column, q);
    load<kWide>(attended + row * width + column, width - column, c);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      dot += q[i] * c[i];
      square += c[i] * c[i];
      of_query += q[i] * q[i];
    }
  }
  dot = warp_sum(dot);
  of_query = warp_sum(of_query);
  const float norm = sqrtf(warp_sum(square)), query_norm = sqrtf(of_query);
  if (lane != 0) return;
  // Nothing attended to: 0, and no gradient. What is divided by stands in for it.
  const bool nothing = norm == 0.0f;
  const float scale = nothing ? 0.0f : 1.0f / (norm + kEps), lengths = query_norm * norm * scale;
  const bool on_floor = lengths < kEps;
  const float cosine = dot * scale / (on_floor ? kEps : lengths);
  cosines[row] = cosine;
  if (slopes == nullptr) return;
  const float some = nothing ? 1.0f : norm;
  const float straight = on_floor ? scale / kEps : 1.0f / (query_norm * some);
  const float of_attended = on_floor ? -cosine * scale / some : -cosine / (some * some);
  slopes[row] = nothing ? 0.0f : straight;
  slopes[rows + row] = on_floor ? 0.0f : -cosine / of_query;
  slopes[2 * rows + row] = nothing ? 0.0f : of_attended;
}

struct MeanGradients {
  const float* of_means;    // [groups, segments]
  const int32_t* segments;  // [queries], counted from any number; -1: padding
  const int64_t* counts;    // [segments]
  int64_t num_segments;
};

// What is attended to is overwritten by its gradient.
template <class T, bool kWide>
__global__ void __launch_bounds__(kColumnThreads)
    cosine_rows_backward_kernel(const T* queries, T* attended, const float* slopes, const MeanGradients grads,
                                float* grad_queries, int64_t groups, int64_t num_queries, int width) {
  constexpr int kEach = kChunk<T>;
  const int column = static_cast<int>(blockIdx.y * kColumnThreads + threadIdx.x) * kEach, left = width - column;
  if (left <= 0) return;
  const int64_t query = blockIdx.x, rows = groups * num_queries;
  const bool counts = grads.segments[query] >= 0;
  // The first row of a block opens its first segment.
  const int64_t segment = counts ? grads.segments[query] - grads.segments[0] : 0;
  const float share = static_cast<float>(grads.counts[segment]);
  float q[kEach], total[kEach];
  load<kWide>(queries + query * width + column, left, q);
  load<kWide>(grad_queries + query * width + column, left, total);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = group * num_queries + query;
    const float upstream = counts ? grads.of_means[group * grads.num_segments + segment] / share : 0.0f;
    const float straight = upstream * slopes[row], of_query = upstream * slopes[rows + row];
    const float of_attended = upstream * slopes[2 * rows + row];
    float c[kEach];
    load<kWide>(attended + row * width + column, left, c);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      total[i] += straight * c[i] + of_query * q[i];
      c[i] = straight * q[i] + of_attended * c[i];
    }
    store<kWide>(attended + row * width + column, left, c);
  }
  store<kWide>(grad_queries + query * width + column, left, total);
}

}  // namespace itm
