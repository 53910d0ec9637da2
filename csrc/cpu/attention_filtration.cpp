// Attention filtration on the CPU (SGRAF's SAF): the nodes of a chunk of pairs to one vector a pair, or to scores, and
// back.
// The chain is itm_kernels/native/cpu/filtration.py, the mathematics stands in the header beside this.

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
constexpr int64_t kPairsOfRun = 4;

struct LogitsCall {
  int64_t count, width;
  const float* nodes;
  const float* weight;  // [width]
  float bias;
  float* logits;  // [count]
};

struct FiltrationCall {
  NodeRows at;
  const float* nodes;
  const float* logits;      // [rows]
  const float* statistics;  // [2, segments]: mean and biased variance
  float norm_weight, norm_bias, eps;
  float* filtered;            // [pairs, width]; backward: their gradient, read only
  const float* score_weight;  // [width]
  float score_bias;
  float* scores;        // [pairs]; backward: their gradient, read only
  const float* weight;  // [width], of the logits
  const float* means;   // [2, segments]: of dy and of dy z over a caption, zero where they have no part
  float* slopes;        // [pairs, 2]: sums of dy and of dy z
  float* grad_nodes;    // [rows, width], or null: slopes alone
  Sums sums;            // of the gradients of weight [width], bias, and behind them score_weight [width], score_bias
};

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "attention_filtration_kernel.h"
#include "isa.h"

namespace itm {
namespace {

FiltrationCall filtration_call(const Tensor& nodes, const Tensor& offsets, const Tensor& logits,
                               const Tensor& statistics, double norm_weight, double norm_bias, double eps,
                               int64_t pairs) {
  FiltrationCall call{};
  call.at = node_rows(nodes, offsets, pairs);
  call.nodes = elements<float>(nodes, nodes.numel(), "filter_nodes: nodes");
  call.logits = elements<float>(logits, nodes.size(0), "filter_nodes: logits");
  call.statistics = elements<float>(statistics, 2 * call.at.segments, "filter_nodes: statistics");
  call.norm_weight = static_cast<float>(norm_weight);
  call.norm_bias = static_cast<float>(norm_bias);
  call.eps = static_cast<float>(eps);
  call.sums = {nullptr, (call.at.pairs + kPairsOfRun - 1) / kPairsOfRun, 0};
  return call;
}

void set_filtered(FiltrationCall& call, const Tensor& filtered) {
  call.filtered = elements<float>(filtered, call.at.pairs * call.at.width, "filter_nodes: filtered");
}

void set_scores(FiltrationCall& call, const Tensor& score_weight, double score_bias, const Tensor& scores) {
  call.score_weight = elements<float>(score_weight, call.at.width, "filtrate_nodes: score_weight");
  call.score_bias = static_cast<float>(score_bias);
  call.scores = elements<float>(scores, call.at.pairs, "filtrate_nodes: scores");
}

// What a backward makes; `width` is that of the sums.
void set_gradients(FiltrationCall& call, const Tensor& weight, const Tensor& means, const Tensor& slopes,
                   const MaybeTensor& grad_nodes, const MaybeTensor& sums, int64_t width) {
  call.weight = elements<float>(weight, call.at.width, "filter_nodes: weight");
  call.means = elements<float>(means, 2 * call.at.segments, "filter_nodes: means");
  call.slopes = elements<float>(slopes, 2 * call.at.pairs, "filter_nodes: slopes");
  call.grad_nodes = elements<float>(grad_nodes, call.at.rows() * call.at.width, "filter_nodes: grad_nodes");
  if (!grad_nodes.has_value()) return;
  STD_TORCH_CHECK(sums.has_value(), "filter_nodes: sums go with grad_nodes");
  call.sums = sums_of(*sums, width, "filter_nodes: sums");
}

}  // namespace

void node_logits(Tensor nodes, Tensor weight, double bias, Tensor logits) {
  LogitsCall call{};
  call.count = nodes.size(0);
  call.width = width_of(nodes);
  call.nodes = elements<float>(nodes, nodes.numel(), "node_logits: nodes");
  call.weight = elements<float>(weight, call.width, "node_logits: weight");
  call.bias = static_cast<float>(bias);
  call.logits = elements<float>(logits, call.count, "node_logits: logits");
  ITM_DISPATCH(run_logits, call);
}

void filter_nodes(Tensor nodes, Tensor offsets, Tensor logits, Tensor statistics, double norm_weight, double norm_bias,
                  double eps, Tensor filtered) {
  auto call = filtration_call(nodes, offsets, logits, statistics, norm_weight, norm_bias, eps, filtered.size(0));
  set_filtered(call, filtered);
  ITM_DISPATCH(run_filter, call);
}

void filter_nodes_backward(Tensor nodes, Tensor offsets, Tensor logits, Tensor statistics, double norm_weight,
                           double norm_bias, double eps, Tensor grad_filtered, Tensor weight, Tensor means,
                           Tensor slopes, MaybeTensor grad_nodes, MaybeTensor sums) {
  auto call = filtration_call(nodes, offsets, logits, statistics, norm_weight, norm_bias, eps, grad_filtered.size(0));
  set_filtered(call, grad_filtered);
  set_gradients(call, weight, means, slopes, grad_nodes, sums, call.at.width + 1);
  ITM_DISPATCH(run_filter_backward, call);
}

void filtrate_nodes(Tensor nodes, Tensor offsets, Tensor logits, Tensor statistics, double norm_weight,
                    double norm_bias, double eps, Tensor score_weight, double score_bias, Tensor scores) {
  auto call = filtration_call(nodes, offsets, logits, statistics, norm_weight, norm_bias, eps, scores.numel());
  set_scores(call, score_weight, score_bias, scores);
  ITM_DISPATCH(run_filtration, call);
}

void filtrate_nodes_backward(Tensor nodes, Tensor offsets, Tensor logits, Tensor statistics, double norm_weight,
                             double norm_bias, double eps, Tensor score_weight, double score_bias, Tensor grad_scores,
                             Tensor weight, Tensor means, Tensor slopes, MaybeTensor grad_nodes, MaybeTensor sums) {
  auto call = filtration_call(nodes, offsets, logits, statistics, norm_weight, norm_bias, eps, grad_scores.numel());
  set_scores(call, score_weight, score_bias, grad_scores);
  set_gradients(call, weight, means, slopes, grad_nodes, sums, 2 * call.at.width + 2);
  ITM_DISPATCH(run_filtration_backward, call);
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("node_logits", TORCH_BOX(&itm::node_logits));
  m.impl("filter_nodes", TORCH_BOX(&itm::filter_nodes));
  m.impl("filter_nodes_backward", TORCH_BOX(&itm::filter_nodes_backward));
  m.impl("filtrate_nodes", TORCH_BOX(&itm::filtrate_nodes));
  m.impl("filtrate_nodes_backward", TORCH_BOX(&itm::filtrate_nodes_backward));
}
