// Gram matrices of ragged groups of rows, and their gradient. No include guard: compiled once per instruction set.
//
//   gram[g] = X_g X_g^T           grad_X_g += 2 grad_gram[g] X_g   (grad_gram symmetric)
//
// Owner: one thread a group. A 4 x 4 block of inner products stays in registers while the width is walked; only the
// lower triangle is computed. Accumulation: float32. Rows of other storage are widened slice by slice of the width.

template <int kRows, int kColumns>
ITM_INLINE void inner_products(const float* left, const float* right, int64_t stride, int64_t width, float* gram,
                               int64_t gram_stride, bool first) {
  Vec sum[kRows][kColumns] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    Vec r[kColumns];
    for (int j = 0; j < kColumns; ++j) r[j] = load(right + j * stride + d);
    for (int i = 0; i < kRows; ++i) {
      const Vec l = load(left + i * stride + d);
      for (int j = 0; j < kColumns; ++j) sum[i][j] += l * r[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      float total = sum_of_lanes(sum[i][j]);
      for (int64_t t = d; t < width; ++t) total += left[i * stride + t] * right[j * stride + t];
      float& out = gram[i * gram_stride + j];
      out = first ? total : out + total;
    }
  }
}

template <int kRows>
ITM_INLINE void gram_row_block(const float* rows, int64_t k, int64_t stride, int64_t width, float* gram,
                               int64_t gram_stride, bool first) {
  int64_t j = 0;
  float* out = gram + k * gram_stride;
  const float* left = rows + k * stride;
  for (; j + 4 <= k + kRows; j += 4) {
    inner_products<kRows, 4>(left, rows + j * stride, stride, width, out + j, gram_stride, first);
  }
  for (; j < k + kRows; ++j) {
    inner_products<kRows, 1>(left, rows + j * stride, stride, width, out + j, gram_stride, first);
  }
}

// `slice` holds keys rows of kSlice floats: with 36 rows it stays in the first two cache levels.
template <class Scalar>
void gram_of_group(const Scalar* rows, int64_t keys, int64_t width, float* gram, int64_t gram_stride, float* slice) {
  for (int64_t d = 0; d < width; d += kSlice) {
    const int64_t n = width - d < kSlice ? width - d : kSlice;
    for (int64_t k = 0; k < keys; ++k) widen(rows + k * width + d, slice + k * kSlice, n);
    int64_t k = 0;
    for (; k + 4 <= keys; k += 4) gram_row_block<4>(slice, k, kSlice, n, gram, gram_stride, d == 0);
    for (; k < keys; ++k) gram_row_block<1>(slice, k, kSlice, n, gram, gram_stride, d == 0);
  }
  for (int64_t i = 0; i < keys; ++i) {
    for (int64_t j = i + 1; j < keys; ++j) gram[i * gram_stride + j] = gram[j * gram_stride + i];
  }
}

template <int kRows, int kVecs>
ITM_INLINE void combine_rows(const float* grad_gram, int64_t gram_stride, const float* slice, int64_t keys, float* out,
                             int64_t width) {
  Vec sum[kRows][kVecs] = {};
  for (int64_t j = 0; j < keys; ++j) {
    Vec x[kVecs];
    for (int v = 0; v < kVecs; ++v) x[v] = load(slice + j * kSlice + v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVecs; ++v) sum[i][v] += x[v] * grad_gram[i * gram_stride + j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      float* at = out + i * width + v * kLanes;
      store(at, load(at) + 2.0f * sum[i][v]);
    }
  }
}

template <int kVecs>
ITM_INLINE void combine_column(const float* grad_gram, int64_t gram_stride, const float* slice, int64_t keys,
                               float* out, int64_t width) {
  int64_t k = 0;
  for (; k + 4 <= keys; k += 4) {
    combine_rows<4, kVecs>(grad_gram + k * gram_stride, gram_stride, slice, keys, out + k * width, width);
  }
  for (; k < keys; ++k) {
    combine_rows<1, kVecs>(grad_gram + k * gram_stride, gram_stride, slice, keys, out + k * width, width);
  }
}

template <class Scalar>
void gram_of_group_backward(const float* grad_gram, int64_t gram_stride, const Scalar* rows, int64_t keys,
                            int64_t width, float* grad_rows, float* slice) {
  for (int64_t d = 0; d < width; d += kSlice) {
    const int64_t n = width - d < kSlice ? width - d : kSlice;
    for (int64_t k = 0; k < keys; ++k) widen(rows + k * width + d, slice + k * kSlice, n);
    int64_t e = 0;
    for (; e + 2 * kLanes <= n; e += 2 * kLanes) {
      combine_column<2>(grad_gram, gram_stride, slice + e, keys, grad_rows + d + e, width);
    }
    for (; e + kLanes <= n; e += kLanes) {
      combine_column<1>(grad_gram, gram_stride, slice + e, keys, grad_rows + d + e, width);
    }
    for (; e < n; ++e) {
      for (int64_t k = 0; k < keys; ++k) {
        float total = 0.0f;
        for (int64_t j = 0; j < keys; ++j) total += grad_gram[k * gram_stride + j] * slice[j * kSlice + e];
        grad_rows[k * width + d + e] += 2.0f * total;
      }
    }
  }
}

template <class Scalar>
void run_gram(const GramCall<Scalar>& call) {
  run_groups(call, [&](int64_t g, int64_t begin, int64_t keys, float* slice) {
    gram_of_group(call.rows + begin * call.width, keys, call.width, call.gram + g * call.most_keys * call.most_keys,
                  call.most_keys, slice);
  });
}

template <class Scalar>
void run_gram_backward(const GramCall<Scalar>& call) {
  run_groups(call, [&](int64_t g, int64_t begin, int64_t keys, float* slice) {
    gram_of_group_backward(call.gram + g * call.most_keys * call.most_keys, call.most_keys,
                           call.rows + begin * call.width, keys, call.width, call.grad_rows + begin * call.width,
                           slice);
  });
}
