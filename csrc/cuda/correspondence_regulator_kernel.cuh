// The correspondence regulator between its products: tanh of rows behind a bias, the gate of queries, and back.
//
//   out = tanh(y + b)      t = tanh(z + b)    e = clamp(t + e_before, -1, 1)    u = q e      e_before = 1 at the first
//   t_r = relu(u . tanh(y + b) + c + t_before)
//   du -> dq += du e,  de = du q + de_after,  dp = de where |t + e_before| <= 1, else 0,  dz = dp (1 - t^2)
//
// Row g L + l is query l facing key group g. Owner: forward, a warp has one row; backward, a thread has a chunk of the
// width and walks some rows (tanh), or some queries and the groups they face (gate), where the gradients of a query and
// the sums of the bias meet. These sums come back in parts, one a block of threads, added up by the caller: one order,
// no atomics. Read: each array once. Never in memory: in a forward alone, neither t nor (at the last step) e. Float32
// inside. The trick: the gradient of e_before is dp, so one array carries it from step to step, in place; t rather than
// e is kept, for whether the clamp was exactly on its edge cannot be seen in e.
#pragma once

#include "row_words.cuh"

namespace itm {

constexpr int kSumRows = 16;      // rows that a thread of a backward adds up: few parts are left
constexpr int kGatedQueries = 4;  // queries: each comes with as many rows as there are groups

template <class T, bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    tanh_rows_kernel(const float* rows, const float* bias, T* out, int64_t count, int width) {
  constexpr int kEach = kChunk<float>;
  const int64_t row = row_of_warp();
  if (row >= count) return;
  for (int column = kEach * static_cast<int>(threadIdx.x % 32); column < width; column += 32 * kEach) {
    float x[kEach], b[kEach];
    load<kWide>(rows + row * width + column, width - column, x);
    load<kWide>(bias + column, width - column, b);
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] = tanhf(x[i] + b[i]);
    store<kWide>(out + row * width + column, width - column, x);
  }
}

// Rows are overwritten by their tanh; `before` may be null: one temperature for all.
template <bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    warm_rows_kernel(float* rows, const float* bias, const float* weight, const float* shift, const float* before,
                     float temperature, float* temperatures, int64_t count, int width) {
  constexpr int kEach = kChunk<float>;
  const int64_t row = row_of_warp();
  if (row >= count) return;
  const int lane = threadIdx.x % 32;
  float along = 0.0f;
  for (int column = kEach * lane; column < width; column += 32 * kEach) {
    float x[kEach], b[kEach], w[kEach];
    load<kWide>(rows + row * width + column, width - column, x);
    load<kWide>(bias + column, width - column, b);
    load<kWide>(weight + column, width - column, w);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      x[i] = tanhf(x[i] + b[i]);
      along += x[i] * w[i];
    }
    store<kWide>(rows + row * width + column, width - column, x);
  }
  along = warp_sum(along);
  if (lane == 0) {
    const float warmer = along + *shift + (before != nullptr ? before[row] : temperature);
    temperatures[row] = warmer < 0.0f ? 0.0f : warmer;
  }
}

// First column of this thread.
template <int kEach>
__device__ __forceinline__ int column_of_thread() {
  return static_cast<int>(blockIdx.y * kColumnThreads + threadIdx.x) * kEach;
}

// With factors the gradient at tanh is the outer product of `grad [rows]` and `factors [width]`.
template <class T, class X, bool kWide>
__global__ void __launch_bounds__(kColumnThreads)
    tanh_rows_backward_kernel(const X* tangents, const float* grad, const float* factors, T* out, float* sums,
                              int64_t count, int width) {
  constexpr int kEach = kChunk<T>;
  const int column = column_of_thread<kEach>(), left = width - column;
  if (left <= 0) return;
  const int64_t first = int64_t{blockIdx.x} * kSumRows, last = first + kSumRows < count ? first + kSumRows : count;
  float of_bias[kEach] = {}, factor[kEach] = {};
  if (factors != nullptr) load<kWide>(factors + column, left, factor);
  for (int64_t row = first; row < last; ++row) {
    float t[kEach], before[kEach];
    load<kWide>(tangents + row * width + column, left, t);
    if (factors == nullptr) load<kWide>(grad + row * width + column, left, before);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      before[i] = (factors == nullptr ? before[i] : grad[row] * factor[i]) * (1.0f - t[i] * t[i]);
      of_bias[i] += before[i];
    }
    store<kWide>(out + row * width + column, left, before);
  }
  store<kWide>(sums + int64_t{blockIdx.x} * width + column, left, of_bias);
}

