// One key group against all queries of a block: products -> scores, and products -> their own gradient.
//
//   score[segment] = agg_q cos(q, c_q) + peak_weight agg_q max_k a_kq
//   cos = p / max(t sqrt(Q), eps),  p = sum_k a_k s_k,  Q = a^T G a,  t = ||q||
//
// Owner: one thread owns a key group, walks its queries in tiles that stay in the first-level cache, and is the only
// one to touch the group's row of scores, its products and its dG: fixed order, no atomics, same bits every run.
// Read: the products once. Never in memory: weights, attended vectors. Accumulation: float32.
// No include guard: compiled once per instruction set.

#include "attention_tile.h"
#include "feature_norm.h"
#include "attention_weights.h"
#include "gram_form.h"
#include "aggregate.h"

// The segments of the next tile: as many as fit `width` lanes, at least one.
ITM_INLINE int64_t segments_that_fit(const int64_t* offsets, int64_t segments, int64_t width) {
  int64_t taken = 1;
  while (taken < segments && offsets[taken + 1] - offsets[0] <= width) ++taken;
  return taken;
}

template <bool kWithImage, class Scalar>
ITM_INLINE void attend_tile(Tile& tile, const KeyGroup<Scalar>& group, const ScoreOptions& options) {
  load_products(tile, group.products, group.stride);
  normalise(tile, options.feature_norm, options.lambda_softmax);
  attend(tile, options.focal);
  dot_and_peak(tile);
  quadratic_form<kWithImage>(tile, group.gram, group.gram_stride);
  const float* query_norms = group.query_norms + tile.offsets[0];
  for (int64_t l = 0; l < tile.lanes; ++l) {
    const float q = tile.quadratic[l] > 0.0f ? tile.quadratic[l] : 0.0f;
    const float norms = query_norms[l] * __builtin_sqrtf(q);
    tile.cosine[l] = tile.dot[l] / (norms > kEps ? norms : kEps);
  }
}

// tile_width and tile_segments bound what one tile holds; scratch has room for both.
template <class Scalar, class Visit>
ITM_INLINE void for_each_tile(const KeyGroup<Scalar>& group, const TileBounds& bounds, float* scratch, Visit visit) {
  for (int64_t s = 0; s < group.segments;) {
    const int64_t* offsets = group.offsets + s;
    const int64_t most = group.segments - s < bounds.segments ? group.segments - s : bounds.segments;
    const int64_t taken = segments_that_fit(offsets, most, bounds.width);
    const int64_t lanes = offsets[taken] - offsets[0];
    const int64_t width = (lanes + kLanes - 1) / kLanes * kLanes;
    Tile tile = carve(scratch, group.keys, width, taken);
    tile.keys = group.keys;
    tile.lanes = lanes;
    tile.width = width;
    tile.segments = taken;
    tile.offsets = offsets;
    visit(tile, s);
    s += taken;
  }
}

template <class Scalar>
void scores_of_group(const KeyGroup<Scalar>& group, const ScoreOptions& options, const TileBounds& bounds,
                     float* scores, int64_t score_stride, bool accumulate, float* scratch) {
  for_each_tile(group, bounds, scratch, [&](Tile& tile, int64_t first) {
    attend_tile<false>(tile, group, options);
    for (int64_t s = 0; s < tile.segments; ++s) {
      const int64_t begin = tile.begin(s), n = tile.count(s);
      float score = aggregate(tile.cosine + begin, n, options.aggregation, options.lambda_lse);
      if (options.peak_weight != 0.0f) {
        score += options.peak_weight * aggregate(tile.peak + begin, n, options.aggregation, options.lambda_lse);
      }
      float& out = scores[(first + s) * score_stride];
      out = accumulate ? out + score : score;
    }
  });
}

// Overwrites the group's products by their gradient, adds to nothing that another group owns.
template <class Scalar>
void scores_of_group_backward(const KeyGroup<Scalar>& group, const ScoreOptions& options, const TileBounds& bounds,
                              const float* grad_scores, int64_t score_stride, Scalar* grad_products, float* grad_gram,
                              float* grad_norms, float* scratch) {
  const bool with_peak = options.peak_weight != 0.0f;
  for (int64_t i = 0; i < group.keys; ++i) {
    for (int64_t j = 0; j < group.keys; ++j) grad_gram[i * group.gram_stride + j] = 0.0f;
  }
  for_each_tile(group, bounds, scratch, [&](Tile& tile, int64_t first) {
    attend_tile<true>(tile, group, options);
    for (int64_t s = 0; s < tile.segments; ++s) {
      const int64_t begin = tile.begin(s), n = tile.count(s);
      const float grad = grad_scores[(first + s) * score_stride];
      aggregate_backward(tile.cosine + begin, n, options.aggregation, options.lambda_lse, grad,
                         tile.grad_cosine + begin);
      if (with_peak) {
        aggregate_backward(tile.peak + begin, n, options.aggregation, options.lambda_lse, grad * options.peak_weight,
                           tile.grad_peak + begin);
      }
    }
    const float* query_norms = group.query_norms + tile.offsets[0];
    float* grad_query_norms = grad_norms + tile.offsets[0];
    for (int64_t l = 0; l < tile.lanes; ++l) {
      const float q = tile.quadratic[l] > 0.0f ? tile.quadratic[l] : 0.0f;
      const float norms = query_norms[l] * __builtin_sqrtf(q);
      const float grad = tile.grad_cosine[l];
      const bool on_floor = !(norms >= kEps);  // no gradient reaches the norms there
      tile.grad_dot[l] = grad / (on_floor ? kEps : norms);
      tile.grad_quadratic[l] = on_floor ? 0.0f : -0.5f * grad * tile.cosine[l] / q;
      grad_query_norms[l] = on_floor ? 0.0f : -grad * tile.cosine[l] / query_norms[l];
    }
    for (int64_t l = tile.lanes; l < tile.width; ++l) {
      tile.grad_dot[l] = tile.grad_quadratic[l] = tile.grad_peak[l] = 0.0f;
    }
    add_gram_gradient(tile, grad_gram, group.gram_stride);
    attend_backward(tile, options.lambda_softmax, with_peak);
    normalise_backward(tile, options.feature_norm);
    store_products(tile, tile.image, grad_products, group.stride);
  });
  mirror_gram(group.keys, grad_gram, group.gram_stride);
}

// Entry points of this instruction set.
ITM_INLINE int64_t tile_scratch(int64_t keys, const TileBounds& bounds, int64_t longest) {
  const int64_t lanes = bounds.width > longest ? bounds.width : longest;
  return scratch_floats(keys, (lanes + kLanes - 1) / kLanes * kLanes, bounds.segments);
}

template <class Scalar>
void run_forward(const ScoresCall<Scalar>& call) {
  run_groups(call, tile_scratch(call.most_keys, call.bounds, call.longest), [&](int64_t g, float* scratch) {
    scores_of_group(call.group(g), call.options, call.bounds, call.scores + g * call.group_stride, call.segment_stride,
                    call.accumulate, scratch);
  });
}

template <class Scalar>
void run_backward(const ScoresCall<Scalar>& call) {
  run_groups(call, tile_scratch(call.most_keys, call.bounds, call.longest), [&](int64_t g, float* scratch) {
    scores_of_group_backward(call.group(g), call.options, call.bounds, call.scores + g * call.group_stride,
                             call.segment_stride, call.grad_products + call.key_offsets[g] * call.lanes,
                             call.grad_gram + g * call.most_keys * call.most_keys, call.grad_norms + g * call.lanes,
                             scratch);
  });
}
