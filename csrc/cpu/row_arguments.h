// Arguments of the kernels that work on rows: checked, and turned into pointers. They come from our own Python; this
// protects memory, it does not explain.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace itm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Contiguous memory of Scalar: float, or uint16_t for bfloat16.
template <class Scalar>
Scalar* elements(const Tensor& tensor, int64_t numel, const char* what) {
  constexpr ScalarType kType = sizeof(Scalar) == 4 ? ScalarType::Float : ScalarType::BFloat16;
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == kType && tensor.numel() == numel, what,
                  " must be contiguous ", sizeof(Scalar) == 4 ? "float32" : "bfloat16", " with ", numel, " elements");
  return static_cast<Scalar*>(tensor.data_ptr());
}

template <class Scalar>
Scalar* elements(const MaybeTensor& tensor, int64_t numel, const char* what) {
  return tensor.has_value() ? elements<Scalar>(*tensor, numel, what) : nullptr;
}

inline const int64_t* indices(const Tensor& tensor, int64_t numel, const char* what) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long && tensor.numel() == numel, what,
                  " must be contiguous int64 with ", numel, " elements");
  return tensor.const_data_ptr<int64_t>();
}

// Offsets of segments that fill 0 .. end, none of them empty.
inline const int64_t* segment_offsets(const Tensor& tensor, int64_t end) {
  const int64_t* values = indices(tensor, tensor.numel(), "offsets");
  const int64_t last = tensor.numel() - 1;
  STD_TORCH_CHECK(last >= 0 && values[0] == 0 && values[last] == end, "offsets must run from 0 to ", end);
  for (int64_t i = 0; i < last; ++i) STD_TORCH_CHECK(values[i + 1] > values[i], "offsets must increase");
  return values;
}

// Rows of a matrix, contiguous; the rest of the checks is that of elements().
inline int64_t width_of(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous(), "rows must be a contiguous matrix");
  return rows.size(1);
}

inline int64_t times(int64_t rows, int64_t one) {
  STD_TORCH_CHECK(one > 0 && rows % one == 0, "rows must be so many for every group: ", rows, " of ", one);
  return rows / one;
}

// run(Scalar{}) with the storage of a tensor.
template <class Run>
void for_storage_of(const Tensor& tensor, const Run& run) {
  tensor.scalar_type() == ScalarType::Float ? run(float{}) : run(uint16_t{});
}

// work(i) for every i, each by exactly one thread: which one does not change what it computes.
template <class Work>
void for_each_row(int64_t count, int64_t grain, const Work& work) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

// Column sums that a backward makes beside its rows: `partials [P, width]`, one row for each of P runs of rows.
struct Sums {
  float* partials;
  int64_t runs, width;
};

inline Sums sums_of(const Tensor& partials, int64_t width, const char* what) {
  STD_TORCH_CHECK(partials.dim() == 2 && partials.size(0) >= 1, what, " must be [P, width]");
  return {elements<float>(partials, partials.size(0) * width, what), partials.size(0), width};
}

// work(i, sums) for every i, the runs of rows in parallel. Each run adds to sums of its own, in order.
template <class Work>
void for_each_row_with(const Sums& sums, int64_t count, const Work& work) {
  torch::stable::parallel_for(0, sums.runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      float* own = sums.partials + run * sums.width;
      for (int64_t i = 0; i < sums.width; ++i) own[i] = 0.0f;
      for (int64_t i = run * count / sums.runs; i < (run + 1) * count / sums.runs; ++i) work(i, own);
    }
  });
}

}  // namespace itm
