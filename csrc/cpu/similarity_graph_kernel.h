// A step of the similarity graph on the CPU: attention among the nodes x_k of a pair, between two library products.
//
//   asking u_i = x_i M + shift       e_ik = softmax_k(u_i . x_k)       gathered h_i = sum_k e_ik x_k
//   de_ik = dh_i . x_k      dp_ik = e_ik (de_ik - sum_k e_ik de_ik)      du_i = sum_k dp_ik x_k
//   dx_k = sum_i dp_ik u_i + e_ik dh_i                             and relu(y + b) of the rows that follow
//
// Owner: one thread a pair, its nodes in order; runs of pairs add up the gradient of the shift. No atomics; same bits
// every run. Read: each row once, into a copy that stays in the cache. Never in memory: e, made again in the backward.
// Accumulation: float32, whatever the storage.
// The trick: some 15 nodes are too few for a library's product and too many for one inner product after another; four
// by four of them at a time read every row a quarter as often.
// No include guard: compiled once per instruction set.

#include "row_words.h"
#include "node_words.h"
#include "small_matrices.h"

// Matrices of a pair: rows of nodes and of what asks, at one stride, and their edges.
struct PairMatrices {
  int64_t nodes, asking, stride, edge_stride;
  float *x, *u, *made;      // x [nodes, stride], u [asking, stride]; made: of either shape
  float* given;             // [asking, stride]                                     (backward only)
  float *edges, *of_edges;  // [asking, edge_stride]; of_edges: backward only
};

template <class Scalar>
ITM_INLINE int64_t graph_floats(const GraphCall<Scalar>& call) {
  const int64_t rows = padded_rows(call.at.most);
  return rows * (4 * padded_columns(call.at.width) + 2 * padded_columns(rows));
}

template <class Scalar>
ITM_INLINE void copy_row(const Scalar* source, int64_t n, float* target) {
  for_each_vector(n, [&](int64_t c, auto part) ITM_VISITOR { store(target + c, load(source + c, part)); });
}

// Row of `asking` and `gathered` in which node i of a pair stands.
template <class Scalar>
ITM_INLINE int64_t asking_row(const GraphCall<Scalar>& call, int64_t pair, int64_t i) {
  return call.whole_only ? pair : call.at.row(pair, i);
}

// Copies of a pair's rows, and its edges.
template <class Scalar>
ITM_INLINE PairMatrices load_pair(const GraphCall<Scalar>& call, int64_t pair, float* memory) {
  const int64_t width = call.at.width, rows = padded_rows(call.at.most);
  PairMatrices made{};
  made.nodes = call.at.count(pair);
  made.asking = call.whole_only ? 1 : made.nodes;
  made.stride = padded_columns(width);
  made.edge_stride = padded_columns(rows);
  made.x = memory;
  made.u = made.x + rows * made.stride;
  made.made = made.u + rows * made.stride;
  made.given = made.made + rows * made.stride;
  made.edges = made.given + rows * made.stride;
  made.of_edges = made.edges + rows * made.edge_stride;
  for (int64_t i = 0; i < made.nodes; ++i) {
    copy_row(call.nodes + call.at.row(pair, i) * width, width, made.x + i * made.stride);
  }
  for (int64_t i = 0; i < made.asking; ++i) {
    const Scalar* source = call.asking + asking_row(call, pair, i) * width;
    float* target = made.u + i * made.stride;
    for_each_vector(width, [&](int64_t c, auto part)
                               ITM_VISITOR { store(target + c, load(source + c, part) + load(call.shift + c, part)); });
  }
  dots_of_rows(made.u, made.x, made.asking, made.nodes, made.stride, made.edges, made.edge_stride);
  softmax_of_rows(made.edges, made.asking, made.nodes, made.edge_stride);
  return made;
}

template <class Scalar>
ITM_INLINE void store_asking(const GraphCall<Scalar>& call, int64_t pair, const PairMatrices& of, Scalar* out) {
  for (int64_t i = 0; i < of.asking; ++i) {
    Scalar* row = out + asking_row(call, pair, i) * call.at.width;
    const float* source = of.made + i * of.stride;
    for_each_vector(call.at.width, [&](int64_t c, auto part) ITM_VISITOR { store(row + c, load(source + c), part); });
  }
}

