// similarity_reasoning_scores on CUDA: the alignment of whole images with whole captions. The stages of the nodes stand
// in attention_filtration.cu and similarity_graph.cu; the block loop is itm_kernels/pair_blocks, the mathematics in the
// header beside this.

#include "launch.h"
#include "node_arguments.h"
#include "registration.h"
#include "similarity_reasoning_scores_kernel.cuh"

namespace itm {
namespace {

constexpr const char* kOp = "whole_squares";

template <class T>
WholeCall<T> whole_call(const Tensor& images, const Tensor& captions, const Tensor& squares) {
  const ScalarType type = squares.scalar_type();
  WholeCall<T> call{};
  call.images = images.size(0);
  call.captions = captions.size(0);
  call.width = width_of(kOp, images);
  call.of_images = rows_like<T>(kOp, images, call.images * call.width, type, "images");
  call.of_captions = rows_like<T>(kOp, captions, call.captions * call.width, type, "captions");
  call.squares = rows_like<T>(kOp, squares, call.images * call.captions * call.width, type, "squares");
  call.wide = in_chunks(call.width, 16 / sizeof(T), call.of_images, call.of_captions, call.squares);
  return call;
}

}  // namespace

void block_whole_squares(Tensor images, Tensor captions, Tensor squares) {
  const DeviceGuard guard(squares.get_device_index());
  for_type_of(kOp, squares, [&](auto example) {
    using T = decltype(example);
    const auto call = whole_call<T>(images, captions, squares);
    launch(whole_squares_kernel<T>, blocks_of(call.images * call.captions, 1), kWholeThreads, 0,
           current_stream(squares.get_device_index()), call);
  });
}

void block_whole_squares_backward(Tensor images, Tensor captions, Tensor grad_squares, Tensor grad_images,
                                  Tensor grad_captions) {
  const DeviceGuard guard(grad_squares.get_device_index());
  for_type_of(kOp, grad_squares, [&](auto example) {
    using T = decltype(example);
    auto call = whole_call<T>(images, captions, grad_squares);
    call.grad_images = floats(kOp, grad_images, images.numel(), "grad_images");
    call.grad_captions = floats(kOp, grad_captions, captions.numel(), "grad_captions");
    const dim3 grid(static_cast<unsigned>(call.images + call.captions), blocks_of(call.width, kWarpColumns).x);
    launch(whole_squares_backward_kernel<T>, grid, kWholeThreads, 0, current_stream(grad_squares.get_device_index()),
           call);
  });
}

}  // namespace itm

STABLE_TORCH_LIBRARY_IMPL(ITM_NAMESPACE, ITM_KEY, m) {
  m.impl("block_whole_squares", TORCH_BOX(&itm::block_whole_squares));
  m.impl("block_whole_squares_backward", TORCH_BOX(&itm::block_whole_squares_backward));
}
