// Products of a warp on the small matrices of a pair: rows of nodes with rows, and weights with rows.
//
// Fragments are those of words.h, lane = 4 g + t. Which columns of a row an instruction calls k, or n, is ours to choose
// as long as both sides agree: a lane takes eight neighbours, so that rows come and go 16 bytes at a time, straight
// between memory and fragments.
//
// Half precision: rows times rows are exact products as they stand. Weights are float32, of any range, and go in two
// parts of bfloat16, together 16 bits; beside them float16 rows become two such parts as well, which hold all of them.
// float32: every operand in two tf32 parts, sums outside of the tensor cores (arithmetic.cuh).
#pragma once

#include "arithmetic.cuh"
#include "octets.cuh"

namespace itm {

constexpr int kSlice = 4 * kOctet;  // columns of a row that a quad of lanes holds

// c += (rows g and g + 8 of a left matrix) (row g of a right one)^T over the columns of a slice.
template <class T>
__device__ __forceinline__ void add_dots(const Octet<T>& low, const Octet<T>& high, const Octet<T>& other,
                                         float (&c)[4]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t a[4] = {low.words[2 * s], high.words[2 * s], low.words[2 * s + 1], high.words[2 * s + 1]};
      const uint32_t b[2] = {other.words[2 * s], other.words[2 * s + 1]};
      mma<T>(c, a, b);
    }
  } else {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const float a[4] = {low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]};
      const float b[2] = {other[2 * s], other[2 * s + 1]};
      FloatArithmetic::multiply_apart(c, a, b);
    }
  }
}

// Two floats in bfloat16, and what that leaves of them.
struct Parts {
  uint32_t high, low;

  __device__ __forceinline__ static Parts of(float x, float y) {
    const uint32_t high = pack<__nv_bfloat16>(x, y);
    return {high, pack<__nv_bfloat16>(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u))};
  }
};

// 16 x 16 weights in shared memory as a left operand; element (r, k) stands at r * row + k * column.
template <class T>
struct Weights16 {
  uint32_t high[4], low[4];

  __device__ __forceinline__ Weights16(const float* weights, int row, int column) {
    const int lane = threadIdx.x % 32;
    const float* own = weights + lane / 4 * row + 2 * (lane % 4) * column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* at = own + i % 2 * 8 * row + i / 2 * 8 * column;
      const Parts parts = Parts::of(at[0], at[column]);
      high[i] = parts.high;
      low[i] = parts.low;
    }
  }
};

template <>
struct Weights16<float> {
  float a[2][4];

  __device__ __forceinline__ Weights16(const float* weights, int row, int column) {
    const int lane = threadIdx.x % 32;
    const float* own = weights + lane / 4 * row + lane % 4 * column;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][i] = own[i % 2 * 8 * row + (8 * s + i / 2 * 4) * column];
    }
  }
};

// A slice of 16 rows as a right operand of four tiles. `row_of(r)`: row r, or null.
template <class T>
struct Rows16 {
  static constexpr int kParts = std::is_same_v<T, __half> ? 2 : 1;
  uint32_t b[kParts][4][2];

  // Lanes take octets of rows g and g + 8; turned by movmatrix, tile j has the columns 8 i + 2 j and the next of every
  // octet i.
  template <class RowOf>
  __device__ __forceinline__ Rows16(const RowOf& row_of, int first, int width, bool wide) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Octet<T> row = load_octet<T>(row_of(lane / 4 + 8 * h), first + kOctet * (lane % 4), width, wide);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t turned = movmatrix_trans(row.words[j]);
        if constexpr (kParts == 1) {
          b[0][j][h] = turned;
        } else {
          const __half2 both = *reinterpret_cast<const __half2*>(&turned);
          const Parts parts = Parts::of(__low2float(both), __high2float(both));
          b[0][j][h] = parts.high;
          b[1][j][h] = parts.low;
        }
      }
    }
  }
};

template <>
struct Rows16<float> {
  float b[2][4][2];

  // Lanes take four columns of rows t, t + 4, t + 8 and t + 12; tile j has column 4 i + j of every four i.
  template <class RowOf>
  __device__ __forceinline__ Rows16(const RowOf& row_of, int first, int width, bool wide) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float four[4];
      load_four(row_of(threadIdx.x % 4 + 4 * r), first, width, wide, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) b[r / 2][j][r % 2] = four[j];
    }
  }

  // One row from all of them.
  __device__ __forceinline__ void subtract(const float* row, int first, int width, bool wide) {
    float four[4];
    load_four(row, first, width, wide, four);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) b[r / 2][j][r % 2] -= four[j];
    }
  }

  static __device__ __forceinline__ void load_four(const float* row, int first, int width, bool wide,
                                                   float (&four)[4]) {
    const int column = first + threadIdx.x % 32 / 4 * 4;
    if (row != nullptr && wide && column < width) {
      const float4 word = *reinterpret_cast<const float4*>(row + column);
      four[0] = word.x, four[1] = word.y, four[2] = word.z, four[3] = word.w;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = row != nullptr && column + i < width ? row[column + i] : 0.0f;
  }
};

// c += weights rows: sums of 16 rows for 16 others.
template <class T>
__device__ __forceinline__ void add_weighted(const Weights16<T>& weights, const Rows16<T>& rows, float (&c)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int s = 0; s < 2; ++s) FloatArithmetic::multiply_apart(c[j], weights.a[s], rows.b[s][j]);
    } else {
      if constexpr (Rows16<T>::kParts == 2) mma<__nv_bfloat16>(c[j], weights.high, rows.b[1][j]);
      mma<__nv_bfloat16>(c[j], weights.low, rows.b[0][j]);
      mma<__nv_bfloat16>(c[j], weights.high, rows.b[0][j]);
    }
  }
}

// Column i of an octet of such a sum: its tile, and which of the tile's two columns.
template <class T>
__device__ __forceinline__ constexpr int tile_of(int i) {
  return sizeof(T) == 4 ? i % 4 : i / 2;
}
template <class T>
__device__ __forceinline__ constexpr int pair_of(int i) {
  return sizeof(T) == 4 ? i / 4 : i % 2;
}

// The octet at 8 t of row g + 8 h.
template <class T>
__device__ __forceinline__ void octet_of(const float (&c)[4][4], int h, float (&x)[kOctet]) {
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] = c[tile_of<T>(i)][2 * h + pair_of<T>(i)];
}

// Sums over the lanes g of octets at 8 t: lane (g, t) receives that of column 8 t + g.
__device__ __forceinline__ float sum_of_rows(float (&x)[kOctet]) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = g & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(kWholeWarp, sent, 4 * half);
    }
  }
  return x[0];
}

}  // namespace itm
