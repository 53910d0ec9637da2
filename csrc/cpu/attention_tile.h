// The working set of one step: some query segments of one key group, in a layout that all phases share.
//
// A *key group* is what is attended to (t2i: the regions of an image; i2t: the words of a caption), a *segment* is the
// run of queries that belongs to one partner (t2i: the words of a caption; i2t: the regions of an image). Both
// directions are this one picture, transposed: keys are rows, queries are lanes.
//
//   products [keys, lanes]    row k, lane l: inner product of key k and query l
//
// Segments stand one after another, so lanes are full vectors but for the end of the tile; only phases that work
// within a segment see its ragged end. Lanes past the last segment hold zeros in every array that is read.
// Phases that write a segment in whole vectors spill into the lanes of the next one: they go in ascending order and
// never in place. No include guard: compiled once per instruction set.

struct Tile {
  int64_t keys;
  int64_t lanes;  // queries in this tile
  int64_t width;  // lanes rounded up to whole vectors: the stride of a row
  int64_t segments;
  const int64_t* offsets;  // [segments + 1], absolute lane of each segment; offsets[0] is the tile's first lane

  float* raw;        // [keys, width] products
  float* weights;    // [keys, width] logits, then attention weights
  float* image;      // [keys, width] Gram matrix times weights; later gradients       (backward only)
  float* normed;     // [keys, width] softmax of products over a segment               (FeatureNorm::kSoftmax)
  float* norms;      // [keys, segments] norm of a key's products over a segment
  float* scales;     // [keys, segments] 1 / (norm + eps)
  float* row;        // [width] one row in passing
  float* dot;        // [width] q . c, the rest per query as well
  float* quadratic;  // ||c||^2
  float* cosine;
  float* peak;         // largest weight
  float* grad_cosine;  //                                                                 (backward only)
  float* grad_peak;
  float* grad_dot;
  float* grad_quadratic;

  int64_t begin(int64_t s) const { return offsets[s] - offsets[0]; }
  int64_t count(int64_t s) const { return offsets[s + 1] - offsets[s]; }
};

// Floats of scratch for tiles of up to `keys` keys, `width` lanes and `segments` segments; every array keeps one
// vector of slack behind it for the last spill.
ITM_INLINE int64_t scratch_floats(int64_t keys, int64_t width, int64_t segments) {
  return 4 * (keys * width + kLanes) + 2 * (keys * segments + kLanes) + 9 * (width + kLanes);
}

ITM_INLINE Tile carve(float* scratch, int64_t keys, int64_t width, int64_t segments) {
  Tile tile{};
  auto take = [&](int64_t floats) {
    float* here = scratch;
    scratch += floats + kLanes;
    return here;
  };
  for (float** matrix : {&tile.raw, &tile.weights, &tile.image, &tile.normed}) *matrix = take(keys * width);
  for (float** table : {&tile.norms, &tile.scales}) *table = take(keys * segments);
  for (float** lane : {&tile.row, &tile.dot, &tile.quadratic, &tile.cosine, &tile.peak, &tile.grad_cosine,
                       &tile.grad_peak, &tile.grad_dot, &tile.grad_quadratic}) {
    *lane = take(width);
  }
  return tile;
}

template <class Scalar>
ITM_INLINE void load_products(const Tile& tile, const Scalar* products, int64_t stride) {
  for (int64_t k = 0; k < tile.keys; ++k) {
    float* row = tile.raw + k * tile.width;
    store(row + tile.width - kLanes, splat(0.0f));
    widen(products + k * stride + tile.offsets[0], row, tile.lanes);
  }
}

template <class Scalar>
ITM_INLINE void store_products(const Tile& tile, const float* rows, Scalar* products, int64_t stride) {
  for (int64_t k = 0; k < tile.keys; ++k) {
    narrow(rows + k * tile.width, products + k * stride + tile.offsets[0], tile.lanes);
  }
}
