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

  // stages of RCAR and SGRAF on the CPU, between the library products of a chunk: key groups against segments of queries.
  // products -> attention weights; products -> their gradient, in place
  m.def(
      "alignment_attention(Tensor products, Tensor key_counts, Tensor offsets, Tensor? temperatures, "
      "float temperature, Tensor(a!) weights) -> ()");
  m.def(
      "alignment_attention_backward(Tensor(a!) products, Tensor key_counts, Tensor offsets, Tensor? temperatures, "
      "float temperature, Tensor grad_weights, Tensor(b!) grad_temperatures) -> ()");
  // (queries - l2norm(attended))^2; the attended vectors -> their gradient, in place
  m.def("squared_differences(Tensor queries, Tensor attended, Tensor(a!) squares, Tensor(b!) norms) -> ()");
  m.def(
      "squared_differences_backward(Tensor queries, Tensor norms, Tensor grad_squares, Tensor(a!) attended, "
      "Tensor(b!) grad_queries) -> ()");
  // rows -> l2norm(rows + bias) in place; these -> the gradient of rows, in place. The gradients of biases here and below
  // are parts [P, width] that the caller sums
  m.def("normalise_rows(Tensor(a!) rows, Tensor bias, Tensor(b!) norms, Tensor(c!) wide) -> ()");
  m.def("normalise_rows_backward(Tensor wide, Tensor norms, Tensor grad, Tensor(a!) rows, Tensor(b!) grad_bias) -> ()");
  // rows -> tanh(rows + bias) in place; their gradient, in place, or made from that of tanh(..) . weight
  m.def("tanh_rows(Tensor(a!) rows, Tensor bias) -> ()");
  m.def(
      "tanh_rows_backward(Tensor rows, Tensor? grad_dots, Tensor? weight, Tensor(a!) grad, Tensor(b!) grad_bias) -> "
      "()");
  // RCR: products -> gated queries in place; their gradient -> that of the products, in place
  m.def(
      "gate_queries(Tensor queries, Tensor bias, Tensor? before, Tensor(a!) products, Tensor(b!)? tangents, "
      "Tensor(c!)? gates) -> ()");
  m.def(
      "gate_queries_backward(Tensor queries, Tensor? before, Tensor tangents, Tensor(a!) grad_products, "
      "Tensor(b!)? grad_gates, Tensor(c!) grad_queries, Tensor(d!) grad_bias) -> ()");
  // RAR: a step of attention over the rows of every pair; weights, keys and asked -> their gradients, in place
  m.def(
      "pool_rows(Tensor vectors, Tensor offsets, Tensor group_numbers, Tensor segment_numbers, "
      "bool groups_are_images, float dropout, int seed, int step, Tensor key_bias, Tensor asked_bias, Tensor value, "
      "Tensor(a!) keys, Tensor(b!) asked, Tensor(c!) weights, Tensor(d!) pooled, Tensor(e!) norms) -> ()");
  m.def(
      "pool_rows_backward(Tensor vectors, Tensor offsets, Tensor group_numbers, Tensor segment_numbers, "
      "bool groups_are_images, float dropout, int seed, int step, Tensor value, Tensor pooled, Tensor norms, "
      "Tensor grad_pooled, Tensor(a!) weights, Tensor(b!) keys, Tensor(c!) asked, Tensor(d!) grad_vectors, "
      "Tensor(e!) grad_key_bias, Tensor(f!) grad_value) -> ()");
  m.def("mean_of_segments(Tensor vectors, Tensor offsets, Tensor(a!) means) -> ()");
  m.def("mean_of_segments_backward(Tensor grad_means, Tensor offsets, Tensor(a!) grad_vectors) -> ()");
  // mean over a segment of the cosine with what its queries attend to, images being Gram matrix times weights; backward:
  // images -> gradient of the weights, in place
  m.def(
      "mean_cosines(Tensor plain, Tensor weights, Tensor images, Tensor query_norms, Tensor offsets, "
      "Tensor(a!) cosines, Tensor(b!) scores) -> ()");
  m.def(
      "mean_cosines_backward(Tensor plain, Tensor weights, Tensor query_norms, Tensor offsets, Tensor grad_scores, "
      "Tensor(a!) images, Tensor(b!) grad_query_norms, Tensor(c!) grad_plain, Tensor(d!) scaled) -> ()");
  // squared differences of whole images with whole captions, and back
  m.def("whole_squares(Tensor images, Tensor captions, Tensor(a!) squares) -> ()");
  m.def(
      "whole_squares_backward(Tensor images, Tensor captions, Tensor grad_squares, Tensor(a!) grad_images, "
      "Tensor(b!) grad_captions) -> ()");
  // SAF: nodes -> logits -> one vector a pair, or its score; gradients of these -> two sums a pair and, where they are
  // given, gradients of nodes and parameters
  m.def("node_logits(Tensor nodes, Tensor weight, float bias, Tensor(a!) logits) -> ()");
  m.def(
      "filter_nodes(Tensor nodes, Tensor offsets, Tensor logits, Tensor statistics, float norm_weight, "
      "float norm_bias, float eps, Tensor(a!) filtered) -> ()");
  m.def(
      "filter_nodes_backward(Tensor nodes, Tensor offsets, Tensor logits, Tensor statistics, float norm_weight, "
      "float norm_bias, float eps, Tensor grad_filtered, Tensor weight, Tensor means, Tensor(a!) slopes, "
      "Tensor(b!)? grad_nodes, Tensor(c!)? sums) -> ()");
  m.def(
      "filtrate_nodes(Tensor nodes, Tensor offsets, Tensor logits, Tensor statistics, float norm_weight, "
      "float norm_bias, float eps, Tensor score_weight, float score_bias, Tensor(a!) scores) -> ()");
  m.def(
      "filtrate_nodes_backward(Tensor nodes, Tensor offsets, Tensor logits, Tensor statistics, float norm_weight, "
      "float norm_bias, float eps, Tensor score_weight, float score_bias, Tensor grad_scores, Tensor weight, "
      "Tensor means, Tensor(a!) slopes, Tensor(b!)? grad_nodes, Tensor(c!)? sums) -> ()");
  // SGR: what asks -> nodes gathered; what asks -> its gradient, in place. rows -> relu(rows + bias), and back, in place
  m.def(
      "graph_attend(Tensor nodes, Tensor offsets, int pairs, Tensor asking, Tensor shift, Tensor(a!) gathered) -> ()");
  m.def(
      "graph_attend_backward(Tensor nodes, Tensor offsets, int pairs, Tensor shift, Tensor grad_gathered, "
      "Tensor(a!) asking, Tensor(b!) grad_nodes, Tensor(c!) grad_shift) -> ()");
  m.def("relu_rows(Tensor(a!) rows, Tensor bias, Tensor(b!)? wide) -> ()");
  m.def("relu_rows_backward(Tensor grad, Tensor(a!) rows, Tensor(b!) grad_bias) -> ()");

  // stages of RCAR and SGRAF on a GPU, on a block of pairs (itm_kernels/pair_blocks/steps.py): row g x L + l is query l
  // facing key group g. One side of a block: its rows packed, and padded groups
  m.def(
      "block_pack_groups(Tensor vectors, Tensor? bounds, Tensor? valid, int extent, Tensor(a!)? rows, "
      "Tensor(b!) offsets, Tensor(c!) counts, Tensor(d!) segments) -> ()");
  m.def("block_pad_groups(Tensor rows, Tensor offsets, Tensor counts, Tensor(a!) padded) -> ()");
  m.def("block_add_padded(Tensor padded, Tensor offsets, Tensor counts, int extent, Tensor(a!) gradient) -> ()");
  // products -> attention weights, and back to another tensor of gradients; `grad` is worked in
  m.def(
      "block_attention_weights(Tensor products, Tensor key_counts, Tensor offsets, Tensor counts, int most_queries, "
      "Tensor? temperatures, float temperature, Tensor(a!) norms, Tensor(b!) weights) -> ()");
  m.def(
      "block_attention_weights_backward(Tensor products, Tensor norms, Tensor key_counts, Tensor offsets, "
      "Tensor counts, int most_queries, Tensor? temperatures, float temperature, Tensor(a!) grad, "
      "Tensor(b!) grad_temperatures, Tensor(c!) grad_products) -> ()");
  m.def("block_squared_differences(Tensor queries, Tensor attended, Tensor(a!) squares, Tensor(b!) norms) -> ()");
  m.def(
      "block_squared_differences_backward(Tensor queries, Tensor(a!) attended, Tensor grad_squares, Tensor norms, "
      "Tensor(b!) grad_queries) -> ()");
  m.def("block_normalise_rows(Tensor(a!) rows, Tensor bias, Tensor(b!) norms, Tensor(c!)? rounded) -> ()");
  m.def("block_normalise_rows_backward(Tensor rows, Tensor norms, Tensor(a!) grad, Tensor(b!)? rounded) -> ()");
  // RCR; gradients of biases are parts [P, width] that the caller sums
  m.def("block_tanh_rows(Tensor rows, Tensor bias, Tensor(a!) out) -> ()");
  m.def(
      "block_warm_rows(Tensor(a!) rows, Tensor bias, Tensor weight, Tensor shift, Tensor? before, float temperature, "
      "Tensor(b!) temperatures) -> ()");
  m.def(
      "block_tanh_rows_backward(Tensor tangents, Tensor grad, Tensor? factors, Tensor(a!) out, Tensor(b!) sums) -> "
      "()");
  m.def(
      "block_gate_queries(Tensor queries, Tensor bias, Tensor? before, Tensor(a!) rows, Tensor(b!)? tangents, "
      "Tensor(c!)? gates) -> ()");
  m.def(
      "block_gate_queries_backward(Tensor queries, Tensor? before, Tensor tangents, Tensor(a!) grad, "
      "Tensor(b!)? grad_gates, Tensor(c!) grad_queries, Tensor(d!) sums) -> ()");
  // RAR: a step of attention over the rows of every pair, and the mean; grad_weights is worked in
  m.def(
      "block_pool_rows(Tensor vectors, Tensor offsets, Tensor counts, bool groups_are_images, int first_group, "
      "int first_segment, int step, int seed, int threshold, float scale, Tensor key_bias, Tensor asked_bias, "
      "Tensor value, Tensor(a!) keys, Tensor(b!) asked, Tensor(c!) weights, Tensor(d!) pooled, Tensor(e!) norms) -> "
      "()");
  m.def(
      "block_pool_rows_backward(Tensor vectors, Tensor offsets, Tensor counts, bool groups_are_images, "
      "int first_group, int first_segment, int step, int seed, int threshold, float scale, Tensor value, Tensor keys, "
      "Tensor asked, Tensor weights, Tensor pooled, Tensor norms, Tensor grad_pooled, Tensor(a!) grad_weights, "
      "Tensor(b!) grad_vectors, Tensor(c!) grad_keys, Tensor(d!) grad_asked, Tensor(e!) grad_bias, "
      "Tensor(f!) grad_value) -> ()");
  m.def("block_mean_rows(Tensor vectors, Tensor offsets, Tensor counts, Tensor(a!) means) -> ()");
  m.def("block_mean_rows_backward(Tensor grad_means, Tensor offsets, Tensor counts, Tensor(a!) grad_vectors) -> ()");
  // cosines with what is attended to, which becomes its gradient on the way back
  m.def("block_cosine_rows(Tensor queries, Tensor attended, Tensor(a!) cosines, Tensor(b!)? slopes) -> ()");
  m.def(
      "block_cosine_rows_backward(Tensor queries, Tensor(a!) attended, Tensor slopes, Tensor segments, Tensor counts, "
      "Tensor grad_means, Tensor(b!) grad_queries) -> ()");
  // nodes of SGRAF on a GPU: captions by offsets and counts on the device, numbers of the parameters as tensors there;
  // gradients of whole vectors are added to, those of parameters are parts [P, width] that the caller sums
  m.def("block_whole_squares(Tensor images, Tensor captions, Tensor(a!) squares) -> ()");
  m.def(
      "block_whole_squares_backward(Tensor images, Tensor captions, Tensor grad_squares, Tensor(a!) grad_images, "
      "Tensor(b!) grad_captions) -> ()");
  m.def("block_node_logits(Tensor nodes, Tensor weight, Tensor bias, Tensor(a!) logits) -> ()");
  m.def(
      "block_filtrate_nodes(Tensor nodes, Tensor offsets, Tensor counts, Tensor logits, Tensor statistics, "
      "Tensor norm_weight, Tensor norm_bias, float eps, Tensor score_weight, Tensor score_bias, Tensor(a!) scores) -> "
      "()");
  m.def(
      "block_filtrate_nodes_backward(Tensor nodes, Tensor offsets, Tensor counts, int most_nodes, Tensor logits, "
      "Tensor statistics, Tensor norm_weight, Tensor norm_bias, float eps, Tensor score_weight, Tensor score_bias, "
      "Tensor grad_scores, Tensor weight, Tensor? means, Tensor(a!) slopes, Tensor(b!)? grad_nodes, Tensor(c!)? sums) "
      "-> ()");
  m.def(
      "block_graph_attend(Tensor nodes, Tensor offsets, Tensor counts, int pairs, int most_nodes, Tensor asking, "
      "Tensor shift, Tensor(a!) gathered) -> ()");
  m.def(
      "block_graph_attend_backward(Tensor nodes, Tensor offsets, Tensor counts, int pairs, int most_nodes, "
      "Tensor shift, Tensor grad_gathered, Tensor(a!) asking, Tensor(b!) grad_nodes, Tensor(c!) sums) -> ()");
  m.def("block_relu_rows(Tensor(a!) rows, Tensor bias, Tensor(b!)? unrounded) -> ()");
  m.def("block_relu_rows_backward(Tensor grad, Tensor(a!) rows, Tensor(b!) sums) -> ()");
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
