// The aggregation regulator: attention over the alignment vectors x_i of a pair, asked by its pooled vector; the mean.
//
//   K_i = D tanh(k_i + bk)    P = D tanh(p + bp)    w = softmax_i(v . (K_i P))    r = sum_i w_i x_i    out = l2norm(r)
//   dr = gradient before the norm     dw_i = dr . x_i     dx_i += w_i dr     dl_i = w_i (dw_i - sum_j w_j dw_j)
//   dK_i = dl_i v P        dP = v sum_i dl_i K_i        dv = P sum_i dl_i K_i        then through D and tanh
//
// D is dropout by counters (../common/philox.h): 0 or 1 / (1 - p). The value's bias moves no weight: no argument.
//
// Row g L + l is query l facing key group g, pair g S + s segment s of it. Owner: a block of threads has one pair; a
// warp has a row where a row is summed, a thread four channels where the rows are. Read: each array once, 16 bytes a
// thread. Never in memory: v P, masks (made again in the backward), dr. Float32 throughout, for over the queries of a
// pair nearly all of a gradient cancels; one order, no atomics. The trick: v P, and then dr, is one vector a pair in
// shared memory, so that a logit is an inner product of a row as it passes; and a chunk of four channels is one counter
// of the dropout.
#pragma once

#include "../common/philox.h"
#include "row_words.cuh"

namespace itm {

constexpr int kPoolThreads = 64;  // four channels each: the published 256
constexpr int kPoolWarps = kPoolThreads / 32;
constexpr int kChannels = 4;

// Of the one vector.
constexpr int64_t pool_bytes(int64_t width) { return (width + kChannels - 1) / kChannels * kChannels * 4; }

// Where masks come from.
struct PairDropout {
  int64_t first_group, first_segment, step;  // in the whole batch
  uint64_t seed;
  uint32_t threshold;  // of the upper 24 bits; 0: nothing is dropped
  float scale;
  bool groups_are_images;
};

struct PoolCall {
  const int64_t* offsets;  // [segments + 1]
  const int64_t* counts;   // [segments]
  int64_t segments, queries;
  int width;
  PairDropout dropout;
  const float* vectors;                        // [rows, width]
  float* keys;                                 // [rows, width]: k, then tanh(k + bk)
  float* asked;                                // [pairs, width]: p, then tanh(p + bp)
  const float *key_bias, *asked_bias, *value;  // [width]
  float* weights;                              // [rows]
  float* pooled;                               // [pairs, width]
  float* norms;                                // [pairs]
};

// The pair of this block.
struct PooledPair {
  int64_t pair, group, segment, first;
  int count, extent;

