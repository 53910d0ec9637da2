// Groups of vectors in any layout -> packed rows, and packed gradients -> where they belong.
//
//   pack     rows[begin(g) + k] = vectors[g, k]                    zeros where a group has a stride and k is no member
//   unpack   vectors[g, k] = rows[begin(g) + k] in their dtype     zeros where k is no member
//
// Owner: one block of threads a vector; reads and writes everything once, 16 bytes a thread where strides allow it.

#include "arguments.h"
#include "launch.h"
#include "registration.h"

namespace itm {
namespace {

constexpr const char* kOp = "packing";
constexpr int kPackThreads = 128;

template <class T>
struct Vectors {
  T* data;
  int64_t group_stride, member_stride, stride;
  int64_t members, width;
};

template <class T>
__global__ void __launch_bounds__(kPackThreads, 8)
    pack_kernel(const Vectors<const T> vectors, const Groups groups, T* rows, bool wide) {
  const int64_t group = blockIdx.x / vectors.members, k = blockIdx.x % vectors.members;
  const bool member = k < groups.count(group);
  if (!member && groups.offsets != nullptr) return;  // packed rows have no place for it
  const T* from = vectors.data + group * vectors.group_stride + k * vectors.member_stride;
  T* to = rows + (groups.begin(group) + k) * vectors.width;
  if (wide) {
    constexpr int64_t kEach = 16 / sizeof(T);
    for (int64_t d = threadIdx.x; d < vectors.width / kEach; d += kPackThreads) {
      reinterpret_cast<int4*>(to)[d] = member ? reinterpret_cast<const int4*>(from)[d] : int4{0, 0, 0, 0};
    }
    return;
  }
  for (int64_t d = threadIdx.x; d < vectors.width; d += kPackThreads) {
    to[d] = member ? from[d * vectors.stride] : from_float<T>(0.0f);
  }
}

template <class T>
__global__ void __launch_bounds__(kPackThreads, 8)
    unpack_kernel(const float* rows, const Groups groups, const Vectors<T> vectors) {
  const int64_t group = blockIdx.x / vectors.members, k = blockIdx.x % vectors.members;
  const bool member = k < groups.count(group);
  const float* from = rows + (groups.begin(group) + k) * vectors.width;
  T* to = vectors.data + group * vectors.group_stride + k * vectors.member_stride;
  for (int64_t d = threadIdx.x; d < vectors.width; d += kPackThreads) {
    to[d * vectors.stride] = from_float<T>(member ? from[d] : 0.0f);
  }
}

template <class T>
Vectors<T> vectors_of(const Tensor& vectors) {
  STD_TORCH_CHECK(vectors.dim() == 3, "packing: vectors must be [G, K, D]");
  STD_TORCH_CHECK(vectors.size(0) * vectors.size(1) < (int64_t{1} << 31), "packing: a block has ", vectors.size(0),
                  " x ", vectors.size(1), " vectors, 2^31 and more are not supported");
  return {static_cast<T*>(vectors.data_ptr()),
          vectors.stride(0),
          vectors.stride(1),
          vectors.stride(2),
          vectors.size(1),
          vectors.size(2)};
}

}  // namespace

void pack_rows(Tensor vectors, MaybeTensor offsets, MaybeTensor counts, Tensor rows) {
  const DeviceGuard guard(vectors.get_device_index());
  STD_TORCH_CHECK(rows.is_contiguous() && rows.dim() == 2 && rows.size(1) == vectors.size(2) &&
                      rows.scalar_type() == vectors.scalar_type(),
                  "packing: rows must be contiguous [n, D] like vectors");
  const Groups groups = groups_of(kOp, offsets, counts, vectors.size(0), vectors.size(1));
  for_type_of(kOp, vectors, [&](auto example) {
    using T = decltype(example);
    const Vectors<const T> from = vectors_of<const T>(vectors);
    constexpr int64_t kEach = 16 / sizeof(T);
    const bool wide = from.stride == 1 && from.width % kEach == 0 && from.member_stride % kEach == 0 &&
                      from.group_stride % kEach == 0 && reinterpret_cast<uintptr_t>(from.data) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0;
    launch(pack_kernel<T>, dim3(static_cast<unsigned>(vectors.size(0) * vectors.size(1))), kPackThreads, 0,
           current_stream(vectors.get_device_index()), from, groups, static_cast<T*>(rows.data_ptr()), wide);
  });
}

void unpack_rows(Tensor rows, MaybeTensor offsets, MaybeTensor counts, Tensor vectors) {
  const DeviceGuard guard(vectors.get_device_index());
  STD_TORCH_CHECK(rows.is_contiguous() && rows.dim() == 2 && rows.size(1) == vectors.size(2) &&
                      rows.scalar_type() == ScalarType::Float,
                  "packing: rows must be contiguous float32 [n, D]");
  const Groups groups = groups_of(kOp, offsets, counts, vectors.size(0), vectors.size(1));
  for_type_of(kOp, vectors, [&](auto example) {
    using T = decltype(example);
    launch(unpack_kernel<T>, dim3(static_cast<unsigned>(vectors.size(0) * vectors.size(1))), kPackThreads, 0,
           current_stream(vectors.get_device_index()), rows.const_data_ptr<float>(), groups, vectors_of<T>(vectors));
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("pack_rows", TORCH_BOX(&itm::pack_rows));
  m.impl("unpack_rows", TORCH_BOX(&itm::unpack_rows));
}
