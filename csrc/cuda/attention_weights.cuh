// Softmax over the keys and BFAN's focal step for a chunk of 16 queries held by a warp as accumulator fragments:
// a quad of lanes owns a row, so that a sum over the keys is a sum over registers and two shuffles.
//
//   a_k = exp(z_k - max z) / sum      focal equal: keep a_k > mean(a); prob: keep a_k sum_j sqrt(a_j) > sum_j a_j^1.5
//
// The focal step renormalises what is kept; where nothing passes (all equal) everything is kept, where the published
// code divides zero by zero. Weights past the last key, and of rows that are no query, are zero.
#pragma once

#include "scores_call.cuh"
#include "words.h"

namespace itm {

// Where the chunk's queries and a group's keys stand; `column` is the group's first key in the tables of the tile.
struct ChunkPlace {
  int query[2];     // rows of products, of fragment rows g and g + 8
  int segment[2];   // of the tile, or -1: no query
  int key;          // first key of the group in products
  int keys, tiles;  // of the group; tiles of 8 of them
  bool pairs;
};

// Products with keys 8 j + 2 t, + 1 of both rows; zero where there is no key or no query.
template <class T>
__device__ __forceinline__ void load_products(const Matrix<const T>& products, const ChunkPlace& place, int j,
                                              float (&s)[4]) {
  const int k = 8 * j + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    s[2 * h] = s[2 * h + 1] = 0.0f;
    if (place.segment[h] < 0) continue;
    const T* from = &products.at(place.query[h], place.key + k);
    if (place.pairs && k + 1 < place.keys) {
      if constexpr (sizeof(T) == 4) {
        const float2 both = *reinterpret_cast<const float2*>(from);
        s[2 * h] = both.x;
        s[2 * h + 1] = both.y;
      } else {
        const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
        T pair[2];
        memcpy(pair, &both, 4);
        s[2 * h] = to_float(pair[0]);
        s[2 * h + 1] = to_float(pair[1]);
      }
    } else {
      if (k < place.keys) s[2 * h] = to_float(from[0]);
      if (k + 1 < place.keys) s[2 * h + 1] = to_float(from[products.key_stride]);
    }
  }
}

template <int kTiles, class Term>
__device__ __forceinline__ void sum_over_keys(const float (&w)[kTiles][4], const Term& term, float (&sum)[2]) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e / 2] += term(w[j][e], e / 2);
  }
  sum[0] = quad_sum(sum[0]);
  sum[1] = quad_sum(sum[1]);
}

template <int kTiles>
__device__ __forceinline__ void keep_focal(float (&w)[kTiles][4], bool prob, int keys) {
  float factor[2] = {static_cast<float>(keys), static_cast<float>(keys)}, threshold[2], total[2];
  if (prob) sum_over_keys(w, [](float a, int) { return sqrtf(a); }, factor);
  sum_over_keys(w, [&](float a, int) { return prob ? a * sqrtf(a) : a; }, threshold);
  const auto kept = [&](float a, int h) { return a * factor[h] - threshold[h] > 0.0f ? a : 0.0f; };
  sum_over_keys(w, kept, total);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2;
      // A kept weight is above the mean, hence never zero: total is zero only where no key passed (or is NaN).
      if (total[h] != 0.0f) w[j][e] = kept(w[j][e], h) / total[h];
    }
  }
}

// Attention weights of the chunk. `scales` and `tops` are the tile's tables [segments, columns] (feature_norm.cuh),
// at the group's first column; tops is read for the softmax norm alone.
template <class T, int kTiles>
__device__ __forceinline__ void attend(const ScoresCall<T>& call, const Matrix<const T>& products,
                                       const ChunkPlace& place, const float* scales, const float* tops, int columns,
                                       float (&w)[kTiles][4]) {
  const int t = threadIdx.x % 4;
  const bool softmax = call.feature.kind == NormKind::kSoftmax;
  const float lambda = call.options.lambda_softmax * kLog2E;
  float top[2] = {-INFINITY, -INFINITY}, sum[2];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) w[j][e] = -INFINITY;
    if (j >= place.tiles) continue;
    float s[4];
    load_products(products, place, j, s);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k = 8 * j + 2 * t + e % 2, h = e / 2;
      if (place.segment[h] < 0 || k >= place.keys) continue;
      const int at = place.segment[h] * columns + k;
      w[j][e] = lambda * normalised(call.feature, s[e], {scales[at], softmax ? tops[at] : 0.0f});
      top[h] = fmaxf(top[h], w[j][e]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    top[h] = quad_max(top[h]);
    if (top[h] == -INFINITY) top[h] = 0.0f;  // no query, or nothing but NaN
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) w[j][e] = exp2f(w[j][e] - top[e / 2]);
  }
  sum_over_keys(w, [](float a, int) { return a; }, sum);
#pragma unroll
  for (int h = 0; h < 2; ++h) sum[h] = place.segment[h] < 0 ? 0.0f : 1.0f / sum[h];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) w[j][e] *= sum[e / 2];
  }
  if (call.options.focal != Focal::kNone) keep_focal(w, call.options.focal == Focal::kProb, place.keys);
}

}  // namespace itm
