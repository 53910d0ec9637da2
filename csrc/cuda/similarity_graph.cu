// Similarity graph on CUDA (SGRAF's SGR): what happens between the library products of a step.
// The chain is itm_kernels/pair_blocks/similarity_reasoning_scores.py, the mathematics in the header beside this.

#include "launch.h"
#include "node_arguments.h"
#include "registration.h"
#include "similarity_graph_kernel.cuh"

namespace itm {
namespace {

constexpr const char* kOp = "graph_attend";

template <class T>
GraphCall<T> graph_call(const Tensor& nodes, const Tensor& offsets, const Tensor& counts, int64_t pairs,
                        int64_t most_nodes, const Tensor& asking, const Tensor& shift, const Tensor& gathered) {
  const ScalarType type = nodes.scalar_type();
  GraphCall<T> call{};
  call.at = node_rows(kOp, nodes, offsets, counts, pairs);
  call.width = width_of(kOp, nodes);
  call.stride = static_cast<int>(edge_stride(most_nodes));
  call.whole_only = asking.size(0) == pairs;  // every pair has a word, so there are more nodes than pairs
  const int64_t numel = (call.whole_only ? pairs : nodes.size(0)) * call.width;
  call.nodes = rows_like<T>(kOp, nodes, nodes.numel(), type, "nodes");
  call.asking = rows_like<T>(kOp, asking, numel, type, "asking");
  call.shift = floats(kOp, shift, call.width, "shift");
  call.gathered = rows_like<T>(kOp, gathered, numel, type, "gathered");
  call.wide = in_chunks(call.width, 16 / sizeof(T), call.nodes, call.asking, call.shift, call.gathered);
  return call;
}

NodesLaunch dealt_to(int64_t most_nodes, bool backward) {
  const int64_t warp_bytes = graph_bytes(most_nodes, backward);
  STD_TORCH_CHECK(warp_bytes <= kMostNodeBytes, kOp, ": pairs of ", most_nodes, " nodes take ", warp_bytes,
                  " bytes of shared memory, the kernel has ", kMostNodeBytes);
  return nodes_launch(kGraphWarps, warp_bytes);
}

template <class T>
ReluCall<T> relu_call(const Tensor& rows) {
  ReluCall<T> call{};
  call.count = rows.size(0);
  call.width = width_of("relu_rows", rows);
  call.rows = rows_like<T>("relu_rows", rows, rows.numel(), rows.scalar_type(), "rows");
  return call;
}

}  // namespace

void block_graph_attend(Tensor nodes, Tensor offsets, Tensor counts, int64_t pairs, int64_t most_nodes, Tensor asking,
                        Tensor shift, Tensor gathered) {
  const DeviceGuard guard(nodes.get_device_index());
  const NodesLaunch dealt = dealt_to(most_nodes, false);
  for_type_of(kOp, nodes, [&](auto example) {
    using T = decltype(example);
    const auto call = graph_call<T>(nodes, offsets, counts, pairs, most_nodes, asking, shift, gathered);
    launch(graph_attend_kernel<T>, blocks_of(pairs, dealt.warps), static_cast<int>(32 * dealt.warps),
           static_cast<size_t>(dealt.shared_bytes), current_stream(nodes.get_device_index()), call);
  });
}

void block_graph_attend_backward(Tensor nodes, Tensor offsets, Tensor counts, int64_t pairs, int64_t most_nodes,
                                 Tensor shift, Tensor grad_gathered, Tensor asking, Tensor grad_nodes, Tensor sums) {
  const DeviceGuard guard(nodes.get_device_index());
  const NodesLaunch dealt = dealt_to(most_nodes, true);
  for_type_of(kOp, nodes, [&](auto example) {
    using T = decltype(example);
    auto call = graph_call<T>(nodes, offsets, counts, pairs, most_nodes, asking, shift, grad_gathered);
    call.grad_nodes = floats(kOp, grad_nodes, nodes.numel(), "grad_nodes");
    call.runs = sums.size(0);
    call.sums = floats(kOp, sums, call.runs * call.width, "sums");
    call.wide = call.wide && in_chunks(call.width, 4, call.grad_nodes);
    launch(graph_attend_backward_kernel<T>, blocks_of(call.runs, dealt.warps), static_cast<int>(32 * dealt.warps),
           static_cast<size_t>(dealt.shared_bytes), current_stream(nodes.get_device_index()), call);
  });
}

void block_relu_rows(Tensor rows, Tensor bias, MaybeTensor unrounded) {
  const DeviceGuard guard(rows.get_device_index());
  for_type_of("relu_rows", rows, [&](auto example) {
    using T = decltype(example);
    auto call = relu_call<T>(rows);
    call.bias = floats("relu_rows", bias, call.width, "bias");
    call.unrounded = floats("relu_rows", unrounded, rows.numel(), "unrounded");
    call.wide = in_chunks(call.width, 16 / sizeof(T), call.rows, call.bias, call.unrounded);
    launch(relu_rows_kernel<T>, blocks_of(call.count, kNodeWarps), kNodeThreads, 0,
           current_stream(rows.get_device_index()), call);
  });
}

void block_relu_rows_backward(Tensor grad, Tensor rows, Tensor sums) {
  const DeviceGuard guard(rows.get_device_index());
  for_type_of("relu_rows", rows, [&](auto example) {
    using T = decltype(example);
    auto call = relu_call<T>(rows);
    call.grad = floats("relu_rows", grad, rows.numel(), "grad");
    call.sums = floats("relu_rows", sums, sums.size(0) * call.width, "sums");
    call.wide = in_chunks(call.width, 16 / sizeof(T), call.rows, call.grad);
    const dim3 grid(static_cast<unsigned>(sums.size(0)), blocks_of(call.width, kWarpColumns).x);
    launch(relu_rows_backward_kernel<T>, grid, kNodeThreads, 0, current_stream(rows.get_device_index()), call);
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("block_graph_attend", TORCH_BOX(&itm::block_graph_attend));
  m.impl("block_graph_attend_backward", TORCH_BOX(&itm::block_graph_attend_backward));
  m.impl("block_relu_rows", TORCH_BOX(&itm::block_relu_rows));
  m.impl("block_relu_rows_backward", TORCH_BOX(&itm::block_relu_rows_backward));
}