  template <class Call>
  __device__ PooledPair(const Call& call, int64_t pair)
      : pair(pair), group(pair / call.segments), segment(pair % call.segments) {
    const int64_t begin = call.offsets[segment];
    first = group * call.queries + begin;
    count = static_cast<int>(call.counts[segment]);
    extent = static_cast<int>(call.offsets[segment + 1] - begin);
  }
};

// 0 or 1 / (1 - p) times x, for the four channels from `channel` on.
__device__ __forceinline__ void drop(const PairDropout& dropout, const PooledPair& pair, int query,
                                     DropoutBranch branch, int channel, float (&x)[kChannels]) {
  if (dropout.threshold == 0) return;
  const int64_t group = dropout.first_group + pair.group, segment = dropout.first_segment + pair.segment;
  const int64_t image = dropout.groups_are_images ? group : segment;
  const int64_t caption = dropout.groups_are_images ? segment : group;
  const auto counter = dropout_counter(image, caption, query, dropout.step, branch, channel / kChannels);
  const PhiloxWords words = philox(counter, dropout.seed);
  x[0] *= (words.a >> 8) >= dropout.threshold ? dropout.scale : 0.0f;
  x[1] *= (words.b >> 8) >= dropout.threshold ? dropout.scale : 0.0f;
  x[2] *= (words.c >> 8) >= dropout.threshold ? dropout.scale : 0.0f;
  x[3] *= (words.d >> 8) >= dropout.threshold ? dropout.scale : 0.0f;
}

// visit(first channel, how many are left) for the chunks of one of kTeam threads.
template <int kTeam, class Visit>
__device__ __forceinline__ void for_each_chunk(int width, int thread, const Visit& visit) {
  for (int channel = kChannels * thread; channel < width; channel += kChannels * kTeam) visit(channel, width - channel);
}

__device__ __forceinline__ float4& chunk_of(float* shared, int channel) {
  return *reinterpret_cast<float4*>(shared + channel);
}

template <bool kWide>
__global__ void __launch_bounds__(kPoolThreads) pool_rows_kernel(const PoolCall call) {
  __shared__ float parts[kPoolWarps];
  float* vector = reinterpret_cast<float*>(shared_memory());  // v P, then r
  const PooledPair pair(call, blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = call.width;
  float* asked = call.asked + pair.pair * width;
  for_each_chunk<kPoolThreads>(width, threadIdx.x, [&](int channel, int left) {
    float p[kChannels], b[kChannels], v[kChannels];
    load<kWide>(asked + channel, left, p);
    load<kWide>(call.asked_bias + channel, left, b);
    load<kWide>(call.value + channel, left, v);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      p[i] = tanhf(p[i] + b[i]);
      v[i] *= p[i];
    }
    store<kWide>(asked + channel, left, p);
    drop(call.dropout, pair, 0, DropoutBranch::kPooled, channel, v);
    chunk_of(vector, channel) = make_float4(v[0], v[1], v[2], v[3]);
  });
  __syncthreads();
  float* weights = call.weights + pair.first;  // logits at first
  for (int q = warp; q < pair.count; q += kPoolWarps) {
    float* key = call.keys + (pair.first + q) * width;
    float logit = 0.0f;
    for_each_chunk<32>(width, lane, [&](int channel, int left) {
      float t[kChannels], b[kChannels];
      load<kWide>(key + channel, left, t);
      load<kWide>(call.key_bias + channel, left, b);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) t[i] = tanhf(t[i] + b[i]);
      store<kWide>(key + channel, left, t);
      drop(call.dropout, pair, q, DropoutBranch::kKeys, channel, t);
      const float4 asks = chunk_of(vector, channel);
      logit += t[0] * asks.x + t[1] * asks.y + t[2] * asks.z + t[3] * asks.w;
    });
    logit = warp_sum(logit);
    if (lane == 0) weights[q] = logit;
  }
  __syncthreads();
  float top = -INFINITY, total = 0.0f;
  for (int q = lane; q < pair.count; q += 32) top = fmaxf(top, weights[q]);
  top = warp_max(top);
  for (int q = lane; q < pair.count; q += 32) total += expf(weights[q] - top);
  total = warp_sum(total);
  __syncthreads();
  for (int q = threadIdx.x; q < pair.count; q += kPoolThreads) weights[q] = expf(weights[q] - top) / total;
  __syncthreads();
  float square = 0.0f;
  for_each_chunk<kPoolThreads>(width, threadIdx.x, [&](int channel, int left) {
    float r[kChannels] = {};
    for (int q = 0; q < pair.count; ++q) {
      float x[kChannels];
      load<kWide>(call.vectors + (pair.first + q) * width + channel, left, x);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) r[i] += weights[q] * x[i];
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) square += r[i] * r[i];
    chunk_of(vector, channel) = make_float4(r[0], r[1], r[2], r[3]);
  });
  const float norm = sqrtf(block_sum(square, parts)), length = norm + kEps, scale = 1.0f / length;
  for_each_chunk<kPoolThreads>(width, threadIdx.x, [&](int channel, int left) {
    const float4 r = chunk_of(vector, channel);
    const float out[kChannels] = {quotient(r.x, length, scale), quotient(r.y, length, scale),
                                  quotient(r.z, length, scale), quotient(r.w, length, scale)};
    store<kWide>(call.pooled + pair.pair * width + channel, left, out);
  });
  if (threadIdx.x == 0) call.norms[pair.pair] = norm;
}

struct PoolGradients {
  const float* pooled;          // [pairs, width]
  float* weights;               // [rows], to work in
  float* vectors;               // [rows, width], added to
  float *asked, *bias, *value;  // [pairs, width]; of p, and what the pair adds to the others
};

