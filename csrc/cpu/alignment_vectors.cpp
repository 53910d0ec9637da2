// Alignment vectors on the CPU (SGRAF, RCAR): what happens between the library products of a chunk.
// The chain is itm_kernels/native/cpu/alignment.py, the mathematics stands in the headers beside this.

#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/capability.h"
#include "../common/options.h"
#include "../common/tile_choice.h"
#include "parallel.h"
#include "row_arguments.h"

namespace itm {
namespace {

constexpr int64_t kRowGrain = 32;  // rows of a piece: at least some microseconds of work

// Products of the keys of some groups with one run of query segments.
template <class Scalar>
struct AttentionCall {
  int64_t groups, keys, lanes;  // keys: of the largest group
  const int64_t* key_counts;    // [groups]
  const int64_t* offsets;       // [segments + 1]
  float* products;              // [groups, keys, lanes]; backward: overwritten by their gradient
  const float* temperatures;    // [groups, lanes], or null: `temperature` for all
  float temperature;
  Scalar* weights;           // [groups, keys, lanes]; backward: their gradient
  float* grad_temperatures;  // [groups, lanes]
  std::vector<int64_t> tiles;
  int64_t most_lanes, most_segments;  // of a tile
};

// Rows [groups * lanes, width]: row r belongs to query r mod lanes.
template <class Scalar>
struct AlignmentCall {
  int64_t rows, lanes, width;
  const Scalar* queries;  // [lanes, width]
  Scalar* attended;       // backward: overwritten by its gradient
  Scalar* squares;        // backward: their gradient
  float* norms;           // [rows]
  float* grad_queries;    // [lanes, width]
};

template <class Scalar>
struct NormaliseCall {
  int64_t count, width;
  Scalar* rows;       // backward: overwritten by the gradient before the norm
  float* wide;        // [count, width]: normalised rows that are not rounded; may be the memory of `rows`
  const float* bias;  // [width]
  float* norms;       // [count]
  const float* grad;  // [count, width]
  Sums sums;          // of the gradient of the bias
};

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "alignment_vectors_kernel.h"
#include "isa.h"

namespace itm {
namespace {

// Whole segments that fit the first-level cache together, as indices of their first one.
template <class Scalar>
void choose_tiles(AttentionCall<Scalar>& call, int64_t segments) {
  const TileBounds bounds = tile_bounds(call.keys);
  call.tiles = {0};
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t first = call.tiles.back();
    if (s > first && call.offsets[s + 1] - call.offsets[first] > bounds.width) call.tiles.push_back(s);
  }
  call.tiles.push_back(segments);
  for (size_t t = 0; t + 1 < call.tiles.size(); ++t) {
    const int64_t first = call.tiles[t], last = call.tiles[t + 1];
    call.most_lanes = std::max(call.most_lanes, call.offsets[last] - call.offsets[first]);
    call.most_segments = std::max(call.most_segments, last - first);
  }
}

template <class Scalar>
AttentionCall<Scalar> attention_call(const Tensor& products, const Tensor& key_counts, const Tensor& offsets,
                                     const MaybeTensor& temperatures, double temperature) {
  STD_TORCH_CHECK(products.dim() == 3, "alignment_attention: products must be [G, K, L]");
  AttentionCall<Scalar> call{};
  call.groups = products.size(0);
  call.keys = products.size(1);
  call.lanes = products.size(2);
  call.products = elements<float>(products, products.numel(), "alignment_attention: products");
  call.key_counts = indices(key_counts, call.groups, "alignment_attention: key_counts");
  for (int64_t g = 0; g < call.groups; ++g) {
    STD_TORCH_CHECK(call.key_counts[g] >= 1 && call.key_counts[g] <= call.keys,
                    "alignment_attention: key_counts must be within 1..K");
  }
  call.offsets = segment_offsets(offsets, call.lanes);
  call.temperatures = elements<float>(temperatures, call.groups * call.lanes, "alignment_attention: temperatures");
  call.temperature = static_cast<float>(temperature);
  choose_tiles(call, offsets.numel() - 1);
  return call;
}

template <class Scalar>
AlignmentCall<Scalar> alignment_call(const Tensor& queries, const Tensor& attended, const Tensor& squares,
                                     const Tensor& norms) {
  AlignmentCall<Scalar> call{};
  call.lanes = queries.size(0);
  call.width = width_of(queries);
  call.rows = attended.size(0);
  times(call.rows, call.lanes);
  const int64_t numel = call.rows * call.width;
  call.queries = elements<Scalar>(queries, call.lanes * call.width, "squared_differences: queries");
  call.attended = elements<Scalar>(attended, numel, "squared_differences: attended");
  call.squares = elements<Scalar>(squares, numel, "squared_differences: squares");
  call.norms = elements<float>(norms, call.rows, "squared_differences: norms");
  return call;
}

template <class Scalar>
NormaliseCall<Scalar> normalise_call(const Tensor& rows, const Tensor& norms, const Tensor& wide) {
  NormaliseCall<Scalar> call{};
  call.count = rows.size(0);
  call.width = width_of(rows);
  call.rows = elements<Scalar>(rows, rows.numel(), "normalise_rows: rows");
  call.norms = elements<float>(norms, call.count, "normalise_rows: norms");
  call.wide = elements<float>(wide, rows.numel(), "normalise_rows: wide");
  return call;
}

}  // namespace

void alignment_attention(Tensor products, Tensor key_counts, Tensor offsets, MaybeTensor temperatures,
                         double temperature, Tensor weights) {
  for_storage_of(weights, [&](auto kind) {
    auto call = attention_call<decltype(kind)>(products, key_counts, offsets, temperatures, temperature);
    call.weights = elements<decltype(kind)>(weights, products.numel(), "alignment_attention: weights");
    ITM_DISPATCH(run_attention, call);
  });
}

void alignment_attention_backward(Tensor products, Tensor key_counts, Tensor offsets, MaybeTensor temperatures,
                                  double temperature, Tensor grad_weights, Tensor grad_temperatures) {
  auto call = attention_call<float>(products, key_counts, offsets, temperatures, temperature);
  call.weights = elements<float>(grad_weights, products.numel(), "alignment_attention: grad_weights");
  call.grad_temperatures =
      elements<float>(grad_temperatures, call.groups * call.lanes, "alignment_attention: grad_temperatures");
  ITM_DISPATCH(run_attention_backward, call);
}

void squared_differences(Tensor queries, Tensor attended, Tensor squares, Tensor norms) {
  for_storage_of(queries, [&](auto kind) {
    const auto call = alignment_call<decltype(kind)>(queries, attended, squares, norms);
    ITM_DISPATCH(run_squared_differences, call);
  });
}

void squared_differences_backward(Tensor queries, Tensor norms, Tensor grad_squares, Tensor attended,
                                  Tensor grad_queries) {
  for_storage_of(queries, [&](auto kind) {
    auto call = alignment_call<decltype(kind)>(queries, attended, grad_squares, norms);
    call.grad_queries = elements<float>(grad_queries, call.lanes * call.width, "squared_differences: grad_queries");
    ITM_DISPATCH(run_squared_differences_backward, call);
  });
}

void normalise_rows(Tensor rows, Tensor bias, Tensor norms, Tensor wide) {
  for_storage_of(rows, [&](auto kind) {
    auto call = normalise_call<decltype(kind)>(rows, norms, wide);
    call.bias = elements<float>(bias, call.width, "normalise_rows: bias");
    ITM_DISPATCH(run_normalise_rows, call);
  });
}

void normalise_rows_backward(Tensor wide, Tensor norms, Tensor grad, Tensor rows, Tensor grad_bias) {
  for_storage_of(rows, [&](auto kind) {
    auto call = normalise_call<decltype(kind)>(rows, norms, wide);
    call.grad = elements<float>(grad, rows.numel(), "normalise_rows: grad");
    call.sums = sums_of(grad_bias, call.width, "normalise_rows: grad_bias");
    ITM_DISPATCH(run_normalise_rows_backward, call);
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("alignment_attention", TORCH_BOX(&itm::alignment_attention));
  m.impl("alignment_attention_backward", TORCH_BOX(&itm::alignment_attention_backward));
  m.impl("squared_differences", TORCH_BOX(&itm::squared_differences));
  m.impl("squared_differences_backward", TORCH_BOX(&itm::squared_differences_backward));
  m.impl("normalise_rows", TORCH_BOX(&itm::normalise_rows));
  m.impl("normalise_rows_backward", TORCH_BOX(&itm::normalise_rows_backward));
}
