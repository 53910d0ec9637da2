// Vector words for rows of any length and storage (float32, or bfloat16 as its 16 bits), on top of simd.h: the last
// vector of a row may be cut short. No include guard: compiled once per instruction set.

typedef uint16_t HalfVec __attribute__((vector_size(2 * ITM_LANES)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(2 * ITM_LANES), aligned(2), may_alias));

// How much of a vector lies within the row.
struct Whole {};
struct Some {
  int64_t lanes;
};

ITM_INLINE Vec load(const float* p, Whole) { return load(p); }
ITM_INLINE void store(float* p, Vec v, Whole) { store(p, v); }

ITM_INLINE Vec load(const uint16_t* p, Whole) {
  const HalfVec half = *reinterpret_cast<const UnalignedHalfVec*>(p);
  return reinterpret_cast<Vec>(__builtin_convertvector(half, BitVec) << 16);
}
ITM_INLINE void store(uint16_t* p, Vec v, Whole) {
  const BitVec bits = reinterpret_cast<BitVec>(v);
  const BitVec rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const BitVec kept = v == v ? rounded : BitVec{} + 0x7FC0u;
  *reinterpret_cast<UnalignedHalfVec*>(p) = __builtin_convertvector(kept, HalfVec);
}

template <class Scalar>
ITM_INLINE Vec load(const Scalar* p, Some part) {
  Scalar lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(part.lanes) * sizeof(Scalar));
  return load(lanes, Whole{});
}
template <class Scalar>
ITM_INLINE void store(Scalar* p, Vec v, Some part) {
  Scalar lanes[kLanes];
  store(lanes, v, Whole{});
  __builtin_memcpy(p, lanes, static_cast<size_t>(part.lanes) * sizeof(Scalar));
}

// Calls visit(first element, part) for each vector of a row. Lanes past the end are zero when loaded.
template <class Visit>
ITM_INLINE void for_each_vector(int64_t n, const Visit& visit) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(i, Whole{});
  if (i < n) visit(i, Some{n - i});
}
// Goes behind the parameters of such a visitor: its vectors then stay in registers.
#define ITM_VISITOR __attribute__((always_inline))

ITM_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

// tanh: below 0.625 an odd polynomial of degree 11, above it (1 - e^-2x) / (1 + e^-2x); within 2e-7 of the truth,
// relatively as well, and of the sign of x down to the smallest number. NaN stays NaN.
ITM_INLINE Vec tanh_of(Vec x) {
  const Vec size = magnitude(x), y = x * x, e = exp_of_nonpositive(-2.0f * size);
  Vec p = y * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * y + -5.37397155531e-2f;
  p = p * y + 1.33314422036e-1f;
  p = p * y + -3.33332819422e-1f;
  const Vec near = x + x * y * p, far = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

// What l2norm x / (|x| + eps) hands back: the gradient at x is scale (grad - along_x x), along_x from grad . x.
struct NormSlope {
  float scale, along;
};
// `product` is grad . x. Zero where the norm is: a direction that is not there.
ITM_INLINE NormSlope slope_of_l2norm(float norm, float product) {
  const float scale = 1.0f / (norm + kEps);
  return norm > 0.0f ? NormSlope{scale, product * scale / norm} : NormSlope{0.0f, 0.0f};
}
