// Attention filtration on the CPU: one weight for each node x_i of a pair, through a batch normalisation; the sum, or
// its score.
//
//   l_i = w . x_i + b     z_i = (l_i - mean) / sqrt(var + eps)     y_i = gamma z_i + beta     a_i = sigmoid(y_i)
//   r = sum_i a_i x_i / (sum_i a_i + 1e-8)       f = l2norm(r)       score = sigmoid(w_e . f + b_e)
//   da_i = (dr . x_i - dr . r) / sum a      dy_i = a_i (1 - a_i) da_i      dx_i = a_i / sum a dr + dl_i w
//   dl_i = gamma / sqrt(var + eps) (dy_i - mean(dy) - z_i mean(dy z))      means over a caption's batch, else 0
//
// Owner: one thread a pair, its nodes in order; runs of pairs add up gradients of parameters. No atomics; same bits
// every run. Read: the nodes of a pair once, then from the first-level cache. Never in memory: a, z, r and dr, made
// again in the backward from the logits. Nodes and accumulation: float32.
// The trick: the statistics' gradients are the sums of dy and dy z, so a pass over all images of a caption hands on two
// numbers a pair, and every pair's backward runs once.
// No include guard: compiled once per instruction set.

#include "row_words.h"
#include "node_words.h"

void run_logits(const LogitsCall& call) {
  for_each_row(call.count, kRowGrain, [&](int64_t r) {
    call.logits[r] = dot_of_rows(call.weight, call.nodes + r * call.width, call.width) + call.bias;
  });
}

// One pair on its way from logits to score.
struct Filtered {
  int64_t count;
  float rate;            // 1 / sqrt(var + eps)
  float total;           // sum of weights
  float norm;            // |r|
  float *z, *weights;    // [count]
  float* grads;          // [count], room for dy
  float *pooled, *grad;  // [width]: r, and room for dr
};

ITM_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
ITM_INLINE int64_t filtration_floats(const NodeRows& at) {
  return 3 * whole_vectors(at.most) + 2 * whole_vectors(at.width);
}

ITM_INLINE Filtered filtrate(const FiltrationCall& call, int64_t pair, float* memory) {
  const NodeRows& at = call.at;
  const int64_t s = pair % at.segments, n = at.width, room = whole_vectors(at.most);
  Filtered made{};
  made.count = at.count(pair);
  made.rate = 1.0f / __builtin_sqrtf(call.statistics[at.segments + s] + call.eps);
  made.z = memory;
  made.weights = memory + room;
  made.grads = memory + 2 * room;
  made.pooled = memory + 3 * room;
  made.grad = made.pooled + whole_vectors(n);
  for (int64_t i = 0; i < made.count; ++i) {
    made.z[i] = (call.logits[at.row(pair, i)] - call.statistics[s]) * made.rate;
  }
  made.total = kEps;
  for (int64_t i = 0; i < made.count; ++i) {
    made.weights[i] = sigmoid_of(made.z[i] * call.norm_weight + call.norm_bias);
    made.total += made.weights[i];
  }
  const float* whole = call.nodes + at.row(pair, 0) * n;
  const float* words = call.nodes + at.row(pair, 1) * n;
  const Vec scale = splat(1.0f / made.total);
  Vec square{};
  for_each_vector(n, [&](int64_t c, auto part) ITM_VISITOR {
    Vec sum = made.weights[0] * load(whole + c, part);
    for (int64_t i = 1; i < made.count; ++i) sum += made.weights[i] * load(words + (i - 1) * n + c, part);
    sum *= scale;
    store(made.pooled + c, sum, part);
    square += sum * sum;
  });
  made.norm = __builtin_sqrtf(sum_of_lanes(square));
  return made;
}

// `along` is w_e . r.
ITM_INLINE float score_of(const FiltrationCall& call, const Filtered& made, float along) {
  return sigmoid_of(along / (made.norm + kEps) + call.score_bias);
}

void run_filter(const FiltrationCall& call) {
  const int64_t n = call.at.width;
  for_each_pair_with(call.sums, call.at.pairs, filtration_floats(call.at), [&](int64_t pair, float* memory, float*) {
    const Filtered made = filtrate(call, pair, memory);
    const Vec scale = splat(1.0f / (made.norm + kEps));
    for_each_vector(n, [&](int64_t c, auto part) ITM_VISITOR {
      store(call.filtered + pair * n + c, load(made.pooled + c, part) * scale, part);
    });
  });
}

