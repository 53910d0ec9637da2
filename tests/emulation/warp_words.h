// Warp-wide words: shuffles and votes of CUDA, and the twins of the PTX words of cuda/words.h.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda_scalars.h"
#include "runtime.h"

namespace itm::emulation {

inline void need_whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp-wide word with a mask that is not the whole warp is not emulated");
}

inline void need_aligned(const char* word, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail(std::string(word) + ": address not aligned to 16 bytes");
}

// `source` is a lane, or -1: a lane outside the segment keeps its own value.
template <class T>
T shuffle(const char* word, unsigned mask, T value, int source, Site where) {
  need_whole_warp(mask);
  struct Brought {
    T value, received;
    int source;
  } mine{value, value, source};
  together(word, mine, where, [](auto of) {
    for (int l = 0; l < kLanes; ++l) {
      if (of(l).source >= 0) of(l).received = of(of(l).source).value;
    }
  });
  return mine.received;
}

// The bits of the lanes whose predicate holds.
inline unsigned vote(const char* word, unsigned mask, bool holds, Site where) {
  need_whole_warp(mask);
  struct Brought {
    bool holds;
    unsigned lanes;
  } mine{holds, 0};
  together(word, mine, where, [](auto of) {
    unsigned lanes = 0;
    for (int l = 0; l < kLanes; ++l) lanes |= unsigned(of(l).holds) << l;
    for (int l = 0; l < kLanes; ++l) of(l).lanes = lanes;
  });
  return mine.lanes;
}

