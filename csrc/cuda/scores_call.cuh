// What one launch of the score epilogue works on: products of a block with queries as rows and keys as columns.
//
// Both directions are this one picture: t2i queries are words and keys are regions, i2t the other way round. Strides
// let one direction read what the other one laid out.
#pragma once

#include "../common/options.h"
#include "feature_norm.cuh"
#include "groups.cuh"

namespace itm {

// Element (query q, key k) of a block at q * query_stride + k * key_stride.
template <class T>
struct Matrix {
  T* data;
  int64_t query_stride, key_stride;
  bool pairs;  // keys 2 i and 2 i + 1 of a row stand in one aligned word

  __device__ __forceinline__ T& at(int64_t query, int64_t key) const {
    return data[query * query_stride + key * key_stride];
  }
};

template <class T>
struct ScoresCall {
  ScoreOptions options;
  Feature feature;
  Matrix<const T> products;
  Groups keys, queries;
  int64_t groups, segments, rows;  // key groups, query segments, query rows of the block
  const float* gram;               // [groups, most_keys, most_keys]
  int most_keys;
  const float* query_norms;  // [rows]
  const float* scores_in;    // backward: gradient of the scores
  float* scores;             // forward: [groups, segments] by strides
  int64_t group_stride, segment_stride;
  bool accumulate;
  int64_t span;      // query rows of a split: a block of threads takes the segments that begin in one
  int row_capacity;  // rows of a tile in shared memory, a multiple of 16

  // backward
  Matrix<T> grad_products;
  Matrix<const T> addend;  // added to the gradient on its way out, where data is not null
  float* grad_gram;        // [splits, groups, most_keys, most_keys]
  float* grad_norms;       // [blocks of groups, rows]
};

constexpr float kLog2E = 1.4426950408889634f;

}  // namespace itm
