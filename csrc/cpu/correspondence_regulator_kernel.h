// The correspondence regulator on the CPU: between the library products of its two networks, and back.
//
//   rows y -> tanh(y + b)
//   z -> t = tanh(z + b),  gate e = clamp(t + e_before, -1, 1),  gated query u = q e          e_before = 1 at the first
//   du -> dq += du e,  de = du q + de_after,  dp = de where |t + e_before| <= 1, else 0,  dz = dp (1 - t^2)
//
// Owner: one thread a row; in the backward a query with its rows of all groups, where their gradients add up. No
// atomics; same bits every run.
// Read: each array once. Never in memory: in a forward alone, t. Accumulation: float32, and so are the gates that go from
// step to step.
// The trick: the gradient of e_before is dp, so one array carries it from step to step, in place; t rather than e is
// kept, for whether the clamp was exactly on its edge cannot be seen in e.
// No include guard: compiled once per instruction set.

#include "row_words.h"

template <class Scalar>
void run_tanh_rows(const TanhCall<Scalar>& call) {
  for_each_row(call.count, kRowGrain, [&](int64_t r) {
    Scalar* row = call.rows + r * call.width;
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      store(row + i, tanh_of(load(row + i, part) + load(call.bias + i, part)), part);
    });
  });
}

// The gradient at tanh is that of a product, in `grad`, or of an inner product with `weight`.
template <class Scalar>
void run_tanh_rows_backward(const TanhCall<Scalar>& call) {
  for_each_row_with(call.sums, call.count, [&](int64_t r, float* sums) {
    const Scalar* row = call.rows + r * call.width;
    Scalar* grad = call.grad + r * call.width;
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec t = load(row + i, part);
      const Vec after = call.weight == nullptr ? load(grad + i, part) : load(call.weight + i, part) * call.grad_dots[r];
      const Vec before = after * (1.0f - t * t);
      store(grad + i, before, part);
      store(sums + i, load(sums + i, part) + before, part);
    });
  });
}

template <class Part>
ITM_INLINE Vec gate_before(const float* before, int64_t i, Part part) {
  return before == nullptr ? splat(1.0f) : load(before + i, part);
}

ITM_INLINE Vec clamped(Vec x) { return smaller(larger(x, splat(-1.0f)), splat(1.0f)); }

template <class Scalar>
void run_gate(const GateCall<Scalar>& call) {
  for_each_row(call.rows, kRowGrain, [&](int64_t r) {
    const int64_t first = r * call.width;
    const Scalar* q = call.queries + r % call.lanes * call.width;
    const float* before = call.before == nullptr ? nullptr : call.before + first;
    Scalar* z = call.products + first;
    for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
      const Vec t = tanh_of(load(z + i, part) + load(call.bias + i, part));
      const Vec e = clamped(t + gate_before(before, i, part));
      if (call.tangents != nullptr) store(call.tangents + first + i, t, part);
      if (call.gates != nullptr) store(call.gates + first + i, e, part);
      store(z + i, load(q + i, part) * e, part);
    });
  });
}

template <class Scalar>
void run_gate_backward(const GateCall<Scalar>& call) {
  for_each_row_with(call.sums, call.lanes, [&](int64_t lane, float* sums) {
    const Scalar* q = call.queries + lane * call.width;
    float* grad_query = call.grad_queries + lane * call.width;
    for (int64_t r = lane; r < call.rows; r += call.lanes) {
      const int64_t first = r * call.width;
      const float* before = call.before == nullptr ? nullptr : call.before + first;
      Scalar* grad = call.products + first;
      float* grad_gate = call.grad_gates == nullptr ? nullptr : call.grad_gates + first;
      for_each_vector(call.width, [&](int64_t i, auto part) ITM_VISITOR {
        const Vec t = load(call.tangents + first + i, part), sum = t + gate_before(before, i, part);
        const Vec du = load(grad + i, part);
        store(grad_query + i, load(grad_query + i, part) + du * clamped(sum), part);
        Vec de = du * load(q + i, part);
        if (grad_gate != nullptr) de += load(grad_gate + i, part);
        const Vec dp = magnitude(sum) <= 1.0f ? de : splat(0.0f);
        if (grad_gate != nullptr) store(grad_gate + i, dp, part);
        const Vec dz = dp * (1.0f - t * t);
        store(grad + i, dz, part);
        store(sums + i, load(sums + i, part) + dz, part);
      });
    }
  });
}
