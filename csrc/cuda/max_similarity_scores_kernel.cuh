// Hard assignment on a GPU: products of a block, queries as rows and keys as columns -> scores and arg-max, and back.
//
//   z_q = max_k s_qk      score[segment] = agg_q z_q      dS[q, arg_q] = dagg/dz_q, zero elsewhere
//
// Owner: a block of threads owns 8 key groups and the segments that begin in its span of query rows, tile after tile of
// whole segments; a quad of lanes owns the maximum of a query in a group. Read: the products once (backward not at all,
// where the arg-max is kept and the aggregation is linear); written: a byte an entry forward, dS once backward, over the
// products. Accumulation: float32, one owner and one order for every sum, no atomics. dS is written whole, zeros with it,
// and two library products finish: gathering the one key that has a gradient reads 2 D bytes for 2 D operations, which
// takes a GPU longer than the 72 D operations of a dense product.
#pragma once

#include "../common/maxima_tiles.h"
#include "aggregate.cuh"
#include "scores_call.cuh"

namespace itm {

constexpr int kMaximaThreads = 256;

template <class T>
struct MaximaCall {
  Matrix<const T> products;
  Groups keys, queries;
  int64_t groups, segments, rows;
  Aggregation aggregation;
  float lambda;
  const float* scores_in;  // backward: gradient of the scores
  float* scores;           // forward: [groups, segments] by strides
  int64_t group_stride, segment_stride;
  int64_t span;
  int row_capacity;
  uint8_t* arg_max;  // [groups, queries] by a stride, or null
  int64_t arg_stride;
  bool arg_is_known;  // backward: arg_max was written by the forward
  bool needs_maxima;  // backward: the aggregation's gradient depends on them
  Matrix<T> grad_products;
};

template <class T, bool kBackward>
struct MaximaOfTiles {
  const MaximaCall<T>& call;
  int first_group, groups;
  int first_key[kMaximaGroups], keys[kMaximaGroups];
  // in shared memory, [groups, rows]
  float *maxima, *grad;
  int* arg;
  int* segment_of;  // [rows] segment of a row within the tile, or -1
  // the tile
  int segment, row, segments, rows;

  __device__ explicit MaximaOfTiles(const MaximaCall<T>& the_call) : call(the_call) {
    first_group = static_cast<int>(blockIdx.x) * kMaximaGroups;
    groups = min(static_cast<int>(call.groups) - first_group, kMaximaGroups);
#pragma unroll
    for (int w = 0; w < kMaximaGroups; ++w) {
      first_key[w] = w < groups ? static_cast<int>(call.keys.begin(first_group + w)) : 0;
      keys[w] = w < groups ? call.keys.count(first_group + w) : 0;
    }
    const int table = kMaximaGroups * call.row_capacity;
    maxima = reinterpret_cast<float*>(shared_memory());
    grad = maxima + table;
    arg = reinterpret_cast<int*>(grad + table);
    segment_of = arg + table;
  }

  __device__ void take_segments(int first, int end) {
    segment = first;
    segments = groups_that_fit(call.queries, first, end, call.row_capacity);
    row = static_cast<int>(call.queries.begin(first));
    rows = static_cast<int>(call.queries.begin(first + segments) - row);
    for (int r = threadIdx.x; r < rows; r += kMaximaThreads) segment_of[r] = -1;
    __syncthreads();
    for (int i = threadIdx.x / 32; i < segments; i += kMaximaThreads / 32) {
      const int begin = begin_of(i), n = call.queries.count(segment + i);
      for (int r = threadIdx.x % 32; r < n; r += 32) segment_of[begin + r] = i;
    }
    __syncthreads();
  }

  __device__ int begin_of(int i) const { return static_cast<int>(call.queries.begin(segment + i) - row); }

  // All lanes of a warp together: quads past the last item work on the last one.
  template <class Visit>
  __device__ void for_each_quad(const Visit& visit) const {
    const int items = rows * kMaximaGroups;
    for (int base = threadIdx.x / 32 * 8; base < items; base += kMaximaThreads / 4) {
      const int item = min(base + static_cast<int>(threadIdx.x % 32) / 4, items - 1);
      visit(item / kMaximaGroups, item % kMaximaGroups);
    }
  }

  template <class Array>
  __device__ static int pick(const Array& array, int w) {
    int value = array[0];
#pragma unroll
    for (int i = 1; i < kMaximaGroups; ++i) value = w == i ? array[i] : value;
    return value;
  }

