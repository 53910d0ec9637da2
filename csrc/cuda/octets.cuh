// Eight neighbouring columns of a row: the piece in which lanes take rows of any width.
//
// 16 bytes at a time where all rows are aligned for it (`wide`), else one by one; zeros past the end of a row and where
// there is no row (null). Elements become float32 when they are asked for.
#pragma once

#include "words.h"

namespace itm {

constexpr int kOctet = 8;
constexpr int kWarpColumns = 32 * kOctet;  // of a warp at once

template <class T>
__device__ __forceinline__ uint32_t bits_of(T x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half_as_ushort(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat16_as_ushort(x);
  } else {
    return __float_as_uint(x);
  }
}

template <class T>
struct Octet {
  static constexpr int kWords = 4;
  uint32_t words[kWords];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> (i % 2 * 16))));
    }
  }
};

template <>
struct Octet<float> {
  static constexpr int kWords = 8;
  uint32_t words[kWords];

  __device__ __forceinline__ float operator[](int i) const { return __uint_as_float(words[i]); }

  __device__ __forceinline__ void subtract(const Octet<float>& other) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) words[i] = __float_as_uint((*this)[i] - other[i]);
  }
};

template <class T>
__device__ __forceinline__ Octet<T> load_octet(const T* row, int column, int width, bool wide) {
  Octet<T> made{};
  if (row == nullptr) return made;
  if (wide) {
#pragma unroll
    for (int part = 0; part < Octet<T>::kWords / 4; ++part) {
      const int first = column + part * (16 / static_cast<int>(sizeof(T)));
      if (first >= width) break;
      const uint4 four = *reinterpret_cast<const uint4*>(row + first);
      made.words[4 * part] = four.x;
      made.words[4 * part + 1] = four.y;
      made.words[4 * part + 2] = four.z;
      made.words[4 * part + 3] = four.w;
    }
    return made;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (column + i >= width) break;
    const uint32_t bits = bits_of(row[column + i]);
    if constexpr (sizeof(T) == 4) {
      made.words[i] = bits;
    } else {
      made.words[i / 2] |= bits << (i % 2 * 16);
    }
  }
  return made;
}

template <class T>
__device__ __forceinline__ void store_octet(T* row, int column, int width, bool wide, const float (&x)[kOctet]) {
  if (!wide) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (column + i < width) row[column + i] = from_float<T>(x[i]);
    }
    return;
  }
  if (column >= width) return;
  uint4* to = reinterpret_cast<uint4*>(row + column);
  if constexpr (sizeof(T) == 4) {
    to[0] = {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
    if (column + 4 >= width) return;
    to[1] = {__float_as_uint(x[4]), __float_as_uint(x[5]), __float_as_uint(x[6]), __float_as_uint(x[7])};
  } else {
    to[0] = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
  }
}

__device__ __forceinline__ void add_octet(float* row, int column, int width, bool wide, const float (&x)[kOctet]) {
  const Octet<float> before = load_octet(row, column, width, wide);
  float sum[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) sum[i] = before[i] + x[i];
  store_octet(row, column, width, wide, sum);
}

// Sums over the warps of a block of their octets, in the order of the warps: thread i receives column i of the 256.
template <int kWarps>
__device__ __forceinline__ float sum_of_warps(const float (&mine)[kOctet]) {
  static_assert(32 * kWarps == kWarpColumns, "a thread a column");
  __shared__ float room[kWarps][kWarpColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) room[warp][kOctet * lane + i] = mine[i];
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += room[w][threadIdx.x];
  return total;
}

}  // namespace itm
