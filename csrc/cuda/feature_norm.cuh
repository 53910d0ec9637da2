// raw_feature_norm: what a key's products over the queries of one segment say of their scale, and the way back.
//
//   x = phi(s) or s      logit = lambda x / (norm_segment(x) + eps)      phi: LeakyReLU(0.1), the "clipped" norms
//   softmax: logit = lambda exp(s - top) / sum                           over the queries, temperature 1
//
// One thread a column (a key of one segment): neighbouring threads read neighbouring keys, sums run in the order of the
// queries in float32, nothing is shared. Backward of the l2 norms, d the gradient at x / (n + eps), n > 0:
//   dx = d / (n + eps) - x sum(d x) / (n (n + eps)^2)
// A key whose products are all zero has norm 0; its gradient here is 0, and its scale is written as 0.
#pragma once

#include "../common/options.h"
#include "words.h"

namespace itm {

enum class NormKind { kScale, kSoftmax, kPlain };

__host__ __device__ constexpr NormKind kind_of(FeatureNorm norm) {
  if (norm == FeatureNorm::kSoftmax) return NormKind::kSoftmax;
  return is_l1(norm) || is_l2(norm) ? NormKind::kScale : NormKind::kPlain;
}

// Two numbers a column: scale (0 for a norm of 0, 1 / sum for softmax) and top (softmax alone).
struct ColumnScale {
  float scale, top;
};

struct Feature {
  NormKind kind;
  float slope;  // of negative products: 0.1 for the clipped norms, else 1
  bool l1;

  __host__ __device__ static Feature of(FeatureNorm norm) {
    return {kind_of(norm), is_clipped(norm) ? kNegativeSlope : 1.0f, is_l1(norm)};
  }

  __device__ __forceinline__ float operator()(float s) const { return s > 0.0f ? s : s * slope; }
  __device__ __forceinline__ float slope_at(float s) const { return s > 0.0f ? 1.0f : slope; }
};

// `product(i)`: the product with query i of the segment.
template <class Product>
__device__ __forceinline__ ColumnScale scale_of_column(const Feature& feature, int queries, const Product& product) {
  if (feature.kind == NormKind::kScale) {
    float total = 0.0f;
    for (int i = 0; i < queries; ++i) {
      const float x = feature(product(i));
      total += feature.l1 ? fabsf(x) : x * x;
    }
    const float norm = feature.l1 ? total : sqrtf(total);
    // A NaN is no zero: it must reach the score.
    return {norm == 0.0f ? 0.0f : 1.0f / (norm + kEps), 0.0f};
  }
  if (feature.kind == NormKind::kSoftmax) {
    float top = -INFINITY, total = 0.0f;
    for (int i = 0; i < queries; ++i) top = fmaxf(top, product(i));
    for (int i = 0; i < queries; ++i) total += expf(product(i) - top);
    return {1.0f / total, top};
  }
  return {1.0f, 0.0f};
}

// A plain feature has scale 1, so that it and the norms are one line.
__device__ __forceinline__ float normalised(const Feature& feature, float s, const ColumnScale& column) {
  return (feature.kind == NormKind::kSoftmax ? expf(s - column.top) : feature(s)) * column.scale;
}

// Gradients at the normalised features, grad(i), to gradients at the products, put(i, gradient).
template <class Product, class Grad, class Put>
__device__ __forceinline__ void column_backward(const Feature& feature, int queries, const ColumnScale& column,
                                                const Product& product, const Grad& grad, const Put& put) {
  if (feature.kind == NormKind::kScale) {
    if (queries == 1) {  // x / (|x| + eps): the general line would subtract two numbers that differ by eps alone
      put(0, grad(0) * kEps * column.scale * column.scale * feature.slope_at(product(0)));
      return;
    }
    float along = 0.0f, total = 0.0f;
    for (int i = 0; i < queries; ++i) {
      const float x = feature(product(i));
      along += grad(i) * x;
      total += x * x;
    }
    const float divisor = feature.l1 ? 1.0f : sqrtf(total);
    const float pull = column.scale == 0.0f ? 0.0f : along * column.scale * column.scale / divisor;
    for (int i = 0; i < queries; ++i) {
      const float s = product(i), x = feature(s);
      const float direction = feature.l1 ? (x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f)) : x;
      put(i, (grad(i) * column.scale - direction * pull) * feature.slope_at(s));
    }
  } else if (feature.kind == NormKind::kSoftmax) {
    float mean = 0.0f;
    for (int i = 0; i < queries; ++i) mean += grad(i) * normalised(feature, product(i), column);
    for (int i = 0; i < queries; ++i) put(i, normalised(feature, product(i), column) * (grad(i) - mean));
  } else {
    for (int i = 0; i < queries; ++i) put(i, grad(i) * feature.slope_at(product(i)));
  }
}

}  // namespace itm
