// Vector words, written once and compiled once per instruction set (see isa.h), so there is no include guard.
//
// A Vec is kLanes floats in one register: 16 with AVX-512, 8 with AVX2, 4 elsewhere (SSE2, NEON). Only the vector
// extensions that GCC and Clang share are used, so the same source is the portable path.
// Everything here is inlined into its caller: a Vec never crosses a call, whose ABI would depend on the set.

constexpr int kLanes = ITM_LANES;

typedef float Vec __attribute__((vector_size(4 * ITM_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * ITM_LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * ITM_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * ITM_LANES), aligned(4), may_alias));

#define ITM_INLINE static inline __attribute__((always_inline))

ITM_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
ITM_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
ITM_INLINE Vec splat(float x) { return Vec{} + x; }
ITM_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
ITM_INLINE Vec magnitude(Vec a) { return a < 0.0f ? -a : a; }

ITM_INLINE IntVec lane_index() {
#if ITM_LANES == 16
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif ITM_LANES == 8
  return IntVec{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return IntVec{0, 1, 2, 3};
#endif
}

// The first n lanes of v, `other` in the rest: how the ragged end of a segment is left out of a sum or a maximum.
ITM_INLINE Vec first_lanes(Vec v, int64_t n, float other) {
  const int32_t limit = n < kLanes ? static_cast<int32_t>(n) : kLanes;
  return lane_index() < limit ? v : splat(other);
}

ITM_INLINE float sum_of_lanes(Vec v) {
  typedef float Quad __attribute__((vector_size(16)));
#if ITM_LANES == 16
  typedef float Oct __attribute__((vector_size(32)));
  const Oct half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Quad quad = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif ITM_LANES == 8
  const Quad quad = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
  const Quad quad = v;
#endif
  const Quad pair = quad + __builtin_shufflevector(quad, quad, 2, 3, 0, 1);
  return pair[0] + pair[1];
}

ITM_INLINE float largest_of_lanes(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x for x <= 0 (every exponent here is shifted by its maximum first), relative error below 3e-7: Cody-Waite
// reduction to [-ln2/2, ln2/2] and a polynomial of degree 6. Below -87 the result is e^-87, about 1e-38. NaN stays NaN.
ITM_INLINE Vec exp_of_nonpositive(Vec x) {
  const Vec low = splat(-87.0f);
  x = x < low ? low : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the low bits of the float.
  const Vec magic = splat(12582912.0f);
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = splat(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec exponent = (reinterpret_cast<IntVec>(shifted) - 0x4B400000 + 127) << 23;
  return p * reinterpret_cast<Vec>(exponent);
}

// Rows of products, whatever their storage: float32 or bfloat16 (as its 16 bits).
ITM_INLINE void widen(const float* source, float* target, int64_t n) {
  __builtin_memcpy(target, source, static_cast<size_t>(n) * sizeof(float));
}
ITM_INLINE void widen(const uint16_t* source, float* target, int64_t n) {
  uint32_t* bits = reinterpret_cast<uint32_t*>(target);
  for (int64_t i = 0; i < n; ++i) bits[i] = static_cast<uint32_t>(source[i]) << 16;
}
ITM_INLINE void narrow(const float* source, float* target, int64_t n) {
  __builtin_memcpy(target, source, static_cast<size_t>(n) * sizeof(float));
}
ITM_INLINE void narrow(const float* source, uint16_t* target, int64_t n) {
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(source);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t b = bits[i];
    const uint32_t rounded = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;  // to nearest, ties to even
    target[i] = static_cast<uint16_t>((b & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
}
