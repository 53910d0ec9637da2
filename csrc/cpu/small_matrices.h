// Products of matrices of a few dozen rows, too small and too many for a library: those of one pair in the first-level
// cache. No include guard: compiled once per instruction set.
//
// Rows are floats at a stride of whole vectors, zero behind their end; every matrix has room for whole blocks of rows
// (padded_rows), whose extra rows hold anything and reach nothing but extra rows and columns.

constexpr int64_t kBlockRows = 4;
constexpr int64_t kBlockColumns = kLanes == 16 ? 4 : 2;  // accumulators of a block: half of the registers

ITM_INLINE int64_t padded_rows(int64_t n) { return (n + kBlockRows - 1) / kBlockRows * kBlockRows; }
ITM_INLINE int64_t padded_columns(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <int64_t kRows>
ITM_INLINE void dots_of_block(const float* a, const float* b, int64_t n, int64_t stride, float* out,
                              int64_t out_stride) {
  for (int64_t k = 0; k < n; k += kBlockColumns) {
    Vec sums[kRows][kBlockColumns] = {};
    for (int64_t c = 0; c < stride; c += kLanes) {
      Vec right[kBlockColumns];
      for (int64_t j = 0; j < kBlockColumns; ++j) right[j] = load(b + (k + j) * stride + c);
      for (int64_t i = 0; i < kRows; ++i) {
        const Vec left = load(a + i * stride + c);
        for (int64_t j = 0; j < kBlockColumns; ++j) sums[i][j] += left * right[j];
      }
    }
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < kBlockColumns; ++j) out[i * out_stride + k + j] = sum_of_lanes(sums[i][j]);
    }
  }
}

// out [m, n] = a [m, stride] b^T, b [n, stride].
ITM_INLINE void dots_of_rows(const float* a, const float* b, int64_t m, int64_t n, int64_t stride, float* out,
                             int64_t out_stride) {
  if (m == 1) return dots_of_block<1>(a, b, n, stride, out, out_stride);
  for (int64_t i = 0; i < m; i += kBlockRows) {
    dots_of_block<kBlockRows>(a + i * stride, b, n, stride, out + i * out_stride, out_stride);
  }
}

// Weights of a combination: of row k in sum i, at i * by_sum + k * by_row. A transposed matrix has them swapped.
struct Weights {
  const float* values;
  int64_t by_sum, by_row;
};

template <int64_t kRows, bool kAdd>
ITM_INLINE void combine_block(const Weights& weights, const float* rows, int64_t n, int64_t stride, float* out) {
  constexpr int64_t kVectors = kBlockColumns;
  for (int64_t c = 0; c < stride; c += kVectors * kLanes) {
    const int64_t vectors = (stride - c) / kLanes < kVectors ? (stride - c) / kLanes : kVectors;
    Vec sums[kRows][kVectors] = {};
    if (vectors == kVectors) {
      for (int64_t k = 0; k < n; ++k) {
        for (int64_t i = 0; i < kRows; ++i) {
          const float weight = weights.values[i * weights.by_sum + k * weights.by_row];
          for (int64_t v = 0; v < kVectors; ++v) sums[i][v] += weight * load(rows + k * stride + c + v * kLanes);
        }
      }
    } else {
      for (int64_t k = 0; k < n; ++k) {
        for (int64_t i = 0; i < kRows; ++i) {
          const float weight = weights.values[i * weights.by_sum + k * weights.by_row];
          for (int64_t v = 0; v < vectors; ++v) sums[i][v] += weight * load(rows + k * stride + c + v * kLanes);
        }
      }
    }
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t v = 0; v < vectors; ++v) {
        float* target = out + i * stride + c + v * kLanes;
        store(target, kAdd ? load(target) + sums[i][v] : sums[i][v]);
      }
    }
  }
}

// out [m, stride] = or += weights [m, n] rows [n, stride].
template <bool kAdd>
ITM_INLINE void combine_rows(const Weights& weights, const float* rows, int64_t m, int64_t n, int64_t stride,
                             float* out) {
  if (m == 1) return combine_block<1, kAdd>(weights, rows, n, stride, out);
  for (int64_t i = 0; i < m; i += kBlockRows) {
    const Weights of_block{weights.values + i * weights.by_sum, weights.by_sum, weights.by_row};
    combine_block<kBlockRows, kAdd>(of_block, rows, n, stride, out + i * stride);
  }
}

// Softmax of every row of [m, n] at a stride of whole vectors, in place.
ITM_INLINE void softmax_of_rows(float* rows, int64_t m, int64_t n, int64_t stride) {
  for (int64_t i = 0; i < m; ++i) {
    float* row = rows + i * stride;
    float best = row[0];
    for (int64_t k = 1; k < n; ++k) best = row[k] > best ? row[k] : best;
    Vec total{};
    for (int64_t k = 0; k < n; k += kLanes) {
      const Vec e = first_lanes(exp_of_nonpositive(load(row + k) - best), n - k, 0.0f);
      store(row + k, e);
      total += e;
    }
    const Vec scale = splat(1.0f / sum_of_lanes(total));
    for (int64_t k = 0; k < n; k += kLanes) store(row + k, load(row + k) * scale);
  }
}