  __device__ void find_maxima() const {
    for_each_quad([&](int r, int w) {
      const int n = pick(keys, w), t = threadIdx.x % 4;
      float best = -INFINITY;
      int key = 0;
      if (segment_of[r] >= 0) {
        const T* from = &call.products.at(row + r, pick(first_key, w));
        for (int k = t; k < n; k += 4) {
          const float s = to_float(from[k * call.products.key_stride]);
          if (k == t || beats(s, best)) {
            best = s;
            key = k;
          }
        }
      }
#pragma unroll
      for (int distance = 1; distance <= 2; distance *= 2) {
        const float other = __shfl_xor_sync(kWholeWarp, best, distance);
        const int other_key = __shfl_xor_sync(kWholeWarp, key, distance);
        const bool equal = other == best || (other != other && best != best);
        const bool there = (t ^ distance) < n;  // a lane without keys has nothing to offer
        if (there && (t >= n || beats(other, best) || (equal && other_key < key))) {
          best = other;
          key = other_key;
        }
      }
      if (t == 0 && n > 0) {
        maxima[w * call.row_capacity + r] = best;
        arg[w * call.row_capacity + r] = key;
      }
    });
  }

  // z of the kept arg-max: one product a query.
  __device__ void read_maxima() const {
    for (int item = threadIdx.x; item < rows * groups; item += kMaximaThreads) {
      const int r = item % rows, w = item / rows, n = pick(keys, w);
      if (segment_of[r] < 0) continue;
      // Never outside the group, whatever the arg-max was overwritten with.
      const int key = min(static_cast<int>(call.arg_max[(first_group + w) * call.arg_stride + row + r]), n - 1);
      arg[w * call.row_capacity + r] = key;
      if (call.needs_maxima) {
        maxima[w * call.row_capacity + r] = to_float(call.products.at(row + r, pick(first_key, w) + key));
      }
    }
  }

  template <class Visit>
  __device__ void for_each_score(const Visit& visit) const {
    for (int item = threadIdx.x; item < segments * groups; item += kMaximaThreads) {
      const int i = item / groups, w = item % groups;
      const int64_t at = (first_group + w) * call.group_stride + (segment + i) * call.segment_stride;
      visit(at, w * call.row_capacity + begin_of(i), call.queries.count(segment + i));
    }
  }

  __device__ void write_scores() const {
    for_each_score([&](int64_t at, int begin, int queries) {
      call.scores[at] = aggregate(maxima + begin, queries, call.aggregation, call.lambda);
    });
    if (call.arg_max == nullptr) return;
    for (int item = threadIdx.x; item < rows * groups; item += kMaximaThreads) {
      const int r = item % rows, w = item / rows;
      if (segment_of[r] < 0) continue;
      call.arg_max[(first_group + w) * call.arg_stride + row + r] =
          static_cast<uint8_t>(arg[w * call.row_capacity + r]);
    }
  }

  // Every element of the tile's rows: the gradient at the arg-max, zero elsewhere and in padding.
  __device__ void write_grad_products() const {
    for (int w = 0; w < groups; ++w) {
      const int begin = pick(first_key, w), n = pick(keys, w);
      const int all = call.keys.offsets ? n : static_cast<int>(call.keys.stride);
      for (int item = threadIdx.x; item < rows * all; item += kMaximaThreads) {
        const int r = item / all, k = item % all, at = w * call.row_capacity + r;
        const bool here = segment_of[r] >= 0 && k == arg[at];
        call.grad_products.at(row + r, begin + k) = from_float<T>(here ? grad[at] : 0.0f);
      }
    }
  }

  __device__ void run() {
    const int begin = static_cast<int>(first_group_from(call.queries, call.segments, blockIdx.y * call.span));
    const int end = static_cast<int>(first_group_from(call.queries, call.segments, (blockIdx.y + 1) * call.span));
    for (int first = begin; first < end; first += segments) {
      take_segments(first, end);
      if (kBackward && call.arg_is_known) {
        read_maxima();
      } else {
        find_maxima();
      }
      __syncthreads();
      if constexpr (kBackward) {
        for_each_score([&](int64_t at, int first_row, int queries) {
          aggregate_backward(maxima + first_row, queries, call.aggregation, call.lambda, call.scores_in[at],
                             grad + first_row);
        });
        __syncthreads();
        write_grad_products();
      } else {
        write_scores();
      }
      __syncthreads();  // the next tile overwrites what this one reads
    }
  }
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kMaximaThreads, 2) maxima_of_tiles(const __grid_constant__ MaximaCall<T> call) {
  MaximaOfTiles<T, kBackward>(call).run();
}

}  // namespace itm
