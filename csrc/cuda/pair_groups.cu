// Rows of one side of a block of pairs: ragged groups as packed rows, these as padded groups for batched library
// products, and gradients the way back.
//
//   rows[begin(g) + k] = vectors[g, k]      padded[g, k] = rows[begin(g) + k], 0 past the group's last
//   gradient[place(g) + k] += padded[g, k]
//
// Owner: a warp has one row. Read: rows that count, once, in chunks of 16 bytes where strides allow it. Nothing is
// computed or one number is added: the same bits always, no atomics. Never in memory: indices of rows. The trick: a
// warp finds the group of its row by itself, 32 groups at a time, and the first row of a group writes what is known of
// the group, so that tables and rows are one launch.

#include "launch.h"
#include "registration.h"
#include "row_arguments.h"
#include "row_words.cuh"

namespace itm {
namespace {

constexpr const char* kOp = "pair_groups";

struct Tables {
  int64_t* offsets;   // [groups + 1]
  int64_t* counts;    // [groups]
  int32_t* segments;  // [rows]
};

template <class T>
struct Given {
  const T* data;
  bool packed;
  int64_t group_stride, row_stride, stride;
};

template <class T, bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    pack_groups_kernel(const Given<T> vectors, const Groups groups, int64_t num_groups, int64_t num_rows, T* rows,
                       int width, const Tables tables) {
  const int64_t row = row_of_warp();
  if (row >= num_rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t group = first_group_from(groups, num_groups, row + 1) - 1, first = groups.begin(group), k = row - first;
  const int count = groups.count(group);
  if (lane == 0) {
    tables.segments[row] = k < count ? static_cast<int32_t>(group) : -1;
    if (k == 0) {
      tables.offsets[group] = first;
      tables.counts[group] = count;
      if (group == num_groups - 1) tables.offsets[num_groups] = num_rows;
    }
  }
  if (rows == nullptr) return;
  const int64_t at = vectors.packed ? row * vectors.row_stride : group * vectors.group_stride + k * vectors.row_stride;
  const T* from = vectors.data + at;
  T* to = rows + row * width;
  if constexpr (kWide) {
    constexpr int kEach = kChunk<T>;
    for (int column = kEach * lane; column < width; column += 32 * kEach) {
      float x[kEach];
      load<true>(from + column, k < count ? width - column : 0, x);
      store<true>(to + column, width - column, x);
    }
  } else {
    for (int column = lane; column < width; column += 32) {
      to[column] = k < count ? from[column * vectors.stride] : from_float<T>(0.0f);
    }
  }
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    pad_groups_kernel(const T* rows, const int64_t* offsets, const int64_t* counts, T* padded, int64_t all,
                      int64_t most, int width) {
  constexpr int kEach = kChunk<T>;
  const int64_t row = row_of_warp();
  if (row >= all) return;
  const int64_t group = row / most, k = row % most;
  const T* from = rows + (offsets[group] + k) * width;
  const bool counts_here = k < counts[group];
  for (int column = kEach * static_cast<int>(threadIdx.x % 32); column < width; column += 32 * kEach) {
    float x[kEach];
    load<kWide>(from + column, counts_here ? width - column : 0, x);
    store<kWide>(padded + row * width + column, width - column, x);
  }
}

// `extent` 0: the gradient is packed as the rows are.
template <bool kWide>
__global__ void __launch_bounds__(kRowThreads)
    add_padded_kernel(const float* padded, const int64_t* offsets, const int64_t* counts, int64_t extent,
                      float* gradient, int64_t all, int64_t most, int width) {
  constexpr int kEach = kChunk<float>;
  const int64_t row = row_of_warp();
  if (row >= all) return;
  const int64_t group = row / most, k = row % most;
  if (k >= counts[group]) return;
  const float* from = padded + row * width;
  float* to = gradient + ((extent > 0 ? group * extent : offsets[group]) + k) * width;
  for (int column = kEach * static_cast<int>(threadIdx.x % 32); column < width; column += 32 * kEach) {
    float x[kEach], total[kEach];
    load<kWide>(from + column, width - column, x);
    load<kWide>(to + column, width - column, total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) total[i] += x[i];
    store<kWide>(to + column, width - column, total);
  }
}

}  // namespace

void block_pack_groups(Tensor vectors, MaybeTensor bounds, MaybeTensor valid, int64_t extent, MaybeTensor rows,
                       Tensor offsets, Tensor counts, Tensor segments) {
  const DeviceGuard guard(vectors.get_device_index());
  const int64_t num_groups = counts.numel(), num_rows = segments.numel();
  STD_TORCH_CHECK(vectors.dim() == 2 || vectors.dim() == 3, kOp, ": vectors must be [n, D] or [G, K, D]");
  const bool packed = vectors.dim() == 2;
  STD_TORCH_CHECK(packed ? vectors.size(0) == num_rows : vectors.size(0) == num_groups, kOp,
                  ": vectors do not go with counts and segments");
  STD_TORCH_CHECK(bounds.has_value() || num_rows == num_groups * extent, kOp, ": rows must be groups x extent");
  STD_TORCH_CHECK(segments.is_contiguous() && segments.scalar_type() == ScalarType::Int, kOp,
                  ": segments must be contiguous int32");
  const Groups groups = groups_of(kOp, bounds, valid, num_groups, extent);
  const Tables tables{const_cast<int64_t*>(indices(kOp, offsets, num_groups + 1, "offsets")),
                      const_cast<int64_t*>(indices(kOp, counts, num_groups, "counts")),
                      static_cast<int32_t*>(segments.data_ptr())};
  const int64_t width = vectors.size(packed ? 1 : 2);
  for_type_of(kOp, vectors, [&](auto example) {
    using T = decltype(example);
    const Given<T> from{static_cast<const T*>(vectors.const_data_ptr()), packed, packed ? 0 : vectors.stride(0),
                        vectors.stride(packed ? 0 : 1), vectors.stride(packed ? 1 : 2)};
    T* to = rows_like<T>(kOp, rows, num_rows * width, vectors.scalar_type(), "rows");
    const bool strides = from.stride == 1 && from.row_stride % kChunk<T> == 0 && from.group_stride % kChunk<T> == 0;
    for_chunks(strides && in_chunks(width, kChunk<T>, from.data, to), [&](auto wide) {
      launch(pack_groups_kernel<T, wide()>, blocks_of(num_rows, kRowsOfBlock), kRowThreads, 0,
             current_stream(vectors.get_device_index()), from, groups, num_groups, num_rows, to,
             static_cast<int>(width), tables);
    });
  });
}

void block_pad_groups(Tensor rows, Tensor offsets, Tensor counts, Tensor padded) {
  const DeviceGuard guard(rows.get_device_index());
  STD_TORCH_CHECK(padded.dim() == 3, kOp, ": padded must be [G, K, D]");
  const int64_t groups = padded.size(0), most = padded.size(1), width = padded.size(2);
  const int64_t* first = indices(kOp, offsets, groups + 1, "offsets");
  const int64_t* number = indices(kOp, counts, groups, "counts");
  for_type_of(kOp, rows, [&](auto example) {
    using T = decltype(example);
    const T* from = rows_like<T>(kOp, rows, rows.size(0) * width, rows.scalar_type(), "rows");
    T* to = rows_like<T>(kOp, padded, padded.numel(), rows.scalar_type(), "padded");
    for_chunks(in_chunks(width, kChunk<T>, from, to), [&](auto wide) {
      launch(pad_groups_kernel<T, wide()>, blocks_of(groups * most, kRowsOfBlock), kRowThreads, 0,
             current_stream(rows.get_device_index()), from, first, number, to, groups * most, most,
             static_cast<int>(width));
    });
  });
}

void block_add_padded(Tensor padded, Tensor offsets, Tensor counts, int64_t extent, Tensor gradient) {
  const DeviceGuard guard(padded.get_device_index());
  STD_TORCH_CHECK(padded.dim() == 3, kOp, ": padded must be [G, K, D]");
  const int64_t groups = padded.size(0), most = padded.size(1), width = padded.size(2);
  STD_TORCH_CHECK(extent == 0 || gradient.numel() >= groups * extent * width, kOp, ": gradient is too short");
  const int64_t* first = indices(kOp, offsets, groups + 1, "offsets");
  const int64_t* number = indices(kOp, counts, groups, "counts");
  const float* from = floats(kOp, padded, padded.numel(), "padded");
  float* to = floats(kOp, gradient, gradient.numel(), "gradient");
  for_chunks(in_chunks(width, kChunk<float>, from, to), [&](auto wide) {
    launch(add_padded_kernel<wide()>, blocks_of(groups * most, kRowsOfBlock), kRowThreads, 0,
           current_stream(padded.get_device_index()), from, first, number, extent, to, groups * most, most,
           static_cast<int>(width));
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("block_pack_groups", TORCH_BOX(&itm::block_pack_groups));
  m.impl("block_pad_groups", TORCH_BOX(&itm::block_pad_groups));
  m.impl("block_add_padded", TORCH_BOX(&itm::block_add_padded));
}
