// Queries less what they attend to, squared; rows to length 1 behind a bias; and the way back of both.
//
//   d = q - c / (|c| + eps)    out = d^2            dq += 2 d dout    dc = -s (2 d dout + x c),  s = 1 / (|c| + eps)
//   x = y + b    out = x / (|x| + eps)              dy = (dout - out (out . dout) (|x| + eps) / |x|) / (|x| + eps)
//
// Row g L + l of c is query l facing key group g. Owner: a warp has one row; in the backward of the squares a block of
// threads has one query and walks the groups, where its gradients meet. Read: each array once, for a row of up to 1,024
// features or 512 similarities stays in registers between the sum over it and what is made of that (a longer one is
// read again, from the cache). Never in memory: c over its norm, d, x. Float32 inside, one order, no atomics. The
// trick: the norm of c comes from the row itself, so no Gram matrix is needed; and the backward of a norm needs the row
// as it came out and one number, so a sum of such rows takes it as well.
#pragma once

#include "row_words.cuh"

namespace itm {

// Elements of a row that a lane holds: features are 1,024 as published, similarities 256, with room for twice as many.
constexpr int kFeatures = 32, kSimilarities = 16;

template <class T, bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    squared_differences_kernel(const T* queries, const T* attended, T* squares, float* norms, int64_t rows,
                               int64_t num_queries, int width) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  RowsOfWarp<T, kWide, 2, kFeatures> both(width, lane, attended + row * width, queries + row % num_queries * width);
  float square = 0.0f;
  both.visit([&](int, int, const auto& x) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) square += x[0][i] * x[0][i];
  });
  const float norm = sqrtf(warp_sum(square)), length = norm + kEps, scale = 1.0f / length;
  both.visit([&](int column, int, const auto& x) {
    float out[kChunk<T>];
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      const float d = x[1][i] - quotient(x[0][i], length, scale);
      out[i] = d * d;
    }
    store<kWide>(squares + row * width + column, width - column, out);
  });
  if (lane == 0) norms[row] = norm;
}

// What is attended to is overwritten by its gradient.
template <class T, bool kWide>
__global__ void __launch_bounds__(kColumnThreads)
    squared_differences_backward_kernel(const T* queries, T* attended, const T* grad_squares, const float* norms,
                                        float* grad_queries, int64_t groups, int64_t num_queries, int width) {
  constexpr int kEach = kChunk<T>, kHeld = kFloatsOfBlock / kEach;
  __shared__ float parts[2][kColumnThreads / 32];
  const int64_t query = blockIdx.x;
  const T* q = queries + query * width;
  float* grad_query = grad_queries + query * width;
  float total[kHeld + 1][kEach];  // the last one: of columns that are not held, and go through memory
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int column = (h * kColumnThreads + static_cast<int>(threadIdx.x)) * kEach;
    load<kWide>(grad_query + column, width - column, total[h]);
  }
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = group * num_queries + query;
    T* c = attended + row * width;
    const float norm = norms[row], length = norm + kEps, scale = 1.0f / length;
    HeldRows<T, kWide, kEach, kColumnThreads, kHeld, 3> made(width, threadIdx.x, q, c, grad_squares + row * width);
    float along = 0.0f;
    made.visit([&](int, int, const auto& x) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) along += 2.0f * (x[0][i] - quotient(x[1][i], length, scale)) * x[2][i] * x[1][i];
    });
    along = block_sum(along, parts[group % 2]);
    const float push = norm == 0.0f ? 0.0f : scale, slope = norm == 0.0f ? 0.0f : along * scale / norm;
    made.visit([&](int column, int h, const auto& x) {
      float of_attended[kEach];
      if (h == kHeld) load<kWide>(grad_query + column, width - column, total[h]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float twice = 2.0f * (x[0][i] - quotient(x[1][i], length, scale)) * x[2][i];
        total[h][i] += twice;
        of_attended[i] = push * (slope * x[1][i] - twice);
      }
      if (h == kHeld) store<kWide>(grad_query + column, width - column, total[h]);
      store<kWide>(c + column, width - column, of_attended);
    });
  }
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int column = (h * kColumnThreads + static_cast<int>(threadIdx.x)) * kEach;
    store<kWide>(grad_query + column, width - column, total[h]);
  }
}

// In place; `rounded`, if there is one, takes them in another type as well.
template <class T, bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    normalise_rows_kernel(float* rows, const float* bias, float* norms, T* rounded, int64_t count, int width) {
  const int64_t row = row_of_warp();
  if (row >= count) return;
  const int lane = threadIdx.x % 32;
  RowsOfWarp<float, kWide, 2, kSimilarities> both(width, lane, rows + row * width, bias);
  float square = 0.0f;
  both.visit([&](int, int, const auto& x) {
#pragma unroll
    for (int i = 0; i < kChunk<float>; ++i) square += (x[0][i] + x[1][i]) * (x[0][i] + x[1][i]);
  });
  const float norm = sqrtf(warp_sum(square)), length = norm + kEps, scale = 1.0f / length;
  both.visit([&](int column, int, const auto& x) {
    float out[kChunk<float>];
#pragma unroll
    for (int i = 0; i < kChunk<float>; ++i) out[i] = quotient(x[0][i] + x[1][i], length, scale);
    store<kWide>(rows + row * width + column, width - column, out);
    if (rounded != nullptr) store<kWide>(rounded + row * width + column, width - column, out);
  });
  if (lane == 0) norms[row] = norm;
}

// The gradient is overwritten. Rounded: the same for products, or null.
template <class T, bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    normalise_rows_backward_kernel(const float* rows, const float* norms, float* grad, T* rounded, int64_t count,
                                   int width) {
  const int64_t row = row_of_warp();
  if (row >= count) return;
  RowsOfWarp<float, kWide, 2, kSimilarities> both(width, threadIdx.x % 32, rows + row * width, grad + row * width);
  float along = 0.0f;
  both.visit([&](int, int, const auto& x) {
#pragma unroll
    for (int i = 0; i < kChunk<float>; ++i) along += x[0][i] * x[1][i];
  });
  along = warp_sum(along);
  const float norm = norms[row], scale = norm == 0.0f ? 0.0f : 1.0f / (norm + kEps);
  const float pull = norm == 0.0f ? 0.0f : along * (norm + kEps) / norm;
  both.visit([&](int column, int, const auto& x) {
    float out[kChunk<float>];
#pragma unroll
    for (int i = 0; i < kChunk<float>; ++i) out[i] = (x[1][i] - x[0][i] * pull) * scale;
    store<kWide>(grad + row * width + column, width - column, out);
    if (rounded != nullptr) store<kWide>(rounded + row * width + column, width - column, out);
  });
}

}  // namespace itm
