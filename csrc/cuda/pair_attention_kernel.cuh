// Attention weights of the pairs of a block from its products, and the way back to the products and the temperatures.
//
//   x = phi(s)    n = x / (norm_segment(x) + eps)    a = softmax_k(t n)        phi: LeakyReLU(0.1)
//   da -> dl = a (da - sum_k a da)    dt = sum_k dl n    dn = t dl    dx = dn / (norm + eps) - n sum_q(dn n) / norm
//
// Products are [groups, keys, queries]. Owner: a block of threads has one pair, all keys of a group by the queries of
// one segment; within it four lanes share a key (norms, over its queries) or a query (softmax, over its keys). Read:
// every array once where the pair fits into shared memory, which then holds n and dn; a larger pair walks memory
// instead. Never in memory: logits and, as a rule, n and dn. Float32; sums run in one order, without atomics. The
// trick: norms run along one side of the pair and the softmax along the other, so both are done where the whole pair is
// at hand.
#pragma once

#include "../common/options.h"
#include "words.h"

namespace itm {

constexpr int kPairThreads = 128;
constexpr int kQuads = kPairThreads / 4;
// Of shared memory: what a block gets without asking, and four or more blocks share a multiprocessor.
constexpr int64_t kStagedBytes = 48 * 1024;

// Bytes of a pair; 0: it walks memory.
constexpr int64_t staged_bytes(int64_t keys, int64_t queries, bool backward) {
  const int64_t bytes = keys * queries * (backward ? 8 : 4);
  return bytes <= kStagedBytes ? bytes : 0;
}

struct AttentionCall {
  const float* products;  // [groups, most, queries]
  int64_t segments, queries;
  int most;
  const int64_t* key_counts;  // [groups]
  const int64_t* offsets;     // [segments + 1]
  const int64_t* counts;      // [segments]
  const float* temperatures;  // [groups, queries], or null: one number
  float temperature;
  float* norms;  // [groups, segments, most]
};

__device__ __forceinline__ float leaky(float s) { return s > 0.0f ? s : s * kNegativeSlope; }

// What a product is multiplied with: 0 for a norm of 0. A NaN stays one.
__device__ __forceinline__ float factor_of(float norm) { return norm == 0.0f ? 0.0f : 1.0f / (norm + kEps); }

// The pair of this block.
struct Pair {
  int64_t group, first;     // row of its first query
  int64_t corner;           // of products: key 0, first query
  const float* source;      // products from there on
  float* norms;             // [most]
  int keys, count, extent;  // that count; rows of the segment

  __device__ explicit Pair(const AttentionCall& call) {
    group = blockIdx.x / call.segments;
    const int64_t segment = blockIdx.x % call.segments, begin = call.offsets[segment];
    first = group * call.queries + begin;
    corner = group * call.most * call.queries + begin;
    source = call.products + corner;
    norms = call.norms + int64_t{blockIdx.x} * call.most;
    keys = static_cast<int>(call.key_counts[group]);
    count = static_cast<int>(call.counts[segment]);
    extent = static_cast<int>(call.offsets[segment + 1] - begin);
  }
};

// visit(i) for each of n keys or queries with all lanes of its quad; `inside` is false where a quad has none left.
template <class Visit>
__device__ __forceinline__ void for_each_quad(int n, const Visit& visit) {
  for (int base = 0; base < n; base += kQuads) {
    const int i = base + static_cast<int>(threadIdx.x) / 4;
    visit(i, i < n);
  }
}

// Softmax of a query over keys, n(k) its normalised products: largest logit and sum of powers.
struct Softmax {
  float top, total;

  template <class Normalised>
  __device__ __forceinline__ Softmax(int keys, float warmth, const Normalised& n) {
    const int t = threadIdx.x % 4;
    top = -INFINITY;
    for (int k = t; k < keys; k += 4) top = fmaxf(top, n(k) * warmth);
    top = quad_max(top);
    total = 0.0f;
    for (int k = t; k < keys; k += 4) total += expf(n(k) * warmth - top);
    total = quad_sum(total);
  }

