// The quadratic form that replaces the attended vector: ||c||^2 = a^T G a with G = K K^T of the key group, its image
// u = G a, and the gradient dG = sum over queries of dq a a^T. Register-blocked 4 keys x 2 vectors (forward) and
// 4 x 4 keys (outer); the odd rows at the end run one at a time. No include guard: compiled once per instruction set.

// kRows rows of G times kVecs vectors of weights.
template <int kRows, int kVecs>
ITM_INLINE void gram_rows(const float* gram, int64_t stride, const float* weights, int64_t width, int64_t keys,
                          Vec (&sum)[kRows][kVecs]) {
  for (int64_t j = 0; j < keys; ++j) {
    Vec a[kVecs];
    for (int v = 0; v < kVecs; ++v) a[v] = load(weights + j * width + v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVecs; ++v) sum[i][v] += a[v] * gram[i * stride + j];
    }
  }
}

template <int kRows, int kVecs, bool kWithImage>
ITM_INLINE void gram_block(const Tile& tile, const float* gram, int64_t stride, int64_t k0, int64_t l) {
  Vec sum[kRows][kVecs] = {};
  const float* column = tile.weights + l;
  const float* rows = gram + k0 * stride;
  // All of G, though it is symmetric: twice a triangle would be half the work, but where keys cancel the rows of G a are
  // small one by one, while a triangle's parts are not.
  gram_rows<kRows, kVecs>(rows, stride, column, tile.width, tile.keys, sum);
  for (int v = 0; v < kVecs; ++v) {
    float* quadratic = tile.quadratic + l + v * kLanes;
    Vec total = k0 == 0 ? splat(0.0f) : load(quadratic);
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = (k0 + i) * tile.width + l + v * kLanes;
      total += load(tile.weights + at) * sum[i][v];
      if (kWithImage) store(tile.image + at, sum[i][v]);
    }
    store(quadratic, total);
  }
}

template <int kVecs, bool kWithImage>
ITM_INLINE void gram_column(const Tile& tile, const float* gram, int64_t stride, int64_t l) {
  int64_t k = 0;
  for (; k + 4 <= tile.keys; k += 4) gram_block<4, kVecs, kWithImage>(tile, gram, stride, k, l);
  for (; k < tile.keys; ++k) gram_block<1, kVecs, kWithImage>(tile, gram, stride, k, l);
}

template <bool kWithImage>
ITM_INLINE void quadratic_form(const Tile& tile, const float* gram, int64_t stride) {
  int64_t l = 0;
  for (; l + 2 * kLanes <= tile.width; l += 2 * kLanes) gram_column<2, kWithImage>(tile, gram, stride, l);
  if (l < tile.width) gram_column<1, kWithImage>(tile, gram, stride, l);
}

// dG[k, j] += sum_l dq_l a_kl a_jl for a block of rows k and columns j.
template <int kRows, int kColumns>
ITM_INLINE void outer_block(const Tile& tile, int64_t k0, int64_t j0, float* grad_gram, int64_t stride) {
  Vec sum[kRows][kColumns] = {};
  for (int64_t l = 0; l < tile.width; l += kLanes) {
    const Vec grad = load(tile.grad_quadratic + l);
    Vec right[kColumns];
    for (int j = 0; j < kColumns; ++j) right[j] = load(tile.weights + (j0 + j) * tile.width + l);
    for (int i = 0; i < kRows; ++i) {
      const Vec left = grad * load(tile.weights + (k0 + i) * tile.width + l);
      for (int j = 0; j < kColumns; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) grad_gram[(k0 + i) * stride + j0 + j] += sum_of_lanes(sum[i][j]);
  }
}

template <int kRows>
ITM_INLINE void outer_row(const Tile& tile, int64_t k, float* grad_gram, int64_t stride) {
  int64_t j = 0;
  for (; j + 4 <= k + kRows; j += 4) outer_block<kRows, 4>(tile, k, j, grad_gram, stride);
  for (; j < k + kRows; ++j) outer_block<kRows, 1>(tile, k, j, grad_gram, stride);
}

// Fills the lower triangle; mirror_gram copies it up once the key group is done.
ITM_INLINE void add_gram_gradient(const Tile& tile, float* grad_gram, int64_t stride) {
  int64_t k = 0;
  for (; k + 4 <= tile.keys; k += 4) outer_row<4>(tile, k, grad_gram, stride);
  for (; k < tile.keys; ++k) outer_row<1>(tile, k, grad_gram, stride);
}

ITM_INLINE void mirror_gram(int64_t keys, float* grad_gram, int64_t stride) {
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t j = k + 1; j < keys; ++j) grad_gram[k * stride + j] = grad_gram[j * stride + k];
  }
}
