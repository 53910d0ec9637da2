// Alignment vectors on the CPU: everything between the library products of a chunk, and back.
//
//   products [G, K, L] -> weights a            logits: clipped l2 norm over the queries of a segment, times temperature
//   attended c = a^T keys, queries q -> (q - l2norm(c))^2           rows y -> l2norm(y + b)
//
// Owner: one thread a tile of whole segments of one key group (attention), one row (the rest), one query with its rows
// of all groups (where their gradients add up). No atomics; same bits every run.
// Read: each array once, a row twice, the second time from the first-level cache. Never in memory: logits, l2norm(c).
// Accumulation: float32, whatever the storage; products and their gradients, of which norm and softmax take nearly all
// away again, and alignment vectors for the pooling come in float32 as well.
// The trick: the norm of c comes from the row itself, which is in the cache anyway, so no Gram matrix and no second
// product is needed; attention weights are made again in the backward, from the products, rather than kept.
// No include guard: compiled once per instruction set.

#include "attention_tile.h"
#include "feature_norm.h"
#include "attention_weights.h"
#include "row_words.h"

ITM_INLINE void load_lanes(const float* source, float fallback, float* lanes, const Tile& tile) {
  for (int64_t l = 0; l < tile.width; ++l) lanes[l] = source == nullptr ? fallback : 0.0f;
  if (source != nullptr) __builtin_memcpy(lanes, source, static_cast<size_t>(tile.lanes) * sizeof(float));
}

// Products -> weights of a tile. The normalised features stay in tile.normed, temperatures in tile.peak.
ITM_INLINE void attend_tile(const Tile& tile, const float* temperatures, float temperature) {
  normalise_by_norm<true, false>(tile, 1.0f);
  load_lanes(temperatures, temperature, tile.peak, tile);
  for (int64_t k = 0; k < tile.keys; ++k) {
    for (int64_t l = 0; l < tile.width; l += kLanes) {
      float* logits = tile.weights + k * tile.width + l;
      store(tile.normed + k * tile.width + l, load(logits));
      store(logits, load(logits) * load(tile.peak + l));
    }
  }
  softmax_over_keys(tile);
}

// From da in tile.image to the gradient at the products, in place, and at the temperatures, in tile.grad_cosine.
ITM_INLINE void attend_tile_backward(const Tile& tile) {
  for (int64_t l = 0; l < tile.width; l += kLanes) {
    Vec mean{}, grad_temperature{};
    for (int64_t k = 0; k < tile.keys; ++k) {
      const int64_t at = k * tile.width + l;
      mean += load(tile.weights + at) * load(tile.image + at);
    }
    for (int64_t k = 0; k < tile.keys; ++k) {
      const int64_t at = k * tile.width + l;
      const Vec grad = load(tile.weights + at) * (load(tile.image + at) - mean);
      grad_temperature += grad * load(tile.normed + at);
      store(tile.image + at, grad * load(tile.peak + l));
    }
    store(tile.grad_cosine + l, grad_temperature);
    store(tile.grad_dot + l, splat(0.0f));
  }
  norm_backward<true, false>(tile);
}

// Calls visit(tile, first lane's temperature) for the tiles of all groups, in parallel.
template <class Scalar, class Visit>
ITM_INLINE void for_each_attention_tile(const AttentionCall<Scalar>& call, const Visit& visit) {
  const int64_t tiles = static_cast<int64_t>(call.tiles.size()) - 1;
  const int64_t width = (call.most_lanes + kLanes - 1) / kLanes * kLanes;
  const auto floats = static_cast<size_t>(scratch_floats(call.keys, width, call.most_segments));
  for_each_piece(call.groups * tiles, [&, floats] {
    return [&, scratch = std::vector<float>(floats)](int64_t piece) mutable {
      const int64_t g = piece / tiles, first = call.tiles[piece % tiles], last = call.tiles[piece % tiles + 1];
      const int64_t lanes = call.offsets[last] - call.offsets[first];
      const int64_t width = (lanes + kLanes - 1) / kLanes * kLanes;
      Tile tile = carve(scratch.data(), call.key_counts[g], width, last - first);
      tile.keys = call.key_counts[g];
      tile.lanes = lanes;
      tile.width = width;
      tile.segments = last - first;
      tile.offsets = call.offsets + first;
      const int64_t lane = g * call.lanes + tile.offsets[0];
      load_products(tile, call.products + g * call.keys * call.lanes, call.lanes);
      attend_tile(tile, call.temperatures == nullptr ? nullptr : call.temperatures + lane, call.temperature);
      visit(tile, g, lane);
    };
  });
}

// Rows of a tile back to where they belong; those past the group's keys are zero.
template <class Scalar>
ITM_INLINE void store_tile(const AttentionCall<Scalar>& call, const Tile& tile, int64_t g, const float* rows,
                           Scalar* out) {
  Scalar* group = out + g * call.keys * call.lanes;
  store_products(tile, rows, group, call.lanes);
  for (int64_t k = tile.keys; k < call.keys; ++k) {
    __builtin_memset(group + k * call.lanes + tile.offsets[0], 0, static_cast<size_t>(tile.lanes) * sizeof(Scalar));
  }
}