template <class Scalar>
void run_graph(const GraphCall<Scalar>& call) {
  for_each_pair_with(call.sums, call.at.pairs, graph_floats(call), [&](int64_t pair, float* memory, float*) {
    const PairMatrices of = load_pair(call, pair, memory);
    combine_rows<false>(Weights{of.edges, of.edge_stride, 1}, of.x, of.asking, of.nodes, of.stride, of.made);
    store_asking(call, pair, of, call.gathered);
  });
}

// dp over of_edges, which holds de.
ITM_INLINE void edges_backward(const PairMatrices& of) {
  for (int64_t i = 0; i < of.asking; ++i) {
    const float* edges = of.edges + i * of.edge_stride;
    float* grad = of.of_edges + i * of.edge_stride;
    Vec mean{};
    for (int64_t k = 0; k < of.nodes; k += kLanes) {
      mean += first_lanes(load(edges + k) * load(grad + k), of.nodes - k, 0.0f);
    }
    const Vec back = splat(sum_of_lanes(mean));
    for (int64_t k = 0; k < of.nodes; k += kLanes) store(grad + k, load(edges + k) * (load(grad + k) - back));
  }
}

template <class Scalar>
void run_graph_backward(const GraphCall<Scalar>& call) {
  const int64_t n = call.at.width;
  for_each_pair_with(call.sums, call.at.pairs, graph_floats(call), [&](int64_t pair, float* memory, float* sums) {
    const PairMatrices of = load_pair(call, pair, memory);
    for (int64_t i = 0; i < of.asking; ++i) {
      copy_row(call.gathered + asking_row(call, pair, i) * n, n, of.given + i * of.stride);
    }
    dots_of_rows(of.given, of.x, of.asking, of.nodes, of.stride, of.of_edges, of.edge_stride);
    edges_backward(of);
    combine_rows<false>(Weights{of.of_edges, of.edge_stride, 1}, of.x, of.asking, of.nodes, of.stride, of.made);
    store_asking(call, pair, of, call.asking);
    for (int64_t i = 0; i < of.asking; ++i) {
      const float* row = of.made + i * of.stride;
      for_each_vector(
          n, [&](int64_t c, auto part) ITM_VISITOR { store(sums + c, load(sums + c, part) + load(row + c), part); });
    }
    combine_rows<false>(Weights{of.of_edges, 1, of.edge_stride}, of.u, of.nodes, of.asking, of.stride, of.made);
    combine_rows<true>(Weights{of.edges, 1, of.edge_stride}, of.given, of.nodes, of.asking, of.stride, of.made);
    for (int64_t k = 0; k < of.nodes; ++k) {
      const float* row = of.made + k * of.stride;
      float* target = call.grad_nodes + call.at.row(pair, k) * n;
      for_each_vector(n, [&](int64_t c, auto part) ITM_VISITOR { store(target + c, load(row + c), part); });
    }
  });
}

template <class Scalar>
void run_relu(const ReluCall<Scalar>& call) {
  for_each_row(call.count, kRowGrain, [&](int64_t r) {
    Scalar* row = call.rows + r * call.width;
    for_each_vector(call.width, [&](int64_t c, auto part) ITM_VISITOR {
      const Vec x = load(row + c, part) + load(call.bias + c, part);
      const Vec after = x < 0.0f ? splat(0.0f) : x;  // NaN stays NaN
      store(row + c, after, part);
      if (call.wide != nullptr) store(call.wide + r * call.width + c, after, part);
    });
  });
}

// The rows are overwritten by the gradient before the relu, whose sums are that of the bias.
template <class Scalar>
void run_relu_backward(const ReluCall<Scalar>& call) {
  for_each_row_with(call.sums, call.count, [&](int64_t r, float* sums) {
    Scalar* row = call.rows + r * call.width;
    const float* grad = call.grad + r * call.width;
    for_each_vector(call.width, [&](int64_t c, auto part) ITM_VISITOR {
      const Vec before = load(row + c, part) > 0.0f ? load(grad + c, part) : splat(0.0f);
      store(row + c, before, part);
      store(sums + c, load(sums + c, part) + before, part);
    });
  });
}
