// Arguments of host functions that stream rows: checked, turned into pointers, and whether they allow whole chunks.
#pragma once

#include "arguments.h"

namespace itm {

// [n, width], contiguous, of type T; null where there is none. Any shape of so many elements will do.
template <class T>
T* rows_like(const char* op, const MaybeTensor& tensor, int64_t numel, ScalarType type, const char* what) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == type && tensor->numel() == numel, op, ": ", what,
                  " must be contiguous with ", numel, " elements of the type of the rows");
  return static_cast<T*>(tensor->data_ptr());
}

// Rows of a pair block: row `g * queries + l` is query l facing key group g.
struct PairRows {
  int64_t groups, queries;
  int width;

  int64_t rows() const { return groups * queries; }
  int64_t numel() const { return rows() * width; }
};

inline PairRows pair_rows_of(const char* op, const Tensor& queries, const Tensor& rows) {
  STD_TORCH_CHECK(queries.dim() == 2 && rows.dim() == 2 && queries.size(0) > 0 && queries.size(1) == rows.size(1) &&
                      rows.size(0) % queries.size(0) == 0,
                  op, ": rows must be [groups x queries, D] beside queries [queries, D]");
  return {rows.size(0) / queries.size(0), queries.size(0), static_cast<int>(queries.size(1))};
}

// Whether rows of `width` elements can be read in chunks of `each`; pointers that are null do not matter.
template <class... Pointer>
bool in_chunks(int64_t width, int each, const Pointer*... pointers) {
  return width % each == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// run(std::true_type{}) or run(std::false_type{}).
template <class Run>
void for_chunks(bool wide, const Run& run) {
  if (wide) return run(std::true_type{});
  return run(std::false_type{});
}

inline dim3 blocks_of(int64_t count, int64_t each) { return dim3(static_cast<unsigned>((count + each - 1) / each)); }

}  // namespace itm