template <class Scalar>
void run_attention(const AttentionCall<Scalar>& call) {
  for_each_attention_tile(
      call, [&](const Tile& tile, int64_t g, int64_t) { store_tile(call, tile, g, tile.weights, call.weights); });
}

inline void run_attention_backward(const AttentionCall<float>& call) {
  for_each_attention_tile(call, [&](const Tile& tile, int64_t g, int64_t lane) {
    for (int64_t k = 0; k < tile.keys; ++k) {
      float* row = tile.image + k * tile.width;
      store(row + tile.width - kLanes, splat(0.0f));
      widen(call.weights + (g * call.keys + k) * call.lanes + tile.offsets[0], row, tile.lanes);
    }
    attend_tile_backward(tile);
    store_tile(call, tile, g, tile.image, call.products);
    __builtin_memcpy(call.grad_temperatures + lane, tile.grad_cosine, static_cast<size_t>(tile.lanes) * sizeof(float));
  });
}

template <class Scalar>
ITM_INLINE float squares_of_row(const Scalar* row, int64_t n) {
  Vec total{};
  for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
    const Vec x = load(row + i, part);
    total += x * x;
  });
  return sum_of_lanes(total);
}

template <class Scalar>
void run_squared_differences(const AlignmentCall<Scalar>& call) {
  for_each_row(call.rows, kRowGrain, [&](int64_t r) {
    const Scalar* c = call.attended + r * call.width;
    const Scalar* q = call.queries + r % call.lanes * call.width;
    Scalar* out = call.squares + r * call.width;
    const float norm = __builtin_sqrtf(squares_of_row(c, call.width));
    const Vec scale = splat(1.0f / (norm + kEps));
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec difference = load(q + i, part) - load(c + i, part) * scale;
      store(out + i, difference * difference, part);
    });
    call.norms[r] = norm;
  });
}

// dq += 2 d dx with d = q - l2norm(c); the attended vector is overwritten by its gradient.
template <class Scalar>
void run_squared_differences_backward(const AlignmentCall<Scalar>& call) {
  for_each_row(call.lanes, kRowGrain, [&](int64_t lane) {
    const Scalar* q = call.queries + lane * call.width;
    float* grad_query = call.grad_queries + lane * call.width;
    for (int64_t r = lane; r < call.rows; r += call.lanes) {
      Scalar* c = call.attended + r * call.width;
      const Scalar* grad = call.squares + r * call.width;
      const Vec scale = splat(1.0f / (call.norms[r] + kEps));
      Vec product{};  // of the gradient at l2norm(c), which is minus that at q, and c
      for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
        const Vec x = load(c + i, part);
        const Vec twice = 2.0f * (load(q + i, part) - x * scale) * load(grad + i, part);
        store(grad_query + i, load(grad_query + i, part) + twice, part);
        product -= twice * x;
      });
      const NormSlope slope = slope_of_l2norm(call.norms[r], sum_of_lanes(product));
      for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
        const Vec x = load(c + i, part);
        const Vec twice = 2.0f * (load(q + i, part) - x * scale) * load(grad + i, part);
        store(c + i, -slope.scale * (twice + slope.along * x), part);
      });
    }
  });
}

template <class Scalar>
void run_normalise_rows(const NormaliseCall<Scalar>& call) {
  for_each_row(call.count, kRowGrain, [&](int64_t r) {
    Scalar* row = call.rows + r * call.width;
    Vec total{};
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec x = load(row + i, part) + load(call.bias + i, part);
      total += x * x;
    });
    const float norm = __builtin_sqrtf(sum_of_lanes(total));
    const Vec scale = splat(1.0f / (norm + kEps));
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec x = (load(row + i, part) + load(call.bias + i, part)) * scale;
      store(row + i, x, part);
      store(call.wide + r * call.width + i, x, part);
    });
    call.norms[r] = norm;
  });
}

// The rows are overwritten by the gradient before the norm, whose sums are that of the bias.
template <class Scalar>
void run_normalise_rows_backward(const NormaliseCall<Scalar>& call) {
  for_each_row_with(call.sums, call.count, [&](int64_t r, float* sums) {
    const float* x = call.wide + r * call.width;
    const float* grad = call.grad + r * call.width;
    const float norm = call.norms[r], whole = norm + kEps;
    Vec product{};
    for_each_vector(call.width,
                    [&](int64_t i, auto part) ITM_VISITOR { product += load(x + i, part) * load(grad + i, part); });
    const NormSlope slope = slope_of_l2norm(norm, sum_of_lanes(product) * whole);
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec before = slope.scale * (load(grad + i, part) - slope.along * whole * load(x + i, part));
      store(call.rows + r * call.width + i, before, part);
      store(sums + i, load(sums + i, part) + before, part);
    });
  });
}