void run_filtration(const FiltrationCall& call) {
  for_each_pair_with(call.sums, call.at.pairs, filtration_floats(call.at), [&](int64_t pair, float* memory, float*) {
    const Filtered made = filtrate(call, pair, memory);
    call.scores[pair] = score_of(call, made, dot_of_rows(call.score_weight, made.pooled, call.at.width));
  });
}

// dx_i of one node, and its part in the gradient of the logits' weight.
ITM_INLINE void node_backward(const FiltrationCall& call, const Filtered& made, int64_t row, float weight,
                              float grad_logit, float* grad_weight) {
  const int64_t n = call.at.width;
  const float* x = call.nodes + row * n;
  float* grad_x = call.grad_nodes + row * n;
  for_each_vector(n, [&](int64_t c, auto part) ITM_VISITOR {
    store(grad_x + c, weight * load(made.grad + c, part) + grad_logit * load(call.weight + c, part), part);
    store(grad_weight + c, load(grad_weight + c, part) + grad_logit * load(x + c, part), part);
  });
}

// From df, `scale` times a row, and df . r to slopes and, where nodes have a gradient, that; the sums of weight and bias.
ITM_INLINE void filtered_backward(const FiltrationCall& call, const Filtered& made, int64_t pair, float scale,
                                  const float* row, float product, float* sums) {
  const NodeRows& at = call.at;
  const int64_t n = at.width;
  const NormSlope slope = slope_of_l2norm(made.norm, product);
  for_each_vector(n, [&](int64_t c, auto part) ITM_VISITOR {
    const Vec r = load(made.pooled + c, part);
    store(made.grad + c, slope.scale * (scale * load(row + c, part) - slope.along * r), part);
  });
  // Nodes may be much alike and dr all but orthogonal to them: what tells them apart is taken before the product, and
  // its mean, zero but for rounding, off after it.
  float back = 0.0f;
  for (int64_t i = 0; i < made.count; ++i) {
    const float* x = call.nodes + at.row(pair, i) * n;
    Vec along{};
    for_each_vector(n, [&](int64_t c, auto part) ITM_VISITOR {
      along += load(made.grad + c, part) * (load(x + c, part) - load(made.pooled + c, part));
    });
    made.grads[i] = sum_of_lanes(along);
    back += made.weights[i] * made.grads[i] / made.total;
  }
  float of_shift = 0.0f, of_scale = 0.0f;
  for (int64_t i = 0; i < made.count; ++i) {
    const float a = made.weights[i];
    made.grads[i] = a * (1.0f - a) * (made.grads[i] - back) / made.total;
    of_shift += made.grads[i];
    of_scale += made.grads[i] * made.z[i];
  }
  call.slopes[2 * pair] = of_shift;
  call.slopes[2 * pair + 1] = of_scale;
  if (call.grad_nodes == nullptr) return;
  const float outer = call.norm_weight * made.rate;
  const float mean = call.means[pair % at.segments], mean_z = call.means[at.segments + pair % at.segments];
  float of_bias = 0.0f;
  for (int64_t i = 0; i < made.count; ++i) {
    const float grad_logit = outer * (made.grads[i] - mean - made.z[i] * mean_z);
    node_backward(call, made, at.row(pair, i), made.weights[i] / made.total, grad_logit, sums);
    of_bias += grad_logit;
  }
  sums[n] += of_bias;
}

void run_filter_backward(const FiltrationCall& call) {
  const int64_t n = call.at.width;
  for_each_pair_with(call.sums, call.at.pairs, filtration_floats(call.at),
                     [&](int64_t pair, float* memory, float* sums) {
                       const Filtered made = filtrate(call, pair, memory);
                       const float* grad = call.filtered + pair * n;
                       filtered_backward(call, made, pair, 1.0f, grad, dot_of_rows(grad, made.pooled, n), sums);
                     });
}

void run_filtration_backward(const FiltrationCall& call) {
  const int64_t n = call.at.width;
  for_each_pair_with(
      call.sums, call.at.pairs, filtration_floats(call.at), [&](int64_t pair, float* memory, float* sums) {
        const Filtered made = filtrate(call, pair, memory);
        const float along = dot_of_rows(call.score_weight, made.pooled, n), score = score_of(call, made, along);
        const float of_logit = call.scores[pair] * score * (1.0f - score);
        filtered_backward(call, made, pair, of_logit, call.score_weight, of_logit * along, sums);
        if (call.grad_nodes == nullptr) return;
        float* of_score = sums + n + 1;
        const float length = of_logit / (made.norm + kEps);
        for_each_vector(n, [&](int64_t c, auto part) ITM_VISITOR {
          store(of_score + c, load(of_score + c, part) + length * load(made.pooled + c, part), part);
        });
        of_score[n] += of_logit;
      });
}
