// The aggregation regulator (RAR) on CUDA: what happens between the library products of a block of pairs.
// The chain is itm_kernels/pair_blocks/aggregation.py, the mathematics in the header beside this.

#include "aggregation_regulator_kernel.cuh"
#include "launch.h"
#include "registration.h"
#include "row_arguments.h"

namespace itm {
namespace {

constexpr const char* kOp = "aggregation_regulator";

PairDropout dropout_of(bool groups_are_images, int64_t first_group, int64_t first_segment, int64_t step, int64_t seed,
                       int64_t threshold, double scale) {
  return {first_group,
          first_segment,
          step,
          static_cast<uint64_t>(seed),
          static_cast<uint32_t>(threshold),
          static_cast<float>(scale),
          groups_are_images};
}

PoolCall pool_call(const Tensor& vectors, const Tensor& offsets, const Tensor& counts, const PairDropout& dropout,
                   const Tensor& keys, const Tensor& asked, const Tensor& value, const Tensor& weights,
                   const Tensor& pooled, const Tensor& norms) {
  STD_TORCH_CHECK(vectors.dim() == 2 && asked.dim() == 2 && counts.numel() > 0 && asked.size(0) % counts.numel() == 0 &&
                      asked.size(0) > 0 && asked.size(1) == vectors.size(1),
                  kOp, ": vectors must be [rows, S] beside asked [pairs, S]");
  const int64_t segments = counts.numel(), pairs = asked.size(0), rows = vectors.size(0), width = vectors.size(1);
  PoolCall call{};
  call.offsets = indices(kOp, offsets, segments + 1, "offsets");
  call.counts = indices(kOp, counts, segments, "counts");
  call.segments = segments;
  call.queries = rows / (pairs / segments);
  call.width = static_cast<int>(width);
  call.dropout = dropout;
  call.vectors = floats(kOp, vectors, rows * width, "vectors");
  call.keys = floats(kOp, keys, rows * width, "keys");
  call.asked = floats(kOp, asked, pairs * width, "asked");
  call.value = floats(kOp, value, width, "value");
  call.weights = floats(kOp, weights, rows, "weights");
  call.pooled = floats(kOp, pooled, pairs * width, "pooled");
  call.norms = floats(kOp, norms, pairs, "norms");
  return call;
}

MeanCall mean_call(const Tensor& vectors, const Tensor& offsets, const Tensor& counts, const Tensor& means) {
  STD_TORCH_CHECK(vectors.dim() == 2 && means.dim() == 2 && counts.numel() > 0 && means.size(0) > 0 &&
                      means.size(0) % counts.numel() == 0 && means.size(1) == vectors.size(1),
                  kOp, ": vectors must be [rows, S] beside means [pairs, S]");
  const int64_t segments = counts.numel(), pairs = means.size(0);
  return {indices(kOp, offsets, segments + 1, "offsets"), indices(kOp, counts, segments, "counts"), pairs, segments,
          vectors.size(0) / (pairs / segments),           static_cast<int>(means.size(1))};
}

}  // namespace

void block_pool_rows(Tensor vectors, Tensor offsets, Tensor counts, bool groups_are_images, int64_t first_group,
                     int64_t first_segment, int64_t step, int64_t seed, int64_t threshold, double scale,
                     Tensor key_bias, Tensor asked_bias, Tensor value, Tensor keys, Tensor asked, Tensor weights,
                     Tensor pooled, Tensor norms) {
  const DeviceGuard guard(vectors.get_device_index());
  const auto dropout = dropout_of(groups_are_images, first_group, first_segment, step, seed, threshold, scale);
  PoolCall call = pool_call(vectors, offsets, counts, dropout, keys, asked, value, weights, pooled, norms);
  call.key_bias = floats(kOp, key_bias, call.width, "key_bias");
  call.asked_bias = floats(kOp, asked_bias, call.width, "asked_bias");
  const bool chunks = in_chunks(call.width, kChannels, call.vectors, call.keys, call.asked, call.key_bias,
                                call.asked_bias, call.value, call.pooled);
  for_chunks(chunks, [&](auto wide) {
    launch(pool_rows_kernel<wide()>, blocks_of(asked.size(0), 1), kPoolThreads,
           static_cast<size_t>(pool_bytes(call.width)), current_stream(vectors.get_device_index()), call);
  });
}

void block_pool_rows_backward(Tensor vectors, Tensor offsets, Tensor counts, bool groups_are_images,
                              int64_t first_group, int64_t first_segment, int64_t step, int64_t seed, int64_t threshold,
                              double scale, Tensor value, Tensor keys, Tensor asked, Tensor weights, Tensor pooled,
                              Tensor norms, Tensor grad_pooled, Tensor grad_weights, Tensor grad_vectors,
                              Tensor grad_keys, Tensor grad_asked, Tensor grad_bias, Tensor grad_value) {
  const DeviceGuard guard(vectors.get_device_index());
  const auto dropout = dropout_of(groups_are_images, first_group, first_segment, step, seed, threshold, scale);
  const PoolCall call = pool_call(vectors, offsets, counts, dropout, keys, asked, value, weights, pooled, norms);
  const int64_t of_rows = vectors.numel(), of_pairs = asked.numel();
  const PoolGradients grads{
      floats(kOp, grad_pooled, of_pairs, "grad_pooled"),  floats(kOp, grad_weights, vectors.size(0), "grad_weights"),
      floats(kOp, grad_vectors, of_rows, "grad_vectors"), floats(kOp, grad_asked, of_pairs, "grad_asked"),
      floats(kOp, grad_bias, of_pairs, "grad_bias"),      floats(kOp, grad_value, of_pairs, "grad_value")};
  for_type_of(kOp, grad_keys, [&](auto example) {
    using T = decltype(example);
    T* of_keys = rows_like<T>(kOp, grad_keys, of_rows, grad_keys.scalar_type(), "grad_keys");
    const bool chunks = in_chunks(call.width, kChannels, call.vectors, call.keys, call.asked, call.value, call.pooled,
                                  grads.pooled, grads.vectors, grads.asked, grads.bias, grads.value, of_keys);
    for_chunks(chunks, [&](auto wide) {
      launch(pool_rows_backward_kernel<T, wide()>, blocks_of(asked.size(0), 1), kPoolThreads,
             static_cast<size_t>(pool_bytes(call.width)), current_stream(vectors.get_device_index()), call, grads,
             of_keys);
    });
  });
}

void block_mean_rows(Tensor vectors, Tensor offsets, Tensor counts, Tensor means) {
  const DeviceGuard guard(vectors.get_device_index());
  const MeanCall call = mean_call(vectors, offsets, counts, means);
  launch(mean_rows_kernel, blocks_of(means.numel(), kColumnThreads), kColumnThreads, 0,
         current_stream(vectors.get_device_index()), call, floats(kOp, vectors, vectors.numel(), "vectors"),
         floats(kOp, means, means.numel(), "means"));
}

void block_mean_rows_backward(Tensor grad_means, Tensor offsets, Tensor counts, Tensor grad_vectors) {
  const DeviceGuard guard(grad_vectors.get_device_index());
  const MeanCall call = mean_call(grad_vectors, offsets, counts, grad_means);
  launch(mean_rows_backward_kernel, blocks_of(grad_means.numel(), kColumnThreads), kColumnThreads, 0,
         current_stream(grad_vectors.get_device_index()), call,
         floats(kOp, grad_means, grad_means.numel(), "grad_means"),
         floats(kOp, grad_vectors, grad_vectors.numel(), "grad_vectors"));
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("block_pool_rows", TORCH_BOX(&itm::block_pool_rows));
  m.impl("block_pool_rows_backward", TORCH_BOX(&itm::block_pool_rows_backward));
  m.impl("block_mean_rows", TORCH_BOX(&itm::block_mean_rows));
  m.impl("block_mean_rows_backward", TORCH_BOX(&itm::block_mean_rows_backward));
}
