// Attention filtration: one weight for each node x_i of a pair, through a batch normalisation, to the score of their sum.
//
//   l_i = w . x_i + b     z_i = (l_i - mean) / sqrt(var + eps)     y_i = gamma z_i + beta     a_i = sigmoid(y_i)
//   r = sum_i a_i x_i / (sum_i a_i + 1e-8)       f = l2norm(r)       score = sigmoid(w_e . f + b_e)
//   da_i = (dr . x_i - dr . r) / sum a      dy_i = a_i (1 - a_i) da_i      dx_i = a_i / sum a dr + dl_i w
//   dl_i = gamma / sqrt(var + eps) (dy_i - mean(dy) - z_i mean(dy z))      means over a caption's batch, else 0
//
// Owner: a warp a row of logits, and a warp a pair: its lanes share the columns, 8 a lane, and the sigmoids, a node a
// lane. In the backward a warp takes a run of pairs and adds up what they give the parameters in its own row of parts.
// No atomics; same bits every run. Read: the nodes of a pair once; in the backward twice again, from the caches.
// Never in memory: a, z, r and dr, made again in the backward from the logits. Nodes and accumulation: float32.
// The trick: the statistics' gradients are the sums of dy and dy z, so a pass over all images of a caption hands on two
// numbers a pair, and every pair's backward runs once.
#pragma once

#include "../common/node_tiles.h"
#include "../common/options.h"
#include "node_rows.cuh"
#include "octets.cuh"

namespace itm {

struct FiltrationCall {
  NodeRows at;
  int width, most;  // columns; nodes of a pair
  bool wide;
  const float* nodes;       // [rows, width]
  const float* logits;      // [rows]
  const float* statistics;  // [2, segments]: mean and biased variance
  const float *norm_weight, *norm_bias;
  float eps;
  const float* score_weight;  // [width]
  const float* score_bias;
  float* scores;        // [pairs]; backward: their gradient, read only
  const float* weight;  // [width], of the logits
  const float* means;   // [2, segments]: of dy and of dy z over a caption; null: they have no part
  float* slopes;        // [pairs, 2]: sums of dy and of dy z
  float* grad_nodes;    // [rows, width], or null: slopes alone
  float* sums;          // [runs, sums_stride]: of the gradients of weight, score_weight, bias, score_bias
  int64_t runs, sums_stride;
};

// 1 / (1 + e^-x) to the last place: gradients are small differences of what is made from it. One a node, so its time does
// not stand out.
__device__ __forceinline__ float sigmoid(float x) {
  return static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(x))));
}

__global__ void __launch_bounds__(kNodeThreads)
    node_logits_kernel(const float* nodes, const float* weight, const float* bias, int64_t count, int width, bool wide,
                       float* logits) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNodeWarps + threadIdx.x / 32;
  if (row >= count) return;
  float total = 0.0f;
  for (int c = kOctet * (threadIdx.x % 32); c < width; c += kWarpColumns) {
    const Octet<float> x = load_octet(nodes + row * width, c, width, wide), w = load_octet(weight, c, width, wide);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) total += x[i] * w[i];
  }
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) logits[row] = total + *bias;
}

// A pair in the hands of a warp.
struct Filtration {
  const FiltrationCall& call;
  const PairNodes nodes;
  const int64_t pair;
  const int lane = threadIdx.x % 32;
  const float rate;  // 1 / sqrt(var + eps)
  float total;       // sum of weights
  float norm;        // |r|
  float along;       // w_e . r
  // In shared memory, for the backward alone:
  float* const pooled;   // [width]: r
  float* const grad;     // [width]: dr
  float* const weights;  // [most]: a
  float* const of_node;  // [most]: dr . (x_i - r), and then dy

  __device__ Filtration(const FiltrationCall& call, int64_t pair, float* memory)
      : call(call),
        nodes(call.at, pair),
        pair(pair),
        rate(1.0f / sqrtf(call.statistics[call.at.segments + nodes.segment] + call.eps)),
        pooled(memory),
        grad(pooled + row_room(call.width)),
        weights(grad + row_room(call.width)),
        of_node(weights + call.most) {}

