// The same scores for key groups and segments of any size: the plain path that the tiles fall back to.
//
// Formula, owner of sums and determinism are those of cross_attention_scores_kernel.cuh. Owner: one block of threads a
// key group; it takes the segments one after another and their queries one after another, all threads over the keys.
// What does not fit on chip (backward: weights and gradients of a segment) is kept in `scratch`, two float32 numbers a
// product. Everything is float32 arithmetic, no tensor cores: correct at any size, not meant to be fast.
#pragma once

#include "aggregate.cuh"
#include "scores_call.cuh"

namespace itm {

constexpr int kWideThreads = 128;

template <class T, bool kBackward>
struct WideScores {
  const ScoresCall<T>& call;
  float* scratch;  // [2, rows, keys of all groups]
  int64_t group, key, all_keys;
  int keys;
  int64_t most_queries;
  // in shared memory
  float *scales, *tops, *weights;                             // [most_keys]
  float *dot, *quadratic, *cosine, *peak, *grad, *grad_peak;  // [most_queries]
  float* partial;                                             // [warps]
  // the segment
  int64_t segment, row;
  int queries;

  __device__ WideScores(const ScoresCall<T>& the_call, float* the_scratch, int64_t keys_of_all)
      : call(the_call), scratch(the_scratch), group(blockIdx.x), all_keys(keys_of_all) {
    key = call.keys.begin(group);
    keys = call.keys.count(group);
    most_queries = call.queries.stride;
    scales = reinterpret_cast<float*>(shared_memory());
    tops = scales + call.most_keys;
    weights = tops + call.most_keys;
    dot = weights + call.most_keys;
    quadratic = dot + most_queries;
    cosine = quadratic + most_queries;
    peak = cosine + most_queries;
    grad = peak + most_queries;
    grad_peak = grad + most_queries;
    partial = grad_peak + most_queries;
  }

  template <class Term>
  __device__ float sum_over_keys(const Term& term) const {
    float total = 0.0f;
    for (int k = threadIdx.x; k < keys; k += kWideThreads) total += term(k);
    total = warp_sum(total);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
    __syncthreads();
    return (partial[0] + partial[1]) + (partial[2] + partial[3]);
  }

  template <class Term>
  __device__ float largest_over_keys(const Term& term) const {
    float best = -INFINITY;
    for (int k = threadIdx.x; k < keys; k += kWideThreads) best = fmaxf(best, term(k));
    best = warp_max(best);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = best;
    __syncthreads();
    return fmaxf(fmaxf(partial[0], partial[1]), fmaxf(partial[2], partial[3]));
  }

  __device__ float product(int q, int k) const { return to_float(call.products.at(row + q, key + k)); }
  __device__ float image(int k) const {
    const float* gram = call.gram + (group * call.most_keys + k) * call.most_keys;
    float total = 0.0f;
    for (int j = 0; j < keys; ++j) total += gram[j] * weights[j];
    return total;
  }

  __device__ void attend(int q) const {
    const auto logit = [&](int k) {
      return call.options.lambda_softmax * normalised(call.feature, product(q, k), {scales[k], tops[k]});
    };
    float top = largest_over_keys(logit);
    if (top == -INFINITY) top = 0.0f;  // nothing but NaN
    for (int k = threadIdx.x; k < keys; k += kWideThreads) weights[k] = expf(logit(k) - top);
    const float scale = 1.0f / sum_over_keys([&](int k) { return weights[k]; });
    for (int k = threadIdx.x; k < keys; k += kWideThreads) weights[k] *= scale;
    if (call.options.focal != Focal::kNone) keep_focal(call.options.focal == Focal::kProb);
    __syncthreads();
  }

  __device__ void keep_focal(bool prob) const {
    const float factor = prob ? sum_over_keys([&](int k) { return sqrtf(weights[k]); }) : static_cast<float>(keys);
    const float threshold = sum_over_keys([&](int k) { return prob ? weights[k] * sqrtf(weights[k]) : weights[k]; });
    const auto kept = [&](int k) { return weights[k] * factor - threshold > 0.0f ? weights[k] : 0.0f; };
    const float total = sum_over_keys(kept);
    if (total == 0.0f) return;  // no key passed
    for (int k = threadIdx.x; k < keys; k += kWideThreads) weights[k] = kept(k) / total;
  }

  __device__ void cosine_of(int q) const {
    attend(q);
    const float p = sum_over_keys([&](int k) { return weights[k] * product(q, k); });
    const float form = fmaxf(sum_over_keys([&](int k) { return weights[k] * image(k); }), 0.0f);
    const float largest = largest_over_keys([&](int k) { return weights[k]; });
    if (threadIdx.x == 0) {
      const float norms = call.query_norms[row + q] * sqrtf(form);
      dot[q] = p;
      quadratic[q] = form;
      cosine[q] = p / (norms > kEps ? norms : kEps);
      peak[q] = largest;
    }
  }

  __device__ void take_segment(int64_t s) {
    segment = s;
    row = call.queries.begin(s);
    queries = call.queries.count(s);
    __syncthreads();  // the last segment's tables are done with
    for (int k = threadIdx.x; k < keys; k += kWideThreads) {
      const ColumnScale scale = scale_of_column(call.feature, queries, [&](int q) { return product(q, k); });
      scales[k] = scale.scale;
      tops[k] = scale.top;
    }
    __syncthreads();
    for (int q = 0; q < queries; ++q) cosine_of(q);
    __syncthreads();
  }

