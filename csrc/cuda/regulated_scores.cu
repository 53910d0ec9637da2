// regulated_scores on CUDA: the cosines of RCR alone; the stages have files of their own.
// The chain is itm_kernels/pair_blocks/regulated_scorer.py, the mathematics in the header beside this.

#include "launch.h"
#include "registration.h"
#include "regulated_scores_kernel.cuh"
#include "row_arguments.h"

namespace itm {
namespace {

constexpr const char* kOp = "regulated_scores";

}  // namespace

void block_cosine_rows(Tensor queries, Tensor attended, Tensor cosines, MaybeTensor slopes) {
  const DeviceGuard guard(attended.get_device_index());
  const PairRows at = pair_rows_of(kOp, queries, attended);
  float* out = floats(kOp, cosines, at.rows(), "cosines");
  float* kept = floats(kOp, slopes, 3 * at.rows(), "slopes");
  const ScalarType type = attended.scalar_type();
  for_type_of(kOp, attended, [&](auto example) {
    using T = decltype(example);
    const T* q = rows_like<T>(kOp, queries, at.queries * at.width, type, "queries");
    const T* c = rows_like<T>(kOp, attended, at.numel(), type, "attended");
    for_chunks(in_chunks(at.width, kChunk<T>, q, c), [&](auto wide) {
      launch(cosine_rows_kernel<T, wide()>, blocks_of(at.rows(), kRowsOfBlock), kRowThreads, 0,
             current_stream(attended.get_device_index()), q, c, out, kept, at.rows(), at.queries, at.width);
    });
  });
}

void block_cosine_rows_backward(Tensor queries, Tensor attended, Tensor slopes, Tensor segments, Tensor counts,
                                Tensor grad_means, Tensor grad_queries) {
  const DeviceGuard guard(attended.get_device_index());
  const PairRows at = pair_rows_of(kOp, queries, attended);
  const int64_t number = counts.numel();
  STD_TORCH_CHECK(
      segments.is_contiguous() && segments.scalar_type() == ScalarType::Int && segments.numel() == at.queries, kOp,
      ": segments must be contiguous int32, one a query");
  const MeanGradients grads{floats(kOp, grad_means, at.groups * number, "grad_means"),
                            static_cast<const int32_t*>(segments.const_data_ptr()),
                            indices(kOp, counts, number, "counts"), number};
  const float* kept = floats(kOp, slopes, 3 * at.rows(), "slopes");
  float* of_queries = floats(kOp, grad_queries, at.queries * at.width, "grad_queries");
  const ScalarType type = attended.scalar_type();
  for_type_of(kOp, attended, [&](auto example) {
    using T = decltype(example);
    const T* q = rows_like<T>(kOp, queries, at.queries * at.width, type, "queries");
    T* c = rows_like<T>(kOp, attended, at.numel(), type, "attended");
    for_chunks(in_chunks(at.width, kChunk<T>, q, c, of_queries), [&](auto wide) {
      const dim3 grid(static_cast<unsigned>(at.queries), blocks_of(at.width, kChunk<T> * kColumnThreads).x);
      launch(cosine_rows_backward_kernel<T, wide()>, grid, kColumnThreads, 0,
             current_stream(attended.get_device_index()), q, c, kept, grads, of_queries, at.groups, at.queries,
             at.width);
    });
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("block_cosine_rows", TORCH_BOX(&itm::block_cosine_rows));
  m.impl("block_cosine_rows_backward", TORCH_BOX(&itm::block_cosine_rows_backward));
}
