// Arguments of the host functions of SGRAF's kernels.
#pragma once

#include "node_rows.cuh"
#include "row_arguments.h"

namespace itm {

inline int width_of(const char* op, const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) < (int64_t{1} << 30), op, ": rows must be [n, width]");
  return static_cast<int>(rows.size(1));
}

inline NodeRows node_rows(const char* op, const Tensor& nodes, const Tensor& offsets, const Tensor& counts,
                          int64_t pairs) {
  const int64_t segments = counts.numel(), words = nodes.size(0) - pairs;
  STD_TORCH_CHECK(segments > 0 && pairs > 0 && pairs % segments == 0 && words % (pairs / segments) == 0, op, ": ",
                  nodes.size(0), " nodes of ", pairs, " pairs of ", segments, " segments");
  return {pairs, segments, words / (pairs / segments), indices(op, offsets, segments + 1, "offsets"),
          indices(op, counts, segments, "counts")};
}

}  // namespace itm