  __device__ __forceinline__ float normalised(int i) const {
    return (call.logits[nodes.row(i)] - call.statistics[nodes.segment]) * rate;
  }
  __device__ __forceinline__ float weight_of(int i) const {
    return sigmoid(normalised(i) * *call.norm_weight + *call.norm_bias);
  }
  __device__ __forceinline__ Octet<float> load(const float* row, int column) const {
    return load_octet(row, column, call.width, call.wide);
  }
  __device__ __forceinline__ const float* node(int i) const { return call.nodes + nodes.row(i) * call.width; }
  __device__ __forceinline__ float score() const { return sigmoid(along / (norm + kEps) + *call.score_bias); }

  // Weights and r, which stay in shared memory where they are kept, the length of r and its product with w_e.
  template <bool kKeeps>
  __device__ void pool() {
    float square = 0.0f, product = 0.0f;
    total = 0.0f;
    for (int first = 0; first < call.width; first += kWarpColumns) {
      const int c = first + kOctet * lane;
      float r[kOctet] = {};
      for (int base = 0; base < nodes.count; base += 32) {
        const float mine = base + lane < nodes.count ? weight_of(base + lane) : 0.0f;
        if (first == 0) total += mine;
        if (kKeeps && base + lane < nodes.count) weights[base + lane] = mine;
        const int n = min(32, nodes.count - base);
#pragma unroll 4
        for (int i = 0; i < n; ++i) {
          const float a = __shfl_sync(kWholeWarp, mine, i);
          const Octet<float> x = load(node(base + i), c);
#pragma unroll
          for (int e = 0; e < kOctet; ++e) r[e] += a * x[e];
        }
      }
      if (first == 0) total = warp_sum(total) + kEps;
      const float scale = 1.0f / total;
      const Octet<float> weight = load(call.score_weight, c);
#pragma unroll
      for (int e = 0; e < kOctet; ++e) {
        r[e] *= scale;
        square += r[e] * r[e];
        product += r[e] * weight[e];
      }
      if (kKeeps && c < call.width) store_octet(pooled, c, call.width, call.wide, r);
    }
    norm = sqrtf(warp_sum(square));
    along = warp_sum(product);
  }

  // dr from the gradient `of_logit` at w_e . f + b_e, and what that gives w_e and b_e.
  __device__ void pooled_backward(float of_logit, float* sums, bool first_of_run) const {
    // A direction that is not there has no gradient.
    const float inverse = 1.0f / (norm + kEps), scale = norm > 0.0f ? inverse : 0.0f;
    const float back = norm > 0.0f ? of_logit * along * inverse / norm : 0.0f;
    for (int c = kOctet * lane; c < call.width; c += kWarpColumns) {
      const Octet<float> r = load(pooled, c), weight = load(call.score_weight, c);
      float dr[kOctet], of_weight[kOctet];
#pragma unroll
      for (int e = 0; e < kOctet; ++e) {
        dr[e] = scale * (of_logit * weight[e] - back * r[e]);
        of_weight[e] = of_logit * inverse * r[e];
      }
      store_octet(grad, c, call.width, call.wide, dr);
      if (sums != nullptr) put_sums(sums + call.width, c, of_weight, first_of_run);
    }
    if (sums != nullptr && lane == 0) put_sum(sums + 2 * call.width + 1, of_logit, first_of_run);
    __syncwarp();
  }

  // Nodes may be much alike and dr all but orthogonal to them: what tells them apart is taken before the product, and
  // its mean, zero but for rounding, off after it.
  __device__ void weights_backward() const {
    constexpr int kAtOnce = 4;
    for (int i = 0; i < nodes.count; i += kAtOnce) {
      float product[kAtOnce] = {};
      for (int c = kOctet * lane; c < call.width; c += kWarpColumns) {
        const Octet<float> r = load(pooled, c), dr = load(grad, c);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const Octet<float> x = load(i + k < nodes.count ? node(i + k) : nullptr, c);
#pragma unroll
          for (int e = 0; e < kOctet; ++e) product[k] += dr[e] * (x[e] - r[e]);
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const float sum = warp_sum(product[k]);
        if (lane == 0 && i + k < nodes.count) of_node[i + k] = sum;
      }
    }
    __syncwarp();
    float back = 0.0f, of_shift = 0.0f, of_scale = 0.0f;
    for (int i = lane; i < nodes.count; i += 32) back += weights[i] * of_node[i] / total;
    back = warp_sum(back);
    for (int i = lane; i < nodes.count; i += 32) {
      const float a = weights[i], dy = a * (1.0f - a) * (of_node[i] - back) / total;
      of_node[i] = dy;
      of_shift += dy;
      of_scale += dy * normalised(i);
    }
    of_shift = warp_sum(of_shift);
    of_scale = warp_sum(of_scale);
    if (lane == 0) {
      call.slopes[2 * pair] = of_shift;
      call.slopes[2 * pair + 1] = of_scale;
    }
    __syncwarp();
  }