  __device__ __forceinline__ float weight(float n, float warmth) const { return expf(n * warmth - top) / total; }
};

template <class T, bool kStaged>
__global__ void __launch_bounds__(kPairThreads, 8) attention_weights_kernel(const AttentionCall call, T* weights) {
  const Pair pair(call);
  const int lane = threadIdx.x % 4;
  float* tile = reinterpret_cast<float*>(shared_memory());
  if constexpr (kStaged) {
    for (int i = threadIdx.x; i < call.most * pair.extent; i += kPairThreads) {
      tile[i] = leaky(pair.source[i / pair.extent * call.queries + i % pair.extent]);
    }
    __syncthreads();
  }
  const auto feature = [&](int k, int q) {
    return kStaged ? tile[k * pair.extent + q] : leaky(pair.source[k * call.queries + q]);
  };
  for_each_quad(call.most, [&](int k, bool inside) {
    float square = 0.0f;
    for (int q = lane; inside && q < pair.count; q += 4) square += feature(k, q) * feature(k, q);
    const float norm = sqrtf(quad_sum(square)), factor = factor_of(norm);
    if (inside && lane == 0) pair.norms[k] = norm;
    for (int q = lane; kStaged && inside && q < pair.count; q += 4) tile[k * pair.extent + q] *= factor;
  });
  __syncthreads();
  for_each_quad(pair.extent, [&](int q, bool inside) {
    const bool counts = inside && q < pair.count;
    const int64_t row = pair.first + q;
    const float warmth = !counts ? 0.0f : call.temperatures != nullptr ? call.temperatures[row] : call.temperature;
    const auto n = [&](int k) { return feature(k, q) * (kStaged ? 1.0f : factor_of(pair.norms[k])); };
    const Softmax softmax(counts ? pair.keys : 0, warmth, n);
    for (int k = lane; inside && k < call.most; k += 4) {
      const float weight = counts && k < pair.keys ? softmax.weight(n(k), warmth) : 0.0f;
      weights[pair.corner + k * call.queries + q] = from_float<T>(weight);
    }
  });
}

struct AttentionGradients {
  float* of_weights;       // [groups, most, queries]; overwritten where the pair is not staged
  float* of_temperatures;  // [groups, queries]
};

template <class T, bool kStaged>
__global__ void __launch_bounds__(kPairThreads, 8)
    attention_weights_backward_kernel(const AttentionCall call, const AttentionGradients grads, T* of_products) {
  const Pair pair(call);
  const int lane = threadIdx.x % 4;
  float* tile = reinterpret_cast<float*>(shared_memory());
  // At the weights, then at n; where a query counts alone.
  float* grad = kStaged ? tile + call.most * pair.extent : grads.of_weights + pair.corner;
  const int64_t stride = kStaged ? pair.extent : call.queries;
  if constexpr (kStaged) {
    for (int i = threadIdx.x; i < call.most * pair.extent; i += kPairThreads) {
      const int k = i / pair.extent;
      const int64_t at = k * call.queries + i % pair.extent;
      tile[i] = leaky(pair.source[at]) * factor_of(pair.norms[k]);
      grad[i] = grads.of_weights[pair.corner + at];
    }
    __syncthreads();
  }
  const auto normalised = [&](int k, int q) {
    return kStaged ? tile[k * pair.extent + q] : leaky(pair.source[k * call.queries + q]) * factor_of(pair.norms[k]);
  };
  for_each_quad(pair.extent, [&](int q, bool inside) {
    const bool counts = inside && q < pair.count;
    const int64_t row = pair.first + q;
    const float warmth = !counts ? 0.0f : call.temperatures != nullptr ? call.temperatures[row] : call.temperature;
    const auto n = [&](int k) { return normalised(k, q); };
    const Softmax softmax(counts ? pair.keys : 0, warmth, n);
    float mean = 0.0f, of_temperature = 0.0f;
    for (int k = lane; counts && k < pair.keys; k += 4) mean += softmax.weight(n(k), warmth) * grad[k * stride + q];
    mean = quad_sum(mean);
    for (int k = lane; counts && k < call.most; k += 4) {
      float& at = grad[k * stride + q];
      const float pull = k < pair.keys ? softmax.weight(n(k), warmth) * (at - mean) : 0.0f;
      if (k < pair.keys) of_temperature += pull * n(k);
      at = pull * warmth;
    }
    of_temperature = quad_sum(of_temperature);
    if (inside && lane == 0) grads.of_temperatures[row] = of_temperature;
  });
  __syncthreads();
  for_each_quad(call.most, [&](int k, bool inside) {
    float along = 0.0f;
    for (int q = lane; inside && q < pair.count; q += 4) along += normalised(k, q) * grad[k * stride + q];
    along = quad_sum(along);
    if (!inside) return;
    // Without a norm there is no gradient: the true slope, 1 / eps, would swamp every other.
    const float norm = pair.norms[k], push = factor_of(norm), pull = norm == 0.0f ? 0.0f : along / norm;
    for (int q = lane; q < pair.extent; q += 4) {
      float of_product = 0.0f;
      if (q < pair.count) {
        const float n = normalised(k, q), dn = grad[k * stride + q];
        // Of a single query: the general line would subtract two numbers that differ by eps alone.
        of_product = pair.count == 1 ? dn * kEps * push * push : dn * push - n * pull;
        if (!(n > 0.0f)) of_product *= kNegativeSlope;
      }
      of_products[pair.corner + k * call.queries + q] = from_float<T>(of_product);
    }
  });
}

}  // namespace itm
