// Rows of any length: how the threads of a warp or of a block share one, chunk by chunk, and what they sum over it.
//
// A chunk is 16 bytes of the narrowest type that a kernel streams, so that float32 beside half precision takes two
// words. kWide: every row begins at a multiple of 16 bytes and ends with a whole chunk; without it elements are read
// one by one.
#pragma once

#include "../common/options.h"
#include "words.h"

namespace itm {

constexpr int kRowThreads = 256;                // where a warp takes a row
constexpr int kRowsOfBlock = kRowThreads / 32;  // of threads
constexpr int kColumnThreads = 128;             // where a thread takes columns, or a block a row
constexpr int kFloatsOfBlock = 8;               // so many of a row a thread of kColumnThreads holds: up to 1,024 in all

template <class T>
constexpr int kChunk = 16 / sizeof(T);

template <int kBytes>
using Word = std::conditional_t<kBytes % 16 == 0, int4, int2>;

// `left` elements of a row from p on, zeros behind them.
template <bool kWide, class X, int kEach>
__device__ __forceinline__ void load(const X* p, int left, float (&x)[kEach]) {
  if constexpr (kWide) {
    using Bytes = Word<kEach * sizeof(X)>;
    alignas(16) X raw[kEach];
#pragma unroll
    for (int i = 0; i < static_cast<int>(kEach * sizeof(X) / sizeof(Bytes)); ++i) {
      reinterpret_cast<Bytes*>(raw)[i] = left > 0 ? reinterpret_cast<const Bytes*>(p)[i] : Bytes{};
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] = to_float(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] = i < left ? to_float(p[i]) : 0.0f;
  }
}

template <bool kWide, class X, int kEach>
__device__ __forceinline__ void store(X* p, int left, const float (&x)[kEach]) {
  if constexpr (kWide) {
    using Bytes = Word<kEach * sizeof(X)>;
    alignas(16) X raw[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) raw[i] = from_float<X>(x[i]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(kEach * sizeof(X) / sizeof(Bytes)); ++i) {
      if (left > 0) reinterpret_cast<Bytes*>(p)[i] = reinterpret_cast<const Bytes*>(raw)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i < left) p[i] = from_float<X>(x[i]);
    }
  }
}

// kRows rows of equal length that kTeam threads walk side by side, as often as they like: the first kHeld chunks of
// each thread stay in registers, the others are read again.
template <class X, bool kWide, int kEach, int kTeam, int kHeld, int kRows>
struct HeldRows {
  const X* rows[kRows];
  int width, thread;
  float held[kHeld][kRows][kEach];

  template <class... Pointer>
  __device__ __forceinline__ HeldRows(int width, int thread, const Pointer*... row)
      : rows{row...}, width(width), thread(thread) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) read(column_of(h), held[h]);
  }

  __device__ __forceinline__ int column_of(int h) const { return (h * kTeam + thread) * kEach; }

  __device__ __forceinline__ void read(int column, float (&x)[kRows][kEach]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) load<kWide>(rows[r] + column, width - column, x[r]);
  }

  // visit(first column, number of the chunk, elements of each row); kHeld is the number of all that are read again.
  template <class Visit>
  __device__ __forceinline__ void visit(const Visit& visit) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (column_of(h) < width) visit(column_of(h), h, held[h]);
    }
    for (int column = column_of(kHeld); column < width; column += kTeam * kEach) {
      float x[kRows][kEach];
      read(column, x);
      visit(column, kHeld, x);
    }
  }
};

// A lane holds kFloats of each row: 32 of them are rows of 1,024. Without whole chunks it holds fewer, for their
// addresses need registers too.
template <class X, bool kWide, int kRows, int kFloats>
using RowsOfWarp = HeldRows<X, kWide, kChunk<X>, 32, (kWide ? kFloats / kChunk<X> : 1), kRows>;

// x / d, rounded as a division rounds, where the reciprocal of d is at hand: three instructions an element. d is
// finite.
__device__ __forceinline__ float quotient(float x, float d, float reciprocal) {
  const float q = x * reciprocal;
  return fmaf(fmaf(-q, d, x), reciprocal, q);
}

// The row of this warp; past the last one it has none.
__device__ __forceinline__ int64_t row_of_warp() {
  return int64_t{blockIdx.x} * kRowsOfBlock + static_cast<int>(threadIdx.x) / 32;
}

// Every thread receives the same bits. `parts` must not be those of the sum before: one barrier is enough then.
template <int kWarps>
__device__ __forceinline__ float block_sum(float x, float (&parts)[kWarps]) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += parts[warp];
  return total;
}

}  // namespace itm
