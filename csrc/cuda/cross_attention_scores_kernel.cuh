// Some key groups against a span of query segments: products -> scores, and products -> their own gradient.
//
//   score[segment] = agg_q cos(q, c_q) + peak_weight agg_q max_k a_qk
//   cos = p / max(t sqrt(Q), eps),  p = sum_k a_k s_k,  Q = a^T G a,  t = ||q||
//
// Owner: a block of threads owns kGroups key groups and the segments that begin in its span of query rows, and walks them
// in tiles of whole segments; the warps of a group share the tile's chunks of 16 rows. Read: the products, twice forward
// and four times backward, after the first time from the first-level cache. Never in memory: weights, attended vectors.
// Accumulation: float32, every sum by one owner in one order, no atomics. The trick: norms over the queries are column
// sums, where neighbouring threads take neighbouring keys; everything else is row work in accumulator fragments, which
// are the tensor cores' left operand for G a as they stand.
#pragma once

#include "aggregate.cuh"
#include "attention_weights.cuh"
#include "tile_walk.cuh"

namespace itm {

template <class T, class Arithmetic, int kTiles, bool kBackward, int kKeys = 0>
struct ScoresOfTiles : TileWalk<T, Arithmetic, kTiles, kBackward, kKeys> {
  using Walk = TileWalk<T, Arithmetic, kTiles, kBackward, kKeys>;
  using Memory = typename Walk::Memory;
  using Walk::call, Walk::products, Walk::tile, Walk::first_group, Walk::groups, Walk::first_key, Walk::first_column;
  using Walk::for_each_column;
  using Walk::kGroups, Walk::kWarps, Walk::kThreads;
  using Walk::pick, Walk::keys_of, Walk::product_row, Walk::my_group, Walk::my_warp_of_group, Walk::begin_of;
  using Walk::segment, Walk::row, Walk::segments, Walk::rows;
  using Walk::Walk;

  __device__ void scale_columns() const {
    const bool softmax = call.feature.kind == NormKind::kSoftmax;
    for_each_column([&](int i, int begin, int queries, int column, int w) {
      const int key = pick(first_key, w) + column - pick(first_column, w);
      const ColumnScale scale = scale_of_column(
          call.feature, queries, [&](int q) { return to_float(products.at(product_row(begin + q), key)); });
      tile.scales[i * tile.columns + column] = scale.scale;
      if (softmax) tile.tops[i * tile.columns + column] = scale.top;
    });
  }

  __device__ ChunkPlace place_of(int w, int chunk) const {
    const int lane = threadIdx.x % 32;
    ChunkPlace place{};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = 16 * chunk + lane / 4 + 8 * h;
      place.query[h] = product_row(r);
      place.segment[h] = r < tile.rows ? tile.segment[r] : -1;
    }
    place.key = pick(first_key, w);
    place.keys = keys_of(w);
    place.tiles = (place.keys + 7) / 8;
    place.pairs = products.pairs && place.key % 2 == 0;
    return place;
  }

  __device__ void attend_chunk(const ChunkPlace& place, int w, float (&weights)[kTiles][4]) const {
    const int column = pick(first_column, w);
    attend(call, products, place, tile.scales + column, tile.tops + column, tile.columns, weights);
  }

  __device__ void image_of(const typename Arithmetic::template Image<kTiles>& image, const ChunkPlace& place, int w,
                           int j, float (&c)[4]) const {
    image.of(tile.gram + w * 8 * kTiles * Memory::kGramStride, Memory::kGramStride, j, place.tiles, c);
    if constexpr (Arithmetic::kScaled) {
      for (float& value : c) value *= tile.gram_scale[w];
    }
  }

