// The correspondence regulator on the CPU (RCAR's RCR): what happens between the library products of a chunk.
// The chain is itm_kernels/native/cpu/correspondence.py, the mathematics stands in the header beside this.

#include <cmath>
#include <cstdint>

#include <torch/csrc/stable/library.h>

#include "../common/capability.h"
#include "../common/options.h"
#include "row_arguments.h"

namespace itm {
namespace {

constexpr int64_t kRowGrain = 32;  // rows of a piece: at least some microseconds of work

template <class Scalar>
struct TanhCall {
  int64_t count, width;
  Scalar* rows;
  const float* bias;  // [width]
  Scalar* grad;
  const float* grad_dots;  // [count]: of the inner products with `weight`, or null: `grad` holds the gradient
  const float* weight;     // [width]
  Sums sums;               // of the gradient of the bias
};

// Rows [groups * lanes, width]: row r belongs to query r mod lanes.
template <class Scalar>
struct GateCall {
  int64_t rows, lanes, width;
  const Scalar* queries;  // [lanes, width]
  Scalar* products;       // overwritten by the gated queries; backward: their gradient, overwritten by that of products
  const float* bias;      // [width]
  const float* before;    // the gate of the step before, or null: ones
  Scalar* tangents;       // or null: not kept
  float* gates;           // or null: not kept
  float* grad_gates;      // in: of this gate, out: of the one before; or null: nobody asks
  float* grad_queries;    // [lanes, width]
  Sums sums;              // of the gradient of the bias
};

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "correspondence_regulator_kernel.h"
#include "isa.h"

namespace itm {
namespace {

template <class Scalar>
TanhCall<Scalar> tanh_call(const Tensor& rows) {
  TanhCall<Scalar> call{};
  call.count = rows.size(0);
  call.width = width_of(rows);
  call.rows = elements<Scalar>(rows, rows.numel(), "tanh_rows: rows");
  return call;
}

template <class Scalar>
GateCall<Scalar> gate_call(const Tensor& products, const Tensor& queries, const MaybeTensor& before,
                           const MaybeTensor& tangents) {
  GateCall<Scalar> call{};
  call.lanes = queries.size(0);
  call.width = width_of(queries);
  call.rows = products.size(0);
  times(call.rows, call.lanes);
  const int64_t numel = call.rows * call.width;
  call.queries = elements<Scalar>(queries, call.lanes * call.width, "gate_queries: queries");
  call.products = elements<Scalar>(products, numel, "gate_queries: products");
  call.before = elements<float>(before, numel, "gate_queries: before");
  call.tangents = elements<Scalar>(tangents, numel, "gate_queries: tangents");
  return call;
}

}  // namespace

void tanh_rows(Tensor rows, Tensor bias) {
  for_storage_of(rows, [&](auto kind) {
    auto call = tanh_call<decltype(kind)>(rows);
    call.bias = elements<float>(bias, call.width, "tanh_rows: bias");
    ITM_DISPATCH(run_tanh_rows, call);
  });
}

void tanh_rows_backward(Tensor rows, MaybeTensor grad_dots, MaybeTensor weight, Tensor grad, Tensor grad_bias) {
  STD_TORCH_CHECK(grad_dots.has_value() == weight.has_value(), "tanh_rows: grad_dots and weight come together");
  for_storage_of(rows, [&](auto kind) {
    auto call = tanh_call<decltype(kind)>(rows);
    call.grad = elements<decltype(kind)>(grad, rows.numel(), "tanh_rows: grad");
    call.grad_dots = elements<float>(grad_dots, call.count, "tanh_rows: grad_dots");
    call.weight = elements<float>(weight, call.width, "tanh_rows: weight");
    call.sums = sums_of(grad_bias, call.width, "tanh_rows: grad_bias");
    ITM_DISPATCH(run_tanh_rows_backward, call);
  });
}

void gate_queries(Tensor queries, Tensor bias, MaybeTensor before, Tensor products, MaybeTensor tangents,
                  MaybeTensor gates) {
  for_storage_of(queries, [&](auto kind) {
    auto call = gate_call<decltype(kind)>(products, queries, before, tangents);
    call.bias = elements<float>(bias, call.width, "gate_queries: bias");
    call.gates = elements<float>(gates, call.rows * call.width, "gate_queries: gates");
    ITM_DISPATCH(run_gate, call);
  });
}

void gate_queries_backward(Tensor queries, MaybeTensor before, Tensor tangents, Tensor grad_products,
                           MaybeTensor grad_gates, Tensor grad_queries, Tensor grad_bias) {
  for_storage_of(queries, [&](auto kind) {
    auto call = gate_call<decltype(kind)>(grad_products, queries, before, tangents);
    call.grad_gates = elements<float>(grad_gates, call.rows * call.width, "gate_queries: grad_gates");
    call.grad_queries = elements<float>(grad_queries, call.lanes * call.width, "gate_queries: grad_queries");
    call.sums = sums_of(grad_bias, call.width, "gate_queries: grad_bias");
    ITM_DISPATCH(run_gate_backward, call);
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("tanh_rows", TORCH_BOX(&itm::tanh_rows));
  m.impl("tanh_rows_backward", TORCH_BOX(&itm::tanh_rows_backward));
  m.impl("gate_queries", TORCH_BOX(&itm::gate_queries));
  m.impl("gate_queries_backward", TORCH_BOX(&itm::gate_queries_backward));
}
