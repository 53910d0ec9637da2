// Gram matrices X_g X_g^T and norms of ragged groups of rows, and their way back:
//
//   grad_rows += (dG_g + dG_g^T) X_g + dnorm x / ||x||
//
// Owner: one block of threads a group (backward: a group and 128 columns), so every sum has one owner and one order;
// dG arrives as parts (one a split of the epilogue) and is summed on the way in, and so are the parts of dnorm.
// Accumulation float32: half precision multiplies exactly on the tensor cores, float32 as three tf32 products. The work
// grows with I + C, not with I x C: kept short rather than fast.

#include "arguments.h"
#include "arithmetic.cuh"
#include "launch.h"
#include "registration.h"

namespace itm {
namespace {

constexpr const char* kOp = "gram";
constexpr int kGramThreads = 128;

template <class T>
struct Rows {
  const T* data;
  int64_t stride;  // between rows
  int width;       // D
  bool pairs;      // elements 2 i and 2 i + 1 stand in one aligned word
};

// Elements k and k + 1 of a row, zeros past its end and where there is no row.
template <class T>
__device__ __forceinline__ float2 load_pair(const Rows<T>& rows, const T* row, int k) {
  if (row == nullptr || k >= rows.width) return {0.0f, 0.0f};
  if (k + 1 >= rows.width) return {to_float(row[k]), 0.0f};
  if constexpr (sizeof(T) == 4) {
    if (rows.pairs) return *reinterpret_cast<const float2*>(row + k);
  }
  return {to_float(row[k]), to_float(row[k + 1])};
}

template <class T>
__device__ __forceinline__ uint32_t load_packed(const Rows<T>& rows, const T* row, int k) {
  if (rows.pairs && row != nullptr && k + 1 < rows.width) return *reinterpret_cast<const uint32_t*>(row + k);
  const float2 both = load_pair(rows, row, k);
  return pack<T>(both.x, both.y);
}

// c += 16 columns of (16 rows) (8 rows)^T; null pointers are rows of zeros.
template <class T>
__device__ __forceinline__ void multiply_step(const Rows<T>& rows, const T* low, const T* high, const T* other, int k,
                                              float (&c)[4]) {
  const int t = threadIdx.x % 4;
  if constexpr (sizeof(T) == 2) {
    const uint32_t a[4] = {load_packed(rows, low, k + 2 * t), load_packed(rows, high, k + 2 * t),
                           load_packed(rows, low, k + 2 * t + 8), load_packed(rows, high, k + 2 * t + 8)};
    const uint32_t b[2] = {load_packed(rows, other, k + 2 * t), load_packed(rows, other, k + 2 * t + 8)};
    mma<T>(c, a, b);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = load_pair(rows, low, k + 8 * half + 2 * t), y = load_pair(rows, high, k + 8 * half + 2 * t);
      const float2 z = load_pair(rows, other, k + 8 * half + 2 * t);
      FloatArithmetic::multiply_apart(c, {x.x, y.x, x.y, y.y}, {z.x, z.y});
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kGramThreads, 8)
    gram_kernel(const Rows<T> rows, const Groups groups, float* gram, int64_t most, float* norms) {
  const int64_t group = blockIdx.x;
  const int64_t first = groups.begin(group);
  const int count = groups.count(group), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto row_of = [&](int r) { return r < count ? rows.data + (first + r) * rows.stride : nullptr; };
  if (norms != nullptr) {
    const int all = static_cast<int>(groups.begin(group + 1) - first);
    for (int r = warp; r < all; r += kGramThreads / 32) {
      const T* row = row_of(r);
      float total = 0.0f;
      for (int k = 2 * lane; k < rows.width; k += 64) {
        const float2 both = load_pair(rows, row, k);
        total += both.x * both.x + both.y * both.y;
      }
      total = warp_sum(total);
      if (lane == 0) norms[first + r] = sqrtf(total);
    }
  }
  if (gram == nullptr) return;
  const int across = (count + 7) / 8, down = (count + 15) / 16;
  for (int item = warp; item < across * down; item += kGramThreads / 32) {
    const int m = item / across, n = item % across, g = lane / 4, t = lane % 4;
    const T *low = row_of(16 * m + g), *high = row_of(16 * m + g + 8), *other = row_of(8 * n + g);
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int k = 0; k < rows.width; k += 16) multiply_step(rows, low, high, other, k, c);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = 16 * m + g + 8 * (e / 2), k = 8 * n + 2 * t + e % 2;
      if (r < count && k < count) gram[(group * most + r) * most + k] = c[e];
    }
  }
}

constexpr int kRowsAtOnce = 8, kKeysAtOnce = 64;

struct OwnGradient {
  const float* gram;  // [splits, groups, most, most], or null
  int64_t splits, most;
  const float* grad_norms;  // [parts, rows], or null
  int64_t parts, all_rows;
  const float* norms;  // [rows]
};

template <class T>
__global__ void __launch_bounds__(kGramThreads, 8)
    gram_backward_kernel(const Rows<T> rows, const Groups groups, const OwnGradient grads, float* out) {
  __shared__ float matrix[kRowsAtOnce][kKeysAtOnce];
  __shared__ float scale[kRowsAtOnce];
  const int64_t group = blockIdx.x, first = groups.begin(group), square = grads.most * grads.most;
  const int count = groups.count(group), column = blockIdx.y * kGramThreads + threadIdx.x;
  const bool inside = column < rows.width;
  for (int r = 0; r < count; r += kRowsAtOnce) {
    float total[kRowsAtOnce] = {};
    __syncthreads();
    if (threadIdx.x < kRowsAtOnce) {
      const int64_t row = first + r + threadIdx.x;
      float along = 0.0f;
      if (grads.grad_norms != nullptr && r + static_cast<int>(threadIdx.x) < count) {
        for (int64_t part = 0; part < grads.parts; ++part) along += grads.grad_norms[part * grads.all_rows + row];
        // On the floor of the cosine the gradient is zero; so is it where the norm is.
        along = grads.norms[row] > 0.0f ? along / grads.norms[row] : 0.0f;
      }
      scale[threadIdx.x] = along;
    }
    for (int j0 = 0; grads.gram != nullptr && j0 < count; j0 += kKeysAtOnce) {
      __syncthreads();
      for (int i = threadIdx.x; i < kRowsAtOnce * kKeysAtOnce; i += kGramThreads) {
        const int a = r + i / kKeysAtOnce, b = j0 + i % kKeysAtOnce;
        float value = 0.0f;
        for (int64_t split = 0; a < count && b < count && split < grads.splits; ++split) {
          const float* part = grads.gram + (split * gridDim.x + group) * square;
          value += part[a * grads.most + b] + part[b * grads.most + a];
        }
        matrix[i / kKeysAtOnce][i % kKeysAtOnce] = value;
      }
      __syncthreads();
      const int keys = min(kKeysAtOnce, count - j0);
      for (int j = 0; inside && j < keys; ++j) {
        const float x = to_float(rows.data[(first + j0 + j) * rows.stride + column]);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) total[i] += matrix[i][j] * x;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (!inside || r + i >= count) continue;
      const int64_t row = first + r + i;
      out[row * rows.width + column] += total[i] + scale[i] * to_float(rows.data[row * rows.stride + column]);
    }
  }
}

template <class T>
Rows<T> rows_of(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.stride(1) == 1, "gram: rows must be [n, D] with D contiguous");
  const auto* data = static_cast<const T*>(rows.const_data_ptr());
  const bool pairs = rows.stride(0) % 2 == 0 && reinterpret_cast<uintptr_t>(data) % 8 == 0;
  return {data, rows.stride(0), static_cast<int>(rows.size(1)), pairs};
}

}  // namespace