// Rows of the padding get a zero in `grad_keys`, which may be the keys: products read every row.
template <class T, bool kWide>
__global__ void __launch_bounds__(kPoolThreads)
    pool_rows_backward_kernel(const PoolCall call, const PoolGradients grads, T* grad_keys) {
  __shared__ float parts[kPoolWarps];
  float* vector = reinterpret_cast<float*>(shared_memory());  // dr
  const PooledPair pair(call, blockIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = call.width;
  const int64_t at = pair.pair * width;
  float along = 0.0f;
  for_each_chunk<kPoolThreads>(width, threadIdx.x, [&](int channel, int left) {
    float out[kChannels], d[kChannels];
    load<kWide>(call.pooled + at + channel, left, out);
    load<kWide>(grads.pooled + at + channel, left, d);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) along += out[i] * d[i];
  });
  along = block_sum(along, parts);
  const float norm = call.norms[pair.pair], scale = norm == 0.0f ? 0.0f : 1.0f / (norm + kEps);
  const float pull = norm == 0.0f ? 0.0f : along * (norm + kEps) / norm;
  for_each_chunk<kPoolThreads>(width, threadIdx.x, [&](int channel, int left) {
    float out[kChannels], d[kChannels];
    load<kWide>(call.pooled + at + channel, left, out);
    load<kWide>(grads.pooled + at + channel, left, d);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) d[i] = (d[i] - out[i] * pull) * scale;
    chunk_of(vector, channel) = make_float4(d[0], d[1], d[2], d[3]);
  });
  __syncthreads();
  const float* weights = call.weights + pair.first;
  float* grad_weights = grads.weights + pair.first;
  for (int q = warp; q < pair.count; q += kPoolWarps) {
    const int64_t row = (pair.first + q) * width;
    float dw = 0.0f;
    for_each_chunk<32>(width, lane, [&](int channel, int left) {
      float x[kChannels], dx[kChannels];
      load<kWide>(call.vectors + row + channel, left, x);
      load<kWide>(grads.vectors + row + channel, left, dx);
      const float4 dr = chunk_of(vector, channel);
      dw += dr.x * x[0] + dr.y * x[1] + dr.z * x[2] + dr.w * x[3];
      const float added[kChannels] = {dx[0] + weights[q] * dr.x, dx[1] + weights[q] * dr.y, dx[2] + weights[q] * dr.z,
                                      dx[3] + weights[q] * dr.w};
      store<kWide>(grads.vectors + row + channel, left, added);
    });
    dw = warp_sum(dw);
    if (lane == 0) grad_weights[q] = dw;
  }
  __syncthreads();
  float mean = 0.0f;
  for (int q = lane; q < pair.count; q += 32) mean += weights[q] * grad_weights[q];
  mean = warp_sum(mean);
  for_each_chunk<kPoolThreads>(width, threadIdx.x, [&](int channel, int left) {
    float p[kChannels], v[kChannels], kept[kChannels], total[kChannels] = {}, of_bias[kChannels] = {};
    load<kWide>(call.asked + at + channel, left, p);
    load<kWide>(call.value + channel, left, v);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) kept[i] = 1.0f;
    drop(call.dropout, pair, 0, DropoutBranch::kPooled, channel, kept);
    for (int q = 0; q < pair.extent; ++q) {
      const int64_t row = (pair.first + q) * width + channel;
      float dk[kChannels] = {};
      if (q < pair.count) {
        float t[kChannels];
        load<kWide>(call.keys + row, left, t);
        const float of_logit = weights[q] * (grad_weights[q] - mean);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) dk[i] = of_logit;
        drop(call.dropout, pair, q, DropoutBranch::kKeys, channel, dk);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          total[i] += dk[i] * t[i];
          dk[i] *= v[i] * p[i] * kept[i] * (1.0f - t[i] * t[i]);
          of_bias[i] += dk[i];
        }
      }
      store<kWide>(grad_keys + row, left, dk);
    }
    store<kWide>(grads.bias + at + channel, left, of_bias);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      total[i] *= kept[i];
      v[i] *= total[i] * (1.0f - p[i] * p[i]);
      total[i] *= p[i];
    }
    store<kWide>(grads.value + at + channel, left, total);
    store<kWide>(grads.asked + at + channel, left, v);
  });
}

struct MeanCall {
  const int64_t* offsets;
  const int64_t* counts;
  int64_t pairs, segments, queries;
  int width;
};

// visit(rows of the pair, element of [pairs, width], its channel) with one thread an element.
template <class Visit>
__device__ __forceinline__ void for_channel_of_pair(const MeanCall& call, const Visit& visit) {
  const int64_t at = int64_t{blockIdx.x} * kColumnThreads + threadIdx.x;
  if (at < call.pairs * call.width) visit(PooledPair(call, at / call.width), at, at % call.width);
}

__global__ void __launch_bounds__(kColumnThreads)
    mean_rows_kernel(const MeanCall call, const float* vectors, float* means) {
  for_channel_of_pair(call, [&](const PooledPair& pair, int64_t at, int64_t channel) {
    float total = 0.0f;
    for (int q = 0; q < pair.count; ++q) total += vectors[(pair.first + q) * call.width + channel];
    means[at] = total / static_cast<float>(pair.count);
  });
}

// Added to the gradient of the rows.
__global__ void __launch_bounds__(kColumnThreads)
    mean_rows_backward_kernel(const MeanCall call, const float* grad_means, float* grad_vectors) {
  for_channel_of_pair(call, [&](const PooledPair& pair, int64_t at, int64_t channel) {
    const float share = grad_means[at] / static_cast<float>(pair.count);
    for (int q = 0; q < pair.count; ++q) grad_vectors[(pair.first + q) * call.width + channel] += share;
  });
}

}  // namespace itm