  // dl of the lane's node.
  __device__ __forceinline__ float grad_logit(int i) const {
    float dy = of_node[i];
    if (call.means != nullptr) {
      dy -= call.means[nodes.segment] + normalised(i) * call.means[call.at.segments + nodes.segment];
    }
    return *call.norm_weight * rate * dy;
  }

  __device__ void nodes_backward(float* sums, bool first_of_run) const {
    float of_bias = 0.0f;
    for (int i = lane; i < nodes.count; i += 32) of_bias += grad_logit(i);
    of_bias = warp_sum(of_bias);
    if (lane == 0) put_sum(sums + 2 * call.width, of_bias, first_of_run);
    for (int first = 0; first < call.width; first += kWarpColumns) {
      const int c = first + kOctet * lane;
      const bool inside = c < call.width;
      const Octet<float> dr = load(inside ? grad : nullptr, c), weight = load(call.weight, c);
      float of_weight[kOctet] = {}, dx[kOctet] = {};
      for (int base = 0; base < nodes.count; base += 32) {
        const bool mine = base + lane < nodes.count;
        const float my_share = mine ? weights[base + lane] / total : 0.0f;
        const float my_logit = mine ? grad_logit(base + lane) : 0.0f;
        const int n = min(32, nodes.count - base);
        for (int i = 0; i < n; ++i) {
          const float share = __shfl_sync(kWholeWarp, my_share, i), dl = __shfl_sync(kWholeWarp, my_logit, i);
          const Octet<float> x = load(node(base + i), c);
#pragma unroll
          for (int e = 0; e < kOctet; ++e) {
            dx[e] = share * dr[e] + dl * weight[e];
            of_weight[e] += dl * x[e];
          }
          store_octet(call.grad_nodes + nodes.row(base + i) * call.width, c, call.width, call.wide, dx);
        }
      }
#pragma unroll
      for (int e = 0; e < kOctet; ++e) dx[e] = 0.0f;
      for (int i = nodes.count; i < nodes.extent; ++i) {
        store_octet(call.grad_nodes + nodes.row(i) * call.width, c, call.width, call.wide, dx);
      }
      if (inside) put_sums(sums, c, of_weight, first_of_run);
    }
  }

  // The first pair of a run finds nothing there yet.
  __device__ __forceinline__ void put_sums(float* row, int c, const float (&x)[kOctet], bool first_of_run) const {
    if (first_of_run) {
      store_octet(row, c, call.width, call.wide, x);
    } else {
      add_octet(row, c, call.width, call.wide, x);
    }
  }
  static __device__ __forceinline__ void put_sum(float* sum, float x, bool first_of_run) {
    *sum = first_of_run ? x : *sum + x;
  }
};

__global__ void __launch_bounds__(kNodeThreads) filtrate_nodes_kernel(const FiltrationCall call) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kNodeWarps + threadIdx.x / 32;
  if (pair >= call.at.pairs) return;
  Filtration filtration(call, pair, nullptr);
  filtration.pool<false>();
  if (filtration.lane == 0) call.scores[pair] = filtration.score();
}

__global__ void __launch_bounds__(kNodeThreads, 2) filtrate_nodes_backward_kernel(const FiltrationCall call) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (number >= call.runs) return;
  float* memory = reinterpret_cast<float*>(shared_memory() + warp * filtration_bytes(call.most, call.width));
  float* sums = call.sums == nullptr ? nullptr : call.sums + number * call.sums_stride;
  const Run run(number, call.runs, call.at.pairs);
  for (int64_t pair = run.begin; pair < run.end; ++pair) {
    Filtration filtration(call, pair, memory);
    filtration.pool<true>();
    __syncwarp();
    const float score = filtration.score();
    const float of_logit = call.scores[pair] * score * (1.0f - score);
    filtration.pooled_backward(of_logit, sums, pair == run.begin);
    filtration.weights_backward();
    if (call.grad_nodes != nullptr) filtration.nodes_backward(sums, pair == run.begin);
    __syncwarp();
  }
}

}  // namespace itm
