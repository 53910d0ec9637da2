// A step of the similarity graph: attention among the nodes x_k of a pair, between two library products.
//
//   asking u_i = x_i M + shift       e_ik = softmax_k(u_i . x_k)       gathered h_i = sum_k e_ik x_k
//   de_ik = dh_i . x_k      dp_ik = e_ik (de_ik - sum_k e_ik de_ik)      du_i = sum_k dp_ik x_k
//   dx_k = sum_i dp_ik u_i + e_ik dh_i                             and relu(y + b) of the rows that follow
//
// Owner: a warp a pair, its nodes in tiles of 16 that ask; in the backward a warp takes a run of pairs and adds up the
// gradient of the shift in its own row of parts. No atomics; same bits every run. Read: each row once, and from the
// caches once more for every 16 nodes of the pair. Never in memory: e and dp, which stay in shared memory.
// Accumulation: float32, products by the tensor cores (pair_products.cuh).
// The trick: a pair is 10 FLOP a byte (15 nodes, 2 bytes), which is much for plain arithmetic and little for tensor cores:
// rows go from memory into fragments in whole words without shared memory, and the shift stays out of the products
// (u_i . x_k is the product as rounded plus one number a node), so that nothing is rounded on the way.
#pragma once

#include "../common/node_tiles.h"
#include "node_rows.cuh"
#include "pair_products.cuh"

namespace itm {

// Blocks of threads a multiprocessor: float32 splits its operands as it uses them, the backward holds two of them, and
// either takes more registers than four blocks leave a thread.
template <class T, bool kBackward>
constexpr int kGraphBlocks = (sizeof(T) == 2 ? 4 : 3) - (kBackward ? 1 : 0);

// float32 takes the first node off all of them before they are multiplied: it changes neither e nor dp nor du, and nodes,
// which may be much alike, are told apart by what is left of them.
template <class T>
constexpr bool kCentred = std::is_same_v<T, float>;

template <class T>
struct GraphCall {
  NodeRows at;
  int width;
  int stride;  // of the edges of an asking node, in shared memory
  bool wide;
  bool whole_only;     // whether the whole pair alone asks
  const T* nodes;      // [rows, width]
  T* asking;           // [rows, width], or [pairs, width]; backward: overwritten by its gradient
  const float* shift;  // [width], added to every asking row
  T* gathered;         // like asking; backward: its gradient, read only
  float* grad_nodes;   // [rows, width]
  float* sums;         // [runs, width]: of the gradient of the shift
  int64_t runs;
};

// A pair in the hands of a warp, and its tile of askers.
template <class T>
struct PairGraph {
  const GraphCall<T>& call;
  const PairNodes nodes;
  const int64_t pair;
  const int askers;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* const edges;   // [16, stride]: logits, then e
  float* const slopes;  // [17, stride]: de, then dp, and its sums over the askers           (backward only)

  __device__ PairGraph(const GraphCall<T>& call, int64_t pair, float* memory)
      : call(call),
        nodes(call.at, pair),
        pair(pair),
        askers(call.whole_only ? 1 : nodes.count),
        edges(memory),
        slopes(memory + kAskers * call.stride) {}

  __device__ __forceinline__ int64_t row_of_asker(int i) const { return call.whole_only ? pair : nodes.row(i); }

  // Rows by number, null where there is none.
  __device__ __forceinline__ const T* node(int k) const {
    return k < nodes.count ? call.nodes + nodes.row(k) * call.width : nullptr;
  }
  __device__ __forceinline__ T* asker(T* rows, int i) const {
    return i < askers ? rows + row_of_asker(i) * call.width : nullptr;
  }

  __device__ __forceinline__ Octet<T> load(const T* row, int column) const {
    return load_octet(row, column, call.width, call.wide);
  }

