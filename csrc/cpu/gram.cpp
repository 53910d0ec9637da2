// Gram matrices of ragged key groups on the CPU. A batched library product would pad every group to the longest and
// compute both triangles; these matrices are 2 to 4 % of the arithmetic of a score, so that padding would show.

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../common/capability.h"
#include "parallel.h"

namespace itm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSlice = 256;  // floats of a row widened at a time: 36 rows are 36 KB

template <class Scalar>
struct GramCall {
  const Scalar* rows;      // [N, width]
  const int64_t* offsets;  // [groups + 1]
  int64_t groups, width, most_keys;
  float* gram;       // [groups, most_keys, most_keys]; backward: its gradient, read only
  float* grad_rows;  // [N, width] (backward)
};

template <class Scalar, class Run>
void run_groups(const GramCall<Scalar>& call, const Run& run) {
  for_each_piece(call.groups, [&] {
    auto slice = std::vector<float>(static_cast<size_t>(call.most_keys * kSlice));
    return [&call, &run, slice = std::move(slice)](int64_t g) mutable {
      const int64_t begin = call.offsets[g];
      run(g, begin, call.offsets[g + 1] - begin, slice.data());
    };
  });
}

}  // namespace
}  // namespace itm

#define ITM_KERNEL_FILE "gram_kernel.h"
#include "isa.h"

namespace itm {
namespace {

template <class Scalar>
GramCall<Scalar> make_call(const Tensor& rows, const Tensor& offsets, const Tensor& gram) {
  GramCall<Scalar> call{};
  call.rows = static_cast<const Scalar*>(rows.const_data_ptr());
  call.offsets = offsets.const_data_ptr<int64_t>();
  call.groups = offsets.numel() - 1;
  call.width = rows.size(1);
  call.most_keys = gram.size(1);
  call.gram = static_cast<float*>(gram.data_ptr());
  return call;
}

void check(const Tensor& rows, const Tensor& offsets, const Tensor& gram) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() &&
                      (rows.scalar_type() == ScalarType::Float || rows.scalar_type() == ScalarType::BFloat16),
                  "gram: rows must be contiguous [N, D], float32 or bfloat16");
  STD_TORCH_CHECK(offsets.is_contiguous() && offsets.scalar_type() == ScalarType::Long && offsets.numel() >= 1,
                  "gram: offsets must be contiguous int64");
  STD_TORCH_CHECK(gram.dim() == 3 && gram.is_contiguous() && gram.scalar_type() == ScalarType::Float &&
                      gram.size(0) == offsets.numel() - 1 && gram.size(1) == gram.size(2),
                  "gram: gram must be contiguous float32 [G, K, K]");
  const int64_t* values = offsets.const_data_ptr<int64_t>();
  for (int64_t g = 0; g + 1 < offsets.numel(); ++g) {
    STD_TORCH_CHECK(values[g] >= 0 && values[g + 1] > values[g] && values[g + 1] - values[g] <= gram.size(1) &&
                        values[g + 1] <= rows.size(0),
                    "gram: offsets must increase, stay within the rows, and groups within K");
  }
}

template <class Scalar>
void forward(const Tensor& rows, const Tensor& offsets, const Tensor& gram) {
  const auto call = make_call<Scalar>(rows, offsets, gram);
  ITM_DISPATCH(run_gram, call);
}

template <class Scalar>
void backward(const Tensor& rows, const Tensor& offsets, const Tensor& grad_gram, const Tensor& grad_rows) {
  auto call = make_call<Scalar>(rows, offsets, grad_gram);
  call.grad_rows = static_cast<float*>(grad_rows.data_ptr());
  ITM_DISPATCH(run_gram_backward, call);
}

}  // namespace

void gram(Tensor rows, Tensor offsets, Tensor out) {
  check(rows, offsets, out);
  rows.scalar_type() == ScalarType::Float ? forward<float>(rows, offsets, out) : forward<uint16_t>(rows, offsets, out);
}

void gram_backward(Tensor grad_gram, Tensor rows, Tensor offsets, Tensor grad_rows) {
  check(rows, offsets, grad_gram);
  STD_TORCH_CHECK(
      grad_rows.is_contiguous() && grad_rows.scalar_type() == ScalarType::Float && grad_rows.numel() == rows.numel(),
      "gram: grad_rows must be contiguous float32 like rows");
  rows.scalar_type() == ScalarType::Float ? backward<float>(rows, offsets, grad_gram, grad_rows)
                                          : backward<uint16_t>(rows, offsets, grad_gram, grad_rows);
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(itm_kernels_native, CPU, m) {
  m.impl("gram", TORCH_BOX(&itm::gram));
  m.impl("gram_backward", TORCH_BOX(&itm::gram_backward));
}