inline int first_of_segment(int width) { return lane() & ~(width - 1); }

}  // namespace itm::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              itm::emulation::Site where = itm::emulation::Site::current()) {
  const int first = itm::emulation::first_of_segment(width);
  return itm::emulation::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                  itm::emulation::Site where = itm::emulation::Site::current()) {
  const int source = itm::emulation::lane() ^ flip, last = itm::emulation::first_of_segment(width) + width - 1;
  return itm::emulation::shuffle("__shfl_xor_sync", mask, value, source <= last ? source : -1, where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 itm::emulation::Site where = itm::emulation::Site::current()) {
  const int source = itm::emulation::lane() - static_cast<int>(distance);
  const bool inside = source >= itm::emulation::first_of_segment(width);
  return itm::emulation::shuffle("__shfl_up_sync", mask, value, inside ? source : -1, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   itm::emulation::Site where = itm::emulation::Site::current()) {
  const int source = itm::emulation::lane() + static_cast<int>(distance);
  const bool inside = source < itm::emulation::first_of_segment(width) + width;
  return itm::emulation::shuffle("__shfl_down_sync", mask, value, inside ? source : -1, where);
}

inline unsigned __ballot_sync(unsigned mask, int holds, itm::emulation::Site where = itm::emulation::Site::current()) {
  return itm::emulation::vote("__ballot_sync", mask, holds != 0, where);
}

inline int __any_sync(unsigned mask, int holds, itm::emulation::Site where = itm::emulation::Site::current()) {
  return itm::emulation::vote("__any_sync", mask, holds != 0, where) != 0;
}

inline int __all_sync(unsigned mask, int holds, itm::emulation::Site where = itm::emulation::Site::current()) {
  return itm::emulation::vote("__all_sync", mask, holds != 0, where) == 0xffffffffu;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, itm::emulation::Site where = itm::emulation::Site::current()) {
  itm::emulation::vote("__syncwarp", mask, true, where);
}

namespace itm {

using emulation::shared_memory;

template <class T>
uint32_t pack(float lo, float hi) {
  return uint32_t(T(lo).bits) | uint32_t(T(hi).bits) << 16;
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isnan(x) ? 0x7fffe000u : (bits + 0x1000u) & 0xffffe000u;
}

namespace emulation {

struct Fragments {
  float* c;
  const uint32_t *a, *b;
};

// Element `high` (0, 1) of a register of two.
template <class T>
float element(uint32_t pair, int high) {
  return std::bit_cast<T>(static_cast<uint16_t>(pair >> (16 * high)));
}

// Tensor cores cut the sum of an instruction off, they do not round it.
inline float towards_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// c += a b with matrices that `fill` reads from the lanes' fragments; float32 sums in the order of k.
template <int kDepth, class Fill>
void multiply_fragments(const char* word, Fragments mine, const Site& where, const Fill& fill) {
  together(word, mine, where, [&fill](auto of) {
    float a[16][kDepth], b[kDepth][8], c[16][8];
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, t = l % 4;
      fill(of(l), g, t, a, b);
      for (int i = 0; i < 4; ++i) c[g + 8 * (i / 2)][2 * t + i % 2] = of(l).c[i];
    }
    for (int row = 0; row < 16; ++row) {
      double sums[8];
      for (int column = 0; column < 8; ++column) sums[column] = c[row][column];
      for (int k = 0; k < kDepth; ++k) {
        for (int column = 0; column < 8; ++column) sums[column] += double(a[row][k]) * b[k][column];
      }
      for (int column = 0; column < 8; ++column) c[row][column] = towards_zero(sums[column]);
    }
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < 4; ++i) of(l).c[i] = c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
    }
  });
}

// Lane l of `kMatrices` 8 x 8 matrices, each lane below 8 kMatrices pointing at one row.
template <int kMatrices, bool kTurn>
void load_matrices(const char* word, uint32_t* r, const void* row, const Site& where) {
  struct Brought {
    uint32_t* r;
    const uint16_t* row;
  } mine{r, static_cast<const uint16_t*>(row)};
  if (lane() < 8 * kMatrices) need_aligned(word, row);
  together(word, mine, where, [](auto of) {
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, t = l % 4;
      for (int m = 0; m < kMatrices; ++m) {
        const uint16_t lo = kTurn ? of(8 * m + 2 * t).row[g] : of(8 * m + g).row[2 * t];
        const uint16_t hi = kTurn ? of(8 * m + 2 * t + 1).row[g] : of(8 * m + g).row[2 * t + 1];
        of(l).r[m] = uint32_t(lo) | uint32_t(hi) << 16;
      }
    }
  });
}

}  // namespace emulation

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         emulation::Site where = emulation::Site::current()) {
  emulation::multiply_fragments<16>("mma", {c, a, b}, where, [](auto& lane, int g, int t, auto& a, auto& b) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 2; ++j) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + j] = emulation::element<T>(lane.a[i], j);
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) b[2 * t + 8 * i + j][g] = emulation::element<T>(lane.b[i], j);
    }
  });
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     emulation::Site where = emulation::Site::current()) {
  emulation::multiply_fragments<8>("mma_tf32", {c, a, b}, where, [](auto& lane, int g, int t, auto& a, auto& b) {
    const auto cut = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = cut(lane.a[i]);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = cut(lane.b[i]);
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, emulation::Site where = emulation::Site::current()) {
  emulation::load_matrices<4, false>("ldmatrix_x4", r, row, where);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, emulation::Site where = emulation::Site::current()) {
  emulation::load_matrices<4, true>("ldmatrix_x4_trans", r, row, where);
}

inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, emulation::Site where = emulation::Site::current()) {
  emulation::load_matrices<2, true>("ldmatrix_x2_trans", r, row, where);
}

inline uint32_t movmatrix_trans(uint32_t row, emulation::Site where = emulation::Site::current()) {
  struct Brought {
    uint32_t row, column;
  } mine{row, 0};
  emulation::together("movmatrix_trans", mine, where, [](auto of) {
    uint16_t matrix[8][8];
    for (int l = 0; l < emulation::kLanes; ++l) std::memcpy(&matrix[l / 4][2 * (l % 4)], &of(l).row, 4);
    for (int l = 0; l < emulation::kLanes; ++l) {
      const int g = l / 4, t = l % 4;
      of(l).column = uint32_t(matrix[2 * t][g]) | uint32_t(matrix[2 * t + 1][g]) << 16;
    }
  });
  return mine.column;
}

inline void copy_async_16(void* shared, const void* global, bool valid) {
  emulation::need_aligned("copy_async_16", shared);
  if (valid) emulation::need_aligned("copy_async_16", global);
  emulation::copy_later(shared, global, valid);
}

inline void copy_async_commit() { emulation::close_group_of_copies(); }

template <int N>
void copy_async_wait() {
  emulation::finish_copies(N);
}

}  // namespace itm
