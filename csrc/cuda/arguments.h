// Arguments of host functions: checked, and turned into pointers. They come from our own Python; this protects memory,
// it does not explain.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "groups.cuh"

namespace itm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline const int64_t* indices(const char* op, const MaybeTensor& tensor, int64_t numel, const char* what) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == ScalarType::Long && tensor->numel() == numel, op,
                  ": ", what, " must be contiguous int64 with ", numel, " elements");
  return tensor->const_data_ptr<int64_t>();
}

inline Groups groups_of(const char* op, const MaybeTensor& offsets, const MaybeTensor& counts, int64_t groups,
                        int64_t stride) {
  return {indices(op, offsets, groups + 1, "offsets"), indices(op, counts, groups, "counts"), stride};
}

// Float32, contiguous, written or read by the kernel; null where there is none.
inline float* floats(const char* op, const MaybeTensor& tensor, int64_t numel, const char* what) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == ScalarType::Float && tensor->numel() == numel, op,
                  ": ", what, " must be contiguous float32 with ", numel, " elements");
  return static_cast<float*>(tensor->data_ptr());
}

// run(T{}) with the tensor's element type.
template <class Run>
void for_type_of(const char* op, const Tensor& tensor, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, op, ": must be float32, float16 or bfloat16");
  }
}

}  // namespace itm