  // Logits of the tile that begins at `first`, and de.
  template <bool kBackward>
  __device__ void make_edges(int first) const {
    const T *low = asker(call.asking, first + g), *high = asker(call.asking, first + g + 8);
    const T *grad_low = nullptr, *grad_high = nullptr;
    if constexpr (kBackward) {
      grad_low = asker(call.gathered, first + g);
      grad_high = asker(call.gathered, first + g + 8);
    }
#pragma unroll 1
    for (int k = 0; k < nodes.count; k += 16) {
      const T* keys[2] = {node(k + g), node(k + g + 8)};
      float logits[2][4] = {}, grads[2][4] = {}, shifted[2] = {};
#pragma unroll 1
      for (int column = 0; column < call.width; column += kSlice) {
        const int c = column + kOctet * t;
        const Octet<T> u = load(low, c), v = load(high, c);
        Octet<T> x[2] = {load(keys[0], c), load(keys[1], c)};
        if constexpr (kCentred<T>) {
          const Octet<T> centre = load(node(0), c);
          x[0].subtract(centre);
          x[1].subtract(centre);
        }
        const Octet<float> shift = load_octet(call.shift, c, call.width, call.wide);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          add_dots(u, v, x[j], logits[j]);
#pragma unroll
          for (int e = 0; e < kOctet; ++e) shifted[j] += shift[e] * x[j][e];
        }
        if constexpr (kBackward) {
          const Octet<T> dh_low = load(grad_low, c), dh_high = load(grad_high, c);
#pragma unroll
          for (int j = 0; j < 2; ++j) add_dots(dh_low, dh_high, x[j], grads[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float own = quad_sum(shifted[j]);  // of node g; the fragments hold nodes 2 t and 2 t + 1
        const float added[2] = {__shfl_sync(kWholeWarp, own, 8 * t), __shfl_sync(kWholeWarp, own, 8 * t + 4)};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = (g + e / 2 * 8) * call.stride + k + 8 * j + 2 * t + e % 2;
          edges[at] = logits[j][e] + added[e % 2];
          if constexpr (kBackward) slopes[at] = grads[j][e];
        }
      }
    }
    __syncwarp();
  }

  // Logits to e, de to dp, two lanes a row; zeros for nodes that fill the last chunk.
  template <bool kBackward>
  __device__ void softmax() const {
    float* e = edges + lane / 2 * call.stride;
    float* d = slopes + lane / 2 * call.stride;
    const int padded = (nodes.count + 15) / 16 * 16;
    float top = -INFINITY, total = 0.0f, back = 0.0f;
    for (int k = lane % 2; k < nodes.count; k += 2) top = fmaxf(top, e[k]);
    top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, 1));
    for (int k = lane % 2; k < nodes.count; k += 2) {
      e[k] = expf(e[k] - top);
      total += e[k];
    }
    total += __shfl_xor_sync(kWholeWarp, total, 1);
    const float inverse = 1.0f / total;
    for (int k = lane % 2; k < padded; k += 2) e[k] = k < nodes.count ? e[k] * inverse : 0.0f;
    if constexpr (kBackward) {
      for (int k = lane % 2; k < nodes.count; k += 2) back += e[k] * d[k];
      back += __shfl_xor_sync(kWholeWarp, back, 1);
      for (int k = lane % 2; k < padded; k += 2) d[k] = k < nodes.count ? e[k] * (d[k] - back) : 0.0f;
    }
    __syncwarp();
  }

  // Row 16 of the slopes: what the shift, which all askers share, hands on to each node.
  __device__ void sum_slopes() const {
    for (int k = lane; k < nodes.count; k += 32) {
      float sum = 0.0f;
      for (int i = 0; i < kAskers; ++i) sum += slopes[i * call.stride + k];
      slopes[kAskers * call.stride + k] = sum;
    }
    __syncwarp();
  }

  // Sums of nodes for the tile's askers, in a slice of columns.
  __device__ __forceinline__ void combine(const float* weights, int column, float (&c)[4][4]) const {
#pragma unroll 1
    for (int k = 0; k < nodes.count; k += 16) {
      Rows16<T> rows([&](int r) { return node(k + r); }, column, call.width, call.wide);
      if constexpr (kCentred<T>) rows.subtract(node(0), column, call.width, call.wide);
      add_weighted(Weights16<T>(weights + k, call.stride, 1), rows, c);
    }
  }

