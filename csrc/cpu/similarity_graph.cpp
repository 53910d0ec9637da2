// Similarity graph on the CPU (SGRAF's SGR): what happens between the library products of a step.
// The chain is itm_kernels/native/cpu/graph.py, the mathematics stands in the header beside this.

#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/capability.h"
#include "../common/options.h"
#include "node_rows.h"
#include "parallel.h"
#include "row_arguments.h"

namespace itm {
namespace {

constexpr int64_t kRowGrain = 32;  // rows of a piece: at least some microseconds of work
constexpr int64_t kPairsOfRun = 2;

template <class Scalar>
struct GraphCall {
  NodeRows at;
  bool whole_only;      // whether the whole pair alone asks
  const Scalar* nodes;  // [rows, width]
  Scalar* asking;       // [rows, width], or [pairs, width]; backward: overwritten by its gradient
  const float* shift;   // [width], added to every asking row
  Scalar* gathered;     // like asking; backward: its gradient
  float* grad_nodes;    // [rows, width]
  Sums sums;            // of the gradient of the shift
};

template <class Scalar>
struct ReluCall {
  int64_t count, width;
  Scalar* rows;
  const float* bias;  // [width]
  float* wide;        // [count, width], or null: the rows before they are rounded
  const float* grad;  // [count, width]
  Sums sums;          // of the gradient of the bias
};

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "similarity_graph_kernel.h"
#include "isa.h"

namespace itm {
namespace {

template <class Scalar>
GraphCall<Scalar> graph_call(const Tensor& nodes, const Tensor& offsets, int64_t pairs, const Tensor& asking,
                             const Tensor& shift, const Tensor& gathered) {
  GraphCall<Scalar> call{};
  call.at = node_rows(nodes, offsets, pairs);
  call.whole_only = asking.size(0) == pairs;  // every pair has a word, so there are more nodes than pairs
  const int64_t numel = (call.whole_only ? pairs : call.at.rows()) * call.at.width;
  call.nodes = elements<Scalar>(nodes, nodes.numel(), "graph_attend: nodes");
  call.asking = elements<Scalar>(asking, numel, "graph_attend: asking");
  call.shift = elements<float>(shift, call.at.width, "graph_attend: shift");
  call.gathered = elements<Scalar>(gathered, numel, "graph_attend: gathered");
  call.sums = {nullptr, (pairs + kPairsOfRun - 1) / kPairsOfRun, 0};
  return call;
}

template <class Scalar>
ReluCall<Scalar> relu_call(const Tensor& rows) {
  ReluCall<Scalar> call{};
  call.count = rows.size(0);
  call.width = width_of(rows);
  call.rows = elements<Scalar>(rows, rows.numel(), "relu_rows: rows");
  return call;
}

}  // namespace

void graph_attend(Tensor nodes, Tensor offsets, int64_t pairs, Tensor asking, Tensor shift, Tensor gathered) {
  for_storage_of(nodes, [&](auto kind) {
    const auto call = graph_call<decltype(kind)>(nodes, offsets, pairs, asking, shift, gathered);
    ITM_DISPATCH(run_graph, call);
  });
}

void graph_attend_backward(Tensor nodes, Tensor offsets, int64_t pairs, Tensor shift, Tensor grad_gathered,
                           Tensor asking, Tensor grad_nodes, Tensor grad_shift) {
  for_storage_of(nodes, [&](auto kind) {
    auto call = graph_call<decltype(kind)>(nodes, offsets, pairs, asking, shift, grad_gathered);
    call.grad_nodes = elements<float>(grad_nodes, nodes.numel(), "graph_attend: grad_nodes");
    call.sums = sums_of(grad_shift, call.at.width, "graph_attend: grad_shift");
    ITM_DISPATCH(run_graph_backward, call);
  });
}

void relu_rows(Tensor rows, Tensor bias, MaybeTensor wide) {
  for_storage_of(rows, [&](auto kind) {
    auto call = relu_call<decltype(kind)>(rows);
    call.bias = elements<float>(bias, call.width, "relu_rows: bias");
    call.wide = elements<float>(wide, rows.numel(), "relu_rows: wide");
    ITM_DISPATCH(run_relu, call);
  });
}

void relu_rows_backward(Tensor grad, Tensor rows, Tensor grad_bias) {
  for_storage_of(rows, [&](auto kind) {
    auto call = relu_call<decltype(kind)>(rows);
    call.grad = elements<float>(grad, rows.numel(), "relu_rows: grad");
    call.sums = sums_of(grad_bias, call.width, "relu_rows: grad_bias");
    ITM_DISPATCH(run_relu_backward, call);
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("graph_attend", TORCH_BOX(&itm::graph_attend));
  m.impl("graph_attend_backward", TORCH_BOX(&itm::graph_attend_backward));
  m.impl("relu_rows", TORCH_BOX(&itm::relu_rows));
  m.impl("relu_rows_backward", TORCH_BOX(&itm::relu_rows_backward));
}
