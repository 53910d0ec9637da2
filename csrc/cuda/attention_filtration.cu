// Attention filtration on CUDA (SGRAF's SAF): the nodes of a block of pairs to scores, and back.
// The block loop is itm_kernels/pair_blocks/similarity_reasoning_scores.py, the mathematics in the header beside this.

#include "attention_filtration_kernel.cuh"
#include "launch.h"
#include "node_arguments.h"
#include "registration.h"

namespace itm {
namespace {

constexpr const char* kOp = "filtrate_nodes";

// Parameters of one number stay on their device.
struct Numbers {
  const Tensor &norm_weight, &norm_bias, &score_bias;
};

FiltrationCall filtration_call(const Tensor& nodes, const Tensor& offsets, const Tensor& counts, const Tensor& logits,
                               const Tensor& statistics, const Numbers& numbers, double eps, const Tensor& score_weight,
                               const Tensor& scores) {
  FiltrationCall call{};
  call.at = node_rows(kOp, nodes, offsets, counts, scores.numel());
  call.width = width_of(kOp, nodes);
  call.nodes = floats(kOp, nodes, nodes.numel(), "nodes");
  call.logits = floats(kOp, logits, nodes.size(0), "logits");
  call.statistics = floats(kOp, statistics, 2 * call.at.segments, "statistics");
  call.norm_weight = floats(kOp, numbers.norm_weight, 1, "norm_weight");
  call.norm_bias = floats(kOp, numbers.norm_bias, 1, "norm_bias");
  call.eps = static_cast<float>(eps);
  call.score_weight = floats(kOp, score_weight, call.width, "score_weight");
  call.score_bias = floats(kOp, numbers.score_bias, 1, "score_bias");
  call.scores = floats(kOp, scores, call.at.pairs, "scores");
  call.wide = in_chunks(call.width, 4, call.nodes, call.score_weight);
  return call;
}

}  // namespace

void block_node_logits(Tensor nodes, Tensor weight, Tensor bias, Tensor logits) {
  const DeviceGuard guard(nodes.get_device_index());
  const int64_t count = nodes.size(0);
  const int width = width_of("node_logits", nodes);
  const float* rows = floats("node_logits", nodes, nodes.numel(), "nodes");
  const float* by = floats("node_logits", weight, width, "weight");
  launch(node_logits_kernel, blocks_of(count, kNodeWarps), kNodeThreads, 0, current_stream(nodes.get_device_index()),
         rows, by, floats("node_logits", bias, 1, "bias"), count, width, in_chunks(width, 4, rows, by),
         floats("node_logits", logits, count, "logits"));
}

void block_filtrate_nodes(Tensor nodes, Tensor offsets, Tensor counts, Tensor logits, Tensor statistics,
                          Tensor norm_weight, Tensor norm_bias, double eps, Tensor score_weight, Tensor score_bias,
                          Tensor scores) {
  const DeviceGuard guard(nodes.get_device_index());
  const auto call = filtration_call(nodes, offsets, counts, logits, statistics, {norm_weight, norm_bias, score_bias},
                                    eps, score_weight, scores);
  launch(filtrate_nodes_kernel, blocks_of(call.at.pairs, kNodeWarps), kNodeThreads, 0,
         current_stream(nodes.get_device_index()), call);
}

void block_filtrate_nodes_backward(Tensor nodes, Tensor offsets, Tensor counts, int64_t most_nodes, Tensor logits,
                                   Tensor statistics, Tensor norm_weight, Tensor norm_bias, double eps,
                                   Tensor score_weight, Tensor score_bias, Tensor grad_scores, Tensor weight,
                                   MaybeTensor means, Tensor slopes, MaybeTensor grad_nodes, MaybeTensor sums) {
  const DeviceGuard guard(nodes.get_device_index());
  auto call = filtration_call(nodes, offsets, counts, logits, statistics, {norm_weight, norm_bias, score_bias}, eps,
                              score_weight, grad_scores);
  call.most = static_cast<int>(most_nodes);
  call.weight = floats(kOp, weight, call.width, "weight");
  call.means = floats(kOp, means, 2 * call.at.segments, "means");
  call.slopes = floats(kOp, slopes, 2 * call.at.pairs, "slopes");
  call.grad_nodes = floats(kOp, grad_nodes, nodes.numel(), "grad_nodes");
  call.runs = call.at.pairs;
  STD_TORCH_CHECK(grad_nodes.has_value() == sums.has_value(), kOp, ": sums go with grad_nodes");
  if (sums.has_value()) {
    call.runs = sums->size(0);
    call.sums_stride = width_of(kOp, *sums);
    STD_TORCH_CHECK(call.sums_stride >= 2 * call.width + 2, kOp, ": sums must have 2 x width + 2 columns");
    call.sums = floats(kOp, sums, call.runs * call.sums_stride, "sums");
  }
  call.wide =
      call.wide && call.sums_stride % 4 == 0 && in_chunks(call.width, 4, call.weight, call.grad_nodes, call.sums);
  const int64_t warp_bytes = filtration_bytes(most_nodes, call.width);
  STD_TORCH_CHECK(warp_bytes <= kMostNodeBytes, kOp, ": pairs of ", most_nodes, " nodes of ", call.width,
                  " columns take ", warp_bytes, " bytes of shared memory, the kernel has ", kMostNodeBytes);
  const NodesLaunch dealt = nodes_launch(kNodeWarps, warp_bytes);
  launch(filtrate_nodes_backward_kernel, blocks_of(call.runs, dealt.warps), static_cast<int>(32 * dealt.warps),
         static_cast<size_t>(dealt.shared_bytes), current_stream(nodes.get_device_index()), call);
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("block_node_logits", TORCH_BOX(&itm::block_node_logits));
  m.impl("block_filtrate_nodes", TORCH_BOX(&itm::block_filtrate_nodes));
  m.impl("block_filtrate_nodes_backward", TORCH_BOX(&itm::block_filtrate_nodes_backward));
}
