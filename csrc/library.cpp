// Table of contents of the native library: every schema. Kernels register themselves in cpu/ (and cuda/) files.
//
// These are the raw steps that itm_kernels/native/ drives; users call the ops of itm_kernels/ops/.

#include "cuda/registration.h"

ITM_LIBRARY(ITM_NAMESPACE, m) {
  // X_g X_g^T of ragged groups of rows
  m.def("gram(Tensor rows, Tensor offsets, Tensor(a!) out) -> ()");
  m.def("gram_backward(Tensor grad_gram, Tensor rows, Tensor offsets, Tensor(a!) grad_rows) -> ()");

  // products of a block -> scores; products -> their gradient, in place
  m.def(
      "cross_attention_scores_epilogue(Tensor products, Tensor gram, Tensor key_offsets, Tensor query_offsets, "
      "Tensor query_norms, int feature_norm, int focal, int aggregation, float lambda_softmax, float lambda_lse, "
      "float peak_weight, bool accumulate, Tensor(a!) scores) -> ()");
  m.def(
      "cross_attention_scores_epilogue_backward(Tensor(a!) products, Tensor gram, Tensor key_offsets, "
      "Tensor query_offsets, Tensor query_norms, int feature_norm, int focal, int aggregation, float lambda_softmax, "
      "float lambda_lse, float peak_weight, Tensor grad_scores, Tensor(b!) grad_gram, Tensor(c!) grad_norms) -> ()");

  // the same on a GPU: groups by offsets, or by a stride with or without counts; tiles, row_capacity and splits are how
  // common/scores_tiles.h deals out the work
  m.def(
      "cross_attention_scores_tiles(Tensor products, Tensor gram, Tensor? key_offsets, Tensor? key_counts, "
      "Tensor? query_offsets, Tensor? query_counts, int query_stride, Tensor query_norms, int feature_norm, int focal, "
      "int aggregation, float lambda_softmax, float lambda_lse, float peak_weight, int tiles, int row_capacity, "
      "int splits, bool accumulate, Tensor(a!) scores) -> ()");
  m.def(
      "cross_attention_scores_tiles_backward(Tensor products, Tensor gram, Tensor? key_offsets, Tensor? key_counts, "
      "Tensor? query_offsets, Tensor? query_counts, int query_stride, Tensor query_norms, int feature_norm, int focal, "
      "int aggregation, float lambda_softmax, float lambda_lse, float peak_weight, int tiles, int row_capacity, "
      "int splits, Tensor grad_scores, Tensor? addend, Tensor? scratch, Tensor(a!) grad_products, "
      "Tensor(b!) grad_gram, Tensor(c!) grad_norms) -> ()");

  // product and scores in one kernel (sm_90a, t2i, 36 regions): captions -> tiles of words, rows -> tiles of operands,
  // Gram matrices -> half precision, all of them -> scores
  m.def("fused_scores_captions(Tensor? offsets, int captions, int stride, Tensor(a!) table) -> ()");
  m.def(
      "fused_scores_tiles(Tensor rows, Tensor? offsets, int captions, int stride, Tensor? table, Tensor(a!) tiles) "
      "-> ()");
  m.def("fused_scores_gram(Tensor gram, Tensor(a!) packed, Tensor(b!) scale) -> ()");
  m.def(
      "fused_scores_of_tiles(Tensor word_tiles, Tensor region_tiles, Tensor table, Tensor gram, Tensor gram_scale, "
      "Tensor? query_offsets, Tensor? query_counts, int query_stride, Tensor query_norms, int feature_norm, int focal, "
      "int aggregation, float lambda_softmax, float lambda_lse, float peak_weight, int multiprocessors, "
      "Tensor(a!) scores) -> ()");

  // groups of vectors in any layout -> packed rows, and packed gradients back
  m.def("pack_rows(Tensor vectors, Tensor? offsets, Tensor? counts, Tensor(a!) rows) -> ()");
  m.def("unpack_rows(Tensor rows, Tensor? offsets, Tensor? counts, Tensor(a!) vectors) -> ()");
  // Gram matrices [groups, stride, stride] and norms of packed rows; grad_gram comes in splits, grad_norms in parts
  m.def(
      "gram_of_groups(Tensor rows, Tensor? offsets, Tensor? counts, int groups, int stride, Tensor(a!)? gram, "
      "Tensor(b!)? norms) -> ()");
  m.def(
      "gram_of_groups_backward(Tensor rows, Tensor? offsets, Tensor? counts, int groups, int stride, "
      "Tensor? grad_gram, Tensor? grad_norms, Tensor? norms, Tensor(a!) grad_rows) -> ()");

  // products of a block -> scores and, where arg_max is not empty, the largest key of each query
  m.def(
      "max_similarity_scores_epilogue(Tensor products, Tensor key_offsets, Tensor query_offsets, int aggregation, "
      "float lambda_lse, Tensor(a!) scores, Tensor(b!) arg_max) -> ()");
  // the same on a GPU, and products -> their gradient in place; arg_max is uint8
  m.def(
      "max_similarity_scores_tiles(Tensor products, Tensor? key_offsets, Tensor? key_counts, int key_stride, "
      "Tensor? query_offsets, Tensor? query_counts, int query_stride, int aggregation, float lambda_lse, "
      "int row_capacity, int splits, Tensor(a!)? arg_max, Tensor(b!) scores) -> ()");
  m.def(
      "max_similarity_scores_tiles_backward(Tensor(a!) products, Tensor? key_offsets, Tensor? key_counts, "
      "int key_stride, Tensor? query_offsets, Tensor? query_counts, int query_stride, int aggregation, "
      "float lambda_lse, int row_capacity, int splits, Tensor? arg_max, Tensor grad_scores) -> ()");
  // gradients by the arg-max alone, without products: of maxima and keys, then of queries
  m.def(
      "max_similarity_scores_keys_backward(Tensor keys, Tensor queries, Tensor key_offsets, Tensor query_offsets, "
      "Tensor arg_max, int aggregation, float lambda_lse, Tensor grad_scores, bool accumulate, Tensor(a!) grad_maxima, "
      "Tensor(b!) grad_keys) -> ()");
  m.def(
      "max_similarity_scores_queries_backward(Tensor keys, Tensor key_offsets, Tensor arg_max, Tensor grad_maxima, "
      "bool accumulate, Tensor(a!) grad_queries) -> ()");
}

#ifndef ITM_EMULATED
#define PY_SSIZE_T_CLEAN
#include <Python.h>

// Importing the module loads the library, whose static initialisers register the ops; it has no members.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
