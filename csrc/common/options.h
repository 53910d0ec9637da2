// The options of the score ops as the kernels see them. The numbers are the order of the names in
// itm_kernels/ops/options.py, which is where they are spelt out; tests hold the two together.
#pragma once

#include <cstdint>

namespace itm {

enum class FeatureNorm : int64_t { kSoftmax, kL2, kClippedL2, kL1, kClippedL1, kClipped, kNone };
enum class Aggregation : int64_t { kLogSumExp, kMax, kSum, kMean, kSoftmax };  // kSoftmax: of maxima alone
enum class Focal : int64_t { kNone, kEqual, kProb };

struct ScoreOptions {
  FeatureNorm feature_norm;
  Focal focal;
  Aggregation aggregation;
  float lambda_softmax;
  float lambda_lse;
  float peak_weight;
};

constexpr float kEps = 1e-8f;           // added to a norm; floor of the product of two norms
constexpr float kNegativeSlope = 0.1f;  // LeakyReLU of the clipped norms

constexpr bool is_clipped(FeatureNorm norm) {
  return norm == FeatureNorm::kClippedL2 || norm == FeatureNorm::kClippedL1 || norm == FeatureNorm::kClipped;
}
constexpr bool is_l2(FeatureNorm norm) { return norm == FeatureNorm::kL2 || norm == FeatureNorm::kClippedL2; }
constexpr bool is_l1(FeatureNorm norm) { return norm == FeatureNorm::kL1 || norm == FeatureNorm::kClippedL1; }

}  // namespace itm
