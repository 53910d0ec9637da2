// Squared differences of whole images v_i and whole captions t_c, and back, around a library product.
//
//   s_ic = (v_i - t_c)^2        dv_i = 2 sum_c (v_i - t_c) ds_ic        dt_c = -2 sum_i (v_i - t_c) ds_ic
//
// Owner: one thread a row of squares; in the backward one row of v, then one of t. No atomics; same bits every run.
// Read: each row of squares once, in the backward twice. Never in memory: the differences. Accumulation: float32.
// The trick: none; one row a pair, where its words have a dozen.
// No include guard: compiled once per instruction set.

#include "row_words.h"

constexpr int64_t kSquaresGrain = 8;  // rows of a piece: at least some microseconds of work

template <class Scalar>
void run_whole(const WholeCall<Scalar>& call) {
  for_each_row(call.images * call.captions, kSquaresGrain, [&](int64_t pair) {
    const Scalar* v = call.of_images + pair / call.captions * call.width;
    const Scalar* t = call.of_captions + pair % call.captions * call.width;
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec difference = load(v + i, part) - load(t + i, part);
      store(call.squares + pair * call.width + i, difference * difference, part);
    });
  });
}

// grad += sign 2 (v - t) ds
template <class Scalar>
ITM_INLINE void add_to_gradient(const Scalar* v, const Scalar* t, const Scalar* grad_square, float sign, int64_t n,
                                float* grad) {
  for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR {
    const Vec back = 2.0f * sign * (load(v + i, part) - load(t + i, part)) * load(grad_square + i, part);
    store(grad + i, load(grad + i, part) + back, part);
  });
}

template <class Scalar>
void run_whole_backward(const WholeCall<Scalar>& call) {
  const int64_t n = call.width;
  for_each_row(call.images, 1, [&](int64_t i) {
    float* grad = call.grad_images + i * n;
    __builtin_memset(grad, 0, static_cast<size_t>(n) * sizeof(float));
    for (int64_t c = 0; c < call.captions; ++c) {
      add_to_gradient(call.of_images + i * n, call.of_captions + c * n, call.squares + (i * call.captions + c) * n,
                      1.0f, n, grad);
    }
  });
  for_each_row(call.captions, kSquaresGrain, [&](int64_t c) {
    for (int64_t i = 0; i < call.images; ++i) {
      add_to_gradient(call.of_images + i * n, call.of_captions + c * n, call.squares + (i * call.captions + c) * n,
                      -1.0f, n, call.grad_captions + c * n);
    }
  });
}
