// Table of contents of the native library: every schema. Kernels register themselves in cpu/ (and cuda/) files.
//
// These are the raw steps that itm_kernels/native/ drives; users call the ops of itm_kernels/ops/.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(itm_kernels_native, m) {
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
}

#define PY_SSIZE_T_CLEAN
#include <Python.h>

// Importing the module loads the library, whose static initialisers register the ops; it has no members.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
