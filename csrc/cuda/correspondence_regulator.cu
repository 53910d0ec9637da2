// The correspondence regulator (RCR) on CUDA: what happens between the library products of a block of pairs.
// The chain is itm_kernels/pair_blocks/correspondence.py, the mathematics in the header beside this.

#include "correspondence_regulator_kernel.cuh"
#include "launch.h"
#include "registration.h"
#include "row_arguments.h"

namespace itm {
namespace {

constexpr const char* kOp = "correspondence_regulator";

// Blocks of threads over `parts` runs of rows and slices of the width.
dim3 slices_of(int64_t parts, int64_t width, int each) {
  return dim3(static_cast<unsigned>(parts), blocks_of(width, int64_t{each} * kColumnThreads).x);
}

void check_parts(const Tensor& sums, int64_t rows, int64_t each) {
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) == (rows + each - 1) / each, kOp, ": sums must be in parts of ", each,
                  " rows");
}

template <class T>
Gates<T> gates_of(const PairRows& at, const Tensor& queries, const MaybeTensor& before, ScalarType type) {
  return {rows_like<T>(kOp, queries, at.queries * at.width, type, "queries"),
          rows_like<T>(kOp, before, at.numel(), type, "before"), at.groups, at.queries, at.width};
}

}  // namespace

void block_tanh_rows(Tensor rows, Tensor bias, Tensor out) {
  const DeviceGuard guard(rows.get_device_index());
  STD_TORCH_CHECK(rows.dim() == 2, kOp, ": rows must be [n, H]");
  const int64_t count = rows.size(0), width = rows.size(1);
  const float* x = floats(kOp, rows, count * width, "rows");
  const float* b = floats(kOp, bias, width, "bias");
  for_type_of(kOp, out, [&](auto example) {
    using T = decltype(example);
    T* to = rows_like<T>(kOp, out, count * width, out.scalar_type(), "out");
    for_chunks(in_chunks(width, kChunk<float>, x, b, to), [&](auto wide) {
      launch(tanh_rows_kernel<T, wide()>, blocks_of(count, kRowsOfBlock), kRowThreads, 0,
             current_stream(rows.get_device_index()), x, b, to, count, static_cast<int>(width));
    });
  });
}

void block_warm_rows(Tensor rows, Tensor bias, Tensor weight, Tensor shift, MaybeTensor before, double temperature,
                     Tensor temperatures) {
  const DeviceGuard guard(rows.get_device_index());
  STD_TORCH_CHECK(rows.dim() == 2, kOp, ": rows must be [n, U]");
  const int64_t count = rows.size(0), width = rows.size(1);
  float* x = floats(kOp, rows, count * width, "rows");
  const float* b = floats(kOp, bias, width, "bias");
  const float* w = floats(kOp, weight, width, "weight");
  const float* c = floats(kOp, shift, 1, "shift");
  const float* earlier = floats(kOp, before, count, "before");
  float* out = floats(kOp, temperatures, count, "temperatures");
  for_chunks(in_chunks(width, kChunk<float>, x, b, w), [&](auto wide) {
    launch(warm_rows_kernel<wide()>, blocks_of(count, kRowsOfBlock), kRowThreads, 0,
           current_stream(rows.get_device_index()), x, b, w, c, earlier, static_cast<float>(temperature), out, count,
           static_cast<int>(width));
  });
}