  // Cosine (and peak) of every query of the tile with every group; backward keeps p and Q too.
  __device__ void cosines() const {
    const int w = my_group(), lane = threadIdx.x % 32;
    if (w >= groups) return;
    const bool with_peak = call.options.peak_weight != 0.0f;
    for (int chunk = my_warp_of_group(); 16 * chunk < rows; chunk += kWarps) {
      const ChunkPlace place = place_of(w, chunk);
      float weights[kTiles][4], dot[2] = {0.0f, 0.0f}, quadratic[2] = {0.0f, 0.0f}, peak[2] = {0.0f, 0.0f};
      attend_chunk(place, w, weights);
      const typename Arithmetic::template Image<kTiles> image(weights);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j >= place.tiles) break;
        float s[4], c[4];
        load_products(products, place, j, s);
        image_of(image, place, w, j, c);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dot[e / 2] += weights[j][e] * s[e];
          quadratic[e / 2] += weights[j][e] * c[e];
          peak[e / 2] = fmaxf(peak[e / 2], weights[j][e]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float p = quad_sum(dot[h]), q = fmaxf(quad_sum(quadratic[h]), 0.0f);
        const float largest = with_peak ? quad_max(peak[h]) : 0.0f;
        const int at = w * tile.rows + 16 * chunk + lane / 4 + 8 * h;
        if (lane % 4 != 0 || place.segment[h] < 0) continue;
        const float norms = call.query_norms[row - product_row(0) + place.query[h]] * sqrtf(q);
        tile.cosine[at] = p / (norms > kEps ? norms : kEps);
        tile.peak[at] = largest;
        if constexpr (kBackward) {
          tile.dot[at] = p;
          tile.quadratic[at] = q;
        }
      }
    }
  }

  __device__ int64_t score_at(int w, int i) const {
    return (first_group + w) * call.group_stride + (segment + i) * call.segment_stride;
  }

  __device__ void write_scores() const {
    const ScoreOptions& options = call.options;
    for (int item = threadIdx.x; item < segments * groups; item += kThreads) {
      const int i = item / groups, w = item % groups;
      const int n = call.queries.count(segment + i), at = w * tile.rows + begin_of(i);
      float score = aggregate(tile.cosine + at, n, options.aggregation, options.lambda_lse);
      if (options.peak_weight != 0.0f) {
        score += options.peak_weight * aggregate(tile.peak + at, n, options.aggregation, options.lambda_lse);
      }
      float& out = call.scores[score_at(w, i)];
      out = call.accumulate ? out + score : score;
    }
  }

  // From the gradients of the scores to those of every query's p, Q, norm and peak; zero on rows that are no query.
  __device__ void grad_cosines() const {
    const ScoreOptions& options = call.options;
    for (int item = threadIdx.x; item < segments * groups; item += kThreads) {
      const int i = item / groups, w = item % groups;
      const int n = call.queries.count(segment + i), at = w * tile.rows + begin_of(i);
      const float grad = call.scores_in[score_at(w, i)];
      aggregate_backward(tile.cosine + at, n, options.aggregation, options.lambda_lse, grad, tile.grad_norm + at);
      if (options.peak_weight != 0.0f) {
        aggregate_backward(tile.peak + at, n, options.aggregation, options.lambda_lse, grad * options.peak_weight,
                           tile.grad_peak + at);
      }
    }
    __syncthreads();
    for (int item = threadIdx.x; item < kGroups * tile.rows; item += kThreads) {
      const int r = item % tile.rows, w = item / tile.rows;
      if (tile.segment[r] < 0 || w >= groups) {
        tile.dot[item] = tile.quadratic[item] = tile.grad_norm[item] = tile.grad_peak[item] = 0.0f;
        continue;
      }
      const float norm = call.query_norms[row + r], q = tile.quadratic[item], norms = norm * sqrtf(q);
      const float grad = tile.grad_norm[item], cosine = tile.cosine[item], p = tile.dot[item];
      const bool on_floor = !(norms >= kEps);  // no gradient reaches the norms there
      const float grad_dot = grad / (on_floor ? kEps : norms);
      const float grad_quadratic = on_floor ? 0.0f : -0.5f * grad * cosine / q;
      // What the softmax takes off every key's gradient, sum_k a_k da_k; the cosine is not needed any more.
      float mean = grad_dot * p + 2.0f * grad_quadratic * q;
      if (options.peak_weight != 0.0f) mean += tile.grad_peak[item] * tile.peak[item];
      tile.cosine[item] = mean;
      tile.dot[item] = grad_dot;
      tile.quadratic[item] = grad_quadratic;
      tile.grad_norm[item] = on_floor ? 0.0f : -grad * cosine / norm;
    }
  }

  // Weights and gradients at the normalised features of the whole tile, to shared memory.
  __device__ void grad_weights() const {
    const int w = my_group(), lane = threadIdx.x % 32, t = lane % 4;
    if (w >= groups) return;
    const bool with_peak = call.options.peak_weight != 0.0f;
    const int column = pick(first_column, w);
    for (int chunk = my_warp_of_group(); 16 * chunk < rows; chunk += kWarps) {
      const ChunkPlace place = place_of(w, chunk);
      float weights[kTiles][4];
      attend_chunk(place, w, weights);
      const typename Arithmetic::template Image<kTiles> image(weights);
      int first_best[2] = {kTiles * 8, kTiles * 8};
      if (with_peak) first_of_peak(weights, w, chunk, first_best);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j >= place.tiles) break;
        float s[4], c[4];
        load_products(products, place, j, s);
        image_of(image, place, w, j, c);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int h = e / 2, k = 8 * j + 2 * t + e % 2, r = 16 * chunk + lane / 4 + 8 * h;
          if (k >= place.keys) continue;
          const int at = w * tile.rows + r;
          float grad = tile.dot[at] * s[e] + 2.0f * tile.quadratic[at] * c[e] - tile.cosine[at];
          if (k == first_best[h]) grad += tile.grad_peak[at];
          const bool query = place.segment[h] >= 0;
          tile.gradients[r * (tile.columns + 1) + column + k] =
              query ? weights[j][e] * grad * call.options.lambda_softmax : 0.0f;
        }
      }