__device__ __forceinline__ float clamp_gate(float x) { return x > 1.0f ? 1.0f : (x < -1.0f ? -1.0f : x); }

template <class T>
struct Gates {
  const T* queries;  // [queries, width]
  const T* before;   // [rows, width], or null: ones
  int64_t groups, num_queries;
  int width;
};

// Rows are z, overwritten by gated queries; `handed_on` may be the gates before. Either may be null.
template <class T, bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    gate_queries_kernel(const Gates<T> gates, const float* bias, T* rows, T* tangents, T* handed_on) {
  constexpr int kEach = kChunk<T>;
  const int64_t row = row_of_warp();
  if (row >= gates.groups * gates.num_queries) return;
  const T* query = gates.queries + row % gates.num_queries * gates.width;
  for (int column = kEach * static_cast<int>(threadIdx.x % 32); column < gates.width; column += 32 * kEach) {
    const int left = gates.width - column;
    const int64_t at = row * gates.width + column;
    float z[kEach], b[kEach], q[kEach], e[kEach];
    load<kWide>(rows + at, left, z);
    load<kWide>(bias + column, left, b);
    load<kWide>(query + column, left, q);
    if (gates.before != nullptr) load<kWide>(gates.before + at, left, e);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      z[i] = tanhf(z[i] + b[i]);
      e[i] = clamp_gate(z[i] + (gates.before != nullptr ? e[i] : 1.0f));
      q[i] *= e[i];
    }
    if (tangents != nullptr) store<kWide>(tangents + at, left, z);
    if (handed_on != nullptr) store<kWide>(handed_on + at, left, e);
    store<kWide>(rows + at, left, q);
  }
}

// The gradient at gated queries is overwritten by that at z, and that at the gates, if there is one, by that at those
// before.
template <class T, bool kWide>
__global__ void __launch_bounds__(kColumnThreads)
    gate_queries_backward_kernel(const Gates<T> gates, const T* tangents, T* grad, float* grad_gates,
                                 float* grad_queries, float* sums) {
  constexpr int kEach = kChunk<T>;
  const int column = column_of_thread<kEach>(), left = gates.width - column;
  if (left <= 0) return;
  const int64_t first = int64_t{blockIdx.x} * kGatedQueries;
  const int64_t last = first + kGatedQueries < gates.num_queries ? first + kGatedQueries : gates.num_queries;
  float of_bias[kEach] = {};
  for (int64_t query = first; query < last; ++query) {
    float q[kEach], total[kEach];
    load<kWide>(gates.queries + query * gates.width + column, left, q);
    load<kWide>(grad_queries + query * gates.width + column, left, total);
    for (int64_t group = 0; group < gates.groups; ++group) {
      const int64_t at = (group * gates.num_queries + query) * gates.width + column;
      float t[kEach], before[kEach], d[kEach], carried[kEach];
      load<kWide>(tangents + at, left, t);
      load<kWide>(grad + at, left, d);
      if (gates.before != nullptr) load<kWide>(gates.before + at, left, before);
      if (grad_gates != nullptr) load<kWide>(grad_gates + at, left, carried);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float unclamped = t[i] + (gates.before != nullptr ? before[i] : 1.0f);
        total[i] += d[i] * clamp_gate(unclamped);
        const float of_gate = d[i] * q[i] + (grad_gates != nullptr ? carried[i] : 0.0f);
        carried[i] = fabsf(unclamped) <= 1.0f ? of_gate : 0.0f;
        d[i] = carried[i] * (1.0f - t[i] * t[i]);
        of_bias[i] += d[i];
      }
      if (grad_gates != nullptr) store<kWide>(grad_gates + at, left, carried);
      store<kWide>(grad + at, left, d);
    }
    store<kWide>(grad_queries + query * gates.width + column, left, total);
  }
  store<kWide>(sums + int64_t{blockIdx.x} * gates.width + column, left, of_bias);
}

}  // namespace itm