  __device__ __forceinline__ void store_tile(T* rows, int first, int column, const float (&c)[4][4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x[kOctet];
      octet_of<T>(c, h, x);
      T* row = asker(rows, first + g + 8 * h);
      if (row != nullptr) store_octet(row, column + kOctet * t, call.width, call.wide, x);
    }
  }

  // The same row to all of the tile.
  __device__ __forceinline__ void add_row(const T* row, int column, float (&c)[4][4]) const {
    const Octet<T> x = load(row, column + kOctet * t);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) c[tile_of<T>(i)][2 * h + pair_of<T>(i)] += x[i];
    }
  }

  __device__ void gather(int first) const {
#pragma unroll 1
    for (int column = 0; column < call.width; column += kSlice) {
      float c[4][4] = {};
      combine(edges, column, c);
      if constexpr (kCentred<T>) add_row(node(0), column, c);
      store_tile(call.gathered, first, column, c);
    }
  }

  // dx of the nodes from k on, for a tile of askers u with gradients dh.
  __device__ __forceinline__ void add_to_nodes(int k, int column, const Rows16<T>& u, const Rows16<T>& dh,
                                               bool first_tile) const {
    float c[4][4] = {};
    add_weighted(Weights16<T>(slopes + k, 1, call.stride), u, c);
    add_weighted(Weights16<T>(edges + k, 1, call.stride), dh, c);
    const Octet<float> shift = load_octet(call.shift, column + kOctet * t, call.width, call.wide);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = k + g + 8 * h;
      if (own >= nodes.count) continue;
      const float along = slopes[kAskers * call.stride + own];
      float x[kOctet];
      octet_of<T>(c, h, x);
#pragma unroll
      for (int e = 0; e < kOctet; ++e) x[e] += along * shift[e];
      float* row = call.grad_nodes + nodes.row(own) * call.width;
      if (first_tile) {
        store_octet(row, column + kOctet * t, call.width, call.wide, x);
      } else {
        add_octet(row, column + kOctet * t, call.width, call.wide, x);
      }
    }
  }

  // Columns of du summed over the tile.
  __device__ __forceinline__ void add_to_shift(const float (&c)[4][4], int column, float* sums,
                                               bool first_of_run) const {
    float x[kOctet], y[kOctet];
    octet_of<T>(c, 0, x);
    octet_of<T>(c, 1, y);
#pragma unroll
    for (int e = 0; e < kOctet; ++e) x[e] += y[e];
    const float sum = sum_of_rows(x);
    const int own = column + kOctet * t + g;
    if (own < call.width) sums[own] = first_of_run ? sum : sums[own] + sum;
  }

  // With one pass over the columns: u is read before du takes its place.
  __device__ void spread(int first, float* sums, bool first_of_run) const {
#pragma unroll 1
    for (int column = 0; column < call.width; column += kSlice) {
      const Rows16<T> u([&](int r) { return asker(call.asking, first + r); }, column, call.width, call.wide);
      const Rows16<T> dh([&](int r) { return asker(call.gathered, first + r); }, column, call.width, call.wide);
#pragma unroll 1
      for (int k = 0; k < nodes.count; k += 16) add_to_nodes(k, column, u, dh, first == 0);
      float c[4][4] = {};
      combine(slopes, column, c);
      __syncwarp();  // another lane may have read what this one writes
      store_tile(call.asking, first, column, c);
      add_to_shift(c, column, sums, first_of_run && first == 0);
    }
  }

  // Rows of the padding, so that no product finds there what memory held.
  template <class Out>
  __device__ void clear_padding(Out* rows) const {
    const float zeros[kOctet] = {};
    for (int i = nodes.count; i < nodes.extent; ++i) {
      for (int c = kOctet * lane; c < call.width; c += kWarpColumns) {
        store_octet(rows + nodes.row(i) * call.width, c, call.width, call.wide, zeros);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kGraphThreads, kGraphBlocks<T, false>) graph_attend_kernel(const GraphCall<T> call) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (pair >= call.at.pairs) return;
  const PairGraph<T> graph(call, pair, reinterpret_cast<float*>(shared_memory()) + warp * kAskers * call.stride);
  for (int first = 0; first < graph.askers; first += kAskers) {
    graph.template make_edges<false>(first);
    graph.template softmax<false>();
    graph.gather(first);
    __syncwarp();
  }
  if (!call.whole_only) graph.clear_padding(call.gathered);
}

template <class T>
__global__ void __launch_bounds__(kGraphThreads, kGraphBlocks<T, true>)
    graph_attend_backward_kernel(const GraphCall<T> call) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (number >= call.runs) return;
  float* memory = reinterpret_cast<float*>(shared_memory()) + warp * (2 * kAskers + 1) * call.stride;
  const Run run(number, call.runs, call.at.pairs);
  for (int64_t pair = run.begin; pair < run.end; ++pair) {
    const PairGraph<T> graph(call, pair, memory);
    for (int first = 0; first < graph.askers; first += kAskers) {
      graph.template make_edges<true>(first);
      graph.template softmax<true>();
      graph.sum_slopes();
      graph.spread(first, call.sums + number * call.width, pair == run.begin);
      __syncwarp();
    }
    if (!call.whole_only) graph.clear_padding(call.asking);
    graph.clear_padding(call.grad_nodes);
  }
}

