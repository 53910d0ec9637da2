// How the CUDA kernels of SGRAF deal out the nodes of pairs: pure arithmetic on shapes, for the launch and its tests.
#pragma once

#include <cstdint>

namespace itm {

// Warps of a block of threads: 8 where rows stream through, 4 where products hold many registers.
constexpr int kNodeWarps = 8;
constexpr int kNodeThreads = 32 * kNodeWarps;
constexpr int kGraphWarps = 4;
constexpr int kGraphThreads = 32 * kGraphWarps;
constexpr int kAskers = 16;                    // nodes that ask at once: the rows of a tensor core's left operand
constexpr int64_t kMostNodeBytes = 99 * 1024;  // of shared memory a warp: what every GPU from sm_80 on gives a block

struct NodesLaunch {
  int64_t warps, shared_bytes;  // of a block of threads
};

// Fewer warps where pairs are so large that all of them would take more than comes without asking.
inline NodesLaunch nodes_launch(int64_t warps, int64_t warp_bytes) {
  while (warps > 1 && warps * warp_bytes > 48 * 1024) warps /= 2;
  return {warps, warps * warp_bytes};
}

// Columns of a warp's edges: the nodes in chunks of 16, and 8 more, with which no two rows of a fragment share a bank.
constexpr int64_t edge_stride(int64_t most_nodes) { return (most_nodes + 15) / 16 * 16 + 8; }

// The edges of a tile of askers; for the backward their gradients and the sums of these.
constexpr int64_t graph_bytes(int64_t most_nodes, bool backward) {
  return edge_stride(most_nodes) * (backward ? 2 * kAskers + 1 : kAskers) * 4;
}

// Whole octets of a row.
constexpr int64_t row_room(int64_t width) { return (width + 7) / 8 * 8; }

// Backward alone: the sum of the nodes and its gradient, and two numbers a node.
constexpr int64_t filtration_bytes(int64_t most_nodes, int64_t width) {
  return (2 * row_room(width) + (most_nodes + 1) / 2 * 4) * 4;
}

}  // namespace itm