#pragma unroll
      for (int j = 0; j < padded_keys(kTiles) / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = 16 * chunk + lane / 4 + 8 * (e / 2);
          tile.weights[r * Memory::kWeightStride + w * padded_keys(kTiles) + 8 * j + 2 * t + e % 2] =
              from_float<typename Memory::Weight>(j < kTiles ? weights[j % kTiles][e] : 0.0f);
        }
      }
    }
  }

  // The first arg-max takes the gradient of the peak. These weights are made anew: the compiler may round them otherwise
  // than those whose largest was kept, by a last bit or two.
  __device__ void first_of_peak(const float (&weights)[kTiles][4], int w, int chunk, int (&first)[2]) const {
    const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float peak = tile.peak[w * tile.rows + 16 * chunk + lane / 4 + 8 * h] * (1.0f - 4e-7f);
#pragma unroll
      for (int j = kTiles - 1; j >= 0; --j) {
#pragma unroll
        for (int e = 1; e >= 0; --e) {
          if (weights[j][2 * h + e] >= peak) first[h] = 8 * j + 2 * t + e;
        }
      }
      first[h] = min(first[h], __shfl_xor_sync(kWholeWarp, first[h], 1));
      first[h] = min(first[h], __shfl_xor_sync(kWholeWarp, first[h], 2));
    }
  }

  // dG of the groups, added to what this block has written before: tiles of 16 x 8 keys, dealt to the group's warps.
  __device__ void add_grad_gram() const {
    const int w = my_group(), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (w >= groups) return;
    const int keys = keys_of(w);
    float* out = grad_gram_of(w);
    const int across = (keys + 7) / 8, down = (keys + 15) / 16;
    for (int item = my_warp_of_group(); item < across * down; item += kWarps) {
      const int m = item / across, n = item % across;
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int first = 0; first < rows; first += 16) {
        Arithmetic::add_outer(tile.weights + w * padded_keys(kTiles), Memory::kWeightStride,
                              tile.quadratic + w * tile.rows, first, m, n, c);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int k = 16 * m + g + 8 * (e / 2), l = 8 * n + 2 * t + e % 2;
        if (k < keys && l < keys) out[k * call.most_keys + l] += c[e];
      }
    }
  }

  __device__ float* grad_gram_of(int w) const {
    const int64_t number = static_cast<int64_t>(blockIdx.y) * call.groups + first_group + w;
    return call.grad_gram + number * call.most_keys * call.most_keys;
  }

  __device__ void clear_grad_gram() const {
    const int64_t entries = static_cast<int64_t>(groups) * call.most_keys * call.most_keys;
    for (int64_t i = threadIdx.x; i < entries; i += kThreads) grad_gram_of(0)[i] = 0.0f;
  }

  // Back through the feature norm, column by column; what reaches a product through p is added on the way out.
  __device__ void write_grad_products() const {
    const bool softmax = call.feature.kind == NormKind::kSoftmax;
    for_each_column([&](int i, int begin, int queries, int column, int w) {
      const int k = column - pick(first_column, w);
      const int key = pick(first_key, w) + k;
      const int at = i * tile.columns + column;
      const ColumnScale scale{tile.scales[at], softmax ? tile.tops[at] : 0.0f};
      const float* gradients = tile.gradients + begin * (tile.columns + 1) + column;
      const typename Memory::Weight* weights =
          tile.weights + begin * Memory::kWeightStride + w * padded_keys(kTiles) + k;
      const float* grad_dot = tile.dot + w * tile.rows + begin;
      column_backward(
          call.feature, queries, scale, [&](int q) { return to_float(products.at(product_row(begin + q), key)); },
          [&](int q) { return gradients[q * (tile.columns + 1)]; },
          [&](int q, float grad) {
            put_grad(row + begin + q, key, grad + grad_dot[q] * to_float(weights[q * Memory::kWeightStride]));
          });
    });
  }

  __device__ void put_grad(int query, int key, float grad) const {
    if (call.addend.data) grad += to_float(call.addend.at(query, key));
    call.grad_products.at(query, key) = from_float<T>(grad);
  }

  // Rows and columns between groups of fewer members than their stride: read by the library products, so zero.
  __device__ void clear_padding() const {
    if (call.queries.counts) {
      for (int item = threadIdx.x; item < rows * first_column[kGroups]; item += kThreads) {
        const int r = item / first_column[kGroups], column = item % first_column[kGroups];
        if (tile.segment[r] >= 0) continue;
        int w = 0;
#pragma unroll
        for (int g = 1; g < kGroups; ++g) w += column >= first_column[g] ? 1 : 0;
        put_grad(row + r, pick(first_key, w) + column - pick(first_column, w), 0.0f);
      }
    }
    if (call.keys.counts) {
      for (int w = 0; w < groups; ++w) {
        const int keys = keys_of(w);
        const int padding = static_cast<int>(call.keys.stride) - keys;
        for (int item = threadIdx.x; item < rows * padding; item += kThreads) {
          put_grad(row + item / padding, pick(first_key, w) + keys + item % padding, 0.0f);
        }
      }
    }
  }

  __device__ void write_grad_norms() const {
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      float total = 0.0f;
      for (int w = 0; w < kGroups; ++w) total += tile.grad_norm[w * tile.rows + r];
      call.grad_norms[blockIdx.x * call.rows + row + r] = total;
    }
  }

  __device__ void run() {
    this->take_groups(static_cast<int>(blockIdx.x) * kGroups);
    const int begin = static_cast<int>(first_group_from(call.queries, call.segments, blockIdx.y * call.span));
    const int end = static_cast<int>(first_group_from(call.queries, call.segments, (blockIdx.y + 1) * call.span));
    this->load_gram();
    if constexpr (kBackward) clear_grad_gram();
    for (int first = begin; first < end; first += segments) {
      this->take_segments(first, end);
      scale_columns();
      __syncthreads();
      cosines();
      __syncthreads();
      if constexpr (kBackward) {
        grad_cosines();
        __syncthreads();
        grad_weights();
        __syncthreads();
        add_grad_gram();
        write_grad_norms();
        write_grad_products();
        clear_padding();
      } else {
        write_scores();
      }
      __syncthreads();  // the next tile overwrites what this one reads
    }
  }
};

// Blocks that share a multiprocessor: how far the compiler may go with registers.
constexpr int least_blocks(int tiles, int element_bytes, bool backward) {
  return tiles <= kFewTiles && (element_bytes == 2 || !backward) ? 2 : 1;
}

template <class T, class Arithmetic, int kTiles, bool kBackward>
__global__ void __launch_bounds__(32 * groups_of_block(kTiles) * warps_of_group(kTiles),
                                  least_blocks(kTiles, sizeof(T), kBackward))
    scores_of_tiles(const __grid_constant__ ScoresCall<T> call) {
  ScoresOfTiles<T, Arithmetic, kTiles, kBackward>(call, call.products, shared_memory()).run();
}

}  // namespace itm
