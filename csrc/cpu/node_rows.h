// Nodes of a chunk of pairs (SGRAF): every pair has one node for each of its words and one for the whole of it.
//
//   rows [groups * lanes + pairs, width]      first the words as the queries of a chunk stand, then one row a pair
//
// So the words and the wholes are each one run, for products of their own, and all nodes are one run, for the products
// that they share. Lanes are the segments (captions) of a chunk one after another; a pair is a group and a segment.
#pragma once

#include <algorithm>
#include <cstdint>

#include "row_arguments.h"

namespace itm {
namespace {

struct NodeRows {
  int64_t pairs, segments, lanes, width;
  int64_t most;            // nodes of a pair
  const int64_t* offsets;  // [segments + 1]

  int64_t words() const { return pairs / segments * lanes; }
  int64_t rows() const { return words() + pairs; }
  int64_t count(int64_t pair) const {
    const int64_t s = pair % segments;
    return 1 + offsets[s + 1] - offsets[s];
  }
  // Node 0 is the whole pair.
  int64_t row(int64_t pair, int64_t node) const {
    if (node == 0) return words() + pair;
    return pair / segments * lanes + offsets[pair % segments] + node - 1;
  }
};

inline NodeRows node_rows(const Tensor& nodes, const Tensor& offsets, int64_t pairs) {
  NodeRows at{};
  at.width = width_of(nodes);
  at.pairs = pairs;
  at.segments = offsets.numel() - 1;
  const int64_t groups = times(pairs, at.segments);
  at.lanes = times(nodes.size(0) - pairs, groups);
  at.offsets = segment_offsets(offsets, at.lanes);
  for (int64_t s = 0; s < at.segments; ++s) at.most = std::max(at.most, at.count(s));
  return at;
}

}  // namespace
}  // namespace itm