  __device__ void write_score() const {
    if (threadIdx.x != 0) return;
    const ScoreOptions& options = call.options;
    float score = aggregate(cosine, queries, options.aggregation, options.lambda_lse);
    if (options.peak_weight != 0.0f) {
      score += options.peak_weight * aggregate(peak, queries, options.aggregation, options.lambda_lse);
    }
    float& out = call.scores[group * call.group_stride + segment * call.segment_stride];
    out = call.accumulate ? out + score : score;
  }

  __device__ void grad_cosines() const {
    const ScoreOptions& options = call.options;
    if (threadIdx.x == 0) {
      const float of_score = call.scores_in[group * call.group_stride + segment * call.segment_stride];
      aggregate_backward(cosine, queries, options.aggregation, options.lambda_lse, of_score, grad);
      if (options.peak_weight != 0.0f) {
        aggregate_backward(peak, queries, options.aggregation, options.lambda_lse, of_score * options.peak_weight,
                           grad_peak);
      }
    }
    __syncthreads();
    for (int q = threadIdx.x; q < queries; q += kWideThreads) {
      const float norm = call.query_norms[row + q], norms = norm * sqrtf(quadratic[q]);
      const bool on_floor = !(norms >= kEps);  // no gradient reaches the norms there
      const float grad_dot = grad[q] / (on_floor ? kEps : norms);
      const float grad_quadratic = on_floor ? 0.0f : -0.5f * grad[q] * cosine[q] / quadratic[q];
      call.grad_norms[group * call.rows + row + q] = on_floor ? 0.0f : -grad[q] * cosine[q] / norm;
      float mean = grad_dot * dot[q] + 2.0f * grad_quadratic * quadratic[q];
      if (options.peak_weight != 0.0f) mean += grad_peak[q] * peak[q];
      grad[q] = mean;
      dot[q] = grad_dot;
      quadratic[q] = grad_quadratic;
    }
    __syncthreads();
  }

  __device__ int64_t at(int q, int k) const { return (row + q) * all_keys + key + k; }

  __device__ void grad_weights(int q) const {
    attend(q);
    int first = keys;
    if (call.options.peak_weight != 0.0f) {  // the first arg-max takes the gradient of the peak
      const float top = largest_over_keys([&](int k) { return weights[k]; });
      const float nearest =
          largest_over_keys([&](int k) { return weights[k] == top ? -static_cast<float>(k) : -INFINITY; });
      if (nearest != -INFINITY) first = static_cast<int>(-nearest);
    }
    for (int k = threadIdx.x; k < keys; k += kWideThreads) {
      float value = dot[q] * product(q, k) + 2.0f * quadratic[q] * image(k) - grad[q];
      if (k == first) value += grad_peak[q];
      scratch[at(q, k)] = weights[k] * value * call.options.lambda_softmax;
      scratch[call.rows * all_keys + at(q, k)] = dot[q] * weights[k];
    }
    float* out = call.grad_gram + group * call.most_keys * call.most_keys;
    for (int64_t item = threadIdx.x; item < static_cast<int64_t>(keys) * keys; item += kWideThreads) {
      const int64_t k = item / keys, l = item % keys;
      out[k * call.most_keys + l] += quadratic[q] * weights[k] * weights[l];
    }
  }

  __device__ void put_grad(int64_t query, int64_t column, float value) const {
    if (call.addend.data) value += to_float(call.addend.at(query, column));
    call.grad_products.at(query, column) = from_float<T>(value);
  }

  __device__ void write_grad_products() const {
    for (int k = threadIdx.x; k < keys; k += kWideThreads) {
      column_backward(
          call.feature, queries, {scales[k], tops[k]}, [&](int q) { return product(q, k); },
          [&](int q) { return scratch[at(q, k)]; },
          [&](int q, float value) { put_grad(row + q, key + k, value + scratch[call.rows * all_keys + at(q, k)]); });
    }
    // Rows and columns of padding: read by the library products, so zero.
    const int64_t end = call.queries.begin(segment + 1);
    const int64_t key_end = call.keys.begin(group + 1);
    for (int64_t q = row; q < end; ++q) {
      const int64_t from = q < row + queries ? key + keys : key;
      for (int64_t k = from + threadIdx.x; k < key_end; k += kWideThreads) put_grad(q, k, 0.0f);
    }
    for (int64_t q = row + queries + threadIdx.x; q < end; q += kWideThreads) {
      call.grad_norms[group * call.rows + q] = 0.0f;
    }
  }

  __device__ void run() {
    if constexpr (kBackward) {
      float* out = call.grad_gram + group * call.most_keys * call.most_keys;
      for (int64_t i = threadIdx.x; i < static_cast<int64_t>(call.most_keys) * call.most_keys; i += kWideThreads) {
        out[i] = 0.0f;
      }
    }
    for (int64_t s = kBackward ? 0 : blockIdx.y; s < call.segments; s += kBackward ? 1 : gridDim.y) {
      take_segment(s);
      if constexpr (kBackward) {
        grad_cosines();
        for (int q = 0; q < queries; ++q) grad_weights(q);
        __syncthreads();
        write_grad_products();
      } else {
        write_score();
      }
    }
  }
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kWideThreads, 4)
    scores_of_wide_groups(const __grid_constant__ ScoresCall<T> call, float* scratch, int64_t all_keys) {
  WideScores<T, kBackward>(call, scratch, all_keys).run();
}

}  // namespace itm