template <class T>
struct ReluCall {
  int64_t count;
  int width;
  bool wide;
  T* rows;
  const float* bias;  // [width]
  float* unrounded;   // [count, width], or null: the rows before they are rounded
  const float* grad;  // [count, width]
  float* sums;        // [parts, width]: of the gradient of the bias
};

// A warp a row.
template <class T>
__global__ void __launch_bounds__(kNodeThreads) relu_rows_kernel(const ReluCall<T> call) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNodeWarps + threadIdx.x / 32;
  if (row >= call.count) return;
  T* own = call.rows + row * call.width;
  for (int c = kOctet * (threadIdx.x % 32); c < call.width; c += kWarpColumns) {
    const Octet<T> before = load_octet<T>(own, c, call.width, call.wide);
    const Octet<float> bias = load_octet(call.bias, c, call.width, call.wide);
    float after[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float x = before[i] + bias[i];
      after[i] = x < 0.0f ? 0.0f : x;  // NaN stays NaN
    }
    store_octet(own, c, call.width, call.wide, after);
    if (call.unrounded != nullptr) store_octet(call.unrounded + row * call.width, c, call.width, call.wide, after);
  }
}

// A block of threads 256 columns of a part of the rows, which its warps share. The rows are overwritten by the gradient
// before the relu, whose sums are that of the bias.
template <class T>
__global__ void __launch_bounds__(kNodeThreads) relu_rows_backward_kernel(const ReluCall<T> call) {
  const int64_t begin = blockIdx.x * call.count / gridDim.x, end = (blockIdx.x + int64_t{1}) * call.count / gridDim.x;
  const int first = blockIdx.y * kWarpColumns, c = first + kOctet * (threadIdx.x % 32);
  float sums[kOctet] = {};
  for (int64_t row = begin + threadIdx.x / 32; row < end && c < call.width; row += kNodeWarps) {
    T* own = call.rows + row * call.width;
    const Octet<T> after = load_octet<T>(own, c, call.width, call.wide);
    const Octet<float> grad = load_octet(call.grad + row * call.width, c, call.width, call.wide);
    float before[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      before[i] = after[i] > 0.0f ? grad[i] : 0.0f;
      sums[i] += before[i];
    }
    store_octet(own, c, call.width, call.wide, before);
  }
  const float total = sum_of_warps<kNodeWarps>(sums);
  const int column = first + static_cast<int>(threadIdx.x);
  if (column < call.width) call.sums[blockIdx.x * static_cast<int64_t>(call.width) + column] = total;
}

}  // namespace itm