void gram_of_groups(Tensor rows, MaybeTensor offsets, MaybeTensor counts, int64_t groups, int64_t stride,
                    MaybeTensor gram, MaybeTensor norms) {
  const DeviceGuard guard(rows.get_device_index());
  const Groups where = groups_of(kOp, offsets, counts, groups, stride);
  float* matrices = floats(kOp, gram, groups * stride * stride, "gram");
  float* lengths = floats(kOp, norms, rows.size(0), "norms");
  for_type_of(kOp, rows, [&](auto example) {
    using T = decltype(example);
    launch(gram_kernel<T>, dim3(static_cast<unsigned>(groups)), kGramThreads, 0,
           current_stream(rows.get_device_index()), rows_of<T>(rows), where, matrices, stride, lengths);
  });
}

void gram_of_groups_backward(Tensor rows, MaybeTensor offsets, MaybeTensor counts, int64_t groups, int64_t stride,
                             MaybeTensor grad_gram, MaybeTensor grad_norms, MaybeTensor norms, Tensor grad_rows) {
  const DeviceGuard guard(rows.get_device_index());
  const Groups where = groups_of(kOp, offsets, counts, groups, stride);
  float* out = floats(kOp, grad_rows, rows.numel(), "grad_rows");
  OwnGradient grads{nullptr, 0, stride, nullptr, 0, rows.size(0), nullptr};
  if (grad_gram.has_value()) {
    grads.splits = grad_gram->size(0);
    grads.gram = floats(kOp, grad_gram, grads.splits * groups * stride * stride, "grad_gram");
  }
  if (grad_norms.has_value()) {
    grads.parts = grad_norms->size(0);
    grads.grad_norms = floats(kOp, grad_norms, grads.parts * rows.size(0), "grad_norms");
    grads.norms = floats(kOp, norms, rows.size(0), "norms");
    STD_TORCH_CHECK(grads.norms != nullptr, "gram: grad_norms comes with norms");
  }
  const auto columns = static_cast<unsigned>((rows.size(1) + kGramThreads - 1) / kGramThreads);
  for_type_of(kOp, rows, [&](auto example) {
    using T = decltype(example);
    launch(gram_backward_kernel<T>, dim3(static_cast<unsigned>(groups), columns), kGramThreads, 0,
           current_stream(rows.get_device_index()), rows_of<T>(rows), where, grads, out);
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("gram_of_groups", TORCH_BOX(&itm::gram_of_groups));
  m.impl("gram_of_groups_backward", TORCH_BOX(&itm::gram_of_groups_backward));
}
