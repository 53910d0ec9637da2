// Alignment vectors on CUDA: what happens between the library products of a block of pairs.
// The chain is itm_kernels/pair_blocks/alignment.py, the mathematics in the headers beside this.

#include "alignment_vectors_kernel.cuh"
#include "launch.h"
#include "pair_attention_kernel.cuh"
#include "registration.h"
#include "row_arguments.h"

namespace itm {
namespace {

constexpr const char* kOp = "alignment_vectors";

AttentionCall attention_call(const Tensor& products, const Tensor& key_counts, const Tensor& offsets,
                             const Tensor& counts, const MaybeTensor& temperatures, double temperature,
                             const Tensor& norms) {
  STD_TORCH_CHECK(products.dim() == 3, kOp, ": products must be [groups, keys, queries]");
  const int64_t groups = products.size(0), most = products.size(1), queries = products.size(2);
  AttentionCall call{};
  call.products = floats(kOp, products, products.numel(), "products");
  call.segments = counts.numel();
  call.queries = queries;
  call.most = static_cast<int>(most);
  call.key_counts = indices(kOp, key_counts, groups, "key_counts");
  call.offsets = indices(kOp, offsets, call.segments + 1, "offsets");
  call.counts = indices(kOp, counts, call.segments, "counts");
  call.temperatures = floats(kOp, temperatures, groups * queries, "temperatures");
  call.temperature = static_cast<float>(temperature);
  call.norms = floats(kOp, norms, groups * call.segments * most, "norms");
  return call;
}

// run(whether pairs are staged, blocks of threads, their shared memory); `most_queries` bounds the rows of a segment.
template <class Run>
void for_pairs(const AttentionCall& call, const Tensor& products, int64_t most_queries, bool backward, const Run& run) {
  const int64_t bytes = staged_bytes(call.most, most_queries, backward);
  const dim3 grid(static_cast<unsigned>(products.size(0) * call.segments));
  if (bytes > 0) return run(std::true_type{}, grid, static_cast<size_t>(bytes));
  run(std::false_type{}, grid, size_t{0});
}

}  // namespace

void block_attention_weights(Tensor products, Tensor key_counts, Tensor offsets, Tensor counts, int64_t most_queries,
                             MaybeTensor temperatures, double temperature, Tensor norms, Tensor weights) {
  const DeviceGuard guard(products.get_device_index());
  const auto call = attention_call(products, key_counts, offsets, counts, temperatures, temperature, norms);
  for_type_of(kOp, weights, [&](auto example) {
    using T = decltype(example);
    T* out = rows_like<T>(kOp, weights, products.numel(), weights.scalar_type(), "weights");
    for_pairs(call, products, most_queries, false, [&](auto staged, dim3 grid, size_t bytes) {
      launch(attention_weights_kernel<T, staged()>, grid, kPairThreads, bytes,
             current_stream(products.get_device_index()), call, out);
    });
  });
}

void block_attention_weights_backward(Tensor products, Tensor norms, Tensor key_counts, Tensor offsets, Tensor counts,
                                      int64_t most_queries, MaybeTensor temperatures, double temperature, Tensor grad,
                                      Tensor grad_temperatures, Tensor grad_products) {
  const DeviceGuard guard(products.get_device_index());
  const auto call = attention_call(products, key_counts, offsets, counts, temperatures, temperature, norms);
  const AttentionGradients grads{
      floats(kOp, grad, products.numel(), "grad"),
      floats(kOp, grad_temperatures, products.size(0) * products.size(2), "grad_temperatures")};
  for_type_of(kOp, grad_products, [&](auto example) {
    using T = decltype(example);
    T* out = rows_like<T>(kOp, grad_products, products.numel(), grad_products.scalar_type(), "grad_products");
    for_pairs(call, products, most_queries, true, [&](auto staged, dim3 grid, size_t bytes) {
      launch(attention_weights_backward_kernel<T, staged()>, grid, kPairThreads, bytes,
             current_stream(products.get_device_index()), call, grads, out);
    });
  });
}

void block_squared_differences(Tensor queries, Tensor attended, Tensor squares, Tensor norms) {
  const DeviceGuard guard(attended.get_device_index());
  const PairRows at = pair_rows_of(kOp, queries, attended);
  float* lengths = floats(kOp, norms, at.rows(), "norms");
  const ScalarType type = attended.scalar_type();
  for_type_of(kOp, attended, [&](auto example) {
    using T = decltype(example);
    const T* q = rows_like<T>(kOp, queries, at.queries * at.width, type, "queries");
    const T* c = rows_like<T>(kOp, attended, at.numel(), type, "attended");
    T* out = rows_like<T>(kOp, squares, at.numel(), type, "squares");
    for_chunks(in_chunks(at.width, kChunk<T>, q, c, out), [&](auto wide) {
      launch(squared_differences_kernel<T, wide()>, blocks_of(at.rows(), kRowsOfBlock), kRowThreads, 0,
             current_stream(attended.get_device_index()), q, c, out, lengths, at.rows(), at.queries, at.width);
    });
  });
}

void block_squared_differences_backward(Tensor queries, Tensor attended, Tensor grad_squares, Tensor norms,
                                        Tensor grad_queries) {
  const DeviceGuard guard(attended.get_device_index());
  const PairRows at = pair_rows_of(kOp, queries, attended);
  const float* lengths = floats(kOp, norms, at.rows(), "norms");
  float* of_queries = floats(kOp, grad_queries, at.queries * at.width, "grad_queries");
  const ScalarType type = attended.scalar_type();
  for_type_of(kOp, attended, [&](auto example) {
    using T = decltype(example);
    const T* q = rows_like<T>(kOp, queries, at.queries * at.width, type, "queries");
    T* c = rows_like<T>(kOp, attended, at.numel(), type, "attended");
    const T* grad = rows_like<T>(kOp, grad_squares, at.numel(), type, "grad_squares");
    for_chunks(in_chunks(at.width, kChunk<T>, q, c, grad, of_queries), [&](auto wide) {
      launch(squared_differences_backward_kernel<T, wide()>, blocks_of(at.queries, 1), kColumnThreads, 0,
             current_stream(attended.get_device_index()), q, c, grad, lengths, of_queries, at.groups, at.queries,
             at.width);
    });
  });
}

void block_normalise_rows(Tensor rows, Tensor bias, Tensor norms, MaybeTensor rounded) {
  const DeviceGuard guard(rows.get_device_index());
  STD_TORCH_CHECK(rows.dim() == 2, kOp, ": rows must be [n, S]");
  const int64_t count = rows.size(0), width = rows.size(1);
  float* x = floats(kOp, rows, count * width, "rows");
  const float* b = floats(kOp, bias, width, "bias");
  float* lengths = floats(kOp, norms, count, "norms");
  for_type_of(kOp, rounded.has_value() ? *rounded : rows, [&](auto example) {
    using T = decltype(example);
    T* narrow =
        rounded.has_value() ? rows_like<T>(kOp, rounded, count * width, rounded->scalar_type(), "rounded") : nullptr;
    for_chunks(in_chunks(width, kChunk<float>, x, b, narrow), [&](auto wide) {
      launch(normalise_rows_kernel<T, wide()>, blocks_of(count, kRowsOfBlock), kRowThreads, 0,
             current_stream(rows.get_device_index()), x, b, lengths, narrow, count, static_cast<int>(width));
    });
  });
}

void block_normalise_rows_backward(Tensor rows, Tensor norms, Tensor grad, MaybeTensor rounded) {
  const DeviceGuard guard(rows.get_device_index());
  STD_TORCH_CHECK(rows.dim() == 2, kOp, ": rows must be [n, S]");
  const int64_t count = rows.size(0), width = rows.size(1);
  const float* x = floats(kOp, rows, count * width, "rows");
  const float* lengths = floats(kOp, norms, count, "norms");
  float* gradient = floats(kOp, grad, count * width, "grad");
  for_type_of(kOp, rounded.has_value() ? *rounded : grad, [&](auto example) {
    using T = decltype(example);
    T* narrow =
        rounded.has_value() ? rows_like<T>(kOp, rounded, count * width, rounded->scalar_type(), "rounded") : nullptr;
    for_chunks(in_chunks(width, kChunk<float>, x, gradient, narrow), [&](auto wide) {
      launch(normalise_rows_backward_kernel<T, wide()>, blocks_of(count, kRowsOfBlock), kRowThreads, 0,
             current_stream(rows.get_device_index()), x, lengths, gradient, narrow, count, static_cast<int>(width));
    });
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("block_attention_weights", TORCH_BOX(&itm::block_attention_weights));
  m.impl("block_attention_weights_backward", TORCH_BOX(&itm::block_attention_weights_backward));
  m.impl("block_squared_differences", TORCH_BOX(&itm::block_squared_differences));
  m.impl("block_squared_differences_backward", TORCH_BOX(&itm::block_squared_differences_backward));
  m.impl("block_normalise_rows", TORCH_BOX(&itm::block_normalise_rows));
  m.impl("block_normalise_rows_backward", TORCH_BOX(&itm::block_normalise_rows_backward));
}