void block_tanh_rows_backward(Tensor tangents, Tensor grad, MaybeTensor factors, Tensor out, Tensor sums) {
  const DeviceGuard guard(tangents.get_device_index());
  STD_TORCH_CHECK(tangents.dim() == 2, kOp, ": tangents must be [n, H]");
  const int64_t count = tangents.size(0), width = tangents.size(1);
  check_parts(sums, count, kSumRows);
  const float* after = floats(kOp, grad, factors.has_value() ? count : count * width, "grad");
  const float* outer = floats(kOp, factors, width, "factors");
  float* parts = floats(kOp, sums, sums.size(0) * width, "sums");
  const auto run = [&](auto kind, auto example) {
    using T = decltype(kind);
    using X = decltype(example);
    const X* t = rows_like<X>(kOp, tangents, count * width, tangents.scalar_type(), "tangents");
    T* to = rows_like<T>(kOp, out, count * width, out.scalar_type(), "out");
    for_chunks(in_chunks(width, kChunk<T>, t, after, outer, to, parts), [&](auto wide) {
      launch(tanh_rows_backward_kernel<T, X, wide()>, slices_of(sums.size(0), width, kChunk<T>), kColumnThreads, 0,
             current_stream(tangents.get_device_index()), t, after, outer, to, parts, count, static_cast<int>(width));
    });
  };
  for_type_of(kOp, out, [&](auto kind) {
    if (tangents.scalar_type() == ScalarType::Float) return run(kind, float{});
    STD_TORCH_CHECK(tangents.scalar_type() == out.scalar_type(), kOp, ": tangents must be float32 or like out");
    run(kind, kind);
  });
}

void block_gate_queries(Tensor queries, Tensor bias, MaybeTensor before, Tensor rows, MaybeTensor tangents,
                        MaybeTensor gates) {
  const DeviceGuard guard(rows.get_device_index());
  const PairRows at = pair_rows_of(kOp, queries, rows);
  const float* b = floats(kOp, bias, at.width, "bias");
  const ScalarType type = rows.scalar_type();
  for_type_of(kOp, rows, [&](auto example) {
    using T = decltype(example);
    const Gates<T> call = gates_of<T>(at, queries, before, type);
    T* z = rows_like<T>(kOp, rows, at.numel(), type, "rows");
    T* t = rows_like<T>(kOp, tangents, at.numel(), type, "tangents");
    T* e = rows_like<T>(kOp, gates, at.numel(), type, "gates");
    for_chunks(in_chunks(at.width, kChunk<T>, call.queries, call.before, b, z, t, e), [&](auto wide) {
      launch(gate_queries_kernel<T, wide()>, blocks_of(at.rows(), kRowsOfBlock), kRowThreads, 0,
             current_stream(rows.get_device_index()), call, b, z, t, e);
    });
  });
}

void block_gate_queries_backward(Tensor queries, MaybeTensor before, Tensor tangents, Tensor grad,
                                 MaybeTensor grad_gates, Tensor grad_queries, Tensor sums) {
  const DeviceGuard guard(grad.get_device_index());
  const PairRows at = pair_rows_of(kOp, queries, grad);
  check_parts(sums, at.queries, kGatedQueries);
  float* carried = floats(kOp, grad_gates, at.numel(), "grad_gates");
  float* of_queries = floats(kOp, grad_queries, at.queries * at.width, "grad_queries");
  float* parts = floats(kOp, sums, sums.size(0) * at.width, "sums");
  const ScalarType type = grad.scalar_type();
  for_type_of(kOp, grad, [&](auto example) {
    using T = decltype(example);
    const Gates<T> call = gates_of<T>(at, queries, before, type);
    const T* t = rows_like<T>(kOp, tangents, at.numel(), type, "tangents");
    T* d = rows_like<T>(kOp, grad, at.numel(), type, "grad");
    const bool chunks = in_chunks(at.width, kChunk<T>, call.queries, call.before, t, d, carried, of_queries, parts);
    for_chunks(chunks, [&](auto wide) {
      launch(gate_queries_backward_kernel<T, wide()>, slices_of(sums.size(0), at.width, kChunk<T>), kColumnThreads, 0,
             current_stream(grad.get_device_index()), call, t, d, carried, of_queries, parts);
    });
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("block_tanh_rows", TORCH_BOX(&itm::block_tanh_rows));
  m.impl("block_warm_rows", TORCH_BOX(&itm::block_warm_rows));
  m.impl("block_tanh_rows_backward", TORCH_BOX(&itm::block_tanh_rows_backward));
  m.impl("block_gate_queries", TORCH_BOX(&itm::block_gate_queries));
  m.impl("block_gate_queries_backward", TORCH_BOX(&itm::block_gate_queries_backward));
}
