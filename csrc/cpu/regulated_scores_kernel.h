// How a scorer without aggregation ends, on the CPU: the mean over a segment of the cosine of queries q and what they
// attend to at length 1, w = c / (|c| + eps), and back. With plain products s, weights a and u = G a (G: Gram matrix):
//
//   p = sum_k a_k s_k    m = |c| = sqrt(a . u)    cos = p / (m + eps) / max(|q| m / (m + eps), eps)    score = mean cos
//   ds = dp a    da = dp s + 2 dQ u    dG = sum_queries dQ a a^T    dQ = dm / 2m
//
// Owner: one thread a group and some lanes (queries); the caller adds up over groups. No atomics; same bits every run.
// Read: each array once forward, twice backward. Never in memory: attended vectors. Accumulation: float32.
// The trick: neither p nor m needs c, so nothing here is as wide as a vector.
// No include guard: compiled once per instruction set.

#include "row_words.h"

struct LaneCosine {
  float dot, norm, scale;  // p, m, 1 / (m + eps)
  float product;           // max(|q| |w|, eps)
  float cosine;
  bool on_floor;
};

ITM_INLINE LaneCosine cosine_of(float dot, float square, float query_norm) {
  LaneCosine lane{};
  lane.dot = dot;
  lane.norm = square > 0.0f ? __builtin_sqrtf(square) : 0.0f;
  lane.scale = 1.0f / (lane.norm + kEps);
  const float product = query_norm * lane.norm * lane.scale;
  lane.on_floor = !(product >= kEps);
  lane.product = lane.on_floor ? kEps : product;
  lane.cosine = lane.norm > 0.0f ? dot * lane.scale / lane.product : 0.0f;
  return lane;
}

// Calls visit(lane, cosine) for up to kLanes lanes from `first` of a group.
template <class Part, class Visit>
ITM_INLINE void for_each_cosine(const CosineCall& call, int64_t g, int64_t first, int64_t n, Part part,
                                const Visit& visit) {
  const int64_t begin = g * call.keys * call.lanes + first;
  Vec dot{}, square{};
  for (int64_t k = 0; k < call.keys; ++k) {
    const int64_t at = begin + k * call.lanes;
    const Vec a = load(call.weights + at, part);
    dot += a * load(call.plain + at, part);
    square += a * load(call.images + at, part);
  }
  for (int64_t i = 0; i < n; ++i) visit(i, cosine_of(dot[i], square[i], call.query_norms[first + i]));
}

ITM_INLINE void run_cosines_of_vector(const CosineCall& call, int64_t g, int64_t first, auto part, int64_t n) {
  for_each_cosine(call, g, first, n, part,
                  [&](int64_t i, const LaneCosine& lane) { call.cosines[g * call.lanes + first + i] = lane.cosine; });
}

inline void run_cosines(const CosineCall& call) {
  for_each_row(call.groups, 1, [&](int64_t g) {
    for_each_vector(call.lanes, [&](int64_t first, auto part) {
      run_cosines_of_vector(call, g, first, part, call.lanes - first < kLanes ? call.lanes - first : kLanes);
    });
    for (int64_t s = 0; s < call.segments; ++s) {
      const int64_t begin = call.offsets[s], end = call.offsets[s + 1];
      float total = 0.0f;
      for (int64_t l = begin; l < end; ++l) total += call.cosines[g * call.lanes + l];
      call.scores[g * call.segments + s] = total / static_cast<float>(end - begin);
    }
  });
}

// Of one lane, with its gradient in `cosines`, overwritten by that at |q|.
struct LaneGradients {
  Vec dot, square;
};

ITM_INLINE LaneGradients cosine_backward(const CosineCall& call, int64_t g, int64_t first, auto part, int64_t n) {
  LaneGradients grads{};
  for_each_cosine(call, g, first, n, part, [&](int64_t i, const LaneCosine& lane) {
    float& place = call.cosines[g * call.lanes + first + i];
    const float grad = place;
    place = 0.0f;
    if (!(lane.norm > 0.0f)) return;
    grads.dot[i] = grad * lane.scale / lane.product;
    // On the floor |c| still divides once, and |q| does not; above it |c| + eps cancels.
    const float of_norm = lane.on_floor ? -grad * lane.cosine * lane.scale : -grad * lane.cosine / lane.norm;
    grads.square[i] = of_norm / (2.0f * lane.norm);
    if (!lane.on_floor) place = -grad * lane.cosine / call.query_norms[first + i];
  });
  return grads;
}

inline void run_cosines_backward(const CosineCall& call) {
  for_each_row(call.groups, 1, [&](int64_t g) {
    for (int64_t s = 0; s < call.segments; ++s) {
      const int64_t begin = call.offsets[s], end = call.offsets[s + 1];
      const float grad = call.scores[g * call.segments + s] / static_cast<float>(end - begin);
      for (int64_t l = begin; l < end; ++l) call.cosines[g * call.lanes + l] = grad;
    }
    for_each_vector(call.lanes, [&](int64_t first, auto part) {
      const int64_t n = call.lanes - first < kLanes ? call.lanes - first : kLanes;
      const LaneGradients grads = cosine_backward(call, g, first, part, n);
      for (int64_t k = 0; k < call.keys; ++k) {
        const int64_t at = (g * call.keys + k) * call.lanes + first;
        const Vec a = load(call.weights + at, part), s = load(call.plain + at, part), u = load(call.images + at, part);
        store(call.grad_plain + at, grads.dot * a, part);
        store(call.images + at, grads.dot * s + 2.0f * grads.square * u, part);
        store(call.scaled + at, grads.square * a, part);
      }
    });
  });
}
