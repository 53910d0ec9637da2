// Words for the nodes of a pair, on top of row_words.h. No include guard: compiled once per instruction set.

template <class Scalar>
ITM_INLINE float dot_of_rows(const float* x, const Scalar* y, int64_t n) {
  Vec total{};
  for_each_vector(n, [&](int64_t i, auto part) ITM_VISITOR { total += load(x + i, part) * load(y + i, part); });
  return sum_of_lanes(total);
}

// 1 / (1 + e^-x) to the last place: gradients of SAF are small differences of what is made from it, in which the error of
// the vectors' exponential would stand out. One a node, so its time does not.
ITM_INLINE float sigmoid_of(float x) {
  return static_cast<float>(1.0 / (1.0 + __builtin_exp(-static_cast<double>(x))));
}

// Calls visit(pair, memory, sums) for every pair. The pairs of a run belong to one thread, in order, and add to sums of
// their own; memory holds `floats` for one pair after another.
template <class Visit>
ITM_INLINE void for_each_pair_with(const Sums& sums, int64_t pairs, int64_t floats, const Visit& visit) {
  for_each_piece(sums.runs, [&] {
    return [&, memory = std::vector<float>(static_cast<size_t>(floats))](int64_t run) mutable {
      float* own = sums.partials == nullptr ? nullptr : sums.partials + run * sums.width;
      for (int64_t i = 0; i < sums.width; ++i) own[i] = 0.0f;
      for (int64_t pair = run * pairs / sums.runs; pair < (run + 1) * pairs / sums.runs; ++pair) {
        visit(pair, memory.data(), own);
      }
    };
  });
}
