// The quadratic form a^T G a and its gradient dG = sum_q dq a a^T on the tensor cores, for either precision.
//
// Weights come as accumulator fragments of a chunk of 16 queries: w[j] are the columns 8 j + 2 t, + 1 of rows g and
// g + 8 (words.h). They are the left operand as they stand. float16 holds weights in [0, 1] with 11 bits and the Gram
// matrix scaled by its largest diagonal entry, which no entry exceeds; float32 splits every operand in two tf32 parts
// and leaves the product of the small parts out (error 2^-21). Tensor cores cut sums off instead of rounding them, always
// towards zero: float32 sums of many products are added up outside, where they are rounded.
//
// In shared memory the Gram matrix of a group is [columns, stride] of Weight, both padded with zeros. It is symmetric,
// so a right operand's column is read as a row: two neighbours at once, strides chosen without bank conflicts.
#pragma once

#include "words.h"

namespace itm {

// Chunk of a tile whose first row is `row`, tiles m and n of 16 and 8 keys: sums over 16 queries are added to c.

struct HalfArithmetic {
  using Weight = __half;
  static constexpr bool kScaled = true;

  // (G a) of the keys 8 j + 2 t, + 1; `tiles` of w are in use, the others are zero.
  template <int kTiles>
  struct Image {
    uint32_t a[(kTiles + 1) / 2][4];

    __device__ __forceinline__ explicit Image(const float (&w)[kTiles][4]) {
#pragma unroll
      for (int k = 0; k < (kTiles + 1) / 2; ++k) {
        a[k][0] = pack<__half>(w[2 * k][0], w[2 * k][1]);
        a[k][1] = pack<__half>(w[2 * k][2], w[2 * k][3]);
        a[k][2] = 2 * k + 1 < kTiles ? pack<__half>(w[(2 * k + 1) % kTiles][0], w[(2 * k + 1) % kTiles][1]) : 0;
        a[k][3] = 2 * k + 1 < kTiles ? pack<__half>(w[(2 * k + 1) % kTiles][2], w[(2 * k + 1) % kTiles][3]) : 0;
      }
    }

    __device__ __forceinline__ void of(const __half* gram, int stride, int j, int tiles, float (&c)[4]) const {
      const int lane = threadIdx.x % 32;
      const __half* row = gram + (8 * j + lane / 4) * stride + 2 * (lane % 4);
      c[0] = c[1] = c[2] = c[3] = 0.0f;
#pragma unroll
      for (int k = 0; k < (kTiles + 1) / 2; ++k) {
        if (2 * k >= tiles) break;
        const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(row + 16 * k),
                               *reinterpret_cast<const uint32_t*>(row + 16 * k + 8)};
        mma<__half>(c, a[k], b);
      }
    }
  };

  // dq does not fit float16, its range is that of the upstream gradient: both operands become bfloat16.
  static __device__ __forceinline__ uint32_t scaled(uint32_t pair, float low, float high) {
    const __half2 both = *reinterpret_cast<const __half2*>(&pair);
    return pack<__nv_bfloat16>(__low2float(both) * low, __high2float(both) * high);
  }

  static __device__ __forceinline__ void add_outer(const __half* weights, int stride, const float* grad_quadratic,
                                                   int row, int m, int n, float (&c)[4]) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    uint32_t a[4], b[2];
    ldmatrix_x4_trans(a, weights + (row + lane % 8 + lane / 16 * 8) * stride + 16 * m + lane / 8 % 2 * 8);
    ldmatrix_x2_trans(b, weights + (row + lane % 16) * stride + 8 * n);
    for (uint32_t& pair : a) pair = scaled(pair, 1.0f, 1.0f);
    b[0] = scaled(b[0], grad_quadratic[row + 2 * t], grad_quadratic[row + 2 * t + 1]);
    b[1] = scaled(b[1], grad_quadratic[row + 2 * t + 8], grad_quadratic[row + 2 * t + 9]);
    mma<__nv_bfloat16>(c, a, b);
  }
};

// Also where the user allows tf32: that speaks of the library products, and the epilogue is not bound by this.
struct FloatArithmetic {
  using Weight = float;
  static constexpr bool kScaled = false;

  static __device__ __forceinline__ void multiply(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    uint32_t large_a[4], large_b[2], small_a[4], small_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      large_a[i] = to_tf32(a[i]);
      small_a[i] = to_tf32(a[i] - __uint_as_float(large_a[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      large_b[i] = to_tf32(b[i]);
      small_b[i] = to_tf32(b[i] - __uint_as_float(large_b[i]));
    }
    mma_tf32(c, small_a, large_b);
    mma_tf32(c, large_a, small_b);
    mma_tf32(c, large_a, large_b);
  }

  // The same for a long sum.
  static __device__ __forceinline__ void multiply_apart(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply(part, a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += part[i];
  }

  template <int kTiles>
  struct Image {
    const float (&w)[kTiles][4];

    __device__ __forceinline__ explicit Image(const float (&weights)[kTiles][4]) : w(weights) {}

    // A register of the left operand holds one key: t and t + 4 stand for the keys 2 t and 2 t + 1, on both sides.
    __device__ __forceinline__ void of(const float* gram, int stride, int j, int tiles, float (&c)[4]) const {
      const int lane = threadIdx.x % 32;
      const float* row = gram + (8 * j + lane / 4) * stride + 2 * (lane % 4);
      c[0] = c[1] = c[2] = c[3] = 0.0f;
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        if (k >= tiles) break;
        const float2 pair = *reinterpret_cast<const float2*>(row + 8 * k);
        const float a[4] = {w[k][0], w[k][2], w[k][1], w[k][3]};
        const float b[2] = {pair.x, pair.y};
        if constexpr (kTiles <= 8) {
          multiply_apart(c, a, b);
        } else {
          multiply(c, a, b);  // no registers are left for it
        }
      }
    }
  };

  static __device__ __forceinline__ void add_outer(const float* weights, int stride, const float* grad_quadratic,
                                                   int row, int m, int n, float (&c)[4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = row + 8 * half + t;
      const float* low = weights + first * stride;
      const float* high = low + 4 * stride;
      const float a[4] = {low[16 * m + g], low[16 * m + g + 8], high[16 * m + g], high[16 * m + g + 8]};
      const float b[2] = {low[8 * n + g] * grad_quadratic[first], high[8 * n + g] * grad_quadratic[first + 4]};
      multiply(c, a, b);
    }
  }
};

}  // namespace itm
