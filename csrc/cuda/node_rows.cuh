// The nodes of a pair (SGRAF): one for each of its words, and one for the whole of it.
//
//   rows [groups * lanes + pairs, width]      first the words as the queries of a block stand, then one row a pair
//
// Lanes are the segments (captions) of a block one after another; a pair is a group and a segment of it. Where a segment
// begins and how many of its rows count is known on the device alone; the others are padding.
#pragma once

#include "words.h"

namespace itm {

struct NodeRows {
  int64_t pairs, segments, lanes;
  const int64_t* offsets;  // [segments + 1]
  const int64_t* counts;   // [segments]
};

struct PairNodes {
  int64_t segment;
  int64_t whole, first;  // rows: of the pair as a whole, of its first word
  int count, extent;     // nodes; and with those of the padding, which come last

  __device__ __forceinline__ PairNodes(const NodeRows& at, int64_t pair) {
    const int64_t group = pair / at.segments;
    segment = pair - group * at.segments;
    const int64_t begin = at.offsets[segment];
    whole = at.pairs / at.segments * at.lanes + pair;
    first = group * at.lanes + begin;
    count = 1 + static_cast<int>(at.counts[segment]);
    extent = 1 + static_cast<int>(at.offsets[segment + 1] - begin);
  }

  // Node 0 is the whole pair.
  __device__ __forceinline__ int64_t row(int node) const { return node == 0 ? whole : first + node - 1; }
};

// Pairs of a run: these belong to one warp, which adds up what they give the parameters.
struct Run {
  int64_t begin, end;

  __device__ __forceinline__ Run(int64_t run, int64_t runs, int64_t pairs)
      : begin(run * pairs / runs), end((run + 1) * pairs / runs) {}
};

}  // namespace itm
